"""What is known of a base model by its name: prompt format, maximum length, LoRA defaults.

A model that is not listed is tuned all the same: with its tokenizer's own chat template if it has one, else as plain
text.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llm.errors import ConfigError

# All linear layers at a moderate rank match full fine-tuning on small data sets, attention alone does not
# (https://thinkingmachines.ai/blog/lora/).
LORA_DEFAULTS: dict[str, Any] = {
    "r": 16,
    "lora_alpha": 32,
    "lora_dropout": 0.05,
    "target_modules": "all-linear",
}


@dataclass(frozen=True, kw_only=True)
class KnownModel:
    """`prompt_format`: of `PROMPT_FORMATS`, None = by the tokenizer; `max_length`: tokens, None = unknown."""

    prompt_format: str | None = None
    max_length: int | None = None
    lora_config: dict[str, Any] = field(default_factory=lambda: dict(LORA_DEFAULTS))


# Patterns of the last part of a hub id or path, in lower case; the first that matches wins.
_MODELS: tuple[tuple[str, KnownModel], ...] = (
    (r"smollm2-.*instruct", KnownModel(prompt_format="SmolLM2Format", max_length=8192)),
    (r"llama-2-7b-32k-instruct", KnownModel(prompt_format="TogetherLlama2Format", max_length=32768)),
    (r"llama-2-.*chat.*", KnownModel(prompt_format="Llama2Format", max_length=4096)),
    (r"llama-2-7b-32k", KnownModel(prompt_format="PlainFormat", max_length=32768)),
    (r"llama-2-.*", KnownModel(prompt_format="PlainFormat", max_length=4096)),
    (r"meta-llama-3-.*instruct", KnownModel(prompt_format="Llama3Format", max_length=8192)),
    (r"meta-llama-3-.*", KnownModel(prompt_format="PlainFormat", max_length=8192)),
    (r"vicuna-.*-v1\.5", KnownModel(prompt_format="VicunaFormat", max_length=4096)),
    (r"vicuna-.*-v1\.5-16k", KnownModel(prompt_format="VicunaFormat", max_length=16384)),
    (r"vicuna-.*-v1\.[13]", KnownModel(prompt_format="VicunaFormat", max_length=2048)),
    (r"mistral-7b-instruct-v0\.[12]", KnownModel(prompt_format="MistralV1Format", max_length=32768)),
    (r"mistral-7b-instruct-v0\.3", KnownModel(prompt_format="MistralFormat", max_length=32768)),
    (r"zephyr-7b-(alpha|beta)", KnownModel(prompt_format="ZephyrFormat", max_length=32768)),
    (r"qwen2\.5-(coder-)?[\d.]+b-instruct", KnownModel(prompt_format="QwenFormat", max_length=32768)),
    (r"gemma(-1\.1|-2)?-\d+b-it", KnownModel(prompt_format="GemmaFormat", max_length=8192)),
    (r"phi-3-mini-4k-instruct", KnownModel(prompt_format="PhiFormat", max_length=4096)),
    (r"redpajama-incite-.*chat.*", KnownModel(prompt_format="RedpajamaFormat", max_length=2048)),
    (r"dolly-v[12]-.*", KnownModel(prompt_format="DollyFormat", max_length=2048)),
)

_HUB_SECONDS = 10


def find_model(base_model: str) -> KnownModel:
    """What is known of `base_model` (hub id or folder); else an empty `KnownModel` with the LoRA defaults."""
    name = base_model.rstrip("/").rsplit("/", 1)[-1].lower()
    matches = (known for pattern, known in _MODELS if re.fullmatch(pattern, name))
    return next(matches, KnownModel())


def check_is_reachable(base_model: str) -> None:
    """ConfigError when `base_model` looks like a path and is none; a hub id is left to the hub."""
    is_path = base_model.startswith((".", "/", "~")) or base_model.endswith("/") or base_model.count("/") > 1
    if is_path and not Path(base_model).is_dir():
        raise ConfigError(
            f"base_model: there is no folder `{base_model}` (looked in {Path.cwd()}). "
            "Give a folder that holds a model, or a hub id such as `Qwen/Qwen2.5-0.5B-Instruct`."
        )


def check_hub_answers(base_model: str) -> None:
    """ConfigError at once for a hub id that is not in the cache while the hub cannot be reached.

    The libraries would try for a minute. What the hub answers (unknown, private) is left to them to tell.
    """
    if Path(base_model).is_dir():
        return
    from huggingface_hub import HfApi, constants, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError

    try:
        is_here = isinstance(try_to_load_from_cache(base_model, "config.json"), str)
        if not is_here and not constants.HF_HUB_OFFLINE:
            HfApi().model_info(base_model, timeout=_HUB_SECONDS)
    except (HfHubHTTPError, ValueError):  # an answer, or no hub id at all
        return
    except Exception as error:  # the network's errors have no common class over the versions of the hub's library
        raise ConfigError(
            f"base_model: `{base_model}` is no folder here (looked in {Path.cwd()}), and the model hub "
            f"{constants.ENDPOINT} cannot be reached: {error}. Give a folder that holds a model; or copy this one "
            f"from a machine that is connected: hf download {base_model} --local-dir FOLDER"
        ) from error
