"""One row through all stages of preparation, with every value on its way written down."""

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from conftest import byte_level_tokenizer

from llm.prompt import Message
from llm.prompt_format import Conversation, Segment, Turn
from llm.training.config import DataPrepConfig, DatasetConfig
from llm.training.dataprep import prepare
from llm.training.prep.blocks import iterate_blocks, padding
from llm.training.prep.dataset import Row, iterate_rows, load_blocks, load_source
from llm.training.prep.encode import Example
from llm.training.prep.engine import encode_rows, open_encoder
from llm.training.prep.manifest import Sample, read_manifest
from llm.training.prep.pack import pack_examples

PROMPT_TEXT = "<|im_start|>user\nContext: 1+1=2\nInput: 1+1?<|im_end|>\n<|im_start|>assistant\nResponse:"
TRAINED_TEXT = " 2<|im_end|>"
PIECES = [
    "<|im_start|>", "user", "\n", "Context", ":", " ", "1", "+", "1", "=", "2", "\n", "In", "put", ":", " ", "1", "+",
    "1", "?", "<|im_end|>", "\n", "<|im_start|>", "assistant", "\n", "Res", "ponse", ":", " 2", "<|im_end|>",
]  # fmt: skip
PROMPT_IDS = [
    3, 347, 204, 409, 31, 226, 22, 16, 22, 34, 23, 204, 301, 332, 31, 226, 22, 16, 22, 36, 4, 204, 3, 410, 204, 304,
    391, 31,
]  # fmt: skip
TRAINED_IDS = [350, 4]
BLOCK: dict[str, Any] = {
    "input_ids": [*PROMPT_IDS, 350, 4, 5, 5],
    "attention_mask": [1] * 30 + [0, 0],
    "labels": [-100] * 28 + [350, 4, -100, -100],
    "position_ids": [*range(30), 0, 0],
    "node_lengths": [30],
    "node_parents": [-1],
    "full_text": PROMPT_TEXT + TRAINED_TEXT,
    "example_rows": [0],
}


@pytest.fixture
def config(tmp_path: Path) -> DataPrepConfig:
    byte_level_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "rows.jsonl").write_text(json.dumps({"input": "1+1?", "response": "2", "contexts": ["1+1=2"]}) + "\n")
    return DataPrepConfig.model_validate(
        {
            "source_config": str(tmp_path / "rows.jsonl"),
            "base_model": str(tmp_path / "model"),
            "prompt_config": {"method": "DefaultPrompt"},
            "prompt_format_config": {"method": "ChatMLFormat"},
            "dataset_writer_config": {"method": "save_to_disk", "kwargs": {"dataset_path": str(tmp_path / "train")}},
            "chunksize": 32,
        }
    )


def test_one_row_through_every_stage_has_the_written_values(config: DataPrepConfig, tmp_path: Path) -> None:
    encoder = open_encoder(config)

    # Stage 1
    rows = load_source(config.source_config)
    [[row]] = iterate_rows(rows, batch_size=10)
    assert row == Row(number=0, input="1+1?", response="2", contexts=("1+1=2",))

    # Stage 2
    conversation = encoder.prompt.conversation([Message(row.input, row.response, row.contexts)])
    turn = Turn(input="Input: 1+1?", contexts=("Context: 1+1=2",), response_head="Response: ", response="2")
    assert conversation == Conversation(system="", turns=(turn,))
    assert encoder.prompt_format.segments(conversation) == [Segment(PROMPT_TEXT, False), Segment(TRAINED_TEXT, True)]

    # Stage 3
    assert [encoder.tokenizer.decode([[number]])[0] for number in PROMPT_IDS + TRAINED_IDS] == PIECES
    assert encoder.encode([row]) == [
        Example(row=0, text=PROMPT_TEXT + TRAINED_TEXT, input_ids=PROMPT_IDS + TRAINED_IDS, trained=((28, 30),))
    ]
    examples = encode_rows(rows, encoder, tmp_path)
    assert examples.lengths.tolist() == [30]

    # Stage 4
    packing = pack_examples(examples.lengths, chunksize=32)
    assert packing.examples.tolist() == [0]
    assert packing.block_starts.tolist() == [0, 1]

    # Stage 5, first half
    [batch] = iterate_blocks(examples.table, packing, padding(config, encoder.tokenizer))
    assert batch.to_pylist() == [BLOCK]


def test_one_row_written_has_the_written_block_manifest_and_ledger(config: DataPrepConfig, tmp_path: Path) -> None:
    prepare(config)
    target = tmp_path / "train"
    blocks = load_blocks(DatasetConfig(method="load_path", kwargs={"path": str(target)}), key="train_dataset_config")
    assert blocks.to_list() == [BLOCK]

    manifest = read_manifest(str(target))
    assert manifest.counts == {
        "rows_read": 1,
        "rows_kept": 1,
        "rows_cut": 0,
        "rows_dropped": {},
        "rows_with_control_text": 0,
        "tokens": 30,
        "trained_tokens": 2,
        "blocks": 1,
        "density": 0.9375,
    }
    assert (manifest.stop_token, manifest.stop_token_id) == ("<|im_end|>", 4)
    assert manifest.samples == [Sample(input="1+1?", contexts=["1+1=2"], prompt_ids=PROMPT_IDS)]
    assert (manifest.chunksize, manifest.ignore_index, manifest.seed) == (32, -100, None)
    assert manifest.prompt == {"method": "DefaultPrompt", "kwargs": {}}
    assert manifest.prompt_format == {"method": "ChatMLFormat", "kwargs": {}}

    assert pq.read_table(target / "ledger.parquet").to_pylist() == [
        {
            "row": 0,
            "outcome": "kept",
            "reason": None,
            "num_tokens": 30,
            "num_prompt_tokens": 28,
            "num_trained_tokens": 2,
            "num_cut_contexts": 0,
            "num_cut_characters": 0,
            "has_control_text": False,
            "block": 0,
        }
    ]


def test_one_row_trained_labels_decode_to_the_response_and_the_stop(config: DataPrepConfig) -> None:
    tokenizer = byte_level_tokenizer()  # the library's own decoding, not ours
    labels = [label for label in BLOCK["labels"] if label != -100]
    assert tokenizer.decode(labels) == " 2<|im_end|>"
    assert tokenizer(PROMPT_TEXT, add_special_tokens=False)["input_ids"] == PROMPT_IDS
