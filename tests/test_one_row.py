"""One row through all stages, preparation and training, with every value on its way written down."""

import hashlib
import json
from array import array
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from conftest import byte_level_tokenizer
from transformers import AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

from llm.prompt_format import Conversation, Segment, Turn
from llm.training.config import DataPrepConfig, DatasetConfig, FinetuneConfig
from llm.training.dataprep import prepare
from llm.training.finetune import finetune
from llm.training.prep.blocks import iterate_blocks, padding
from llm.training.prep.dataset import load_blocks
from llm.training.prep.encode import Example
from llm.training.prep.engine import encode_rows, open_encoder
from llm.training.prep.manifest import Sample, read_manifest
from llm.training.prep.pack import pack_examples
from llm.training.prep.rows import Row, iterate_rows, load_source
from llm.training.tune.collator import flatten_blocks
from llm.training.tune.export import prompt_ids
from llm.training.tune.loss import token_losses

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
    assert row == Row.of(number=0, input="1+1?", response="2", contexts=("1+1=2",))

    # Stage 2
    conversation = encoder.prompt.conversation(row.turns)
    turn = Turn(input="Input: 1+1?", contexts=("Context: 1+1=2",), response_head="Response: ", response="2")
    assert conversation == Conversation(system="", turns=(turn,))
    assert encoder.prompt_format.segments(conversation) == [Segment(PROMPT_TEXT, False), Segment(TRAINED_TEXT, True)]

    # Stage 3
    assert [encoder.tokenizer.decode([[number]])[0] for number in PROMPT_IDS + TRAINED_IDS] == PIECES
    assert encoder.encode([row]) == [
        Example(
            row=0,
            text=PROMPT_TEXT + TRAINED_TEXT,
            input_ids=array("I", PROMPT_IDS + TRAINED_IDS),
            trained=((28, 30),),
        )
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


PROMPT_HASH = hashlib.blake2b(b"".join(n.to_bytes(4, "little") for n in PROMPT_IDS), digest_size=16).digest()


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
        "stored_tokens": 30,
        "shared": {"nodes": 0, "tokens": 0, "saved_tokens": 0},
        "blocks": 1,
        "density": 0.9375,
    }
    assert (manifest.stop_token, manifest.stop_token_id) == ("<|im_end|>", 4)
    assert manifest.samples == [
        Sample(messages=[{"role": "user", "content": "1+1?"}], contexts=["1+1=2"], tools=[], prompt_ids=PROMPT_IDS)
    ]
    assert (manifest.chunksize, manifest.ignore_index, manifest.seed) == (32, -100, None)
    assert manifest.prompt == {"method": "DefaultPrompt", "kwargs": {}}
    assert manifest.prompt_format == {"method": "ChatMLFormat", "kwargs": {}}

    assert (
        pq.read_table(target / "ledger.parquet").to_pylist()
        == [
            {
                "row": 0,
                "outcome": "kept",
                "reason": None,
                "num_tokens": 30,
                "num_prompt_tokens": 28,
                "num_trained_tokens": 2,
                "num_cut_contexts": 0,
                "num_cut_characters": 0,
                "num_cut_tokens": 0,
                "has_control_text": False,
                "num_contexts_characters": 5,
                "estimated_contexts_tokens": 2,  # 5 of 97 characters, of 30 tokens
                "block": 0,
                "prompt_hash": int.from_bytes(PROMPT_HASH[:8], "little", signed=True),
                "split": "train",
            }
        ]
    )


def test_one_row_trained_labels_decode_to_the_response_and_the_stop(config: DataPrepConfig) -> None:
    tokenizer = byte_level_tokenizer()  # the library's own decoding, not ours
    labels = [label for label in BLOCK["labels"] if label != -100]
    assert tokenizer.decode(labels) == " 2<|im_end|>"
    assert tokenizer(PROMPT_TEXT, add_special_tokens=False)["input_ids"] == PROMPT_IDS


def tiny_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(byte_level_tokenizer()),
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
        )
    )


def test_one_row_in_training_has_the_written_batch_and_the_textbook_loss() -> None:
    # Stage 7: padding is cut off, the node structure takes the place of a mask
    batch = flatten_blocks([BLOCK])
    structure = {name: batch.pop(name) for name in ("node_lengths", "node_parents")}
    assert structure == {"node_lengths": [30], "node_parents": [-1]}
    assert {name: tensor.tolist() for name, tensor in batch.items()} == {
        "input_ids": [PROMPT_IDS + TRAINED_IDS],
        "position_ids": [list(range(30))],
        "labels": [[-100] * 28 + TRAINED_IDS],
        "num_block_labels": [2],
    }
    # token 28 (" 2") is predicted from token 27 (":"), the stop token from " 2"
    model = tiny_model()
    logits = model(input_ids=torch.tensor([PROMPT_IDS + TRAINED_IDS])).logits[0, [27, 28]]
    expected = -logits.log_softmax(-1)[[0, 1], TRAINED_IDS]
    torch.testing.assert_close(token_losses(model, batch, has_logits_to_keep=True), expected)


def test_one_row_trained_is_served_with_its_own_prompt_and_stop(config: DataPrepConfig, tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path / "model")
    prepare(config)
    # Stages 6 to 9
    summary = finetune(
        FinetuneConfig.model_validate(
            {
                "base_model": str(tmp_path / "model"),
                "train_dataset_config": str(tmp_path / "train"),
                "local_output": str(tmp_path / "out"),
                "torch_dtype": "float32",
                "report_to": "none",
                "training_arguments": {"max_steps": 1, "gradient_accumulation_steps": 1},
            }
        )
    )
    assert summary.result == str(tmp_path / "out" / "final_output")
    served = AutoTokenizer.from_pretrained(summary.result)
    assert prompt_ids(served, [{"role": "user", "content": "1+1?"}], contexts=["1+1=2"]) == PROMPT_IDS
    assert 4 in GenerationConfig.from_pretrained(summary.result).eos_token_id
    assert (tmp_path / "out" / "final_output" / "adapter_model.safetensors").is_file()
