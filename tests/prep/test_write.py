"""Stage 5, second half: every writer round-trips, and a wrong one is refused before anything is done."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from datasets import Dataset, load_from_disk
from datasets.utils import are_progress_bars_disabled

from llm.errors import ConfigError
from llm.training.config import DatasetConfig, MethodConfig
from llm.training.prep import write
from llm.training.prep.blocks import BLOCK_SCHEMA, Padding, iterate_blocks
from llm.training.prep.dataset import load_blocks
from llm.training.prep.pack import pack_examples
from llm.training.prep.store import SCHEMA
from llm.training.prep.target import Target
from llm.training.prep.write import check_writer, spill_blocks, write_dataset

pytest_plugins = ("prep_fixtures",)

TEXTS = ["plain", 'a "quoted", one', "line\nbreak\r\n", "日本語 👩‍👩‍👧", "[1, 2]", "NA", "null", "7", " spaces "]


def batches() -> list[pa.RecordBatch]:
    """One block for each of `TEXTS`."""
    rows = [{"row": n, "text": t, "input_ids": [5, 6, n], "trained": [1, 3]} for n, t in enumerate(TEXTS)]
    packing = pack_examples(np.array([3] * len(rows)), chunksize=5)
    padding = Padding(length=5, token_id=0, ignore_index=-100)
    return list(iterate_blocks(pa.Table.from_pylist(rows, SCHEMA), packing, padding))


def spilled(folder: Path) -> Dataset:
    folder.mkdir(exist_ok=True)
    return spill_blocks(batches(), folder, num_blocks=len(TEXTS))


def writer(method: str, path: Path, **kwargs: Any) -> tuple[MethodConfig, Target]:
    key = "dataset_path" if method == "save_to_disk" else "path_or_buf"
    config = MethodConfig(method=method, kwargs={key: "is replaced", **kwargs})
    return config, Target(path=str(path), path_key=key)


def written(method: str, path: Path, **kwargs: Any) -> list[dict[str, Any]]:
    config, target = writer(method, path, **kwargs)
    check_writer(config)
    write_dataset(spilled(path.parent / "spill"), config, target)
    blocks = load_blocks(DatasetConfig.model_validate(str(path)), key="train_dataset_config")
    assert blocks.column_names == BLOCK_SCHEMA.names
    return list(blocks)


def expected() -> list[dict[str, Any]]:
    return [block for batch in batches() for block in batch.to_pylist()]


@pytest.mark.parametrize(
    ("method", "name"),
    [
        ("save_to_disk", "out"),
        ("to_parquet", "o.parquet"),
        ("to_json", "o.jsonl"),
        ("to_json", "o.json"),
        ("to_csv", "o.csv"),
    ],
)
def test_blocks_come_back_from_every_writer(method: str, name: str, tmp_path: Path) -> None:
    assert written(method, tmp_path / name) == expected()


@pytest.mark.parametrize(
    ("method", "name", "kwargs"),
    [
        ("save_to_disk", "out", {"num_shards": 3}),
        ("save_to_disk", "out", {"num_shards": 3, "num_proc": 2}),
        ("to_parquet", "o.parquet", {"batch_size": 2}),
        ("to_csv", "o.csv", {"sep": ","}),
    ],
)
def test_kwargs_of_the_writer_are_handed_on(method: str, name: str, kwargs: dict[str, Any], tmp_path: Path) -> None:
    assert written(method, tmp_path / name, **kwargs) == expected()
    assert method != "save_to_disk" or len(list((tmp_path / name).glob("data-*.arrow"))) == 3


def test_csv_lists_are_json(tmp_path: Path) -> None:
    written("to_csv", tmp_path / "o.csv")
    with (tmp_path / "o.csv").open(encoding="utf-8", newline="") as file:
        first = next(csv.DictReader(file))
    assert json.loads(first["labels"]) == [-100, 6, 0, -100, -100]
    assert first["full_text"] == "plain"


@pytest.mark.parametrize(
    ("method", "name"), [("save_to_disk", "out"), ("to_parquet", "o.parquet"), ("to_csv", "o.csv")]
)
def test_same_blocks_are_written_as_the_same_bytes(method: str, name: str, tmp_path: Path) -> None:
    found = []
    for folder in (tmp_path / "a", tmp_path / "b"):
        folder.mkdir()
        config, target = writer(method, folder / name)
        write_dataset(spilled(folder / "spill"), config, target)
        paths = [path for path in sorted(folder.rglob("*")) if path.is_file() and "spill" not in path.parts]
        found.append({str(path.relative_to(folder)): path.read_bytes() for path in paths})
    assert found[0] == found[1]
    assert len(found[0]) >= 1


def test_spilled_blocks_with_other_content_have_another_fingerprint(tmp_path: Path) -> None:
    one, same = spilled(tmp_path / "a"), spilled(tmp_path / "b")
    (tmp_path / "c").mkdir()
    other = spill_blocks([batch.slice(1) for batch in batches()], tmp_path / "c", num_blocks=len(TEXTS))
    assert one._fingerprint == same._fingerprint != other._fingerprint


@pytest.mark.parametrize(("shard_bytes", "num_shards"), [(500_000_000, 1), (1, len(TEXTS))])
def test_blocks_saved_to_disk_are_what_the_library_saves_and_are_not_copied(
    shard_bytes: int, num_shards: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(write, "_SHARD_BYTES", shard_bytes)
    tmp_path.joinpath("spill").mkdir()
    one_each = (part for batch in batches() for part in (batch.slice(n, 1) for n in range(batch.num_rows)))
    blocks = spill_blocks(one_each, tmp_path / "spill", num_blocks=len(TEXTS))
    files = [Path(file["filename"]) for file in blocks.cache_files]
    inodes = [file.stat().st_ino for file in files]
    blocks.save_to_disk(tmp_path / "library", num_shards=num_shards)
    write_dataset(blocks, *writer("save_to_disk", tmp_path / "ours"))
    ours, theirs = (load_from_disk(tmp_path / name) for name in ("ours", "library"))
    assert list(ours) == list(theirs) == expected() and ours.features == theirs.features
    assert sorted(path.name for path in (tmp_path / "ours").iterdir()) == sorted(
        path.name for path in (tmp_path / "library").iterdir()
    )
    info = [(tmp_path / name / "dataset_info.json").read_text() for name in ("ours", "library")]
    assert info[0] == info[1]
    shards = sorted((tmp_path / "ours").glob("data-*.arrow"))
    assert [shard.stat().st_ino for shard in shards] == inodes and len(inodes) == num_shards
    assert not any(file.exists() for file in files)


@pytest.mark.parametrize(
    ("method", "kwargs", "text"),
    [
        ("to_parqet", {}, "dataset_writer_config.method: no method `to_parqet`. Did you mean `to_parquet`"),
        ("to_xlsx", {}, "no method `to_xlsx`. .*`to_csv`|no method `to_xlsx`. .*Allowed: save_to_disk, to_csv"),
        ("save_to_disk", {"dataset_path": "a", "num_shard": 1}, "takes no `num_shard`. Did you mean `num_shards`"),
        ("to_json", {}, "to_json.*missing a required argument: 'path_or_buf'"),
        ("no.such.module::write", {}, "cannot import `no.such.module`"),
        ("json::no_such_name", {}, "module `json` has no `no_such_name`"),
    ],
)
def test_wrong_writer_is_a_config_error(method: str, kwargs: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        check_writer(MethodConfig(method=method, kwargs=kwargs))


def own_writer(blocks: Dataset, dataset_path: str, note: str) -> None:
    blocks.save_to_disk(dataset_path)
    (Path(dataset_path) / "note.txt").write_text(note)


def test_own_function_writes_the_blocks(tmp_path: Path) -> None:
    config = MethodConfig(method="test_write::own_writer", kwargs={"dataset_path": "is replaced", "note": "x"})
    check_writer(config)
    write_dataset(spilled(tmp_path / "spill"), config, Target(path=str(tmp_path / "out"), path_key="dataset_path"))
    assert (tmp_path / "out" / "note.txt").read_text() == "x"


def test_progress_bars_of_the_library_are_as_before(tmp_path: Path) -> None:
    before = are_progress_bars_disabled()
    written("to_parquet", tmp_path / "o.parquet")
    assert are_progress_bars_disabled() is before
