"""The loss is the textbook's: packed = unpacked, any split of a step, any number of ranks, any eval batch
size."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from tiny_models import ARCHITECTURES, make_block, make_model, make_packed_dataset, unpack
from torch.nn import functional as F
from transformers import PreTrainedModel, TrainingArguments

from llm.errors import ConfigError, LlmTrainError
from llm.training.tune.adapter import add_adapter
from llm.training.tune.checkpoint_folder import newest_whole_checkpoint
from llm.training.tune.checkpoints import CheckpointCallback
from llm.training.tune.collator import flatten_blocks, pad_blocks
from llm.training.tune.head import _LinearCrossEntropy
from llm.training.tune.loss import _CrossEntropy, has_logits_to_keep, token_losses
from llm.training.tune.trainer import BlockTrainer

RANKS_SCRIPT = Path(__file__).parent / "train_on_ranks.py"


def train_arguments(folder: Path, **changes: Any) -> TrainingArguments:
    """Five SGD steps over 8 blocks each."""
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": 5,
        "optim": "sgd",
        "learning_rate": 0.05,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0,
        "remove_unused_columns": False,
        "disable_tqdm": True,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1,
        "use_cpu": True,
        "logging_nan_inf_filter": False,
        "train_sampling_strategy": "sequential",
    }
    return TrainingArguments(**settings | changes)


def trained_weights(model: PreTrainedModel, dataset: Dataset, folder: Path, **changes: Any) -> dict[str, torch.Tensor]:
    trainer = BlockTrainer(model, train_arguments(folder, **changes), train_dataset=dataset)
    trainer.train()
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def largest_difference(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> float:
    assert left.keys() == right.keys() and len(left) > 0
    return max(float((left[name] - right[name]).abs().max()) for name in left)


def reference_loss(model: PreTrainedModel, dataset: Dataset) -> tuple[torch.Tensor, int]:
    """Sum of token losses and their number, one example at a time through the model's own eager attention."""
    model.set_attn_implementation("eager")
    total, count = torch.zeros(()), 0
    for row in dataset:
        logits = model(input_ids=torch.tensor([row["input_ids"]]), use_cache=False).logits[0]
        labels = torch.tensor(row["labels"])
        total = total + F.cross_entropy(logits[:-1], labels[1:], reduction="sum", ignore_index=-100)
        count += int((labels != -100).sum())
    return total, count


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_packed_loss_and_gradients_equal_the_textbook(architecture: str) -> None:
    packed, model = make_packed_dataset(6), make_model(architecture)
    batch = flatten_blocks(list(packed))
    losses = token_losses(model, batch, has_logits_to_keep=has_logits_to_keep(model))
    losses.sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    total, count = reference_loss(model, unpack(packed))
    total.backward()
    assert len(losses) == count > 50
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses.sum(), total, rtol=1e-5, atol=0)
    assert len(gradients) > 10
    whole = torch.stack([gradient.norm() for gradient in gradients.values()]).norm()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        # A key bias of OPT has no influence: its gradient is rounding, which has no relative error.
        error = (gradients[name] - parameter.grad).norm() / parameter.grad.norm().clamp(min=1e-2 * whole)
        assert error < 1e-5, name


def test_shared_prompt_has_the_loss_of_repeated_prompts() -> None:
    model = make_model("qwen3")
    block = make_block([9, 6, 5, 4], [-1, 0, 0, 2])
    prompt, first, second, third = torch.tensor(block["input_ids"]).split(block["node_lengths"])
    labels = torch.tensor(block["labels"]).split(block["node_lengths"])
    paths = [([prompt, first], [0, 1]), ([prompt, second, third], [0, 2, 3])]
    shared = token_losses(model, flatten_blocks([block]), has_logits_to_keep=True)
    model.set_attn_implementation("eager")
    repeated = []
    for pieces, nodes in paths:
        logits = model(input_ids=torch.cat(pieces)[None], use_cache=False).logits[0]
        targets = torch.cat([labels[n] for n in nodes])
        repeated.append(F.cross_entropy(logits[:-1], targets[1:], reduction="none", ignore_index=-100))
    num_prompt = int((labels[0] != -100).sum())
    found = torch.cat([row[row > 0] for row in repeated])
    once = torch.cat(
        [found[:num_prompt], found[num_prompt : num_prompt + 3], repeated[1][repeated[1] > 0][num_prompt:]]
    )
    torch.testing.assert_close(shared, once, rtol=1e-5, atol=1e-5)


