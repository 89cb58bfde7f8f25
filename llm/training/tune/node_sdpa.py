"""Attention node by node: each node's queries over the keys of its path, mostly by `scaled_dot_product_attention`.

What every device can do, and what `node_kernels.py` measures other kernels by. No mask over unrelated tokens is built.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate

import torch
from torch import Tensor
from torch.nn import functional as F

from llm.training.tune.nodes import node_paths
from llm.training.tune.product_attention import attend_by_products


@dataclass(frozen=True, kw_only=True)
class ScoreRule:
    """What a model does to its attention scores; `window` counts the tokens seen back from and with one's
    own."""

    scaling: float | None = None
    dropout: float = 0.0
    window: int | None = None
    softcap: float | None = None

    def sees_all(self, num_tokens: int) -> bool:
        """Whether the last of so many tokens sees the first."""
        return self.window is None or self.window >= num_tokens


def attend_nodes(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    node_lengths: Sequence[int],
    node_parents: Sequence[int],
    rule: ScoreRule,
) -> Tensor:
    """The attention output (1, heads, tokens, head size) of one flattened batch, node by node.

    `query` may leave out the first nodes, whose output is not asked for.
    """
    first = _num_left_out(query, key, node_lengths)
    paths = node_paths(node_parents)[first:]
    if _is_by_products(query, max(sum(node_lengths[node] for node in path) for path in paths), rule):
        spans = [range(end - length, end) for length, end in zip(node_lengths, accumulate(node_lengths), strict=True)]
        return attend_by_products(query, key, value, [[spans[node] for node in path] for path in paths], rule.scaling)
    # One split, not slices: the gradient of each slice would be a zero tensor as long as the whole batch.
    keys, values = (states.split(list(node_lengths), dim=2) for states in (key, value))
    queries = query.split(list(node_lengths[first:]), dim=2)
    outputs = []
    for own, path in zip(queries, paths, strict=True):
        path_keys, path_values = [keys[node] for node in path], [values[node] for node in path]
        outputs.append(attend(own, _joined(path_keys), _joined(path_values), rule))
    return torch.cat(outputs, dim=2)


def _is_by_products(query: Tensor, longest_path: int, rule: ScoreRule) -> bool:
    is_plain = rule.sees_all(longest_path) and not rule.dropout and rule.softcap is None
    return is_plain and query.device.type == "cpu" and query.dtype == torch.bfloat16


def _num_left_out(query: Tensor, key: Tensor, node_lengths: Sequence[int]) -> int:
    """How many nodes have keys but no queries: the first ones."""
    return list(accumulate(node_lengths, initial=0)).index(key.shape[2] - query.shape[2])


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


def attend(query: Tensor, key: Tensor, value: Tensor, rule: ScoreRule) -> Tensor:
    """The output of a node whose `query` are the last tokens of the path that `key` and `value` hold."""
    num_own, num_path = query.shape[2], key.shape[2]
    if rule.softcap is not None:
        return _attend_softcapped(query, key, value, rule)
    if _is_by_products(query, num_path, rule):
        path = range(num_path - num_own), range(num_path - num_own, num_path)
        return attend_by_products(query, key, value, [path], rule.scaling)
    is_plain = rule.sees_all(num_path) and num_own == num_path
    is_grouped = query.shape[1] != key.shape[1]
    if is_grouped and not is_plain and query.is_cuda:
        # With a mask only CUDA's plain kernel takes grouped heads, and it holds all scores in memory.
        key, value, is_grouped = *_repeat_heads(query, key, value), False
    return F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=None if is_plain else _path_mask(query, num_path, rule.window),
        dropout_p=rule.dropout,
        is_causal=is_plain,
        scale=rule.scaling,
        enable_gqa=is_grouped,
    )


def _attend_softcapped(query: Tensor, key: Tensor, value: Tensor, rule: ScoreRule) -> Tensor:
    """As `attend` with `softcap * tanh(score / softcap)` (Gemma 2), which no fused kernel of PyTorch
    does."""
    assert rule.softcap is not None
    key, value = _repeat_heads(query, key, value)
    scaling = query.shape[-1] ** -0.5 if rule.scaling is None else rule.scaling
    scores = rule.softcap * torch.tanh(query @ key.transpose(2, 3) * scaling / rule.softcap)
    mask = _path_mask(query, key.shape[2], rule.window)
    weights = F.softmax(scores + mask, dim=-1, dtype=torch.float32).to(query.dtype)
    return F.dropout(weights, rule.dropout) @ value


def _repeat_heads(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    times = query.shape[1] // key.shape[1]
    return key.repeat_interleave(times, dim=1), value.repeat_interleave(times, dim=1)


def _path_mask(query: Tensor, num_path: int, window: int | None) -> Tensor:
    """What to add to the scores (own tokens, tokens of the path): 0 where a token is seen, else -inf.

    As numbers, not as booleans: 1.2 to 1.4 times faster on the CPU (44 against 58 ms, forward and backward, 200 tokens
    after 1,100).
    """
    num_own = query.shape[2]
    num_rows = 1 << (num_own - 1).bit_length()  # of few sizes, of which each child of a node takes a part
    mask = _whole_mask(num_rows, num_path - num_own, window, query.dtype, query.device)
    part = mask[:num_own, :num_path]
    return part if query.device.type == "cpu" else part.contiguous()  # kernels of GPUs may want rows that are aligned


@lru_cache(maxsize=4)  # every layer asks, and keeps it for its gradient: 3 MB each for 400 tokens after 1,100
def _whole_mask(num_own: int, num_before: int, window: int | None, dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # whoever asks first, others need a gradient
        is_seen = torch.ones(num_own, num_before + num_own, dtype=torch.bool, device=device).tril(num_before)
        if window is not None:
            is_seen = is_seen.triu(num_before - window + 1)
        return torch.zeros(is_seen.shape, dtype=dtype, device=device).masked_fill_(~is_seen, float("-inf"))
