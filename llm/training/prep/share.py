"""Stage 4, first half: which prompt parts examples have in common from the start, as a forest of nodes.

Takes the spilled examples, gives a `Forest` for `pack_examples`. The tokens stay in the memory map: what is kept of a
row are a few numbers, and at most a few million tokens are looked at together.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from llm.training.prep.arrays import FlatLists, Ints
from llm.training.prep.file_pages import give_pages_back

# Measured on SmolLM2-135M, forward and backward on a CPU: with 150 tokens behind it a node of 8 saves time already,
# with 500 one of 32 does, since behind a shared part attention computes the masked half of its scores, too.
MIN_NODE_TOKENS = 16
_MOST_TOKENS = 64  # of each example compared in one round
_ROWS_AT_ONCE = 4096
_LEADER_TOKENS = 2**21  # of all groups together: 8 MB

Tokens = npt.NDArray[np.int32]


@dataclass(frozen=True, kw_only=True)
class Forest:
    """What examples have in common from the start.

    Of four examples the first two begin with the same 20 tokens, and the third with the same 50 as the first:

        node_ends     20  50        the tokens from the examples' start to the node's end
        node_parents  -1   0        the node that a node goes on from, which comes before it; -1 = none
        leaf_parents   1   0   1  -1        the node that each example goes on from
    """

    node_ends: Ints
    node_parents: Ints
    leaf_parents: Ints


def find_forest(examples: pa.Table, places: Ints | None = None) -> Forest:
    """The forest of `examples` (columns `input_ids` and `trained`), or of those at `places` (rising).

    An example shares at most what stands before its last prompt token, which predicts its first label: labels are
    never shared. A node has at least two examples below it and MIN_NODE_TOKENS tokens.
    """
    places = np.arange(examples.num_rows) if places is None else places
    tokens = _Tokens(examples["input_ids"], places)
    limits = _first_labels(examples["trained"])[places] - 1
    search = _Search(tokens, limits)
    while len(search.rows):
        search.advance()
    return Forest(
        node_ends=np.array(search.node_ends, dtype=np.int64),
        node_parents=np.array(search.node_parents, dtype=np.int64),
        leaf_parents=search.leaf_parents,
    )


class _Search:
    """Examples that begin alike are a group: each round it grows by what all of it goes on with, then it splits.

    `rows` (rising) are the examples that may still share more, `groups` the group of each. Of each group: `depth`, the
    tokens that all its examples are known to begin with, and `parent`, the last node on the way there.
    """

    def __init__(self, tokens: "_Tokens", limits: Ints) -> None:
        self._tokens, self._limits = tokens, limits
        self.node_ends: list[int] = []
        self.node_parents: list[int] = []
        self.leaf_parents = np.full(len(limits), -1)
        self.rows = np.flatnonzero(limits >= MIN_NODE_TOKENS)
        if len(self.rows) == 1:  # shares with nobody
            self.rows = self.rows[:0]
        self._groups = np.zeros(len(self.rows), dtype=np.int64)
        self._leaders = self.rows[:1]  # the first row of each group
        self._depth = np.zeros(1, dtype=np.int64)
        self._parent = np.full(1, -1)

    def advance(self) -> None:
        """One round."""
        width = max(1, min(_MOST_TOKENS, _LEADER_TOKENS // len(self._leaders)))
        num_alike = self._num_alike(width)
        self._depth += num_alike
        is_ended = num_alike < width
        if is_ended.any():
            self._add_nodes(is_ended)
            self._split(is_ended)

    def _num_alike(self, width: int) -> Ints:
        """How many of the next `width` tokens each group's examples have in common with its first one."""
        found = np.full(len(self._leaders), width)
        by_row = np.argsort(self._leaders)
        leading = np.empty((len(found), width), dtype=np.int32)
        for part, tokens in self._tokens.windows(self._leaders[by_row], self._depth[by_row], width):
            leading[by_row[part]] = tokens
        places = self._depth[self._groups]
        room = np.minimum(self._limits[self.rows] - places, width)
        for part, tokens in self._tokens.windows(self.rows, places, width):
            groups = self._groups[part]
            differs = tokens != leading[groups]
            first = np.where(differs.any(axis=1), differs.argmax(axis=1), width)
            np.minimum.at(found, groups, np.minimum(first, room[part]))
        return found

    def _add_nodes(self, is_ended: npt.NDArray[np.bool_]) -> None:
        ends = np.array([0, *self.node_ends])  # of the nodes from -1 on
        is_new = is_ended & (self._depth - ends[self._parent + 1] >= MIN_NODE_TOKENS)
        first = len(self.node_ends)
        self.node_ends += self._depth[is_new].tolist()
        self.node_parents += self._parent[is_new].tolist()
        self._parent[is_new] = np.arange(first, len(self.node_ends))

    def _split(self, is_ended: npt.NDArray[np.bool_]) -> None:
        """Parts the ended groups by their next token; who has none to share, or it alone, needs no further look."""
        self.leaf_parents[self.rows] = self._parent[self._groups]
        places = self._depth[self._groups]
        following = np.zeros(len(self.rows), dtype=np.int64)
        ended = np.flatnonzero(is_ended[self._groups])
        for part, tokens in self._tokens.windows(self.rows[ended], places[ended], 1):
            following[ended[part]] = tokens[:, 0]
        goes_on = (places < self._limits[self.rows]) | ~is_ended[self._groups]
        keys = (self._groups << 32) + following
        keys, self.rows = keys[goes_on], self.rows[goes_on]
        _, numbers, counts = np.unique(keys, return_inverse=True, return_counts=True)
        is_member = counts[numbers] > 1
        keys, self.rows = keys[is_member], self.rows[is_member]
        kept, firsts, self._groups = np.unique(keys, return_index=True, return_inverse=True)
        self._leaders = self.rows[firsts]
        self._depth, self._parent = self._depth[kept >> 32], self._parent[kept >> 32]


class _Tokens:
    """The ids of the examples at `places`, chunk by chunk as they lie in the memory map."""

    def __init__(self, column: pa.ChunkedArray, places: Ints) -> None:
        self._lists, self._places = FlatLists.of(column), places

    def windows(self, rows: Ints, places: Ints, width: int) -> Iterator[tuple[slice, Tokens]]:
        """`width` ids of each of `rows` (rising) from its place on, for one slice of `rows` after the other.

        What stands behind an example's end means nothing.
        """
        steps = np.arange(width)
        rows = self._places[rows]
        bounds = np.searchsorted(rows, self._lists.first_rows)
        for chunk in np.flatnonzero(np.diff(bounds)):
            give_pages_back()
            for start in range(bounds[chunk], bounds[chunk + 1], _ROWS_AT_ONCE):
                part = slice(start, min(start + _ROWS_AT_ONCE, bounds[chunk + 1]))
                starts = self._lists.starts[rows[part]] + places[part]
                yield part, self._lists.values[chunk].take(starts[:, None] + steps, mode="clip")


def _first_labels(trained: pa.ChunkedArray) -> Ints:
    """The place of the first label of each example."""
    firsts = [np.empty(0, dtype=np.int64)]
    for chunk in trained.chunks:
        give_pages_back()
        firsts.append(chunk.values.to_numpy()[chunk.offsets.to_numpy()[:-1]])
    return np.concatenate(firsts, dtype=np.int64)
