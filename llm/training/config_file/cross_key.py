"""What no single key shows: rules that join keys, code that is not allowed, and values that are right but doubtful.

Step of `config_file.load_config`: takes the plain data of a file, gives problems, or doubts that are only warned of.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel

from llm.errors import did_you_mean
from llm.registry import own_package
from llm.training.config import TORCH_COMPILE_KEYS, DataPrepConfig, KeyPath, default_training_arguments
from llm.training.config_file.problem import NO_REMOTE_CODE, Problem
from llm.training.tune.tracking import TRACKERS

HIGHEST_USUAL_RATE = 1e-2  # ten times what LoRA mostly takes: above, the loss mostly becomes infinite


def section_of(data: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The section of this name; empty when it is no section."""
    section = data.get(name)
    return section if isinstance(section, dict) else {}


def doubts(data: Mapping[str, Any]) -> Iterator[Problem]:
    """What is probably a mistake, with the remedy."""
    rate = section_of(data, "training_arguments").get("learning_rate")
    if isinstance(rate, int | float) and rate > HIGHEST_USUAL_RATE:
        text = (
            f"`learning_rate: {rate}` is high: with it training mostly diverges. Usual are 2e-4 (LoRA) and 2e-5 (full)."
        )
        yield Problem(path=("training_arguments", "learning_rate"), text=text)
    for key in TORCH_COMPILE_KEYS:
        if section_of(data, "training_arguments").get(key):
            text = (
                f"`{key}` compiles the model anew for every batch of other example lengths: 12 steps of a tiny model "
                "took 330 seconds instead of 1.5. The loss stays the same. Delete it."
            )
            yield Problem(path=("training_arguments", key), text=text)


def code_problems(data: Mapping[str, Any], schema: type[BaseModel]) -> Iterator[Problem]:
    """Each wish for code that comes with data, and each `module::name` of a package that `allow_code` does not name."""
    allowed = data.get("allow_code", [])
    allowed = [allowed] if isinstance(allowed, str) else allowed
    for path, section in _sections(data, schema):
        if section_of(section, "kwargs").get("trust_remote_code"):
            yield Problem(path=(*path, "kwargs", "trust_remote_code"), text=NO_REMOTE_CODE)
        method = section.get("method")
        is_code = isinstance(method, str) and path != ("experiment_tracking_config",)
        package = own_package(str(method)) if is_code else None
        if package and not (isinstance(allowed, list) and package in allowed):
            text = (
                f"`{method}` is code of the package `{package}`, which `allow_code` does not name. If you trust it, "
                f"write `allow_code: [{package}]` into this file, or `--allow-code {package}` on the command line."
            )
            yield Problem(path=(*path, "method"), text=text)


def _sections(data: Mapping[str, Any], schema: type[BaseModel]) -> Iterator[tuple[KeyPath, dict[str, Any]]]:
    """The sections that may name code, those within `sources` included."""
    for key in schema.model_fields:
        yield (key,), section_of(data, key)
    sources = data.get("sources")
    for number, source in enumerate(sources if isinstance(sources, list) else []):
        if isinstance(source, dict):
            yield ("sources", number, "source_config"), section_of(source, "source_config")


def dataprep_problems(data: Mapping[str, Any]) -> Iterator[Problem]:
    """Rows must come from somewhere; said beside all other problems of the file."""
    misspelt = [name for name in data if name not in DataPrepConfig.model_fields]
    advice = [did_you_mean(name, DataPrepConfig.model_fields) for name in misspelt]
    is_misspelt = any(one in ("Did you mean `source_config`?", "Did you mean `sources`?") for one in advice)
    if data.get("source_config") is None and not data.get("sources") and not is_misspelt:
        meaning = DataPrepConfig.model_fields["source_config"].description
        yield Problem(path=("source_config",), text=f"`source_config` is missing. {meaning}")


def finetune_problems(data: Mapping[str, Any]) -> Iterator[Problem]:
    """Rules of `finetune` that no schema sees, since they join a library's keys to ours."""
    yield from _tracker_problems(data)
    yield from _eval_problems(data)
    yield from _best_model_problems(data)
    yield from _packing_problems(data)
    quantization = section_of(data, "quantization_config")
    bits = [key for key in ("load_in_4bit", "load_in_8bit") if quantization.get(key, data.get(key)) is True]
    if data.get("quantization_config") is not None and not bits:
        text = "`quantization_config` says how to quantize, not to how many bits. Add `load_in_4bit: true`."
        yield Problem(path=("quantization_config",), text=text)
    if len(bits) == 2 and not all(data.get(key) is True for key in bits):  # that case is the schema's
        text = "`load_in_4bit` and `load_in_8bit` exclude each other, here and one level up. Keep one."
        key = next(key for key in bits if key in quantization)
        yield Problem(path=("quantization_config", key), text=text)


