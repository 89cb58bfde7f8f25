"""Stage 1: `source_config` -> a data set of checked rows `input`, `response` and, if there, `contexts`.

Also loads prepared blocks for `finetune`: both scripts name data in the same way.
"""

import csv
import glob
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fsspec
import pyarrow as pa

from llm.errors import ConfigError, DataError, MissingExtraError, did_you_mean
from llm.registry import call_method, resolve_method
from llm.terminal import library_bars_hidden, working
from llm.training.config import DatasetConfig

if TYPE_CHECKING:
    from datasets import Dataset

DATASET_METHODS = {
    "load_dataset": "datasets::load_dataset",
    "load_from_disk": "datasets::load_from_disk",
    "load_path": "llm.training.prep.dataset::load_path",
}
_BLOCK_COLUMNS = ("input_ids", "attention_mask", "labels", "position_ids", "node_lengths", "node_parents")
_BUILDERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}


@dataclass(frozen=True, kw_only=True)
class Row:
    """One source row; `number` counts from 0 in the source."""

    number: int
    input: str
    response: str
    contexts: tuple[str, ...] = ()


def load_dataset_config(config: DatasetConfig, *, key: str) -> "Dataset":
    """The data set that `config` names; `key` is its YAML key, for errors.

    Raises ConfigError for a wrong method, argument, path or split, DataError when files cannot be read or are empty.
    """
    method = _loading_method(config)
    loader = resolve_method(method, DATASET_METHODS, key=f"{key}.method")
    with working(f"Reading {key}"), library_bars_hidden():
        return _one_split(_call_loader(loader, dict(config.kwargs), key), config, key)


def load_source(config: DatasetConfig) -> "Dataset":
    """The source rows, columns checked."""
    rows = load_dataset_config(config, key="source_config")
    check_columns(rows, key="source_config")
    return rows


def load_blocks(config: DatasetConfig, *, key: str) -> "Dataset":
    """The prepared blocks that `config` names, lists as lists: `to_csv` writes them as JSON text.

    Raises what `load_dataset_config` does, and DataError when columns of blocks are missing or no lists of integers.
    """
    blocks = load_dataset_config(config, key=key)
    missing = [name for name in _BLOCK_COLUMNS if name not in blocks.column_names]
    if missing:
        raise DataError(
            f"{key}: these are no prepared blocks, {_quoted(missing)} is missing. They have "
            f"{_quoted(blocks.column_names)}. Run dataprep on them, and name here the data set that it writes."
        )
    as_text = [name for name in (*_BLOCK_COLUMNS, "example_rows") if _is_text(blocks.features.get(name))]
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
        if builder == "parquet":
            kwargs = {"batch_size": 10_000} | kwargs  # its own is the first row group's size, which fails at 0 rows
        return load_dataset(builder, data_files=glob.escape(path), split=split or "train", **kwargs)
    return load_from_disk(f"{path}/{split}" if split else path, **kwargs)


def check_source(config: DatasetConfig, *, key: str = "source_config") -> None:
    """ConfigError when a local file is missing or the method unknown: what can be told before anything is loaded."""
    location = _local_location(config)
    if location and not Path(location).expanduser().exists():
        path = Path(location)
        near = did_you_mean(path.name, os.listdir(path.parent)) if path.parent.is_dir() else ""
        hint = f" {near}" if near.startswith("Did") else ""
        raise ConfigError(f"{key}: there is no file or folder `{location}` (looked in {Path.cwd()}).{hint}")
    resolve_method(_loading_method(config), DATASET_METHODS, key=f"{key}.method")


def dataset_location(config: DatasetConfig) -> str | None:
    """The path of the data set that `config` names, for its manifest; None when it names none."""
    found = config.kwargs.get("dataset_path") or config.kwargs.get("data_files") or config.kwargs.get("path")
    return found if isinstance(found, str) else None


def check_columns(dataset: "Dataset", *, key: str) -> None:
    """DataError when `input` or `response` is missing, or a column is not of text (`contexts`: of lists of text)."""
    names = dataset.column_names
    for wanted in ("input", "response"):
        if wanted not in names:
            near = did_you_mean(wanted, names)
            hint = f"{near} " if near.startswith("Did") else ""
            raise DataError(
                f"{key}: the rows have no column `{wanted}`; they have {_quoted(names)}. {hint}Rename it in the "
                "data, or in a function of yours: `method: path.to.module::name` may return any datasets.Dataset."
            )
        kind = dataset.features[wanted]
        if not _is_text(kind) and not _is_null(kind):
            raise DataError(
                f"{key}: column `{wanted}` must be text, it is {_kind_name(kind)}{_example(dataset, wanted)}."
            )
    contexts = dataset.features.get("contexts")
    if contexts is not None and not _is_text(getattr(contexts, "feature", None)) and not _is_null(contexts):
        raise DataError(
            f'{key}: column `contexts` must be a list of texts in each row, e.g. ["..."]; it is {_kind_name(contexts)}'
            f"{_example(dataset, 'contexts')}."
        )


