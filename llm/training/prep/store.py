"""Examples on their way to blocks: spilled to Arrow files, so that only lengths stay in memory.

`ShardStore` puts what became of each batch of rows into files of its own, under a hash of these rows, or finds them
there; `Examples` gives all of them back from memory maps in any order.
"""

import functools
import hashlib
import marshal
import os
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa

from llm.cache import write_whole
from llm.fast_tokenizer import TokenIds
from llm.prompt_format import TrainOn
from llm.training.prep.arrays import Ints, make_lists
from llm.training.prep.duplicates import ExampleHashes, hash_examples
from llm.training.prep.encode import Dropped, Example, Outcome
from llm.training.prep.file_pages import give_pages_back, map_file
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
    "num_cut_tokens": pa.int32(),
    "has_control_text": pa.bool_(),
    "num_contexts_characters": pa.int32(),  # of those that are left
}


@dataclass(frozen=True, kw_only=True)
class Examples:
    """The kept examples (in row order), their lengths and hashes, and what became of every row.

    `table` is memory-mapped and stays as it was spilled: example n is its row `places[n]`. `samples` are a few prompts,
    `source_fingerprint` is a hash of all rows as read. `held_out`, of those to train on: those kept apart to evaluate,
    which have a ledger of their own.
    """

    table: pa.Table
    places: Ints
    lengths: Ints
    hashes: ExampleHashes
    ledger: pa.Table
    samples: list[Sample]
    source_fingerprint: str
    split: Literal["train", "eval"] = "train"
    held_out: "Examples | None" = None

    def counts(self) -> Counter[str]:
        """Rows by outcome: `kept`, `cut` (kept in part), `dropped: <reason>`."""
        groups = self.ledger.group_by(["outcome", "reason"], use_threads=False)  # else in any order
        found = groups.aggregate([([], "count_all")]).to_pylist()
        return Counter({": ".join(filter(None, (one["outcome"], one["reason"]))): one["count_all"] for one in found})


@dataclass(frozen=True, kw_only=True)
class Shard:
    """What became of one batch of rows: `examples` (of SCHEMA) and a ledger line for each row, both memory-mapped.

    Hashed where threads make it, 0.1 s of 20,000 rows.
    """

    examples: pa.RecordBatch
    ledger: pa.RecordBatch
    hashes: ExampleHashes
    digest: str
    is_reused: bool


class ShardStore:
    """Shards in a folder, all made by the same encoder; a killed run leaves whole ones, and none in part."""

    def __init__(self, folder: Path) -> None:
        """Uses what is in `folder`, which need not be there."""
        self._folder = folder

    def shard(self, rows: Sequence[Row], encode: Callable[[Sequence[Row]], Sequence[Outcome]]) -> Shard:
        """The shard of `rows`, found or made by `encode`; threads may call this, each with its own rows."""
        digest = hashlib.blake2b(marshal.dumps([_facts(row) for row in rows], 2), digest_size=16).hexdigest()
        examples, ledger = (self._folder / f"{digest}.{name}.arrow" for name in ("examples", "ledger"))
        found = _read(ledger), _read(examples)
        if is_made := None in found:
            outcomes = encode(rows)
            made = _examples_batch(outcomes)
            for path, batch in ((examples, made), (ledger, _ledger_batch(rows, outcomes))):
                write_whole(path, functools.partial(_write, batch))
            hashes, found = hash_examples(made), (_read(ledger), _read(examples))
        else:
            hashes = hash_examples(found[1])
            for path in (examples, ledger):
                os.utime(path)  # used: `reuse.py` removes what long was not
        assert found[0] is not None and found[1] is not None
        return Shard(examples=found[1], ledger=found[0], hashes=hashes, digest=digest, is_reused=not is_made)


