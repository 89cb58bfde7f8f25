"""The JSON Schemas of the repository are current, and take what the program takes."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML
from typer.testing import CliRunner

from llm.cli import app
from llm.training.config_file.json_schema import FOLDER, SCRIPTS, json_schema, schema_text
from llm.training.config_file.library_keys import SECTIONS, keys_for_yaml

jsonschema = pytest.importorskip("jsonschema", reason="comes with moto, of the dev extra")

ROOT = Path(__file__).parents[2]
DATAPREP: dict[str, Any] = {
    "source_config": "rows.jsonl",
    "base_model": "m",
    "dataset_writer_config": {"method": "save_to_disk", "kwargs": {"dataset_path": "x"}},
}
FINETUNE: dict[str, Any] = {"base_model": "m", "train_dataset_config": "x", "local_output": "y"}


def errors(script: str, data: Any) -> list[str]:
    return [error.message for error in jsonschema.Draft202012Validator(json_schema(script)).iter_errors(data)]


def without_libraries(schema: dict[str, Any]) -> dict[str, Any]:
    properties = {key: value for key, value in schema["properties"].items() if key not in SECTIONS}
    return schema | {"properties": properties, "$comment": ""}


@pytest.mark.parametrize("script", SCRIPTS)
def test_schema_of_the_repository_is_current(script: str) -> None:
    """To renew it: python -m llm.training.config_file.json_schema"""
    text = (FOLDER / f"{script}.schema.json").read_text(encoding="utf-8")
    saved, made = json.loads(text), json_schema(script)
    if saved["$comment"] == made["$comment"]:
        assert text == schema_text(script)
    else:  # other versions of the libraries than those in constraints.txt: their sections may differ
        assert without_libraries(saved) == without_libraries(made)


def test_schema_of_the_repository_is_of_the_versions_that_are_tested() -> None:
    saved = json.loads((FOLDER / "finetune.schema.json").read_text(encoding="utf-8"))
    constraints = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    versions = re.findall(r"(peft|transformers) ([\d.]+\d)", saved["$comment"])
    assert len(versions) == 2
    assert [name for name, version in versions if f"{name}=={version}\n" not in constraints] == []


@pytest.mark.parametrize("script", SCRIPTS)
def test_schema_is_one_and_has_every_key_with_its_meaning(script: str) -> None:
    schema = json_schema(script)
    jsonschema.Draft202012Validator.check_schema(schema)
    assert list(schema["properties"]) == list(SCRIPTS[script].model_fields)
    assert all(value["description"] for value in schema["properties"].values())


def test_library_sections_have_every_key_that_yaml_may_give() -> None:
    properties = json_schema("finetune")["properties"]
    for section in SECTIONS:
        found = (properties[section].get("anyOf") or [properties[section]])[0]["properties"]
        assert set(found) == set(keys_for_yaml(section))
        assert len(found) >= 10 and not {"output_dir", "hub_token"} & set(found)
        assert all(value["description"] for value in found.values())


@pytest.mark.parametrize("name", ["dataprep", "dataprep_eval", "finetune"])
def test_examples_name_their_schema_and_are_valid(name: str) -> None:
    path = ROOT / f"examples/quickstart/{name}.yaml"
    text = path.read_text(encoding="utf-8")
    line = re.match(r"# yaml-language-server: \$schema=(\S+)\n", text)
    assert line and (path.parent / line[1]).resolve().parent == FOLDER
    assert errors(name.partition("_")[0], YAML(typ="safe", pure=True).load(text)) == []


def test_configurations_of_the_documents_are_valid() -> None:
    texts = [(ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "llm/training/README.md")]
    snippets = [
        YAML(typ="safe", pure=True).load(one) for text in texts for one in re.findall(r"```yaml\n(.*?)```", text, re.S)
    ]
    assert len(snippets) >= 7
    for data in snippets:
        script = "finetune" if "local_output" in data else "dataprep"
        assert errors(script, data | {"include": "rest.yaml"}) == []


@pytest.mark.parametrize(
    ("script", "changes"),
    [
        ("dataprep", {"chunksize": "${env:SIZE}", "num_proc": None, "seed": 3, "allow_code": "my_package"}),
        ("dataprep", {"source_config": {"method": "my_package.rows::load", "kwargs": {"a": 1}}}),
        ("dataprep", {"source_config": {"kwargs": {"path": "x", "split": "train"}}, "include": ["a.yaml"]}),
        ("finetune", {"torch_dtype": "bf16", "report_to": "none", "lora_config": None, "resume_from_checkpoint": "x"}),
        ("finetune", {"training_arguments": {"learning_rate": 1e-4, "save_steps": 0.1, "max_steps": "${env:N}"}}),
        ("finetune", {"lora_config": {"r": 8, "target_modules": "all-linear", "init_lora_weights": "pissa_niter_16"}}),
        ("finetune", {"load_in_4bit": True, "quantization_config": {"bnb_4bit_compute_dtype": "bf16"}}),
        ("finetune", {"experiment_tracking_config": {"method": "wandb", "kwargs": {"project": "p"}}}),
    ],
)
def test_right_values_are_valid(script: str, changes: dict[str, Any]) -> None:
    assert errors(script, (DATAPREP if script == "dataprep" else FINETUNE) | changes) == []


@pytest.mark.parametrize(
    ("script", "changes"),
    [
        ("dataprep", {"chunk_size": 9}),
        ("dataprep", {"chunksize": 0}),
        ("dataprep", {"chunksize": "many"}),
        ("dataprep", {"prompt_config": {"method": "ZeroShotQ"}}),
        ("dataprep", {"prompt_config": "ZeroShotQA"}),
        ("dataprep", {"dataset_writer_config": {"kwargs": {}}}),
        ("dataprep", {"on_too_long": "dropp"}),
        ("dataprep", {"local_output": "x"}),
        ("finetune", {"training_arguments": {"evaluation_strategy": "steps"}}),
        ("finetune", {"training_arguments": {"learning_rate": "1e-4"}}),
        ("finetune", {"training_arguments": {"per_device_train_batch_size": 0}}),
        ("finetune", {"training_arguments": {"output_dir": "x"}}),
        ("finetune", {"training_arguments": {"optim": "adam_torch"}}),
        ("finetune", {"lora_config": {"r": "8"}}),
        ("finetune", {"quantization_config": {"quant_type": "nf4"}}),
        ("finetune", {"experiment_tracking_config": {"method": "os::system"}}),
    ],
)
def test_wrong_values_are_marked(script: str, changes: dict[str, Any]) -> None:
    assert errors(script, (DATAPREP if script == "dataprep" else FINETUNE) | changes)


def test_keys_may_be_missing_only_where_another_file_is_included() -> None:
    assert len(errors("dataprep", {"chunksize": 9})) == 3
    assert errors("dataprep", {"chunksize": 9, "include": "rest.yaml"}) == []


def test_schema_command_prints_it_and_refuses_another_name() -> None:
    done = CliRunner().invoke(app, ["schema", "dataprep"])
    assert done.exit_code == 0 and done.stdout == schema_text("dataprep")
    refused = CliRunner().invoke(app, ["schema", "finetun"])
    assert refused.exit_code == 2 and refused.stdout == "" and "Did you mean `finetune`?" in refused.stderr
