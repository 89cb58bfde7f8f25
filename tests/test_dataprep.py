"""`dataprep` through its command line: every source and writer, bad input, reruns, kills.

The three ways to start it run as processes of their own; the rest runs in this one, which saves 5 s of imports each.
"""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import s3fs
from conftest import byte_level_tokenizer
from datasets import Dataset, DatasetDict
from moto.moto_server.threaded_moto_server import ThreadedMotoServer
from prep_helpers import write_jsonl
from typer.testing import CliRunner, Result

from llm.cli import app
from llm.tokenizer import PromptTokenizer
from llm.training import dataprep
from llm.training.config import DataPrepConfig, DatasetConfig
from llm.training.config_file import load_config
from llm.training.prep import engine
from llm.training.prep.dataset import load_blocks
from llm.training.prep.manifest import read_manifest

ROOT = Path(__file__).resolve().parents[1]
WRITERS = {"save_to_disk": "train", "to_parquet": "train.parquet", "to_json": "train.jsonl", "to_csv": "train.csv"}
COLUMNS = [
    "input_ids", "attention_mask", "labels", "position_ids", "node_lengths", "node_parents", "full_text",
    "example_rows",
]  # fmt: skip
Rows = list[dict[str, Any]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a base model, of which preparation needs the tokenizer only."""
    folder = tmp_path_factory.mktemp("model")
    byte_level_tokenizer().save_pretrained(folder)
    return folder


def some_rows(number: int = 30) -> Rows:
    """Rows of several lengths, with as many contexts as 0 to 2."""
    return [
        {
            "input": f"What is {n}+{n}?" + " Mind the dog." * (n % 4),
            "response": f"{n + n}, NA \u00e9",
            "contexts": [f"{n} is a number"] * (n % 3),
        }
        for n in range(number)
    ]


def writer_config(target: str | Path, method: str = "save_to_disk") -> dict[str, Any]:
    key = "dataset_path" if method == "save_to_disk" else "path_or_buf"
    return {"method": method, "kwargs": {key: str(target)}}


class Job:
    """A config file in a folder, with rows, a model and a target; changed and run by the tests."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.folder = folder
        self.target = folder / "out" / "train"
        self.rows = write_jsonl(folder / "rows.jsonl", some_rows())
        self.settings: dict[str, Any] = {
            "source_config": str(self.rows),
            "base_model": str(model),
            "prompt_format_config": {"method": "ChatMLFormat"},
            "dataset_writer_config": writer_config(self.target),
            "chunksize": 128,
        }

    def write(self, **changes: Any) -> Path:
        """The YAML file (JSON is YAML); a change to None takes the key out."""
        found = {key: value for key, value in (self.settings | changes).items() if value is not None}
        path = self.folder / "dataprep.yaml"
        path.write_text(json.dumps(found, indent=1), encoding="utf-8")
        return path

    def run(self, *arguments: str, **changes: Any) -> Result:
        return CliRunner().invoke(app, ["dataprep", str(self.write(**changes)), *arguments])

    def done(self, *arguments: str, **changes: Any) -> Result:
        result = self.run(*arguments, **changes)
        assert result.exit_code == 0, result.output
        return result

    def refused(self, exit_code: int, *told: str, **changes: Any) -> None:
        """Runs, and checks that one message tells all of `told`, and that the target is as it was."""
        before = self.files()
        result = self.run(**changes)
        assert result.exit_code == exit_code, result.output
        assert [line[:6] for line in result.output.splitlines()].count("error:") == 1
        assert "Traceback" not in result.output
        for text in told:
            assert text in result.output
        assert self.files() == before
        assert self.leftovers() == []

    def files(self, target: Path | None = None) -> dict[str, bytes]:
        return files_of(target or self.target)

    def leftovers(self) -> list[Path]:
        return list(self.folder.rglob("*.preparing"))


@pytest.fixture
def job(tmp_path: Path, model: Path) -> Job:
    return Job(tmp_path, model)


def files_of(target: Path) -> dict[str, bytes]:
    """What was made at `target`, a folder or a file and what lies beside it, without the config that was given."""
    paths = target.rglob("*") if target.is_dir() else target.parent.glob(f"{target.name}*")
    found = {str(path).removeprefix(str(target)): path.read_bytes() for path in paths if path.is_file()}
    return {name: content for name, content in found.items() if not name.endswith("dataprep.yaml")}


def blocks_at(target: str | Path) -> Rows:
    blocks = load_blocks(DatasetConfig(method="load_path", kwargs={"path": str(target)}), key="train_dataset_config")
    assert blocks.column_names == COLUMNS
    found: Rows = blocks.to_list()
    return found


# --- the three ways to start it ---------------------------------------------------------------------------


def start(*command: str) -> subprocess.Popen[str]:
    """`command` from the repository root, what it says going to one pipe."""
    return subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def test_dataprep_started_in_three_ways_writes_the_same_bytes(job: Job) -> None:
    ways = {
        "file": [sys.executable, "llm/training/dataprep.py"],
        "module": [sys.executable, "-m", "llm.training.dataprep"],
        "script": [str(Path(sys.executable).with_name("llm-train")), "dataprep"],
    }
    path = str(job.write())
    targets = {name: job.folder / name for name in ways}
    key = "dataset_writer_config.kwargs.dataset_path"
    running = {name: start(*way, path, "--set", f"{key}={targets[name]}") for name, way in ways.items()}
    for name, process in running.items():
        output, _ = process.communicate(timeout=120)
        assert process.returncode == 0, f"{name}: {output}"
        assert "rows read" in output
    found = [job.files(target) for target in targets.values()]
    assert found[0] and found[0] == found[1] == found[2]


def test_first_start_with_a_model_ends_with_the_last_line_of_the_summary(
    job: Job, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLM_TRAIN_CACHE", str(job.folder / "empty"))  # so that transformers, torch, Triton are imported
    whole = shutil.copytree(model, job.folder / "whole")
    (whole / "config.json").write_text('{"model_type": "llama"}')
    config = str(job.write(base_model=str(whole)))
    output, _ = start(sys.executable, "llm/training/dataprep.py", config).communicate(timeout=120)
    assert output.splitlines()[-1].startswith("  report "), output


# --- sources and writers ----------------------------------------------------------------------------------


def test_dataprep_with_any_writer_loads_back_to_the_same_blocks(job: Job) -> None:
    found = {}
    for method, name in WRITERS.items():
        target = job.folder / name
        job.done(dataset_writer_config=writer_config(target, method))
        found[method] = blocks_at(target)
        assert read_manifest(str(target)).counts["rows_kept"] == 30
    assert len(found) == 4
    assert len(found["save_to_disk"]) > 3
    assert all(blocks == found["save_to_disk"] for blocks in found.values())
    assert job.leftovers() == []


@pytest.mark.parametrize("method", WRITERS)
def test_dataprep_run_again_writes_the_same_bytes(job: Job, method: str) -> None:
    target = job.folder / WRITERS[method]
    job.done(dataset_writer_config=writer_config(target, method), seed=5)
    before = job.files(target)
    assert len(before) >= 3
    for reuse_tokens in (True, False):
        job.done(dataset_writer_config=writer_config(target, method), seed=5, overwrite=True, reuse_tokens=reuse_tokens)
        assert job.files(target) == before


def test_dataprep_with_the_fast_tokenizer_writes_the_same_bytes(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    used = []
    use_fast = PromptTokenizer.use_fast
    monkeypatch.setattr(PromptTokenizer, "use_fast", lambda self: used.append(use_fast(self)))
    monkeypatch.setattr(engine, "_MANY_BYTES", 30)
    job.done(fast_tokenizer=False, reuse_tokens=False)
    expected = job.files()
    job.done(overwrite=True, reuse_tokens=False)
    assert used == [True] and job.files() == expected


def test_fast_tokenizer_is_opened_while_the_rows_are_loaded_and_only_for_many(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    begin_fast, load = PromptTokenizer.begin_fast, dataprep.load_rows
    monkeypatch.setattr(PromptTokenizer, "begin_fast", lambda self: (told.append("begun"), begin_fast(self))[1])
    monkeypatch.setattr(dataprep, "load_rows", lambda config: (told.append("loading"), load(config))[1])
    job.done(reuse_tokens=False)
    assert told == ["loading"]
    told.clear()
    monkeypatch.setattr(engine, "_MANY_BYTES", 30)
    job.done(overwrite=True, reuse_tokens=False)
    assert told == ["begun", "loading", "begun"]  # the second one waits for the first


def test_dataprep_of_rows_in_any_file_format_has_the_same_blocks(job: Job) -> None:
    rows = [{"input": row["input"], "response": row["response"]} for row in some_rows()]
    write_jsonl(job.folder / "plain.jsonl", rows)
    (job.folder / "plain.json").write_text(json.dumps(rows))
    pq.write_table(pa.Table.from_pylist(rows), job.folder / "plain.parquet")
    with (job.folder / "plain.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["input", "response"])
        writer.writeheader()
        writer.writerows(rows)
    Dataset.from_list(rows).save_to_disk(job.folder / "plain")
    names = ["plain.jsonl", "plain.json", "plain.parquet", "plain.csv", "plain"]
    found = []
    for name in names:
        job.done(source_config=str(job.folder / name), overwrite=True)
        found.append(blocks_at(job.target))
    assert len(found) == 5
    assert [blocks == found[0] for blocks in found] == [True] * 5
    assert sorted(row for block in found[0] for row in block["example_rows"]) == list(range(30))


def test_dataprep_of_csv_cells_that_look_like_numbers_or_nulls_keeps_them_as_text(job: Job) -> None:
    (job.folder / "cells.csv").write_text('input,response\n007,NA\n1.50,null\n"a,b",nan\n')
    job.done(source_config=str(job.folder / "cells.csv"), pack=False)
    texts = [block["full_text"] for block in blocks_at(job.target)]
    ends = [text.removeprefix("<|im_start|>user\nInput: ").removesuffix("<|im_end|>") for text in texts]
    between = "<|im_end|>\n<|im_start|>assistant\nResponse: "
    assert ends == [f"007{between}NA", f"1.50{between}null", f"a,b{between}nan"]


def test_dataprep_without_packing_and_padding_writes_each_row_as_it_is(job: Job) -> None:
    job.done(pack=False, pad_to_chunksize=False)
    blocks = blocks_at(job.target)
    assert [block["example_rows"] for block in blocks] == [[n] for n in range(30)]
    assert all(len(block["input_ids"]) == block["node_lengths"][0] for block in blocks)


def test_dataprep_with_dropped_rows_counts_them_and_names_the_first(job: Job) -> None:
    rows = some_rows()
    rows[3]["response"] = "  "
    rows[7]["input"] = "dog " * 300
    write_jsonl(job.rows, rows)
    result = job.done()
    counts = read_manifest(str(job.target)).counts
    assert counts["rows_dropped"] == {
        "empty_response": {"rows": 1, "first_rows": [3]},
        "too_long": {"rows": 1, "first_rows": [7]},
    }
    assert (counts["rows_read"], counts["rows_kept"]) == (30, 28)
    assert "dropped: too_long" in result.output
    ledger = pq.read_table(job.target / "ledger.parquet")
    assert ledger["block"].to_pylist().count(None) == 2
    blocks = blocks_at(job.target)
    for row, block in zip(ledger["row"].to_pylist(), ledger["block"].to_pylist(), strict=True):
        assert block is None or row in blocks[block]["example_rows"]


@pytest.mark.parametrize("method", WRITERS)
def test_dataprep_saves_its_config_beside_the_blocks_and_it_makes_them_again(
    job: Job, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ROWS_FOLDER", str(job.folder))
    target = job.folder / WRITERS[method]
    (job.folder / "shared.yaml").write_text("chunksize: 96\nseed: 3\n")
    given = {"include": "shared.yaml", "chunksize": None, "source_config": "${env:ROWS_FOLDER}/rows.jsonl"}
    job.done("--set", "seed=4", dataset_writer_config=writer_config(target, method), **given)
    before, made_by = (
        job.files(target),
        load_config(str(job.folder / "dataprep.yaml"), DataPrepConfig, overrides=["seed=4"]),
    )
    saved = target / "dataprep.yaml" if method == "save_to_disk" else target.with_name(f"{target.name}.dataprep.yaml")
    assert (
        'source_config:\n  method: load_path\n  kwargs:\n    path: "${env:ROWS_FOLDER}/rows.jsonl"' in saved.read_text()
    )
    assert load_config(str(saved), DataPrepConfig) == made_by
    assert read_manifest(str(target)).source["kwargs"] == {"path": "${env:ROWS_FOLDER}/rows.jsonl"}
    assert (made_by.chunksize, made_by.seed) == (96, 4)
    again = CliRunner().invoke(app, ["dataprep", str(saved), "--set", "overwrite=true"])
    assert again.exit_code == 0 and job.files(target) == before


# --- S3 ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    moto = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    moto.start()
    host, port = moto.get_host_and_port()
    yield f"http://{host}:{port}"
    moto.stop()


@pytest.fixture
def store(server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[s3fs.S3FileSystem]:
    """`s3://dataprep-tests`, there and empty; s3fs finds the server through the environment."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", server)
    s3fs.S3FileSystem.clear_instance_cache()
    found = s3fs.S3FileSystem()
    found.mkdir("dataprep-tests")
    yield found
    found.rm("dataprep-tests", recursive=True)
    s3fs.S3FileSystem.clear_instance_cache()


def files_on(store: s3fs.S3FileSystem, path: str) -> dict[str, bytes]:
    store.invalidate_cache()
    names = [name for name in store.find("dataprep-tests") if name.startswith(path)]
    return {name.removeprefix(path): store.cat_file(name) for name in names if not name.endswith("dataprep.yaml")}


@pytest.mark.parametrize("method", WRITERS)
def test_dataprep_to_s3_writes_the_bytes_of_a_local_run(job: Job, store: s3fs.S3FileSystem, method: str) -> None:
    local = job.folder / WRITERS[method]
    job.done(dataset_writer_config=writer_config(local, method))
    url = f"s3://dataprep-tests/{WRITERS[method]}"
    job.done(dataset_writer_config=writer_config(url, method))
    assert files_on(store, f"dataprep-tests/{WRITERS[method]}") == job.files(local)
    assert blocks_at(url) == blocks_at(local)
    assert read_manifest(url) == read_manifest(str(local))


def test_dataprep_to_s3_over_another_needs_overwrite_and_leaves_nothing_of_it(
    job: Job, store: s3fs.S3FileSystem
) -> None:
    writer = writer_config("s3://dataprep-tests/train")
    job.done(dataset_writer_config=writer)
    before = files_on(store, "dataprep-tests/train")
    job.refused(2, "s3://dataprep-tests/train", "overwrite: true", dataset_writer_config=writer)
    assert files_on(store, "dataprep-tests/train") == before
    job.done(dataset_writer_config=writer, overwrite=True, chunksize=256)
    job.done(chunksize=256)
    assert files_on(store, "dataprep-tests/train") == job.files() != before


def test_dataprep_to_s3_stopped_by_a_bad_row_leaves_the_old_one_whole(job: Job, store: s3fs.S3FileSystem) -> None:
    writer = writer_config("s3://dataprep-tests/train")
    job.done(dataset_writer_config=writer)
    before = files_on(store, "dataprep-tests/train")
    write_jsonl(job.rows, some_rows(1500) + [{"input": "x", "response": None, "contexts": []}])
    job.refused(3, "row 1500", dataset_writer_config=writer, overwrite=True)
    assert files_on(store, "dataprep-tests/train") == before


def test_dataprep_of_rows_on_s3_has_the_blocks_of_a_local_run(job: Job, store: s3fs.S3FileSystem) -> None:
    job.done()
    expected = blocks_at(job.target)
    Dataset.from_list(some_rows()).save_to_disk("s3://dataprep-tests/source")
    source = {"method": "load_from_disk", "kwargs": {"dataset_path": "s3://dataprep-tests/source"}}
    job.done(source_config=source, overwrite=True)
    assert blocks_at(job.target) == expected
    job.done(source_config="s3://dataprep-tests/source", overwrite=True)
    assert blocks_at(job.target) == expected


# --- bad input --------------------------------------------------------------------------------------------

BAD_CONFIGS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "missing_key": ({"base_model": None}, ["dataprep.yaml", "base_model"]),
    "misspelt_key": ({"chunk_size": 5}, ["dataprep.yaml", "chunk_size", "Did you mean `chunksize`?"]),
    "text_for_a_number": ({"chunksize": "many"}, ["dataprep.yaml", "chunksize"]),
    "unknown_source_method": (
        {"source_config": {"method": "load_datset", "kwargs": {"path": "rows.jsonl"}}},
        ["source_config.method", "load_datset", "Did you mean `load_dataset`?"],
    ),
    "unknown_prompt": (
        {"prompt_config": {"method": "DefaultPromt"}},
        ["prompt_config", "DefaultPromt", "Did you mean `DefaultPrompt`?"],
    ),
    "unknown_format": (
        {"prompt_format_config": {"method": "ChatMLFormatt"}},
        ["prompt_format_config", "ChatMLFormatt", "Did you mean `ChatMLFormat`?"],
    ),
    "unknown_writer": (
        {"dataset_writer_config": {"method": "to_parket", "kwargs": {"path_or_buf": "/nowhere/x.parquet"}}},
        ["dataset_writer_config.method", "to_parket", "Did you mean `to_parquet`?"],
    ),
    "unknown_writer_argument": (
        {"dataset_writer_config": {"method": "save_to_disk", "kwargs": {"dataset_path": "x", "max_shards": 3}}},
        ["dataset_writer_config", "max_shards"],
    ),
    "writer_without_a_path": (
        {"dataset_writer_config": {"method": "to_parquet"}},
        ["dataset_writer_config.kwargs.path_or_buf"],
    ),
    "format_of_another_tokenizer": (
        {"prompt_format_config": {"method": "Llama3Format"}},
        ["Llama3Format", "<|begin_of_text|>", "prompt_format_config"],
    ),
    "no_room": ({"chunksize": 8}, ["chunksize", "a block holds 8"]),
}


@pytest.mark.parametrize("case", BAD_CONFIGS)
def test_dataprep_with_a_bad_config_is_refused_by_key(job: Job, case: str) -> None:
    changes, told = BAD_CONFIGS[case]
    job.refused(2, *told, **changes)


def test_dataprep_of_a_missing_file_is_refused_with_the_nearest_name(job: Job) -> None:
    job.refused(
        2, "source_config", "row.jsonl", "Did you mean `rows.jsonl`?", source_config=str(job.folder / "row.jsonl")
    )


def test_dataprep_of_a_missing_tokenizer_folder_is_refused_by_its_path(job: Job) -> None:
    job.refused(2, "base_model", str(job.folder / "no_model"), base_model=str(job.folder / "no_model"))


def test_dataprep_of_a_folder_without_tokenizer_is_refused_by_its_path(job: Job) -> None:
    (job.folder / "empty_model").mkdir()
    job.refused(2, "base_model", str(job.folder / "empty_model"), base_model=str(job.folder / "empty_model"))


def test_dataprep_of_an_unknown_split_is_refused_by_name(job: Job) -> None:
    kwargs = {"path": "json", "data_files": str(job.rows), "split": "tset"}
    job.refused(2, "source_config", "tset", source_config={"method": "load_dataset", "kwargs": kwargs})


def test_dataprep_of_several_splits_is_refused_with_the_path_of_one(job: Job) -> None:
    rows = Dataset.from_list(some_rows(3))
    DatasetDict({"train": rows, "test": rows}).save_to_disk(job.folder / "both")
    source = {"method": "load_from_disk", "kwargs": {"dataset_path": str(job.folder / "both")}}
    job.refused(2, "source_config", "`train`, `test`", "both/train", source_config=source)


@pytest.mark.parametrize("method", WRITERS)
def test_dataprep_over_an_existing_target_is_refused_without_overwrite(job: Job, method: str) -> None:
    job.target = job.folder / WRITERS[method]
    job.done(dataset_writer_config=writer_config(job.target, method))
    told = ["dataset_writer_config", str(job.target), "overwrite: true"]
    job.refused(2, *told, dataset_writer_config=writer_config(job.target, method), chunksize=256)


def test_dataprep_over_a_folder_of_something_else_is_refused_even_with_overwrite(job: Job) -> None:
    job.target.mkdir(parents=True)
    (job.target / "thesis.txt").write_text("years of work")
    job.refused(2, "something else than a data set", overwrite=True)


def test_dataprep_over_its_own_source_is_refused(job: Job) -> None:
    Dataset.from_list(some_rows(3)).save_to_disk(job.target)
    job.refused(2, "is the source itself", source_config=str(job.target), overwrite=True)


def with_row(number: int, **changes: Any) -> Rows:
    rows = some_rows()
    rows[number] |= changes
    return rows


BAD_ROWS: dict[str, tuple[Rows, list[str]]] = {
    "missing_column": ([{"input": "a", "respnse": "b"}], ["no column `response`", "Did you mean `respnse`?"]),
    "null_input": (with_row(4, input=None), ["row 4", "`input` is null"]),
    "null_response": (with_row(29, response=None), ["row 29", "`response` is null"]),
    "null_context": (with_row(2, contexts=["a", None]), ["row 2", "`contexts[1]` is null"]),
    "all_null": ([{"input": "a", "response": None}] * 2, ["row 0", "`response` is null"]),
    "number_as_text": ([{"input": "a", "response": 7}], ["`response` must be text", "int64", "row 0 holds 7"]),
    "contexts_of_text": (
        [{"input": "a", "response": "b", "contexts": "one"}],
        ["`contexts` must be a list of texts", "row 0 holds 'one'"],
    ),
    "contexts_of_numbers": (
        [{"input": "a", "response": "b", "contexts": [1]}],
        ["`contexts` must be a list of texts", "row 0 holds [1]"],
    ),
    "all_dropped": (
        [{"input": "a", "response": " "}] * 3,
        ["every one of the 3 rows was dropped", "empty_response, 3"],
    ),
    "empty": ([], ["there is not one row"]),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_dataprep_of_bad_rows_is_refused_by_row(job: Job, case: str) -> None:
    rows, told = BAD_ROWS[case]
    write_jsonl(job.rows, rows)
    job.refused(3, "source_config", *told)


def test_dataprep_of_a_table_without_rows_is_refused(job: Job) -> None:
    (job.folder / "none.csv").write_text("input,response\n")
    job.refused(3, "source_config", "there is not one row", source_config=str(job.folder / "none.csv"))


def test_dataprep_of_a_broken_json_line_is_refused_by_file(job: Job) -> None:
    job.rows.write_text('{"input": "a", "response": "b"}\n{"input": "a", "resp\n')
    job.refused(3, "source_config", "rows.jsonl")


def test_dataprep_of_a_row_too_long_with_error_is_refused_by_row(job: Job) -> None:
    write_jsonl(job.rows, with_row(6, input="dog " * 300))
    job.refused(3, "source_config", "row 6", "(chunksize)", on_too_long="error")


@pytest.mark.parametrize("method", WRITERS)
def test_dataprep_stopped_by_row_1500_leaves_the_old_target_whole(job: Job, method: str) -> None:
    job.target = job.folder / WRITERS[method]
    writer = writer_config(job.target, method)
    job.done(dataset_writer_config=writer)
    rows = some_rows(2000)
    rows[1500]["response"] = None
    write_jsonl(job.rows, rows)
    job.refused(3, "row 1500", "`response` is null", dataset_writer_config=writer, overwrite=True)
    assert len(job.files()) >= 3


# --- kills ------------------------------------------------------------------------------------------------

# Imports all, then forks a preparation for each config file that it is told of: so that a kill hits no imports.
FORKING = """
import os
import sys
import json
from llm.training.config import DataPrepConfig
from llm.training.config_file import load_config
from llm.training.dataprep import prepare
import datasets, s3fs, torch, transformers.models.auto.tokenization_auto, transformers.tokenization_utils_tokenizers
for line in iter(sys.stdin.readline, ""):
    path, environment = json.loads(line)
    pid = os.fork()
    if not pid:
        try:
            os.environ.update(environment)
            prepare(load_config(path, DataPrepConfig))
            os._exit(0)
        finally:
            os._exit(1)
    print(pid, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


class Forks:
    """Preparations in processes of their own, one at a time."""

    def __init__(self) -> None:
        command = [sys.executable, "-c", FORKING]
        self.process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def run(self, config: Path, *, kill_after_seconds: float | None = None) -> int:
        """Prepares in the environment of now, or is killed; gives the exit code, -9 for killed."""
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(json.dumps([str(config), dict(os.environ)]) + "\n")
        self.process.stdin.flush()
        pid = int(self.process.stdout.readline())
        if kill_after_seconds is not None:
            time.sleep(kill_after_seconds)
            with suppress(ProcessLookupError):  # done already
                os.kill(pid, signal.SIGKILL)
        return int(self.process.stdout.readline())


@pytest.fixture(scope="module")
def forks() -> Iterator[Forks]:
    found = Forks()
    yield found
    found.process.communicate(timeout=60)  # closes its input, at which it ends
    assert found.process.returncode == 0


def test_dataprep_with_one_and_two_threads_writes_the_same_bytes(job: Job, forks: Forks) -> None:
    write_jsonl(job.rows, some_rows(1200))
    found = []
    for count in (1, 2):
        target = job.folder / f"of_{count}" / "train"
        assert (
            forks.run(job.write(num_proc=count, reuse_tokens=False, dataset_writer_config=writer_config(target))) == 0
        )
        found.append(job.files(target))
        assert read_manifest(str(target)).counts["rows_kept"] == 1200
    assert found[0] == found[1]


@pytest.mark.parametrize("method, num_moves", [("save_to_disk", 2), ("to_parquet", 12)])
def test_dataprep_killed_between_any_two_moves_is_put_right_by_the_next_run(
    job: Job, monkeypatch: pytest.MonkeyPatch, method: str, num_moves: int
) -> None:
    """The folder as it was before each move is what a kill there leaves."""
    job.target = job.folder / "out" / WRITERS[method]
    job.settings |= {"dataset_writer_config": writer_config(job.target, method), "overwrite": True}
    job.done()
    before = job.files()
    left: list[Path] = []
    rename = Path.rename

    def copying_rename(path: Path, to: Path) -> Path:
        left.append(shutil.copytree(job.target.parent, job.folder / f"left_{len(left)}"))
        return rename(path, to)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", copying_rename)
        job.done(chunksize=256)
    after = job.files()
    assert len(left) == num_moves
    write_jsonl(job.rows, [{"input": "a", "response": None}])
    for folder in left:
        shutil.rmtree(job.target.parent)
        folder.rename(job.target.parent)
        assert job.run().exit_code == 3  # puts the old one back, then finds the bad row
        assert job.files() == before != after
        assert list(job.target.parent.glob("*.preparing")) == []


@pytest.mark.parametrize("number", range(12))
def test_dataprep_stopped_by_ctrl_c_between_any_two_moves_leaves_the_old_target_whole(
    job: Job, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    job.target = job.folder / WRITERS["to_parquet"]
    job.settings["dataset_writer_config"] = writer_config(job.target, "to_parquet")
    job.done()
    before = job.files()
    rename, calls = Path.rename, iter(range(100))

    def stopped_rename(path: Path, to: Path) -> Path:
        if next(calls) == number:
            raise KeyboardInterrupt
        return rename(path, to)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", stopped_rename)
        assert job.run(overwrite=True, chunksize=256).exit_code == 130
    assert job.files() == before
    assert job.leftovers() == []
