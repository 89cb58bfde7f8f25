"""Stage 5, first half: the columns of blocks, against the plainest code for the same."""

from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm.training.prep import arrays as arrays_module
from llm.training.prep import blocks as blocks_module
from llm.training.prep.blocks import BLOCK_SCHEMA, Padding, iterate_blocks
from llm.training.prep.pack import pack_examples
from llm.training.prep.store import SCHEMA

CHUNKSIZE = 16
PADDING = Padding(length=CHUNKSIZE, token_id=7, ignore_index=-100)
Block = dict[str, Any]


@st.composite
def example_entries(draw: st.DrawFn) -> dict[str, Any]:
    """Ids and one or two trained ranges, not from the first token on."""
    length = draw(st.integers(2, CHUNKSIZE))
    ids = draw(st.lists(st.integers(0, 30_000), min_size=length, max_size=length))
    edges = sorted(draw(st.sets(st.integers(1, length), min_size=2, max_size=4)))
    return {"text": f"t{length};", "input_ids": ids, "trained": edges[: len(edges) // 2 * 2]}


examples = st.lists(example_entries(), min_size=1, max_size=12)


def table_of(entries: list[dict[str, Any]]) -> pa.Table:
    return pa.Table.from_pylist([{"row": 10 + n, **entry} for n, entry in enumerate(entries)], SCHEMA)


def blocks_of(entries: list[dict[str, Any]], padding: Padding = PADDING) -> list[Block]:
    packing = pack_examples(np.array([len(e["input_ids"]) for e in entries]), chunksize=CHUNKSIZE)
    batches = list(iterate_blocks(table_of(entries), packing, padding))
    assert all(batch.schema == BLOCK_SCHEMA for batch in batches)
    return [block for batch in batches for block in batch.to_pylist()]


def plain_block(members: list[tuple[int, dict[str, Any]]], padding: Padding) -> Block:
    """One token after the other."""
    block: Block = {name: [] for name in BLOCK_SCHEMA.names} | {"full_text": ""}
    for row, entry in members:
        spans = list(zip(entry["trained"][::2], entry["trained"][1::2], strict=True))
        for place, number in enumerate(entry["input_ids"]):
            is_trained = any(start <= place < end for start, end in spans)
            block["input_ids"].append(number)
            block["attention_mask"].append(1)
            block["labels"].append(number if is_trained else padding.ignore_index)
            block["position_ids"].append(place)
        block["node_lengths"].append(len(entry["input_ids"]))
        block["node_parents"].append(-1)
        block["full_text"] += entry["text"]
        block["example_rows"].append(row)
    fills = {"input_ids": padding.token_id, "attention_mask": 0, "labels": padding.ignore_index, "position_ids": 0}
    for name, fill in fills.items():
        block[name] += [fill] * ((padding.length or 0) - len(block[name]))
    return block


@given(entries=examples)
@settings(deadline=None)
def test_blocks_equal_those_made_token_by_token(entries: list[dict[str, Any]]) -> None:
    by_row = {10 + number: entry for number, entry in enumerate(entries)}
    found = blocks_of(entries)
    assert found == [plain_block([(r, by_row[r]) for r in block["example_rows"]], PADDING) for block in found]
    assert sorted(row for block in found for row in block["example_rows"]) == sorted(by_row)


@given(entries=examples)
@settings(deadline=None)
def test_first_token_of_every_example_is_no_label(entries: list[dict[str, Any]]) -> None:
    for block in blocks_of(entries):
        first = [label for label, place in zip(block["labels"], block["position_ids"], strict=True) if place == 0]
        assert set(first) == {-100}


@given(entries=examples)
@settings(deadline=None)
def test_blocks_without_padding_are_as_long_as_their_examples(entries: list[dict[str, Any]]) -> None:
    for block in blocks_of(entries, Padding(length=None, token_id=7, ignore_index=-100)):
        lengths = {name: len(block[name]) for name in ("input_ids", "attention_mask", "labels", "position_ids")}
        assert set(lengths.values()) == {sum(block["node_lengths"])}
        assert 0 not in block["attention_mask"]


def test_blocks_of_many_batches_equal_those_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    entries = [{"text": "", "input_ids": [n] * (3 + n % 14), "trained": [1, 2]} for n in range(40)]
    whole = blocks_of(entries)
    monkeypatch.setattr(blocks_module, "_TOKENS_AT_ONCE", 50)
    monkeypatch.setattr(blocks_module, "_BATCHES_READ", 2)
    monkeypatch.setattr(arrays_module, "_LISTS_AT_ONCE", 3)
    assert blocks_of(entries) == whole


def test_ignore_index_marks_prompt_and_padding() -> None:
    entry = {"text": "", "input_ids": [5, 6, 8], "trained": [1, 3]}
    (block,) = blocks_of([entry], Padding(length=5, token_id=0, ignore_index=-7))
    assert block["labels"] == [-7, 6, 8, -7, -7]
    assert block["input_ids"] == [5, 6, 8, 0, 0]
