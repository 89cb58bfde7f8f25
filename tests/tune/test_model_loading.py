"""Dtype, quantization, adapter and trainer arguments are what the config says, or an error that says what to
write."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import make_model

from llm.errors import ConfigError, MissingExtraError
from llm.training.config import DatasetConfig, FinetuneConfig, MethodConfig
from llm.training.tune import base_model, quantization, tracking
from llm.training.tune.adapter import add_adapter
from llm.training.tune.attention import NODE_ATTENTION
from llm.training.tune.base_model import load_base_model, load_tokenizer, resolve_precision
from llm.training.tune.lean_modules import RMSNorm
from llm.training.tune.quantization import quantization_config
from llm.training.tune.trainer import merged_arguments, training_arguments


def make_config(**changes: Any) -> FinetuneConfig:
    settings = {
        "base_model": "tiny/model",
        "train_dataset_config": DatasetConfig(method="load_from_disk"),
        "local_output": "output",
        "report_to": ["none"],
    }
    return FinetuneConfig(**settings | changes)


def set_hardware(monkeypatch: pytest.MonkeyPatch, *, cuda: bool = False, has_bf16: bool = False) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **kwargs: has_bf16)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": has_bf16, "avx2": True})


@pytest.mark.parametrize(
    ("cuda", "has_bf16", "changes", "weights", "autocast"),
    [
        (False, False, {}, torch.float32, None),
        (False, True, {}, torch.bfloat16, torch.bfloat16),
        (True, True, {}, torch.bfloat16, torch.bfloat16),
        (True, False, {}, torch.float32, None),
        (True, True, {"training_arguments": {"use_cpu": True}}, torch.bfloat16, torch.bfloat16),
        (True, True, {"lora_config": None}, torch.float32, torch.bfloat16),
        (False, False, {"lora_config": None}, torch.float32, None),
        (False, True, {"torch_dtype": "float32"}, torch.float32, None),
        (False, False, {"torch_dtype": "bf16"}, torch.bfloat16, torch.bfloat16),
        (True, True, {"torch_dtype": "float16"}, torch.float16, torch.float16),
    ],
)
def test_dtype_follows_config_and_hardware(
    cuda: bool,
    has_bf16: bool,
    changes: dict[str, Any],
    weights: torch.dtype,
    autocast: torch.dtype | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    set_hardware(monkeypatch, cuda=cuda, has_bf16=has_bf16)
    precision = resolve_precision(make_config(**changes))
    assert (precision.weights, precision.autocast) == (weights, autocast)
    assert precision.reason


def test_emulated_bfloat16_is_warned_of(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    set_hardware(monkeypatch)
    resolve_precision(make_config(torch_dtype="bfloat16"))
    assert "25 times slower" in caplog.text


@pytest.mark.parametrize(
    ("cuda", "changes", "text"),
    [(False, {}, "trains on a GPU only"), (True, {"lora_config": None}, "cannot be trained in full")],
)
def test_float16_where_it_cannot_train_is_refused(
    cuda: bool, changes: dict[str, Any], text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_hardware(monkeypatch, cuda=cuda, has_bf16=True)
    with pytest.raises(ConfigError, match=f"torch_dtype: .*{text}"):
        resolve_precision(make_config(torch_dtype="float16", **changes))


def test_loaded_model_has_our_attention_and_no_cache(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make_model("llama").save_pretrained(tmp_path)
    with caplog.at_level(logging.INFO):
        model = load_base_model(make_config(base_model=str(tmp_path), torch_dtype="float32"))
    assert model.config._attn_implementation == NODE_ATTENTION and not model.config.use_cache
    assert model.dtype is torch.float32
    assert "float32 weights (as `torch_dtype` says)" in caplog.text


def test_loaded_model_has_lean_modules_unless_it_is_compiled(tmp_path: Path) -> None:
    make_model("llama").save_pretrained(tmp_path)
    for is_compiled in (False, True):
        given = {"training_arguments": {"torch_compile": is_compiled}}
        model = load_base_model(make_config(base_model=str(tmp_path), torch_dtype="float32", **given))
        assert any(isinstance(module, RMSNorm) for module in model.modules()) is not is_compiled


@pytest.mark.parametrize("path", ["./no/such", "/no/such", "models/a/b"])
def test_missing_folder_is_told_as_such(path: str) -> None:
    for load in (lambda: load_base_model(make_config(base_model=path)), lambda: load_tokenizer(path)):
        with pytest.raises(ConfigError, match=f"there is no folder `{path}`"):
            load()


def test_folder_without_a_model_is_a_config_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be loaded"):
        load_base_model(make_config(base_model=str(tmp_path)))


def test_unreachable_hub_is_a_config_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        assert kwargs["trust_remote_code"] is False
        raise OSError("We couldn't connect to 'https://huggingface.co'")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # what the hub cannot be asked is not asked
    monkeypatch.setattr(base_model.AutoModelForCausalLM, "from_pretrained", fail)
    with pytest.raises(ConfigError, match="`tiny/model` cannot be loaded: We couldn't connect"):
        load_base_model(make_config())


# --- quantization ---


@pytest.fixture
def has_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantization, "find_spec", lambda name: object())
    # asks for the version
    monkeypatch.setattr(quantization.BitsAndBytesConfig, "post_init", lambda self: None)


def test_plain_lora_is_not_quantized() -> None:
    assert quantization_config(make_config()) is None


def test_four_bits_are_nf4_with_bfloat16_compute(has_bitsandbytes: None) -> None:
    for changes in ({"load_in_4bit": True}, {"quantization_config": {"load_in_4bit": True}}):
        found = quantization_config(make_config(**changes))
        assert found is not None and found.load_in_4bit
        assert found.bnb_4bit_quant_type == "nf4" and found.bnb_4bit_use_double_quant
        assert found.bnb_4bit_compute_dtype is torch.bfloat16


def test_quantization_config_wins_over_the_defaults(has_bitsandbytes: None) -> None:
    given = {"bnb_4bit_quant_type": "fp4", "bnb_4bit_compute_dtype": "fp16"}
    found = quantization_config(make_config(load_in_4bit=True, quantization_config=given))
    assert found is not None and found.bnb_4bit_quant_type == "fp4" and found.bnb_4bit_compute_dtype is torch.float16
    assert found.bnb_4bit_use_double_quant


def test_eight_bits(has_bitsandbytes: None) -> None:
    found = quantization_config(make_config(load_in_8bit=True))
    assert found is not None and found.load_in_8bit and not found.load_in_4bit


def test_unknown_compute_dtype_is_named(has_bitsandbytes: None) -> None:
    with pytest.raises(ConfigError, match="quantization_config.bnb_4bit_compute_dtype: no dtype `bf15`"):
        quantization_config(make_config(quantization_config={"bnb_4bit_compute_dtype": "bf15"}))


def test_missing_bitsandbytes_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantization, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"pip install llm-train\[quantization\]"):
        quantization_config(make_config(load_in_4bit=True))


# --- adapter ---


def test_no_lora_config_trains_every_weight() -> None:
    model = make_model("llama")
    assert add_adapter(model, None, {"r": 4}) is model
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_adapter_is_on_all_linear_modules_and_only_it_trains() -> None:
    model = add_adapter(make_model("llama"), {}, {})
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(trained) == 2 * 7 * 2 and all("lora_" in name for name in trained)
    assert model.peft_config["default"].task_type == "CAUSAL_LM"


def test_lora_config_wins_over_the_models_defaults() -> None:
    model = add_adapter(make_model("llama"), {"r": 3}, {"r": 4, "lora_alpha": 5, "target_modules": ["q_proj"]})
    config = model.peft_config["default"]
    assert (config.r, config.lora_alpha, config.target_modules) == (3, 5, {"q_proj"})


@pytest.mark.parametrize("key", ["target_modules", "modules_to_save"])
def test_each_name_must_match_a_module(key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        add_adapter(make_model("llama"), {key: ["q_proj", "vproj", "embed_token"]}, {})
    text = str(caught.value)
    assert f"lora_config.{key}: no module of this model is called `vproj`, `embed_token`" in text
    assert "Did you mean `v_proj`?" in text and "Did you mean `embed_tokens`?" in text
    assert "down_proj, gate_proj, k_proj, lm_head, o_proj, q_proj, up_proj, v_proj" in text


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"rank": 8}, "`LoraConfig` has no `rank`"),
        ({"r": 0}, "lora_config: "),
        ({"target_modules": "nothing.*like_it"}, "lora_config.target_modules: no module of this model matches"),
    ],
)
def test_what_peft_does_not_take_is_a_config_error(given: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        add_adapter(make_model("llama"), given, {})


def test_saved_embeddings_of_a_tied_model_stay_tied() -> None:
    model = add_adapter(make_model("llama", tie_word_embeddings=True), {"modules_to_save": ["embed_tokens"]}, {})
    assert model.peft_config["default"].ensure_weight_tying


# --- training arguments and tracking ---


def test_users_arguments_win_and_ours_fill_in(tmp_path: Path) -> None:
    config = make_config(local_output=str(tmp_path), training_arguments={"learning_rate": 0.5, "max_steps": 3})
    arguments = training_arguments(config)
    assert (arguments.learning_rate, arguments.max_steps) == (0.5, 3)
    assert arguments.per_device_train_batch_size == 2 and arguments.lr_scheduler_type == "cosine"
    assert arguments.output_dir == str(tmp_path) and arguments.disable_tqdm and not arguments.remove_unused_columns
    assert arguments.save_total_limit is None and merged_arguments(config)["save_total_limit"] == 3
    assert arguments.eval_strategy == "no" and arguments.report_to == []


def test_autocast_follows_the_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    set_hardware(monkeypatch)
    assert not training_arguments(make_config()).bf16
    assert training_arguments(make_config(torch_dtype="bfloat16")).bf16
    set_hardware(monkeypatch, has_bf16=True)
    assert training_arguments(make_config()).bf16
    assert not training_arguments(make_config(training_arguments={"bf16": False})).bf16


@pytest.mark.parametrize("name", ["gradient_checkpointing", "activation_checkpointing"])
def test_checkpointing_under_either_name(name: str) -> None:
    assert training_arguments(make_config(training_arguments={name: True})).activation_checkpointing


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"learning_rat": 1}, "training_arguments: .*learning_rat"),
        ({"save_strategy": "sometimes"}, "training_arguments: .*sometimes"),
        (
            {"eval_strategy": "steps"},
            "training_arguments.eval_strategy: `steps` needs blocks.*`eval_dataset_config`",
        ),
    ],
)
def test_wrong_training_arguments_are_config_errors(given: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        training_arguments(make_config(training_arguments=given))


def test_trackers_in_order_of_precedence(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = {"tensorboard", "wandb"}
    monkeypatch.setattr(tracking, "find_spec", lambda name: name if name in installed else None)
    wandb = MethodConfig(method="wandb")
    resolve = tracking.resolve_report_to
    assert resolve(make_config(report_to=None)) == ["tensorboard"]
    assert resolve(make_config(report_to=None, experiment_tracking_config=wandb)) == ["wandb"]
    assert resolve(make_config(report_to="tensorboard", experiment_tracking_config=wandb)) == ["tensorboard"]
    assert resolve(make_config(report_to="none", experiment_tracking_config=wandb)) == []
    installed.clear()
    assert resolve(make_config(report_to=None)) == []
    with pytest.raises(MissingExtraError, match="experiment_tracking_config.method: `wandb` is not installed"):
        resolve(make_config(report_to=None, experiment_tracking_config=wandb))
    with pytest.raises(ConfigError, match="report_to: no tracker `wandbb`. Did you mean `wandb`?"):
        resolve(make_config(report_to="wandbb"))


def test_tracker_settings_become_arguments_and_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "find_spec", lambda name: name)
    monkeypatch.setenv("WANDB_ENTITY", "mine")
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    monkeypatch.delenv("WANDB_TAGS", raising=False)
    kwargs = {"project": "p", "entity": "other", "name": "run 1", "tags": ["a", "b"]}
    config = make_config(experiment_tracking_config=MethodConfig(method="wandb", kwargs=kwargs))
    with monkeypatch.context() as context:
        context.setattr(tracking.os, "environ", dict(tracking.os.environ))
        assert tracking.tracking_arguments(config) == {"run_name": "run 1"}
        variables = {name: tracking.os.environ[name] for name in ("WANDB_PROJECT", "WANDB_ENTITY", "WANDB_TAGS")}
    assert variables == {"WANDB_PROJECT": "p", "WANDB_ENTITY": "mine", "WANDB_TAGS": "a,b"}


def test_api_key_in_yaml_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "find_spec", lambda name: name)
    config = make_config(experiment_tracking_config=MethodConfig(method="wandb", kwargs={"api_key": "x"}))
    with pytest.raises(ConfigError, match="`wandb` takes no `api_key` here.*environment variables"):
        tracking.tracking_arguments(config)
