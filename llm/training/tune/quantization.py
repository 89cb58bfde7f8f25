"""A quantized base model, when the config asks for one: stage 6 of the road."""

from importlib.util import find_spec
from typing import Any

import torch
from transformers import BitsAndBytesConfig

from llm.errors import ConfigError, MissingExtraError
from llm.training.config import DTYPES, FOUR_BIT_DEFAULTS, FinetuneConfig


def quantization_config(config: FinetuneConfig) -> BitsAndBytesConfig | None:
    """How to quantize the base weights; None when they are loaded as they are, as for plain LoRA.

    `quantization_config` of the YAML is laid over the defaults of 4 bits (also when it names neither 4 nor
    8). Raises MissingExtraError without bitsandbytes, ConfigError for what it does not take.
    """
    if not config.is_quantized:
        return None
    if find_spec("bitsandbytes") is None:
        raise MissingExtraError(
            "load_in_4bit, load_in_8bit and quantization_config need bitsandbytes, which is not installed: "
            "pip install llm-train[quantization]"
        )
    settings = quantization_settings(config)
    settings |= {key: _dtype(key, value) for key, value in settings.items() if key.endswith("_dtype")}
    try:
        return BitsAndBytesConfig(**settings)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"quantization_config: BitsAndBytesConfig does not take {settings}: {error}") from error


def quantization_settings(config: FinetuneConfig) -> dict[str, Any]:
    """What `BitsAndBytesConfig` is given for a quantized base: the user's settings over the defaults."""
    given = config.quantization_config or {}
    if config.load_in_8bit or given.get("load_in_8bit"):
        return {"load_in_8bit": True, **given}
    return FOUR_BIT_DEFAULTS | given


def _dtype(key: str, value: Any) -> torch.dtype:
    name = DTYPES.get(str(value), "")
    if name in ("", "auto"):
        raise ConfigError(f"quantization_config.{key}: no dtype `{value}`. Write bfloat16, float16 or float32.")
    return getattr(torch, name)  # type: ignore[no-any-return]
