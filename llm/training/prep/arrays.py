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
