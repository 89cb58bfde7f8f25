"""Attention of bfloat16 on the CPU: the textbook's output and gradients, rounded no more than by PyTorch's kernel."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from llm.training.tune import product_attention
from llm.training.tune.node_sdpa import ScoreRule, attend
from llm.training.tune.product_attention import attend_by_products

SHAPES = {  # batch, heads, key heads, own tokens, tokens of the path
    "alone": (1, 6, 2, 37, 37),
    "after a prompt": (1, 6, 2, 20, 90),
    "one token": (1, 6, 2, 1, 50),
    "every head its keys": (1, 4, 4, 33, 60),
    "two texts": (2, 6, 3, 12, 40),
}


def random_states(shape: Sequence[int], dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    """Query, key and value as a model makes them (transposed), and the gradient of the output."""
    batch, heads, key_heads, own, path = shape
    generator = torch.Generator().manual_seed(0)
    sizes = [(own, heads), (path, key_heads), (path, key_heads), (own, heads)]
    states = [torch.randn(batch, tokens, number, 16, generator=generator) for tokens, number in sizes]
    return [one.to(torch.bfloat16).to(dtype).transpose(1, 2) for one in states]


def results(attention: Any, states: Sequence[Tensor], **kwargs: Any) -> list[Tensor]:
    *inputs, gradient = [tensor.clone().requires_grad_() for tensor in states]
    output = attention(*inputs, **kwargs)
    return [output.detach(), *torch.autograd.grad(output, inputs, gradient)]


def library(query: Tensor, key: Tensor, value: Tensor, scaling: float | None = None) -> Tensor:
    num_own, num_path = query.shape[2], key.shape[2]
    is_seen = torch.ones(num_own, num_path, dtype=torch.bool).tril(num_path - num_own)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=is_seen, scale=scaling, enable_gqa=True)


def attend_one(query: Tensor, key: Tensor, value: Tensor, scaling: float | None = None) -> Tensor:
    """A single node, of which the queries are the last tokens."""
    num_before, num_path = key.shape[2] - query.shape[2], key.shape[2]
    return attend_by_products(query, key, value, [[range(num_before), range(num_before, num_path)]], scaling)


def errors(found: Sequence[Tensor], expected: Sequence[Tensor]) -> list[float]:
    return [float((one - right).norm() / right.norm()) for one, right in zip(found, expected, strict=True)]


@pytest.mark.parametrize("scores_at_once", [product_attention.SCORES_AT_ONCE, 1000], ids=["one tile", "tiles"])
@pytest.mark.parametrize("scaling", [None, 0.3])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_products_equal_the_textbook_as_nearly_as_the_library(
    shape: Sequence[int], scaling: float | None, scores_at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(product_attention, "SCORES_AT_ONCE", scores_at_once)
    monkeypatch.setattr(product_attention, "LEAST_QUERIES", 4)
    states = random_states(shape)
    expected = results(library, random_states(shape, torch.float64), scaling=scaling)
    ours = results(attend_one, states, scaling=scaling)
    assert [one.dtype for one in ours] == [torch.bfloat16] * 4
    theirs = errors(results(library, states, scaling=scaling), expected)
    for error, most in zip(errors(ours, expected), theirs, strict=True):
        assert error < 1.1 * max(most, 2e-3)


def test_products_do_not_keep_scores_and_use_their_memory_again() -> None:
    states = random_states((1, 6, 2, 30, 64))
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        first = results(attend_one, states)
    assert sum(tensor.numel() for tensor in kept) == sum(tensor.numel() for tensor in states)
    results(attend_one, random_states((1, 6, 2, 64, 64)))  # overwrites whatever is used again
    assert all(map(torch.equal, first, results(attend_one, states)))


def test_products_train_after_they_were_first_asked_for_under_inference_mode() -> None:
    states = random_states((1, 6, 2, 30, 64))
    product_attention._memory.__init__()
    product_attention._later.cache_clear()
    with torch.inference_mode():  # an evaluation before: what it made serves training, too
        first = attend_one(*states[:3])
    assert torch.equal(first, results(attend_one, states)[0])


def test_products_are_the_same_under_autocast_and_leave_the_precision_of_others() -> None:
    states = random_states((1, 6, 2, 20, 90))
    plain = results(attend_one, states)
    factors = torch.rand(64, 64)
    product = factors @ factors
    with torch.autocast("cpu", torch.bfloat16):
        assert all(map(torch.equal, plain, results(attend_one, states)))
    with pytest.raises(RuntimeError):
        attend_one(states[0], states[1], states[2][:, :, :5])
    assert torch.equal(product, factors @ factors)
    assert torch.backends.mkldnn.matmul.fp32_precision != "bf16"


@pytest.mark.parametrize(
    ("dtype", "rule", "is_by_products"),
    [
        (torch.bfloat16, ScoreRule(), True),
        (torch.bfloat16, ScoreRule(window=90), True),
        (torch.bfloat16, ScoreRule(window=89), False),
        (torch.bfloat16, ScoreRule(dropout=0.5), False),
        (torch.bfloat16, ScoreRule(softcap=30.0), False),
        (torch.float32, ScoreRule(), False),
    ],
)
def test_attention_is_by_products_in_bfloat16_without_window_and_dropout(
    dtype: torch.dtype, rule: ScoreRule, is_by_products: bool
) -> None:
    query, key, value, _ = random_states((1, 6, 2, 20, 90), dtype)
    output = attend(query.requires_grad_(), key, value, rule)
    assert (type(output.grad_fn).__name__ == "_ProductsBackward") is is_by_products


def test_nodes_see_their_path_and_gradients_of_what_they_share_are_summed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(product_attention, "SCORES_AT_ONCE", 1000)
    monkeypatch.setattr(product_attention, "LEAST_QUERIES", 4)
    # A prompt, two children, a grandchild behind the first of them, and what stands alone: tokens 0 to 68.
    prompt, first, second, third, alone = range(20), range(20, 33), range(33, 45), range(45, 60), range(60, 69)
    paths = [[prompt], [prompt, first], [prompt, second], [prompt, first, third], [alone]]
    is_seen = torch.zeros(69, 69, dtype=torch.bool)
    for path in paths:
        for piece in path:
            is_seen[path[-1].start : path[-1].stop, piece.start : piece.stop] = True
    is_seen = is_seen.tril()
    for num_left_out in (0, 1):
        start = len(prompt) * num_left_out  # queries may leave out the prompt, whose keys stay
        states, exact = (
            [query[:, :, start:], key, value, gradient[:, :, start:]]
            for query, key, value, gradient in (
                random_states((1, 6, 2, 69, 69), dtype) for dtype in (torch.bfloat16, torch.float64)
            )
        )
        mask = is_seen[start:]
        expected = results(F.scaled_dot_product_attention, exact, attn_mask=mask, enable_gqa=True)
        ours = results(attend_by_products, states, paths=paths[num_left_out:])
        theirs = results(F.scaled_dot_product_attention, states, attn_mask=mask, enable_gqa=True)
        for error, most in zip(errors(ours, expected), errors(theirs, expected), strict=True):
            assert error < 1.1 * max(most, 2e-3)


def test_shared_keys_are_not_kept_for_each_node() -> None:
    states = random_states((1, 6, 2, 60, 60))
    kept: list[Tensor] = []
    paths = [[range(30)], *([range(30), range(start, start + 10)] for start in (30, 40, 50))]
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        output = attend_by_products(*(tensor.requires_grad_() for tensor in states[:3]), paths)
    assert sum(tensor.numel() for tensor in kept) == sum(tensor.numel() for tensor in states)
    assert output.transpose(1, 2).is_contiguous()
