"""`llm-train init`: a pair of commented YAML files for the rows and the model at hand.

Takes the path of rows and a base model; looks at the columns and, when the tokenizer is on this machine, at the length
of the first rows; gives `dataprep.yaml` and `finetune.yaml`, both checked before they are written.
"""

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm.errors import ConfigError, DataError
from llm.model_registry import check_is_reachable, find_model
from llm.training.config import ColumnName, DataPrepConfig, DatasetConfig, FinetuneConfig
from llm.training.config_file import load_config
from llm.training.prep.dataset import check_source, load_dataset_config
from llm.training.prep.encode import Example
from llm.training.prep.engine import for_source, open_encoder
from llm.training.prep.rows import Source, guess_columns, iterate_rows, with_columns

SAMPLE_ROWS = 1000
LONGEST = 32_768  # tokens up to which an example is measured

DATAPREP = """\
# dataprep.yaml: rows -> prompts -> tokens and labels -> packed blocks.   llm-train dataprep dataprep.yaml
# Every key: llm-train explain. Completion in your editor: see README, Configuration.

# {columns_found}
source_config: {rows}
{columns}
# Its tokenizer is used, and its prompt format: {format_found}
base_model: {base_model}

# The task in words, for instance: {{method: Prompt, kwargs: {{system_message: Answer in one sentence.}}}}
# prompt_config: {{method: ZeroShotQA}}

# Tokens of a block. {lengths_found}
chunksize: {chunksize}
on_too_long: drop            # counted and reported; or error, or truncate_contexts

dataset_writer_config:
  method: save_to_disk       # or to_parquet, to_json, to_csv with path_or_buf; on disk or s3://
  kwargs: {{dataset_path: output/train}}
# overwrite: true            # replace what is there
"""
FINETUNE = """\
# finetune.yaml: packed blocks -> checkpoints, final_output.   llm-train finetune finetune.yaml
# Every key: llm-train explain. Completion in your editor: see README, Configuration.

base_model: {base_model}
train_dataset_config: output/train
# eval_dataset_config: output/validation      # prepared from other rows: its loss is shown while it trains

local_output: output/model                    # the result: output/model/final_output
# additional_output_paths: [s3://my-bucket/model]

# Hugging Face TrainingArguments, over our defaults: llm-train explain training_arguments.learning_rate
training_arguments:
  num_train_epochs: 1
  per_device_train_batch_size: 2              # out of memory: 1, and load_in_4bit below
  gradient_accumulation_steps: 2

lora_config: {{r: 16}}                          # null trains all weights
# load_in_4bit: true                          # QLoRA, on a GPU
"""


@dataclass(frozen=True, kw_only=True)
class _Found:
    """What was seen of the rows: a sentence, the `columns` that they need, and their tokens (None: not measured)."""

    columns_text: str
    columns: dict[ColumnName, str]
    longest: int | None


def write_starter(rows: str, base_model: str, folder: str) -> list[str]:
    """The paths of the two files, written to `folder`.

    ConfigError when one is there already or the rows are not found; DataError when they cannot be read.
    """
    paths = [Path(folder, name) for name in ("dataprep.yaml", "finetune.yaml")]
    for path in paths:
        if path.exists():
            raise ConfigError(
                f"`{path}` is there already, and is not overwritten. Move it, or choose another --folder."
            )
    check_is_reachable(base_model)
    found = _look_at(rows, base_model)
    texts = [_dataprep_text(rows, base_model, found), FINETUNE.format(base_model=json.dumps(base_model))]
    with tempfile.TemporaryDirectory() as draft:
        for path, text in zip(paths, texts, strict=True):
            Path(draft, path.name).write_text(text, encoding="utf-8")
        load_config(str(Path(draft, paths[0].name)), DataPrepConfig)
        load_config(str(Path(draft, paths[1].name)), FinetuneConfig)
    Path(folder).mkdir(parents=True, exist_ok=True)
    for path, text in zip(paths, texts, strict=True):
        path.write_text(text, encoding="utf-8")
    return [str(path) for path in paths]


def _look_at(rows: str, base_model: str) -> _Found:
    config = DatasetConfig.model_validate(rows)
    check_source(config)
    dataset = load_dataset_config(config, key="source_config")
    names = ", ".join(dataset.column_names)
    try:
        source, columns = with_columns(dataset, {}), {}
    except DataError:  # other names: a guess, or the error that says what to write
        columns = guess_columns(dataset.column_names)
        source = with_columns(dataset, columns)
    text = f"{len(dataset):,} rows with the columns {names}; read as {source.row_format}."
    return _Found(columns_text=text, columns=columns, longest=_longest(source, rows, base_model))


def _longest(source: Source, rows: str, base_model: str) -> int | None:
    """Tokens of the longest of the first rows; None when the tokenizer is not a folder of this machine."""
    if not Path(base_model).is_dir():
        return None
    writer = {"method": "save_to_disk", "kwargs": {"dataset_path": "x"}}
    data: dict[str, Any] = {"source_config": rows, "base_model": base_model, "dataset_writer_config": writer}
    config = DataPrepConfig.model_validate(data | {"chunksize": LONGEST, "fast_tokenizer": False})
    encoder = for_source(open_encoder(config), config, source)
    outcomes = encoder.encode(next(iterate_rows(source, batch_size=SAMPLE_ROWS)))
    lengths = [len(one.input_ids) if isinstance(one, Example) else one.num_tokens for one in outcomes]
    return max(lengths, default=None)


def _dataprep_text(rows: str, base_model: str, found: _Found) -> str:
    known = find_model(base_model)
    own = "the tokenizer's own chat template, if it has one, else plain text"
    longest = found.longest
    measured = f"The longest of the first {SAMPLE_ROWS:,} rows takes {longest:,}." if longest else "None was measured."
    columns = f"columns: {json.dumps(found.columns)}\n" if found.columns else ""
    return DATAPREP.format(
        columns_found=found.columns_text,
        rows=json.dumps(rows),
        columns=columns,
        format_found=known.prompt_format or own,
        base_model=json.dumps(base_model),
        lengths_found=measured,
        chunksize=_chunksize(longest, known.max_length),
    )


def _chunksize(longest: int | None, max_length: int | None) -> int:
    """The usual 2,048, or more where rows need it and the model can read it: packing wastes little of it."""
    chunksize = 2048
    while longest and chunksize < longest and (max_length is None or chunksize * 2 <= max_length):
        chunksize *= 2
    return chunksize
