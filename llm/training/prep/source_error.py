"""What a library raises while it reads a source, as one of our errors that names file and line.

Used by `dataset.py`. Only after an error are files read again, to find the line: the libraries tell a block of bytes.
"""

import glob
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from llm.errors import ConfigError, DataError, LlmTrainError, MissingExtraError, quoted

_TEXT = (".json", ".jsonl", ".csv", ".tsv", ".txt")
_NO_ROWS = "there is not one row. Give a file that has some."


def source_error(error: Exception, kwargs: Mapping[str, Any], key: str) -> LlmTrainError | None:
    """Our error for what `load_dataset`, `load_from_disk` or `load_path` raised, given these `kwargs`.

    None for a mistake in the code of a `module::name`, whose traceback its author needs.
    """
    from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError
    from pyarrow import ArrowInvalid

    if isinstance(error, FileNotFoundError | DatasetNotFoundError):
        return ConfigError(f"{key}: {first_line(error)}")
    is_damaged = isinstance(error, OSError) and not isinstance(error, ConnectionError)
    if is_damaged or isinstance(error, DatasetGenerationError | UnicodeDecodeError | ArrowInvalid):
        return DataError(f"{key}: {_unreadable(error.__cause__ or error, kwargs)}")
    # StopIteration is what datasets raises for a file of no bytes, IndexError for a folder of no rows.
    is_empty = isinstance(error, StopIteration) or (isinstance(error, IndexError) and _has_no_files(kwargs))
    if is_empty or "corresponds to no data" in str(error):
        return DataError(f"{key}: {_NO_ROWS}")
    if isinstance(error, ImportError):  # a file system or a decoder
        return MissingExtraError(f"{key}: {first_line(error)}")
    if type(error).__module__.startswith(("botocore", "aiobotocore")):  # no credentials, no such bucket, denied
        return ConfigError(f"{key}: cannot reach {_named(kwargs)}: {first_line(error)}")
    is_argument = isinstance(error, TypeError) and "unexpected keyword" in str(error)
    if is_argument or isinstance(error, ValueError | OSError):  # unknown split or builder argument; no connection
        return ConfigError(f"{key}: {first_line(error)}")
    return None


def first_line(error: BaseException | None) -> str:
    """The first line of an error's text, else its class."""
    return str(error).strip().splitlines()[0] if error and str(error).strip() else type(error).__name__


def _unreadable(error: BaseException, kwargs: Mapping[str, Any]) -> str:
    files = list(_local_files(kwargs))
    for file in files:
        if damage := _damage(file):
            return damage
    if "cast" in str(error) and len(files) > 1:
        return _differing(files)
    return f"cannot read the rows of {_named(kwargs)}. {first_line(error)}"


def _named(kwargs: Mapping[str, Any]) -> str:
    given = kwargs.get("data_files") or kwargs.get("dataset_path") or kwargs.get("path")
    return quoted(given) if isinstance(given, list) else f"`{given}`"


def _has_no_files(kwargs: Mapping[str, Any]) -> bool:
    """Whether a folder of `save_to_disk` says that it holds no file of rows."""
    state = Path(str(kwargs.get("dataset_path") or kwargs.get("path")), "state.json")
    return state.is_file() and not json.loads(state.read_text(encoding="utf-8")).get("_data_files")


def _local_files(kwargs: Mapping[str, Any]) -> Iterator[Path]:
    """The files that `data_files` or `path` names, by patterns, too; of a folder those that surely hold rows."""
    for name in _names(kwargs.get("data_files") or kwargs.get("path")):
        path = Path(name).expanduser()
        for found in [path] if path.exists() else map(Path, sorted(glob.glob(name))):
            if found.is_file():
                yield found
            else:
                yield from (file for file in sorted(found.rglob("*")) if file.suffix in (".csv", ".jsonl", ".parquet"))


def _names(given: Any) -> Iterator[str]:
    if isinstance(given, str):
        yield given
    for one in given.values() if isinstance(given, Mapping) else given if isinstance(given, list) else ():
        yield from _names(one)


def _damage(file: Path) -> str:
    """What is wrong with the first bad line of a text file, or with a parquet file; else empty."""
    if file.suffix == ".parquet":
        return _bad_parquet(file)
    return _first_bad_place(file) if file.suffix in _TEXT else ""


def _bad_parquet(file: Path) -> str:
    from pyarrow import ArrowInvalid
    from pyarrow.parquet import ParquetFile

    try:
        for _ in ParquetFile(file).iter_batches():
            pass
    except (ArrowInvalid, OSError) as error:
        return f"{file}: this is no whole parquet file ({first_line(error).rstrip('.')}). Write or copy it again."
    return ""


def _first_bad_place(file: Path) -> str:
    """`rows.jsonl:2: ...` for the first line that is not UTF-8, or not JSON where it should be; else empty."""
    is_lines = file.suffix in (".jsonl", ".json") and not _is_array(file)
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                text = line.decode("utf-8-sig")
                if is_lines and text.strip():
                    json.dumps(json.loads(text.rstrip()), ensure_ascii=False).encode()
            except UnicodeDecodeError as error:
                return (
                    f"{file}:{number}:{error.start + 1}: byte 0x{line[error.start]:02x} is not UTF-8. Save it as UTF-8."
                )
            except UnicodeEncodeError as error:
                half = f"\\u{ord(error.object[error.start]):04x}"
                return (
                    f"{file}:{number}: `{half}` is one half of a character, which is no text. Mend or remove the row."
                )
            except json.JSONDecodeError as error:
                return f"{file}:{number}:{error.colno}: this line is not JSON: {error.msg}."
    return _bad_array(file) if file.suffix == ".json" and not is_lines else ""


def _is_array(file: Path) -> bool:
    with file.open("rb") as content:
        return content.read(1000).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"[")


def _bad_array(file: Path) -> str:
    try:
        json.loads(file.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        return f"{file}:{error.lineno}:{error.colno}: this is not JSON: {error.msg}."
    return ""


def _differing(files: list[Path]) -> str:
    """Which of the files have other columns than the first, by their first rows."""
    columns = {str(file): sorted(_first_row(file)) for file in files}
    listed = "; ".join(f"`{file}` has {quoted(names)}" for file, names in columns.items())
    return f"the files do not have the same columns and types: {listed}. Make them alike, or read them one by one."


def _first_row(file: Path) -> dict[str, Any]:
    import pyarrow as pa
    from datasets import load_dataset

    builder = {".csv": "csv", ".parquet": "parquet"}.get(file.suffix, "json")
    try:
        rows = load_dataset(builder, data_files=str(file), split="train[:1]")
    except (ValueError, OSError, pa.ArrowInvalid):  # what it holds is told by another error
        return {}
    return dict(rows.features)
