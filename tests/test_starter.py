"""`llm-train init`: a commented pair of YAML files that fit the rows, are valid, and prepare these rows."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from conftest import byte_level_tokenizer
from prep_helpers import write_jsonl
from typer.testing import CliRunner, Result

from llm.cli import app
from llm.training.config import DataPrepConfig, FinetuneConfig
from llm.training.config_file import load_config

ROWS = [{"input": "a", "response": "b"}, {"input": "c " * 30, "response": "d"}]


def init(folder: Path, rows: Sequence[Mapping[str, Any]], *arguments: str, base_model: str = "org/model") -> Result:
    path = write_jsonl(folder / "rows.jsonl", rows)
    return CliRunner().invoke(app, ["init", str(path), "--base-model", base_model, "--folder", str(folder), *arguments])


def configs(folder: Path) -> tuple[DataPrepConfig, FinetuneConfig]:
    dataprep = load_config(str(folder / "dataprep.yaml"), DataPrepConfig)
    return dataprep, load_config(str(folder / "finetune.yaml"), FinetuneConfig)


def test_init_writes_two_valid_files_that_fit_together(tmp_path: Path) -> None:
    result = init(tmp_path, ROWS)
    assert result.exit_code == 0 and result.stdout == f"{tmp_path}/dataprep.yaml\n{tmp_path}/finetune.yaml\n"
    assert result.stderr.endswith(f"  llm-train finetune {tmp_path}/finetune.yaml\n")
    dataprep, finetune = configs(tmp_path)
    assert dataprep.base_model == finetune.base_model == "org/model"
    assert dataprep.source_config.kwargs == {"path": str(tmp_path / "rows.jsonl")}
    assert dataprep.dataset_writer_config.kwargs["dataset_path"] == finetune.train_dataset_config.kwargs["path"]
    text = (tmp_path / "dataprep.yaml").read_text()
    assert "# 2 rows with the columns input, response; read as input_response.\n" in text
    assert "None was measured." in text and dataprep.chunksize == 2048


@pytest.mark.parametrize(
    ("row", "columns", "read_as"),
    [
        ({"question": "a", "answer": "b"}, {"input": "question", "response": "answer"}, "input_response"),
        ({"input": "a", "output": "b"}, {"response": "output"}, "input_response"),
        ({"instruction": "a", "input": "b", "output": "c"}, {}, "alpaca"),
        ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}, {}, "messages"),
    ],
)
def test_init_looks_at_the_columns(row: dict[str, Any], columns: dict[str, str], read_as: str, tmp_path: Path) -> None:
    assert init(tmp_path, [row]).exit_code == 0
    assert configs(tmp_path)[0].columns == columns
    assert f"read as {read_as}." in (tmp_path / "dataprep.yaml").read_text()


def test_init_measures_the_rows_with_a_tokenizer_of_this_machine_and_dataprep_takes_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    byte_level_tokenizer().save_pretrained(tmp_path / "model")
    rows = [*ROWS, {"input": "c " * 3000, "response": "d"}]
    assert init(tmp_path, rows, base_model=str(tmp_path / "model")).exit_code == 0
    text = (tmp_path / "dataprep.yaml").read_text()
    assert "The longest of the first 1,000 rows takes 6,0" in text and configs(tmp_path)[0].chunksize == 8192
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["dataprep", "dataprep.yaml"])
    assert done.exit_code == 0 and (tmp_path / "output/train/manifest.json").is_file(), done.output


@pytest.mark.parametrize("name", ["dataprep.yaml", "finetune.yaml"])
def test_init_overwrites_nothing(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("mine")
    result = init(tmp_path, ROWS)
    assert result.exit_code == 2 and f"{name}` is there already, and is not overwritten." in result.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == [name, "rows.jsonl"]
    assert (tmp_path / name).read_text() == "mine"


def test_init_of_bad_rows_or_a_missing_model_writes_nothing(tmp_path: Path) -> None:
    told = {3: init(tmp_path, [{"a": "b", "c": "d"}]), 2: init(tmp_path, ROWS, base_model="./none")}
    assert {code: result.exit_code for code, result in told.items()} == {3: 3, 2: 2}
    assert "no column `input`" in told[3].stderr and "there is no folder `./none`" in told[2].stderr
    missing = CliRunner().invoke(
        app, ["init", str(tmp_path / "row.jsonl"), "--base-model", "m", "--folder", str(tmp_path)]
    )
    assert missing.exit_code == 2 and "Did you mean `rows.jsonl`?" in missing.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]
