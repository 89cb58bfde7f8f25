"""Which examples go into the data set: the blocks are those of the rows that are left, and nothing vanishes."""

import json
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from prep_helpers import make_config, settings, some_rows, write_jsonl

from llm.training.config import DatasetConfig
from llm.training.dataprep import prepare
from llm.training.prep.dataset import load_blocks
from llm.training.prep.manifest import Manifest

pytest_plugins = ("prep_fixtures",)

Rows = list[dict[str, Any]]


def prepared(folder: Path, model: Path, rows: Rows, name: str, **changes: Any) -> Manifest:
    source = write_jsonl(folder / f"{name}.jsonl", rows)
    return prepare(make_config(folder, settings(source, model, folder / name, **changes)))


def blocks_at(path: Path) -> Rows:
    found: Rows = load_blocks(DatasetConfig.model_validate(str(path)), key="inspect").to_list()
    return found


def ledger_at(path: Path) -> Rows:
    found: Rows = pq.read_table(path / "ledger.parquet").to_pylist()
    return found


def with_repeats() -> tuple[Rows, list[int]]:
    """1,500 rows, more than a batch, and the numbers of those that an earlier row equals."""
    rows = some_rows(1500)
    repeats = {1: 0, 700: 2, 999: 0, 1000: 999, 1001: 5, 1499: 1498}
    for number, first in repeats.items():
        rows[number] = dict(rows[first])
    rows[40] = rows[39] | {"response": "It is another."}  # the same prompt, no duplicate
    rows[50] = rows[49] | {"input": rows[49]["input"] + " "}
    return rows, sorted(repeats)


@pytest.mark.parametrize("changes", [{}, {"share_prefixes": True}, {"share_prefixes": False, "seed": 3}])
def test_dedupe_makes_the_blocks_of_the_rows_without_repeats(
    changes: dict[str, Any], tmp_path: Path, model: Path
) -> None:
    rows, repeats = with_repeats()
    left = [number for number in range(len(rows)) if number not in repeats]
    manifest = prepared(tmp_path, model, rows, "all", dedupe=True, **changes)
    expected = prepared(tmp_path, model, [rows[number] for number in left], "left", **changes)
    blocks, others = blocks_at(tmp_path / "all"), blocks_at(tmp_path / "left")
    assert len(blocks) > 100
    for block, other in zip(blocks, others, strict=True):
        assert block.pop("example_rows") == [left[number] for number in other.pop("example_rows")]
        assert block == other
    kept = [entry for entry in ledger_at(tmp_path / "all") if entry["outcome"] == "kept"]
    for entry, other in zip(kept, ledger_at(tmp_path / "left"), strict=True):
        assert entry.pop("row") == left[other.pop("row")]
        assert entry == other
    same = ("rows_kept", "tokens", "trained_tokens", "stored_tokens", "shared", "blocks", "density")
    assert {name: manifest.counts[name] for name in same} == {name: expected.counts[name] for name in same}


def test_dedupe_counts_each_repeat_in_ledger_manifest_report_and_summary(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows, repeats = with_repeats()
    rows[7] = {"input": "dog " * 300, "response": "x", "contexts": []}
    counts = prepared(tmp_path, model, rows, "train", dedupe=True).counts
    told = capsys.readouterr().err
    assert counts["rows_dropped"] == {
        "duplicate": {"rows": 6, "first_rows": repeats[:5]},
        "too_long": {"rows": 1, "first_rows": [7]},
    }
    assert (counts["rows_read"], counts["rows_kept"]) == (1500, 1493)
    assert "dropped: duplicate" in told and "an earlier row has the same prompt and response; rows 1, 700" in told
    ledger = ledger_at(tmp_path / "train")
    dropped = [entry for entry in ledger if entry["reason"] == "duplicate"]
    assert [entry["row"] for entry in dropped] == repeats
    assert all(entry["outcome"] == "dropped" and entry["num_tokens"] and entry["block"] is None for entry in dropped)
    assert {entry["num_trained_tokens"] for entry in dropped} == {None}
    blocks = blocks_at(tmp_path / "train")
    for entry in ledger:
        assert entry["block"] is None or entry["row"] in blocks[entry["block"]]["example_rows"]
    report = json.loads((tmp_path / "train" / "report.json").read_text())
    assert report["duplicates"]["rows"] == 0
    assert report["dropped"][0]["reason"] == "duplicate" and report["dropped"][0]["rows"] == 6
    assert "duplicate" in (tmp_path / "train" / "report.html").read_text()


def test_without_dedupe_repeats_stay_and_are_counted_in_the_report(tmp_path: Path, model: Path) -> None:
    rows, _ = with_repeats()
    counts = prepared(tmp_path, model, rows, "train").counts
    assert (counts["rows_kept"], counts["rows_dropped"]) == (1500, {})
    assert json.loads((tmp_path / "train" / "report.json").read_text())["duplicates"]["rows"] == 6


def test_dedupe_of_rows_without_repeats_changes_no_byte_of_data_and_ledger(tmp_path: Path, model: Path) -> None:
    for name, dedupe in (("a", False), ("b", True)):
        prepared(tmp_path, model, some_rows(30), name, dedupe=dedupe)
    files = [sorted(path.name for path in (tmp_path / name).iterdir()) for name in ("a", "b")]
    assert files[0] == files[1]
    for name in {*files[0]} - {"dataprep.yaml", "manifest.json", "report.json", "report.html"}:  # these name the file
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_examples_shown_in_the_report_are_those_of_their_rows(tmp_path: Path, model: Path) -> None:
    rows, _ = with_repeats()
    prepared(tmp_path, model, rows, "train", dedupe=True)
    shown = json.loads((tmp_path / "train" / "report.json").read_text())["examples"]
    ledger = pq.read_table(tmp_path / "train" / "ledger.parquet")
    assert [example["row"] for example in shown][:3] == [0, 2, 3] and len(shown) == 12
    for example in shown:
        (entry,) = ledger.filter(pc.equal(ledger["row"], example["row"])).to_pylist()
        assert (example["num_tokens"], example["num_trained_tokens"]) == (
            entry["num_tokens"],
            entry["num_trained_tokens"],
        )
