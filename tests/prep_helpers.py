"""What the tests of data preparation share: rows on disk, a tokenizer folder, configs, what a target holds."""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from llm.training.config import DataPrepConfig
from llm.training.config_file import load_config
from llm.training.prep.rows import Row

BUCKET = "prep-tests"  # moto servers of one process share their buckets, so each test folder has its own
ROOT = Path(__file__).resolve().parent.parent
Rows = Sequence[Mapping[str, Any]]


def some_rows(number: int = 40) -> list[dict[str, Any]]:
    """Rows of different lengths, some with contexts."""
    return [
        {
            "input": f"What is {n} + {n}? " + "Think about it. " * (n % 5),
            "response": f"It is {n + n}.",
            "contexts": [f"{n} is a number."] * (n % 3),
        }
        for n in range(number)
    ]


def with_turn(row: Row, **changes: Any) -> Row:
    """`row`, a single turn, with changes in that turn."""
    return replace(row, turns=(replace(row.turns[0], **changes),))


def write_jsonl(path: Path, rows: Rows) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def settings(source: str | Path | Mapping[str, Any], model: Path, target: str | Path, **changes: Any) -> dict[str, Any]:
    """A config as plain data; `target` picks the writer by its ending."""
    writers = {".parquet": "to_parquet", ".jsonl": "to_json", ".json": "to_json", ".csv": "to_csv"}
    method = writers.get(Path(str(target)).suffix, "save_to_disk")
    key = "dataset_path" if method == "save_to_disk" else "path_or_buf"
    return {
        "source_config": source if isinstance(source, Mapping) else str(source),
        "base_model": str(model),
        "prompt_format_config": {"method": "ChatMLFormat"},
        "dataset_writer_config": {"method": method, "kwargs": {key: str(target)}},
        "chunksize": 256,
    } | changes


def config_file(folder: Path, data: Mapping[str, Any]) -> Path:
    """A YAML file (JSON is YAML)."""
    path = folder / "dataprep.yaml"
    path.write_text(json.dumps(data, indent=1), encoding="utf-8")
    return path


def make_config(folder: Path, data: Mapping[str, Any]) -> DataPrepConfig:
    return load_config(str(config_file(folder, data)), DataPrepConfig)


@contextmanager
def s3_server() -> Iterator[str]:
    """An S3 server of moto on a free port of this machine, with the bucket `BUCKET`; its address."""
    import fsspec
    import s3fs
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    address = "http://{}:{}".format(*server.get_host_and_port())
    given = {
        "AWS_ENDPOINT_URL": address,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    before = {name: os.environ.get(name) for name in given}
    os.environ.update(given)
    s3fs.S3FileSystem.clear_instance_cache()
    try:
        fsspec.filesystem("s3").makedirs(BUCKET, exist_ok=True)
        yield address
    finally:
        s3fs.S3FileSystem.clear_instance_cache()
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
        server.stop()
