"""The base model and its tokenizer, in the dtype that suits the machine: stage 6 of the road."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pickle import UnpicklingError

import torch
from accelerate import PartialState
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

from llm.errors import ConfigError, loading_reason
from llm.model_files import damaged_file
from llm.model_registry import check_hub_answers, check_is_reachable
from llm.training.config import TORCH_COMPILE_KEYS, FinetuneConfig
from llm.training.tune.attention import NODE_ATTENTION
from llm.training.tune.lean_modules import use_lean_modules
from llm.training.tune.quantization import quantization_config

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Precision:
    """The dtype of the base weights, that of autocast (None: none), and why."""

    weights: torch.dtype
    autocast: torch.dtype | None
    reason: str


def load_base_model(config: FinetuneConfig) -> PreTrainedModel:
    """The base model, quantized or not, with our attention and no KV cache (which would leak between
    examples).

    The log says which dtype and why. Raises ConfigError for a folder or hub id that cannot be loaded. Code
    that comes with a model is never run.
    """
    precision = resolve_precision(config)
    quantization = quantization_config(config)
    weights = str(precision.weights).removeprefix("torch.")
    logger.info("base_model %s: %s weights (%s)", config.base_model, weights, precision.reason)
    disable_progress_bar()  # it fills the terminal for half a second of loading
    with loading_errors(config.base_model):
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            config.base_model,
            dtype=precision.weights,
            quantization_config=quantization,
            # A quantized model cannot be moved later: it is loaded where it will train.
            device_map={"": PartialState().device} if quantization else None,
            trust_remote_code=False,
        )
    model.set_attn_implementation(NODE_ATTENTION)
    model.config.use_cache = False
    if not any(config.training_arguments.get(key) for key in TORCH_COMPILE_KEYS):  # the compiler chooses what to keep
        use_lean_modules(model)
    return model


def load_tokenizer(base_model: str) -> PreTrainedTokenizerBase:
    """The tokenizer of `base_model`; ConfigError when it cannot be loaded."""
    with loading_errors(base_model):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(base_model, trust_remote_code=False)
        return tokenizer


def resolve_precision(config: FinetuneConfig) -> Precision:
    """The dtypes of a run: what the config says, or for `auto` what the processor is fast in.

    ConfigError for float16 where it cannot train: on a CPU, or in full (the gradient scaler refuses float16
    weights).
    """
    is_cuda = torch.cuda.is_available() and not config.training_arguments.get("use_cpu")
    fast, reason = _fast_dtype(is_cuda=is_cuda)
    autocast = None if fast is torch.float32 else fast
    if config.torch_dtype != "auto":
        return _asked_precision(config, is_cuda=is_cuda, fast=fast)
    if config.lora_config is None:
        return Precision(
            weights=torch.float32,
            autocast=autocast,
            reason="full fine-tuning keeps float32 weights, since bfloat16 rounds away updates below 1/256 "
            f"of a weight; it computes in {fast} ({reason})",
        )
    return Precision(weights=fast, autocast=autocast, reason=reason)


def warn_of_slow_autocast(config: FinetuneConfig) -> None:
    """Says so when `training_arguments` ask for bfloat16 where the processor is slow in it."""
    is_cuda = torch.cuda.is_available() and not config.training_arguments.get("use_cpu")
    fast, reason = _fast_dtype(is_cuda=is_cuda)
    if config.training_arguments.get("bf16") is True and fast is not torch.bfloat16:
        logger.warning(
            "training_arguments.bf16: %s, so bfloat16 is emulated, up to 25 times slower than float32. Leave "
            "`bf16` out: the fast type is taken.",
            reason,
        )


def _asked_precision(config: FinetuneConfig, *, is_cuda: bool, fast: torch.dtype) -> Precision:
    weights: torch.dtype = getattr(torch, config.torch_dtype)
    if weights is torch.float16 and not is_cuda:
        raise ConfigError("torch_dtype: float16 trains on a GPU only. Write `auto`, `bfloat16` or `float32`.")
    if weights is torch.float16 and config.lora_config is None:
        raise ConfigError(
            "torch_dtype: float16 weights cannot be trained in full, the gradient scaler refuses them. Write "
            "`torch_dtype: float32` and `training_arguments: {fp16: true}`, or train an adapter "
            "(`lora_config`)."
        )
    if weights is torch.bfloat16 and fast is not torch.bfloat16:
        logger.warning(
            "torch_dtype: bfloat16 is emulated by this processor, up to 25 times slower than float32. `torch_dtype: "
            "auto` takes what is fast."
        )
    autocast = None if weights is torch.float32 else weights
    return Precision(weights=weights, autocast=autocast, reason="as `torch_dtype` says")


def _fast_dtype(*, is_cuda: bool) -> tuple[torch.dtype, str]:
    if is_cuda:
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return torch.bfloat16, "the GPU has bfloat16"
        return torch.float32, "the GPU has no bfloat16"
    found = torch.cpu.get_capabilities()
    units = [name for name in ("amx_bf16", "avx512_bf16", "bf16", "sve_bf16") if found.get(name)]
    if units:
        return torch.bfloat16, f"the processor has {units[0]}"
    # Emulated bfloat16: 25 times slower than float32 (SmolLM2-135M on an AMD EPYC with AVX2).
    return torch.float32, "the processor has no bfloat16 unit"


@contextmanager
def loading_errors(base_model: str) -> Iterator[None]:
    """Turns what loading from a folder or the hub raises into a ConfigError."""
    check_is_reachable(base_model)
    check_hub_answers(base_model)
    try:
        yield
    # transformers and safetensors raise these for each: unknown id, no network, odd files
    except (OSError, ValueError, SafetensorError, UnpicklingError) as error:
        if damage := damaged_file(base_model):
            raise ConfigError(f"base_model: {damage}") from error
        raise ConfigError(
            f"base_model: `{base_model}` cannot be loaded: {loading_reason(error)}\nWrite a hub id that this machine "
            "can reach (a private one needs `hf auth login`), or the path of a folder that holds the model."
        ) from error
