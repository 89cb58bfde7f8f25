"""The keys of the library sections: read from the sources, they equal what the libraries really take."""

import dataclasses
import inspect
from typing import Any

import pytest

from llm.errors import MissingExtraError
from llm.training.config import default_training_arguments
from llm.training.config_file import library_keys
from llm.training.config_file.library_keys import keys_of, problems_of
from llm.training.config_file.library_rules import CHOICES, LIMITS, RENAMED, SET_ELSEWHERE


def problem(section: str, **values: Any) -> str:
    """The text of the one problem that `values` have."""
    ((_, text),) = problems_of(section, values)
    return text


def test_keys_of_each_section_equal_those_of_the_imported_class() -> None:
    from peft import LoraConfig
    from transformers import BitsAndBytesConfig, TrainingArguments

    for section, cls in (("training_arguments", TrainingArguments), ("lora_config", LoraConfig)):
        names = {field.name for field in dataclasses.fields(cls) if field.init}
        assert len(names) > 30
        assert set(keys_of(section)) == names
    parameters = set(inspect.signature(BitsAndBytesConfig).parameters) - {"kwargs"}
    assert set(keys_of("quantization_config")) == parameters


def test_keys_of_enums_equal_those_of_the_imported_library() -> None:
    from transformers import SchedulerType
    from transformers.training_args import OptimizerNames

    keys = keys_of("training_arguments")
    assert set(keys["optim"].choices) == {item.value for item in OptimizerNames}
    assert set(keys["lr_scheduler_type"].choices) == {item.value for item in SchedulerType}
    assert set(keys["train_sampling_strategy"].choices) >= {"random", "group_by_length"}
    assert keys_of("lora_config")["bias"].choices == ("none", "all", "lora_only")


def test_keys_of_library_not_installed_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library_keys, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match="transformers is not installed"):
        keys_of.__wrapped__("training_arguments")


def test_rules_name_only_keys_that_exist_or_are_gone() -> None:
    known = {key for section in RENAMED for key in keys_of(section)}
    assert set(CHOICES) | set(LIMITS) <= known
    for section in RENAMED:
        assert not set(RENAMED[section]) & set(keys_of(section))
        assert set(SET_ELSEWHERE[section]) <= set(keys_of(section))


@pytest.mark.parametrize("has_eval_dataset", [False, True])
@pytest.mark.parametrize("is_cuda", [False, True])
def test_problems_of_our_defaults_are_none(has_eval_dataset: bool, is_cuda: bool) -> None:
    defaults = default_training_arguments(has_eval_dataset=has_eval_dataset, is_cuda=is_cuda)
    assert not list(problems_of("training_arguments", defaults))


@pytest.mark.parametrize(
    ("section", "values"),
    [
        ("training_arguments", {"learning_rate": 1e-4, "max_steps": -1, "num_train_epochs": 0.5}),
        ("training_arguments", {"num_train_epochs": 0, "max_steps": 5}),
        ("training_arguments", {"weight_decay": 0, "optim": "sgd", "eval_strategy": "no", "debug": ""}),
        ("training_arguments", {"label_names": ["labels"], "lr_scheduler_kwargs": {"a": 1}, "tf32": None}),
        ("training_arguments", {"save_steps": 0.1, "trackio_static_space_id": "me/space"}),
        ("lora_config", {"r": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM", "bias": "none"}),
        ("lora_config", {"target_modules": ["q_proj"], "init_lora_weights": "pissa_niter_16"}),
        (
            "lora_config",
            {"init_lora_weights": False, "layer_replication": [[0, 4], [2, 5]], "rank_pattern": {}},
        ),
        (
            "quantization_config",
            {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "llm_int8_threshold": 6},
        ),
        ("quantization_config", {"bnb_4bit_compute_dtype": "bfloat16", "llm_int8_skip_modules": ["lm_head"]}),
    ],
)
def test_problems_of_right_values_are_none(section: str, values: dict[str, Any]) -> None:
    assert list(problems_of(section, values)) == []


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("learning_rat", "Did you mean `learning_rate`?"),
        ("evaluation_strategy", "It is called `eval_strategy` today."),
        ("warmup_ratio", "Write `warmup_steps: 0.03`"),
        ("group_by_length", "Write `train_sampling_strategy: group_by_length`."),
        ("no_cuda", "Write `use_cpu: true`."),
        ("save_safetensors", "checkpoints are always safetensors"),
        ("per_gpu_train_batch_size", "`per_device_train_batch_size`"),
        ("evaluate_during_training", "Write `eval_strategy: steps`."),
        ("overwrite_output_dir", "`resume_from_checkpoint: false`"),
        ("xyz", "All names: https://huggingface.co/docs/transformers"),
    ],
)
def test_problems_of_unknown_training_argument_say_todays_name(name: str, advice: str) -> None:
    text = problem("training_arguments", **{name: 1})
    assert text.startswith("`TrainingArguments` of transformers 5.")
    assert f"has no `{name}`. " in text and advice in text


