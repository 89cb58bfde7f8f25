"""Stage 5, first half: examples and their packing -> the columns of blocks, a thousand blocks at a time.

Works on whole batches as NumPy arrays: no token passes through Python.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from llm.tokenizer import PromptTokenizer
from llm.training.config import DataPrepConfig
from llm.training.prep.arrays import Ints, flatten_lists, make_lists
from llm.training.prep.nodes import Nodes, shared_nodes, single_nodes
from llm.training.prep.overlap import two_at_a_time
from llm.training.prep.pack import Packing

Decode = Callable[[Sequence[Sequence[int]]], list[str]]

_TOKENS_AT_ONCE = 2**18  # of a batch of blocks, of which up to four are in memory, 40 bytes a token
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
    decode: Decode | None = None,
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

    chunks = examples.to_batches()
    places = np.arange(examples.num_rows) if places is None else places
    num_blocks = max(1, _TOKENS_AT_ONCE * packing.num_blocks // max(1, packing.num_tokens))

    def batch(first: int) -> pa.RecordBatch:
        starts = packing.block_starts[first : first + num_blocks + 1]
        members = _taken(chunks, places[packing.examples[starts[0] : starts[-1]]])
        return _batch(members, *_structure(members, packing, starts, decode), padding, np.diff(starts))

    for _, made in two_at_a_time(batch, range(0, packing.num_blocks, num_blocks)):
        yield made


def _taken(chunks: Sequence[pa.RecordBatch], numbers: Ints) -> pa.Table:
    """The rows `numbers` of all chunks, in one chunk.

    `Table.take` copies all chunks first, each time: 1.1 GB where there are 200,000 rows.
    """
    order = np.argsort(numbers)
    firsts = np.cumsum([0, *map(len, chunks)])
    bounds = np.searchsorted(numbers[order], firsts).tolist()
    parts = []
    for chunk, first, start, end in zip(chunks, firsts[:-1], bounds[:-1], bounds[1:], strict=True):
        if start < end:
            parts.append(chunk.take(pa.array(numbers[order[start:end]] - first)))
    return pa.Table.from_batches(parts).combine_chunks().take(pa.array(np.argsort(order)))


def _structure(members: pa.Table, packing: Packing, starts: Ints, decode: Decode | None) -> tuple[Nodes, list[str]]:
    """The nodes of the blocks (see `Packing.block_starts`), and the text that each of `members` adds to its block."""
    texts: list[str] = members["text"].to_pylist()
    lengths = members["input_ids"].combine_chunks().value_lengths().to_numpy().astype(np.int64)
    if packing.forest is None:
        return single_nodes(lengths, np.diff(starts)), texts
    nodes = shared_nodes(packing.forest, packing.examples[starts[0] : starts[-1]], lengths, np.diff(starts))
    return nodes, _remaining_texts(members, nodes, decode) if decode else texts


def _batch(
    members: pa.Table, nodes: Nodes, texts: Sequence[str], padding: Padding, num_examples: Ints
) -> pa.RecordBatch:
    """Blocks of `members`, `num_examples` in each."""
    lists = members["input_ids"].combine_chunks()
    num_written = lists.value_lengths().to_numpy() - nodes.num_skipped
    firsts = np.cumsum(num_written) - num_written  # of what is written of each example
    within = np.arange(num_written.sum()) - np.repeat(firsts, num_written)
    position_ids = within + np.repeat(nodes.num_skipped, num_written)
    places = position_ids + np.repeat(lists.offsets.to_numpy()[:-1], num_written)
    ids = lists.values.to_numpy()[places].astype(np.int64)
    spans, num_spans = flatten_lists(members["trained"])
    is_trained = _is_trained(spans, num_spans, firsts - nodes.num_skipped, len(ids))
    labels = np.where(is_trained, ids, padding.ignore_index)
    starts = np.concatenate([[0], np.cumsum(num_examples)])
    place = _Place(np.add.reduceat(num_written, starts[:-1]), padding.length)
    columns = [
        place.lists(ids, padding.token_id, pa.int32()),
        place.lists(np.ones_like(ids), 0, pa.int8()),
        place.lists(labels, padding.ignore_index, pa.int32()),
        place.lists(position_ids, 0, pa.int32()),
        make_lists(nodes.lengths, nodes.num_nodes, pa.int32()),
        make_lists(nodes.parents, nodes.num_nodes, pa.int32()),
        pa.array(_joined(texts, starts), pa.string()),
        make_lists(members["row"].to_numpy(), num_examples, pa.int64()),
    ]
    return pa.record_batch(columns, schema=BLOCK_SCHEMA)


def _remaining_texts(members: pa.Table, nodes: Nodes, decode: Decode) -> list[str]:
    """The text of each member from where its tokens are written on."""
    texts: list[str] = members["text"].to_pylist()
    going_on = np.flatnonzero(nodes.branches >= 0)
    _, firsts, which = np.unique(nodes.branches[going_on], return_index=True, return_inverse=True)
    ids = [members["input_ids"][n].as_py()[: nodes.num_skipped[n]] for n in going_on[firsts].tolist()]
    beginnings = [text.rstrip("\ufffd") for text in decode(ids)]  # the first half of a character that parts there
    for member, beginning in zip(going_on.tolist(), which.tolist(), strict=True):
        texts[member] = texts[member][_num_alike(beginnings[beginning], texts[member]) :]
    return texts


def _num_alike(left: str, right: str) -> int:
    """How many characters two texts have in common from the start."""
    if right.startswith(left):
        return len(left)
    low, high = 0, len(left)  # the first `low` are alike, the first `high` are not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if right.startswith(left[:middle]) else (low, middle)
    return low


class _Place:
    """Where each token of a batch of blocks stands once the blocks are padded."""

    def __init__(self, block_tokens: Ints, length: int | None) -> None:
        self._sizes = block_tokens if length is None else np.full(len(block_tokens), length)
        shift = np.cumsum(self._sizes) - self._sizes - (np.cumsum(block_tokens) - block_tokens)
        self._index = np.arange(block_tokens.sum()) + np.repeat(shift, block_tokens)

    def lists(self, values: npt.NDArray[np.integer], fill: int, kind: pa.DataType) -> pa.ListArray:
        padded = np.full(self._sizes.sum(), fill, dtype=kind.to_pandas_dtype())
        padded[self._index] = values
        return make_lists(padded, self._sizes, kind)


def _is_trained(spans: Ints, num_spans: Ints, example_starts: Ints, num_tokens: int) -> npt.NDArray[np.bool_]:
    edges = spans + np.repeat(example_starts, num_spans)
    steps = np.zeros(num_tokens + 1, dtype=np.int64)
    np.add.at(steps, edges[::2], 1)
    np.add.at(steps, edges[1::2], -1)
    return np.cumsum(steps[:-1]) > 0


def _joined(texts: Sequence[str], starts: Ints) -> list[str]:
    return ["".join(texts[start:end]) for start, end in zip(starts[:-1], starts[1:], strict=True)]
