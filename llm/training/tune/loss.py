"""Token losses of a batch: logits only where there is a label, cross entropy in float32.

tokens      a  b  c | d  e         labels    -100 b c | -100 e
predictor      a  b      d         of a label: the token before it, which is always of the same node
"""

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llm.training.tune.collator import IGNORE_INDEX, Batch

NOT_FOR_THE_MODEL = ("labels", "num_block_labels", "blocks")


def token_losses(model: nn.Module, batch: Batch, *, has_logits_to_keep: bool, label_smoothing: float = 0.0) -> Tensor:
    """The cross entropy of each trained token, float32 (labels,), in the order of the batch; it has a
    gradient.

    A batch of no labels gives an empty tensor whose sum is a zero with a gradient, as ranks in step need it.
    `has_logits_to_keep` (see there): the model computes only the logits asked for; else they are selected
    afterwards.
    """
    inputs = {name: value for name, value in batch.items() if name not in NOT_FOR_THE_MODEL}
    is_trained = batch["labels"][:, 1:] != IGNORE_INDEX
    targets = batch["labels"][:, 1:][is_trained]
    if has_logits_to_keep and len(is_trained) == 1:
        predictors = is_trained[0].nonzero().squeeze(1)
        logits = model(**inputs, use_cache=False, logits_to_keep=predictors).logits[0]
    else:
        logits = model(**inputs, use_cache=False).logits[:, :-1][is_trained]
    return F.cross_entropy(logits.float(), targets, reduction="none", label_smoothing=label_smoothing)


def sums_by_block(losses: Tensor, num_block_labels: Tensor) -> Tensor:
    """The summed token losses of each block, (blocks,)."""
    return torch.stack([block.sum() for block in losses.split(num_block_labels.tolist())])


def has_logits_to_keep(model: Any) -> bool:
    """Whether the forward of the model (that inside an adapter) takes the positions whose logits are
    wanted."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return "logits_to_keep" in inspect.signature(inner.forward).parameters
