"""Several sources in one data set: which rows are seen how often, and that errors and the ledger name the source."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from prep_helpers import config_file, make_config, settings, some_rows, write_jsonl
from typer.testing import CliRunner

from llm.cli import app
from llm.errors import ConfigError, DataError
from llm.training.config import DataPrepConfig, DatasetConfig
from llm.training.config_file import load_config
from llm.training.dataprep import prepare
from llm.training.prep.dataset import load_blocks
from llm.training.prep.manifest import Manifest, read_manifest

pytest_plugins = ("prep_fixtures",)

Rows = list[dict[str, Any]]
FIRST = some_rows(60)
SECOND = [{"question": f"Why {n}? " + "dog " * (n % 9), "answer": f"Because of {n}. " + "fox " * 9} for n in range(30)]
COLUMNS = {"input": "question", "response": "answer"}


def data(folder: Path, model: Path, name: str = "train", *, weights: tuple[Any, Any] = (1, 1), **changes: Any) -> Any:
    """Two sources: 60 rows as ours, and 30 longer ones with other columns."""
    write_jsonl(folder / "first.jsonl", FIRST)
    write_jsonl(folder / "second.jsonl", SECOND)
    sources = [
        {"source_config": str(folder / "first.jsonl"), "weight": weights[0]},
        {"source_config": str(folder / "second.jsonl"), "columns": COLUMNS, "weight": weights[1]},
    ]
    found = settings("", model, folder / name, sources=sources, overwrite=True)
    del found["source_config"]
    return found | changes


def mixed(folder: Path, model: Path, name: str = "train", **changes: Any) -> Manifest:
    return prepare(make_config(folder, data(folder, model, name, **changes)))


def blocks_at(path: Path) -> Rows:
    found: Rows = load_blocks(DatasetConfig.model_validate(str(path)), key="inspect").to_list()
    return found


def seen(path: Path) -> Counter[int]:
    """How often each row is in the blocks."""
    return Counter(row for block in blocks_at(path) for row in block["example_rows"])


def ledger_at(path: Path) -> Rows:
    found: Rows = pq.read_table(path / "ledger.parquet").to_pylist()
    return found


# --- which rows ------------------------------------------------------------------------------------------------------


def test_sources_without_weights_are_the_data_set_of_all_their_rows(tmp_path: Path, model: Path) -> None:
    manifest = mixed(tmp_path, model)
    rows = [*FIRST, *({"input": row["question"], "response": row["answer"], "contexts": []} for row in SECOND)]
    source = write_jsonl(tmp_path / "all.jsonl", rows)
    prepare(make_config(tmp_path, settings(source, model, tmp_path / "all")))
    assert blocks_at(tmp_path / "train") == blocks_at(tmp_path / "all")
    assert manifest.counts["rows_kept"] == manifest.counts["rows_read"] == 90
    assert [(row["source"], row["source_row"], row["draw"]) for row in ledger_at(tmp_path / "train")] == [
        *(("sources[0]", n, 0) for n in range(60)),
        *(("sources[1]", n, 0) for n in range(30)),
    ]


@pytest.mark.parametrize("changes", [{}, {"share_prefixes": True, "seed": 4}])
def test_weight_is_how_often_rows_are_seen(changes: dict[str, Any], tmp_path: Path, model: Path) -> None:
    counts = mixed(tmp_path, model, weights=(0.25, 2.5), **changes).counts
    found = seen(tmp_path / "train")
    assert Counter(found[row] for row in range(60)) == {0: 45, 1: 15}
    assert Counter(found[row] for row in range(60, 90)) == {2: 15, 3: 15}
    assert counts["rows_dropped"]["not_drawn"]["rows"] == 45
    assert (counts["rows_read"], counts["rows_kept"], counts["rows_repeated"]) == (90, 15 + 75, 45)
    ledger = ledger_at(tmp_path / "train")
    lines = Counter(row["row"] for row in ledger if row["outcome"] == "kept")
    assert lines == found and len(ledger) == 135
    assert [row["draw"] for row in ledger if row["row"] == 60] == list(range(found[60]))
    blocks = blocks_at(tmp_path / "train")
    for line in ledger:
        assert line["block"] is None or line["row"] in blocks[line["block"]]["example_rows"]
    whole = Counter((line["row"], line["block"]) for line in ledger if line["block"] is not None)
    assert whole == Counter((row, n) for n, block in enumerate(blocks) for row in block["example_rows"])


def test_rows_that_are_repeated_are_the_same_tokens_and_no_duplicates(tmp_path: Path, model: Path) -> None:
    mixed(tmp_path, model, "once", weights=(1, 1), pack=False)
    mixed(tmp_path, model, "twice", weights=(2, 2), pack=False)
    once, twice = blocks_at(tmp_path / "once"), blocks_at(tmp_path / "twice")
    assert twice == [block for block in once for _ in range(2)]
    report = json.loads((tmp_path / "twice" / "report.json").read_text())
    assert report["duplicates"]["rows"] == 0
    assert len({row["row"] for row in report["longest"]}) == 10
    tokens = sum(line["num_tokens"] for line in ledger_at(tmp_path / "twice") if line["row"] < 60)
    assert report["counts"]["sources"][0] == {"source": "sources[0]", "rows": 60, "rows_kept": 120, "tokens": tokens}


def test_rest_is_drawn_with_the_seed(tmp_path: Path, model: Path) -> None:
    found = []
    for name, keys in (("a", {}), ("b", {"seed": 0}), ("c", {"seed": 1})):
        mixed(tmp_path, model, name, weights=(0.5, 0.5), **keys)
        found.append(seen(tmp_path / name))
    assert found[0] == found[1] != found[2]
    assert [sum(rows.values()) for rows in found] == [45, 45, 45]


@pytest.mark.parametrize("mix_by", ["rows", "tokens"])
@pytest.mark.parametrize("weights", [(1, 1), (3, 1), (0.1, 0.3)])
def test_weights_are_shares_of_rows_or_tokens(
    mix_by: str, weights: tuple[float, float], tmp_path: Path, model: Path
) -> None:
    plain = mixed(tmp_path, model).counts
    counts = mixed(tmp_path, model, mix_by=mix_by, weights=weights).counts
    name = "rows_kept" if mix_by == "rows" else "tokens"
    first, second = (source[name] for source in counts["sources"])
    largest = 1 if mix_by == "rows" else max(line["num_tokens"] for line in ledger_at(tmp_path / "train"))
    assert abs(first + second - plain[name]) <= 2 * largest
    assert abs(first - plain[name] * weights[0] / sum(weights)) <= largest


def test_held_out_rows_of_a_mixture_are_in_no_training_block_however_often_drawn(tmp_path: Path, model: Path) -> None:
    counts = mixed(tmp_path, model, weights=(0.5, 3), eval_fraction=0.3, dedupe=True).counts
    training, held_out = seen(tmp_path / "train"), seen(tmp_path / "train_eval")
    assert not {*training} & {*held_out} and {*held_out.values()} == {1, 3}
    assert counts["rows_held_out"] == sum(held_out.values())
    assert counts["rows_read"] == 90
    dropped = counts["rows_dropped"]["not_drawn"]["rows"]
    assert 90 + counts["rows_repeated"] == sum(training.values()) + sum(held_out.values()) + dropped
    assert read_manifest(str(tmp_path / "train_eval")).counts["rows_kept"] == sum(held_out.values())


def test_saved_config_of_sources_makes_the_same_data_again(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ROWS_FOLDER", str(tmp_path))
    given = data(tmp_path, model, weights=(0.5, 2))
    given["sources"][0]["source_config"] = "${env:ROWS_FOLDER}/first.jsonl"
    manifest = prepare(make_config(tmp_path, given))
    assert manifest.source["sources"][0]["source_config"]["kwargs"] == {"path": "${env:ROWS_FOLDER}/first.jsonl"}
    before = blocks_at(tmp_path / "train")
    saved = load_config(str(tmp_path / "train" / "dataprep.yaml"), DataPrepConfig)
    assert prepare(saved) == manifest and blocks_at(tmp_path / "train") == before


def test_sources_of_several_formats_get_the_same_prompt(tmp_path: Path, model: Path) -> None:
    talk = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "there"}]
    source = write_jsonl(tmp_path / "talk.jsonl", [{"messages": talk}] * 3)
    given = data(tmp_path, model, pack=False)
    given["sources"][1] = {"source_config": str(source), "row_format": "messages"}
    assert prepare(make_config(tmp_path, given)).prompt["method"] == "Prompt"
    texts = [block["full_text"] for block in blocks_at(tmp_path / "train")]
    assert texts[0].startswith("<|im_start|>user\nWhat is 0 + 0?") and texts[60].startswith("<|im_start|>user\nhi<")


def test_inspect_shows_rows_of_all_sources(tmp_path: Path, model: Path) -> None:
    path = config_file(tmp_path, data(tmp_path, model, chunksize=200))
    result = CliRunner().invoke(app, ["inspect", str(path), "--first", "59", "--rows", "2"])
    assert result.exit_code == 0, result.output
    assert "Row 59: " in result.stdout and "Row 60: " in result.stdout and "rows 59 to 60 of 90" in result.stdout


# --- what is wrong ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "changes", "text"),
    [
        ({"question": None}, {}, r"^sources\[1\].source_config: row 7 \(counted from 0\): `question` is null"),
        (
            {"answer": "dog " * 900},
            {"on_too_long": "error"},
            r"^sources\[1\].source_config: row 7 \(counted from 0\): 9",
        ),
        ({"answer": 7}, {}, r"^sources\[1\].source_config: column `answer` must be text"),
    ],
)
def test_bad_row_names_its_source_and_its_number_there(
    row: dict[str, Any], changes: dict[str, Any], text: str, tmp_path: Path, model: Path
) -> None:
    given = data(tmp_path, model, **changes)
    rows = [{**one, **row} if n == 7 or row == {"answer": 7} else one for n, one in enumerate(SECOND)]
    write_jsonl(tmp_path / "second.jsonl", rows)
    with pytest.raises(DataError, match=text):
        prepare(make_config(tmp_path, given))


def test_too_long_row_of_a_single_source_in_the_list_names_it(tmp_path: Path, model: Path) -> None:
    given = data(tmp_path, model, on_too_long="error")
    write_jsonl(tmp_path / "first.jsonl", [*FIRST, {"input": "dog " * 900, "response": "x", "contexts": []}])
    given["sources"] = given["sources"][:1]
    with pytest.raises(DataError, match=r"^sources\[0\].source_config: row 60 \(counted from 0\): 9"):
        prepare(make_config(tmp_path, given))


def test_bad_row_of_a_source_is_dropped_and_found_in_the_ledger(tmp_path: Path, model: Path) -> None:
    given = data(tmp_path, model, on_bad_row="drop", weights=(1, 2))
    write_jsonl(
        tmp_path / "second.jsonl", [{**row, **({"answer": None} if n == 7 else {})} for n, row in enumerate(SECOND)]
    )
    prepare(make_config(tmp_path, given))
    (line,) = [line for line in ledger_at(tmp_path / "train") if line["outcome"] == "dropped"]
    assert (line["source"], line["source_row"], line["row"], line["reason"]) == ("sources[1]", 7, 67, "bad_row")
    assert line["draw"] is None


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "both": ({"source_config": "rows.jsonl"}, "`sources` and `source_config` exclude each other"),
    "neither": ({"sources": []}, "`source_config` is missing. The rows: columns `input`"),
    "columns": ({"columns": {"input": "question"}}, "`columns` is said of each source: move it into the list"),
    "format": ({"row_format": "dolly"}, "`row_format` is said of each source"),
    "mix_by": (
        {"sources": [], "source_config": "a", "mix_by": "rows"},
        "`mix_by` says how `sources` are mixed, and there",
    ),
    "key": ({"sources": [{"source_config": "a", "wieght": 1}]}, "has no key `wieght`. Did you mean `weight`?"),
    "weight": ({"sources": [{"source_config": "a", "weight": 0}]}, "`weight` must be greater than 0.0, not 0."),
    "no source": ({"sources": [{"weight": 1}]}, "`source_config` is missing. The rows, as the key"),
    "file": ({"sources": [{"source_config": "/none.jsonl"}]}, "sources[0].source_config: there is no file"),
    "code": (
        {"sources": [{"source_config": {"method": "os::getcwd"}}]},
        "`os::getcwd` is code of the package `os`, which `allow_code` does not name",
    ),
    "remote code": (
        {"sources": [{"source_config": {"method": "load_dataset", "kwargs": {"trust_remote_code": True}}}]},
        "trust_remote_code",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_sources_that_cannot_be_are_config_errors(name: str, tmp_path: Path, model: Path) -> None:
    changes, text = BAD[name]
    with pytest.raises(ConfigError) as caught:
        prepare(make_config(tmp_path, data(tmp_path, model, **changes)))
    assert text in str(caught.value)


def test_target_that_is_one_of_the_sources_is_refused(tmp_path: Path, model: Path) -> None:
    given = data(tmp_path, model, "second.jsonl")
    with pytest.raises(ConfigError, match=r"second.jsonl` is the source itself"):
        prepare(make_config(tmp_path, given))


def test_share_of_a_source_without_rows_is_an_error(tmp_path: Path, model: Path) -> None:
    given = data(tmp_path, model, mix_by="rows")
    write_jsonl(tmp_path / "second.jsonl", [{**row, "answer": " "} for row in SECOND])
    with pytest.raises(DataError, match=r"sources\[1\]: every row was dropped, so it can have no share"):
        prepare(make_config(tmp_path, given))
    with pytest.raises(DataError, match="weights are so small that no row is drawn"):
        mixed(tmp_path, model, weights=(0.001, 0.001))
