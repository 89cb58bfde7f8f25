"""Stage 1: rows from every kind of source, and what is said of those that cannot be used."""

import csv
import functools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict
from prep_helpers import some_rows, write_jsonl

from llm.errors import ConfigError, DataError
from llm.training.config import DatasetConfig
from llm.training.prep.dataset import check_source, file_size_bytes, load_blocks, load_dataset_config
from llm.training.prep.rows import Row, iterate_rows, load_source

pytest_plugins = ("prep_fixtures",)

ROWS = some_rows(5)


def method(name: str, **kwargs: Any) -> DatasetConfig:
    return DatasetConfig(method=name, kwargs=kwargs)


def path_config(path: Path | str) -> DatasetConfig:
    return DatasetConfig.model_validate(str(path))


def rows_of(config: DatasetConfig) -> list[Row]:
    return [row for batch in iterate_rows(load_source(config), batch_size=2) for row in batch]


def expected(rows: list[dict[str, Any]]) -> list[Row]:
    return [
        Row.of(number=n, input=row["input"], response=row["response"], contexts=tuple(row.get("contexts") or ()))
        for n, row in enumerate(rows)
    ]


def own_rows() -> Dataset:
    """What `module::name` in a config calls."""
    return Dataset.from_list(ROWS)


def no_rows() -> list[int]:
    return [1]


def file_of(folder: Path, suffix: str) -> Path:
    path = folder / f"rows{suffix}"
    if suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(ROWS), path)
    elif suffix == ".json":
        path.write_text(json.dumps(ROWS))
    else:
        write_jsonl(path, ROWS)
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
def test_file_named_in_any_way_gives_the_same_rows(tmp_path: Path, suffix: str) -> None:
    path = file_of(tmp_path, suffix)
    builder = suffix[1:].removesuffix("l")
    configs = [
        path_config(path),
        method("load_dataset", path=str(path)),
        method("load_dataset", path=builder, data_files=str(path), split="train"),
        method("load_dataset", path=builder, data_files=str(path)),
    ]
    for config in configs:
        check_source(config)
        assert rows_of(config) == expected(ROWS)


