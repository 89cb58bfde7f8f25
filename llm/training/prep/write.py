"""Stage 5, second half: blocks -> the data set at its target, then ledger, config and report, the manifest last."""

import functools
import json
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from llm.registry import call_method, resolve_method
from llm.terminal import library_bars_hidden, progress_bar, working
from llm.training.config import DataPrepConfig, MethodConfig
from llm.training.config_file import saved_data, saved_text
from llm.training.prep.blocks import BLOCK_SCHEMA
from llm.training.prep.file_pages import give_unused_back, map_file
from llm.training.prep.manifest import Manifest, write_manifest
from llm.training.prep.report import Report
from llm.training.prep.report_page import render_page
from llm.training.prep.target import KEY, Target

if TYPE_CHECKING:
    from datasets import Dataset

_BYTES_AT_ONCE = 1 << 20
_SHARD_BYTES = 500_000_000  # as many as `save_to_disk` has in a file
DATASET_WRITERS = {
    "save_to_disk": "datasets::Dataset.save_to_disk",
    "to_parquet": "datasets::Dataset.to_parquet",
    "to_json": "datasets::Dataset.to_json",
    "to_csv": "llm.training.prep.write::to_csv",
}


def check_writer(writer: MethodConfig) -> None:
    """ConfigError when the method is unknown or does not take its kwargs, before anything is done."""
    method = resolve_method(writer.method, DATASET_WRITERS, key=f"{KEY}.method")
    call_method(_doing_nothing(method), None, kwargs=writer.kwargs, key=KEY)


def spill_blocks(batches: Iterable[pa.RecordBatch], folder: Path, *, num_blocks: int) -> "Dataset":
    """The blocks as a data set, memory-mapped from files in `folder`; the same bytes give the same fingerprint."""
    from datasets import Dataset, concatenate_datasets
    from datasets.fingerprint import Hasher
    from datasets.table import MemoryMappedTable

    shards = []
    with progress_bar("Packing", total=num_blocks, unit="blocks") as advance:
        for path in _spill_shards(batches, folder, advance):
            with path.open("rb") as file:
                fingerprint = Hasher.hash_bytes(iter(functools.partial(file.read, _BYTES_AT_ONCE), b""))
            table = pa.ipc.open_stream(map_file(path)).read_all()
            shards.append(Dataset(MemoryMappedTable(table, str(path)), fingerprint=fingerprint))
    give_unused_back()
    return concatenate_datasets(shards)


def _spill_shards(batches: Iterable[pa.RecordBatch], folder: Path, advance: Callable[[int], object]) -> Iterator[Path]:
    """Files in `folder`, each complete when it is given."""
    left = iter(batches)
    for number, first in enumerate(left):
        path = folder / f"blocks-{number:05d}.arrow"
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, BLOCK_SCHEMA) as writer:
            for batch in chain([first], left):
                writer.write_batch(batch)
                advance(batch.num_rows)
                if sink.tell() >= _SHARD_BYTES:
                    break
        yield path


def write_dataset(blocks: "Dataset", writer: MethodConfig, target: Target) -> None:
    """Hands the blocks to the writer method, with `target` as its path."""
    method = resolve_method(writer.method, DATASET_WRITERS, key=f"{KEY}.method")
    with working("Writing"), library_bars_hidden():
        if writer.method == "save_to_disk" and [*writer.kwargs] == [target.path_key]:  # nothing said about its files
            _move_to_disk(blocks, target.path)
        else:
            call_method(method, blocks, kwargs={**writer.kwargs, target.path_key: target.path}, key=KEY)
    give_unused_back()


def _move_to_disk(blocks: "Dataset", path: str) -> None:
    """What `save_to_disk` makes, out of the files that hold the blocks: nothing is copied, as much disk is saved."""
    files = [file["filename"] for file in blocks.cache_files]
    blocks.select(range(len(files))).save_to_disk(path, num_shards=len(files))  # one block in each file
    for file, shard in zip(files, sorted(Path(path).glob("data-*.arrow")), strict=True):
        Path(file).replace(shard)


def write_records(
    ledger: pa.Table, report: Report, *, manifest: Manifest, config: DataPrepConfig, target: Target
) -> None:
    """Ledger, resolved config, report and then the manifest, beside the blocks: now the data set is complete."""
    give_unused_back()
    with fsspec.open(target.ledger_path, "wb") as file:
        pq.write_table(ledger, file)
    texts = {
        target.config_path: saved_text(saved_data(config), "dataprep"),
        target.report_path: report.as_json(),
        target.report_page_path: render_page(report),
    }
    for path, text in texts.items():
        with fsspec.open(path, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
    write_manifest(manifest, target.path)


def to_csv(dataset: "Dataset", path_or_buf: str, **kwargs: Any) -> None:
    """Writes CSV whose lists are JSON (`[1, 2]`), which `load_blocks` reads back; else they come back as text."""
    as_json = dataset.map(_lists_as_json, batched=True, remove_columns=dataset.column_names)
    as_json.to_csv(path_or_buf, **kwargs)


def _doing_nothing(method: Callable[..., Any]) -> Callable[..., Any]:
    """A function with the signature of `method`."""
    return functools.wraps(method)(lambda *args, **kwargs: None)


def _lists_as_json(batch: dict[str, list[Any]]) -> dict[str, list[str]]:
    return {
        name: [value if isinstance(value, str) else json.dumps(value) for value in values]
        for name, values in batch.items()
    }
