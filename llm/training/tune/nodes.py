"""The node structure of a batch, from `node_lengths` and `node_parents`: paths, positions, subtrees.

A parent comes before its children, but between them anything may stand: numbers and order of nodes say nothing else.
"""

from collections.abc import Sequence


def node_paths(node_parents: Sequence[int]) -> list[list[int]]:
    """The nodes from the root to each node, itself last: `[-1, 0, 0, 2]` -> `[[0], [0, 1], [0, 2], [0, 2,
    3]]`."""
    paths: list[list[int]] = []
    for node, parent in enumerate(node_parents):
        paths.append([*(paths[parent] if parent >= 0 else []), node])
    return paths


def node_positions(node_lengths: Sequence[int], node_parents: Sequence[int]) -> list[int]:
    """The position of each token: 0, 1, ... in a root, going on from the parent's end in a child."""
    positions: list[int] = []
    ends: list[int] = []
    for length, parent in zip(node_lengths, node_parents, strict=True):
        start = ends[parent] if parent >= 0 else 0
        positions.extend(range(start, start + length))
        ends.append(start + length)
    return positions


def subtree_ranges(node_parents: Sequence[int]) -> list[tuple[int, int]]:
    """Nodes numbered anew, each before its own subtree and that before all else: a node's number, and the first
    beyond its subtree.

    `a` is `b` or an ancestor of it where `first[a] <= first[b] < end[a]`:
    `[-1, 0, 0, 1]` -> `[(0, 4), (1, 3), (3, 4), (2, 3)]`.
    """
    sizes = [1] * len(node_parents)
    for node in range(len(node_parents) - 1, -1, -1):
        if node_parents[node] >= 0:
            sizes[node_parents[node]] += sizes[node]
    ranges: list[tuple[int, int]] = []
    num_roots = 0
    free: list[int] = []  # the number that a node's next child gets
    for parent, size in zip(node_parents, sizes, strict=True):
        first = num_roots if parent < 0 else free[parent]
        if parent < 0:
            num_roots += size
        else:
            free[parent] += size
        ranges.append((first, first + size))
        free.append(first + 1)
    return ranges
