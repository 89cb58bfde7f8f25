"""Arrow lists as flat NumPy arrays and back: the two moves with which whole batches pass without per-token Python."""

from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

Ints = npt.NDArray[np.int64]


def flatten_lists(column: pa.ChunkedArray) -> tuple[Ints, Ints]:
    """The values of a column of lists in a row, and the length of each list."""
    lists = pa.concat_arrays(column.chunks)
    values = lists.flatten().to_numpy(zero_copy_only=False)
    lengths = lists.value_lengths().to_numpy(zero_copy_only=False)
    return values.astype(np.int64), lengths.astype(np.int64)


def make_lists(values: npt.NDArray[np.integer[Any]], lengths: npt.NDArray[np.integer[Any]], kind: Any) -> pa.ListArray:
    """The inverse: lists of the Arrow type `kind`, cut from `values` by `lengths`."""
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values, kind))


class MappedLists:
    """A column of lists or texts (their bytes), chunk by chunk as it lies in the memory map.

    List n is in the chunk c for which first_rows[c] <= n < first_rows[c + 1], and there
    values[c][starts[n] : starts[n] + lengths[n]].
    """

    def __init__(self, column: pa.ChunkedArray) -> None:
        """Copies nothing but where each list begins and how long it is: 8 bytes."""
        chunks = [_bytes_of(chunk) if pa.types.is_string(column.type) else chunk for chunk in column.chunks]
        self.values = [chunk.values.to_numpy() for chunk in chunks]
        offsets = [chunk.offsets.to_numpy() for chunk in chunks]
        none = np.empty(0, dtype=np.int32)
        self.starts = np.concatenate([none, *(one[:-1] for one in offsets)])
        self.lengths = np.concatenate([none, *map(np.diff, offsets)])
        self.first_rows = np.cumsum([0, *map(len, chunks)])

    def of(self, rows: Ints, skipped: Ints | int = 0) -> list[npt.NDArray[Any]]:
        """The values of each of `rows`, but for the first that are `skipped`: pieces of the memory map."""
        chunks = np.searchsorted(self.first_rows, rows, side="right") - 1
        starts = self.starts[rows]
        places = zip(chunks.tolist(), (starts + skipped).tolist(), (starts + self.lengths[rows]).tolist(), strict=True)
        return [self.values[chunk][start:end] for chunk, start, end in places]


def _bytes_of(texts: pa.StringArray) -> pa.ListArray:
    """The same array as lists of bytes."""
    _, offsets, data = texts.buffers()
    values = pa.Array.from_buffers(pa.uint8(), data.size if data else 0, [None, data])
    kind = pa.list_(pa.uint8())
    return pa.Array.from_buffers(kind, len(texts), [None, offsets], offset=texts.offset, children=[values])
