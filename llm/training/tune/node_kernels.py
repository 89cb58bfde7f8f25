"""Which kernel computes the attention of a batch, and the two that CUDA has beside `attend_nodes`.

    device and batch                                      kernel            PyTorch's
    CUDA, bfloat16 or float16, no shared nodes            `attend_varlen`   varlen_attn (FlashAttention)
    CUDA, shared nodes                                    `attend_flex`     FlexAttention, compiled
    all else; any dropout, soft cap or small batch        `attend_nodes`    scaled_dot_product_attention, node by node

No GPU was at hand: the choice, what is handed to the kernels and the mask are tested on the CPU, that they run and how
fast is not known. So none is believed: `trusted_kernel` first compares it with `attend_nodes`, forward and backward,
and one that fails or differs gives way to it, with a warning. `benchmarks/attention.py` measures what a machine has.

On the CPU nothing exact was found that is much faster in float32 (2 cores, torch 2.13, SmolLM2-135M, forward and
backward): a prompt of 1,147 tokens before 10 examples of 290 costs 3.5 to 4 times the attention of the same number of
tokens that share nothing, but since each token sees so much more, not for want of a kernel. The prompt unmasked for all
children at once and the rest apart take 0.94 of the time before they are merged; of a whole training step 0.97
(`benchmarks/attention.py`). In bfloat16 `product_attention` is faster.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from llm.training.tune.node_sdpa import ScoreRule, attend_nodes
from llm.training.tune.nodes import node_positions, subtree_ranges

logger = logging.getLogger(__name__)

# FlexAttention skips what no token of a tile sees; a batch that fits into one tile has nothing to skip.
FLEX_TILE_TOKENS = 128

# Largest relative difference to `attend_nodes` of a token's output or gradient: rounding in bfloat16 makes 0.007
# to 0.015, one token that sees a node too many 0.18 and more, a window longer by one 0.33 and more.
TOLERANCE = 0.05
# What `trusted_kernel` tries: a prompt longer than a tile with children and a grandchild, and what stands alone.
TRIAL_LENGTHS = (7, 150, 20, 1, 90, 5)
TRIAL_PARENTS = (-1, -1, 1, 1, 2, -1)
TRIAL_WINDOW = 50  # that of a model may be longer than all these, and never cut anything

Kernel = Callable[..., Tensor]  # of the signature of `attend_nodes`


def choose_kernel(
    device_type: str, *, dtype: torch.dtype, rule: ScoreRule, node_lengths: Sequence[int], node_parents: Sequence[int]
) -> Kernel:
    """The kernel that suits: the table above."""
    if device_type != "cuda" or rule.dropout > 0 or rule.softcap is not None:
        return attend_nodes
    is_shared = any(parent >= 0 for parent in node_parents)
    if is_shared and sum(node_lengths) > FLEX_TILE_TOKENS:
        return attend_flex
    if not is_shared and dtype in (torch.bfloat16, torch.float16):
        return attend_varlen
    return attend_nodes


def attend_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    node_lengths: Sequence[int],
    node_parents: Sequence[int],
    rule: ScoreRule,
) -> Tensor:
    """As `attend_nodes`, for nodes without parents: one call of PyTorch's FlashAttention of varying lengths."""
    from torch.nn.attention.varlen import varlen_attn

    assert max(node_parents) < 0
    ends, longest = cu_seq_lens(tuple(node_lengths), query.device), max(node_lengths)
    queries, keys, values = (states[0].transpose(0, 1) for states in (query, key, value))  # (tokens, heads, head size)
    output = varlen_attn(
        queries,
        keys,
        values,
        ends,
        ends,
        longest,
        longest,
        scale=rule.scaling,
        window_size=(-1 if rule.window is None else rule.window - 1, 0),  # tokens before one's own, and after
        enable_gqa=query.shape[1] != key.shape[1],
    )
    assert isinstance(output, Tensor)
    return output.transpose(0, 1)[None]