def iterate_rows(dataset: "Dataset", *, batch_size: int) -> Iterator[list[Row]]:
    """The rows of `dataset` in order, `batch_size` at a time; DataError at a null, with its row number."""
    columns = [name for name in ("input", "response", "contexts") if name in dataset.column_names]
    reader = dataset.select_columns(columns).with_format("arrow")
    start = 0
    for table in reader.iter(batch_size=batch_size):
        batch = {name: table.column(name).to_pylist() for name in columns}
        contexts = batch.get("contexts", [None] * table.num_rows)
        yield [
            _row(start + place, *values)
            for place, values in enumerate(zip(batch["input"], batch["response"], contexts, strict=True))
        ]
        start += table.num_rows


def _row(number: int, input_text: str | None, response: str | None, contexts: list[str | None] | None) -> Row:
    texts = contexts or []
    if input_text is None or response is None or None in texts:
        name = "input" if input_text is None else "response" if response is None else f"contexts[{texts.index(None)}]"
        raise DataError(
            f"source_config: row {number} (counted from 0): `{name}` is null, or not there. "
            "Every row needs an input and a response, and every context a text: mend the row or remove it."
        )
    return Row(number=number, input=input_text, response=response, contexts=tuple(t for t in texts if t is not None))


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
    from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError

    try:
        return call_method(loader, kwargs=kwargs, key=key)
    except (FileNotFoundError, DatasetNotFoundError) as error:
        raise ConfigError(f"{key}: {_first_line(error)}") from error
    except DatasetGenerationError as error:  # its own text says only that something went wrong
        place = f" of `{kwargs.get('data_files') or kwargs.get('path')}`"
        raise DataError(f"{key}: cannot read the rows{place}. {_first_line(error.__cause__ or error)}") from error
    except StopIteration as error:  # what datasets raises for a file of no bytes
        raise DataError(f"{key}: there is not one row. Give a file that has some.") from error
    except ImportError as error:  # a file system or a decoder
        raise MissingExtraError(f"{key}: {_first_line(error)}") from error
    except (ValueError, TypeError, OSError) as error:  # unknown split or builder argument; unreadable file
        if "corresponds to no data" in str(error):
            raise DataError(f"{key}: there is not one row. Give a file that has some.") from error
        if isinstance(error, TypeError) and "unexpected keyword" not in str(error):
            raise  # a mistake in the code of a `module::name`, whose traceback its author needs
        raise ConfigError(f"{key}: {_first_line(error)}") from error


def _one_split(found: Any, config: DatasetConfig, key: str) -> "Dataset":
    from datasets import Dataset, DatasetDict

    if isinstance(found, DatasetDict):
        if len(found) != 1:
            path = config.kwargs.get("dataset_path")
            remedy = f"dataset_path: {path}/{next(iter(found))}" if path else f"split: {next(iter(found))}"
            raise ConfigError(f"{key}: the data set has the splits {_quoted(found)}: name one, e.g. `{remedy}`.")
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
        raise DataError(f"{key}: {_quoted(names)} hold no lists of integers as JSON ({_first_line(error)}).") from error


def _lists_of_json(batch: dict[str, list[str]], names: list[str]) -> dict[str, list[Any]]:
    return {name: [json.loads(text) for text in batch[name]] for name in names}


def _quoted(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _kind_name(feature: Any) -> str:
    return f"of type {feature.dtype}" if isinstance(getattr(feature, "dtype", None), str) else f"{feature}"


def _example(dataset: "Dataset", column: str) -> str:
    """`: row 3 holds 7`, the first row that shows it."""
    for number, value in enumerate(dataset[column]):
        if value is not None:
            return f": row {number} holds {repr(value)[:60]}"
    return ""


def _first_line(error: BaseException | None) -> str:
    return str(error).strip().splitlines()[0] if error and str(error).strip() else type(error).__name__


def _is_text(feature: Any) -> bool:
    return getattr(feature, "dtype", None) in ("string", "large_string")


def _is_null(feature: Any) -> bool:
    inner = getattr(feature, "feature", feature)  # a column of nulls, or of empty lists only
    return getattr(inner, "dtype", None) == "null"
