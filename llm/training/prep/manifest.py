"""What made a prepared data set: written last beside the blocks, read first by `finetune`.

A data set without a manifest is incomplete. For a folder (`save_to_disk`) it is `<folder>/manifest.json`, for a
file `rows.parquet` it is `rows.parquet.manifest.json`.
"""

import json
from dataclasses import dataclass, fields
from typing import Any

import fsspec

from llm.errors import DataError

FORMAT_VERSION = 3


@dataclass(frozen=True, kw_only=True)
class Sample:
    """The messages before a row's first answer and the ids they became: the exported chat template must give them."""

    messages: list[dict[str, Any]]
    contexts: list[str]
    tools: list[Any]
    prompt_ids: list[int]


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The facts of a prepared data set.

    `chat_template` is the Jinja template that makes these prompts (None: the base tokenizer's own is right);
    `stop_token_id` is the last label of every example; `counts` holds rows by outcome, tokens as if nothing were
    shared, `stored_tokens` as written, what is `shared`, blocks.
    """

    format_version: int
    base_model: str
    tokenizer_fingerprint: str
    prompt: dict[str, Any]
    prompt_format: dict[str, Any]
    chat_template: str | None
    stop_token: str
    stop_token_id: int
    samples: list[Sample]
    source: dict[str, Any]
    counts: dict[str, Any]
    chunksize: int
    ignore_index: int
    seed: int | None
    versions: dict[str, str]


def manifest_path(dataset_path: str) -> str:
    """Where the manifest of the data set at `dataset_path` (folder or file, local or URL) lies."""
    name = dataset_path.rstrip("/").rsplit("/", 1)[-1]
    is_file = name.endswith((".parquet", ".json", ".jsonl", ".csv"))
    return f"{dataset_path}.manifest.json" if is_file else f"{dataset_path.rstrip('/')}/manifest.json"


def write_manifest(manifest: Manifest, dataset_path: str, **storage_options: Any) -> None:
    """Writes the manifest beside the blocks: the last step of a preparation."""
    with fsspec.open(manifest_path(dataset_path), "w", encoding="utf-8", **storage_options) as file:
        json.dump(manifest, file, default=vars, ensure_ascii=False, indent=1)


def read_manifest(dataset_path: str, **storage_options: Any) -> Manifest:
    """The manifest of a prepared data set; DataError when there is none or it is of another format."""
    path = manifest_path(dataset_path)
    try:
        with fsspec.open(path, encoding="utf-8", **storage_options) as file:
            facts = json.load(file)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise DataError(
            f"`{dataset_path}` has no `{path}`: it is not a data set that dataprep finished. Run dataprep again."
        ) from error
    except json.JSONDecodeError as error:
        raise DataError(f"`{path}` is not JSON ({error}). Run dataprep again.") from error
    facts = facts if isinstance(facts, dict) else {}
    if facts.get("format_version") != FORMAT_VERSION or set(facts) != {f.name for f in fields(Manifest)}:
        raise DataError(
            f"`{path}` has format version {facts.get('format_version')}, this llm-train reads {FORMAT_VERSION}. "
            "Run dataprep again."
        )
    return Manifest(**{**facts, "samples": [Sample(**sample) for sample in facts["samples"]]})
