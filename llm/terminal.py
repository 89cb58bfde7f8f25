"""What the user sees: progress bars with rate and remaining time, and short tables, on standard error.

Piped into a file, bars are left out and everything else is plain text.
"""

import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

console = Console(stderr=True, highlight=False, soft_wrap=True, emoji=False)  # `:key:` in a message is no emoji


def is_live(screen: Console) -> bool:
    """Whether bars may be drawn there: on a terminal, and unless it is to be quiet."""
    return screen.is_terminal and not screen.quiet


class RateColumn(ProgressColumn):
    """`unit`s per second, or the seconds that one takes where it is slower than one a second."""

    def __init__(self, unit: str) -> None:
        """`unit`: what is counted, in the plural ("rows", "blocks")."""
        super().__init__()
        self._unit = unit

    def render(self, task: Task) -> Text:
        """The rate of one bar."""
        speed = task.finished_speed or task.speed or task.completed / (task.elapsed or 1)
        if not speed:
            return Text(f"- {self._unit}/s")
        slow = f"{1 / speed:.1f} s/{self._unit.removesuffix('s')}"
        return Text(f"{speed:,.0f} {self._unit}/s" if speed >= 1 else slow)


@contextmanager
def progress_bar(description: str, *, total: int, unit: str) -> Iterator[Callable[[int], None]]:
    """A function that moves the bar on by so many `unit`s ("rows", "blocks"), while the context is open."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=16),  # so that the remaining time fits into 80 columns, up to 999,999 rows
        MofNCompleteColumn(),
        RateColumn(unit),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not is_live(console)) as progress:
        task = progress.add_task(description, total=total)
        yield functools.partial(progress.advance, task)


def working(description: str) -> AbstractContextManager[object]:
    """A sign of life for work that cannot be counted; gone when it is done."""
    return console.status(f"{description} ...") if is_live(console) else nullcontext()


@contextmanager
def library_bars_hidden() -> Iterator[None]:
    """No progress bars of `datasets` in between: they count something else than ours, and fill piped output."""
    from datasets.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    if are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


def print_table(title: str, rows: Iterable[tuple[str, str]]) -> None:
    """Two columns: what, and how much."""
    lines = list(rows)
    width = max((len(name) for name, _ in lines), default=0)
    console.print(title, style="bold", markup=False)
    for name, value in lines:
        console.print(Text.assemble((f"  {name:<{width}}  ", "dim"), value))
