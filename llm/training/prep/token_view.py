"""Tokens and what becomes of them -> lines for a terminal, of which colour only repeats what the characters say.

--- row 0 (node 0): 8 tokens, 3 trained
prompt     <|im_start|>│user│↵
           Hi│·there
trained  > Hel│lo
stop     > <|im_end|>
padding    <pad> x 37
"""

import io
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Literal

from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from llm.tokenizer import PromptTokenizer
from llm.training.prep.token_text import BOUNDARY, CONTINUED, MARKS, NEWLINE, SPACE, TAB, shown_tokens

Kind = Literal["prompt", "shared", "trained", "stop", "padding"]
_STYLES: dict[Kind, str] = {
    "prompt": "",
    "shared": "cyan",
    "trained": "bold green",
    "stop": "bold black on green",
    "padding": "dim",
}
_SIDE_MARKS: dict[Kind, str] = {"prompt": " ", "shared": "=", "trained": ">", "stop": ">", "padding": " "}
_ID_MARK = "#"
_LABEL_WIDTH = 8
_GUTTER_WIDTH = _LABEL_WIDTH + 3

_LABEL_STYLES: dict[Kind, str] = {"stop": _STYLES["trained"]}  # its background is for the token alone

Line = tuple[str, Text]  # a side mark and what stands behind it
Cell = tuple[str, str]  # what a token shows, and its id as text ("" when ids are not asked for)


@dataclass(frozen=True, kw_only=True)
class Run:
    """Neighbouring tokens of one kind: as many `ids` as texts `shown`."""

    kind: Kind
    ids: tuple[int, ...]
    shown: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Part:
    """One node of a block, or its padding; `title` None: nothing is said of it."""

    title: str | None
    runs: tuple[Run, ...]


@dataclass(frozen=True, kw_only=True)
class View:
    """One block or row."""

    title: str
    parts: tuple[Part, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Layout:
    """`width`: columns of the terminal. `max_tokens`: shown of a run (0 = all of it), its first and its last."""

    width: int = 80
    has_ids: bool = False
    max_tokens: int = 0


def token_runs(
    ids: Sequence[int],
    is_trained: Sequence[bool],
    *,
    untrained: Kind,
    tokenizer: PromptTokenizer,
    stop_token_id: int,
    context: Sequence[int] = (),
) -> tuple[Run, ...]:
    """`ids` (n) by kind: trained where `is_trained` (n), else `untrained`; `context`: the ids before them.

    A trained token is the stop token where it has its id and ends what is trained.

        ids         1   9   7   8   2
        is_trained  no  no  yes yes yes
        kinds       prompt  trained stop
    """
    kinds: list[Kind] = ["trained" if trained else untrained for trained in is_trained]
    for place, number in enumerate(ids):
        is_last = place + 1 == len(ids) or not is_trained[place + 1]
        if is_trained[place] and is_last and number == stop_token_id:
            kinds[place] = "stop"
    runs, start = [], 0
    for kind, group in groupby(kinds):
        end = start + len(list(group))
        before = [*context, *ids[:start]]
        shown = shown_tokens(ids[start:end], tokenizer, context=before)
        runs.append(Run(kind=kind, ids=tuple(ids[start:end]), shown=tuple(shown)))
        start = end
    return tuple(runs)


def legend() -> Text:
    """What the marks mean, in one line."""
    marks = (
        (BOUNDARY, "between tokens"),
        (SPACE, "space"),
        (NEWLINE, "newline"),
        (TAB, "tab"),
        (CONTINUED, "character goes on"),
        (">", "trained"),
    )
    return Text("   ".join(f"{mark} {meaning}" for mark, meaning in marks), style="dim")


def print_views(views: Iterable[View], *, has_ids: bool, max_tokens: int) -> None:
    """Each view as soon as it is made, on standard output; see `Layout`."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a pipe that is not UTF-8
    console = Console(highlight=False, soft_wrap=True)
    layout = Layout(width=console.width, has_ids=has_ids, max_tokens=max_tokens)
    for number, view in enumerate(views):
        console.print(Text("") if number else legend())
        for line in view_lines(view, layout):
            console.print(line)


def view_lines(view: View, layout: Layout) -> Iterator[Text]:
    """The lines of `view`, none wider than `layout.width` unless a single token is."""
    yield Text(view.title, style="bold")
    for part in view.parts:
        if part.title is not None:
            yield Text(f"--- {part.title}", style="bold dim")
        for run in part.runs:
            yield from _run_lines(run, layout)


def _run_lines(run: Run, layout: Layout) -> Iterator[Text]:
    """The label stands before the first line, a side mark before each of them."""
    label: str = run.kind
    for mark, line in _padding_lines(run, layout) if run.kind == "padding" else _token_lines(run, layout):
        yield Text.assemble((f"{label:<{_LABEL_WIDTH}} {mark} ", _LABEL_STYLES.get(run.kind, _STYLES[run.kind])), line)
        label = ""


def _token_lines(run: Run, layout: Layout) -> Iterator[Line]:
    cells = [(text, str(number) if layout.has_ids else "") for text, number in zip(run.shown, run.ids, strict=True)]
    left_out = len(cells) - layout.max_tokens if layout.max_tokens else 0
    if left_out <= 0:
        yield from _cell_lines(cells, run.kind, layout)
        return
    num_first = (layout.max_tokens + 1) // 2
    yield from _cell_lines(cells[:num_first], run.kind, layout)
    told = f"... {left_out:,} of {len(cells):,} tokens left out (--tokens 0 shows all) ..."
    yield _SIDE_MARKS[run.kind], Text(told, style="dim")
    yield from _cell_lines(cells[num_first + left_out :], run.kind, layout)


def _padding_lines(run: Run, layout: Layout) -> Iterator[Line]:
    for (text, number), group in groupby(zip(run.shown, run.ids, strict=True)):
        id_text = f" (id {number})" if layout.has_ids else ""
        yield _SIDE_MARKS[run.kind], Text(f"{text}{id_text} x {len(list(group)):,}", style=_STYLES[run.kind])


def _cell_lines(cells: Sequence[Cell], kind: Kind, layout: Layout) -> Iterator[Line]:
    for row in _rows(cells, layout.width - _GUTTER_WIDTH):
        widths = [_width(cell) if layout.has_ids else 0 for cell in row]
        yield _SIDE_MARKS[kind], _joined((text for text, _ in row), widths, _STYLES[kind])
        if layout.has_ids:
            yield _ID_MARK, _joined((number for _, number in row), widths, "dim")


def _rows(cells: Iterable[Cell], width: int) -> Iterator[list[Cell]]:
    """As many cells a line as fit, a new one after every newline, as in the text itself."""
    row: list[Cell] = []
    used = 0
    for cell in cells:
        if row and used + _width(cell) > width:
            yield row
            row, used = [], 0
        row.append(cell)
        used += _width(cell) + len(BOUNDARY)
        if cell[0].endswith(NEWLINE):
            yield row
            row, used = [], 0
    if row:
        yield row


def _width(cell: Cell) -> int:
    return max(cell_len(cell[0]), len(cell[1]))


def _joined(texts: Iterable[str], widths: Sequence[int], style: str) -> Text:
    """The texts, each as wide as told, with boundaries; our marks are dim, so that the text stands out."""
    padded = [text + " " * (width - cell_len(text)) for text, width in zip(texts, widths, strict=True)]
    line = Text(BOUNDARY.join(padded).rstrip(" "), style=style)
    line.highlight_regex(MARKS, "not bold dim")
    return line
