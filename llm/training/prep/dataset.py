"""Stage 1, first half: `source_config` -> a data set, from the hub, disk or a URL; `rows.py` reads its columns.

Also loads prepared blocks for `finetune`: both scripts name data in the same way.
"""

import csv
import glob
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fsspec
import pyarrow as pa

from llm.errors import ConfigError, DataError, LlmTrainError, did_you_mean, quoted
from llm.events import libraries_told_here
from llm.registry import call_method, resolve_method
from llm.terminal import library_bars_hidden, working
from llm.training.config import DatasetConfig
from llm.training.prep.file_pages import give_unused_back
from llm.training.prep.source_error import first_line, source_error

if TYPE_CHECKING:
    from datasets import Dataset

DATASET_METHODS = {
    "load_dataset": "datasets::load_dataset",
    "load_from_disk": "datasets::load_from_disk",
    "load_path": "llm.training.prep.dataset::load_path",
}
_BLOCK_COLUMNS = ("input_ids", "attention_mask", "labels", "position_ids", "node_lengths", "node_parents")
_BUILDERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}


def load_dataset_config(config: DatasetConfig, *, key: str) -> "Dataset":
    """The data set that `config` names; `key` is its YAML key, for errors.

    Raises ConfigError for a wrong method, argument, path or split, DataError when files cannot be read or are empty.
    """
    method = _loading_method(config)
    loader = resolve_method(method, DATASET_METHODS, key=f"{key}.method")
    is_parquet = method == "load_dataset" and config.kwargs.get("path") == "parquet"
    kwargs = (_parquet_kwargs() if is_parquet else {}) | config.kwargs
    with working(f"Reading {key}"), library_bars_hidden():
        libraries_told_here()
        found = _one_split(_call_loader(loader, kwargs, key), config, key)
    give_unused_back()
    return found


def load_blocks(config: DatasetConfig, *, key: str) -> "Dataset":
    """The prepared blocks that `config` names, lists as lists: `to_csv` writes them as JSON text.

    Raises what `load_dataset_config` does, and DataError when columns of blocks are missing or no lists of integers.
    """
    blocks = load_dataset_config(config, key=key)
    missing = [name for name in _BLOCK_COLUMNS if name not in blocks.column_names]
    if missing:
        raise DataError(
            f"{key}: these are no prepared blocks, {quoted(missing)} is missing. They have "
            f"{quoted(blocks.column_names)}. Run dataprep on them, and name here the data set that it writes."
        )
    as_text = [name for name in (*_BLOCK_COLUMNS, "example_rows") if is_text(blocks.features.get(name))]
    return _with_lists(blocks, as_text, key) if as_text else blocks


def load_path(path: str, split: str | None = None, **kwargs: Any) -> Any:
    """Rows of a json, jsonl, csv or parquet file, or of a folder that `save_to_disk` wrote; on disk or by URL.

    Cells of a csv file are text, as they stand there: no `NA` becomes a null, no `7` a number.
    """
    from datasets import load_dataset, load_from_disk

    path = path if "://" in path else str(Path(path).expanduser())
    if "://" not in path and not Path(path).exists():
        raise FileNotFoundError(f"there is no file or folder `{path}` (looked in {Path.cwd()}).")
    builder = _BUILDERS.get(Path(path).suffix)
    if builder:
        kwargs = _text_cells(path, kwargs) | kwargs if builder == "csv" else kwargs
        kwargs = _parquet_kwargs() | kwargs if builder == "parquet" else kwargs
        return load_dataset(builder, data_files=glob.escape(path), split=split or "train", **kwargs)
    if Path(path).is_file():
        raise ValueError(
            f"`{path}` is none of {', '.join(_BUILDERS)}. Name it so, or say how it is read: `method: load_dataset, "
            f"kwargs: {{path: csv, data_files: {path}, split: train}}`."
        )
    return load_from_disk(f"{path}/{split}" if split else path, **kwargs)


def _parquet_kwargs() -> dict[str, Any]:
    """What makes the library read a file piece by piece, as fast: else 140 MB more for one of 145 MB.

    Its own batch is the first row group's size, which fails at 0 rows.
    """
    from pyarrow.dataset import ParquetFragmentScanOptions

    scan = ParquetFragmentScanOptions(pre_buffer=False, use_buffered_stream=True, buffer_size=1 << 20)
    return {"batch_size": 1000, "fragment_scan_options": scan}