def _eval_problems(data: Mapping[str, Any]) -> Iterator[Problem]:
    training = section_of(data, "training_arguments")
    if data.get("eval_dataset_config") is not None:
        return
    if data.get("fail_on_leak") is True:
        text = (
            "`fail_on_leak` compares training data with evaluation data, and there is none. Add `eval_dataset_config`, "
            "or delete `fail_on_leak`."
        )
        yield Problem(path=("fail_on_leak",), text=text)
    for key in ("eval_strategy", "eval_on_start", "load_best_model_at_end"):
        value = training.get(key)
        if value is True or (key == "eval_strategy" and value in ("steps", "epoch")):
            text = f"`{key}` needs blocks to evaluate. Add `eval_dataset_config`, or delete `{key}`."
            yield Problem(path=("training_arguments", key), text=text)


def _packing_problems(data: Mapping[str, Any]) -> Iterator[Problem]:
    """What would change the loss of a batch that is flattened: NEFTune's noise, and Liger's own forward."""
    training = section_of(data, "training_arguments")
    if training.get("neftune_noise_alpha") is not None:
        text = (
            "`neftune_noise_alpha`: the Trainer scales this noise by the length of the sequence, which here is that of "
            "all examples of a batch: it would be too weak, by another factor in each batch. Delete it."
        )
        yield Problem(path=("training_arguments", "neftune_noise_alpha"), text=text)
    liger = section_of(training, "liger_kernel_config")
    for key in ("fused_linear_cross_entropy", "cross_entropy"):
        if training.get("use_liger_kernel") is True and liger.get(key) is True:
            text = (
                f"`{key}` of Liger has no effect: its fused kernel is called here, for trained tokens only. "
                f"Delete it; the other kernels (`rope`, `rms_norm`, `swiglu`) are used."
            )
            yield Problem(path=("training_arguments", "liger_kernel_config", key), text=text)


def _best_model_problems(data: Mapping[str, Any]) -> Iterator[Problem]:
    """`load_best_model_at_end` compares evaluations at checkpoints: both must fall on the same steps."""
    given = section_of(data, "training_arguments")
    metric = given.get("metric_for_best_model")
    if isinstance(metric, str) and metric.removeprefix("eval_") != "loss":
        text = (
            f"`metric_for_best_model` cannot be `{metric}`: what is measured is `eval_loss`. Write that, or delete it."
        )
        yield Problem(path=("training_arguments", "metric_for_best_model"), text=text)
    if given.get("load_best_model_at_end") is not True or data.get("eval_dataset_config") is None:
        return
    training = default_training_arguments(has_eval_dataset=True) | given
    save, evaluate = training["save_strategy"], training["eval_strategy"]
    save_steps, eval_steps = training["save_steps"], training["eval_steps"]
    text = ""
    if save not in ("best", evaluate):
        text = f"the same `save_strategy` and `eval_strategy`, not `{save}` and `{evaluate}`"
    elif save == "steps" and _are_integers(save_steps, eval_steps) and save_steps % eval_steps:
        text = f"`save_steps` ({save_steps}) to be a multiple of `eval_steps` ({eval_steps})"
    if text:
        path = ("training_arguments", "load_best_model_at_end")
        yield Problem(path=path, text=f"`load_best_model_at_end` needs {text}.")


def _are_integers(*values: Any) -> bool:
    return all(type(value) is int and value > 0 for value in values)


def _tracker_problems(data: Mapping[str, Any]) -> Iterator[Problem]:
    given = data.get("report_to")
    named: list[tuple[KeyPath, Any]] = [(("report_to",), given)]
    if isinstance(given, list):
        named = [(("report_to", place), name) for place, name in enumerate(given)]
    method = section_of(data, "experiment_tracking_config").get("method")
    for path, name in [*named, (("experiment_tracking_config", "method"), method)]:
        allowed = TRACKERS if path[0] == "experiment_tracking_config" else (*TRACKERS, "none")
        if isinstance(name, str) and name not in allowed:
            yield Problem(path=path, text=f"There is no tracker `{name}`. {did_you_mean(name, allowed)}")
