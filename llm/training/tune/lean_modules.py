"""Modules of base model and adapter that compute the same and keep less for the backward pass: stage 6.

    RMSNorm      x / rms(x) * weight             keeps x, not its float32 copies
    GatedMLP     down(act(gate(x)) * up(x))      keeps gate(x) and up(x), not act(gate(x)) and the product
    LoraLinear   base(x) + B(A(x)) * scaling     adds where base(x) stands: no B(A(x)) of its own, no multiple, no sum;
                                                 keeps no x that a norm or an MLP makes again (`remake.py`)

What they do not keep is computed again for the gradient, or was never needed.
"""

from functools import partial
from typing import Any, cast

import torch
from peft.tuners import lora
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedModel

from llm.training.tune.remake import linear, remade


def use_lean_modules(model: PreTrainedModel) -> int:
    """Puts an RMSNorm or a GatedMLP in place of each module of `model` that gives the same, bit by bit; how many.

    The first of each class is tried on a few numbers. Weights, and the names that they are saved by, stay as they are.
    """
    is_same: dict[type[nn.Module], bool] = {}
    num_replaced = 0
    for name, module in list(model.named_modules()):
        if (lean := _lean(module)) is None:
            continue
        if type(module) not in is_same:
            is_same[type(module)] = _gives_the_same(lean, module, model.dtype)
        if is_same[type(module)]:
            model.set_submodule(name, lean)
            num_replaced += 1
    model.train(model.training)
    return num_replaced


class RMSNorm(nn.Module):
    """Llama's norm (https://arxiv.org/abs/1910.07467), that of most models: the weight multiplies what is rounded."""

    def __init__(self, norm: Any) -> None:
        """Takes the place of `norm`."""
        super().__init__()
        self.weight, self.variance_epsilon = norm.weight, norm.variance_epsilon

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(..., size) -> (..., size)."""
        output, scales = _Norm.apply(hidden_states, self.weight, self.variance_epsilon)  # type: ignore[no-untyped-call]
        return remade(output, _scaled, hidden_states, self.weight, scales)


class GatedMLP(nn.Module):
    """A layer, gated by another one, and one behind them (https://arxiv.org/abs/2002.05202)."""

    def __init__(self, mlp: Any) -> None:
        """Takes the place of `mlp`."""
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = mlp.gate_proj, mlp.up_proj, mlp.down_proj
        self.act_fn = mlp.act_fn

    def forward(self, x: Tensor) -> Tensor:
        """(..., size) -> (..., size)."""
        gate, up = self.gate_proj(x), self.up_proj(x)
        inner = _Gated.apply(gate, up, self.act_fn)  # type: ignore[no-untyped-call]
        output: Tensor = self.down_proj(remade(inner, partial(_gated, self.act_fn), gate, up))
        return output


class LoraLinear(lora.Linear):
    """PEFT's layer for plain linear layers that are not quantized; what is more than plain LoRA is left to PEFT."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """(..., in) -> (..., out)."""
        name = self._plain_adapter(x)
        if name is None or args or kwargs:
            output: Tensor = super().forward(x, *args, **kwargs)
            return output
        result: Tensor = self.base_layer(x.flatten(0, -2))
        first, second = (cast(Tensor, layers[name].weight).to(result.dtype) for layers in (self.lora_A, self.lora_B))
        inner = linear(self.lora_dropout[name](x).to(result.dtype), first)
        result.addmm_(inner, second.T, alpha=self.scaling[name])
        return result.view(*x.shape[:-1], -1)

    def _plain_adapter(self, x: Tensor) -> str | None:
        """The adapter, where it is the only one, and computed in the type of the result."""
        if self.disable_adapters or self.merged or self.lora_variant or len(self.active_adapters) != 1:
            return None
        (name,) = self.active_adapters
        base, first, second = self.base_layer, self.lora_A[name], self.lora_B[name]
        types = {x.dtype, *(layer.weight.dtype for layer in (base, first, second))}
        is_one_type = torch.is_autocast_enabled(x.device.type) or len(types) == 1
        shapes = (self.r[name], self.in_features), (self.out_features, self.r[name])
        is_whole = (first.weight.shape, second.weight.shape) == shapes  # not elsewhere (DeepSpeed's ZeRO 3)
        return name if is_one_type and is_whole and second.bias is None else None


def _lean(module: Any) -> "RMSNorm | GatedMLP | None":
    """What may take the place of `module`, by its parts."""
    parts = {name for name, _ in module.named_children()}, {name for name, _ in module.named_parameters(recurse=False)}
    is_norm = parts == (set(), {"weight"}) and hasattr(module, "variance_epsilon")
    is_mlp = parts == ({"gate_proj", "up_proj", "down_proj", "act_fn"}, set())
    if not (is_norm or is_mlp) or any(weight.is_meta or not weight.numel() for weight in module.parameters()):
        return None  # the latter is not here to be tried: DeepSpeed's ZeRO 3
    return RMSNorm(module) if is_norm else GatedMLP(module)


def _gives_the_same(lean: "RMSNorm | GatedMLP", module: nn.Module, dtype: torch.dtype) -> bool:
    weights: dict[str, Tensor] = {}
    device = next(module.parameters()).device
    if isinstance(lean, RMSNorm):
        # Other norms round later or add 1: told apart by an input that is rounded and a weight that is not.
        size, dtype = len(lean.weight), torch.bfloat16
        weights = {"weight": torch.linspace(0.9, 1.1, size, device=device)}
    else:
        size = lean.gate_proj.in_features
    few = torch.linspace(-2, 2, 2 * size, device=device, dtype=dtype).view(1, 2, size)
    was_training = module.training
    with torch.no_grad():  # and as in training: some drop out
        found, expected = (functional_call(one.train(), weights, few) for one in (lean, module))
    module.train(was_training)
    return found.dtype == expected.dtype and torch.equal(found, expected)


def _scaled(hidden: Tensor, weight: Tensor, scales: Tensor) -> Tensor:
    return weight * (hidden * scales).to(hidden.dtype)


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
        scales = torch.rsqrt(hidden.float().pow(2).mean(-1, keepdim=True) + epsilon)
        ctx.save_for_backward(hidden, weight, scales)
        ctx.mark_non_differentiable(scales)
        return _scaled(hidden, weight, scales), scales

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor | None, None]:
        hidden, weight, scales = ctx.saved_tensors
        normed, of_weight = hidden * scales, None  # float32
        if ctx.needs_input_grad[1]:
            of_weight = (gradients[0] * normed.to(hidden.dtype)).flatten(0, -2).sum(0).to(weight.dtype)
        found = (gradients[0] * weight).float()
        found = found.sub_(normed.mul_((found * normed).mean(-1, keepdim=True))).mul_(scales)
        return found.to(hidden.dtype), of_weight, None


def _gated(activation: Any, gate: Tensor, up: Tensor) -> Tensor:
    gated: Tensor = activation(gate) * up
    return gated


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, activation: Any) -> Any:
        ctx.save_for_backward(gate, up)
        ctx.activation = activation
        return _gated(activation, gate, up)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        gate, up = ctx.saved_tensors
        with torch.enable_grad():
            gate = gate.detach().requires_grad_()
            factor = ctx.activation(gate)
        factor.backward(gradients[0] * up)
        return gate.grad, gradients[0] * factor.detach(), None
