"""Stage 4: example lengths -> which examples share a block (best-fit decreasing over all of them).

Takes lengths only, so that packing a million examples needs no tokens in memory.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from llm.training.prep.arrays import Ints


@dataclass(frozen=True, kw_only=True)
class Packing:
    """Which examples each block holds.

    Lengths 4, 4, 6 packed to 9 give two blocks, {0, 1} and {2}:

        examples     = [0, 1, 2]     block after block, rows in order within each
        block_starts = [0, 2, 3]     block b holds examples[block_starts[b]:block_starts[b + 1]]
    """

    examples: Ints
    block_starts: Ints

    @property
    def num_blocks(self) -> int:
        """How many blocks there are."""
        return len(self.block_starts) - 1

    def blocks(self) -> Iterator[Ints]:
        """The example numbers of each block."""
        for start, end in zip(self.block_starts[:-1], self.block_starts[1:], strict=True):
            yield self.examples[start:end]


def pack_examples(lengths: Ints, *, chunksize: int, is_packed: bool = True, seed: int | None = None) -> Packing:
    """Blocks of at most `chunksize` tokens, in the order of their first example, or shuffled with `seed`.

    Best-fit decreasing: the longest example first, each into the fullest block that still takes it. `is_packed=False`
    gives every example its own block. All lengths must be 1 to `chunksize`.
    """
    assert not len(lengths) or (lengths.min() > 0 and lengths.max() <= chunksize), "encode drops what does not fit"
    block_of = _best_fit_decreasing(lengths, chunksize) if is_packed else np.arange(len(lengths))
    order = np.argsort(block_of, kind="stable")
    sizes = np.bincount(block_of)
    starts = np.concatenate([[0], np.cumsum(sizes)])
    firsts = order[starts[:-1]]  # stable sort: the first member is the lowest row
    rank = np.argsort(firsts)
    if seed is not None:
        rank = np.random.default_rng(seed).permutation(rank)
    examples = np.concatenate([order[starts[b] : starts[b + 1]] for b in rank]) if len(rank) else order
    return Packing(examples=examples, block_starts=np.concatenate([[0], np.cumsum(sizes[rank])]))


def _best_fit_decreasing(lengths: Ints, chunksize: int) -> Ints:
    """The block number of each example.

    Open blocks are kept by their free space; one big integer has bit s set when a block with s free tokens is open, so
    that the fullest one which fits is the lowest set bit from `length` up: O(chunksize / 64) a row.
    """
    block_of = np.empty(len(lengths), dtype=np.int64)
    open_blocks: list[list[int]] = [[] for _ in range(chunksize + 1)]
    spaces, num_blocks = 0, 0
    for example in np.argsort(-lengths, kind="stable"):
        length = int(lengths[example])
        fitting = spaces >> length
        if fitting:
            space = length + (fitting & -fitting).bit_length() - 1
            block = open_blocks[space].pop()
            if not open_blocks[space]:
                spaces ^= 1 << space
        else:
            space, block = chunksize, num_blocks
            num_blocks += 1
        block_of[example] = block
        left = space - length
        if left:
            open_blocks[left].append(block)
            spaces |= 1 << left
    return block_of
