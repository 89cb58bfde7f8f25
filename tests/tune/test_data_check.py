"""Blocks that would train garbage, or nothing, are errors before the first step, with the block's number."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from tiny_models import VOCAB_SIZE, make_block, make_model, make_packed_dataset, unpack
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from llm.errors import DataError
from llm.tokenizer import tokenizer_fingerprint
from llm.training.config import FinetuneConfig
from llm.training.prep.manifest import FORMAT_VERSION, Manifest, Sample, write_manifest
from llm.training.tune.data_check import check_blocks, check_tokenizer, open_blocks


def make_manifest(fingerprint: str) -> Manifest:
    return Manifest(
        format_version=FORMAT_VERSION,
        base_model="tiny/model",
        tokenizer_fingerprint=fingerprint,
        prompt={},
        prompt_format={},
        chat_template=None,
        stop_token="</s>",
        stop_token_id=2,
        samples=[Sample(messages=[{"role": "user", "content": "a"}], contexts=[], tools=[], prompt_ids=[1])],
        source={},
        counts={},
        chunksize=40,
        ignore_index=-100,
        seed=None,
        versions={},
    )


def broken(**changes: Any) -> Dataset:
    """Three blocks, of which the last (number 2) has `changes`."""
    blocks = [make_block([6, 5], [-1, -1], seed=seed, padding=2) for seed in range(3)]
    blocks[2] |= changes
    return Dataset.from_list(blocks)


def changed(name: str, place: int, value: int) -> dict[str, list[int]]:
    column = list(make_block([6, 5], [-1, -1], seed=2, padding=2)[name])
    column[place] = value
    return {name: column}


def test_facts_of_good_blocks() -> None:
    dataset = make_packed_dataset(7)
    facts = check_blocks(dataset, make_model(), key="train_dataset_config")
    assert facts.num_blocks == 7 and facts.is_packed
    assert facts.num_tokens == sum(sum(row["node_lengths"]) for row in dataset)
    assert facts.num_trained_tokens == sum(label != -100 for row in dataset for label in row["labels"])
    assert not check_blocks(unpack(dataset), make_model(), key="x").is_packed


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        (
            changed("input_ids", 3, VOCAB_SIZE),
            f"has the id {VOCAB_SIZE}, the model knows 0 to {VOCAB_SIZE - 1}",
        ),
        (changed("input_ids", 3, -1), "has the id -1"),
        (changed("input_ids", 0, -1), "has the id -1"),
        (changed("labels", 3, 4000), "`labels` has the id 4000"),
        (changed("labels", 4, 7), "`labels` has 7 for a token with the id"),
        (changed("labels", 4, -1), "`labels` has -1 for a token with the id"),
        (changed("position_ids", 3, 128), "an example has 129 tokens, the model has positions for 128"),
        (changed("labels", 6, 5), "the first token of a node is a label"),
        (changed("labels", 0, 5), "the first token of a node is a label"),
        ({"labels": [-100] * 5}, "differ in length"),
        ({"node_lengths": [6, 50]}, "do not describe its tokens"),
        ({"node_lengths": []}, "do not describe its tokens"),
        ({"node_parents": [-1]}, "do not describe its tokens"),
        ({"node_parents": [1, -1]}, "comes before its parent"),
    ],
)
def test_broken_block_is_named(changes: dict[str, Any], text: str) -> None:
    check_blocks(broken(), make_model(), key="train_dataset_config")
    with pytest.raises(DataError, match="^train_dataset_config, block 2: ") as caught:
        check_blocks(broken(**changes), make_model(), key="train_dataset_config")
    assert text in str(caught.value) and "Run dataprep again." in str(caught.value)


def test_block_number_counts_through_the_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llm.training.tune.data_check._BLOCKS_AT_ONCE", 2)
    with pytest.raises(DataError, match="block 2: "):
        check_blocks(broken(**changed("input_ids", 3, 99)), make_model(), key="train_dataset_config")


def test_missing_column_is_named() -> None:
    with pytest.raises(DataError, match="no column node_lengths, node_parents; there are input_ids"):
        check_blocks(broken().remove_columns(["node_lengths", "node_parents"]), make_model(), key="k")


def test_column_of_text_is_refused() -> None:
    dataset = Dataset.from_list([{name: "[1, 2]" for name in broken().column_names}])
    with pytest.raises(DataError, match="`input_ids` must hold lists of integers.*csv keeps no lists"):
        check_blocks(dataset, make_model(), key="k")


def test_no_blocks_is_an_error() -> None:
    with pytest.raises(DataError, match="has no blocks"):
        check_blocks(broken().select([]), make_model(), key="k")


def test_no_label_at_all_is_an_error() -> None:
    masked = broken().map(lambda row: {"labels": [-100] * len(row["labels"])})
    with pytest.raises(DataError, match="none of the 33 tokens is trained"):
        check_blocks(masked, make_model(), key="k")


def opened(path: str, *, counted: int, **kwargs: Any) -> int:
    """The blocks of a file as `finetune` opens it, with a manifest that counts so many."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a")))
    write_manifest(replace(make_manifest(tokenizer_fingerprint(tokenizer)), counts={"blocks": counted}), path)
    source = {"method": "load_dataset", "kwargs": {"path": path} | kwargs}
    settings = {"base_model": "tiny", "train_dataset_config": source, "local_output": "out"}
    return len(open_blocks(FinetuneConfig.model_validate(settings), tokenizer).train)


def test_other_blocks_than_the_manifest_counts_are_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = str(tmp_path / "blocks.parquet")
    make_packed_dataset(6).to_parquet(path)
    assert opened(path, counted=6) == 6
    assert opened(path, counted=6, split="train[:2]") == 2
    assert not caplog.records
    assert opened(path, counted=7) == 6
    assert "has not the blocks that its manifest counts (6, not 7)" in caplog.text


def test_other_tokenizer_is_refused_unless_allowed(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a")))
    found = tokenizer_fingerprint(tokenizer)
    check_tokenizer(make_manifest(found), tokenizer, key="train_dataset_config", allow_mismatch=False)
    with pytest.raises(DataError) as caught:
        check_tokenizer(make_manifest("abc"), tokenizer, key="train_dataset_config", allow_mismatch=False)
    for part in ("train_dataset_config", "abc", found, "tiny/model", "`allow_tokenizer_mismatch: true`"):
        assert part in str(caught.value)
    assert caught.value.exit_code == 3
    check_tokenizer(make_manifest("abc"), tokenizer, key="train_dataset_config", allow_mismatch=True)
    assert "Going on" in caplog.text
