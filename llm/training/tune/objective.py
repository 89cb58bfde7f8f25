"""What a model computes from the whole of a batch, which a flattened batch would change: refused, with what helps.

Called before the first step, beside the checks of the data (`data_check`).
"""

from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from llm.errors import ConfigError, MissingExtraError


def check_objective(model: PreTrainedModel) -> None:
    """ConfigError for a mixture of experts whose config asks for its router's auxiliary loss.

    That is a mean over a batch, which our loss, a sum over trained tokens, does not have.
    """
    config = model.config.get_text_config()
    if getattr(config, "output_router_logits", False):
        raise ConfigError(
            f"base_model: the config of this `{config.model_type}` says `output_router_logits: true`: it wants its "
            "router's auxiliary loss, a mean over whatever shares a batch. Training here has the loss of the trained "
            'tokens alone. If that is what you want, write `"output_router_logits": false` into the `config.json` of '
            "`base_model`."
        )


def check_rope(model: PreTrainedModel, *, longest_example: int, is_mixed: bool) -> None:
    """ConfigError where positions of short examples would depend on a long one that shares their batch.

    LongRoPE (Phi-3) turns every token of a batch by its long factors as soon as one example is longer than the
    length it was first trained for. `longest_example`: in tokens; `is_mixed`: a batch can hold several examples.
    Dynamic NTK changes beyond `max_position_embeddings` only, where `data_check` refuses all rows.
    """
    config = model.config.get_text_config()
    limit = longrope_limit(config)
    if limit is not None and longest_example > limit and is_mixed:
        raise ConfigError(
            f"base_model: `{config.model_type}` (longrope) has other positions for texts of more than {limit} tokens; "
            f"the longest example has {longest_example}, and would change those of the examples in its batch. Prepare "
            f"the data with `chunksize: {limit}`; or with `pack: false`, and set `per_device_train_batch_size: 1` and "
            "`per_device_eval_batch_size: 1`."
        )


def longrope_limit(config: PreTrainedConfig) -> int | None:
    """The length beyond which a LongRoPE model uses its long factors; None for any other model."""
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = [rope, *(kind for kind in rope.values() if isinstance(kind, dict))]  # some models have one a layer type
    limits = [
        kind.get("original_max_position_embeddings", getattr(config, "original_max_position_embeddings", None))
        for kind in kinds
        if kind.get("rope_type") == "longrope"
    ]
    return min((limit for limit in limits if limit is not None), default=None)


def liger_arguments(given: Mapping[str, Any]) -> dict[str, Any]:
    """What `use_liger_kernel: true` needs beside it: nothing of the model's forward is replaced.

    Liger's layers (rope, norms, gated linear units) are used; its fused cross entropy is called by `head`, for trained
    tokens only. Read, not run: Liger needs a GPU. Raises MissingExtraError where it is not installed, ConfigError where
    there is no GPU.
    """
    if given.get("use_liger_kernel") is not True:
        return {}
    if find_spec("liger_kernel") is None:
        raise MissingExtraError(
            "training_arguments.use_liger_kernel: liger-kernel is not installed: pip install 'llm-train[cuda]'. Or "
            "delete the key."
        )
    if not torch.cuda.is_available() or given.get("use_cpu"):
        raise ConfigError("training_arguments.use_liger_kernel: Liger's kernels need a GPU. Delete the key.")
    return {"liger_kernel_config": {"fused_linear_cross_entropy": False, **(given.get("liger_kernel_config") or {})}}


def has_liger(given: Mapping[str, Any]) -> bool:
    """Whether Liger's kernel computes the loss: on a GPU where it is installed, unless `use_liger_kernel` is false."""
    is_wanted = given.get("use_liger_kernel") is not False and not given.get("use_cpu")
    return is_wanted and torch.cuda.is_available() and find_spec("liger_kernel") is not None
