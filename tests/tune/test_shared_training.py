"""What dataprep shares trains as if nothing were: the same loss, gradients and weights, from rows to the optimizer."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from prep_helpers import Rows, make_config, settings, write_jsonl
from test_trainer import largest_difference, trained_weights
from tiny_models import make_model
from torch import Tensor
from transformers import PreTrainedModel

from llm.training.config import DatasetConfig
from llm.training.dataprep import prepare
from llm.training.prep.dataset import load_blocks
from llm.training.tune.collator import flatten_blocks
from llm.training.tune.data_check import check_blocks
from llm.training.tune.loss import token_losses

pytest_plugins = ("prep.prep_fixtures",)

FEW_SHOT = {
    "method": "FewShotQA",
    "kwargs": {
        "examples": [{"input": "Is the fox quick?", "response": "It is.", "contexts": ["The quick brown fox."]}] * 2
    },
}
QUESTIONS: Rows = [
    {
        "input": f"What of {n}?",
        "response": f"It is {n * n}.",
        "contexts": ["The lazy dog jumps over the fox."] * (n % 3),
    }
    for n in range(9)
]


def conversations() -> Rows:
    """Each as far as its first, second and third answer, so that the longer go on from the shorter."""
    rows = []
    for talk in range(4):
        messages: list[dict[str, str]] = [
            {"role": "system", "content": "Say what the lazy dog would say, in few words."}
        ]
        for turn in range(3):
            messages.append({"role": "user", "content": f"Question {turn} of talk {talk}: what is the fox?"})
            messages.append({"role": "assistant", "content": f"Answer {turn} of {talk}."})
            rows.append({"messages": list(messages)})
    return rows


CASES: dict[str, tuple[Rows, dict[str, Any]]] = {
    "few-shot": (QUESTIONS, {"prompt_config": FEW_SHOT}),
    "conversations, all answers": (conversations(), {}),
    "conversations, last answer": (conversations(), {"train_on": "last"}),
}


def prepared(folder: Path, base: Path, case: str, **changes: Any) -> Dataset:
    rows, keys = CASES[case]
    folder.mkdir()
    source = write_jsonl(folder / "rows.jsonl", rows)
    prepare(make_config(folder, settings(source, base, folder / "train", chunksize=400, **keys, **changes)))
    return load_blocks(DatasetConfig.model_validate(str(folder / "train")), key="train_dataset_config")


def tiny(dataset: Dataset) -> PreTrainedModel:
    vocab_size = 1 + max(max(block["input_ids"]) for block in dataset)
    return make_model("llama", vocab_size=vocab_size, max_position_embeddings=512, initializer_range=0.1)


def loss_and_gradients(model: PreTrainedModel, dataset: Dataset) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    losses = token_losses(model, flatten_blocks(list(dataset)), has_logits_to_keep=True)
    losses.sum().backward()
    return losses.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("case", CASES)
def test_shared_loss_and_gradients_equal_those_of_examples_apart(case: str, tmp_path: Path, model: Path) -> None:
    shared = prepared(tmp_path / "shared", model, case, share_prefixes=True)
    alone = prepared(tmp_path / "alone", model, case, pack=False)
    saved = 1 - sum(map(sum, shared["node_lengths"])) / sum(map(sum, alone["node_lengths"]))
    assert saved > 0.2 and set(sum(alone["node_parents"], [])) == {-1}
    llama = tiny(alone)
    check_blocks(shared, llama, key="train_dataset_config")
    losses, gradients = loss_and_gradients(llama, shared)
    expected_losses, expected = loss_and_gradients(llama, alone)
    assert len(losses) == len(expected_losses) > 40
    torch.testing.assert_close(losses.sort().values, expected_losses.sort().values, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(losses.sum(), expected_losses.sum(), rtol=1e-5, atol=0)
    assert gradients.keys() == expected.keys() and len(gradients) > 10
    for name, gradient in gradients.items():
        assert (gradient - expected[name]).norm() / expected[name].norm() < 1e-5, name


def test_shared_and_separate_blocks_train_the_same_weights(tmp_path: Path, model: Path) -> None:
    found = []
    for name, changes in (("shared", {"share_prefixes": True}), ("alone", {"pack": False})):
        dataset = prepared(tmp_path / name, model, "few-shot", **changes)
        steps = {"per_device_train_batch_size": len(dataset), "max_steps": 3}
        found.append(trained_weights(tiny(dataset), dataset, tmp_path / f"{name}-out", **steps))
    assert largest_difference(*found) < 1e-6
