"""What the user sees: progress bars with rate and remaining time, and short tables, on standard error.

Piped into a file, bars are left out and everything else is plain text.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

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
from rich.table import Table
from rich.text import Text

T = TypeVar("T")

console = Console(stderr=True, highlight=False, soft_wrap=True)


class RateColumn(ProgressColumn):
    """Steps per second, or the seconds a step takes where it is slower than one."""

    def render(self, task: Task) -> Text:
        """The rate of one bar."""
        speed = task.finished_speed or task.speed
        unit = task.fields.get("unit", "rows")
        if not speed:
            return Text(f"- {unit}/s")
        return Text(f"{speed:,.0f} {unit}/s" if speed >= 1 else f"{1 / speed:.1f} s/{unit.removesuffix('s')}")


@contextmanager
def progress_bar(unit: str) -> Iterator[Progress]:
    """A live progress display counting `unit` ("rows", "blocks", "steps"); add tasks to it with `add_task`."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        RateColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        yield progress


def track(batches: Iterable[Sequence[T]], *, total: int, description: str, unit: str) -> Iterator[Sequence[T]]:
    """The batches, with a bar that advances by the size of each."""
    with progress_bar(unit) as progress:
        task = progress.add_task(description, total=total, unit=unit)
        for batch in batches:
            yield batch
            progress.advance(task, len(batch))


def print_table(title: str, rows: Iterable[tuple[str, str]]) -> None:
    """Two columns: what, and how much."""
    table = Table(title=title, show_header=False, box=None, title_justify="left", title_style="bold")
    table.add_column(style="dim")
    table.add_column(justify="left")
    for name, value in rows:
        table.add_row(name, value)
    console.print(table)
