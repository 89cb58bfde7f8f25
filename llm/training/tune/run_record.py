"""What made a run: recorded in the manifest of each checkpoint, compared when one is resumed. Stage 8 of the road.

    {"id": "5f3a...",                   the run: new when one starts anew, kept when it goes on
     "config": {...}, "config_hash": "...", "versions": {"torch": "2.13.0", ...},
     "settings": {"base_model": "sha256 9c1d...", "train_dataset_config": "97 blocks, sha256 04be...",
                  "world_size": 2, "lora_config": {"r": 16, ...}, "training_arguments": {"seed": 42, ...}, ...}}

Only `settings` are compared: the Trainer would go on with other ones in silence.
"""

import hashlib
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from datasets import Dataset
from huggingface_hub import try_to_load_from_cache
from transformers import PreTrainedTokenizerBase, TrainingArguments

from llm.errors import ConfigError, did_you_mean
from llm.model_registry import find_model
from llm.stored_tokenizer import installed_version
from llm.tokenizer import tokenizer_fingerprint
from llm.training.config import FinetuneConfig
from llm.training.config_file import saved_data
from llm.training.prep.arrays import flatten_lists
from llm.training.tune.base_model import resolve_precision
from llm.training.tune.collator import COLUMNS
from llm.training.tune.quantization import quantization_settings

