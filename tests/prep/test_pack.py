"""Stage 4: nothing lost, nothing doubled, dense, in order."""

import ast
import re

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prep_helpers import ROOT

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
def test_packing_fills_blocks_as_the_textbook_does(lengths: list[int]) -> None:
    blocks = blocks_of(packed(lengths))
    num_blocks = len(blocks)
    assert sorted(CHUNKSIZE - sum(lengths[n] for n in block) for block in blocks) == best_fit_decreasing(lengths)
    at_least = -(-sum(lengths) // CHUNKSIZE)
    assert at_least <= num_blocks <= 11 / 9 * first_fit_decreasing(lengths) + 1


def test_packing_of_many_lengths_is_nearly_full() -> None:
    lengths = np.random.default_rng(0).lognormal(4.5, 0.8, 20_000).astype(np.int64).clip(1, 2048)
    num_blocks = pack_examples(lengths, chunksize=2048).num_blocks
    assert num_blocks <= 1.002 * -(-int(lengths.sum()) // 2048)


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
