"""Examples on their way to blocks: spilled to an Arrow file, so that only lengths stay in memory.

`ExampleWriter` takes the outcomes of stage 3 in batches; `Examples` gives them back from a memory map in any order.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from llm.prompt_format import TrainOn
from llm.training.prep.arrays import Ints, make_lists
from llm.training.prep.encode import Dropped, Example, Outcome
from llm.training.prep.manifest import Sample
from llm.training.prep.rows import Row

SCHEMA = pa.schema(
    [
        ("row", pa.int64()),
        ("text", pa.string()),
        ("input_ids", pa.list_(pa.int32())),
        ("trained", pa.list_(pa.int32())),  # start, end, start, end, ...
    ]
)
_NUM_SAMPLES = 16
_LEDGER = {
    "row": pa.int64(),
    "outcome": pa.string(),  # kept, cut, dropped
    "reason": pa.string(),
    "num_tokens": pa.int32(),
    "num_prompt_tokens": pa.int32(),
    "num_trained_tokens": pa.int32(),
    "num_cut_contexts": pa.int32(),
    "num_cut_characters": pa.int32(),
    "has_control_text": pa.bool_(),
    "num_contexts_characters": pa.int32(),  # of those that are left
}


@dataclass(frozen=True, kw_only=True)
class Examples:
    """The kept examples (`table`, memory-mapped, in row order), their lengths, and what became of every row.

    `samples` are a few prompts, `source_fingerprint` is a hash of all rows as read.
    """

    table: pa.Table
    lengths: Ints
    ledger: pa.Table
    samples: list[Sample]
    source_fingerprint: str

    def counts(self) -> Counter[str]:
        """Rows by outcome: `kept`, `cut` (kept in part), `dropped: <reason>`."""
        reasons = zip(self.ledger["outcome"].to_pylist(), self.ledger["reason"].to_pylist(), strict=True)
        return Counter(f"{outcome}: {reason}" if outcome == "dropped" else outcome for outcome, reason in reasons)


class ExampleWriter:
    """Writes outcomes to `folder`; used as a context, then `read()`."""

    def __init__(self, folder: Path) -> None:
        """Opens the spill file in `folder`, which must exist."""
        self._path = folder / "examples.arrow"
        self._sink = pa.OSFile(str(self._path), "wb")
        self._writer = pa.ipc.new_file(self._sink, SCHEMA)
        self._lengths: list[npt.NDArray[np.int64]] = []
        self._ledger: list[pa.RecordBatch] = []
        self._samples: list[Sample] = []
        self._source = hashlib.blake2b(digest_size=16)

    def __enter__(self) -> Self:
        """The writer itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Closes the file."""
        self._writer.close()
        self._sink.close()

    def add(self, rows: Sequence[Row], outcomes: Sequence[Outcome], *, train_on: TrainOn = "all") -> None:
        """Appends one batch of rows and what became of them, in row order."""
        self._source.update(json.dumps([_facts(row) for row in rows]).encode())
        if len(self._samples) < _NUM_SAMPLES:
            self._samples += list(_samples(rows, outcomes, train_on))[: _NUM_SAMPLES - len(self._samples)]
        examples = [outcome for outcome in outcomes if isinstance(outcome, Example)]
        entries = list(zip(*map(_entry, rows, outcomes), strict=True))
        columns = [pa.array(values, kind) for values, kind in zip(entries, _LEDGER.values(), strict=True)]
        self._ledger.append(pa.record_batch(columns, schema=pa.schema(_LEDGER)))
        self._lengths.append(np.array([len(example.input_ids) for example in examples], dtype=np.int64))
        columns = [
            pa.array([example.row for example in examples], pa.int64()),
            pa.array([example.text for example in examples], pa.string()),
            _lists([example.input_ids for example in examples]),
            _lists([[place for span in example.trained for place in span] for example in examples]),
        ]
        self._writer.write_batch(pa.record_batch(columns, schema=SCHEMA))

    def read(self) -> Examples:
        """What was written; the tokens stay on disk."""
        with pa.memory_map(str(self._path)) as source:
            table = pa.ipc.open_file(source).read_all()
        lengths = np.concatenate(self._lengths) if self._lengths else np.empty(0, dtype=np.int64)
        return Examples(
            table=table,
            lengths=lengths,
            ledger=pa.Table.from_batches(self._ledger),
            samples=self._samples,
            source_fingerprint=self._source.hexdigest(),
        )


def _samples(rows: Sequence[Row], outcomes: Sequence[Outcome], train_on: TrainOn) -> Iterator[Sample]:
    """Whole rows without control-token text: those that a chat template can reproduce."""
    for row, outcome in zip(rows, outcomes, strict=True):
        if isinstance(outcome, Example) and not outcome.is_cut and not outcome.has_control_text:
            yield Sample(**row.first_prompt(train_on), prompt_ids=outcome.input_ids[: outcome.num_prompt_tokens])


def _lists(values: list[list[int]]) -> pa.ListArray:
    """A list array through NumPy: several times faster than handing Arrow the Python lists."""
    lengths = np.array([len(one) for one in values], dtype=np.int64)
    flat = np.fromiter(chain.from_iterable(values), dtype=np.int32, count=int(lengths.sum()))
    return make_lists(flat, lengths, pa.int32())


def _facts(row: Row) -> list[object]:
    """All that a row says, as JSON can hold it."""
    return [row.number, row.system, row.chat, [[t.input, t.response, *t.contexts, t.is_trained] for t in row.turns]]


def _entry(row: Row, outcome: Outcome) -> tuple[object, ...]:
    """The values of the ledger's columns, in their order."""
    if isinstance(outcome, Dropped):
        return (outcome.row, "dropped", outcome.reason, outcome.num_tokens or None, None, None, None, None, None, None)
    contexts = [context for turn in row.turns for context in turn.contexts]
    return (
        outcome.row,
        "cut" if outcome.is_cut else "kept",
        None,
        len(outcome.input_ids),
        outcome.num_prompt_tokens,
        outcome.num_trained_tokens,
        outcome.num_cut_contexts,
        outcome.num_cut_characters,
        outcome.has_control_text,
        sum(map(len, contexts[: len(contexts) - outcome.num_cut_contexts])),
    )
