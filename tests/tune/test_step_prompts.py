"""Prompts computed once a step: what is cut out of batches, and that loss, gradients and weights stay those of a step
whose batches compute them each."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_trainer import largest_difference, train_arguments, trained_weights
from tiny_models import ARCHITECTURES, make_model
from torch import Tensor
from transformers import PreTrainedModel

from llm.training.tune import step_prompts
from llm.training.tune.adapter import add_adapter
from llm.training.tune.collator import Batch, flatten_blocks
from llm.training.tune.loss import token_losses
from llm.training.tune.nodes import node_positions
from llm.training.tune.step_prompts import lend_prompts, share_prompts
from llm.training.tune.throughput import StepFlops, count_work
from llm.training.tune.trainer import BlockTrainer

PROMPT, OTHER = list(range(10, 22)), list(range(40, 49))
Node = tuple[list[int], int, int]  # ids, parent, how many of the last are labels


def block(nodes: Sequence[Node], padding: int = 3) -> dict[str, Any]:
    lengths, parents = [len(ids) for ids, _, _ in nodes], [parent for _, parent, _ in nodes]
    labels = [[-100] * (len(ids) - num) + ids[len(ids) - num :] for ids, _, num in nodes]
    return {
        "input_ids": [token for ids, _, _ in nodes for token in ids] + [0] * padding,
        "labels": [label for some in labels for label in some] + [-100] * padding,
        "position_ids": node_positions(lengths, parents) + [0] * padding,
        "node_lengths": lengths,
        "node_parents": parents,
    }


def examples(prompt: list[int], *tails: int) -> list[Node]:
    """A shared prompt and an example for each of `tails`, of so many tokens: all but the first are labels."""
    return [(prompt, -1, 0), *(([50 + n + tail for n in range(tail)], 0, tail - 1) for tail in tails)]


SHARED = [
    block(examples(PROMPT, 5, 3)),
    block([([5, 6, 7, 8], -1, 2), ([*PROMPT, 30, 31, 32], -1, 2)]),  # the second example begins with the prompt
    block(examples(PROMPT, 4, 6, 2)),
    block([([9, 8, 7, 6, 5], -1, 3)]),
]


def batches_of(blocks: Sequence[dict[str, Any]], batch_size: int = 1) -> list[Batch]:
    numbered = [one | {"block": number} for number, one in enumerate(blocks)]
    return [flatten_blocks(numbered[start : start + batch_size]) for start in range(0, len(numbered), batch_size)]


def token_lists(batch: Batch) -> list[list[int]]:
    computed = batch["node_lengths"][len(batch.get("prompts", ())) :]
    return [ids.tolist() for ids in batch["input_ids"][0].split(computed)]


def step_gradients(model: PreTrainedModel, batches: Sequence[Batch]) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    total = torch.zeros(())
    for batch in batches:
        loss = token_losses(model, lend_prompts(batch, model), has_logits_to_keep=True).sum()
        loss.backward()
        total = total + loss.detach()
    return total, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(model: PreTrainedModel, batches: Sequence[Batch], *, tolerance: float = 1e-5) -> None:
    (loss, found), (expected_loss, expected) = (
        step_gradients(model, some) for some in (share_prompts(batches), batches)
    )
    torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=1e-5)
    whole = torch.stack([gradient.norm() for gradient in expected.values()]).norm()
    assert found.keys() == expected.keys() and len(found) > 2
    for name, gradient in found.items():
        assert (gradient - expected[name]).norm() <= tolerance * whole, name


def test_prompt_is_cut_out_of_every_batch_that_begins_with_it() -> None:
    found = share_prompts(batches_of(SHARED))
    assert [batch["blocks"] for batch in found] == [[3], [0], [1], [2]]  # those with the same prompt together
    by_block = {batch["blocks"][0]: batch for batch in found}
    assert token_lists(by_block[0]) == [[55, 56, 57, 58, 59], [53, 54, 55]]
    assert token_lists(by_block[1]) == [[5, 6, 7, 8], [30, 31, 32]]
    assert by_block[1]["node_lengths"] == [12, 4, 3] and by_block[1]["node_parents"] == [-1, -1, 0]
    assert by_block[1]["position_ids"].tolist() == [[0, 1, 2, 3, 12, 13, 14]]
    assert by_block[1]["labels"].tolist() == [[-100, -100, 7, 8, -100, 31, 32]]
    assert "prompts" not in by_block[3]
    assert [by_block[n]["known_nodes"] for n in (0, 1, 2)] == [[], [0], [0]]
    (prompt,) = by_block[0]["prompts"]
    assert by_block[1]["prompts"] == by_block[2]["prompts"] == [prompt] and prompt.num_batches == 3


@pytest.mark.parametrize("batch_size", [1, 2])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_gradients_of_a_step_are_those_of_batches_that_compute_the_prompt_each(
    architecture: str, batch_size: int
) -> None:
    assert_same_gradients(make_model(architecture), batches_of(SHARED, batch_size))


NOTHING_COMMON = {
    "no node is shared": [block([([*PROMPT, 30 + n, 31], -1, 1)]) for n in range(3)],
    "in one block only": [block(examples(PROMPT, 5, 3)), block([([5, 6, 7], -1, 2)])],
    "a label in the prompt": [block([(PROMPT, -1, 1), ([5, 6], 0, 1)])] * 2,
    "too little of the step": [block(examples([7, 7], 40, 30)), block(examples([7, 7], 35, 30))],
    "its last token predicts the first label": [block(examples(PROMPT, 5, 3)), block([([*PROMPT, 3, 4], -1, 2)])],
}


@pytest.mark.parametrize("blocks", NOTHING_COMMON.values(), ids=NOTHING_COMMON)
def test_batches_without_a_common_prompt_stay_as_they_are(blocks: list[dict[str, Any]]) -> None:
    batches = batches_of(blocks)
    assert all(left is right for left, right in zip(share_prompts(batches), batches, strict=True))


def test_prompt_that_would_have_to_be_kept_beside_the_longest_batch_is_computed_by_each() -> None:
    """The long batch stands between those that begin with OTHER, since it has PROMPT in common with the first."""
    both = [*examples(PROMPT, 3, 2), (OTHER, -1, 0), ([60, 61, 62], 3, 2), ([63, 64], 3, 1)]
    batches = batches_of([block(both), block(examples(PROMPT, 25, 20)), block(examples(OTHER, 3, 2))])
    shared = share_prompts(batches)
    assert [batch["blocks"] for batch in shared] == [[0], [1], [2]]
    assert [len(batch.get("prompts", ())) for batch in shared] == [1, 1, 0]
    assert max(live_tokens(shared)) == max(map(num_tokens, batches)) == 57


def test_prompts_of_blocks_by_turns_are_kept_one_after_the_other() -> None:
    batches = batches_of([block(examples(prompt, 4, 2)) for prompt in (PROMPT, OTHER, PROMPT, OTHER)])
    shared = share_prompts(batches)
    assert [batch["blocks"] for batch in shared] == [[0], [2], [1], [3]]
    assert sum(map(num_tokens, shared)) == 4 * 6 and max(live_tokens(shared)) == 18


def num_tokens(batch: Batch) -> int:
    return batch["input_ids"].shape[1]


def live_tokens(batches: Sequence[Batch]) -> list[int]:
    """With each batch: its tokens, and those of the prompts that are kept from their first batch to their last."""
    users: dict[int, list[int]] = {}
    sizes: dict[int, int] = {}
    for number, batch in enumerate(batches):
        for prompt, length in zip(batch.get("prompts", ()), batch["node_lengths"], strict=False):
            users.setdefault(id(prompt), []).append(number)
            sizes[id(prompt)] = length
    return [
        num_tokens(batch) + sum(sizes[p] for p, times in users.items() if times[0] <= number <= times[-1])
        for number, batch in enumerate(batches)
    ]


@st.composite
def steps(draw: Any) -> list[dict[str, Any]]:
    """Blocks of forests whose roots are drawn from few texts, so that they begin alike."""
    blocks = []
    for _ in range(draw(st.integers(2, 5))):
        nodes: list[Node] = []
        for _ in range(draw(st.integers(1, 3))):
            root, num_children = len(nodes), draw(st.integers(0, 3))
            ids = [*PROMPT[: draw(st.sampled_from([2, 5, 12]))], *OTHER[: draw(st.sampled_from([0, 0, 4]))]]
            nodes.append((ids, -1, 0 if num_children else draw(st.integers(0, len(ids) - 1))))
            for _ in range(num_children):
                length = draw(st.integers(1, 5))
                tail = draw(st.lists(st.integers(60, 96), min_size=length, max_size=length))
                parent = draw(st.sampled_from([root, len(nodes) - 1]))
                nodes.append((tail, parent, draw(st.integers(0, length - 1))))
        blocks.append(block(nodes))
    return blocks


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(blocks=steps(), batch_size=st.integers(1, 3))
def test_gradients_of_any_step_are_the_same_and_no_more_is_in_memory(
    blocks: list[dict[str, Any]], batch_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step_prompts, "LEAST_SAVED", 0)
    batches = batches_of(blocks, batch_size)
    assert_same_gradients(make_model("llama"), batches)
    shared = share_prompts(batches)
    assert max(live_tokens(shared)) <= max(map(num_tokens, batches))
    assert sorted(number for batch in shared for number in batch["blocks"]) == list(range(len(blocks)))


@pytest.mark.parametrize("changes", [{}, {"activation_checkpointing": True}, {"label_smoothing_factor": 0.1}])
@pytest.mark.parametrize("is_lora", [True, False], ids=["lora", "full"])
def test_weights_are_those_of_batches_that_compute_the_prompt_each(
    is_lora: bool, changes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for least_saved in (step_prompts.LEAST_SAVED, 1):
        monkeypatch.setattr(step_prompts, "LEAST_SAVED", least_saved)
        model = make_model("llama", initializer_range=0.1)
        model = add_adapter(model, {"r": 4, "init_lora_weights": False} if is_lora else None, {})
        settings = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4} | changes
        found.append(trained_weights(model, Dataset.from_list(SHARED), tmp_path, **settings))
    assert largest_difference(*found) < 1e-6


def test_prompt_counts_as_computed_once_a_step(tmp_path: Path) -> None:
    model = make_model("llama", initializer_range=0.1)
    num_computed = [0]
    model.get_input_embeddings().register_forward_pre_hook(
        lambda _, inputs: num_computed.__setitem__(0, num_computed[0] + inputs[0].numel())
    )
    settings = {"max_steps": 1, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
    trainer = BlockTrainer(model, train_arguments(tmp_path, **settings), train_dataset=Dataset.from_list(SHARED))
    num_computed[0] = 0  # the search for a plain head computes four tokens
    trainer.train()
    once = sum(sum(one["node_lengths"]) for one in SHARED) - 2 * len(PROMPT)
    assert num_computed[0] == trainer.work.tokens == once
    assert trainer.work.examples == 2 + 2 + 3 + 1


def test_flops_of_a_step_are_those_of_its_tokens_and_what_they_see() -> None:
    flops = StepFlops(make_model("llama"))
    whole, shared = batches_of(SHARED), share_prompts(batches_of(SHARED))
    before, after = (
        sum(count_work(batch, num_labels=0, flops=flops).flops for batch in batches) for batches in (whole, shared)
    )
    (prompt_alone,) = batches_of([block([(PROMPT, -1, 0)])])
    assert before - after == 2 * count_work(prompt_alone, num_labels=0, flops=flops).flops
