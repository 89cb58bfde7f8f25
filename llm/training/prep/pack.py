"""Stage 4: example lengths -> which examples share a block: best-fit decreasing over all of them, or full blocks.

Takes lengths only, and what examples share as a forest, so that packing a million examples needs no tokens in memory.
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from llm.training.config import DataPrepConfig
from llm.training.prep.arrays import Ints
from llm.training.prep.bins import fewest_blocks
from llm.training.prep.groups import group_examples
from llm.training.prep.share import Forest, find_forest
from llm.training.prep.store import Examples

logger = logging.getLogger(__name__)
# Of the tokens, for `share_prefixes: auto`: below, plain blocks, which any trainer reads, are better.
_LEAST_SAVED = 0.05


@dataclass(frozen=True, kw_only=True)
class Packing:
    """Which examples each block holds.

    Lengths 4, 4, 6 packed to 9 give two blocks, {0, 1} and {2}:

        examples     = [0, 1, 2]     block after block, rows in order within each, those that share together
        block_starts = [0, 2, 3]     block b holds examples[block_starts[b]:block_starts[b + 1]]
        num_tokens   = 14            of all blocks, without padding
        forest       = None          what examples of a block share is stored once; None: nothing is
    """

    examples: Ints
    block_starts: Ints
    num_tokens: int
    forest: Forest | None = None

    @property
    def num_blocks(self) -> int:
        """How many blocks there are."""
        return len(self.block_starts) - 1

    def blocks(self) -> Iterator[Ints]:
        """The example numbers of each block."""
        for start, end in zip(self.block_starts[:-1], self.block_starts[1:], strict=True):
            yield self.examples[start:end]


def choose_packing(examples: Examples, config: DataPrepConfig) -> Packing:
    """The packing that `config` asks for: `pack`, `share_prefixes`, `chunksize`, `seed`; shared where that saves."""
    lengths, chunksize, seed = examples.lengths, config.chunksize, config.seed
    if config.pack and config.share_prefixes is not False:
        forest = find_forest(examples.table, examples.places)
        shared = pack_examples(lengths, chunksize=chunksize, seed=seed, forest=forest)
        num_tokens = int(lengths.sum())
        saved = num_tokens - shared.num_tokens
        if saved > 0 and (config.share_prefixes is True or saved >= _LEAST_SAVED * num_tokens):
            return shared
        if saved > 0:
            share = f"{saved / num_tokens:.1%} of the tokens, less than {_LEAST_SAVED:.0%}"
            logger.info("share_prefixes: sharing would save %s, so nothing is shared; `true` shares anyway.", share)
    return pack_examples(lengths, chunksize=chunksize, is_packed=config.pack, seed=seed)


def pack_examples(
    lengths: Ints, *, chunksize: int, is_packed: bool = True, seed: int | None = None, forest: Forest | None = None
) -> Packing:
    """Blocks of at most `chunksize` tokens, in the order of their first example, or shuffled with `seed`.

    Best-fit decreasing (the longest example first, each into the fullest block that still takes it), or, where that
    needs fewer blocks, examples chosen so that each block is full. `is_packed=False` gives every example its own
    block. All lengths must be 1 to `chunksize`. With `forest` examples that share are placed together.
    """
    assert not len(lengths) or (lengths.min() > 0 and lengths.max() <= chunksize), "encode drops what does not fit"
    items = group_examples(lengths, forest, chunksize)
    block_of = fewest_blocks(items.sizes, chunksize) if is_packed else np.arange(len(items.sizes))
    order = np.argsort(block_of, kind="stable")
    num_items = np.bincount(block_of)
    starts = np.concatenate([[0], np.cumsum(num_items)])
    rank = np.argsort(items.firsts[order[starts[:-1]]])  # stable sort: the first member has the lowest row
    if seed is not None:
        rank = np.random.default_rng(seed).permutation(rank)
    members = np.concatenate([order[starts[b] : starts[b + 1]] for b in rank]) if len(rank) else order
    examples, num_examples = items.expand(members, num_items[rank])
    return Packing(
        examples=examples,
        block_starts=np.concatenate([[0], np.cumsum(num_examples)]),
        num_tokens=int(items.sizes.sum()),
        forest=forest,
    )
