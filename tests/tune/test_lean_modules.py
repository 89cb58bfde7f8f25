"""Lean modules give what those of the libraries give, outputs and gradients, and keep less."""

from collections import Counter
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners import lora
from tiny_models import ARCHITECTURES, HEADS, VOCAB_SIZE, make_plain_model
from torch import Tensor, nn

from llm.training.tune.adapter import add_adapter
from llm.training.tune.lean_modules import GatedMLP, LoraLinear, RMSNorm, use_lean_modules

# Of two layers: two norms of each (four of Qwen 3's, which norms queries and keys), one behind them, and two MLPs.
REPLACED = {
    "llama": {RMSNorm: 5, GatedMLP: 2},
    "qwen2": {RMSNorm: 5, GatedMLP: 2},
    "qwen3": {RMSNorm: 9, GatedMLP: 2},
    "mistral": {RMSNorm: 5, GatedMLP: 2},
    "smollm3": {RMSNorm: 5, GatedMLP: 2},
    "phi3": {RMSNorm: 5},
    "gemma2": {GatedMLP: 2},  # its norm rounds later, and adds 1 to the weight
    "gemma3_text": {GatedMLP: 2},
    "gpt_neox": {},
    "opt": {},
}
IDS = torch.arange(3, 63).view(2, 30) % VOCAB_SIZE


def trained(model: Any, *, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Logits, and the gradient of each trained weight; under autocast in `dtype`."""
    model.zero_grad()
    with torch.autocast("cpu", dtype, enabled=dtype is not None):
        logits = model(input_ids=IDS, use_cache=False).logits
    nn.functional.cross_entropy(logits.float().flatten(0, 1), IDS.roll(-1).flatten()).backward()
    gradients = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    return {"logits": logits.detach()} | gradients


def with_lora(architecture: str, *, is_lean: bool, dtype: torch.dtype | None = None, **settings: Any) -> PeftModel:
    """A model with random adapters, the same whether ours or the library's."""
    model = make_plain_model(architecture).to(dtype)
    settings = {"r": 4, "lora_alpha": 12, "target_modules": "all-linear", "init_lora_weights": False} | settings
    if is_lean:
        use_lean_modules(model)
    torch.manual_seed(1)
    adapted = add_adapter(model, settings, {}) if is_lean else get_peft_model(model, LoraConfig(**settings))
    assert isinstance(adapted, PeftModel)
    assert any(type(module) is LoraLinear for module in adapted.modules()) is is_lean
    return adapted


def errors(found: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """How far each tensor is from the expected one, relative to the largest of its kind (logits, gradients)."""
    assert found.keys() == expected.keys() and len(found) > 5
    most = max(float(tensor.norm()) for name, tensor in expected.items() if name != "logits")
    sizes = {name: float(tensor.norm()) if name == "logits" else most for name, tensor in expected.items()}
    return {name: float((found[name] - expected[name]).norm()) / size for name, size in sizes.items()}


@pytest.mark.parametrize("architecture", REPLACED)
def test_lean_model_trains_as_the_library_has_it_and_saves_the_same_names(architecture: str) -> None:
    model = make_plain_model(architecture)
    expected, names = trained(model), list(model.state_dict())
    assert use_lean_modules(model) == sum(REPLACED[architecture].values())
    kinds = Counter(type(module) for module in model.modules())
    assert {kind: kinds[kind] for kind in (RMSNorm, GatedMLP) if kinds[kind]} == REPLACED[architecture]
    found = trained(model)
    assert torch.equal(found["logits"], expected["logits"])
    assert max(errors(found, expected).values()) < 1e-6
    assert list(model.state_dict()) == names


def test_norm_that_rounds_later_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ARCHITECTURES, "olmo2", HEADS)
    for dtype in (torch.float32, torch.bfloat16):
        model = make_plain_model("olmo2").to(dtype)
        assert any(hasattr(module, "variance_epsilon") for module in model.modules())
        assert use_lean_modules(model) == 2
        assert not any(isinstance(module, RMSNorm) for module in model.modules())


def test_mlp_that_drops_out_in_training_stays() -> None:
    model = make_plain_model("llama")
    mlp = model.model.layers[0].mlp
    model.model.layers[0].mlp = DroppingMLP(GatedMLP(mlp))
    model.model.layers[0].mlp.eval()
    assert use_lean_modules(model) == 6
    assert type(model.model.layers[0].mlp) is DroppingMLP
    assert not any(module.training for module in model.modules())


class DroppingMLP(GatedMLP):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(super().forward(x), 0.5, self.training)


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt_neox"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_rslora": True},
        {"use_dora": True},
        {"lora_bias": True},
        {"rank_pattern": {"down_proj|dense_4h_to_h": 2}},
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed")
def test_lean_lora_trains_as_the_library_has_it(architecture: str, settings: dict[str, Any]) -> None:
    expected = trained(with_lora(architecture, is_lean=False, **settings))
    found = trained(with_lora(architecture, is_lean=True, **settings))
    assert max(errors(found, expected).values()) < 1e-5


def test_lean_lora_in_bfloat16_is_rounded_no_more_than_the_library() -> None:
    exact = trained(with_lora("llama", is_lean=False))
    theirs, ours = (
        errors(trained(with_lora("llama", is_lean=is_lean), dtype=torch.bfloat16), exact) for is_lean in (False, True)
    )
    assert theirs["logits"] > 1e-3 and ours["logits"] < 1.05 * theirs["logits"]
    assert sum(ours.values()) < 1.05 * sum(theirs.values())


def test_lean_lora_leaves_to_peft_what_is_not_plain() -> None:
    ours, theirs = (with_lora("llama", is_lean=is_lean) for is_lean in (True, False))
    with torch.no_grad():
        base = make_plain_model("llama")(IDS).logits
        with ours.disable_adapter():
            assert torch.equal(ours(IDS).logits, base)
        for model in (ours, theirs):
            model.merge_adapter()
        assert torch.equal(ours(IDS).logits, theirs(IDS).logits)
        # A base of 16 bits and an adapter of 32, without autocast: PEFT computes the adapter in 32.
        mixed = [with_lora("llama", is_lean=is_lean, dtype=torch.bfloat16) for is_lean in (True, False)]
        assert {weight.dtype for weight in mixed[0].parameters()} == {torch.bfloat16, torch.float32}
        assert torch.equal(mixed[0](IDS).logits, mixed[1](IDS).logits)


@pytest.mark.parametrize("part", ["lora_A", "lora_B"])
def test_lean_lora_leaves_to_peft_weights_that_lie_elsewhere(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = with_lora("llama", is_lean=True)
    calls: list[int] = []
    monkeypatch.setattr(lora.Linear, "forward", lambda layer, x: calls.append(0) or layer.base_layer(x))
    model(IDS)
    assert not calls
    layer = next(module for module in model.modules() if isinstance(module, LoraLinear))
    weight = getattr(layer, part)["default"].weight
    weight.data = weight.new_empty(0)  # as DeepSpeed's ZeRO 3 has it until the layer itself is called
    model(IDS)
    assert len(calls) == 1


def test_lean_modules_keep_less_for_the_backward_pass() -> None:
    sizes = [kept_bytes(with_lora("llama", is_lean=is_lean, dtype=torch.bfloat16)) for is_lean in (True, False)]
    assert sizes[0] < 0.55 * sizes[1]


def kept_bytes(model: nn.Module) -> int:
    """What the forward pass keeps, without the weights."""
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), torch.autocast("cpu"):
        logits = model(IDS).logits  # while it lives no address is given to another one
    assert logits.requires_grad
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    return sum(size for address, size in kept.items() if address not in weights)