def test_file_with_the_signs_of_a_pattern_in_its_name_is_found(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows [1]*.jsonl", ROWS)
    assert rows_of(path_config(path)) == expected(ROWS)


def test_csv_cells_are_text_as_they_stand(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    cells = [["input", "response"], ["1", "NA"], ["What?", "null"], ["a, b", "7.0"], ["x\ny", "é"]]
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(cells)
    wanted = [{"input": a, "response": b} for a, b in cells[1:]]
    assert rows_of(path_config(path)) == expected(wanted)


def test_folder_of_save_to_disk_named_in_any_way_gives_the_same_rows(tmp_path: Path) -> None:
    folder = str(tmp_path / "saved")
    own_rows().save_to_disk(folder)
    for config in (path_config(folder), method("load_from_disk", dataset_path=folder)):
        check_source(config)
        assert rows_of(config) == expected(ROWS)


def test_one_split_of_a_saved_dict_is_found_as_the_error_says(tmp_path: Path) -> None:
    folder = str(tmp_path / "saved")
    DatasetDict(train=own_rows(), test=own_rows().select([0])).save_to_disk(folder)
    with pytest.raises(ConfigError, match="`train`, `test`: name one, e.g. `dataset_path: .*saved/train`"):
        load_source(method("load_from_disk", dataset_path=folder))
    assert rows_of(method("load_from_disk", dataset_path=f"{folder}/train")) == expected(ROWS)
    assert len(rows_of(method("load_path", path=folder, split="test"))) == 1


@pytest.mark.parametrize("is_named_by_builder", [True, False])
@pytest.mark.parametrize("given", [{}, {"batch_size": 7}])
def test_parquet_is_read_piece_by_piece_unless_the_user_says_otherwise(
    is_named_by_builder: bool, given: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = str(tmp_path / "rows.parquet")
    Dataset.from_list(some_rows(3)).to_parquet(path)
    named = {"path": "parquet", "data_files": path, "split": "train"} if is_named_by_builder else {"path": path}
    asked: dict[str, Any] = {}
    load_dataset = datasets.load_dataset

    @functools.wraps(load_dataset)
    def noted(*args: Any, **kwargs: Any) -> Any:
        asked.update(kwargs)
        return load_dataset(*args, **kwargs)

    monkeypatch.setattr(datasets, "load_dataset", noted)
    rows = load_dataset_config(DatasetConfig(method="load_dataset", kwargs=named | given), key="source_config")
    assert len(rows) == 3 and asked["batch_size"] == given.get("batch_size", 1000)
    assert not asked["fragment_scan_options"].pre_buffer


def test_own_function_gives_the_rows() -> None:
    assert rows_of(method("test_dataset::own_rows")) == expected(ROWS)


def test_rows_on_s3_are_those_on_disk(tmp_path: Path, s3: str) -> None:
    import fsspec

    own_rows().save_to_disk("s3://prep-tests/source/saved")
    fsspec.filesystem("s3").put_file(str(file_of(tmp_path, ".jsonl")), "prep-tests/source/rows.jsonl")
    for config in (
        method("load_from_disk", dataset_path="s3://prep-tests/source/saved"),
        path_config("s3://prep-tests/source/saved"),
        path_config("s3://prep-tests/source/rows.jsonl"),
    ):
        assert rows_of(config) == expected(ROWS)


def test_missing_contexts_empty_and_null_ones_are_none_at_all(tmp_path: Path) -> None:
    row = {"input": "a", "response": "b"}
    with_some = [row | {"contexts": ["c"]}, row | {"contexts": []}, row | {"contexts": None}]
    cases = (with_some, [row], [row | {"contexts": []}], [row | {"contexts": None}])
    for number, rows in enumerate(cases):
        assert rows_of(path_config(write_jsonl(tmp_path / f"rows{number}.jsonl", rows))) == expected(rows)


def test_columns_that_are_not_asked_for_do_no_harm(tmp_path: Path) -> None:
    rows = [row | {"id": 7, "meta": {"a": None}} for row in ROWS]
    assert rows_of(path_config(write_jsonl(tmp_path / "rows.jsonl", rows))) == expected(ROWS)


# --- mistakes --------------------------------------------------------------------------------------------------------

GOOD = {"input": "a", "response": "b"}
BAD_ROWS: dict[str, tuple[list[dict[str, Any]], str]] = {
    "missing column": (
        [{"inputs": "a", "response": "b"}],
        "no column `input`; they have `inputs`, `response`. Did you",
    ),
    "missing response": (
        [{"input": "a", "answer": "b"}],
        "no column `response`; they have `input`, `answer`. .*columns: {response: answer}",
    ),
    "null input": ([GOOD, {"input": None, "response": "b"}], r"row 1 \(counted from 0\): `input` is null"),
    "null response": ([GOOD, GOOD, {"input": "a", "response": None}], r"row 2 .*: `response` is null"),
    "all null": ([{"input": "a", "response": None}], r"row 0 .*: `response` is null"),
    "key left out": ([GOOD, {"input": "a"}], r"row 1 .*: `response` is null, or not there"),
    "number": ([{"input": 5, "response": "b"}], "column `input` must be text, it is of type int64: row 0 holds 5"),
    "boolean": ([{"input": "a", "response": True}], "column `response` must be text, .*: row 0 holds True"),
    "mapping": ([{"input": {"q": "a"}, "response": "b"}], "column `input` must be text, .*: row 0 holds {'q': 'a'}"),
    "contexts text": ([GOOD | {"contexts": "abc"}], "column `contexts` must be a list of texts .*: row 0 holds 'abc'"),
    "contexts numbers": (
        [GOOD | {"contexts": [1]}],
        r"column `contexts` must be a list of texts .*: row 0 holds \[1\]",
    ),
    "contexts nested": ([GOOD | {"contexts": [["a"]]}], "column `contexts` must be a list of texts"),
    "contexts null": (
        [GOOD | {"contexts": ["x"]}, GOOD | {"contexts": ["x", None]}],
        r"row 1 .*`contexts\[1\]` is null",
    ),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_row_that_cannot_be_used_is_a_data_error_that_names_it(tmp_path: Path, name: str) -> None:
    rows, text = BAD_ROWS[name]
    with pytest.raises(DataError, match=f"source_config: .*{text}"):
        rows_of(path_config(write_jsonl(tmp_path / "rows.jsonl", rows)))


def test_mixed_text_and_numbers_are_a_data_error(tmp_path: Path) -> None:
    rows = [GOOD, GOOD, {"input": 5, "response": "b"}]
    with pytest.raises(DataError, match="input"):
        rows_of(path_config(write_jsonl(tmp_path / "rows.jsonl", rows)))


@pytest.mark.parametrize(
    "content", ['{"input": "a", "response": "b"}\n{"input": "a", "resp\n', "no json at all", '[{"a": 1},']
)
def test_broken_json_is_a_data_error_that_names_the_file(tmp_path: Path, content: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(content)
    with pytest.raises(DataError, match=r"source_config: .*rows\.jsonl"):
        load_source(path_config(path))


@pytest.mark.parametrize("content", ["", "\n"])
def test_empty_file_is_a_data_error(tmp_path: Path, content: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(content)
    with pytest.raises(DataError, match="source_config: "):
        load_source(path_config(path))


def test_data_set_without_rows_is_a_data_error(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"input": pa.array([], pa.string()), "response": pa.array([], pa.string())}), path)
    with pytest.raises(DataError, match="source_config: .*not one row"):
        load_source(path_config(path))


@pytest.mark.parametrize(
    "config",
    [
        path_config("rows.jsonl"),
        path_config("no_such_folder"),
        method("load_dataset", path="rows.jsonl"),
        method("load_dataset", path="json", data_files="rows.jsonl"),
        method("load_from_disk", dataset_path="no_such_folder"),
    ],
)
def test_missing_file_is_a_config_error_before_anything_is_read(
    config: DatasetConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "row.jsonl", ROWS)
    with pytest.raises(ConfigError, match="source_config: there is no file or folder `"):
        check_source(config)


def test_size_of_a_source_is_that_of_its_files_on_this_machine(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "rows.jsonl", ROWS)
    Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    num_bytes = (tmp_path / "rows.jsonl").stat().st_size
    assert file_size_bytes(path_config(tmp_path / "rows.jsonl")) == num_bytes > 100
    assert file_size_bytes(method("load_dataset", path="json", data_files=str(tmp_path / "rows.jsonl"))) == num_bytes
    saved = sum(path.stat().st_size for path in (tmp_path / "saved").iterdir())
    assert file_size_bytes(path_config(tmp_path / "saved")) == saved > 100
    for elsewhere in (path_config("s3://bucket/rows.jsonl"), method("load_dataset", path="owner/name")):
        assert file_size_bytes(elsewhere) == 0


def test_size_of_rows_is_that_of_those_that_are_read(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "rows.jsonl", ROWS)
    source = load_source(path_config(tmp_path / "rows.jsonl"))
    texts = sum(len(row["input"].encode()) + len(row["response"].encode()) for row in ROWS)
    assert source.size_bytes > texts
    two = replace(source, dataset=source.dataset.select([0, 3]))
    assert two.size_bytes == source.size_bytes * 2 // len(ROWS)
    assert replace(source, others=(two,)).size_bytes == source.size_bytes + two.size_bytes


def test_missing_file_with_a_near_name_is_told(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "rows.jsonl", ROWS)
    with pytest.raises(ConfigError, match=r"Did you mean `rows\.jsonl`\?"):
        check_source(path_config(tmp_path / "row.jsonl"))


def test_unknown_method_and_argument_are_config_errors(source: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"source_config\.method: no method `load_datset`. Did you mean `load_dataset`"
    ):
        check_source(method("load_datset", path="json"))
    with pytest.raises(ConfigError, match=r"source_config\.kwargs: `load_from_disk` takes no `path`"):
        load_source(method("load_from_disk", path=str(source.parent)))
    with pytest.raises(ConfigError, match="source_config: .*no_such_argument"):
        load_source(method("load_dataset", path="json", data_files=str(source), no_such_argument=1))


def test_unknown_split_is_a_config_error_that_names_it(source: Path) -> None:
    with pytest.raises(ConfigError, match="source_config: .*validation"):
        load_source(method("load_dataset", path=str(source), split="validation"))


def test_folder_that_is_no_data_set_is_a_config_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="source_config: "):
        load_source(path_config(tmp_path))


def test_method_that_gives_something_else_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match="the method gave a list, not a datasets.Dataset"):
        load_dataset_config(method("test_dataset::no_rows"), key="source_config")


# --- blocks ----------------------------------------------------------------------------------------------------------


def test_rows_are_no_blocks(source: Path) -> None:
    with pytest.raises(
        DataError, match="train_dataset_config: these are no prepared blocks, `input_ids`.*Run dataprep"
    ):
        load_blocks(path_config(source), key="train_dataset_config")


def test_blocks_with_text_that_is_no_json_are_a_data_error(tmp_path: Path) -> None:
    names = ("input_ids", "attention_mask", "labels", "position_ids", "node_lengths", "node_parents")
    path = write_jsonl(tmp_path / "blocks.jsonl", [dict.fromkeys(names, "[1 2]")])
    with pytest.raises(DataError, match="train_dataset_config: `input_ids`, .* hold no lists of integers as JSON"):
        load_blocks(path_config(path), key="train_dataset_config")
