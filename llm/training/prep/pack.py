"""Stage 4: example lengths -> which examples share a block: best-fit decreasing over all of them, or full blocks.

Takes lengths only, so that packing a million examples needs no tokens in memory.
"""

from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from llm.training.prep.arrays import Ints

_FINEST = 4096  # full blocks of more tokens are sought in steps of several: the work grows with the square


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

    Best-fit decreasing (the longest example first, each into the fullest block that still takes it), or, where that
    needs fewer blocks, examples chosen so that each block is full. `is_packed=False` gives every example its own
    block. All lengths must be 1 to `chunksize`.
    """
    assert not len(lengths) or (lengths.min() > 0 and lengths.max() <= chunksize), "encode drops what does not fit"
    block_of = _fewest_blocks(lengths, chunksize) if is_packed else np.arange(len(lengths))
    order = np.argsort(block_of, kind="stable")
    sizes = np.bincount(block_of)
    starts = np.concatenate([[0], np.cumsum(sizes)])
    firsts = order[starts[:-1]]  # stable sort: the first member is the lowest row
    rank = np.argsort(firsts)
    if seed is not None:
        rank = np.random.default_rng(seed).permutation(rank)
    examples = np.concatenate([order[starts[b] : starts[b + 1]] for b in rank]) if len(rank) else order
    return Packing(examples=examples, block_starts=np.concatenate([[0], np.cumsum(sizes[rank])]))


def _fewest_blocks(lengths: Ints, chunksize: int) -> Ints:
    """The block number of each example."""
    best_fit = _best_fit_decreasing(lengths, chunksize)
    if best_fit.max(initial=-1) < -(-int(lengths.sum()) // chunksize):  # as few as the tokens allow
        return best_fit
    step = -(-chunksize // _FINEST)
    most = chunksize // step
    full = _full_blocks(np.minimum(-(-lengths // step), most), most)  # rounded up, a block still holds them
    return full if full.max() < best_fit.max() else best_fit


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


def _full_blocks(lengths: Ints, chunksize: int) -> Ints:
    """The block number of each example: the longest one left, with those that fill its block to the last token.

    Minimum bin slack (Gupta and Ho 1999) over counts of equal lengths. Best-fit decreasing puts like with like, and
    where all are short ten of a kind leave a gap that none is left to fill: gsm8k at 2048 takes 772 blocks, here 765,
    the bound. It is better where two or three fill most of a block and short ones must be saved for the gaps.
    """
    counts = np.bincount(lengths, minlength=chunksize + 1).tolist()
    left: list[int] = np.flatnonzero(counts).tolist()
    places: list[Ints] = []  # the lengths in each block, block after block
    sizes: list[Ints] = []
    while left:
        longest = left[-1]
        counts[longest] -= 1
        block = [longest, *_fullest(left, counts, chunksize - longest)]
        counts[longest] += 1
        uses = Counter(block)
        times = min(counts[length] // number for length, number in uses.items())
        for length, number in uses.items():
            counts[length] -= number * times
            if not counts[length]:
                del left[bisect_left(left, length)]
        places.append(np.tile(block, times))
        sizes.append(np.full(times, len(block)))
    num_examples = np.concatenate(sizes)
    block_of = np.empty(len(lengths), dtype=np.int64)
    by_place = np.argsort(np.concatenate(places), kind="stable")
    block_of[np.argsort(lengths, kind="stable")] = np.repeat(np.arange(len(num_examples)), num_examples)[by_place]
    return block_of


def _fullest(lengths: Sequence[int], counts: Sequence[int], room: int) -> list[int]:
    """Of `lengths` (rising, `counts[length]` of each) those whose sum is `room`, or next below; long before short.

    One big integer has bit s set when some of the lengths seen so far sum to s; it ends as soon as bit `room` is.
    """
    sums, mask, seen = 1, (2 << room) - 1, []
    for length in reversed(lengths[: bisect_right(lengths, room)]):
        for _ in range(min(counts[length], room // length)):
            more = (sums | sums << length) & mask
            if more == sums:
                break
            seen.append((length, sums))
            sums = more
        if sums >> room:
            break
    chosen, total = [], sums.bit_length() - 1
    for length, before in reversed(seen):
        if not before >> total & 1:
            chosen.append(length)
            total -= length
    return chosen
