"""What the user sees: bars with rate and remaining time on a terminal, plain text and no bars in a pipe."""

import io
import re

import pytest
from datasets.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from rich.console import Console

from llm import terminal


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """What is shown on a terminal of 100 columns."""
    shown = io.StringIO()
    monkeypatch.setattr(terminal, "console", Console(file=shown, force_terminal=True, width=100, soft_wrap=True))
    return shown


def plain(shown: str) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown)


def count_to_four() -> None:
    with terminal.progress_bar("Tokenizing", total=4, unit="rows") as advance:
        advance(1)
        advance(3)


def test_progress_bar_on_a_terminal_shows_count_rate_and_remaining_time(screen: io.StringIO) -> None:
    count_to_four()
    last = plain(screen.getvalue()).rstrip().splitlines()[-1]
    assert re.search(r"^Tokenizing .* 4/4 [\d,.-]+ (rows/s|s/row) 0:00:0\d left 0:00:00", last)


def test_progress_bar_in_a_pipe_prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    count_to_four()
    with terminal.working("Reading"):
        pass
    assert capsys.readouterr() == ("", "")


def test_progress_bar_after_an_error_gives_the_cursor_back(screen: io.StringIO) -> None:
    with pytest.raises(ValueError, match="row 3"), terminal.progress_bar("Tokenizing", total=4, unit="rows"):
        raise ValueError("row 3")
    hidden, shown = screen.getvalue().rfind("\x1b[?25l"), screen.getvalue().rfind("\x1b[?25h")
    assert 0 <= hidden < shown


def test_table_in_a_pipe_is_aligned_and_never_wrapped_or_marked_up(capsys: pytest.CaptureFixture[str]) -> None:
    long = "[red]" + "x" * 200
    terminal.print_table("Prepared", [("rows", "1"), ("written to", long)])
    assert capsys.readouterr().err == f"Prepared\n  rows        1\n  written to  {long}\n"


@pytest.mark.parametrize("were_disabled", [False, True])
def test_library_bars_are_hidden_in_between_and_then_as_before(were_disabled: bool) -> None:
    before = are_progress_bars_disabled()
    try:
        disable_progress_bars() if were_disabled else enable_progress_bars()
        with terminal.library_bars_hidden():
            assert are_progress_bars_disabled()
        assert are_progress_bars_disabled() is were_disabled
    finally:
        disable_progress_bars() if before else enable_progress_bars()