logger = logging.getLogger(__name__)
RECORDED_PACKAGES = ("llm-train", "torch", "transformers", "peft", "accelerate", "tokenizers", "safetensors")
# A resumed run has these from the optimizer's state, whatever the config says.
FROM_CHECKPOINT = ("learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon")
DATA_ORDER = (
    "seed",
    "data_seed",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "train_sampling_strategy",
    "dataloader_drop_last",
    "ignore_data_skip",
    "accelerator_config",
    "parallelism_config",
    "fsdp",
    "deepspeed",
)
SCHEDULE = ("max_steps", "num_train_epochs", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps")
OBJECTIVE = (
    "optim",
    "optim_args",
    "optim_target_modules",
    "max_grad_norm",
    "label_smoothing_factor",
    "neftune_noise_alpha",
    "average_tokens_across_devices",
    "bf16",
    "fp16",
)
# With another value of one of these it is another run, not the same with a changed setting.
IDENTITY = ("base_model", "train_dataset_config", "tokenizer", "lora_config")
_SAMPLED_BYTES = 2**20
_BLOCKS_AT_ONCE = 1000

Difference = tuple[str, Any, Any]
"""A key as `--set` writes it, its value in the checkpoint, its value now."""


def run_record(
    config: FinetuneConfig, arguments: TrainingArguments, *, blocks: Dataset, tokenizer: PreTrainedTokenizerBase
) -> dict[str, Any]:
    """The record of a run, without its `id`; plain JSON. Reads all of `blocks` once (30 million tokens a second)."""
    plain = config.model_dump(mode="json")
    given = arguments.to_dict()
    training = {name: given.get(name) for name in (*FROM_CHECKPOINT, *DATA_ORDER, *SCHEDULE, *OBJECTIVE)}
    if given["max_steps"] > 0:
        del training["num_train_epochs"]  # it has no effect then
    lora = config.lora_config
    record = {
        "config": saved_data(config),
        "config_hash": hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest(),
        "world_size": arguments.world_size,
        "versions": package_versions(),
        "settings": {
            "base_model": base_model_fingerprint(config.base_model),
            "train_dataset_config": blocks_fingerprint(blocks),
            "tokenizer": tokenizer_fingerprint(tokenizer),
            "torch_dtype": config.torch_dtype if config.torch_dtype != "auto" else _fast_dtype(config),
            "quantization_config": quantization_settings(config) if config.is_quantized else None,
            "lora_config": None if lora is None else find_model(config.base_model).lora_config | lora,
            "world_size": arguments.world_size,
            "training_arguments": training,
        },
    }
    found: dict[str, Any] = json.loads(json.dumps(record, default=str))
    return found


def check_record(
    checkpoint: str, recorded: dict[str, Any], record: dict[str, Any], *, step: int, allow_changed: list[str]
) -> None:
    """Compares the record in `checkpoint`, of `step`, with that of the run that is to go on from it.

    ConfigError names every setting that changes the data order or the objective, unless `allow_changed` names
    it, and a `max_steps` that was passed already. Other versions, and what the checkpoint overrules, are told.
    """
    if "settings" not in recorded:
        logger.warning("%s does not say what made it: whether this config fits cannot be checked.", checkpoint)
        return
    _check_names(allow_changed, record["settings"])
    changed, has_no_effect, allowed = [], [], []
    for difference in _differences(recorded["settings"], record["settings"]):
        if difference[0].rsplit(".", 1)[-1] in FROM_CHECKPOINT:
            has_no_effect.append(difference)
        elif _names_of(difference[0]) & set(allow_changed):
            allowed.append(difference)
        else:
            changed.append(difference)
    if changed:
        raise ConfigError(_refusal(checkpoint, changed, recorded, record))
    max_steps = record["settings"]["training_arguments"]["max_steps"]
    if 0 < max_steps < step:
        raise ConfigError(passed_text(checkpoint, step=step, last_step=max_steps))
    for key, old, new in has_no_effect:
        logger.warning(
            "`%s: %s` has no effect: a resumed run keeps the %s of %s, in its optimizer state. To train with another "
            "value, start anew: another `local_output`, or `resume_from_checkpoint: false`.",
            key,
            _shown(new),
            _shown(old),
            checkpoint,
        )
    for difference in allowed:
        logger.warning(
            "Going on from %s with another setting, as `allow_changed` says: %s", checkpoint, _line(difference)
        )
    _tell_versions(checkpoint, recorded.get("versions", {}), record["versions"])


def passed_text(checkpoint: str, *, step: int, last_step: int) -> str:
    """Why a run of `last_step` steps cannot go on from a later step."""
    return (
        f"`{checkpoint}` has trained {step} steps, this config ends after {last_step} "
        "(training_arguments: max_steps, num_train_epochs). Name an earlier checkpoint in `resume_from_checkpoint`, or "
        "start anew with another `local_output`."
    )


def blocks_fingerprint(blocks: Dataset) -> str:
    """`97 blocks, sha256 04be...`: number and hash of what the model trains on, the same for every file format."""
    digests = {name: hashlib.sha256() for name in COLUMNS}
    for table in blocks.select_columns(list(COLUMNS)).with_format("arrow").iter(batch_size=_BLOCKS_AT_ONCE):
        for name, digest in digests.items():
            values, lengths = flatten_lists(table[name])
            digest.update(values.tobytes())
            digest.update(lengths.tobytes())
    whole = hashlib.sha256(b"".join(digest.digest() for digest in digests.values()))
    return f"{len(blocks)} blocks, sha256 {whole.hexdigest()[:32]}"


def base_model_fingerprint(base_model: str) -> str:
    """What tells this base model from others: the commit of a hub id; of a folder a hash of its config and of names,
    sizes, heads and tails of its weight files (weights of 16 GB take no longer than small ones).
    """
    folder = Path(base_model)
    if not folder.is_dir():
        cached = [try_to_load_from_cache(base_model, name) for name in ("config.json", "tokenizer_config.json")]
        commits = [Path(path).parent.name for path in cached if isinstance(path, str)]
        return f"{base_model}, commit {commits[0]}" if commits else base_model
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.name == "config.json" or path.suffix in (".safetensors", ".bin"):
            digest.update(f"{path.name} {path.stat().st_size} ".encode())
            with open(path, "rb") as file:
                digest.update(file.read(_SAMPLED_BYTES))
                file.seek(max(0, path.stat().st_size - _SAMPLED_BYTES))
                digest.update(file.read())
    return f"sha256 {digest.hexdigest()[:32]}"


def package_versions() -> dict[str, str | None]:
    """The versions of what trains; None for what is not installed as a package."""
    return {name: installed_version(name) for name in RECORDED_PACKAGES}


def _fast_dtype(config: FinetuneConfig) -> str:
    return str(resolve_precision(config).weights).removeprefix("torch.")


def _differences(old: Any, new: Any, key: str = "") -> Iterator[Difference]:
    if isinstance(old, dict) and isinstance(new, dict):
        # A key of ours that only one version of this program records says nothing about the run.
        is_ours = key in ("", "training_arguments")
        for name in sorted(old.keys() & new.keys() if is_ours else old.keys() | new.keys()):
            yield from _differences(old.get(name), new.get(name), f"{key}.{name}" if key else name)
    elif old != new:
        yield key, old, new


def _names_of(key: str) -> set[str]:
    """What `allow_changed` may call `key`: itself, its last part, or a section that it is in."""
    parts = key.split(".")
    return {parts[-1]} | {".".join(parts[:length]) for length in range(1, len(parts) + 1)}


def _check_names(allow_changed: list[str], settings: dict[str, Any]) -> None:
    known = {name for key in _leaves(settings) for name in _names_of(key)}
    for name in allow_changed:
        if name not in known and not name.startswith(("lora_config.", "quantization_config.")):
            raise ConfigError(f"allow_changed: `{name}` is not compared. {did_you_mean(name, known)}")


def _leaves(value: Any, key: str = "") -> Iterator[str]:
    if isinstance(value, dict) and value:
        for name, inner in value.items():
            yield from _leaves(inner, f"{key}.{name}" if key else name)
    else:
        yield key


def _refusal(checkpoint: str, changed: list[Difference], recorded: dict[str, Any], record: dict[str, Any]) -> str:
    keys = [key for key, _, _ in changed]
    identity = [key for key in keys if key in IDENTITY]
    what = f"is of another run: its {' and '.join(identity)} differ" if identity else "is of a run with other settings"
    lines = "\n".join(f"- {_line(difference)}{_paths(difference[0], recorded, record)}" for difference in changed)
    return (
        f"`{checkpoint}` {what}. Going on from it would mix the two:\n{lines}\n"
        "Write the old values to go on; or start anew with another `local_output`, or with "
        "`resume_from_checkpoint: false`, which keeps the old checkpoints aside; or, if the change is meant, "
        f"`allow_changed: [{', '.join(keys)}]`."
    )


def _line(difference: Difference) -> str:
    key, old, new = difference
    return f"{key}: {_shown(old)} in the checkpoint, {_shown(new)} now"


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _paths(key: str, recorded: dict[str, Any], record: dict[str, Any]) -> str:
    """Where old and new come from, for what is compared by its content."""
    old, new = recorded.get("config", {}).get(key), record["config"].get(key)
    is_by_content = key in ("base_model", "train_dataset_config")
    return f" ({_shown(old)}, {_shown(new)})" if is_by_content and old != new else ""


def _tell_versions(checkpoint: str, old: dict[str, Any], new: dict[str, Any]) -> None:
    names = [name for name in sorted(old.keys() & new.keys()) if old[name] != new[name]]
    if names:
        listed = ", ".join(f"{name} {old[name]} -> {new[name]}" for name in names)
        logger.warning(
            "%s was written by other versions (%s): the weights may differ in their last bits.", checkpoint, listed
        )
