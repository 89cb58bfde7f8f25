"""What `benchmarks/attention.py` measures `attend_nodes` against on the CPU: attention by plain products, not used.

A chunk is some neighbouring siblings, or a part of a long node: its scores over the whole path are one product, of
which only the last, own part has a mask. The scores are computed again for the gradient, so that memory stays that of
the tokens. In float32 it equals `attend_nodes` to rounding. In bfloat16 the scores are rounded, as by eager attention:
2 to 6 times the error of `attend_nodes`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from llm.training.tune.node_sdpa import ScoreRule
from llm.training.tune.nodes import node_paths

CHUNK_TOKENS = 96  # with three heads a key head: scores of 288 x path, within the second-level cache


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """Tokens `first` to `end`, the ranges of tokens they all see before them, and the length of each sibling."""

    first: int
    end: int
    before: list[tuple[int, int]]
    siblings: list[int]

    def path(self, states: Tensor) -> Tensor:
        """Keys or values (heads, tokens, size) of what it sees, its own last."""
        return torch.cat([states[:, first:end] for first, end in [*self.before, (self.first, self.end)]], dim=1)


def attend_chunked(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    node_lengths: Sequence[int],
    node_parents: Sequence[int],
    rule: ScoreRule,
) -> Tensor:
    assert rule.dropout == 0 and rule.window is None and rule.softcap is None
    chunks = make_chunks(tuple(node_lengths), tuple(node_parents))
    scaling = query.shape[-1] ** -0.5 if rule.scaling is None else rule.scaling
    heads, (tokens, size) = key.shape[1], query.shape[2:]
    rows = query[0].reshape(heads, -1, tokens, size)
    output: Tensor = _Chunked.apply(rows, key[0], value[0], chunks, scaling)
    return output.reshape(query.shape)


@lru_cache(maxsize=4)
def make_chunks(node_lengths: tuple[int, ...], node_parents: tuple[int, ...]) -> list[Chunk]:
    starts = torch.tensor([0, *node_lengths]).cumsum(0).tolist()
    chunks: list[Chunk] = []
    for node, path in enumerate(node_paths(node_parents)):
        before = [(starts[other], starts[other + 1]) for other in path[:-1]]
        last = chunks[-1] if chunks else None
        joins = last is not None and node_parents[node] == node_parents[node - 1] and len(before) == len(last.before)
        if joins and starts[node + 1] - chunks[-1].first <= CHUNK_TOKENS:
            chunks[-1] = Chunk(
                first=chunks[-1].first,
                end=starts[node + 1],
                before=before,
                siblings=[*chunks[-1].siblings, node_lengths[node]],
            )
            continue
        num_parts = -(-node_lengths[node] // CHUNK_TOKENS)
        step = -(-node_lengths[node] // num_parts)
        for first in range(starts[node], starts[node + 1], step):
            end = min(first + step, starts[node + 1])
            seen = before if first == starts[node] else [*before, (starts[node], first)]
            chunks.append(Chunk(first=first, end=end, before=seen, siblings=[end - first]))
    return chunks


class _Chunked(torch.autograd.Function):
    """Query (key heads, queries a key head, tokens, size), key and value (key heads, tokens, size)."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, chunks: list[Chunk], scaling: float) -> Tensor:
        output = torch.empty_like(query)
        for chunk in chunks:
            own = query[:, :, chunk.first : chunk.end]
            weights = _weights(chunk, own, chunk.path(key), scaling)
            output[:, :, chunk.first : chunk.end] = torch.bmm(weights, chunk.path(value)).view_as(own)
        ctx.save_for_backward(query, key, value, output)
        ctx.chunks, ctx.scaling = chunks, scaling
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, output = ctx.saved_tensors
        to_query, to_key, to_value = (torch.zeros_like(states) for states in (query, key, value))
        for chunk in ctx.chunks:
            own, given, came = (states[:, :, chunk.first : chunk.end] for states in (query, gradient, output))
            keys, values = chunk.path(key), chunk.path(value)
            weights = _weights(chunk, own, keys, ctx.scaling)
            rows = given.reshape(len(key), -1, key.shape[-1])
            mean = (given * came).sum(-1).view(len(key), -1, 1)
            to_scores = torch.baddbmm(mean, rows, values.transpose(1, 2), beta=-1).mul_(weights)
            to_query[:, :, chunk.first : chunk.end] = torch.bmm(to_scores, keys).mul_(ctx.scaling).view_as(own)
            scaled = (own * ctx.scaling).reshape(rows.shape)
            parts = torch.bmm(to_scores.transpose(1, 2), scaled), torch.bmm(weights.transpose(1, 2), rows)
            done = 0
            for first, end in [*chunk.before, (chunk.first, chunk.end)]:
                to_key[:, first:end] += parts[0][:, done : done + end - first]
                to_value[:, first:end] += parts[1][:, done : done + end - first]
                done += end - first
        return to_query, to_key, to_value, None, None


def _weights(chunk: Chunk, own: Tensor, keys: Tensor, scaling: float) -> Tensor:
    """Softmax of the scores, (key heads, queries a key head x own tokens, tokens of the path)."""
    scores = torch.bmm((own * scaling).reshape(len(own), -1, own.shape[-1]), keys.transpose(1, 2))
    num_own = chunk.end - chunk.first
    scores[:, :, -num_own:] += _own_mask(tuple(chunk.siblings), own.dtype).repeat(own.shape[1], 1)
    return scores.softmax(-1)


@lru_cache(maxsize=64)
def _own_mask(siblings: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    sees = torch.block_diag(*(torch.ones(length, length).tril() for length in siblings)).bool()
    return torch.zeros(sees.shape, dtype=dtype).masked_fill_(~sees, float("-inf"))
