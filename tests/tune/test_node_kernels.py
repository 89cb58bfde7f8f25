"""The kernels beside `attend_nodes`: the choice, what they are given, their masks, and that none is believed unseen.

A CPU runs FlexAttention forward only and PyTorch's variable-length kernel not at all; for that a stand-in does what
its documentation says.
"""

import inspect
import itertools
import logging
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from test_attention import forests
from tiny_models import make_model
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F
from torch.nn.attention import varlen

from llm.training.tune import attention, node_kernels
from llm.training.tune.isolation import check_isolation
from llm.training.tune.node_kernels import (
    attend_flex,
    attend_varlen,
    choose_kernel,
    cu_seq_lens,
    flex_mask,
    trusted_kernel,
)
from llm.training.tune.node_sdpa import ScoreRule, _whole_mask, attend_nodes
from llm.training.tune.nodes import node_paths, node_positions, subtree_ranges

Nodes = tuple[list[int], list[int]]
CPU = torch.device("cpu")
RULES = {
    "plain": ScoreRule(),
    "scaled": ScoreRule(scaling=0.3),
    "window": ScoreRule(window=4),
    "window of one": ScoreRule(window=1),
}
SHAPES: dict[str, Nodes] = {
    "star": ([40, 1, 60, 30, 9], [-1, 0, 0, 0, 0]),
    "chain": ([4, 3, 2, 1], [-1, 0, 1, 2]),
    "deep tree out of order": ([20, 7, 90, 5, 12, 3], [-1, -1, 0, 1, 2, 0]),
    "alone": ([30, 1, 12], [-1, -1, -1]),
    "whole tiles": ([100, 28, 128], [-1, 0, 0]),
}


def seen_tokens(lengths: list[int], parents: list[int], window: int | None = None) -> Tensor:
    """Which token sees which (tokens, tokens), told token by token."""
    node_of = [node for node, length in enumerate(lengths) for _ in range(length)]
    paths, positions = node_paths(parents), node_positions(lengths, parents)
    rows = [
        [
            other <= token
            and node_of[other] in paths[node_of[token]]
            and (window is None or positions[token] - positions[other] < window)
            for other in range(len(node_of))
        ]
        for token in range(len(node_of))
    ]
    return torch.tensor(rows)


def textbook(query: Tensor, key: Tensor, value: Tensor, nodes: Nodes, rule: ScoreRule) -> Tensor:
    times = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(times, dim=1), value.repeat_interleave(times, dim=1)
    scaling = query.shape[-1] ** -0.5 if rule.scaling is None else rule.scaling
    scores = (query @ key.transpose(2, 3) * scaling).masked_fill(~seen_tokens(*nodes, rule.window), float("-inf"))
    return scores.softmax(-1) @ value


