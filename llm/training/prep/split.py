"""After stage 3: examples to train on, and those held out for evaluation, which become a data set of their own.

Examples with the same prompt (the ids before the first label) go to the same side. Which one is told by a hash of the
prompt and `seed`: with `eval_fraction` it depends on no other row, so rows that are added leave the others where they
were.
"""

from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from llm.errors import DataError
from llm.training.config import DataPrepConfig
from llm.training.prep.arrays import Ints
from llm.training.prep.selection import Flags
from llm.training.prep.store import Examples

Hashes = npt.NDArray[np.uint64]


def split_examples(examples: Examples, config: DataPrepConfig) -> list[Examples]:
    """What each data set holds: all examples; or those to train on, which know of `held_out`, and the held-out ones.

    The ledger of the held-out ones has their rows only, that of the others all other rows. DataError when one side
    would be empty.
    """
    if not config.has_eval_split:
        return [examples]
    is_held_out = _is_held_out(_ranks(examples.hashes.prompt_numbers(), config.seed or 0), config)
    held_out = replace(_part(examples, is_held_out, has_dropped=False), split="eval")
    return [replace(_part(examples, ~is_held_out, has_dropped=True), held_out=held_out), held_out]


def _ranks(prompt_numbers: Ints, seed: int) -> Hashes:
    """Of each example a number that its prompt and `seed` tell, evenly spread: the lowest are held out.

    The finalizer of SplitMix64 (Steele, Lea, Flood 2014).
    """
    ranks = prompt_numbers.astype(np.uint64) + np.uint64(seed * 0x9E3779B97F4A7C15 % 2**64)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        ranks = (ranks ^ (ranks >> np.uint64(shift))) * np.uint64(factor)
    found: Hashes = ranks ^ (ranks >> np.uint64(31))
    return found


def _is_held_out(ranks: Hashes, config: DataPrepConfig) -> Flags:
    if config.eval_fraction is not None:
        key = f"eval_fraction: {config.eval_fraction}"
        flags: Flags = (ranks >> np.uint64(11)) < np.uint64(config.eval_fraction * 2**53)
    else:
        assert config.eval_rows is not None
        key = f"eval_rows: {config.eval_rows}"
        _, prompts, counts = np.unique(ranks, return_inverse=True, return_counts=True)
        last = np.abs(np.cumsum(counts) - config.eval_rows).argmin()  # the count of rows that is nearest
        flags = prompts <= last
    if not flags.any():
        raise DataError(f"{key} of {len(ranks):,} rows holds out none. Write a larger fraction, or `eval_rows`.")
    if flags.all():
        num_prompts = len(np.unique(ranks))
        raise DataError(
            f"{key} leaves no row to train on: there are {len(ranks):,} rows of {num_prompts:,} prompts, and rows of "
            "the same prompt stay together. Hold out fewer."
        )
    return flags


def _part(examples: Examples, flags: Flags, *, has_dropped: bool) -> Examples:
    """Some of the examples and their ledger, with the rows that were dropped before or without them."""
    numbers = np.flatnonzero(flags)
    was_kept = pc.not_equal(examples.ledger["outcome"], "dropped").to_numpy()
    in_ledger = np.full(len(was_kept), has_dropped)
    in_ledger[was_kept] = flags
    return replace(
        examples,
        places=examples.places[numbers],
        lengths=examples.lengths[numbers],
        hashes=examples.hashes.take(numbers),
        ledger=examples.ledger.filter(pa.array(in_ledger)),
    )
