"""Stage 4, second half: the examples of blocks and the forest -> the nodes that are written.

An example's path is what it shares with others, then what it has alone. In a block, the part of the path that the
example before it has, too, is not written again; the rest is one stretch of its ids. So the writer cuts the beginning
of each example away, and `node_lengths` says where that rest falls into nodes.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from llm.training.prep.arrays import Ints
from llm.training.prep.share import Forest


@dataclass(frozen=True, kw_only=True)
class Nodes:
    """The nodes of some blocks, block after block, parents first.

    Three examples of 9, 8 and 5 tokens in one block, of which the first two share 6:

        num_skipped  0 6 0         tokens of each example that an example before it has written
        branches    -1 0 -1        the last node of the forest that they reach (-1: there are none)
        lengths      6 3 2 5
        parents     -1 0 0 -1      counted in the block
        num_nodes    4             of each block
        num_shared_tokens 6        of all nodes that others go on from
    """

    num_skipped: Ints
    branches: Ints
    lengths: Ints
    parents: Ints
    num_nodes: Ints
    num_shared_tokens: int = 0


def single_nodes(lengths: Ints, num_examples: Ints) -> Nodes:
    """Every example of `lengths` as a node of its own; `num_examples` of each block."""
    alone = np.full(len(lengths), -1)
    none = np.zeros_like(lengths)
    return Nodes(num_skipped=none, branches=alone, lengths=lengths, parents=alone, num_nodes=num_examples)


def shared_nodes(forest: Forest, examples: Ints, lengths: Ints, num_examples: Ints) -> Nodes:
    """The nodes of blocks that hold `examples` (numbers in `forest`) of `lengths`, `num_examples` in each block.

    A part that only one example of the block has is no node: it belongs to what follows it.
    """
    if not len(forest.node_ends):
        return single_nodes(lengths, num_examples)
    blocks = np.repeat(np.arange(len(num_examples)), num_examples)
    paths, depth = _paths(forest, forest.leaf_parents[examples])
    num_common = _num_common(paths, blocks)
    last = num_common - 1  # of the nodes that the example before has, too
    branches = np.where(last < 0, -1, paths[np.arange(len(paths)), last])
    num_skipped = np.where(branches < 0, 0, forest.node_ends[branches])

    # One column for each level of the forest, and one for the example's own node.
    levels = np.arange(paths.shape[1])
    is_own = levels == depth[:, None]
    ends = np.where(levels < depth[:, None], forest.node_ends[paths], lengths[:, None])
    is_new = (levels >= num_common[:, None]) & (levels <= depth[:, None])
    numbers = np.where(is_new, is_new.cumsum().reshape(is_new.shape) - 1, -1)
    current = np.maximum.accumulate(numbers, axis=0)  # who has no new node there stands below the last one
    parents = np.concatenate([np.full((len(paths), 1), -1), current[:, :-1]], axis=1)[is_new]
    sizes = np.diff(ends, axis=1, prepend=0)[is_new]
    node_blocks = np.broadcast_to(blocks[:, None], is_new.shape)[is_new]
    lengths, parents, kept = _without_only_children(sizes, parents, is_own[is_new])
    num_nodes = np.bincount(node_blocks[kept], minlength=len(num_examples))
    first_nodes = np.repeat(np.cumsum(num_nodes) - num_nodes, num_nodes)
    parents = np.where(parents < 0, -1, parents - first_nodes)
    return Nodes(
        num_skipped=num_skipped,
        branches=branches,
        lengths=lengths,
        parents=parents,
        num_nodes=num_nodes,
        num_shared_tokens=int(lengths[~is_own[is_new][kept]].sum()),
    )


def _paths(forest: Forest, leaf_parents: Ints) -> tuple[Ints, Ints]:
    """The nodes on the way to each example, root first, then -1 (at least one); and how many they are."""
    upwards = [leaf_parents]
    while (upwards[-1] >= 0).any():
        upwards.append(np.where(upwards[-1] < 0, -1, forest.node_parents[upwards[-1]]))
    steps = np.array(upwards)
    depth = (steps >= 0).sum(axis=0)
    paths = np.full((len(leaf_parents), len(steps)), -1)
    for step, nodes in enumerate(steps[:-1]):
        there = np.flatnonzero(nodes >= 0)
        paths[there, depth[there] - 1 - step] = nodes[there]
    return paths, depth


def _num_common(paths: Ints, blocks: Ints) -> Ints:
    """How many nodes each path has in common with the one before it in its block."""
    is_same = (paths[1:] == paths[:-1]) & (paths[1:] >= 0) & (blocks[1:] == blocks[:-1])[:, None]
    return np.concatenate([[0], np.cumprod(is_same, axis=1).sum(axis=1)])


def _without_only_children(sizes: Ints, parents: Ints, is_own: npt.NDArray[np.bool_]) -> tuple[Ints, Ints, Ints]:
    """Lengths and parents once every node with a single child is one with it, and which nodes (their ends) are left."""
    num_children = np.bincount(parents[parents >= 0], minlength=len(parents))
    is_kept = is_own | (num_children > 1)
    while ((parents >= 0) & ~is_kept[parents]).any():
        parents = np.where((parents >= 0) & ~is_kept[parents], parents[parents], parents)
    number: Ints = np.cumsum(is_kept) - is_kept  # of itself, or of the child that it became part of, which follows it
    lengths = np.zeros(is_kept.sum(), dtype=np.int64)
    np.add.at(lengths, number, sizes)
    kept = np.flatnonzero(is_kept)
    parents = parents[kept]
    return lengths, np.where(parents < 0, -1, number[parents]), kept
