"""Stage 4: nothing lost, nothing doubled, dense, in order."""

import ast
import re

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prep_helpers import ROOT

from llm.training.prep.arrays import Ints
from llm.training.prep.blocks import Padding, iterate_blocks
from llm.training.prep.pack import Packing, pack_examples
from llm.training.prep.store import SCHEMA

CHUNKSIZE = 64
some_lengths = st.lists(st.integers(1, CHUNKSIZE), max_size=60)


def packed(lengths: list[int], *, is_packed: bool = True, seed: int | None = None) -> Packing:
    return pack_examples(np.array(lengths, dtype=np.int64), chunksize=CHUNKSIZE, is_packed=is_packed, seed=seed)


def blocks_of(packing: Packing) -> list[list[int]]:
    return [block.tolist() for block in packing.blocks()]


def first_fit_decreasing(lengths: list[int]) -> int:
    """How many blocks the textbook's other method needs."""
    spaces: list[int] = []
    for length in sorted(lengths, reverse=True):
        place = next((n for n, space in enumerate(spaces) if space >= length), None)
        if place is None:
            spaces.append(CHUNKSIZE - length)
        else:
            spaces[place] -= length
    return len(spaces)


def best_fit_decreasing(lengths: list[int]) -> list[int]:
    """The free tokens of each block by the plainest code (which of two equally full ones is taken does not matter)."""
    spaces: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [(space, n) for n, space in enumerate(spaces) if space >= length]
        if fitting:
            spaces[min(fitting)[1]] -= length
        else:
            spaces.append(CHUNKSIZE - length)
    return sorted(spaces)


def readme_examples() -> list[list[list[int]]]:
    """The two code blocks of the README's section on packing, as data."""
    text = (ROOT / "llm/training/README.md").read_text(encoding="utf-8")
    section = text.split("## Example packing")[1].split("\n## ")[0]
    return [ast.literal_eval(code) for code in re.findall(r"```python\n(.*?)```", section, re.DOTALL)]


def test_readme_example_packs_as_printed() -> None:
    before, after = readme_examples()
    assert before == [[1, 100, 100, 2], [1, 200, 200, 2], [1, 300, 300, 300, 300, 2]]
    assert after == [[1, 100, 100, 2, 1, 200, 200, 2, 0], [1, 300, 300, 300, 300, 2, 0, 0, 0]]
    packing = pack_examples(np.array([len(ids) for ids in before]), chunksize=9)
    columns = [[0, 1, 2], ["a", "b", "c"], before, [[1, len(ids)] for ids in before]]
    table = pa.table([pa.array(c, field.type) for c, field in zip(columns, SCHEMA, strict=True)], schema=SCHEMA)
    (batch,) = iterate_blocks(table, packing, Padding(length=9, token_id=0, ignore_index=-100))
    assert batch["input_ids"].to_pylist() == after


@given(lengths=some_lengths, seed=st.none() | st.integers(0, 5), is_packed=st.booleans())
def test_packing_loses_and_doubles_nothing(lengths: list[int], seed: int | None, is_packed: bool) -> None:
    packing = packed(lengths, seed=seed, is_packed=is_packed)
    assert sorted(packing.examples.tolist()) == list(range(len(lengths)))
    assert sorted(number for block in blocks_of(packing) for number in block) == list(range(len(lengths)))


@given(lengths=some_lengths)
def test_packing_keeps_every_block_within_chunksize(lengths: list[int]) -> None:
    assert all(0 < sum(lengths[n] for n in block) <= CHUNKSIZE for block in blocks_of(packed(lengths)))


@given(lengths=some_lengths)
def test_packing_without_seed_orders_blocks_and_examples_by_row(lengths: list[int]) -> None:
    blocks = blocks_of(packed(lengths))
    assert [block[0] for block in blocks] == sorted(block[0] for block in blocks)
    assert all(block == sorted(block) for block in blocks)


