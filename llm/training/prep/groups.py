"""Examples that share nodes, as groups that fit a block: the items that stage 4 packs.

From the leaves up: what goes on from a node is one group with it when all of it fits a block, else as few groups as
possible, each with the node. A group takes part in the packing one level higher, and at last in that of the blocks.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from llm.training.prep.arrays import Ints
from llm.training.prep.bins import fewest_blocks
from llm.training.prep.share import Forest


@dataclass(frozen=True, kw_only=True)
class Items:
    """What is packed: examples and groups, by their first example.

    Examples 0, 1, 2 of 9, 8 and 5 tokens, of which 0 and 2 share 3, give two items:

        numbers   3  1        an example, or behind the last example a group
        sizes    11  8        tokens; what is shared counts once
        firsts    0  1        the lowest example of each
        groups   [[0, 2]]     the numbers in each group, by first example
    """

    numbers: Ints
    sizes: Ints
    firsts: Ints
    groups: list[Ints]
    num_examples: int

    def expand(self, items: Ints, num_items: Ints) -> tuple[Ints, Ints]:
        """The examples of some blocks (`items`, `num_items` of each), and how many each block has."""
        numbers, blocks = self.numbers[items], np.repeat(np.arange(len(num_items)), num_items)
        if not self.groups:
            return numbers, num_items
        members, counts = np.concatenate(self.groups), np.array([len(group) for group in self.groups])
        starts = np.cumsum(counts) - counts
        while (is_group := numbers >= self.num_examples).any():
            group = np.where(is_group, numbers - self.num_examples, 0)
            times = np.where(is_group, counts[group], 1)
            within = np.arange(times.sum()) - np.repeat(np.cumsum(times) - times, times)
            inside = members[np.where(np.repeat(is_group, times), np.repeat(starts[group], times) + within, 0)]
            numbers = np.where(np.repeat(is_group, times), inside, np.repeat(numbers, times))
            blocks = np.repeat(blocks, times)
        return numbers, np.bincount(blocks, minlength=len(num_items))


def group_examples(lengths: Ints, forest: Forest | None, chunksize: int) -> Items:
    """The items of at most `chunksize` tokens that examples of `lengths` make; without `forest` each is one."""
    if forest is None:
        rows = np.arange(len(lengths))
        return Items(numbers=rows, sizes=lengths, firsts=rows, groups=[], num_examples=len(rows))
    ends = np.append(forest.node_ends, 0)  # of node -1, too
    level = _Level(lengths - ends[forest.leaf_parents], forest.leaf_parents)
    groups: list[Ints] = []
    depths, parents = ends.tolist(), forest.node_parents.tolist()  # plain numbers: a node may come with every other row
    for node in range(len(parents) - 1, -1, -1):
        numbers, sizes, firsts = level.below(node)
        for inside in _fitting(sizes, chunksize - depths[node]):
            size = depths[node] - depths[parents[node]] + int(sizes[inside].sum())
            level.add(parents[node], size, int(firsts[inside][0]))
            groups.append(numbers[inside])
    numbers, sizes, firsts = level.below(-1)
    return Items(numbers=numbers, sizes=sizes, firsts=firsts, groups=groups, num_examples=len(lengths))


def _fitting(sizes: Ints, room: int) -> Sequence[Ints | slice]:
    """Which of `sizes` go together, in their order: all of them where they fit into `room`."""
    if sizes.sum() <= room:
        return [slice(None)]
    block_of = fewest_blocks(sizes, room)
    return np.split(np.argsort(block_of, kind="stable"), np.cumsum(np.bincount(block_of))[:-1])


class _Level:
    """Examples and groups by the node that they go on from."""

    def __init__(self, sizes: Ints, leaf_parents: Ints) -> None:
        self._sizes = sizes
        self._by_node = np.argsort(leaf_parents, kind="stable")
        self._bounds = np.concatenate([[0], np.cumsum(np.bincount(leaf_parents + 1))]).tolist()
        self._groups: dict[int, list[tuple[int, int, int]]] = {}
        self._next = len(sizes)

    def add(self, node: int, size: int, first: int) -> None:
        """One more group below `node`."""
        self._groups.setdefault(node, []).append((self._next, size, first))
        self._next += 1

    def below(self, node: int) -> tuple[Ints, Ints, Ints]:
        """Numbers, sizes and first examples of what goes on from `node`, by first example."""
        bounds = self._bounds[node + 1 : node + 3]
        examples = self._by_node[slice(*bounds)] if len(bounds) == 2 else self._by_node[:0]
        groups = self._groups.pop(node, [])
        if not groups:
            return examples, self._sizes[examples], examples
        more = np.array(groups).T
        numbers, sizes, firsts = (
            np.concatenate(pair) for pair in zip((examples, self._sizes[examples], examples), more, strict=True)
        )
        order = np.argsort(firsts)
        return numbers[order], sizes[order], firsts[order]
