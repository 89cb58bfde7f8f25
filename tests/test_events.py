"""`--json`: one JSON object a line and nothing else; and text that is not changed on its way to the terminal."""

import io
import json
import logging
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from transformers.utils import logging as transformers_logging
from typer.testing import CliRunner

from llm import events, terminal
from llm.cli import app
from llm.errors import DataError
from llm.events import libraries_told_here, run_told, tell_event

TRAINING_README = (Path(__file__).parents[1] / "llm/training/README.md").read_text(encoding="utf-8")
GOOD = "source_config: rows.jsonl\nbase_model: x/y\ndataset_writer_config: {method: save_to_disk}\n"


def told(text: str) -> list[dict[str, Any]]:
    """The objects, without what differs from run to run."""
    return [{k: v for k, v in json.loads(line).items() if k not in ("time", "seconds")} for line in text.splitlines()]


@pytest.fixture
def config(tmp_path: Path) -> str:
    (tmp_path / "dataprep.yaml").write_text(GOOD)
    return str(tmp_path / "dataprep.yaml")


def prepare_with(action: Any, config: str, *flags: str, monkeypatch: pytest.MonkeyPatch) -> tuple[int, str]:
    monkeypatch.setattr("llm.training.dataprep.prepare", lambda settings: action())
    result = CliRunner().invoke(app, ["dataprep", config, "--json", *flags])
    assert result.stdout == ""
    return result.exit_code, result.stderr


def say_all_kinds() -> None:
    logging.getLogger("llm.x").info("read as %s", "messages")
    logging.getLogger("datasets.y").warning("one of a library")
    transformers_logging.get_logger("transformers.z").warning("another")
    warnings.warn("of Python", stacklevel=1)
    with terminal.working("Reading"), terminal.progress_bar("Tokenizing", total=1, unit="rows") as advance:
        advance(1)
    terminal.print_table("Prepared", [("rows", "3")])
    tell_event("prepared", rows_read=3, loss=float("nan"))


def test_json_holds_logs_of_all_and_events_and_the_end(config: str, monkeypatch: pytest.MonkeyPatch) -> None:
    code, text = prepare_with(say_all_kinds, config, "--verbose", monkeypatch=monkeypatch)
    objects = told(text)
    messages = [found["message"] for found in objects if found["event"] == "log"]
    assert code == 0 and messages[0] == "read as messages"
    assert [one for one in ("one of a library", "another") if one not in messages] == []
    assert objects[0] == {"event": "log", "level": "info", "logger": "llm.x", "message": "read as messages"}
    assert objects[-2:] == [{"event": "prepared", "rows_read": 3, "loss": None}, {"event": "end", "exit_code": 0}]


def test_json_and_quiet_is_warnings_only(config: str, monkeypatch: pytest.MonkeyPatch) -> None:
    code, text = prepare_with(lambda: tell_event("prepared"), config, "--quiet", monkeypatch=monkeypatch)
    assert (code, text) == (0, "")


@pytest.mark.parametrize(
    ("error", "code", "facts"),
    [
        (
            DataError("row 3 :smile: is null"),
            3,
            {"class": "DataError", "exit_code": 3, "text": "row 3 :smile: is null"},
        ),
        (ValueError("a bug"), 1, {"class": "ValueError", "exit_code": 1, "text": "a bug"}),
        (KeyboardInterrupt(), 130, None),
        (SystemExit(143), 143, None),
    ],
)
def test_json_tells_an_error_and_the_exit_code(
    error: BaseException, code: int, facts: dict[str, Any] | None, config: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise error

    found, text = prepare_with(fail, config, "-q", monkeypatch=monkeypatch)
    objects = told(text)
    trace = objects[0].pop("traceback", "")
    assert found == code and objects[-1] == {"event": "end", "exit_code": code}
    assert objects[:-1] == ([{"event": "error"} | facts] if facts else [])
    assert trace.startswith("Traceback") is isinstance(error, ValueError)


def test_readme_example_is_what_a_misspelt_key_gives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("dataprep.yaml").write_text("source_config: a\nbass_model: x/y\ndataset_writer_config: {method: to_json}\n")
    shown = TRAINING_README.split("<!-- events -->\n```json\n")[1].split("```")[0]
    result = CliRunner().invoke(app, ["dataprep", "dataprep.yaml", "--json"])
    found = told(result.stderr)
    assert [*found[0]] == [*told(shown)[0]] and found[1:] == told(shown)[1:]
    assert "dataprep has no key `bass_model`. Did you mean `base_model`?" in found[0]["text"]
    assert found[0]["text"].split("\n\n")[1] == told(shown)[0]["text"].split("\n\n")[1]


def test_rank_is_told_where_there_are_several(config: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    _, text = prepare_with(lambda: None, config, monkeypatch=monkeypatch)
    assert told(text) == [{"rank": 1, "event": "end", "exit_code": 0}]


def test_log_record_beside_a_bar_has_its_own_line(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = io.StringIO()
    screen = Console(file=shown, force_terminal=True, width=80, emoji=False)
    monkeypatch.setattr(terminal, "console", screen)
    monkeypatch.setattr(events, "console", screen)
    with run_told(), terminal.progress_bar("Tokenizing", total=2, unit="rows") as advance:
        advance(1)
        logging.getLogger("llm.x").warning("row 3 [bold]is :smile: odd")
        advance(1)
    lines = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown.getvalue()).replace("\r", "\n").splitlines()
    assert "row 3 [bold]is :smile: odd" in [line.rstrip() for line in lines]


def test_quiet_terminal_shows_warnings_and_no_bar(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    screen = Console(file=io.StringIO(), force_terminal=True)
    monkeypatch.setattr(terminal, "console", screen)
    monkeypatch.setattr(events, "console", screen)
    with run_told(quiet=True), terminal.progress_bar("Tokenizing", total=2, unit="rows") as advance:
        advance(1)
        logging.getLogger("llm.x").warning("careful")
    assert capsys.readouterr().err == "careful\n" and screen.file.getvalue() == ""  # type: ignore[attr-defined]


def test_logging_is_given_back_as_it_was() -> None:
    root = logging.getLogger()
    before = [*root.handlers]
    with run_told(as_json=True):
        assert len(root.handlers) == len(before) + 1
    assert root.handlers == before and not terminal.console.quiet


def test_libraries_have_no_handlers_of_their_own() -> None:
    with run_told():
        libraries_told_here()
    assert [logging.getLogger(name).handlers for name in ("transformers", "datasets", "huggingface_hub")] == [[]] * 3