@lru_cache(maxsize=4)  # every layer asks
def cu_seq_lens(node_lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """Where each node begins, and the last ends, int32 (nodes + 1,): (4, 2, 3) -> [0, 4, 6, 9]."""
    return torch.tensor([0, *node_lengths]).cumsum(0).to(device, torch.int32)


def attend_flex(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    node_lengths: Sequence[int],
    node_parents: Sequence[int],
    rule: ScoreRule,
) -> Tensor:
    """As `attend_nodes`, in one call of FlexAttention; what no token of a tile sees is skipped."""
    num_queries, num_before = query.shape[2], key.shape[2] - query.shape[2]
    mask = flex_mask(tuple(node_lengths), tuple(node_parents), rule.window, query.device, num_before)
    query, key, value = (
        F.pad(states, (0, 0, 0, length - states.shape[2]))
        for states, length in zip((query, key, value), (*mask.seq_lengths, mask.seq_lengths[1]), strict=True)
    )
    attend = flex_attention if query.device.type == "cpu" else _compiled_flex()
    output: Tensor = attend(
        query,
        key,
        value,
        block_mask=mask,
        scale=rule.scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return output[:, :, :num_queries]


@lru_cache(maxsize=4)  # every layer asks, and some models have layers with a window and without
def flex_mask(
    node_lengths: tuple[int, ...],
    node_parents: tuple[int, ...],
    window: int | None,
    device: torch.device,
    num_before: int = 0,
) -> BlockMask:
    """Which token sees which, for FlexAttention, of nodes padded to whole tiles; padding sees padding only.

    Queries leave out the first `num_before` tokens. Whole tiles are of few sizes: each new one may be compiled anew.
    Making it takes tokens x tokens bytes for a moment, once a batch.
    """
    num_queries = _whole_tiles(sum(node_lengths) - num_before)
    num_keys = _whole_tiles(num_before + num_queries)
    lengths, parents = list(node_lengths), list(node_parents)
    if padding := num_keys - sum(lengths):
        lengths, parents = [*lengths, padding], [*parents, -1]
    ranges = torch.tensor(subtree_ranges(parents)).repeat_interleave(torch.tensor(lengths), dim=0)
    first, end = ranges.to(device).unbind(1)
    position = torch.tensor(node_positions(lengths, parents), device=device)

    def sees(batch: Tensor, head: Tensor, query: Tensor, other: Tensor) -> Tensor:
        token = query + num_before
        is_on_path = (first[other] <= first[token]) & (first[token] < end[other]) & (other <= token)
        return is_on_path if window is None else is_on_path & (position[token] - position[other] < window)

    return create_block_mask(sees, B=None, H=None, Q_LEN=num_queries, KV_LEN=num_keys, device=device)


def _whole_tiles(num_tokens: int) -> int:
    return -(-num_tokens // FLEX_TILE_TOKENS) * FLEX_TILE_TOKENS


@lru_cache(maxsize=1)
def _compiled_flex() -> Any:
    return torch.compile(flex_attention)


def trusted_kernel(kernel: Kernel, query: Tensor, key: Tensor, rule: ScoreRule) -> Kernel:
    """`kernel`, or `attend_nodes` with a warning where it fails or differs on tensors such as these."""
    if kernel is attend_nodes:
        return kernel
    return _tried_kernel(kernel, (query.shape[1], key.shape[1], query.shape[3]), query.dtype, query.device, rule)


@lru_cache
def _tried_kernel(
    kernel: Kernel, heads: tuple[int, int, int], dtype: torch.dtype, device: torch.device, rule: ScoreRule
) -> Kernel:
    parents = [-1] * len(TRIAL_LENGTHS) if kernel is attend_varlen else list(TRIAL_PARENTS)
    if rule.window is not None:
        rule = replace(rule, window=min(rule.window, TRIAL_WINDOW))
    try:
        difference = kernel_difference(kernel, heads, dtype, device, rule, parents)
        problem = None if difference <= TOLERANCE else f"it differs by {difference:.2g} (relative)"
    # no Triton, no compiler, a GPU or head size that it does not do: whatever it is, `attend_nodes` does the same work
    except Exception as error:
        problem = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    if problem is None:
        return kernel
    logger.warning(
        "The kernel `%s` is not used on this GPU: %s. Attention runs node by node: the same result, slower.",
        getattr(kernel, "__name__", kernel),
        problem,
    )
    return attend_nodes


def kernel_difference(  # noqa: PLR0913 (all that a kernel can depend on)
    kernel: Kernel,
    heads: tuple[int, int, int],
    dtype: torch.dtype,
    device: torch.device,
    rule: ScoreRule,
    node_parents: Sequence[int],
) -> float:
    """The largest relative difference of a token to `attend_nodes`, in the output and the gradients, on random
    numbers of `TRIAL_LENGTHS`.

    `heads`: query heads, key heads, head size. The run's seed is not touched.
    """
    num_queries, num_keys, size = heads
    generator = torch.Generator(device=device).manual_seed(0)
    query, key, value, gradient = (
        torch.randn(1, number, sum(TRIAL_LENGTHS), size, generator=generator, device=device, dtype=dtype)
        for number in (num_queries, num_keys, num_keys, num_queries)
    )
    # Where nodes are shared also without the queries of the prompt, as `step_prompts` computes it apart.
    firsts = (0, sum(TRIAL_LENGTHS[:2])) if max(node_parents) >= 0 else (0,)
    return max(
        _trial_difference(kernel, (query, key, value, gradient), first, node_parents=node_parents, rule=rule)
        for first in firsts
    )


def _trial_difference(kernel: Kernel, states: Sequence[Tensor], first_query: int, **options: Any) -> float:
    query, key, value, gradient = states
    found = []
    for attend in (kernel, attend_nodes):
        inputs = [one.detach().clone().requires_grad_() for one in (query[:, :, first_query:], key, value)]
        # The first call may come under `no_grad` or inside a checkpoint, which must not count what is saved here.
        with torch.enable_grad(), saved_tensors_hooks(_same, _same):
            output = attend(*inputs, node_lengths=TRIAL_LENGTHS, **options)
            found.append([output.detach(), *torch.autograd.grad(output, inputs, gradient[:, :, first_query:])])
    return max(_token_difference(ours, nodes) for ours, nodes in zip(*found, strict=True))


def _token_difference(found: Tensor, expected: Tensor) -> float:
    """The largest of a token's relative differences, that of a token with less than the mean being to the mean."""
    sizes = expected.float().norm(dim=(1, 3))
    return float(((found - expected).float().norm(dim=(1, 3)) / sizes.clamp(min=sizes.mean())).max())


def _same(states: Tensor) -> Tensor:
    return states
