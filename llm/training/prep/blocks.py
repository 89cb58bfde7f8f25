"""Stage 5, first half: examples and their packing -> the columns of blocks, a thousand blocks at a time.

Works on whole batches as NumPy arrays: no token passes through Python.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from llm.tokenizer import PromptTokenizer
from llm.training.config import DataPrepConfig
from llm.training.prep.arrays import Ints, flatten_lists, make_lists
from llm.training.prep.overlap import two_at_a_time
from llm.training.prep.pack import Packing

_BLOCKS_AT_ONCE = 500
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


def iterate_blocks(examples: pa.Table, packing: Packing, padding: Padding) -> Iterator[pa.RecordBatch]:
    """Batches of `BLOCK_SCHEMA`.

    Two examples of 4 tokens padded to 9 become one block:

        input_ids      1 100 100 2  1 200 200 2  0
        attention_mask 1   1   1 1  1   1   1 1  0
        labels      -100 100 100 2 -100 200 200 2 -100
        position_ids   0   1   2 3  0   1   2 3  0
        node_lengths   4 4          node_parents -1 -1      example_rows  0 1
    """

    def batch(first: int) -> pa.RecordBatch:
        starts = packing.block_starts[first : first + _BLOCKS_AT_ONCE + 1]
        members = examples.take(packing.examples[starts[0] : starts[-1]]).combine_chunks()
        return _batch(members, starts - starts[0], padding)

    for _, made in two_at_a_time(batch, range(0, packing.num_blocks, _BLOCKS_AT_ONCE)):
        yield made


def _batch(members: pa.Table, starts: Ints, padding: Padding) -> pa.RecordBatch:
    """Blocks of `members`: block b holds members starts[b] to starts[b + 1]."""
    ids, lengths = flatten_lists(members["input_ids"])
    spans, num_spans = flatten_lists(members["trained"])
    example_ends = np.cumsum(lengths)
    position_ids = np.arange(len(ids)) - np.repeat(example_ends - lengths, lengths)
    labels = np.where(_is_trained(spans, num_spans, example_ends - lengths, len(ids)), ids, padding.ignore_index)
    block_tokens = np.add.reduceat(lengths, starts[:-1])
    place = _Place(block_tokens, padding.length)
    num_examples = np.diff(starts)
    ones = np.full(len(lengths), -1)
    columns = [
        place.lists(ids, padding.token_id, pa.int32()),
        place.lists(np.ones_like(ids), 0, pa.int8()),
        place.lists(labels, padding.ignore_index, pa.int32()),
        place.lists(position_ids, 0, pa.int32()),
        make_lists(lengths, num_examples, pa.int32()),
        make_lists(ones, num_examples, pa.int32()),
        pa.array(_joined(members["text"].to_pylist(), starts), pa.string()),
        make_lists(members["row"].to_numpy(), num_examples, pa.int64()),
    ]
    return pa.record_batch(columns, schema=BLOCK_SCHEMA)


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


def _joined(texts: list[str], starts: Ints) -> list[str]:
    return ["".join(texts[start:end]) for start, end in zip(starts[:-1], starts[1:], strict=True)]
