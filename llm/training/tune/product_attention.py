"""Attention of bfloat16 on the CPU as whole matrix products, faster than PyTorch's kernel and rounded no more.

PyTorch's kernel multiplies small tiles, at a fifth of the speed that oneDNN has for whole matrices. Here the scores are
float32, sums of bfloat16 products as in the kernel. They live for one tile of queries, in the forward and again in the
backward pass, so memory does not grow with the square of the tokens.

Forward and backward it takes 0.7 to 1 of the time, the less the more tokens are seen (2 cores with avx512_bf16, torch
2.13); `benchmarks/attention.py --dtype bfloat16` measures it.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

# Of a tile, all heads together, 8 MB: more leave the processor's cache.
SCORES_AT_ONCE = 1 << 21
LEAST_QUERIES = 128  # of a tile: with fewer the products are slower than that costs


def attend_by_products(query: Tensor, key: Tensor, value: Tensor, scaling: float | None = None) -> Tensor:
    """The output (batch, heads, own, head size) for queries that are the last `own` of the tokens of `key`.

    Each sees the tokens up to itself. `key` and `value` are (batch, key heads, tokens, head size), all are bfloat16.
    """
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    output: Tensor = _Products.apply(query, key, value, scaling)  # type: ignore[no-untyped-call]
    return output


class _Products(torch.autograd.Function):
    """Queries that share a key head are multiplied together: `times` rows of scores for each of them."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        output = torch.empty(query.shape, dtype=query.dtype)
        queries, outputs = (_by_key_head(states, key) for states in (query, output))
        keys, values = (states.flatten(0, 1).float() for states in (key, value))
        with _bfloat16_products():
            for own, seen in _tiles(query, key):
                weights = _weights(queries[:, :, own].float(), keys[:, seen], scaling)
                outputs[:, :, own] = torch.bmm(weights, values[:, seen]).view_as(outputs[:, :, own])
        ctx.save_for_backward(query, key, value, output)
        ctx.scaling = scaling
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, output = ctx.saved_tensors
        of_query = torch.empty(query.shape, dtype=query.dtype)
        *grouped, of_queries = [_by_key_head(states, key) for states in (query, output, gradients[0], of_query)]
        keys, values = (states.flatten(0, 1).float() for states in (key, value))
        of_keys, of_values = torch.zeros_like(keys), torch.zeros_like(values)
        with _bfloat16_products():
            for own, seen in _tiles(query, key):
                queries, outputs, of_outputs = (states[:, :, own].float() for states in grouped)
                weights = _weights(queries, keys[:, seen], ctx.scaling)
                means = (of_outputs * outputs).sum(dim=-1, keepdim=True).flatten(1, 2)
                queries, of_outputs = queries.flatten(1, 2), of_outputs.flatten(1, 2)
                of_values[:, seen].baddbmm_(weights.mT, of_outputs)
                of_scores = torch.bmm(of_outputs, values[:, seen].mT, out=_memory.scores("gradient", weights.shape))
                of_scores.sub_(means).mul_(weights)
                of_keys[:, seen].baddbmm_(of_scores.mT, queries, alpha=ctx.scaling)
                found = torch.bmm(of_scores, keys[:, seen]).mul_(ctx.scaling)
                of_queries[:, :, own] = found.view_as(of_queries[:, :, own])
        return of_query, of_keys.to(key.dtype).view_as(key), of_values.to(value.dtype).view_as(value), None


def _by_key_head(states: Tensor, key: Tensor) -> Tensor:
    """(batch, heads, tokens, size) as (batch * key heads, times, tokens, size)."""
    return states.reshape(-1, states.shape[1] // key.shape[1], *states.shape[2:])


def _tiles(query: Tensor, key: Tensor) -> Iterator[tuple[slice, slice]]:
    """Queries that are computed at once, and the tokens up to the last of them."""
    num_rows, num_own, num_tokens = query.shape[0] * query.shape[1], query.shape[2], key.shape[2]
    num_tiles = -(-num_own // max(SCORES_AT_ONCE // (num_rows * num_tokens), LEAST_QUERIES))
    size = -(-num_own // num_tiles)
    for start in range(0, num_own, size):
        end = min(start + size, num_own)
        yield slice(start, end), slice(num_tokens - num_own + end)


def _weights(queries: Tensor, keys: Tensor, scaling: float) -> Tensor:
    """The softmax of scores, float32 (n, times * own, tokens), of (n, times, own, size) and (n, tokens, size)."""
    num_heads, times, num_own, _ = queries.shape
    shape = num_heads, times * num_own, keys.shape[1]
    scores = torch.bmm((queries * scaling).flatten(1, 2), keys.mT, out=_memory.scores("scores", shape))
    later = _later(1 << (num_own - 1).bit_length())[:num_own, :num_own]
    scores.unflatten(1, (times, num_own))[..., -num_own:].add_(later)
    return torch.softmax(scores, dim=-1, out=_memory.scores("weights", shape))


@lru_cache(maxsize=4)  # of few sizes, of which each tile of each layer takes a part
def _later(size: int) -> Tensor:
    """-inf where a token would see a later one, (size, size)."""
    with torch.inference_mode(False):  # as below
        return torch.full((size, size), float("-inf")).triu_(1)


class _Memory(threading.local):
    """What tiles are computed in, used again: the system zeroes new memory, which takes as long as the products."""

    def __init__(self) -> None:
        self._kept: dict[str, Tensor] = {}

    def scores(self, name: str, shape: tuple[int, ...]) -> Tensor:
        size = torch.Size(shape).numel()
        if name not in self._kept or self._kept[name].numel() < size:
            with torch.inference_mode(False):  # whoever asks first, others need a gradient
                self._kept[name] = torch.empty(max(size, SCORES_AT_ONCE))
        return self._kept[name][:size].view(shape)


_memory = _Memory()


@contextmanager
def _bfloat16_products() -> Iterator[None]:
    """Products of float32 matrices are oneDNN's, which may round their factors to bfloat16, not what it sums
    (https://docs.pytorch.org/docs/stable/notes/mkldnn.html); autocast would round the results, too.

    On an AMD EPYC with avx512_bf16 it rounds nothing, in a third of the time of MKL, which PyTorch calls otherwise.
    """
    matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    try:
        with torch.autocast("cpu", enabled=False):
            yield
    finally:
        matmul.fp32_precision = before
