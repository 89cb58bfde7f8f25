"""`llm-train quickstart`: the example of the repository, with paths that hold in its own folder."""

import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from llm.cli import app
from llm.training import quickstart
from llm.training.config import DataPrepConfig, FinetuneConfig
from llm.training.config_file import load_config

ROOT = Path(__file__).parents[1]
SHIPPED = ROOT / "examples" / "quickstart"
NAMES = {*quickstart.ROWS, *quickstart.TEXTS}


def write(folder: Path, *arguments: str) -> Result:
    return CliRunner().invoke(app, ["quickstart", str(folder), *arguments])


def without_paths(value: Any) -> Any:
    """The values of a config, with the last part of each path only, and without its base model."""
    if isinstance(value, dict):
        return {name: without_paths(one) for name, one in value.items() if name != "base_model"}
    return value.rsplit("/", 1)[-1] if isinstance(value, str) else value


def test_quickstart_writes_the_shipped_example_and_says_what_to_type(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = write(tmp_path / "new")
    assert result.exit_code == 0 and {path.name for path in (tmp_path / "new").iterdir()} == NAMES
    typed = [line.strip() for line in result.stdout.splitlines() if line.startswith("  ")]
    assert typed[:4] == [
        f"cd {tmp_path}/new",
        "llm-train dataprep dataprep.yaml",
        "llm-train dataprep dataprep_eval.yaml",
        "llm-train finetune finetune.yaml",
    ]
    for name in quickstart.ROWS:
        assert (tmp_path / "new" / name).read_bytes() == (SHIPPED / name).read_bytes()
    monkeypatch.chdir(tmp_path / "new")
    for name in ("dataprep", "dataprep_eval", "finetune"):
        schema = FinetuneConfig if name == "finetune" else DataPrepConfig
        ours, theirs = (load_config(str(path), schema) for path in (f"{name}.yaml", SHIPPED / f"{name}.yaml"))
        assert ours.base_model == quickstart.BASE_MODEL
        assert without_paths(ours.model_dump()) == without_paths(theirs.model_dump())
    for name in quickstart.TEXTS:
        text = Path(name).read_text()
        assert "examples/" not in text and "output/quickstart" not in text and "yaml-language" not in text


@pytest.mark.parametrize(("given", "written"), [("org/other", "org/other"), ("model", "FOLDER/model")])
def test_base_model_is_written_as_it_holds_in_the_folder(
    given: str, written: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("model").mkdir()
    assert "Hugging Face hub" not in write(Path("new"), "--base-model", given).stdout
    found = load_config("new/finetune.yaml", FinetuneConfig).base_model
    assert found == written.replace("FOLDER", str(tmp_path))


@pytest.mark.parametrize("is_file", [True, False])
def test_what_is_there_is_not_touched(is_file: bool, tmp_path: Path) -> None:
    there = tmp_path / "new" if is_file else tmp_path / "new" / "mine.txt"
    there.parent.mkdir(exist_ok=True)
    there.write_text("mine")
    result = write(tmp_path / "new")
    assert result.exit_code == 2 and "there already and not empty: nothing was written" in result.output
    assert there.read_text() == "mine" and len([*tmp_path.rglob("*.*")]) == (0 if is_file else 1)


def test_empty_folder_is_filled(tmp_path: Path) -> None:
    assert write(tmp_path).exit_code == 0 and len([*tmp_path.iterdir()]) == len(NAMES)


def test_wheel_holds_every_file_that_is_written() -> None:
    """`pip wheel` needs the network for its build tool: the list that it reads is compared instead."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    included = project["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"]
    assert included == {f"examples/quickstart/{name}": f"llm/examples/quickstart/{name}" for name in NAMES}
    assert all((ROOT / path).is_file() for path in included)


def test_evaluation_of_the_folder_starts(tmp_path: Path) -> None:
    write(tmp_path)
    done = subprocess.run(
        [sys.executable, "evaluate.py", "--help"], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert "--rows" in done.stdout