class Collector:
    """Takes shards in the order of their rows, gives `Examples`."""

    def __init__(self, train_on: TrainOn) -> None:
        """`train_on`: which prompts the samples show."""
        self._train_on = train_on
        self._shards: list[Shard] = []
        self._samples: list[Sample] = []
        self.num_reused_rows = 0

    def add(self, rows: Sequence[Row], shard: Shard) -> None:
        """Appends the shard of `rows`."""
        self._shards.append(shard)
        self.num_reused_rows += len(rows) * shard.is_reused
        if len(self._samples) < _NUM_SAMPLES:
            self._samples += islice(_samples(rows, shard, self._train_on), _NUM_SAMPLES - len(self._samples))

    def examples(self) -> Examples:
        """All of them; the tokens stay on disk."""
        table = pa.Table.from_batches([shard.examples for shard in self._shards], SCHEMA)
        lengths = [np.empty(0, dtype=np.int64)]
        for shard in self._shards:
            give_pages_back()  # a shard maps 64 kB to tell its lengths
            lengths.append(np.diff(shard.examples["input_ids"].offsets.to_numpy()))
        return Examples(
            table=table,
            places=np.arange(table.num_rows),
            lengths=np.concatenate(lengths),
            hashes=ExampleHashes.joined([shard.hashes for shard in self._shards]),
            ledger=pa.Table.from_batches([shard.ledger for shard in self._shards], pa.schema(_LEDGER)),
            samples=self._samples,
            source_fingerprint=hashlib.blake2b(
                "".join(shard.digest for shard in self._shards).encode(), digest_size=16
            ).hexdigest(),
        )


def _samples(rows: Sequence[Row], shard: Shard, train_on: TrainOn) -> Iterator[Sample]:
    """Whole rows without control-token text: those that a chat template can reproduce."""
    all_ids = iter(shard.examples["input_ids"])
    for row, entry in zip(rows, shard.ledger.to_pylist(), strict=True):
        if entry["outcome"] == "dropped":
            continue
        ids = next(all_ids)
        if entry["outcome"] == "kept" and not entry["has_control_text"]:
            yield Sample(**row.first_prompt(train_on), prompt_ids=ids.as_py()[: entry["num_prompt_tokens"]])


def _read(path: Path) -> pa.RecordBatch | None:
    """The batch in the file; None when it is not there, or damaged."""
    try:
        return pa.ipc.open_file(map_file(path)).get_batch(0)
    except (OSError, pa.ArrowInvalid):
        return None


def _write(batch: pa.RecordBatch, path: Path) -> None:
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(batch)


def _examples_batch(outcomes: Sequence[Outcome]) -> pa.RecordBatch:
    examples = [outcome for outcome in outcomes if isinstance(outcome, Example)]
    columns = [
        pa.array([example.row for example in examples], pa.int64()),
        pa.array([example.text for example in examples], pa.string()),
        _lists([example.input_ids for example in examples]),
        _lists([array("I", chain.from_iterable(example.trained)) for example in examples]),
    ]
    return pa.record_batch(columns, schema=SCHEMA)


def _ledger_batch(rows: Sequence[Row], outcomes: Sequence[Outcome]) -> pa.RecordBatch:
    entries = list(zip(*map(_entry, rows, outcomes), strict=True))
    columns = [pa.array(values, kind) for values, kind in zip(entries, _LEDGER.values(), strict=True)]
    return pa.record_batch(columns, schema=pa.schema(_LEDGER))


def _lists(values: Sequence[TokenIds]) -> pa.ListArray:
    flat = np.frombuffer(b"".join(values), dtype=np.int32)
    return make_lists(flat, np.array([len(one) for one in values], dtype=np.int64), pa.int32())


def _facts(row: Row) -> list[object]:
    """All that a row says, in plain types: `marshal` writes equal ones alike, as long as it is version 2 or older."""
    return [row.number, row.system, row.chat, [[t.input, t.response, *t.contexts, t.is_trained] for t in row.turns]]


def _entry(row: Row, outcome: Outcome) -> tuple[object, ...]:
    """The values of the ledger's columns, in their order."""
    if isinstance(outcome, Dropped):
        return (outcome.row, "dropped", outcome.reason, outcome.num_tokens or None, *[None] * 7)
    contexts = row.contexts
    return (
        outcome.row,
        "cut" if outcome.is_cut else "kept",
        None,
        len(outcome.input_ids),
        outcome.num_prompt_tokens,
        outcome.num_trained_tokens,
        outcome.num_cut_contexts,
        outcome.num_cut_characters,
        outcome.num_cut_tokens,
        outcome.has_control_text,
        sum(map(len, contexts[: len(contexts) - outcome.num_cut_contexts])),
    )
