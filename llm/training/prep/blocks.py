"""Stage 5, first half: examples and their packing -> the columns of blocks, a thousand blocks at a time.

Works on whole batches as NumPy arrays: no token passes through Python.
"""

from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from llm.fast_tokenizer import TokenIds
from llm.tokenizer import PromptTokenizer
from llm.training.config import DataPrepConfig
from llm.training.prep.arrays import FlatLists, Ints, make_lists
from llm.training.prep.nodes import Nodes, shared_nodes, single_nodes
from llm.training.prep.overlap import Threads
from llm.training.prep.pack import Packing
from llm.training.prep.share import Forest

DecodeBytes = Callable[[Sequence[TokenIds]], pa.LargeBinaryArray]

_TOKENS_AT_ONCE = 2**17  # of a batch of blocks, of which up to four are in memory, 40 bytes a token
_THREADS = 2  # beside the one that writes
_BATCHES_READ = 8  # together: 10 MB
_TOKENS = pa.list_(pa.int32())
BLOCK_SCHEMA = pa.schema(
    [
        ("input_ids", _TOKENS),
        ("attention_mask", pa.list_(pa.int8())),
        ("labels", _TOKENS),
        ("position_ids", _TOKENS),
        ("node_lengths", _TOKENS),
        ("node_parents", _TOKENS),
        ("full_text", pa.string()),
        ("example_rows", pa.list_(pa.int64())),
    ]
)


@dataclass(frozen=True, kw_only=True)
class Padding:
    """What fills a block up to `length` tokens (None: blocks are left as long as they are)."""

    length: int | None
    token_id: int
    ignore_index: int


def padding(config: DataPrepConfig, tokenizer: PromptTokenizer) -> Padding:
    """The padding of `config`; without a padding token the id is 0, which no loss ever sees."""
    return Padding(
        length=config.chunksize if config.pad_to_chunksize else None,
        token_id=tokenizer.pad_token_id,
        ignore_index=config.ignore_index,
    )


def iterate_blocks(
    examples: pa.Table,
    packing: Packing,
    padding: Padding,
    *,
    decode: DecodeBytes | None = None,
    places: Ints | None = None,
) -> Iterator[pa.RecordBatch]:
    """Batches of `BLOCK_SCHEMA`, from `examples` or from those at `places`, which are the ones that were packed.

    Two examples of 4 tokens padded to 9 become one block:

        input_ids      1 100 100 2  1 200 200 2  0
        attention_mask 1   1   1 1  1   1   1 1  0
        labels      -100 100 100 2 -100 200 200 2 -100
        position_ids   0   1   2 3  0   1   2 3  0
        node_lengths   4 4          node_parents -1 -1      example_rows  0 1

    Two of 5 that share 3 become another:

        input_ids         1   7   7   100   3   200   4    0    0
        labels         -100 -100 -100 -100  3  -100   4 -100 -100
        position_ids      0   1   2     3   4     3   4    0    0
        node_lengths   3 2 2        node_parents -1 0 0     example_rows  0 1

    `full_text` is that of the examples, each without the beginning that is there already; how much of the text that is
    is told by `decode`, without which all of it is repeated.
    """

    def columns_of(batch: _Batch) -> pa.RecordBatch:
        return _columns_of(batch, packing.forest, padding, decode)

    places = np.arange(examples.num_rows) if places is None else places
    with Threads(_THREADS) as threads:
        for _, columns in threads.in_order(columns_of, _batches(_Columns.of(examples), packing, places)):
            yield columns


@dataclass(frozen=True, kw_only=True)
class _Columns:
    """Of each example what blocks are made of."""

    rows: Ints
    input_ids: FlatLists
    trained: FlatLists
    texts: FlatLists

    @classmethod
    def of(cls, table: pa.Table) -> Self:
        ids, trained, texts = (FlatLists.of(table[name]) for name in ("input_ids", "trained", "text"))
        return cls(rows=table["row"].to_numpy(), input_ids=ids, trained=trained, texts=texts)

    def copied(self, rows: Ints) -> Self:
        ids, trained, texts = (lists.copied(rows) for lists in (self.input_ids, self.trained, self.texts))
        return type(self)(rows=self.rows[rows], input_ids=ids, trained=trained, texts=texts)


@dataclass(frozen=True, kw_only=True)
class _Batch:
    """Some blocks: `num_examples` of each, their numbers in the packing, and where they are in `columns`."""

    columns: _Columns
    rows: Ints
    examples: Ints
    num_examples: Ints