@given(lengths=st.lists(st.integers(1, CHUNKSIZE), min_size=1, max_size=200))
@settings(max_examples=50, deadline=None)
def test_packing_needs_no_more_blocks_than_best_fit_decreasing(lengths: list[int]) -> None:
    blocks, textbook = blocks_of(packed(lengths)), best_fit_decreasing(lengths)
    at_least = -(-sum(lengths) // CHUNKSIZE)
    assert at_least <= len(blocks) <= len(textbook) <= 11 / 9 * first_fit_decreasing(lengths) + 1
    if len(textbook) == at_least:
        assert sorted(CHUNKSIZE - sum(lengths[n] for n in block) for block in blocks) == textbook


@given(lengths=st.lists(st.integers(9, 20), min_size=100, max_size=300))
@settings(max_examples=50, deadline=None)
def test_packing_of_like_lengths_needs_at_most_one_block_over_the_bound(lengths: list[int]) -> None:
    assert packed(lengths).num_blocks <= -(-sum(lengths) // CHUNKSIZE) + 1


@given(lengths=st.lists(st.integers(1, 40_000), max_size=60))
@settings(deadline=None)
def test_packing_of_long_blocks_loses_nothing_and_keeps_within_chunksize(lengths: list[int]) -> None:
    blocks = blocks_of(pack_examples(np.array(lengths, dtype=np.int64), chunksize=40_001))
    assert sorted(number for block in blocks for number in block) == list(range(len(lengths)))
    assert all(sum(lengths[n] for n in block) <= 40_001 for block in blocks)


def log_normal_lengths(mean: float, deviation: float, number: int = 20_000) -> Ints:
    """Lengths whose logarithm is normally distributed, as those of real data sets nearly are."""
    return np.random.default_rng(0).lognormal(mean, deviation, number).astype(np.int64).clip(1, 2048)


@pytest.mark.parametrize("chunksize", [2048, 4096])
@pytest.mark.parametrize(
    "lengths",
    [
        log_normal_lengths(5.3, 0.35, 7_473),  # like gsm8k
        log_normal_lengths(5.9, 0.3, 500),  # like pubmedqa
        log_normal_lengths(5.0, 0.1),
        log_normal_lengths(4.5, 0.8),
        log_normal_lengths(5.5, 0.7),
        log_normal_lengths(6.2, 0.4),
        log_normal_lengths(6.0, 1.0, 100_000),
    ],
)
def test_packing_of_real_looking_lengths_needs_as_few_blocks_as_their_tokens(lengths: Ints, chunksize: int) -> None:
    at_least = -(-int(lengths.sum()) // chunksize)
    assert pack_examples(lengths, chunksize=chunksize).num_blocks <= 1.002 * at_least


def test_packing_of_lengths_above_half_a_block_gives_each_its_own() -> None:
    assert packed([CHUNKSIZE // 2 + 1 + n % 7 for n in range(100)]).num_blocks == 100


def test_packing_with_few_short_lengths_stays_as_good_as_best_fit_decreasing() -> None:
    maker = np.random.default_rng(0)
    lengths = np.concatenate([np.full(500, 600), np.full(500, 800), maker.integers(20, 300, 1_000)])
    num_blocks = pack_examples(lengths, chunksize=2048).num_blocks
    assert num_blocks <= 1.005 * -(-int(lengths.sum()) // 2048)  # full blocks alone: 1.03


@given(lengths=some_lengths)
def test_pack_false_gives_every_example_its_own_block(lengths: list[int]) -> None:
    assert blocks_of(packed(lengths, is_packed=False)) == [[n] for n in range(len(lengths))]


@given(lengths=some_lengths, seed=st.integers(0, 1000))
def test_seed_changes_the_order_of_blocks_and_nothing_else(lengths: list[int], seed: int) -> None:
    plain, shuffled = blocks_of(packed(lengths)), blocks_of(packed(lengths, seed=seed))
    assert sorted(plain) == sorted(shuffled)
    assert shuffled == blocks_of(packed(lengths, seed=seed))


def test_seed_shuffles() -> None:
    plain, one, two = (blocks_of(packed([40] * 30, seed=seed)) for seed in (None, 1, 2))
    assert plain != one != two


def test_no_examples_make_no_block() -> None:
    assert packed([]).num_blocks == 0


def test_example_longer_than_chunksize_is_our_own_mistake() -> None:
    with pytest.raises(AssertionError, match="encode drops"):
        packed([CHUNKSIZE + 1])