def test_loss_of_all_logits_equals_that_of_kept_ones() -> None:
    model, batch = make_model("llama"), flatten_blocks(list(make_packed_dataset(3)))
    kept = token_losses(model, batch, has_logits_to_keep=True)
    torch.testing.assert_close(kept, token_losses(model, batch, has_logits_to_keep=False))


def test_padded_batch_has_the_loss_of_a_flattened_one() -> None:
    model, rows = make_model("llama"), list(unpack(make_packed_dataset(3)))
    flat = token_losses(model, flatten_blocks(rows), has_logits_to_keep=True)
    torch.testing.assert_close(flat, token_losses(model, pad_blocks(rows), has_logits_to_keep=True))


def test_pad_id_and_ignore_index_do_not_change_the_batch() -> None:
    block = make_block([5, 4], [-1, -1], padding=3)
    other = block | {
        "input_ids": block["input_ids"][:9] + [50] * 3,
        "labels": [-1 if label == -100 else label for label in block["labels"]],
    }
    left, right = flatten_blocks([block, block]), flatten_blocks([other, other])
    assert left["input_ids"].shape == (1, 18)
    assert left["node_parents"] == [-1, -1, -1, -1] and left["node_lengths"] == [5, 4, 5, 4]
    assert torch.equal(left["input_ids"], right["input_ids"]) and torch.equal(left["labels"], right["labels"])


def test_parents_are_counted_through_the_batch() -> None:
    block = make_block([5, 4, 3], [-1, 0, 1])
    assert flatten_blocks([block, block])["node_parents"] == [-1, 0, 1, -1, 3, 4]


SPLITS = [(8, 1), (1, 8), (2, 4)]


@pytest.mark.parametrize("is_lora", [True, False], ids=["lora", "full"])
@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
def test_weights_are_the_same_for_any_split_of_a_step(architecture: str, is_lora: bool, tmp_path: Path) -> None:
    found = []
    for batch_size, accumulation in SPLITS:
        model = make_model(architecture, initializer_range=0.1)
        model = add_adapter(model, {"r": 4, "init_lora_weights": False} if is_lora else None, {})
        settings = {"per_device_train_batch_size": batch_size, "gradient_accumulation_steps": accumulation}
        found.append(trained_weights(model, make_packed_dataset(40), tmp_path, **settings))
    assert largest_difference(found[0], found[1]) < 1e-6
    assert largest_difference(found[0], found[2]) < 1e-6
    start = dict(make_model(architecture, initializer_range=0.1).named_parameters())
    if not is_lora:
        assert largest_difference(found[0], {name: p.detach() for name, p in start.items()}) > 1e-3


def test_packed_and_unpacked_data_train_the_same_weights(tmp_path: Path) -> None:
    packed = make_packed_dataset(10)
    found = []
    for dataset in (packed, unpack(packed)):
        model = make_model("llama", initializer_range=0.1)
        found.append(trained_weights(model, dataset, tmp_path, per_device_train_batch_size=len(dataset), max_steps=3))
    assert largest_difference(*found) < 1e-6


def test_logged_loss_is_the_token_mean(tmp_path: Path) -> None:
    model, dataset = make_model("llama", initializer_range=0.1), make_packed_dataset(8)
    total, count = reference_loss(make_model("llama", initializer_range=0.1), unpack(dataset))
    total = total.detach()
    arguments = train_arguments(tmp_path, max_steps=1, per_device_train_batch_size=2, gradient_accumulation_steps=4)
    trainer = BlockTrainer(model, arguments, train_dataset=dataset)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(float(total) / count, rel=1e-5)
    assert trainer.state.log_history[0]["tokens_per_second"] > 0
    num_tokens, num_examples = (sum(of(row["node_lengths"]) for row in dataset) for of in (sum, len))
    assert trainer.work.counts[:3] == [num_tokens, count, num_examples]
    assert trainer.state.log_history[0]["examples_per_second"] > 0 < trainer.state.log_history[0]["tflops_per_second"]
    assert "mfu" not in trainer.state.log_history[0]  # the peak of a CPU is not known


@pytest.mark.parametrize("batch_size", [1, 3, 4, 16])
def test_eval_loss_is_the_token_mean_for_any_batch_size(batch_size: int, tmp_path: Path) -> None:
    dataset = make_packed_dataset(13)
    total, count = reference_loss(make_model("llama"), unpack(dataset))
    arguments = train_arguments(tmp_path, per_device_eval_batch_size=batch_size)
    for eval_dataset in (dataset, unpack(dataset)):
        trainer = BlockTrainer(make_model("llama"), arguments, train_dataset=dataset, eval_dataset=eval_dataset)
        metrics = trainer.evaluate()
        assert metrics["eval_loss"] == pytest.approx(float(total.detach()) / count, rel=1e-5)
        assert metrics["eval_trained_tokens"] == count


