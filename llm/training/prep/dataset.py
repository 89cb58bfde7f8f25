"""Stage 1: `source_config` -> a data set of checked rows `input`, `response` and, if there, `contexts`.

Also loads prepared blocks for `finetune`: both scripts name data in the same way.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm.errors import ConfigError, DataError, did_you_mean
from llm.registry import call_method, resolve_method
from llm.training.config import DatasetConfig

if TYPE_CHECKING:
    from datasets import Dataset

DATASET_METHODS = {
    "load_dataset": "datasets::load_dataset",
    "load_from_disk": "datasets::load_from_disk",
    "load_path": "llm.training.prep.dataset::load_path",
}
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

    Raises ConfigError for a wrong method, argument, path or split, DataError when the files cannot be read or are empty.
    """
    method, kwargs = config.method, dict(config.kwargs)
    path = str(kwargs.get("path", ""))
    if method == "load_dataset" and Path(path).suffix in _BUILDERS:  # a file, not the name of a data set on the hub
        method = "load_path"
    loader = resolve_method(method, DATASET_METHODS, key=f"{key}.method")
    return _one_split(_call_loader(loader, kwargs, key), key)


def load_source(config: DatasetConfig) -> "Dataset":
    """The source rows, columns checked."""
    rows = load_dataset_config(config, key="source_config")
    check_columns(rows, key="source_config")
    return rows


def load_path(path: str, split: str | None = None, **kwargs: Any) -> Any:
    """Rows of a json, jsonl, csv or parquet file, or of a folder that `save_to_disk` wrote; on disk or by URL."""
    from datasets import load_dataset, load_from_disk

    is_url = "://" in path
    if not is_url and not Path(path).exists():
        raise FileNotFoundError(f"there is no file or folder `{path}` (looked in {Path.cwd()})")
    builder = _BUILDERS.get(Path(path).suffix)
    if builder:
        return load_dataset(builder, data_files=path, split=split or "train", **kwargs)
    return load_from_disk(path, **kwargs)


def dataset_location(config: DatasetConfig) -> str | None:
    """The path of the data set that `config` names, for its manifest; None when it names none."""
    found = config.kwargs.get("dataset_path") or config.kwargs.get("data_files") or config.kwargs.get("path")
    return found if isinstance(found, str) else None


def check_columns(dataset: "Dataset", *, key: str) -> None:
    """DataError when `input` or `response` is missing, or a column is not of text (`contexts`: of lists of text)."""
    names = dataset.column_names
    for wanted in ("input", "response"):
        if wanted not in names:
            raise DataError(
                f"{key}: the rows have no column `{wanted}`; they have {', '.join(names)}. {did_you_mean(wanted, names)} "
                f"Rename it, e.g. with `datasets`' rename_column."
            )
        if not _is_text(dataset.features[wanted]):
            raise DataError(f"{key}: column `{wanted}` must be text, it is {dataset.features[wanted]}.")
    contexts = dataset.features.get("contexts")
    if contexts is not None and not _is_text(getattr(contexts, "feature", None)) and not _is_null(contexts):
        raise DataError(
            f'{key}: column `contexts` must be a list of texts in each row (["..."]), it is {contexts}.'
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
    for name, text in (("input", input_text), ("response", response)):
        if text is None:
            raise DataError(f"row {number}: `{name}` is null. Every row needs an input and a response: mend or remove it.")
    texts = contexts or []
    if None in texts:
        raise DataError(f"row {number}: `contexts[{texts.index(None)}]` is null. Mend or remove it.")
    assert input_text is not None and response is not None
    return Row(number=number, input=input_text, response=response, contexts=tuple(t for t in texts if t is not None))


def _call_loader(loader: Any, kwargs: dict[str, Any], key: str) -> Any:
    from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError

    try:
        return call_method(loader, kwargs=kwargs, key=key)
    except (FileNotFoundError, DatasetNotFoundError) as error:
        raise ConfigError(f"{key}: {_first_line(error)}") from error
    except DatasetGenerationError as error:
        raise DataError(f"{key}: {_first_line(error)} {_first_line(error.__cause__)}") from error
    except (ValueError, OSError) as error:  # unknown split or builder argument; unreadable file
        raise ConfigError(f"{key}: {_first_line(error)}") from error


def _one_split(found: Any, key: str) -> "Dataset":
    from datasets import Dataset, DatasetDict

    if isinstance(found, DatasetDict):
        if len(found) != 1:
            raise ConfigError(
                f"{key}: the data set has the splits {', '.join(found)}: name one as {key}.kwargs.split."
            )
        found = next(iter(found.values()))
    if not isinstance(found, Dataset):
        raise ConfigError(f"{key}: the method gave a {type(found).__name__}, not a datasets.Dataset.")
    if len(found) == 0:
        raise DataError(f"{key}: the data set has no rows.")
    return found


def _first_line(error: BaseException | None) -> str:
    return str(error).strip().splitlines()[0] if error and str(error).strip() else type(error).__name__


def _is_text(feature: Any) -> bool:
    return getattr(feature, "dtype", None) in ("string", "large_string")


def _is_null(feature: Any) -> bool:
    inner = getattr(feature, "feature", feature)  # a column of nulls, or of empty lists only
    return getattr(inner, "dtype", None) == "null"
