"""Code named in YAML runs only from packages that `allow_code` names; registered names need none."""

import logging
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from llm.cli import app
from llm.errors import ConfigError
from llm.prompt_registry import PROMPT_FORMATS, PROMPTS
from llm.registry import own_package, resolve_method
from llm.training.config import DataPrepConfig, FinetuneConfig
from llm.training.config_file import load_config
from llm.training.prep.dataset import DATASET_METHODS
from llm.training.prep.write import DATASET_WRITERS

DATAPREP = """\
source_config:
  method: my_package.rows::load
base_model: my-org/my-model
prompt_config: {method: os::system}
dataset_writer_config: {method: save_to_disk, kwargs: {dataset_path: out}}
"""
FINETUNE = "base_model: m\ntrain_dataset_config: {method: my_package::load}\nlocal_output: out\n"


def config(folder: Path, text: str) -> str:
    path = folder / "config.yaml"
    path.write_text(text)
    return str(path)


def test_own_package_of_every_registered_reference_is_none() -> None:
    references = [*PROMPTS.values(), *PROMPT_FORMATS.values(), *DATASET_METHODS.values(), *DATASET_WRITERS.values()]
    assert len(references) > 25
    assert [reference for reference in references if own_package(reference)] == []


@pytest.mark.parametrize(
    ("method", "package"),
    [
        ("DefaultPrompt", None),
        ("my_package.rows::load", "my_package"),
        ("os::system", "os"),
        ("llm.registry::importlib.import_module", "llm"),
        ("llm.training.prep.dataset::call_method", "llm"),
        ("llm.prompt::FewShotQA.from_anything", "llm"),
        ("datasets::Dataset.from_generator", "datasets"),
        ("datasets::load_dataset.__globals__", "datasets"),
    ],
)
def test_own_package_is_the_top_package_of_what_no_registry_holds(method: str, package: str | None) -> None:
    assert own_package(method) == package


def test_code_of_packages_not_named_is_refused_with_lines_and_both_remedies(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(config(tmp_path, DATAPREP), DataPrepConfig)
    text = str(caught.value)
    assert "config.yaml has 2 problems" in text
    assert "config.yaml:2:3  source_config.method\n    method: my_package.rows::load\n" in text
    assert "`my_package.rows::load` is code of the package `my_package`, which `allow_code` does not name." in text
    assert "`allow_code: [my_package]`" in text and "`--allow-code my_package`" in text
    assert "config.yaml:4:17  prompt_config.method" in text and "`allow_code: [os]`" in text


def test_code_of_packages_named_in_the_file_or_on_the_command_line_is_let_through(tmp_path: Path) -> None:
    path = config(tmp_path, DATAPREP + "allow_code: my_package\n")
    assert load_config(path, DataPrepConfig, allow_code=["os", "my_package"]).allow_code == ["my_package", "os"]
    assert load_config(path, DataPrepConfig, overrides=["allow_code=[my_package, os]"]).allow_code[1] == "os"
    assert load_config(config(tmp_path, FINETUNE), FinetuneConfig, allow_code=["my_package"]).allow_code


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ("[my_package.rows]", "`allow_code` takes names of top packages: write `my_package`, not `my_package.rows`."),
        ("['']", "write `my_package`, not ``."),
        ("['*']", "write `my_package`, not `*`."),
        ("3", "`allow_code` must be a list, not the number 3."),
        ("true", "`allow_code` must be a list, not `true`."),
        ("{my_package: 1}", "`allow_code` must be a list, not a section."),
    ],
)
def test_allow_code_that_names_no_packages_is_refused(given: str, text: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(config(tmp_path, f"{FINETUNE}allow_code: {given}\n"), FinetuneConfig)
    assert text in str(caught.value) and "is code of the package `my_package`" in str(caught.value)


def test_command_line_option_can_be_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[list[str]] = []
    monkeypatch.setattr("llm.training.dataprep.prepare", lambda settings: found.append(settings.allow_code))
    path = config(tmp_path, DATAPREP)
    refused = CliRunner().invoke(app, ["dataprep", path])
    assert refused.exit_code == 2 and "--allow-code os" in refused.output and found == []
    allowed = CliRunner().invoke(app, ["dataprep", path, "--allow-code", "os", "--allow-code", "my_package"])
    assert allowed.exit_code == 0 and found == [["os", "my_package"]]


def test_what_was_imported_is_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "my_code_5c1e.py").write_text("def make():\n    return 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    with caplog.at_level(logging.INFO, logger="llm"):
        for _ in range(2):
            resolve_method("my_code_5c1e::make", {}, key="k")
            resolve_method("DefaultPrompt", PROMPTS, key="k")
    assert caplog.messages == [f"Your own code: `my_code_5c1e::make`, from {tmp_path}/my_code_5c1e.py."]
    del sys.modules["my_code_5c1e"]


def test_refused_code_is_never_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_code_9a7b.py").write_text("raise SystemExit('imported')\n")
    monkeypatch.syspath_prepend(tmp_path)
    text = FINETUNE.replace("my_package::load", "my_code_9a7b::load")
    assert CliRunner().invoke(app, ["finetune", config(tmp_path, text)]).exit_code == 2
    assert "my_code_9a7b" not in sys.modules