def _batches(columns: _Columns, packing: Packing, places: Ints) -> Iterator[_Batch]:
    """All blocks; the examples of several batches are read together, in the order of the file."""
    num_blocks = max(1, _TOKENS_AT_ONCE * packing.num_blocks // max(1, packing.num_tokens))
    for first in range(0, packing.num_blocks, num_blocks * _BATCHES_READ):
        starts = packing.block_starts[first : first + num_blocks * _BATCHES_READ + 1]
        examples = packing.examples[starts[0] : starts[-1]]
        read, starts = columns.copied(places[examples]), starts - starts[0]
        for block in range(0, len(starts) - 1, num_blocks):
            bounds = starts[block : block + num_blocks + 1]
            rows = np.arange(bounds[0], bounds[-1])
            yield _Batch(columns=read, rows=rows, examples=examples[rows], num_examples=np.diff(bounds))


def _columns_of(batch: _Batch, forest: Forest | None, padding: Padding, decode: DecodeBytes | None) -> pa.RecordBatch:
    """`BLOCK_SCHEMA` of some blocks."""
    columns, rows, num_examples = batch.columns, batch.rows, batch.num_examples
    lengths = columns.input_ids.lengths[rows].astype(np.int64)
    if forest is None:
        nodes = single_nodes(lengths, num_examples)
    else:
        nodes = shared_nodes(forest, batch.examples, lengths, num_examples)
    num_written = lengths - nodes.num_skipped
    ids = np.concatenate(columns.input_ids.pieces(rows, nodes.num_skipped))
    origins = np.cumsum(num_written) - num_written - nodes.num_skipped  # where each example would begin
    is_trained = _is_trained(columns.trained.pieces(rows), origins, len(ids))
    texts = columns.texts.pieces(rows, _num_skipped_bytes(columns, rows, nodes, decode) if decode else 0)
    firsts = np.cumsum(num_examples) - num_examples
    place = _Place(np.add.reduceat(num_written, firsts), padding.length)
    made = [
        place.lists(ids, padding.token_id, pa.int32()),
        place.lists(np.ones_like(ids), 0, pa.int8()),
        place.lists(np.where(is_trained, ids, np.int32(padding.ignore_index)), padding.ignore_index, pa.int32()),
        place.lists(np.arange(len(ids)) - np.repeat(origins, num_written), 0, pa.int32()),
        make_lists(nodes.lengths, nodes.num_nodes, pa.int32()),
        make_lists(nodes.parents, nodes.num_nodes, pa.int32()),
        _texts(texts, firsts),
        make_lists(columns.rows[rows], num_examples, pa.int64()),
    ]
    return pa.record_batch(made, schema=BLOCK_SCHEMA)


def _is_trained(spans: Sequence[Ints], origins: Ints, num_tokens: int) -> npt.NDArray[np.bool_]:
    edges = np.concatenate(spans) + np.repeat(origins, [len(one) for one in spans])
    steps = np.zeros(num_tokens + 1, dtype=np.int8)
    np.add.at(steps, edges[::2], 1)
    np.add.at(steps, edges[1::2], -1)
    return np.cumsum(steps[:-1], dtype=np.int8) > 0


def _num_skipped_bytes(columns: _Columns, rows: Ints, nodes: Nodes, decode: DecodeBytes) -> Ints:
    """Of each text the bytes before its tokens are written on."""
    skipped = np.zeros_like(rows)
    going_on = np.flatnonzero(nodes.branches >= 0)
    _, firsts, which = np.unique(nodes.branches[going_on], return_index=True, return_inverse=True)
    sharing = going_on[firsts]
    ids = zip(columns.input_ids.pieces(rows[sharing]), nodes.num_skipped[sharing].tolist(), strict=True)
    beginnings = decode([array("I", one[:end].tobytes()) for one, end in ids]).to_pylist()
    texts = columns.texts.pieces(rows[going_on])
    for member, beginning, text in zip(going_on.tolist(), which.tolist(), texts, strict=True):
        skipped[member] = _num_alike(beginnings[beginning], text.tobytes())
    return skipped


def _num_alike(beginning: bytes, text: bytes) -> int:
    """How many bytes of whole characters `text` has in common with `beginning`, of which the last may be in part."""
    whole = len(beginning)
    low, high = (whole, whole + 1) if text.startswith(beginning) else (0, whole)  # `low` are alike, `high` are not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if text.startswith(beginning[:middle]) else (low, middle)
    while text[low] & 0xC0 == 0x80:  # within a character
        low -= 1
    return low


class _Place:
    """Where the tokens of a batch of blocks stand once the blocks are padded to `length` (None: they are not)."""

    def __init__(self, block_tokens: Ints, length: int | None) -> None:
        self._sizes = block_tokens if length is None else np.full(len(block_tokens), length)
        self._is_token = None if length is None else (np.arange(length) < block_tokens[:, None]).ravel()

    def lists(self, values: npt.NDArray[np.integer], fill: int, kind: pa.DataType) -> pa.ListArray:
        if self._is_token is None:
            return make_lists(values, self._sizes, kind)
        padded = np.full(len(self._is_token), fill, dtype=kind.to_pandas_dtype())
        padded[self._is_token] = values
        return make_lists(padded, self._sizes, kind)


def _texts(pieces: Sequence[npt.NDArray[np.uint8]], firsts: Ints) -> pa.StringArray:
    """The text of each block from those of its examples, of which `firsts` are the first ones."""
    sizes = np.add.reduceat([len(piece) for piece in pieces], firsts)
    offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int32)
    data = np.concatenate(pieces)
    return pa.Array.from_buffers(pa.string(), len(sizes), [None, pa.py_buffer(offsets), pa.py_buffer(data)])
