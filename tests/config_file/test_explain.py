"""`llm-train explain`: every key with type, default, meaning and file; a wrong one with the nearest."""

import subprocess
import sys

import pytest
from typer.testing import CliRunner

from llm.cli import app
from llm.training.config import DataPrepConfig, FinetuneConfig
from llm.training.config_file.explain import explain, list_keys
from llm.training.config_file.library_keys import SECTIONS, keys_for_yaml


def test_explain_our_key_says_file_type_default_and_meaning() -> None:
    assert explain("chunksize") == (
        "chunksize  (in dataprep.yaml)\n"
        "  type     integer\n"
        "  default  2048\n"
        "  meaning  Tokens in a block: examples are packed up to this length."
    )


def test_explain_key_of_both_files_explains_both() -> None:
    text = explain("base_model")
    assert "base_model  (in dataprep.yaml)" in text and "base_model  (in finetune.yaml)" in text


@pytest.mark.parametrize(
    ("key", "parts"),
    [
        (
            "training_arguments.warmup_steps",
            ["type     a number", "default  0.03 (the library's own: 0)", "meaning  Num"],
        ),
        (
            "learning_rate",
            ["training_arguments.learning_rate", "2e-4, or 2e-5 without LoRA (the library's own: 5e-05)"],
        ),
        ("training_arguments.max_grad_norm", ["default  1.0\n"]),
        (
            "lora_config.r",
            ["default  16 unless the model has its own (the library's own: 8)", "LoraConfig of peft:"],
        ),
        ("bnb_4bit_quant_type", ["quantization_config.bnb", "one of `nf4`, `fp4`", '"nf4" with `load_in_4bit`']),
        ("source_config.method", ["source_config.method  (in dataprep.yaml)", "default  load_dataset"]),
        ("prompt_config", ["type     `method` and `kwargs` or `null`"]),
    ],
)
def test_explain_any_key_says_what_it_is(key: str, parts: list[str]) -> None:
    text = explain(key)
    assert [part for part in parts if part not in text] == []


def test_every_key_is_listed_and_explained() -> None:
    listed = list_keys()
    ours = [*DataPrepConfig.model_fields, *FinetuneConfig.model_fields]
    theirs = [f"{section}.{name}" for section in SECTIONS for name in keys_for_yaml(section)]
    assert len(ours) > 30 and len(theirs) > 150
    for key in [*ours, *theirs]:
        assert key.rpartition(".")[2] in listed
        assert "  type     " in explain(key) and "  meaning  " in explain(key)


@pytest.mark.parametrize(
    ("key", "told"),
    [
        ("chunk_size", "Did you mean `chunksize`?"),
        ("lora_config.lora_alfa", "Did you mean `lora_alpha`?"),
        ("evaluation_strategy", "It is called `eval_strategy` today."),
        ("training_arguments.output_dir", "It is set by the key `local_output`."),
        ("hub_token", "It is a secret, and YAML files are copied: set the environment variable HF_TOKEN."),
        ("max_length", "The length of a block is `chunksize` of dataprep."),
        ("model_name_or_path", "Here it is called `base_model`."),
        ("qqqq", "`llm-train explain` lists all of them."),
        ("a.b.c", "`llm-train explain` lists all of them."),
    ],
)
def test_unknown_key_is_an_error_with_the_right_one(key: str, told: str) -> None:
    result = CliRunner().invoke(app, ["explain", key])
    assert result.exit_code == 2 and result.stdout == ""
    assert result.stderr == f"error: No key `{key}`. {told}\n"


def test_explain_command_prints_to_standard_output_and_loads_nothing_heavy() -> None:
    code = "import sys\nfrom llm.cli import app\ntry:\n    app(sys.argv[1:])\nexcept SystemExit:\n    pass\n"
    code += "print([n for n in ('torch', 'transformers', 'datasets', 'pyarrow', 'peft') if n in sys.modules])\n"
    done = subprocess.run([sys.executable, "-c", code, "explain"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("dataprep.yaml\n  source_config ") and done.stdout.endswith("[]\n")
    assert "More of one: llm-train explain KEY" in done.stdout and done.stderr == ""
