"""Between stages 3 and 4: which of the examples go into the data set; the others are dropped, and the ledger says why.

The spilled tokens stay as they are: a selection is the list of their places.
"""

from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from llm.training.prep.duplicates import first_equals
from llm.training.prep.encode import DropReason
from llm.training.prep.store import Examples

_OF_DROPPED = (
    "row",
    "num_tokens",
    "source",
    "source_row",
)  # what the ledger says of a dropped row, beside outcome and reason

Flags = npt.NDArray[np.bool_]


def drop_duplicates(examples: Examples) -> Examples:
    """The examples without those whose ids and labels an earlier one has."""
    firsts = first_equals(examples.hashes.whole)
    return drop_examples(examples, firsts != np.arange(len(firsts)), reason="duplicate")


def drop_examples(examples: Examples, is_dropped: Flags, *, reason: DropReason) -> Examples:
    """The examples but for those of which `is_dropped` is true: the ledger has them as dropped for `reason`.

    is_dropped     no yes no            one a kept example
    ledger before  kept  dropped: too_long  kept                kept
    ledger after   kept  dropped: too_long  dropped: duplicate  kept
    """
    if not is_dropped.any():
        return examples
    was_kept = pc.not_equal(examples.ledger["outcome"], "dropped").to_numpy()
    flags = np.zeros(len(was_kept), dtype=np.bool_)
    flags[was_kept] = is_dropped
    numbers = np.flatnonzero(~is_dropped)
    return replace(
        examples,
        places=examples.places[numbers],
        lengths=examples.lengths[numbers],
        hashes=examples.hashes.take(numbers),
        ledger=_with_dropped(examples.ledger, pa.array(flags), reason),
    )


def _with_dropped(ledger: pa.Table, flags: pa.Array, reason: DropReason) -> pa.Table:
    said: dict[str, object] = {"outcome": "dropped", "reason": reason}
    columns = [
        column if name in _OF_DROPPED else pc.if_else(flags, pa.scalar(said.get(name), column.type), column)
        for name, column in zip(ledger.column_names, ledger.columns, strict=True)
    ]
    return pa.table(columns, schema=ledger.schema)
