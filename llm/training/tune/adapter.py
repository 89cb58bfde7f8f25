"""LoRA on the right modules, or the whole model for full fine-tuning: stage 6 of the road."""

import logging
import re
import warnings
from collections.abc import Iterable
from dataclasses import fields
from typing import Any

from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from torch import nn
from transformers import PreTrainedModel

from llm.errors import ConfigError, did_you_mean
from llm.training.tune.lean_modules import LoraLinear

logger = logging.getLogger(__name__)


def add_adapter(
    model: PreTrainedModel, lora_config: dict[str, Any] | None, defaults: dict[str, Any]
) -> PreTrainedModel | PeftModel:
    """`model` with a LoRA adapter, of which only the adapter trains; `model` itself when `lora_config` is
    None.

    `lora_config` is laid over `defaults` (those of the base model, `find_model`). A quantized base has its
    norms and embeddings turned to float32 first. Raises ConfigError for a key that `LoraConfig` has not, and
    for every name of `target_modules` and `modules_to_save` that no module has.
    """
    if lora_config is None:
        return model
    settings = {"target_modules": "all-linear", **defaults, **lora_config, "task_type": "CAUSAL_LM"}
    _check_keys(settings)
    for key in ("target_modules", "modules_to_save"):
        _check_names(model, key, settings.get(key))
    if getattr(model.config, "tie_word_embeddings", False):
        # Else peft unties embeddings that are among `modules_to_save`.
        settings.setdefault("ensure_weight_tying", bool(settings.get("modules_to_save")))
    if getattr(model, "is_quantized", False):
        # Checkpointing follows `training_arguments`, not the quantization.
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    try:
        config = LoraConfig(**settings)
        if not getattr(model, "is_quantized", False):
            # https://huggingface.co/docs/peft/developer_guides/custom_models; nothing of it is saved
            config._register_custom_module({nn.Linear: LoraLinear})
        with warnings.catch_warnings():
            # peft 0.21.2 reads a name that transformers 5.23 renamed; delete when peft does not.
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
            adapted = get_peft_model(model, config)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"lora_config: {error}") from error
    trained, total = adapted.get_nb_trainable_parameters()
    logger.info("LoRA trains %s of %s weights (%.2f%%).", f"{trained:,}", f"{total:,}", 100 * trained / total)
    return adapted


def linear_module_names(model: nn.Module) -> list[str]:
    """The last name of each linear module, without repetition: what `target_modules` may say."""
    return sorted({name.rsplit(".", 1)[-1] for name, module in model.named_modules() if _is_linear(module)})


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"  # GPT-2's linear layer


def _check_keys(settings: dict[str, Any]) -> None:
    known = {field.name for field in fields(LoraConfig)}
    for key in settings:
        if key not in known:
            raise ConfigError(f"lora_config: `LoraConfig` has no `{key}`. {did_you_mean(key, known)}")


def _check_names(model: nn.Module, key: str, names: str | Iterable[str] | None) -> None:
    """ConfigError for each listed name that is neither a module's name nor its end; peft would ignore it."""
    if names is None or names == "all-linear":
        return
    modules = [name for name, _ in model.named_modules()]
    if isinstance(names, str):  # a pattern of the whole name, for peft
        if not any(re.fullmatch(names, module) for module in modules):
            raise ConfigError(
                f"lora_config.{key}: no module of this model matches `{names}`. Its linear modules: "
                f"{', '.join(linear_module_names(model))}. As a list, `[{names}]`, these would be names."
            )
        return
    unmatched = [n for n in names if not any(m == n or m.endswith(f".{n}") for m in modules)]
    if unmatched:
        allowed = linear_module_names(model)
        near = " ".join(did_you_mean(name, {m.rsplit(".", 1)[-1] for m in modules if m}) for name in unmatched)
        raise ConfigError(
            f"lora_config.{key}: no module of this model is called {', '.join(f'`{n}`' for n in unmatched)}. "
            f"{near}\nIts linear modules: {', '.join(allowed)}."
        )
