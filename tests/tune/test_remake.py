"""A tensor that is computed again for the gradient: the same results, and it is not kept."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from llm.training.tune.remake import linear, remade


def remade_square(states: Tensor, calls: list[str]) -> Tensor:
    def make(states: Tensor) -> Tensor:
        calls.append("made")
        return states * states

    return remade(states * states, make, states)


def trained(by: Callable[[Tensor, Tensor], Tensor], calls: list[str], kept: list[Tensor]) -> list[Tensor]:
    """Outputs and gradients of three layers behind one tensor, two of them trained, of a graph gone through thrice."""
    generator = torch.Generator().manual_seed(0)
    states, *weights = (
        torch.randn(*shape, generator=generator).requires_grad_() for shape in ((2, 5, 8), *[(3, 8)] * 3)
    )
    weights[1].requires_grad_(False)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        square = remade_square(states, calls)
        outputs = [by(square, weight).square() for weight in weights]
    for _ in range(3):
        torch.stack(outputs).sum().backward(retain_graph=True)
    assert all(tensor is not square for tensor in kept)
    return [*outputs, states.grad, weights[0].grad, weights[2].grad]


def library(states: Tensor, weight: Tensor) -> Tensor:
    return F.linear(states.flatten(0, -2), weight)


def test_layers_behind_a_remade_tensor_do_not_keep_it_and_train_the_same() -> None:
    calls: list[str] = []
    ours, theirs = [], []
    found, expected = trained(linear, calls, ours), trained(library, [], theirs)
    assert all(map(torch.equal, found, expected))
    assert calls == ["made"] * 3  # once for both layers, each time
    sizes = [{tensor.untyped_storage().data_ptr(): tensor.numel() for tensor in kept} for kept in (ours, theirs)]
    assert sum(sizes[1].values()) - sum(sizes[0].values()) == 2 * 5 * 8


@pytest.mark.parametrize("changes", [True, False])
def test_tensor_that_was_changed_since_is_kept(changes: bool) -> None:
    calls: list[str] = []
    states, weight = torch.ones(4, 8, requires_grad=True), torch.ones(3, 8, requires_grad=True)
    square = remade_square(states, calls)
    if changes:
        square.mul_(2)
    linear(square, weight).sum().backward()
    assert weight.grad is not None and torch.equal(weight.grad, torch.full((3, 8), 8.0 if changes else 4.0))
    assert calls == ([] if changes else ["made"])


def test_nothing_is_made_for_weights_that_are_not_trained_or_without_a_graph() -> None:
    calls: list[str] = []
    states, weight = torch.ones(4, 8, requires_grad=True), torch.ones(3, 8)
    linear(remade_square(states, calls), weight).sum().backward()
    assert torch.equal(states.grad, torch.full((4, 8), 6.0))  # type: ignore[arg-type]
    with torch.no_grad():
        assert torch.equal(linear(remade_square(states, calls), weight), torch.full((4, 3), 8.0))
    assert not calls
