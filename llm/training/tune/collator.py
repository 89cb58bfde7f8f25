"""Blocks -> one batch: flattened into a single sequence without padding, or padded for a model that needs it.

    two blocks      a a b b b .     c c c . . .         (. is padding)
    flattened       a a b b b c c c
    node_lengths    2 3 3           node_parents  -1 -1 -1     (parents counted through the batch)

No `attention_mask` goes with a flattened batch: the nodes say what sees what.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

COLUMNS = ("input_ids", "labels", "position_ids", "node_lengths", "node_parents")
IGNORE_INDEX = -100

Block = Mapping[str, Any]
Batch = dict[str, Any]


def flatten_blocks(blocks: Sequence[Block]) -> Batch:
    """One sequence of all real tokens.

    `input_ids`, `labels`, `position_ids`: int64 (1, tokens); `node_lengths`, `node_parents`: lists of int;
    `num_block_labels`: int64 (blocks,), the trained tokens of each block; `blocks`: their numbers, where the
    data set gives them.
    """
    lengths = [int(np.sum(block["node_lengths"])) for block in blocks]
    labels = [_labels(block, length) for block, length in zip(blocks, lengths, strict=True)]
    parents: list[int] = []
    for block in blocks:
        offset = len(parents)
        parents.extend(int(p) + offset if p >= 0 else -1 for p in block["node_parents"])
    return {
        "input_ids": _flat([block["input_ids"][:length] for block, length in zip(blocks, lengths, strict=True)]),
        "position_ids": _flat([block["position_ids"][:length] for block, length in zip(blocks, lengths, strict=True)]),
        "labels": _flat(labels),
        "node_lengths": [int(length) for block in blocks for length in block["node_lengths"]],
        "node_parents": parents,
        "num_block_labels": _count_labels(labels),
        **_numbers(blocks),
    }


def pad_blocks(blocks: Sequence[Block]) -> Batch:
    """Blocks of one example each as padded rows, for a model that our attention does not serve.

    `input_ids`, `attention_mask`, `labels`: int64 (blocks, longest); `num_block_labels` and `blocks`
    as in `flatten_blocks`.
    """
    lengths = [int(np.sum(block["node_lengths"])) for block in blocks]
    labels = [_labels(block, length) for block, length in zip(blocks, lengths, strict=True)]
    ids = [block["input_ids"][:length] for block, length in zip(blocks, lengths, strict=True)]
    return {
        "input_ids": _padded(ids, 0),
        "attention_mask": _padded([np.ones(length) for length in lengths], 0),
        "labels": _padded(labels, IGNORE_INDEX),
        "num_block_labels": _count_labels(labels),
        **_numbers(blocks),
    }


def _labels(block: Block, length: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """The labels of the real tokens; dataprep may have marked the untrained ones by another negative
    number."""
    labels = np.asarray(block["labels"][:length], dtype=np.int64)
    return np.where(labels < 0, IGNORE_INDEX, labels)


def _numbers(blocks: Sequence[Block]) -> dict[str, list[int]]:
    numbers = [int(block["block"]) for block in blocks if "block" in block]
    return {"blocks": numbers} if numbers else {}


def _count_labels(labels: Sequence[np.ndarray[Any, Any]]) -> Tensor:
    return torch.tensor([int((row != IGNORE_INDEX).sum()) for row in labels])


def _flat(rows: Sequence[Any]) -> Tensor:
    return torch.from_numpy(np.concatenate([np.asarray(row, dtype=np.int64) for row in rows]))[None]


def _padded(rows: Sequence[Any], value: int) -> Tensor:
    tensors = [torch.from_numpy(np.asarray(row, dtype=np.int64)) for row in rows]
    return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=value)
