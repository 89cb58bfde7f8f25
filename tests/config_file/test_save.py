"""The saved config loads back to the same one; what came from the environment is not written in clear."""

import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm.errors import ConfigError
from llm.training.config import DataPrepConfig, FinetuneConfig
from llm.training.config_file import load_config, saved_data, saved_text
from llm.training.config_file.yaml_text import parse_yaml

DATAPREP = """\
include: shared.yaml
source_config: ${env:DATA}/rows.jsonl
prompt_config:
  method: Prompt
  kwargs: {system_message: "Say no.\\n  Twice: 012", input_template: "${env:DATA}: {text}"}
dataset_writer_config: {method: save_to_disk, kwargs: {dataset_path: out, storage_options: {profile: "${env:WHO}"}}}
chunksize: ${env:SIZE}
allow_code: ${env:WHO}
"""
FINETUNE = """\
include: shared.yaml
train_dataset_config: ${env:DATA}
eval_dataset_config: {method: load_from_disk, kwargs: {dataset_path: "x/${env:WHO}"}}
local_output: out
report_to: ${env:TRACKER}
torch_dtype: bf16
training_arguments:
  max_steps: ${env:SIZE}
  run_name: "${env:SIZE}"
  eval_steps: 3
additional_output_paths: ["s3://b/${env:WHO}"]
"""
GIVEN = {"DATA": "some/place", "WHO": "me_1", "SIZE": "512", "TRACKER": "none", "MODEL": "org/very-private"}


@pytest.fixture(autouse=True)
def variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in GIVEN.items():
        monkeypatch.setenv(name, value)


def write(folder: Path, name: str, text: str) -> str:
    (folder / name).write_text(text, encoding="utf-8")
    return str(folder / name)


@pytest.mark.parametrize(
    ("text", "schema", "overrides"),
    [
        (DATAPREP, DataPrepConfig, ["seed=7", "prompt_config.kwargs.context_template=${env:WHO} {text}"]),
        (DATAPREP, DataPrepConfig, ["source_config=other.jsonl", "chunksize=9"]),
        (FINETUNE, FinetuneConfig, ["lora_config.r=8", "training_arguments.seed=${env:SIZE}"]),
        (FINETUNE, FinetuneConfig, ["lora_config=", "report_to=[none, none]", "load_in_8bit=false"]),
    ],
)
def test_saved_config_with_includes_environment_and_overrides_loads_back_to_the_same(
    text: str, schema: Any, overrides: list[str], tmp_path: Path
) -> None:
    write(tmp_path, "shared.yaml", "base_model: ${env:MODEL}\n")
    config = load_config(write(tmp_path, "config.yaml", text), schema, overrides=overrides)
    saved = saved_text(saved_data(config), "x")
    assert "include" not in saved and not any(GIVEN[name] in saved for name in ("MODEL", "DATA", "WHO"))
    (tmp_path / "shared.yaml").unlink()
    again = load_config(write(tmp_path, "saved.yaml", saved), schema)
    assert again == config
    assert saved_text(saved_data(again), "x") == saved


def test_saved_config_keeps_type_of_what_the_environment_gave(tmp_path: Path) -> None:
    write(tmp_path, "shared.yaml", "base_model: m\n")
    config = load_config(write(tmp_path, "config.yaml", FINETUNE), FinetuneConfig)
    assert (config.training_arguments["max_steps"], config.training_arguments["run_name"]) == (512, "512")
    saved = saved_text(saved_data(config), "finetune")
    assert 'max_steps: ${env:SIZE}\n  run_name: "${env:SIZE}"\n' in saved
    assert saved.startswith("# All that made what lies beside it. Once more: llm-train finetune THIS_FILE\nbase_model:")


def test_config_made_in_python_is_saved_too(tmp_path: Path) -> None:
    config = FinetuneConfig.model_validate(
        {"base_model": "m", "train_dataset_config": "x", "local_output": "no", "training_arguments": {"seed": 1}}
    )
    assert load_config(write(tmp_path, "c.yaml", saved_text(saved_data(config), "x")), FinetuneConfig) == config


def test_message_does_not_tell_what_the_environment_holds(tmp_path: Path) -> None:
    text = "base_model: m\ntrain_dataset_config: x\nlocal_output: o\nload_in_4bit: ${env:MODEL}\n"
    text += "training_arguments: {optim: '${env:DATA}', max_steps: '${env:WHO}'}\n"
    with pytest.raises(ConfigError) as caught:
        load_config(write(tmp_path, "c.yaml", text), FinetuneConfig)
    message = str(caught.value)
    assert '`load_in_4bit` must be `true` or `false`, not the text "${env:MODEL}".' in message
    assert not any(GIVEN[name] in message for name in ("MODEL", "DATA", "WHO"))


TEXTS = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=30),
    st.sampled_from(
        ["no", "~", "null", "1e-4", "012", "0o17", "1_000", "12:30", ".5", "+1", "-.inf", "true", "=", "<<"]
    ),
    st.sampled_from(
        [" x ", "a: b", "# c", "- d", "{e}", "[f]", "*g", "&h", "!i", "|", ">", "%j", "@k", "`l", "'", '"']
    ),
)
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), TEXTS),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(TEXTS, inner, max_size=3)),
    max_leaves=12,
)


@given(st.dictionaries(TEXTS, VALUES, max_size=4))
def test_saved_text_of_any_plain_data_is_read_back_as_it_was(data: dict[str, Any]) -> None:
    if "<<" in data or "${env:" in repr(data):
        return
    document = parse_yaml(saved_text(data, "x").replace("<<", "<"), source="x")
    assert document.data == _with_one_angle(data)
    assert document.problems == []


def _with_one_angle(value: Any) -> Any:
    """`<<` is no key in our YAML."""
    if isinstance(value, dict):
        return {key.replace("<<", "<"): _with_one_angle(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_with_one_angle(item) for item in value]
    return value.replace("<<", "<") if isinstance(value, str) else value


def test_saved_infinity_is_read_back() -> None:
    assert parse_yaml(saved_text({"a": math.inf, "b": 1e-07}, "x"), source="x").data == {"a": math.inf, "b": 1e-07}
