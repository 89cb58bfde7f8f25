"""A `Report` as one HTML page that needs nothing else: no network, no scripts, light and dark, screen and paper.

The page is `report_page.html` (Jinja, everything escaped); here is what it cannot work out: histograms and findings.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import files

from llm.training.prep.report import Gap, Lengths, Report, ShownExample
from llm.training.prep.token_text import MARKS, NEWLINE
from llm.training.prep.token_view import Run

_WIDTH, _HEIGHT, _BASE = 480, 150, 126  # of a histogram; _BASE: where the bars stand, the numbers are below
_TOP, _LEFT, _RIGHT = 14, 6, 474
_MOST_TICKS = 8
_TITLES = {
    "prompt": ("Prompt", "tokens before the first trained one"),
    "contexts": ("Contexts", "estimated: their share of the row's characters"),
    "response": ("Response", "trained tokens, with the stop token"),
    "total": ("Total", "all tokens of a row"),
}


@dataclass(frozen=True, kw_only=True)
class Bar:
    """One bar of a histogram, in units of its picture."""

    x: float
    y: float
    width: float
    height: float
    label: str


@dataclass(frozen=True, kw_only=True)
class Histogram:
    """A picture of `Lengths`: bars, numbers below (`ticks`), and where median and 95th percentile are (`marks`)."""

    title: str
    note: str
    lengths: Lengths
    bars: list[Bar]
    ticks: list[tuple[float, str]]
    marks: list[tuple[float, str]]


def render_page(report: Report) -> str:
    """The HTML of `report`; the same text for the same facts."""
    import jinja2

    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"number": _number, "percent": _percent, "cells": _cells, "plural": _plural}
    template = environment.from_string(files(__package__).joinpath("report_page.html").read_text(encoding="utf-8"))
    return template.render(
        report=report,
        counts=report.counts,
        num_dropped=sum(found.rows for found in report.dropped),
        num_repeats=report.counts.get("rows_repeated", 0),
        sources=report.counts.get("sources", []),
        num_held_out=report.counts.get("rows_held_out", 0),
        findings=list(_findings(report)),
        histograms=[_histogram(name, report) for name in _TITLES],
        picture=(_WIDTH, _HEIGHT, _BASE, _TOP),
        examples=[{"shown": shown, "rows": list(_rows(shown))} for shown in report.examples],
    )


def _findings(report: Report) -> Iterator[tuple[str, str]]:
    """What deserves a look: the id of a section, and a sentence."""
    if num_dropped := sum(found.rows for found in report.dropped):
        share = _percent(num_dropped / report.counts["rows_read"])
        yield "rows", f"{_plural(num_dropped, 'row')} dropped ({share})"
    if report.cut.rows:
        yield "rows", f"{_plural(report.cut.rows, 'row')} cut to fit"
    if report.duplicates.rows:
        yield "duplicates", f"{_plural(report.duplicates.rows, 'row')} repeated word for word"
    if num_prompts := report.duplicates.ambiguous_prompts.rows:
        yield "duplicates", f"{_plural(num_prompts, 'prompt')} with more than one response"
    if report.control_text.rows:
        yield "control", f"{_plural(report.control_text.rows, 'row')} with control-token text"


def _histogram(name: str, report: Report) -> Histogram:
    lengths, edges = report.lengths[name], report.bin_edges
    title, note = _TITLES[name]
    highest = max(lengths.counts) or 1
    bars = []
    for low, high, count in zip(edges[:-1], edges[1:], lengths.counts, strict=True):
        x, end = _place(low, edges), _place(high, edges)
        height = (_BASE - _TOP) * count / highest
        height = max(height, 1.5) if count else 0  # one row among thousands is still to be seen
        span = f"{low:,}" if high - low == 1 else f"{low:,} to {high - 1:,}"
        label = f"{span} tokens: {_plural(count, 'row')}"
        bars.append(Bar(x=x, y=_BASE - height, width=max(end - x - 1, 0.5), height=height, label=label))
    marks = [(lengths.median, "median"), (lengths.p95, "p95")] if lengths.rows else []
    return Histogram(
        title=title,
        note=note,
        lengths=lengths,
        bars=[bar for bar in bars if bar.height],
        ticks=list(_ticks(edges)),
        marks=[(_place(value, edges), label) for value, label in marks],
    )


def _place(tokens: int, edges: list[int]) -> float:
    """Where so many tokens are, from left to right, on the logarithmic scale."""
    share = math.log(tokens / edges[0]) / math.log(edges[-1] / edges[0])
    return round(_LEFT + (_RIGHT - _LEFT) * share, 1)


def _ticks(edges: list[int]) -> Iterator[tuple[float, str]]:
    """Powers of two; every second, third, ... where there are many. The least one where there is none."""
    first, last = math.ceil(math.log2(edges[0])), math.floor(math.log2(edges[-1]))
    step = -(-(last - first + 1) // _MOST_TICKS) or 1
    for power in range(first, last + 1, step):
        yield _place(2**power, edges), f"{2**power:,}"


def _rows(example: ShownExample) -> Iterator[tuple[str, list[Run | Gap]]]:
    """The parts that stand together: of one kind, with what is left out of it; the stop token ends what is trained."""
    kind, row = "", list[Run | Gap]()
    for part in example.parts:
        new = (kind or "prompt") if isinstance(part, Gap) else "trained" if part.kind == "stop" else part.kind
        if row and new != kind:
            yield kind, row
            row = []
        kind, row = new, [*row, part]
    yield kind, row


def _cells(run: Run) -> Iterator[tuple[int, list[tuple[bool, str]], bool]]:
    """Of each token the id, what it shows in pieces, and whether it ends a line."""
    for number, text in zip(run.ids, run.shown, strict=True):
        yield number, _marked(text), text.endswith(NEWLINE)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:,}"


def _percent(share: float) -> str:
    """Never 0 % or 100 % of what is not none or all."""
    if 0 < share < 0.001:
        return "< 0.1 %"
    if 0.999 < share < 1:
        return "> 99.9 %"
    return f"{share:.1%}".replace(".0%", "%").replace("%", " %")


def _marked(text: str) -> list[tuple[bool, str]]:
    """`text` in pieces: our marks (`·`, `↵`), and what stands in the data."""
    pieces, start = [], 0
    for found in MARKS.finditer(text):
        pieces += [(False, text[start : found.start()]), (True, found.group())]
        start = found.end()
    return [piece for piece in [*pieces, (False, text[start:])] if piece[1]]


def _plural(number: int, thing: str) -> str:
    return f"{number:,} {thing}{'' if number == 1 else 's'}"
