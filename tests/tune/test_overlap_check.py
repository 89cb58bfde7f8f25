"""Prompts that are in training and evaluation data: counted, warned of, an error on request, and never overlooked."""

import logging
import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from conftest import byte_level_tokenizer
from prep_helpers import make_config, settings, write_jsonl

from llm.errors import ConfigError, DataError
from llm.training.config import FinetuneConfig
from llm.training.config_file import load_config
from llm.training.dataprep import prepare
from llm.training.prep.manifest import read_manifest
from llm.training.tune.data_check import open_blocks
from llm.training.tune.overlap_check import check_overlap

MISSING = "whether its prompts are also in the training data cannot be checked"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`train` and `train_eval` of one source, `other` of a source that shares 30 prompts with it; as files, too."""
    folder = tmp_path_factory.mktemp("data")
    byte_level_tokenizer().save_pretrained(folder / "model")
    for name, first, keys in (
        ("train", 0, {"eval_fraction": 0.2}),
        ("train.parquet", 0, {"eval_fraction": 0.2}),
        ("other", 370, {}),
        ("other.parquet", 370, {}),
    ):
        rows = [
            {"input": f"question {n % 400}", "response": f"answer {n} of {name}"} for n in range(first, first + 400)
        ]
        if name.startswith("other"):
            rows = [{**row, "input": row["input"] + ("" if n < 30 else "?")} for n, row in enumerate(rows)]
            rows[2]["response"] = " "  # dropped: is in no data
        source = write_jsonl(folder / f"{name}.rows.jsonl", rows)
        prepare(make_config(folder, settings(source, folder / "model", folder / name, **keys)))
    return folder


def config_of(folder: Path, train: str, evaluation: str, **keys: Any) -> FinetuneConfig:
    names = {"train_dataset_config": str(folder / train), "eval_dataset_config": str(folder / evaluation)}
    return FinetuneConfig.model_validate({"base_model": "m", "local_output": "o", **names, **keys})


def check(folder: Path, train: str, evaluation: str, **keys: Any) -> None:
    config = config_of(folder, train, evaluation, **keys)
    check_overlap(config, read_manifest(str(folder / train)), read_manifest(str(folder / evaluation)))


@pytest.mark.parametrize("ending", ["", ".parquet"])
def test_rows_that_dataprep_holds_out_never_overlap(
    ending: str, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        check(folder, f"train{ending}", f"train_eval{ending}", fail_on_leak=True)
        check(folder, f"train_eval{ending}", f"train{ending}", fail_on_leak=True)
    assert not caplog.text


@pytest.mark.parametrize("ending", ["", ".parquet"])
def test_prompts_in_both_are_counted_without_dropped_and_held_out_rows(
    ending: str, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ledger = pq.read_table(folder / "train" / "ledger.parquet").to_pylist()
    common = [row["row"] for row in ledger if row["row"] in {*range(370, 400)} - {372} and row["split"] == "train"]
    assert 15 < len(common) < 29
    check(folder, f"other{ending}", f"train{ending}")
    found = [row - 370 for row in common]
    assert (
        f"eval_dataset_config: {len(common)} of 399 training rows have a prompt that is in the evaluation data, too "
        f"(rows {', '.join(map(str, found[:5]))}, ...), where {len(common)} of " in caplog.text
    )
    with pytest.raises(DataError, match=r"Take these rows out of one of them, .*`eval_fraction: 0.05`\)\.$"):
        check(folder, f"other{ending}", f"train{ending}", fail_on_leak=True)


def test_fail_on_leak_without_evaluation_data_is_a_config_error(tmp_path: Path) -> None:
    path = tmp_path / "finetune.yaml"
    path.write_text("base_model: m\ntrain_dataset_config: a\nlocal_output: o\nfail_on_leak: true\n")
    with pytest.raises(ConfigError, match="finetune.yaml:4:1  fail_on_leak(.|\n)*Add `eval_dataset_config`, or delete"):
        load_config(str(path), FinetuneConfig)


def test_data_compared_with_itself_overlaps_whole(folder: Path) -> None:
    with pytest.raises(DataError, match="399 of 399 training rows .* where 399 of 399 rows"):
        check(folder, "other", "other", fail_on_leak=True)


def test_finetune_checks_it_as_it_opens_the_data(folder: Path) -> None:
    tokenizer = byte_level_tokenizer()
    open_blocks(config_of(folder, "train", "train_eval", fail_on_leak=True), tokenizer)
    with pytest.raises(DataError, match="training rows have a prompt that is in the evaluation data"):
        open_blocks(config_of(folder, "train", "other", fail_on_leak=True), tokenizer)


@pytest.mark.parametrize("is_old", [True, False])
def test_ledger_without_hashes_cannot_be_checked_and_fails_on_request(
    is_old: bool, folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("train", "other"):
        shutil.copytree(folder / name, tmp_path / name)
    path = tmp_path / "other" / "ledger.parquet"
    ledger = pq.read_table(path)
    path.unlink()
    if is_old:
        pq.write_table(ledger.drop_columns(["prompt_hash", "split"]), path)
    with caplog.at_level(logging.INFO):
        check(tmp_path, "train", "other")
    assert MISSING in caplog.text
    with pytest.raises(DataError, match=f"{MISSING}.*Run dataprep again, or delete `fail_on_leak`"):
        check(tmp_path, "train", "other", fail_on_leak=True)