def check_source(config: DatasetConfig, *, key: str = "source_config") -> None:
    """ConfigError when a local file is missing or the method unknown: what can be told before anything is loaded."""
    location = _local_location(config)
    if location and not Path(location).expanduser().exists():
        path = Path(location)
        near = did_you_mean(path.name, os.listdir(path.parent)) if path.parent.is_dir() else ""
        hint = f" {near}" if near.startswith("Did") else ""
        raise ConfigError(f"{key}: there is no file or folder `{location}` (looked in {Path.cwd()}).{hint}")
    if (method := _loading_method(config)) not in DATASET_METHODS:  # ours are right, and take 0.3 s to import
        resolve_method(method, DATASET_METHODS, key=f"{key}.method")


def file_size_bytes(config: DatasetConfig) -> int:
    """The bytes of the file, or of all files in the folder, on this machine that `config` names; 0: it names none."""
    location = _local_location(config)
    path = Path(location or "").expanduser()
    return sum(one.stat().st_size for one in (path, *path.rglob("*")) if one.is_file()) if location else 0


def dataset_location(config: DatasetConfig) -> str | None:
    """The path of the data set that `config` names, for its manifest; None when it names none."""
    found = config.kwargs.get("dataset_path") or config.kwargs.get("data_files") or config.kwargs.get("path")
    return found if isinstance(found, str) else None


def is_text(feature: Any) -> bool:
    """Whether a column of this kind holds text."""
    return getattr(feature, "dtype", None) in ("string", "large_string")


def _loading_method(config: DatasetConfig) -> str:
    """The method; a path that ends as a file does is no data set of the hub, so `load_dataset` of it reads the file."""
    is_file = Path(str(config.kwargs.get("path", ""))).suffix in _BUILDERS
    return "load_path" if config.method == "load_dataset" and is_file else config.method


def _local_location(config: DatasetConfig) -> str | None:
    """The one file or folder on this machine that `config` names, if it names one."""
    method, is_builder = _loading_method(config), config.kwargs.get("path") in _BUILDERS.values()
    location = dataset_location(config) if method != "load_dataset" or is_builder else None
    is_ours = method in DATASET_METHODS and location and "://" not in location and not set("*?[") & set(location)
    return location if is_ours else None


def _text_cells(path: str, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments of the csv builder that keep every cell as text; it has no `dtype`, so each column is named."""
    from datasets import Features, Value

    delimiter = kwargs.get("sep") or kwargs.get("delimiter") or ","
    with fsspec.open(path, "rt", encoding=kwargs.get("encoding") or "utf-8-sig", newline="") as file:
        header = next(csv.reader(file, delimiter=delimiter), [])
    names = kwargs.get("column_names") or kwargs.get("names") or header
    return {"features": Features({name: Value("string") for name in names}), "keep_default_na": False}


def _call_loader(loader: Any, kwargs: dict[str, Any], key: str) -> Any:
    try:
        return call_method(loader, kwargs=kwargs, key=key)
    except LlmTrainError:
        raise
    except Exception as error:  # each library has its own classes; `source_error` gives None for what is not its matter
        told = source_error(error, kwargs, key)
        if told is None:
            raise
        raise told from error


def _one_split(found: Any, config: DatasetConfig, key: str) -> "Dataset":
    from datasets import Dataset, DatasetDict

    if isinstance(found, DatasetDict):
        if len(found) != 1:
            path = config.kwargs.get("dataset_path")
            remedy = f"dataset_path: {path}/{next(iter(found))}" if path else f"split: {next(iter(found))}"
            raise ConfigError(f"{key}: the data set has the splits {quoted(found)}: name one, e.g. `{remedy}`.")
        found = next(iter(found.values()))
    if not isinstance(found, Dataset):
        raise ConfigError(f"{key}: the method gave a {type(found).__name__}, not a datasets.Dataset.")
    if len(found) == 0:
        raise DataError(f"{key}: the data set has no rows.")
    return found


def _with_lists(blocks: "Dataset", names: list[str], key: str) -> "Dataset":
    from datasets import Features, List, Value

    kinds = {name: List(Value("int64")) if name in names else kind for name, kind in blocks.features.items()}
    try:
        with library_bars_hidden():
            return blocks.map(_lists_of_json, batched=True, features=Features(kinds), fn_kwargs={"names": names})
    except (ValueError, TypeError, pa.ArrowInvalid) as error:
        raise DataError(f"{key}: {quoted(names)} hold no lists of integers as JSON ({first_line(error)}).") from error


def _lists_of_json(batch: dict[str, list[str]], names: list[str]) -> dict[str, list[Any]]:
    return {name: [json.loads(text) for text in batch[name]] for name in names}
