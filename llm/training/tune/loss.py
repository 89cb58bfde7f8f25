"""Token losses of a batch: logits only where there is a label, cross entropy in float32, some rows at a time.

tokens      a  b  c | d  e         labels    -100 b c | -100 e
predictor      a  b      d         of a label: the token before it, which is always of the same node
"""

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llm.training.tune.collator import IGNORE_INDEX, Batch

# Rows of logits that are float32 at once: 13 MB for 49,152 ids.
ROWS_AT_ONCE = 64
_NOT_FOR_THE_MODEL = ("labels", "num_block_labels", "blocks", "prompts", "known_nodes")


def token_losses(model: nn.Module, batch: Batch, *, has_logits_to_keep: bool, label_smoothing: float = 0.0) -> Tensor:
    """The cross entropy of each trained token, float32 (labels,), in the order of the batch; it has a
    gradient.

    A batch of no labels gives an empty tensor whose sum is a zero with a gradient, as ranks in step need it.
    `has_logits_to_keep` (see there): the model computes only the logits asked for; else they are selected
    afterwards.
    """
    inputs, (is_trained, targets) = model_inputs(batch), trained_tokens(batch)
    if has_logits_to_keep and len(is_trained) == 1:
        predictors = is_trained[0].nonzero().squeeze(1)
        logits = model(**inputs, use_cache=False, logits_to_keep=predictors).logits[0]
    else:
        logits = model(**inputs, use_cache=False).logits[:, :-1][is_trained]
    if label_smoothing:
        return F.cross_entropy(logits.float(), targets, reduction="none", label_smoothing=label_smoothing)
    losses: Tensor = _CrossEntropy.apply(logits, targets)  # type: ignore[no-untyped-call]
    return losses


def model_inputs(batch: Batch) -> Batch:
    """What of `batch` the model takes."""
    return {name: value for name, value in batch.items() if name not in _NOT_FOR_THE_MODEL}


def trained_tokens(batch: Batch) -> tuple[Tensor, Tensor]:
    """Which tokens predict a label, (rows, tokens - 1), and these labels, (labels,)."""
    following = batch["labels"][:, 1:]
    is_trained = following != IGNORE_INDEX
    return is_trained, following[is_trained]


def sums_by_block(losses: Tensor, num_block_labels: Tensor) -> Tensor:
    """The summed token losses of each block, (blocks,)."""
    return torch.stack([block.sum() for block in losses.split(num_block_labels.tolist())])


def has_logits_to_keep(model: Any) -> bool:
    """Whether the forward of the model (that inside an adapter) takes the positions whose logits are
    wanted."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return "logits_to_keep" in inspect.signature(inner.forward).parameters


def minus_one_hot(probabilities: Tensor, targets: Tensor) -> Tensor:
    """The gradient of cross entropy for logits, (rows, vocabulary), in the memory of their softmax."""
    minus_ones = probabilities.new_full((len(targets), 1), -1.0)
    return probabilities.scatter_add_(1, targets[:, None], minus_ones)


class _CrossEntropy(torch.autograd.Function):
    """`cross_entropy(logits.float(), targets, reduction="none")` that keeps no float32 copy of all logits.

    What is kept for the gradient, softmax - one-hot, is the logits as the model made them and one number a row.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        rows = logits.split(ROWS_AT_ONCE)
        log_sums = torch.cat([part.float().logsumexp(dim=1) for part in rows])
        ctx.save_for_backward(logits, targets, log_sums)
        return log_sums - logits.gather(1, targets[:, None]).squeeze(1).float()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        logits, targets, log_sums = ctx.saved_tensors
        found = torch.empty_like(logits)
        parts = (tensor.split(ROWS_AT_ONCE) for tensor in (logits, targets, log_sums, gradients[0], found))
        for some, ids, sums, gradient, out in zip(*parts, strict=True):
            share = minus_one_hot((some.float() - sums[:, None]).exp_(), ids)
            out.copy_(share.mul_(gradient[:, None]))
        return found, None
