from pathlib import Path

import pytest

from llm.errors import ConfigError
from llm.model_registry import _MODELS, LORA_DEFAULTS, check_hub_answers, check_is_reachable, find_model
from llm.prompt_registry import PROMPT_FORMATS

FOUND = {
    "HuggingFaceTB/SmolLM2-135M-Instruct": "SmolLM2Format",
    "togethercomputer/Llama-2-7B-32K-Instruct": "TogetherLlama2Format",
    "togethercomputer/LLaMA-2-7B-32K": "PlainFormat",
    "meta-llama/Llama-2-7b-chat-hf": "Llama2Format",
    "meta-llama/Llama-2-13b-hf": "PlainFormat",
    "meta-llama/Meta-Llama-3-8B-Instruct": "Llama3Format",
    "meta-llama/Meta-Llama-3-8B": "PlainFormat",
    "lmsys/vicuna-7b-v1.5": "VicunaFormat",
    "lmsys/vicuna-7b-v1.5-16k": "VicunaFormat",
    "lmsys/vicuna-13b-v1.3": "VicunaFormat",
    "mistralai/Mistral-7B-Instruct-v0.2": "MistralV1Format",
    "mistralai/Mistral-7B-Instruct-v0.3": "MistralFormat",
    "HuggingFaceH4/zephyr-7b-beta": "ZephyrFormat",
    "Qwen/Qwen2.5-0.5B-Instruct": "QwenFormat",
    "Qwen/Qwen2.5-Coder-7B-Instruct": "QwenFormat",
    "google/gemma-2-2b-it": "GemmaFormat",
    "google/gemma-1.1-7b-it": "GemmaFormat",
    "microsoft/Phi-3-mini-4k-instruct": "PhiFormat",
    "togethercomputer/RedPajama-INCITE-7B-Chat": "RedpajamaFormat",
    "databricks/dolly-v2-3b": "DollyFormat",
}
# Of the same families, but with templates of their own: the tokenizer's is right for them.
UNKNOWN = (
    "meta-llama/Llama-3.2-1B-Instruct",
    "meta-llama/Meta-Llama-3.1-8B-Instruct",
    "HuggingFaceH4/zephyr-7b-gemma-v0.1",
    "Qwen/Qwen2.5-Math-7B-Instruct",
    "Qwen/Qwen2.5-VL-7B-Instruct",
    "google/gemma-3-4b-it",
    "lmsys/vicuna-7b-delta-v0",
    "mistralai/Mistral-Nemo-Instruct-2407",
    "HuggingFaceTB/SmolLM3-3B",
    "gpt2",
)


@pytest.mark.parametrize("base_model", FOUND)
def test_known_model_has_its_format(base_model: str) -> None:
    assert find_model(base_model).prompt_format == FOUND[base_model]


def test_known_models_cover_every_pattern() -> None:
    used = {id(find_model(base_model)) for base_model in FOUND}
    assert used == {id(known) for _, known in _MODELS}
    assert {known.prompt_format for _, known in _MODELS} <= set(PROMPT_FORMATS)


@pytest.mark.parametrize("base_model", UNKNOWN)
def test_unknown_model_is_left_to_its_tokenizer(base_model: str) -> None:
    known = find_model(base_model)
    assert (known.prompt_format, known.max_length, known.lora_config) == (None, None, LORA_DEFAULTS)


def test_known_model_in_a_folder_is_found_by_its_last_name() -> None:
    assert find_model("/models/x/SmolLM2-135M-Instruct/").prompt_format == "SmolLM2Format"


def test_lora_config_changed_leaves_the_defaults() -> None:
    find_model("gpt2").lora_config["r"] = 1
    assert find_model("gpt2").lora_config["r"] == LORA_DEFAULTS["r"] == 16


@pytest.mark.parametrize("base_model", ["./no", "/no/such", "~/no", "a/b/c"])
def test_path_that_is_no_folder_is_refused(base_model: str) -> None:
    with pytest.raises(ConfigError, match=f"base_model: there is no folder `{base_model}`.*or a hub id"):
        check_is_reachable(base_model)


def test_folder_and_hub_id_are_reachable(tmp_path: Path) -> None:
    check_is_reachable(str(tmp_path))
    check_is_reachable("Qwen/Qwen2.5-0.5B-Instruct")
    check_is_reachable("gpt2")


def no_network(*arguments: object, **named: object) -> None:
    raise ConnectionError("[Errno -2] Name or service not known")


def test_hub_that_cannot_be_reached_is_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", no_network)
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *names: None)
    with pytest.raises(ConfigError, match=r"`org/model` is no folder here .* cannot be reached: .* not known\. Give a"):
        check_hub_answers("org/model")


@pytest.mark.parametrize("case", ["offline", "cached", "folder", "no hub id"])
def test_hub_is_not_asked_where_it_is_not_needed(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", case == "offline")
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", no_network)
    cached = "/cache/config.json" if case == "cached" else None
    if case != "no hub id":
        monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *names: cached)
    check_hub_answers({"folder": str(tmp_path), "no hub id": "a b/c//d"}.get(case, "org/model"))
