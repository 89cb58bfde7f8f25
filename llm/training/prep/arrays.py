"""Arrow lists as flat NumPy arrays and back: the two moves with which whole batches pass without per-token Python."""

from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from llm.training.prep.file_pages import give_pages_back

Ints = npt.NDArray[np.int64]
_LISTS_AT_ONCE = 100  # of the few that are chosen from a file each may map 64 kB


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


@dataclass(frozen=True, kw_only=True)
class FlatLists:
    """A column of lists or texts (their bytes), chunk by chunk: as it lies in the memory map, or copied from there.

    List n is in the chunk c for which first_rows[c] <= n < first_rows[c + 1], and there
    values[c][starts[n] : starts[n] + lengths[n]].
    """

    values: list[npt.NDArray[Any]]
    starts: npt.NDArray[np.int32]
    lengths: npt.NDArray[np.int32]
    first_rows: Ints

    @classmethod
    def of(cls, column: pa.ChunkedArray) -> Self:
        """Copies nothing but where each list begins and how long it is: 8 bytes."""
        chunks = [_bytes_of(chunk) if pa.types.is_string(column.type) else chunk for chunk in column.chunks]
        starts, lengths = [np.empty(0, dtype=np.int32)], [np.empty(0, dtype=np.int32)]
        for chunk in chunks:
            give_pages_back()
            offsets = chunk.offsets.to_numpy()
            starts.append(offsets[:-1].copy())
            lengths.append(np.diff(offsets))
        return cls(
            values=[chunk.values.to_numpy() for chunk in chunks],
            starts=np.concatenate(starts),
            lengths=np.concatenate(lengths),
            first_rows=np.cumsum([0, *map(len, chunks)]),
        )

    def pieces(self, rows: Ints, skipped: Ints | int = 0) -> list[npt.NDArray[Any]]:
        """The values of each of `rows`, but for the first that are `skipped`; nothing is copied."""
        chunks = np.searchsorted(self.first_rows, rows, side="right") - 1
        starts = self.starts[rows]
        places = zip(chunks.tolist(), (starts + skipped).tolist(), (starts + self.lengths[rows]).tolist(), strict=True)
        return [self.values[chunk][start:end] for chunk, start, end in places]

    def copied(self, rows: Ints) -> Self:
        """The lists `rows`, in this order, in memory; read in the order of the file, whose pages are given back."""
        order = np.argsort(rows)
        parts = []
        for start in range(0, len(order), _LISTS_AT_ONCE):
            give_pages_back()
            parts.append(np.concatenate(self.pieces(rows[order[start : start + _LISTS_AT_ONCE]])))
        lengths = self.lengths[rows]
        starts = np.empty_like(lengths)
        starts[order] = np.cumsum(lengths[order]) - lengths[order]
        return type(self)(
            values=[np.concatenate(parts)], starts=starts, lengths=lengths, first_rows=np.array([0, len(rows)])
        )


def _bytes_of(texts: pa.StringArray) -> pa.ListArray:
    """The same array as lists of bytes."""
    _, offsets, data = texts.buffers()
    values = pa.Array.from_buffers(pa.uint8(), data.size if data else 0, [None, data])
    kind = pa.list_(pa.uint8())
    return pa.Array.from_buffers(kind, len(texts), [None, offsets], offset=texts.offset, children=[values])
