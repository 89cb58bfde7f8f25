"""Code that comes with a model or a data set is never run, whatever the YAML says."""

import json
from pathlib import Path

import pytest
from tiny_models import make_model

from llm.errors import ConfigError
from llm.tokenizer import load_prompt_tokenizer
from llm.training.config import DataPrepConfig, FinetuneConfig
from llm.training.config_file import load_config
from llm.training.tune.base_model import load_base_model, load_tokenizer

CODE = """
from pathlib import Path
Path({mark!r}).write_text("run")
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
class OwnConfig(LlamaConfig):
    model_type = "own_model"
class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
class OwnTokenizer(PreTrainedTokenizerFast):
    pass
"""


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model that transformers can load only by its code, which leaves the file `mark`."""
    folder = tmp_path / "model"
    make_model("llama").save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    auto_map = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "own_model", "auto_map": auto_map}))
    tokenizer = {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": ["own.OwnTokenizer", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    (folder / "own.py").write_text(CODE.format(mark=str(tmp_path / "mark")))
    return folder


def test_code_of_a_model_is_never_run_nor_asked_for(model: Path, tmp_path: Path) -> None:
    config = FinetuneConfig.model_validate(
        {"base_model": str(model), "train_dataset_config": "x", "local_output": "y", "report_to": "none"}
    )
    told = "it brings code of its own, and such code is never run"
    with pytest.raises(ConfigError, match=told):
        load_base_model(config)
    for load in (load_tokenizer, load_prompt_tokenizer):
        with pytest.raises(ConfigError, match=told):
            load(str(model))
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize(
    "line",
    [
        "trust_remote_code: true",
        "source_config: {kwargs: {path: x, trust_remote_code: true}}",
        "prompt_config: {method: Prompt, kwargs: {trust_remote_code: true}}",
    ],
)
def test_trust_remote_code_in_yaml_is_refused_with_the_reason(line: str, tmp_path: Path) -> None:
    text = "base_model: m\ndataset_writer_config: {method: save_to_disk, kwargs: {dataset_path: o}}\n"
    text += line if line.startswith("source") else f"source_config: x\n{line}"
    (tmp_path / "dataprep.yaml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config(str(tmp_path / "dataprep.yaml"), DataPrepConfig)
    assert "has 1 problem" in str(caught.value)
    assert "Code that comes with a model or a data set is never run: delete `trust_remote_code`." in str(caught.value)