@pytest.mark.parametrize(
    ("section", "name", "value", "text"),
    [
        ("training_arguments", "gradient_checkpointing", "false", "must be `true` or `false`, not the text"),
        ("training_arguments", "bf16", 1, "must be `true` or `false`, not the number 1."),
        ("training_arguments", "max_steps", "10", 'an integer, not the text "10". Write 10 without quotes.'),
        ("training_arguments", "max_steps", 10.0, "must be an integer, not the number 10.0. Write 10."),
        ("training_arguments", "max_steps", True, "must be an integer, not `true`."),
        ("training_arguments", "max_steps", 0, "must be at least 1, or -1 for whole epochs, not 0."),
        ("training_arguments", "learning_rate", "1e-4", "Write 1e-4 without quotes."),
        ("training_arguments", "learning_rate", None, "must be a number, not `null`"),
        ("training_arguments", "learning_rate", 0, "must be greater than 0, not 0."),
        ("training_arguments", "learning_rate", float("nan"), "must be greater than 0, not nan."),
        ("training_arguments", "learning_rate", float("inf"), "must be greater than 0"),
        ("training_arguments", "per_device_train_batch_size", 0, "must be at least 1, not 0."),
        ("training_arguments", "gradient_accumulation_steps", 0, "must be at least 1, not 0."),
        ("training_arguments", "num_train_epochs", 0, "must be greater than 0, not 0: nothing would train."),
        ("training_arguments", "save_steps", 2.5, "must be whole above 1"),
        ("training_arguments", "optim", "adam_torch", "Did you mean `adamw_torch`?"),
        ("training_arguments", "eval_strategy", False, "must be one of `no`, `steps`, `epoch`, not `false`."),
        ("training_arguments", "save_strategy", "epochs", "Did you mean `epoch`?"),
        ("training_arguments", "label_names", ["a", 1], "must be a list of texts, not the list ['a', 1]."),
        ("training_arguments", "report_to", "wandb", "one level up, as the key `report_to`."),
        ("lora_config", "r", "8", "Write 8 without quotes."),
        ("lora_config", "r", 0, "must be at least 1, not 0."),
        ("lora_config", "lora_alpha", 0, "must be greater than 0, not 0."),
        ("lora_config", "lora_dropout", 1.0, "must be at least 0 and less than 1, not 1.0."),
        ("lora_config", "lora_r", 8, "It is called `r`."),
        ("lora_config", "task_type", "CAUSAL", "Did you mean `CAUSAL_LM`?"),
        ("lora_config", "bias", "non", "Did you mean `none`?"),
        ("lora_config", "base_model_name_or_path", "x", "It is set by the key `base_model`."),
        ("quantization_config", "quant_type", "nf4", "It is called `bnb_4bit_quant_type`."),
        ("quantization_config", "bnb_4bit_quant_typ", "nf4", "Did you mean `bnb_4bit_quant_type`?"),
        ("quantization_config", "bnb_4bit_quant_type", "nf5", "Did you mean `nf4`?"),
        ("quantization_config", "bnb_4bit_compute_dtype", "bfloat15", "Did you mean `bfloat16`?"),
        ("quantization_config", "load_in_4bit", "true", "Write true without quotes."),
    ],
)
def test_problems_of_wrong_value_say_what_is_right(section: str, name: str, value: Any, text: str) -> None:
    assert text in problem(section, **{name: value})


def test_problems_of_bf16_and_fp16_exclude_each_other() -> None:
    assert "exclude each other" in problem("training_arguments", bf16=True, fp16=True)


def test_problems_of_many_keys_come_together() -> None:
    values = {"evaluation_strategy": "steps", "learning_rate": "x", "optim": 3, "seed": 1}
    names = [name for name, _ in problems_of("training_arguments", values)]
    assert names == ["evaluation_strategy", "learning_rate", "optim"]