def random_states(num_tokens: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Query of 6 heads, key and value of 2, as a model makes them: (1, heads, tokens, 8), transposed."""
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(1, num_tokens, heads, 8, generator=generator, dtype=dtype).transpose(1, 2) for heads in (6, 2, 2)
    ]


def results(attend: Any, states: list[Tensor], *args: Any, **kwargs: Any) -> list[Tensor]:
    inputs = [tensor.clone().requires_grad_() for tensor in states]
    output = attend(*inputs, *args, **kwargs)
    return [output, *torch.autograd.grad((output * output.detach().cos()).sum(), inputs)]


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-4)])
@settings(max_examples=25, deadline=None)
@given(nodes=forests())
def test_attend_nodes_of_any_forest_equals_the_textbook_with_gradients(
    dtype: torch.dtype, tolerance: float, rule: ScoreRule, nodes: Nodes
) -> None:
    lengths, parents = nodes
    states = random_states(sum(lengths), dtype)
    ours = results(attend_nodes, states, node_lengths=lengths, node_parents=parents, rule=rule)
    for found, expected in zip(ours, results(textbook, states, nodes, rule), strict=True):
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def test_every_layer_and_children_of_like_lengths_have_one_mask() -> None:
    _whole_mask.cache_clear()
    states = [tensor.requires_grad_() for tensor in random_states(90)]
    nodes: dict[str, Any] = {"node_lengths": [50, 17, 23], "node_parents": [-1, 0, 0], "rule": ScoreRule()}
    with torch.inference_mode():  # an evaluation before: what it made serves training, too
        attend_nodes(*states, **nodes)
    for _ in range(3):
        attend_nodes(*states, **nodes).sum().backward()
    assert _whole_mask.cache_info().misses == 1


def test_kernel_for_every_device_dtype_rule_and_structure() -> None:
    rules = [*RULES.values(), ScoreRule(dropout=0.1), ScoreRule(softcap=30.0)]
    structures: dict[str, Nodes] = {
        "alone": ([100, 200], [-1, -1]),
        "shared": ([100, 200], [-1, 0]),
        "small": ([64, 64], [-1, 0]),
    }
    dtypes = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    chosen: dict[str, int] = {}
    for device, dtype, rule, name in itertools.product(("cpu", "cuda", "mps", "xpu"), dtypes, rules, structures):
        lengths, parents = structures[name]
        kernel = choose_kernel(device, dtype=dtype, rule=rule, node_lengths=lengths, node_parents=parents)
        expected = attend_nodes
        if device == "cuda" and rule in RULES.values() and name == "shared":
            expected = attend_flex
        if device == "cuda" and rule in RULES.values() and name == "alone" and dtype.itemsize == 2:
            expected = attend_varlen
        assert kernel is expected, (device, dtype, rule, name)
        chosen[kernel.__name__] = chosen.get(kernel.__name__, 0) + 1
    assert chosen == {"attend_flex": 16, "attend_varlen": 8, "attend_nodes": 264}


@given(nodes=forests())
def test_subtree_ranges_of_any_forest_say_who_is_an_ancestor(nodes: Nodes) -> None:
    _, parents = nodes
    ranges = subtree_ranges(parents)
    for node, path in enumerate(node_paths(parents)):
        above = [other for other, (first, end) in enumerate(ranges) if first <= ranges[node][0] < end]
        assert above == sorted(path)


def test_subtree_ranges_of_the_example_in_the_docs() -> None:
    assert subtree_ranges([-1, 0, 0, 1]) == [(0, 4), (1, 3), (3, 4), (2, 3)]


@pytest.mark.parametrize("window", [None, 1, 6])
@pytest.mark.parametrize("nodes", SHAPES.values(), ids=SHAPES)
def test_flex_mask_lets_each_token_see_its_path_and_padding_itself(nodes: Nodes, window: int | None) -> None:
    lengths, parents = nodes
    mask = flex_mask(tuple(lengths), tuple(parents), window, CPU)
    padding = -sum(lengths) % 128
    tokens = torch.arange(sum(lengths) + padding)
    assert mask.shape[-2:] == (len(tokens), len(tokens)) and len(tokens) % 128 == 0
    zero = torch.tensor(0)
    seen = mask.mask_mod(zero, zero, tokens[:, None], tokens[None, :])
    expected = seen_tokens([*lengths, padding], [*parents, -1], window)
    assert torch.equal(seen, expected)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize("nodes", SHAPES.values(), ids=SHAPES)
def test_flex_on_the_cpu_equals_attend_nodes(nodes: Nodes, rule: ScoreRule) -> None:
    lengths, parents = nodes
    states = random_states(sum(lengths), torch.float32)
    structure: dict[str, Any] = {"node_lengths": lengths, "node_parents": parents, "rule": rule}
    torch.testing.assert_close(
        attend_flex(*states, **structure), attend_nodes(*states, **structure), rtol=1e-5, atol=1e-6
    )


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize("lengths", [[40, 1, 60, 30, 9], [100, 28, 128], [128, 100, 30], [300, 3, 4]])
@pytest.mark.parametrize("num_left_out", [1, 2])
def test_attention_without_the_queries_of_the_first_nodes_is_the_rest_of_the_whole(
    num_left_out: int, lengths: list[int], rule: ScoreRule
) -> None:
    query, key, value = random_states(sum(lengths), torch.float32)
    start = sum(lengths[:num_left_out])
    parents = [-1, -1, 0, 0, 2][: len(lengths)]
    structure: dict[str, Any] = {"node_lengths": lengths, "node_parents": parents, "rule": rule}
    expected = attend_nodes(query, key, value, **structure)[:, :, start:]
    for kernel in (attend_nodes, attend_flex):
        found = kernel(query[:, :, start:], key, value, **structure)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gemma3_text"])
def test_model_with_flex_passes_the_self_test(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def choose(device_type: str, **kwargs: Any) -> node_kernels.Kernel:
        calls.append(device_type)
        return attend_flex

    monkeypatch.setattr(attention, "choose_kernel", choose)
    monkeypatch.setattr(attention, "trusted_kernel", lambda kernel, *_: kernel)  # there is no gradient on a CPU
    assert check_isolation(make_model(architecture)) < 1e-5
    assert len(calls) == 3 * 2  # all nodes, the prompt, and all nodes after it, in two layers


def test_cu_seq_lens_are_the_ends_of_the_nodes() -> None:
    found = cu_seq_lens((4, 2, 3), CPU)
    assert found.tolist() == [0, 4, 6, 9] and found.dtype == torch.int32


def stand_in_varlen(*args: Any, **kwargs: Any) -> Tensor:
    """What the documentation of `varlen_attn` says, for causal windows; its real signature binds the arguments."""
    given = inspect.signature(VARLEN_ATTN).bind(*args, **kwargs).arguments
    (left, right), ends = given["window_size"], given["cu_seq_q"].tolist()
    assert right == 0 and given["cu_seq_q"] is given["cu_seq_k"] and given["cu_seq_q"].dtype == torch.int32
    assert given["max_q"] == given["max_k"] == max(end - start for start, end in itertools.pairwise(ends))
    outputs = []
    for start, end in itertools.pairwise(ends):
        query, key, value = (given[name][start:end].transpose(0, 1) for name in ("query", "key", "value"))
        mask = torch.ones(end - start, end - start, dtype=torch.bool).tril()
        mask = mask if left < 0 else mask.triu(-left)
        options = {"scale": given["scale"], "enable_gqa": given["enable_gqa"]}
        outputs.append(F.scaled_dot_product_attention(query, key, value, mask, **options).transpose(0, 1))
    return torch.cat(outputs)


VARLEN_ATTN = varlen.varlen_attn


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_varlen_is_asked_for_what_attend_nodes_computes(rule: ScoreRule, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(varlen, "varlen_attn", stand_in_varlen)
    lengths, parents = SHAPES["alone"]
    states = random_states(sum(lengths))
    structure: dict[str, Any] = {"node_lengths": lengths, "node_parents": parents, "rule": rule}
    expected = results(attend_nodes, states, **structure)
    for found, wanted in zip(results(attend_varlen, states, **structure), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)


def right_kernel(*args: Any, **kwargs: Any) -> Tensor:
    return attend_nodes(*args, **kwargs)


def leaky_kernel(*args: Any, **kwargs: Any) -> Tensor:
    return attend_nodes(*args, **kwargs | {"node_parents": [-1, 0, 1, 1, 2, -1]})


def kernel_of_which_one_token_sees_too_much(*args: Any, **kwargs: Any) -> Tensor:
    return attend_nodes(*args, **kwargs | {"node_parents": [-1, -1, 1, 2, 2, -1]})


def forgetful_kernel(*args: Any, **kwargs: Any) -> Tensor:
    return attend_nodes(*args, **kwargs | {"node_parents": [-1, -1, 1, -1, 2, -1]})


def kernel_without_value_gradient(query: Tensor, key: Tensor, value: Tensor, **kwargs: Any) -> Tensor:
    return attend_nodes(query, key, value.detach() + value * 0, **kwargs)


def kernel_with_a_longer_window(*args: Any, rule: ScoreRule, **kwargs: Any) -> Tensor:
    assert rule.window is not None
    return attend_nodes(*args, rule=replace(rule, window=rule.window + 1), **kwargs)


def kernel_that_fails(*_: Any, **__: Any) -> Tensor:
    raise RuntimeError("no Triton\nmore")


def trust(kernel: node_kernels.Kernel, dtype: torch.dtype = torch.float32) -> node_kernels.Kernel:
    query, key, _ = random_states(3, dtype)
    return trusted_kernel(kernel, query, key, ScoreRule(window=4096))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernel_that_agrees_is_used_and_tried_once(dtype: torch.dtype) -> None:
    calls = []

    def counted(*args: Any, **kwargs: Any) -> Tensor:
        calls.append(1)
        return right_kernel(*args, **kwargs)

    assert trust(counted, dtype) is counted and trust(counted, dtype) is counted
    assert len(calls) == 2  # with all queries, and without those of a prompt


@pytest.mark.parametrize(
    ("kernel", "reason"),
    [
        (leaky_kernel, "it differs by "),
        (kernel_of_which_one_token_sees_too_much, "it differs by 1 "),
        (forgetful_kernel, "it differs by "),
        (kernel_with_a_longer_window, "it differs by "),
        (kernel_without_value_gradient, "it differs by 1 "),
        (kernel_that_fails, "RuntimeError: no Triton. Attention runs"),
        (attend_flex, "NotImplementedError: FlexAttention does not support backward on CPU"),
        (attend_varlen, "NotImplementedError: Could not run 'aten::_flash_attention_forward'"),
    ],
)
def test_kernel_that_differs_or_fails_gives_way_with_a_warning(
    kernel: node_kernels.Kernel, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    node_kernels._tried_kernel.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert trust(kernel) is attend_nodes and trust(kernel) is attend_nodes
    (message,) = caplog.messages
    assert f"The kernel `{kernel.__name__}` is not used on this GPU: {reason}" in message


def test_trial_leaves_the_seed_and_what_a_checkpoint_saves_alone() -> None:
    node_kernels._tried_kernel.cache_clear()
    torch.manual_seed(7)
    before, saved = torch.get_rng_state(), []
    with saved_tensors_hooks(saved.append, lambda _: None), torch.no_grad():
        assert trust(right_kernel) is right_kernel
    assert not saved and torch.equal(before, torch.get_rng_state())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kernel", [attend_flex, attend_varlen])
def test_kernel_agrees_on_this_gpu(kernel: node_kernels.Kernel) -> None:
    query, key = (torch.empty(1, heads, 1, 64, device="cuda", dtype=torch.bfloat16) for heads in (9, 3))
    assert trusted_kernel(kernel, query, key, ScoreRule()) is kernel
