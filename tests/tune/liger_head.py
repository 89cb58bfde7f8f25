"""Prints how much loss and gradients by Liger's kernel differ from ours; started by `test_head.py`.

Triton's interpreter runs the kernel on the CPU; it must be chosen before Triton is imported.
"""

import os
import sys

os.environ["TRITON_INTERPRET"] = "1"

import torch

from llm.training.tune.head import cross_entropy_sum


def main() -> None:
    torch.manual_seed(0)
    head, targets = torch.nn.Linear(16, 90), torch.randint(90, (70,))
    states = torch.randn(70, 16)
    found = []
    for has_liger in (True, False):
        head.zero_grad()
        hidden = states.clone().requires_grad_()
        loss = cross_entropy_sum(head, hidden, targets, has_liger=has_liger)
        (loss / 7).backward()
        found.append([loss.detach(), hidden.grad, head.weight.grad.clone(), head.bias.grad.clone()])
    assert "liger_kernel" in sys.modules
    print(*(float((liger - ours).norm() / ours.norm()) for liger, ours in zip(*found, strict=True)))


if __name__ == "__main__":
    main()
