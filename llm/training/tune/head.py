"""The loss in training: summed cross entropy of the trained tokens, made in the model's head, which keeps no logits.

hidden states of predictors (n, hidden)  ->  some rows of logits  ->  their loss and their gradient, at once  ->  sum

Else n x vocabulary logits are kept for the gradient, which is as large again: 8 GB for 16,384 trained tokens and
128,256 ids in bfloat16. Here both live for ROWS_AT_ONCE rows. Liger's fused linear cross entropy does the same in
Triton (https://arxiv.org/abs/2410.10989, section 3.2) and is used on a GPU where it is installed.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llm.training.tune.collator import Batch
from llm.training.tune.loss import has_logits_to_keep, minus_one_hot, model_inputs, trained_tokens

ROWS_AT_ONCE = 256  # 50 MB of float32 logits for 49,152 ids


def find_plain_head(model: Any) -> nn.Linear | None:
    """The layer whose output is, bit by bit, what the model gives as logits: tried on a few tokens.

    None where logits are scaled or capped behind it, where it is no plain layer (adapted, quantized), and where the
    model does not take `logits_to_keep`.
    """
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear or not has_logits_to_keep(model):
        return None
    places = torch.arange(4, device=head.weight.device)[None]
    few = {"input_ids": places, "position_ids": places, "node_lengths": [4], "node_parents": [-1]}
    seen: list[Tensor] = []
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), head.register_forward_hook(lambda *call: seen.append(call[2])):
            logits = model(**few, use_cache=False).logits
    finally:
        model.train(was_training)
    return head if len(seen) == 1 and torch.equal(seen[0].float(), logits.float()) else None


def summed_losses(model: nn.Module, batch: Batch, head: nn.Linear, *, has_liger: bool = False) -> tuple[Tensor, int]:
    """The sum of the cross entropies of all trained tokens of a flattened batch, float32 (), and their number.

    `model` (or what it wraps) has the plain `head` (`find_plain_head`). The loss is computed where the model calls the
    head, and handed on in place of logits: so what wraps the model sees it as its output. `has_liger`: by its kernel.
    """
    is_trained, targets = trained_tokens(batch)
    hidden: list[Tensor] = []

    def keep_input(_: nn.Module, given: tuple[Tensor]) -> tuple[Tensor]:
        hidden.append(given[0][0])
        return (given[0][:, :0],)

    def give_loss(layer: Any, *_: Any) -> Tensor:
        return cross_entropy_sum(layer, hidden[0], targets, has_liger=has_liger).view(1, 1, 1)

    with head.register_forward_pre_hook(keep_input), head.register_forward_hook(give_loss):
        predictors = is_trained[0].nonzero().squeeze(1)
        loss = model(**model_inputs(batch), use_cache=False, logits_to_keep=predictors).logits.sum()
    return loss, len(targets)


def cross_entropy_sum(head: nn.Linear, hidden: Tensor, targets: Tensor, *, has_liger: bool = False) -> Tensor:
    """`cross_entropy(head(hidden).float(), targets, reduction="sum")`, float32 (), for hidden (tokens, hidden size).

    Under autocast the product has its type. `has_liger`: by Liger's kernel, which needs a GPU or Triton's interpreter.
    """
    kind = hidden.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
    weight, hidden = head.weight.to(dtype), hidden.to(dtype)
    bias = None if head.bias is None else head.bias.to(dtype)
    loss: Tensor
    if has_liger and len(targets):  # its kernel fails for none
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        loss = LigerFusedLinearCrossEntropyLoss(reduction="sum")(weight, hidden, targets, bias).float()
    else:
        loss = _LinearCrossEntropy.apply(weight, hidden, targets, bias)  # type: ignore[no-untyped-call]
    return loss


class _LinearCrossEntropy(torch.autograd.Function):
    """Computes the gradients for a loss of weight 1 together with the loss; what is kept is as large as the inputs."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, hidden: Tensor, targets: Tensor, bias: Tensor | None) -> Tensor:
        of_hidden = torch.empty_like(hidden)
        of_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[0] else None
        of_bias = weight.new_zeros(len(weight), dtype=torch.float32) if ctx.needs_input_grad[3] else None
        losses = [hidden.new_zeros(0, dtype=torch.float32)]
        # Made once: the system would give back and zero memory of this size for every part.
        memory = hidden.new_empty(min(ROWS_AT_ONCE, len(hidden)), len(weight), dtype=torch.float32)
        parts = (tensor.split(ROWS_AT_ONCE) for tensor in (hidden, targets, of_hidden))
        for some, ids, out in zip(*parts, strict=True):
            rounded = F.linear(some, weight, bias)
            logits = memory[: len(ids)].copy_(rounded)
            of_targets, largest = logits.gather(1, ids[:, None]), logits.amax(dim=1, keepdim=True)
            shares = logits.sub_(largest).exp_()
            sums = shares.sum(dim=1, keepdim=True)
            losses.append((sums.log() + (largest - of_targets)).squeeze(1))
            of_logits = rounded.copy_(minus_one_hot(shares.div_(sums), ids))
            torch.mm(of_logits, weight, out=out)
            if of_weight is not None:
                of_weight += of_logits.T @ some
            if of_bias is not None:
                of_bias += shares.sum(dim=0)
        ctx.save_for_backward(of_weight, of_hidden, of_bias)
        return torch.cat(losses).sum()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        of_weight, of_hidden, of_bias = (kept if kept is None else kept * gradients[0] for kept in ctx.saved_tensors)
        return of_weight, of_hidden, None, of_bias