def test_step_without_labels_has_no_loss_and_leaves_the_weights(tmp_path: Path) -> None:
    blocks = [make_block([5, 4], [-1, -1], seed=seed) for seed in range(4)]
    for block in blocks[:2]:
        block["labels"] = [-100] * 9
    model = make_model("llama")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    settings = {"max_steps": 1, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
    trainer = BlockTrainer(model, train_arguments(tmp_path, **settings), train_dataset=Dataset.from_list(blocks))
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == 0
    assert largest_difference(before, {name: p.detach() for name, p in model.named_parameters()}) == 0


def test_loss_of_a_bfloat16_model_is_summed_in_float32() -> None:
    model, batch = make_model("llama").to(torch.bfloat16), flatten_blocks(list(make_packed_dataset(3)))
    losses = token_losses(model, batch, has_logits_to_keep=True)
    assert losses.dtype is torch.float32
    assert not torch.equal(losses, losses.bfloat16().float())


def test_gradient_checkpointing_trains_the_same_weights(tmp_path: Path) -> None:
    found = []
    for is_on in (False, True):
        model = add_adapter(make_model("llama", initializer_range=0.1), {"r": 4}, {})
        settings = {"per_device_train_batch_size": 8, "activation_checkpointing": is_on}
        found.append(trained_weights(model, make_packed_dataset(40), tmp_path, **settings))
    assert largest_difference(*found) < 1e-6


def test_label_smoothing_is_honoured(tmp_path: Path) -> None:
    dataset = make_packed_dataset(8)
    losses = []
    for smoothing in (0.0, 0.3):
        arguments = train_arguments(
            tmp_path, max_steps=1, per_device_train_batch_size=8, label_smoothing_factor=smoothing
        )
        trainer = BlockTrainer(make_model("llama"), arguments, train_dataset=dataset)
        trainer.train()
        losses.append(trainer.state.log_history[0]["loss"])
    assert abs(losses[0] - losses[1]) > 1e-2


def test_several_gpus_in_one_process_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = train_arguments(tmp_path)
    monkeypatch.setattr(type(arguments), "n_gpu", property(lambda self: 2))
    with pytest.raises(ConfigError, match="torchrun --nproc-per-node 2"):
        BlockTrainer(make_model("llama"), arguments, train_dataset=make_packed_dataset(2))


@pytest.mark.parametrize("is_prompted", [False, True], ids=["alone", "prompted"])
@pytest.mark.parametrize("is_lora", [True, False], ids=["lora", "full"])
def test_two_ranks_train_and_evaluate_as_one(is_lora: bool, is_prompted: bool, tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "--master-addr",
        "127.0.0.1",
    ]
    command += ["--master-port", "0", "--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    result = subprocess.run(
        [*command, str(RANKS_SCRIPT), str(tmp_path), str(int(is_lora)), str(int(is_prompted))],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    from train_on_ranks import run

    alone = run(str(tmp_path), is_lora=is_lora, is_prompted=is_prompted, batch_size=8)
    ranks = torch.load(tmp_path / "ranks.pt", weights_only=True)
    assert largest_difference(alone["weights"], ranks["weights"]) < 1e-6
    assert ranks["eval_loss"] == pytest.approx(alone["eval_loss"], rel=1e-6)
    computed, computed_alone = (found["tokens"] for found in (ranks, alone))
    num_prompt_tokens = 5 * 12 if is_prompted else 0  # a prompt is computed once a step by each rank
    assert computed[0] == computed_alone[0] + num_prompt_tokens and computed[1:3] == computed_alone[1:3]
    assert json.dumps(ranks["losses"]) and ranks["losses"] == pytest.approx(alone["losses"], rel=1e-5)


@pytest.mark.parametrize("wrong", [0, 3, 10, 17, 22])
def test_loss_not_finite_names_the_blocks_and_source_rows_before_the_weights_change(wrong: int, tmp_path: Path) -> None:
    token, blocks = 96, make_packed_dataset(24).to_list()
    for number, block in enumerate(blocks):
        block["input_ids"] = [4 if token_id == token else token_id for token_id in block["input_ids"]]
        block["example_rows"] = [100 + number, 200 + number]
    blocks[wrong]["input_ids"][0] = token
    model = make_model("llama", tie_word_embeddings=False)
    model.get_input_embeddings().weight.data[token] = float("nan")
    model = add_adapter(model, {"r": 4}, {})
    settings = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 3, "train_sampling_strategy": "random"}
    settings |= {"max_steps": 8, "save_strategy": "steps", "save_steps": 1, "save_total_limit": None}
    trainer = BlockTrainer(model, train_arguments(tmp_path, **settings), train_dataset=Dataset.from_list(blocks))
    trainer.add_callback(CheckpointCallback(describe_step=trainer.describe_step))
    text = (
        rf"batch of train_dataset_config, block {wrong} \(source rows {100 + wrong}, {200 + wrong}\) \(counted from 0\)"
    )
    with pytest.raises(LlmTrainError, match=text):
        trainer.train()
    assert all(p.isfinite().all() for p in model.parameters() if p.requires_grad)
    newest = newest_whole_checkpoint(str(tmp_path))
    assert (trainer.state.global_step == 0) is (newest is None)
    saved = load_file(f"{newest}/adapter_model.safetensors") if newest else {}
    assert all(tensor.isfinite().all() for tensor in saved.values())


def test_step_with_finite_losses_is_described_too(tmp_path: Path) -> None:
    blocks = make_packed_dataset(40).remove_columns("example_rows")
    settings = {"max_steps": 1, "per_device_train_batch_size": 20}
    trainer = BlockTrainer(make_model("llama"), train_arguments(tmp_path, **settings), train_dataset=blocks)
    trainer.train()
    listed = ", ".join(f"block {number}" for number in range(16))
    assert trainer.describe_step() == (
        f"The losses are finite; the step was {listed} and 4 more of train_dataset_config (counted from 0)."
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_rows", [0, 1, 200])
def test_cross_entropy_in_parts_equals_the_whole(num_rows: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(num_rows, 50, generator=generator) * 5).to(dtype).requires_grad_()
    targets = torch.randint(50, (num_rows,), generator=generator)
    weights = torch.rand(num_rows, generator=generator)
    losses = _CrossEntropy.apply(logits, targets)
    (losses * weights).sum().backward()
    whole = F.cross_entropy(logits.float(), targets, reduction="none")
    (expected,) = torch.autograd.grad((whole * weights).sum(), logits)
    assert losses.dtype is torch.float32 and logits.grad is not None
    torch.testing.assert_close(losses, whole, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(logits.grad, expected)


@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed")
def test_lora_that_leaves_casting_to_autocast_trains_the_same_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for is_left, expected in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr("llm.training.tune.trainer.is_cast_by_autocast", lambda *_, answer=is_left: answer)
        torch.manual_seed(0)
        settings = {"r": 4, "lora_bias": True}  # layers of peft, not ours
        model = add_adapter(make_model("llama", initializer_range=0.1).to(torch.bfloat16), settings, {})
        calls: list[tuple[bool, torch.dtype]] = []
        layer = model.base_model.model.model.layers[0].self_attn.q_proj.lora_A["default"]
        layer.register_forward_pre_hook(
            lambda _, inputs, calls=calls: calls.append((torch.is_autocast_enabled("cpu"), inputs[0].dtype))
        )
        found.append(trained_weights(model, make_packed_dataset(40), tmp_path, bf16=True))
        assert {dtype for is_autocast, dtype in calls if is_autocast} == {expected}
    assert largest_difference(*found) == 0


@pytest.mark.parametrize("is_evaluated", [False, True])
def test_logits_of_a_bfloat16_run_stay_bfloat16(is_evaluated: bool, tmp_path: Path) -> None:
    dtypes, dataset = [], make_packed_dataset(8)
    model = add_adapter(make_model("llama", initializer_range=0.1).to(torch.bfloat16), {"r": 4}, {})
    settings = {"bf16": True, "max_steps": 2, "eval_strategy": "steps" if is_evaluated else "no", "eval_steps": 1}
    trainer = BlockTrainer(model, train_arguments(tmp_path, **settings), train_dataset=dataset, eval_dataset=dataset)
    in_evaluation, in_training = _CrossEntropy.forward, _LinearCrossEntropy.forward

    def looked_at(call: Any) -> Any:
        return lambda ctx, *tensors: (dtypes.append(tensors[0].dtype), call(ctx, *tensors))[1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_CrossEntropy, "forward", looked_at(in_evaluation))
        patch.setattr(_LinearCrossEntropy, "forward", looked_at(in_training))
        trainer.train()
    assert set(dtypes) == {torch.bfloat16} and len(dtypes) == (4 if is_evaluated else 2)
    assert all(p.dtype is torch.float32 and p.isfinite().all() for p in model.parameters() if p.requires_grad)
