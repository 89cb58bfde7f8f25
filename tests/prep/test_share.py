"""Stage 4 with shared prompts: whatever examples begin alike, nothing is lost, and no label is shared."""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prep_helpers import Rows, make_config, write_jsonl
from prep_helpers import settings as config_of
from typer.testing import CliRunner

from llm.cli import app
from llm.training.config import DatasetConfig
from llm.training.dataprep import prepare
from llm.training.prep import blocks as blocks_module
from llm.training.prep import share as share_module
from llm.training.prep.blocks import Padding, iterate_blocks
from llm.training.prep.dataset import load_blocks
from llm.training.prep.groups import Items, group_examples
from llm.training.prep.manifest import Manifest
from llm.training.prep.nodes import shared_nodes
from llm.training.prep.pack import Packing, pack_examples
from llm.training.prep.share import MIN_NODE_TOKENS, Forest, find_forest
from llm.training.prep.store import SCHEMA

pytest_plugins = ("prep_fixtures",)

CHUNKSIZE = 120
Entry = dict[str, Any]
Block = dict[str, Any]
# One of few tokens, so that what differs begins alike, and long enough that all of it may be a node.
PART = st.lists(st.integers(0, 2), min_size=0, max_size=MIN_NODE_TOKENS + 6)


@st.composite
def families(draw: st.DrawFn) -> list[Entry]:
    """Examples that begin with the same parts, in any order, some the same, some the beginning of others."""
    parts = draw(st.lists(PART, min_size=1, max_size=4))
    entries = []
    for _ in range(draw(st.integers(1, 14))):
        ids = [number for _ in range(draw(st.integers(0, 3))) for number in draw(st.sampled_from(parts))]
        own = draw(st.lists(st.integers(0, 3), min_size=2, max_size=12))
        ids = [*ids[: CHUNKSIZE - len(own)], *own]
        edges = sorted(draw(st.sets(st.integers(1, len(ids)), min_size=2, max_size=4)))
        entries.append({"text": chr(97 + len(entries)), "input_ids": ids, "trained": edges[: len(edges) // 2 * 2]})
    return entries


def table_of(entries: list[Entry], rows_a_chunk: int = 5) -> pa.Table:
    """As the spill file: in several chunks."""
    rows = [{"row": 10 + n, **entry} for n, entry in enumerate(entries)]
    chunks = [rows[n : n + rows_a_chunk] for n in range(0, len(rows), rows_a_chunk)]
    return pa.concat_tables([pa.Table.from_pylist(chunk, SCHEMA) for chunk in chunks])


def lengths_of(entries: list[Entry]) -> Any:
    return np.array([len(entry["input_ids"]) for entry in entries], dtype=np.int64)


def packed(entries: list[Entry], chunksize: int = CHUNKSIZE, seed: int | None = None) -> Packing:
    forest = find_forest(table_of(entries))
    return pack_examples(lengths_of(entries), chunksize=chunksize, seed=seed, forest=forest)


def blocks_of(entries: list[Entry], packing: Packing, length: int | None = CHUNKSIZE) -> list[Block]:
    padding = Padding(length=length, token_id=99, ignore_index=-100)
    return [b for batch in iterate_blocks(table_of(entries), packing, padding) for b in batch.to_pylist()]


def paths(block: Block) -> list[list[int]]:
    """The nodes from the root to each leaf."""
    parents = block["node_parents"]
    leaves = [node for node in range(len(parents)) if node not in parents]
    found = []
    for leaf in leaves:
        path = [leaf]
        while parents[path[0]] >= 0:
            path.insert(0, parents[path[0]])
        found.append(path)
    return found


def examples_in(block: Block) -> list[tuple[list[int], list[int], list[int], int]]:
    """Ids, labels, positions of each leaf's path, and how long the leaf itself is."""
    ends = np.cumsum(block["node_lengths"])
    spans = [slice(end - length, end) for end, length in zip(ends, block["node_lengths"], strict=True)]
    names = ("input_ids", "labels", "position_ids")
    return [
        (*([v for node in path for v in block[name][spans[node]]] for name in names), block["node_lengths"][path[-1]])  # type: ignore[misc]
        for path in paths(block)
    ]


def plain_labels(entry: Entry) -> list[int]:
    spans = list(zip(entry["trained"][::2], entry["trained"][1::2], strict=True))
    ids = entry["input_ids"]
    return [ids[n] if any(start <= n < end for start, end in spans) else -100 for n in range(len(ids))]


# --- nothing is lost, nothing of a label is shared -------------------------------------------------------------------


@given(entries=families(), seed=st.none() | st.integers(0, 3))
@settings(max_examples=150, deadline=None)
def test_every_example_is_one_path_from_root_to_leaf(entries: list[Entry], seed: int | None) -> None:
    blocks = blocks_of(entries, packed(entries, seed=seed))
    assert sorted(row for block in blocks for row in block["example_rows"]) == [10 + n for n in range(len(entries))]
    for block in blocks:
        found = examples_in(block)
        for row, (ids, labels, positions, num_own) in zip(block["example_rows"], found, strict=True):
            entry = entries[row - 10]
            assert (ids, labels) == (entry["input_ids"], plain_labels(entry))
            assert positions == list(range(len(ids)))
            assert num_own > len(ids) - entry["trained"][0]  # its last prompt token, too, is its own


@given(entries=families())
@settings(max_examples=80, deadline=None)
def test_shared_nodes_have_no_label_and_two_children_and_are_worth_it(entries: list[Entry]) -> None:
    packing = packed(entries)
    blocks = blocks_of(entries, packing)
    for block in blocks:
        ends, parents = np.cumsum(block["node_lengths"]), block["node_parents"]
        for node in set(parents) - {-1}:
            labels = block["labels"][ends[node] - block["node_lengths"][node] : ends[node]]
            assert set(labels) == {-100} and len(labels) >= MIN_NODE_TOKENS
            assert parents.count(node) > 1
    assert packing.num_tokens == sum(sum(block["node_lengths"]) for block in blocks) <= lengths_of(entries).sum()


@given(entries=families())
@settings(max_examples=80, deadline=None)
def test_blocks_keep_within_chunksize_and_their_padding_says_nothing(entries: list[Entry]) -> None:
    for block in blocks_of(entries, packed(entries)):
        num_tokens = sum(block["node_lengths"])
        assert 0 < num_tokens <= CHUNKSIZE
        assert block["attention_mask"] == [1] * num_tokens + [0] * (CHUNKSIZE - num_tokens)
        assert set(block["labels"][num_tokens:]) <= {-100} and set(block["input_ids"][num_tokens:]) <= {99}


@given(entries=families())
@settings(max_examples=80, deadline=None)
def test_nodes_are_depth_first_and_children_in_the_order_of_rows(entries: list[Entry]) -> None:
    blocks = blocks_of(entries, packed(entries))
    assert [min(b["example_rows"]) for b in blocks] == sorted(min(b["example_rows"]) for b in blocks)
    for block in blocks:
        parents, ways = block["node_parents"], paths(block)
        assert all(parent < node for node, parent in enumerate(parents))
        assert [node for way in ways for node in way if node == way[-1] or way[-1] == first_leaf(node, ways)] == list(
            range(len(parents))
        )
        first_row = {
            node: min(row for way, row in zip(ways, block["example_rows"], strict=True) if node in way)
            for node in range(len(parents))
        }
        for parent in set(parents):
            firsts = [first_row[node] for node in range(len(parents)) if parents[node] == parent]
            assert firsts == sorted(firsts)


def first_leaf(node: int, ways: list[list[int]]) -> int:
    return next(way[-1] for way in ways if node in way)


# --- what is found ---------------------------------------------------------------------------------------------------


def plain_forest(entries: list[Entry]) -> set[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Every node as (its beginning, the examples below) by the plainest code: greedily from the root."""
    found = set()

    todo = [(list(range(len(entries))), 0)]
    while todo:
        members, start = todo.pop()
        groups: dict[tuple[int, ...], list[int]] = {}
        for n in members:
            limit = entries[n]["trained"][0] - 1
            for end in range(start, limit + 1):
                groups.setdefault(tuple(entries[n]["input_ids"][:end]), []).append(n)
        branching = {}
        for beginning, below in groups.items():
            longer = [b for b, g in groups.items() if b[: len(beginning)] == beginning and g == below]
            if len(below) > 1 and max(map(len, longer)) == len(beginning):
                branching[beginning] = below
        enough = {b: g for b, g in branching.items() if len(b) - start >= MIN_NODE_TOKENS}
        for beginning, below in enough.items():
            if not any(len(b) < len(beginning) and beginning[: len(b)] == b for b in enough):
                found.add((beginning, tuple(below)))
                todo.append((below, len(beginning)))
    return found


@given(entries=families())
@settings(max_examples=80, deadline=None)
def test_forest_equals_that_of_the_plainest_code(entries: list[Entry]) -> None:
    forest = find_forest(table_of(entries))
    below: list[list[int]] = [[] for _ in forest.node_ends]
    for example, node in enumerate(forest.leaf_parents.tolist()):
        while node >= 0:
            below[node].append(example)
            node = int(forest.node_parents[node])
    found = {
        (tuple(entries[members[0]]["input_ids"][:end]), tuple(members))
        for end, members in zip(forest.node_ends, below, strict=True)
    }
    assert len(found) == len(below)
    assert found == plain_forest(entries)


@given(entries=families())
@settings(max_examples=60, deadline=None)
def test_small_rounds_chunks_and_batches_give_the_same(entries: list[Entry]) -> None:
    whole = blocks_of(entries, packed(entries))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(share_module, "_MOST_TOKENS", 3)
        patch.setattr(share_module, "_ROWS_AT_ONCE", 2)
        patch.setattr(share_module, "_LEADER_TOKENS", 4)
        patch.setattr(blocks_module, "_TOKENS_AT_ONCE", 50)
        patch.setattr(blocks_module, "_BATCHES_READ", 2)
        assert blocks_of(entries, packed(entries)) == whole
    found = find_forest(table_of(entries, rows_a_chunk=1)), find_forest(table_of(entries, rows_a_chunk=100))
    assert all(np.array_equal(getattr(found[0], name), getattr(found[1], name)) for name in vars(found[0]))


@given(entries=families())
@settings(max_examples=60, deadline=None)
def test_examples_that_share_nothing_are_packed_and_written_as_ever(entries: list[Entry]) -> None:
    alone = [entry | {"input_ids": [n + 100, *entry["input_ids"][1:]]} for n, entry in enumerate(entries)]
    packing, plain = packed(alone), pack_examples(lengths_of(alone), chunksize=CHUNKSIZE)
    assert np.array_equal(packing.examples, plain.examples) and np.array_equal(packing.block_starts, plain.block_starts)
    assert blocks_of(alone, packing) == blocks_of(alone, plain)


# --- named shapes ----------------------------------------------------------------------------------------------------


def entry(*parts: range | list[int], num_prompt: int) -> Entry:
    ids = [number for part in parts for number in part]
    return {"text": f"{len(ids)};", "input_ids": ids, "trained": [num_prompt, len(ids)]}


SYSTEM, FIRST, SECOND = range(100, 120), range(200, 220), range(300, 320)


def test_conversation_that_goes_on_shares_its_prompt_but_no_answer() -> None:
    asked, answer, again = [*SYSTEM, *FIRST], [7, 8, 9], [*SECOND]
    entries = [entry(asked, answer, num_prompt=40), entry(asked, answer, again, [5, 6], num_prompt=63)]
    (block,) = blocks_of(entries, packed(entries))
    assert (block["node_lengths"], block["node_parents"]) == ([39, 4, 26], [-1, 0, 0])
    assert block["labels"][39:43] == [-100, 7, 8, 9] and block["labels"][43:69] == [-100] * 24 + [5, 6]


def test_equal_prompts_share_all_but_their_last_token() -> None:
    entries = [entry(SYSTEM, [7, n], num_prompt=20) for n in range(3)]
    (block,) = blocks_of(entries, packed(entries))
    assert (block["node_lengths"], block["node_parents"]) == ([19, 3, 3, 3], [-1, 0, 0, 0])
    assert block["position_ids"][:28] == [*range(19), *[19, 20, 21] * 3]


def test_forest_in_a_forest_is_written_depth_first() -> None:
    entries = [
        entry(SYSTEM, FIRST, [1, 2], num_prompt=41),
        entry([9], [1, 2], num_prompt=2),
        entry(SYSTEM, [3, 4], num_prompt=21),
        entry(SYSTEM, FIRST, [5, 6], num_prompt=41),
    ]
    (block,) = blocks_of(entries, packed(entries))
    assert block["example_rows"] == [10, 13, 12, 11]
    assert (block["node_lengths"], block["node_parents"]) == ([20, 20, 2, 2, 2, 3], [-1, 0, 1, 1, 0, -1])


def test_node_too_short_to_be_worth_it_is_part_of_what_follows() -> None:
    below, enough = range(MIN_NODE_TOKENS - 1), range(MIN_NODE_TOKENS)
    assert len(find_forest(table_of([entry(below, [90 + n, 1], num_prompt=16) for n in range(3)])).node_ends) == 0
    assert find_forest(table_of([entry(enough, [90 + n, 1], num_prompt=17) for n in range(3)])).node_ends == [16]


@pytest.mark.parametrize("number", [0, 1])
def test_nobody_to_share_with_is_no_forest(number: int) -> None:
    forest = find_forest(table_of([entry(SYSTEM, FIRST, num_prompt=30)] * number) if number else SCHEMA.empty_table())
    assert len(forest.node_ends) == 0 and forest.leaf_parents.tolist() == [-1] * number


@pytest.mark.parametrize(("chunksize", "times_fewer"), [(2048, 3.4), (4096, 4.2)])
def test_few_shot_prompt_of_600_tokens_with_rows_of_150_takes_four_times_fewer_tokens(
    chunksize: int, times_fewer: float
) -> None:
    maker = np.random.default_rng(0)
    own = [maker.integers(0, 999, 150).tolist() for _ in range(1_000)]
    entries = [entry(range(1000, 1600), ids, num_prompt=710) for ids in own]
    packing = packed(entries, chunksize=chunksize)
    assert 750_000 / packing.num_tokens > times_fewer
    # Of what is left beside the prompt no block has room for one more.
    assert packing.num_blocks == -(-1_000 // ((chunksize - 600) // 150))


@pytest.mark.parametrize("chunksize", [2048, 4096])
def test_blocks_of_many_small_families_are_as_few_as_their_tokens(chunksize: int) -> None:
    maker = np.random.default_rng(0)
    shared = maker.integers(16, 300, 2_000)
    families = np.concatenate([np.arange(2_000), maker.integers(0, 2_000, 6_000)])
    lengths = shared[families] + maker.lognormal(4.5, 0.6, 8_000).astype(np.int64).clip(3, 1500)
    forest = Forest(node_ends=shared, node_parents=np.full(2_000, -1), leaf_parents=families)
    packing = pack_examples(lengths, chunksize=chunksize, forest=forest)
    assert packing.num_blocks <= 1.002 * -(-packing.num_tokens // chunksize)


def test_examples_of_the_docs_are_true() -> None:
    forest = Forest(node_ends=np.array([6]), node_parents=np.array([-1]), leaf_parents=np.array([0, 0, -1]))
    nodes = shared_nodes(forest, np.arange(3), np.array([9, 8, 5]), np.array([3]))
    assert (nodes.num_skipped.tolist(), nodes.branches.tolist()) == ([0, 6, 0], [-1, 0, -1])
    assert (nodes.lengths.tolist(), nodes.parents.tolist(), nodes.num_nodes.tolist()) == (
        [6, 3, 2, 5],
        [-1, 0, 0, -1],
        [4],
    )
    assert nodes.num_shared_tokens == 6

    forest = Forest(node_ends=np.array([3]), node_parents=np.array([-1]), leaf_parents=np.array([0, -1, 0]))
    items: Items = group_examples(np.array([9, 8, 5]), forest, 20)
    assert (items.numbers.tolist(), items.sizes.tolist(), items.firsts.tolist()) == ([3, 1], [11, 8], [0, 1])
    assert [group.tolist() for group in items.groups] == [[0, 2]]

    first = [100 + n for n in range(20)]
    entries = [entry(first, [1, 1], num_prompt=21), entry(SYSTEM, FIRST, [10, 3, 4], num_prompt=41)]
    entries += [entry(SYSTEM, FIRST, [11, 3, 4], num_prompt=41)]
    assert find_forest(table_of(entries)).node_ends.tolist() == [20, 40]


# --- through the whole preparation -----------------------------------------------------------------------------------

QUESTIONS = [{"input": f"{n}+{n}?", "response": f"{n + n}", "contexts": ["one two three " * 8]} for n in range(12)]
APART = [{"input": f"{n} " * 9, "response": f"{n + n}"} for n in range(12)]
BARE = {"prompt_config": {"method": "Prompt"}}


def prepared(folder: Path, model: Path, rows: Rows, **changes: Any) -> tuple[Manifest, list[Block]]:
    folder.mkdir(exist_ok=True)
    source = write_jsonl(folder / "rows.jsonl", rows)
    manifest = prepare(make_config(folder, config_of(source, model, folder / "train", **(BARE | changes))))
    return manifest, list(load_blocks(DatasetConfig.model_validate(str(folder / "train")), key="train_dataset_config"))


def files_of(folder: Path) -> dict[str, bytes]:
    """What the data set holds, without what says how it was made."""
    files = (path for path in sorted((folder / "train").rglob("*")) if path.suffix in (".arrow", ".parquet"))
    return {path.name: path.read_bytes() for path in files}


def test_auto_shares_what_saves_and_the_counts_and_the_summary_say_so(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest, blocks = prepared(tmp_path / "shared", model, QUESTIONS)
    shown = capsys.readouterr().err
    _, apart = prepared(tmp_path / "apart", model, QUESTIONS, share_prefixes=False)
    counts, stored = manifest.counts, sum(sum(b["node_lengths"]) for b in blocks)
    tokens = sum(sum(b["node_lengths"]) for b in apart)
    assert (counts["tokens"], counts["stored_tokens"]) == (tokens, stored) and stored < 0.6 * tokens
    num_shared = sum(len(b["node_lengths"]) - len(b["example_rows"]) for b in blocks)
    assert counts["shared"]["nodes"] == num_shared > 0 and counts["shared"]["saved_tokens"] == tokens - stored
    assert counts["density"] == round(stored / (256 * len(blocks)), 4)
    assert f"tokens stored once, saves {tokens - stored:,} ({(tokens - stored) / tokens:.0%})" in shown
    assert len(blocks) < len(apart) and all(set(b["node_parents"]) == {-1} for b in apart)


def test_auto_leaves_apart_what_saves_less_than_5_percent_and_says_so(
    tmp_path: Path, model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [*({"input": row["input"] * 9, "response": "x"} for row in APART), *QUESTIONS[:2]]
    with caplog.at_level(logging.INFO):
        manifest, blocks = prepared(tmp_path / "auto", model, rows)
    assert manifest.counts["shared"] == {"nodes": 0, "tokens": 0, "saved_tokens": 0}
    assert all(set(b["node_parents"]) == {-1} for b in blocks)
    (message,) = (record.message for record in caplog.records if "share_prefixes" in record.message)
    assert "less than 5%, so nothing is shared; `true` shares anyway" in message
    forced, _ = prepared(tmp_path / "true", model, rows, share_prefixes=True)
    assert 0 < forced.counts["shared"]["saved_tokens"] < 0.05 * forced.counts["tokens"]


@pytest.mark.parametrize("share", ["auto", True])
def test_sharing_nothing_writes_the_bytes_of_false(tmp_path: Path, model: Path, share: str | bool) -> None:
    prepared(tmp_path / "one", model, APART, share_prefixes=share)
    prepared(tmp_path / "two", model, APART, share_prefixes=False)
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")
    assert len(files_of(tmp_path / "one")) == 2


def test_pack_false_shares_nothing(tmp_path: Path, model: Path) -> None:
    _, blocks = prepared(tmp_path / "x", model, QUESTIONS, pack=False, share_prefixes=True)
    assert [b["node_parents"] for b in blocks] == [[-1]] * len(QUESTIONS)


def test_shared_blocks_are_the_same_bytes_for_one_and_two_threads_and_on_a_rerun(tmp_path: Path, model: Path) -> None:
    found = []
    for name, num_proc in (("a", 1), ("b", 2), ("c", 2)):
        prepared(tmp_path / name, model, QUESTIONS, num_proc=num_proc, seed=3, reuse_tokens=False)
        found.append(files_of(tmp_path / name))
    assert found[0] == found[1] == found[2] and len(found[0]) == 2


@pytest.mark.parametrize(
    "lasts", ["éêa", "éê", "！？"]
)  # the last two part within a character, "！" begins as U+FFFD does
def test_full_text_says_what_is_shared_once(lasts: str, tmp_path: Path, model: Path) -> None:
    rows = [{"input": f"{'one two ' * 20}é{last}", "response": f"é{last}"} for last in lasts]
    _, blocks = prepared(tmp_path / "x", model, rows, chunksize=512)
    (text,) = [block["full_text"] for block in blocks]
    assert text.count("one two") == 20 and text.count("<|im_start|>user") == 1
    assert [text.count(f"{last}<|im_end|>\n<|im_start|>assistant\né{last}") for last in lasts] == [1] * len(lasts)


def test_inspect_names_the_rows_of_shared_blocks(tmp_path: Path, model: Path) -> None:
    _, blocks = prepared(tmp_path / "x", model, [*APART[:1], *QUESTIONS, *APART[1:3]], chunksize=512)
    result = CliRunner().invoke(app, ["inspect", str(tmp_path / "x" / "train"), "--tokens", "0"])
    assert result.exit_code == 0 and any(len(set(b["node_parents"])) > 1 for b in blocks)
    titles = [line for line in result.stdout.splitlines() if line.startswith("--- row")]
    assert [int(t.split()[2]) for t in titles] == [row for b in blocks[:3] for row in b["example_rows"]]
    assert "shared   = " in result.stdout and "shared by nodes" in result.stdout
