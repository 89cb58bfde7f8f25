"""Attention of bfloat16 on the CPU as whole matrix products, faster than PyTorch's kernel and rounded no more.

PyTorch's kernel multiplies small tiles, at a fifth of the speed that oneDNN has for whole matrices. Here the scores are
float32, sums of bfloat16 products as in the kernel. They live for one tile of queries, in the forward and again in the
backward pass, so memory does not grow with the square of the tokens.

Forward and backward it takes 0.7 to 1 of the time, the less the more tokens are seen (2 cores with avx512_bf16, torch
2.13); `benchmarks/attention.py --dtype bfloat16` measures it.
"""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

# Of a tile, all heads together, 8 MB: more leave the processor's cache.
SCORES_AT_ONCE = 1 << 21
LEAST_QUERIES = 128  # of a tile: with fewer the products are slower than that costs


Node = tuple[range, Sequence[range]]  # where its queries stand, and the tokens that the last of them sees


def attend_by_products(
    query: Tensor, key: Tensor, value: Tensor, paths: Sequence[Sequence[range]], scaling: float | None = None
) -> Tensor:
    """The output (batch, heads, own, head size) for queries of nodes, one node after the other; as (batch, own, heads,
    head size) in memory, which the model goes on with.

    `paths` says for each node where the tokens stand that it sees, the last range being its own, each of which sees
    those up to itself. `key` and `value` are (batch, key heads, tokens, head size), all are bfloat16.
    """
    ends = accumulate(len(path[-1]) for path in paths)
    nodes = [(range(end - len(path[-1]), end), _merged(path)) for path, end in zip(paths, ends, strict=True)]
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    output: Tensor = _Products.apply(query, key, value, nodes, scaling)  # type: ignore[no-untyped-call]
    return output


def _merged(path: Sequence[range]) -> list[range]:
    """The same tokens, in as few ranges as they lie in."""
    pieces: list[range] = []
    for piece in path:
        if pieces and pieces[-1].stop == piece.start:
            pieces[-1] = range(pieces[-1].start, piece.stop)
        else:
            pieces.append(piece)
    return pieces


class _Products(torch.autograd.Function):
    """Queries that share a key head are multiplied together: `times` rows of scores for each of them."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, nodes: Sequence[Node], scaling: float) -> Tensor:
        output = torch.empty_like(query.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)
        queries, outputs = (_by_key_head(states, key) for states in (query, output))
        keys, values = (_exact(states).flatten(0, 1) for states in (key, value))
        with _bfloat16_products():
            for own, path in nodes:
                path_keys, path_values = _along(path, keys), _along(path, values)
                for tile, seen in _tiles(query, own, path_keys):
                    weights = _weights(_exact(queries[:, :, :, tile]), path_keys[:, seen], scaling)
                    into = outputs[:, :, :, tile]
                    into.copy_(torch.bmm(weights, path_values[:, seen]).view_as(into))
        ctx.save_for_backward(query, key, value, output)
        ctx.nodes, ctx.scaling = nodes, scaling
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, output = ctx.saved_tensors
        of_query = torch.empty_like(query)
        *grouped, of_queries = [_by_key_head(states, key) for states in (query, output, gradients[0], of_query)]
        keys, values = (_exact(states).flatten(0, 1) for states in (key, value))
        of_keys, of_values = torch.zeros_like(keys), torch.zeros_like(values)
        with _bfloat16_products():
            for own, path in ctx.nodes:
                path_keys, path_values = _along(path, keys), _along(path, values)
                of_path_keys, of_path_values = _along(path, of_keys), _along(path, of_values)
                for tile, seen in _tiles(query, own, path_keys):
                    queries, outputs, of_outputs = (_exact(states[:, :, :, tile]) for states in grouped)
                    weights = _weights(queries, path_keys[:, seen], ctx.scaling)
                    means = (of_outputs * outputs).sum(dim=-1, keepdim=True).view(*weights.shape[:2], 1)
                    queries, of_outputs = (states.view(*weights.shape[:2], -1) for states in (queries, of_outputs))
                    of_path_values[:, seen].baddbmm_(weights.mT, of_outputs)
                    of_scores = _memory.scores("gradient", weights.shape)
                    torch.bmm(of_outputs, path_values[:, seen].mT, out=of_scores).sub_(means).mul_(weights)
                    of_path_keys[:, seen].baddbmm_(of_scores.mT, queries, alpha=ctx.scaling)
                    into = of_queries[:, :, :, tile]
                    into.copy_(torch.bmm(of_scores, path_keys[:, seen]).mul_(ctx.scaling).view_as(into))
                _put_back(path, of_path_keys, of_keys)
                _put_back(path, of_path_values, of_values)
        return of_query, of_keys.to(key.dtype).view_as(key), of_values.to(value.dtype).view_as(value), None, None


def _by_key_head(states: Tensor, key: Tensor) -> Tensor:
    """(batch, heads, tokens, size) as (batch, key heads, times, tokens, size), in the same memory."""
    return states.unflatten(1, (key.shape[1], -1))  # type: ignore[no-any-return]


def _exact(states: Tensor) -> Tensor:
    return states.to(torch.float32, memory_format=torch.contiguous_format)


def _along(path: Sequence[range], states: Tensor) -> Tensor:
    """Those of a path, of (n, tokens, size): the same memory where it is in one piece."""
    pieces = [states[:, piece.start : piece.stop] for piece in path]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)


def _put_back(path: Sequence[range], found: Tensor, states: Tensor) -> None:
    """Changed ones, `_along` a path, to where they came from."""
    if len(path) > 1:
        for piece, one in zip(path, found.split(list(map(len, path)), dim=1), strict=True):
            states[:, piece.start : piece.stop] = one


def _tiles(query: Tensor, own: range, path_keys: Tensor) -> Iterator[tuple[slice, slice]]:
    """Queries that are computed at once, and the tokens of the path up to the last of them."""
    num_rows, num_own, num_tokens = query.shape[0] * query.shape[1], len(own), path_keys.shape[1]
    num_tiles = -(-num_own // max(SCORES_AT_ONCE // (num_rows * num_tokens), LEAST_QUERIES))
    size = -(-num_own // num_tiles)
    for start in range(0, num_own, size):
        end = min(start + size, num_own)
        yield slice(own.start + start, own.start + end), slice(num_tokens - num_own + end)


def _weights(queries: Tensor, keys: Tensor, scaling: float) -> Tensor:
    """The softmax of scores, float32 (n, times * own, tokens), of (batch, key heads, times, own, size) and
    (n, tokens, size)."""
    num_heads, (times, num_own, size) = keys.shape[0], queries.shape[2:]
    shape = num_heads, times * num_own, keys.shape[1]
    scores = torch.bmm((queries * scaling).view(*shape[:2], size), keys.mT, out=_memory.scores("scores", shape))
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
