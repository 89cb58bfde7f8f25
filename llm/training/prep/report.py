"""What a look at the prepared data should tell: lengths, dropped rows, duplicates, a dozen examples token by token.

Takes the ledger and the examples, gives a `Report`: `report.json`, of which `report_page.py` makes `report.html`.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from llm.training.prep.arrays import Ints
from llm.training.prep.duplicates import first_equals
from llm.training.prep.encode import DROP_ADVICE, Encoder
from llm.training.prep.manifest import Manifest
from llm.training.prep.store import Examples
from llm.training.prep.token_view import Run, token_runs

_NUM_FIRST_ROWS = 5
_NUM_LONGEST = 10
_NUM_EXAMPLES = 12
_MOST_TOKENS = 300  # of a prompt or a response that are shown whole: a dozen take 0.1 s at most
_END_TOKENS = 120  # shown of the beginning and of the end of a longer one
_LEAST_SAME = 16  # tokens; a shorter beginning is shown again in every example
_BINS_PER_DOUBLING = 4

Flags = npt.NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True)
class FoundRows:
    """How many rows something holds for, and the numbers of the first few."""

    rows: int
    first_rows: list[int]


@dataclass(frozen=True, kw_only=True)
class DroppedRows(FoundRows):
    """Rows that became no example, and what helps."""

    reason: str
    advice: str


@dataclass(frozen=True, kw_only=True)
class CutRows(FoundRows):
    """Rows that were kept in part: what they lost, together; characters are those of the input."""

    contexts: int
    characters: int
    tokens: int


@dataclass(frozen=True, kw_only=True)
class Duplicates:
    """`rows`: those equal to an earlier one, prompt and response; `first`: pairs of such a row and the earlier one.

    `ambiguous_prompts`: prompts that have several responses, with the first row of each.
    """

    rows: int
    first: list[tuple[int, int]]
    ambiguous_prompts: FoundRows


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """Tokens of the `rows` that have any; `median` and `p95` are lengths of rows, all are 0 where `rows` is.

    `counts[b]` rows have from `bin_edges[b]` up to, not with, `bin_edges[b + 1]` tokens (`Report.bin_edges`).
    """

    rows: int
    min: int
    median: int
    mean: float
    p95: int
    max: int
    counts: list[int]


@dataclass(frozen=True, kw_only=True)
class LongRow:
    """One of the longest rows, dropped ones included where they were tokenized."""

    row: int
    num_tokens: int
    num_prompt_tokens: int | None
    num_trained_tokens: int | None
    outcome: str


@dataclass(frozen=True, kw_only=True)
class Gap:
    """Tokens that are not shown; `same_as_row`: they are those of that row (None: there are too many)."""

    num_tokens: int
    same_as_row: int | None


@dataclass(frozen=True, kw_only=True)
class ShownExample:
    """An example token by token, and why this one."""

    row: int
    why: str
    num_tokens: int
    num_trained_tokens: int
    parts: list[Run | Gap]


@dataclass(frozen=True, kw_only=True)
class Report:
    """The facts of a prepared data set that are worth a look; `counts` are those of the manifest.

    `lengths`: `prompt` (before the first label), `contexts` (estimated), `response` (labels), `total`; of kept rows.
    """

    base_model: str
    source: dict[str, Any]
    prompt: str
    prompt_format: str
    stop_token: str
    chunksize: int
    counts: dict[str, Any]
    trained_share: float
    dropped: list[DroppedRows]
    cut: CutRows
    control_text: FoundRows
    is_control_text_allowed: bool
    duplicates: Duplicates
    bin_edges: list[int]
    lengths: dict[str, Lengths]
    longest: list[LongRow]
    examples: list[ShownExample]

    def as_json(self) -> str:
        """The text of `report.json`."""
        return json.dumps(self, default=vars, ensure_ascii=False, indent=1)


def make_report(manifest: Manifest, examples: Examples, ledger: pa.Table, encoder: Encoder) -> Report:
    """The report of a finished preparation of `examples`; `ledger` as `make_ledgers` gives it."""
    counts = manifest.counts
    of_split = pc.equal(ledger["split"], examples.split)  # null for a dropped row
    kept = ledger.filter(of_split)
    edges, lengths = _lengths(kept)
    return Report(
        base_model=manifest.base_model,
        source=manifest.source,
        prompt=manifest.prompt["method"],
        prompt_format=manifest.prompt_format["method"],
        stop_token=manifest.stop_token,
        chunksize=manifest.chunksize,
        counts=counts,
        trained_share=round(counts["trained_tokens"] / counts["tokens"], 4),
        dropped=[DroppedRows(reason=name, advice=DROP_ADVICE[name], **found) for name, found in _dropped(counts)],
        cut=_cut(kept),
        control_text=_found(kept["row"], _flags(kept, "has_control_text")),
        is_control_text_allowed=encoder.allow_special_tokens_in_data,
        duplicates=_duplicates(examples),
        bin_edges=edges,
        lengths=lengths,
        longest=_longest(ledger, of_split.fill_null(True)),
        examples=_shown_examples(examples, kept, encoder),
    )


# --- counts ----------------------------------------------------------------------------------------------------------


def _dropped(counts: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    return sorted(counts["rows_dropped"].items(), key=lambda item: -item[1]["rows"])


def _cut(kept: pa.Table) -> CutRows:
    found = _found(kept["row"], _flags(kept, "outcome", "cut"))
    contexts, characters, tokens = (
        pc.sum(kept[f"num_cut_{part}"]).as_py() or 0 for part in ("contexts", "characters", "tokens")
    )
    return CutRows(**asdict(found), contexts=contexts, characters=characters, tokens=tokens)


def _duplicates(examples: Examples) -> Duplicates:
    places, numbers = np.unique(examples.places, return_index=True)  # a row that is drawn twice is no duplicate
    rows, hashes = examples.table["row"].take(pa.array(places)), examples.hashes.take(numbers)
    equals, same_prompt = first_equals(hashes.whole), first_equals(hashes.prompt)
    is_repeated = equals != np.arange(len(equals))
    repeated = np.flatnonzero(is_repeated)[:_NUM_FIRST_ROWS]
    num_responses = np.bincount(same_prompt[~is_repeated], minlength=len(equals))
    return Duplicates(
        rows=int(is_repeated.sum()),
        first=list(zip(rows.take(repeated).to_pylist(), rows.take(equals[repeated]).to_pylist(), strict=True)),
        ambiguous_prompts=_found(rows, num_responses > 1),
    )


def _longest(ledger: pa.Table, flags: pa.ChunkedArray) -> list[LongRow]:
    if "draw" in ledger.column_names:  # a row that is seen twice is one row
        flags = pc.and_(flags, pc.equal(ledger["draw"].fill_null(0), 0))
    num_tokens = pc.if_else(flags, ledger["num_tokens"].fill_null(0), 0).to_numpy()
    order = np.argsort(-num_tokens, kind="stable")[:_NUM_LONGEST]
    names = ("row", "num_tokens", "num_prompt_tokens", "num_trained_tokens")
    # One after the other, and below: `Table.take` copies all columns first, 260 MB where there are 200,000 rows.
    found = [row for place in order[num_tokens[order] > 0].tolist() for row in ledger.slice(place, 1).to_pylist()]
    return [
        LongRow(**{name: row[name] for name in names}, outcome=": ".join(filter(None, (row["outcome"], row["reason"]))))
        for row in found
    ]


def _found(rows: pa.ChunkedArray, flags: Flags) -> FoundRows:
    first = rows.take(np.flatnonzero(flags)[:_NUM_FIRST_ROWS]).to_pylist()
    return FoundRows(rows=int(flags.sum()), first_rows=first)


def _flags(table: pa.Table, name: str, value: object = True) -> Flags:
    flags: Flags = pc.equal(table[name], value).fill_null(False).to_numpy()
    return flags


# --- lengths ---------------------------------------------------------------------------------------------------------


def _lengths(kept: pa.Table) -> tuple[list[int], dict[str, Lengths]]:
    """Histograms over the same bins, so that they can be compared."""
    columns = {
        "prompt": "num_prompt_tokens",
        "contexts": "estimated_contexts_tokens",
        "response": "num_trained_tokens",
        "total": "num_tokens",
    }
    tokens = {name: kept[column].to_numpy() for name, column in columns.items()}
    tokens = {name: one[one > 0] for name, one in tokens.items()}
    edges = _bin_edges(np.concatenate(list(tokens.values())))
    return edges.tolist(), {name: _summary(one, edges) for name, one in tokens.items()}


def _bin_edges(lengths: Ints) -> Ints:
    """Whole numbers, equally far apart on a logarithmic scale, around all `lengths`."""
    num_doublings = int(lengths.max()).bit_length()
    powers = np.arange(num_doublings * _BINS_PER_DOUBLING + 1) / _BINS_PER_DOUBLING
    edges = np.unique(np.rint(2.0**powers).astype(np.int64))
    first = np.searchsorted(edges, lengths.min(), side="right") - 1
    last = np.searchsorted(edges, lengths.max(), side="right")
    found: Ints = edges[first : last + 1]
    return found


def _summary(lengths: Ints, edges: Ints) -> Lengths:
    if not len(lengths):
        return Lengths(rows=0, min=0, median=0, mean=0.0, p95=0, max=0, counts=[0] * (len(edges) - 1))
    median, p95 = np.percentile(lengths, [50, 95], method="inverted_cdf").tolist()
    return Lengths(
        rows=len(lengths),
        min=int(lengths.min()),
        median=int(median),
        mean=round(float(lengths.mean()), 1),
        p95=int(p95),
        max=int(lengths.max()),
        counts=np.histogram(lengths, edges)[0].tolist(),
    )


# --- examples --------------------------------------------------------------------------------------------------------


def _shown_examples(examples: Examples, kept: pa.Table, encoder: Encoder) -> list[ShownExample]:
    chosen = _chosen(kept)
    table = examples.table.select(["row", "input_ids", "trained"])
    found = [row for place in examples.places[list(chosen)].tolist() for row in table.slice(place, 1).to_pylist()]
    same = _num_same([one["input_ids"][: one["trained"][0]] for one in found])
    shown = []
    for place, (one, why) in enumerate(zip(found, chosen.values(), strict=True)):
        spans = list(zip(one["trained"][::2], one["trained"][1::2], strict=True))
        gap = Gap(num_tokens=same, same_as_row=found[0]["row"])
        rest = _parts(one["input_ids"], spans, same, encoder)
        shown.append(
            ShownExample(
                row=one["row"],
                why=why,
                num_tokens=len(one["input_ids"]),
                num_trained_tokens=sum(end - start for start, end in spans),
                parts=[*([gap] if same and place else _parts(one["input_ids"][:same], [], 0, encoder)), *rest],
            )
        )
    return shown


def _chosen(kept: pa.Table) -> dict[int, str]:
    """The examples to show and why each: the first, the extremes, what is special, and others at random."""
    tokens, trained = (kept[name].to_numpy() for name in ("num_tokens", "num_trained_tokens"))
    candidates = [
        *((place, "one of the first") for place in range(min(3, len(tokens)))),
        (tokens.argmax(), "the longest"),
        (tokens.argmin(), "the shortest"),
        (trained.argmax(), "the longest response"),
        (trained.argmin(), "the shortest response"),
        *((place, "cut to fit") for place in np.flatnonzero(_flags(kept, "outcome", "cut"))[:1]),
        *((place, "holds control-token text") for place in np.flatnonzero(_flags(kept, "has_control_text"))[:1]),
    ]
    chosen: dict[int, str] = {}
    for place, why in candidates:
        found = chosen.get(int(place))
        chosen[int(place)] = f"{found}, {why}" if found else why
    others = [int(n) for n in np.random.default_rng(0).permutation(len(tokens))[: 2 * _NUM_EXAMPLES] if n not in chosen]
    return chosen | dict.fromkeys(sorted(others[: _NUM_EXAMPLES - len(chosen)]), "at random")


def _num_same(prompts: Sequence[Sequence[int]]) -> int:
    """With how many tokens all `prompts` begin alike, without the last of any; 0 where that is too few to tell."""
    most = min(map(len, prompts)) - 1 if len(prompts) > 1 else 0
    same = next((n for n in range(most) if len({prompt[n] for prompt in prompts}) > 1), most)
    return same if same >= _LEAST_SAME else 0


def _parts(ids: Sequence[int], spans: Sequence[tuple[int, int]], first: int, encoder: Encoder) -> Iterator[Run | Gap]:
    """The tokens from `first` on by kind, of a long stretch its beginning and its end."""
    is_trained = [False] * len(ids)
    for start, end in spans:
        is_trained[start:end] = [True] * (end - start)
    stop = encoder.tokenizer.control_tokens[encoder.prompt_format.stop]
    edges = [first, *(edge for span in spans for edge in span), len(ids)]
    for start, end in zip(edges[:-1], edges[1:], strict=True):
        is_short = end - start <= _MOST_TOKENS
        pieces = [(start, end)] if is_short else [(start, start + _END_TOKENS), (end - _END_TOKENS, end)]
        for number, (left, right) in enumerate(pieces):
            if number:
                yield Gap(num_tokens=left - pieces[0][1], same_as_row=None)
            yield from token_runs(
                ids[left:right],
                is_trained[left:right],
                untrained="prompt",
                tokenizer=encoder.tokenizer,
                stop_token_id=stop,
                context=ids[:left],
            )
