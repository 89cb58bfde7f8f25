"""Tensors that nobody keeps for a gradient, since they are quickly computed again from what is kept anyway.

normed = remade(normed, make, hidden, weight)     says that make(hidden, weight) gives it again, bit by bit
linear(normed, weight)                            keeps hidden and weight for its gradient, not normed
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

_HOW = "llm_train_remade"  # the attribute of a tensor that says how: its node in the graph, `_Remaking` and the inputs


def remade(states: Tensor, make: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """`states`, which `linear` need not keep: `make(*inputs)` gives them again."""
    setattr(states, _HOW, (states.grad_fn, _Remaking(make), inputs))
    return states


def linear(states: Tensor, weight: Tensor) -> Tensor:
    """(tokens, out) of `states` (..., in) and `weight` (out, in); their types are the same."""
    node, remaking, inputs = getattr(states, _HOW, (None, None, ()))
    rows = states.flatten(0, -2)
    if node is None or node is not states.grad_fn:  # the latter: changed in place since
        return F.linear(rows, weight)
    output: Tensor = _Linear.apply(rows, weight, remaking, *inputs)  # type: ignore[no-untyped-call]
    return output


class _Remaking:
    """Makes a tensor once for all who ask for it in a backward pass."""

    def __init__(self, make: Callable[..., Tensor]) -> None:
        self.num_users = 0
        self._make, self._num_waiting = make, 0
        self._made: Tensor | None = None

    def __call__(self, *inputs: Tensor) -> Tensor:
        if self._made is None:
            self._made, self._num_waiting = self._make(*inputs), self.num_users
        made = self._made
        self._num_waiting -= 1
        if not self._num_waiting:
            self._made = None
        return made


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, remaking: _Remaking, *inputs: Tensor) -> Tensor:
        ctx.save_for_backward(weight, *inputs)
        ctx.remaking = remaking
        remaking.num_users += ctx.needs_input_grad[1]
        return F.linear(rows, weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        weight, *inputs = ctx.saved_tensors
        of_rows = gradients[0] @ weight if ctx.needs_input_grad[0] else None
        of_weight = None
        if ctx.needs_input_grad[1]:
            of_weight = gradients[0].T @ ctx.remaking(*inputs).flatten(0, -2)
        return of_rows, of_weight, None, *[None] * len(inputs)
