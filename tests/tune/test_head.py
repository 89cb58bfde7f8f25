"""The loss that is made in the head equals that of all logits, and no tensor is as large as these."""

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import ARCHITECTURES, COMMON, HEADS, make_block, make_model, make_packed_dataset
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM, TrainingArguments

from llm.training.tune.adapter import add_adapter
from llm.training.tune.attention import NODE_ATTENTION
from llm.training.tune.collator import flatten_blocks
from llm.training.tune.head import ROWS_AT_ONCE, cross_entropy_sum, find_plain_head, summed_losses
from llm.training.tune.loss import token_losses
from llm.training.tune.trainer import BlockTrainer


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_rows", [0, 1, ROWS_AT_ONCE, 2 * ROWS_AT_ONCE + 3])
def test_sum_and_gradients_equal_those_of_all_logits(num_rows: int, dtype: torch.dtype, has_bias: bool) -> None:
    torch.manual_seed(0)
    head = nn.Linear(16, 50, bias=has_bias, dtype=dtype)
    states, targets = torch.randn(num_rows, 16, dtype=dtype), torch.randint(50, (num_rows,))
    found = []
    for is_fused in (True, False):
        hidden = states.clone().requires_grad_()
        if is_fused:
            loss = cross_entropy_sum(head, hidden, targets)
        else:
            loss = F.cross_entropy(head(hidden).float(), targets, reduction="sum")
        gradients = torch.autograd.grad(loss / 3, [hidden, *head.parameters()])
        found.append([loss.detach(), *gradients])
    for ours, whole in zip(*found, strict=True):
        assert ours.dtype is whole.dtype
        torch.testing.assert_close(ours, whole, **({} if dtype is torch.float32 else {"rtol": 2e-2, "atol": 2e-2}))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_loss_made_in_the_head_is_that_of_the_logits(architecture: str) -> None:
    model, batch = make_model(architecture), flatten_blocks(list(make_packed_dataset(6)))
    head = find_plain_head(model)
    assert (head is None) == (architecture == "gemma2")  # caps its logits
    if head is None:
        return
    losses = token_losses(model, batch, has_logits_to_keep=True)
    expected = torch.autograd.grad(losses.sum(), list(model.parameters()))
    loss, num_labels = summed_losses(model, batch, head)
    found = torch.autograd.grad(loss, list(model.parameters()))
    assert num_labels == len(losses) > 50
    torch.testing.assert_close(loss, losses.sum(), rtol=1e-6, atol=0)
    whole = torch.stack([gradient.norm() for gradient in expected]).norm()
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours - theirs).norm() / theirs.norm().clamp(min=1e-2 * whole) < 1e-5
    logits = model(input_ids=batch["input_ids"][:, :3], use_cache=False).logits
    assert logits.shape[1] == 3, "the hooks are gone"


def test_loss_under_autocast_is_that_of_the_logits() -> None:
    model, batch = make_model("llama"), flatten_blocks(list(make_packed_dataset(6)))
    head = find_plain_head(model)
    assert head is not None
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = summed_losses(model, batch, head)
        losses = token_losses(model, batch, has_logits_to_keep=True)
    assert loss.dtype is torch.float32
    torch.testing.assert_close(loss, losses.sum(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("changes", [{"target_modules": ["q_proj", "lm_head"]}, {"modules_to_save": ["lm_head"]}])
def test_adapted_head_is_no_plain_one(changes: dict[str, Any]) -> None:
    assert find_plain_head(add_adapter(make_model("llama"), {"r": 4}, {})) is not None
    assert find_plain_head(add_adapter(make_model("llama"), {"r": 4, **changes}, {})) is None


@pytest.mark.parametrize(("architecture", "key"), [("cohere", "logit_scale"), ("granite", "logits_scaling")])
def test_scaled_logits_have_no_plain_head(architecture: str, key: str) -> None:
    for scale in (1.0, 0.5):
        config = AutoConfig.for_model(architecture, **COMMON | HEADS, **{key: scale})
        model = AutoModelForCausalLM.from_config(config)
        model.set_attn_implementation(NODE_ATTENTION)
        assert (find_plain_head(model) is None) == (scale != 1.0)


@pytest.mark.parametrize("settings", [{}, {"torch_compile": True}, {"label_smoothing_factor": 0.1}])
def test_trainer_makes_the_loss_in_the_head_unless_its_layers_or_loss_are_others(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    monkeypatch.setattr(
        "llm.training.tune.trainer.summed_losses", lambda *a, **k: (calls.append(k), summed_losses(*a, **k))[1]
    )
    plain = {"use_cpu": True, "report_to": "none", "remove_unused_columns": False}
    arguments = TrainingArguments(output_dir=str(tmp_path), **plain | settings)
    trainer = BlockTrainer(make_model("llama"), arguments, train_dataset=make_packed_dataset(2))
    batch = next(iter(trainer.get_train_dataloader()))
    assert trainer.compute_loss(trainer.model, batch, num_items_in_batch=1).requires_grad
    assert calls == ([{"has_liger": False}] if not settings else [])


def test_no_tensor_is_as_large_as_the_logits() -> None:
    vocabulary, lengths = 4000, [400] * 4
    model = make_model("llama", vocab_size=vocabulary, max_position_embeddings=512)
    batch = flatten_blocks([make_block(lengths, [-1] * 4)])
    head = find_plain_head(model)
    assert head is not None
    sizes = _Sizes()
    with sizes:
        loss, num_labels = summed_losses(model, batch, head)
        loss.backward()
    assert num_labels == 800
    assert sizes.largest == ROWS_AT_ONCE * vocabulary < num_labels * vocabulary


@pytest.mark.skipif(find_spec("liger_kernel") is None, reason="liger-kernel is not installed (Linux only)")
def test_liger_has_the_same_loss_and_gradients() -> None:
    script = Path(__file__).with_name("liger_head.py")
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    differences = [float(one) for one in done.stdout.split()]
    assert len(differences) == 4 and max(differences) < 1e-5


class _Sizes(TorchDispatchMode):
    """The number of elements of the largest tensor that is made."""

    largest = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else (made,):
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.numel())
        return made
