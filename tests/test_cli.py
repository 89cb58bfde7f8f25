"""The command line: exit codes, one text without a traceback, and what `--debug` adds."""

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from llm.cli import app
from llm.errors import EXIT_CODES, CheckpointError, ConfigError, DataError, LlmTrainError, MissingExtraError
from llm.terminal import print_table

GOOD = "source_config: rows.jsonl\nbase_model: x/y\ndataset_writer_config: {method: save_to_disk}\n"


@pytest.fixture
def config(tmp_path: Path) -> str:
    path = tmp_path / "dataprep.yaml"
    path.write_text(GOOD)
    return str(path)


@pytest.mark.parametrize(
    ("error", "code"),
    [(ConfigError, 2), (MissingExtraError, 2), (DataError, 3), (CheckpointError, 4), (KeyboardInterrupt, 130)],
)
@pytest.mark.parametrize("flags", [[], ["--debug"]])
def test_known_error_ends_with_its_code_and_a_traceback_only_with_debug(
    error: type[BaseException], code: int, flags: list[str], config: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(settings: object) -> None:
        raise error("row 3 [bold]is[/bold] null")

    monkeypatch.setattr("llm.training.dataprep.prepare", fail)
    result = CliRunner().invoke(app, ["dataprep", config, *flags])
    assert result.exit_code == code
    assert ("Traceback" in result.output) is (bool(flags) and issubclass(error, LlmTrainError))
    if issubclass(error, LlmTrainError):
        assert result.output.endswith("error: row 3 [bold]is[/bold] null\n")
    else:
        assert result.output == "stopped by Ctrl-C; nothing half-written is left\n"


def test_set_wins_over_the_file(config: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[int] = []
    monkeypatch.setattr("llm.training.dataprep.prepare", lambda settings: found.append(settings.chunksize))
    assert CliRunner().invoke(app, ["dataprep", config, "--set", "chunksize=77"]).exit_code == 0
    assert found == [77]


@pytest.mark.parametrize("name", ["dataprep", "inspect"])
def test_config_error_and_help_load_nothing_heavy(name: str, tmp_path: Path) -> None:
    (tmp_path / "dataprep.yaml").write_text(GOOD + "chunk_size: 9\n")
    code = (
        "import sys\nfrom typer.testing import CliRunner\nfrom llm.cli import app\n"
        "results = [CliRunner().invoke(app, [*sys.argv[1:]]), CliRunner().invoke(app, ['--help'])]\n"
        "print([r.exit_code for r in results], 'chunksize' in results[0].output)\n"
        "print([n for n in ('torch', 'transformers', 'datasets', 'pyarrow', 'pandas') if n in sys.modules])\n"
    )
    command = [sys.executable, "-c", code, name, str(tmp_path / "dataprep.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["[2, 0] True", "[]"]


@pytest.mark.parametrize("script", ["dataprep", "finetune"])
def test_script_started_as_a_file_tells_a_config_error_before_it_loads_anything_heavy(
    script: str, tmp_path: Path
) -> None:
    (tmp_path / "bad.yaml").write_text("bass_model: x\n")
    file = Path(__file__).parents[1] / "llm" / "training" / f"{script}.py"
    command = [sys.executable, "-X", "importtime", str(file), str(tmp_path / "bad.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    imported = {line.rsplit("|", 1)[-1].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert done.returncode == 2 and "Did you mean `base_model`?" in done.stderr
    assert "llm.training.config" in imported and not imported & {"torch", "transformers", "datasets", "pyarrow"}


def test_quiet_says_nothing_but_warnings_and_verbose_what_the_libraries_log(
    config: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    levels: list[tuple[int, int]] = []

    def tell(settings: object) -> None:
        levels.append(tuple(logging.getLogger(name).getEffectiveLevel() for name in ("llm.x", "another")))  # type: ignore[arg-type]
        print_table("Prepared", [("rows", "3")])

    monkeypatch.setattr("llm.training.dataprep.prepare", tell)
    outputs = [CliRunner().invoke(app, ["dataprep", config, *flags]).output for flags in ([], ["-q"], ["--verbose"])]
    assert levels == [(20, 30), (30, 30), (10, 20)]
    assert outputs[0] == outputs[2] == "Prepared\n  rows  3\n" and outputs[1] == ""


def test_quiet_still_tells_an_error(config: str) -> None:
    result = CliRunner().invoke(app, ["dataprep", config, "-q", "--set", "chunksize=0"])
    assert result.exit_code == 2 and "`chunksize` must be greater than 0, not 0." in result.output


@pytest.mark.parametrize(
    ("typed", "completed"),
    [
        ("llm-train quick", ["quickstart"]),
        ("llm-train schema fine", ["finetune"]),
        ("llm-train explain chunk", ["chunksize"]),
        ("llm-train explain lora_config.lora_al", ["lora_config.lora_alpha"]),
        ("llm-train finetune --js", ["--json"]),
    ],
)
def test_shell_completes_commands_options_and_keys(typed: str, completed: list[str]) -> None:
    environment = os.environ | {
        "_LLM_TRAIN_COMPLETE": "complete_bash",
        "COMP_WORDS": typed,
        "COMP_CWORD": str(typed.count(" ")),
    }
    command = [sys.executable, "-c", "from llm.cli import app; app(prog_name='llm-train')"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.split() == completed, done.stderr


def test_exit_codes_are_those_of_the_errors_and_in_the_help() -> None:
    codes = {error.exit_code for error in (ConfigError, MissingExtraError, DataError, CheckpointError, LlmTrainError)}
    assert codes | {0, 130, 143} == {*EXIT_CODES}
    text = " ".join(CliRunner().invoke(app, ["--help"]).output.split())
    assert [code for code, meaning in EXIT_CODES.items() if f"{code} {meaning}" not in text] == []
