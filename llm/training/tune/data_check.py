"""Prepared blocks checked against the model before the first step: what would train garbage, or nothing, is
an error.

Reads the columns as Arrow arrays, a thousand blocks at a time: no token passes through Python.
"""

import logging
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llm.errors import DataError
from llm.tokenizer import tokenizer_fingerprint
from llm.training.config import DatasetConfig, FinetuneConfig
from llm.training.prep.arrays import flatten_lists
from llm.training.prep.dataset import dataset_location, load_blocks
from llm.training.prep.manifest import Manifest, read_manifest
from llm.training.tune.collator import COLUMNS
from llm.training.tune.isolation import vocabulary_size
from llm.training.tune.objective import check_objective, check_rope
from llm.training.tune.overlap_check import check_overlap

logger = logging.getLogger(__name__)
_BLOCKS_AT_ONCE = 1000


@dataclass(frozen=True, kw_only=True)
class BlockFacts:
    """What a prepared data set holds; `is_packed`: some block has more than one node. `longest_example`: in tokens."""

    num_blocks: int
    num_tokens: int
    num_trained_tokens: int
    longest_example: int
    is_packed: bool


@dataclass(frozen=True, kw_only=True)
class Blocks:
    """The data of a run; `manifest` is that of the training blocks, None when they are not files."""

    train: Dataset
    evaluation: Dataset | None
    manifest: Manifest | None


def check_blocks(dataset: Dataset, model: PreTrainedModel, *, key: str) -> BlockFacts:
    """The facts of `dataset`, whose blocks the model can train on.

    DataError, with the block's number, for missing columns, no blocks, no label at all, ids beyond the
    vocabulary, positions beyond the model's, columns that do not fit together, and a label that is not the id of its
    own token, or that no token of its node predicts.
    """
    _check_columns(dataset, key)
    num_tokens = num_labels = max_nodes = longest = first = 0
    for table in dataset.select_columns(list(COLUMNS)).with_format("arrow").iter(batch_size=_BLOCKS_AT_ONCE):
        blocks = _Blocks(table, key=key, first=first)
        blocks.check_shape()
        blocks.check_limits(model)
        blocks.check_labels()
        num_tokens += int(blocks.nodes.sum())
        num_labels += int((blocks.labels >= 0).sum())
        max_nodes = max(max_nodes, int(blocks.num_nodes.max()))
        longest = max(longest, int(blocks.positions.max()) + 1)
        first += table.num_rows
    if num_labels == 0:
        raise DataError(
            f"{key}: none of the {num_tokens:,} tokens is trained: every label is masked. Look at the `labels` that "
            "dataprep wrote, and at its `ignore_index`."
        )
    return BlockFacts(
        num_blocks=len(dataset),
        num_tokens=num_tokens,
        num_trained_tokens=num_labels,
        longest_example=longest,
        is_packed=max_nodes > 1,
    )


def open_blocks(config: FinetuneConfig, tokenizer: PreTrainedTokenizerBase) -> Blocks:
    """The prepared data sets of a run, made with `tokenizer`; reads no block yet.

    Raises ConfigError and DataError as `prep.dataset.load_blocks`, `read_manifest`, `check_tokenizer` and
    `check_overlap` do.
    """
    train, manifest = _load(config.train_dataset_config, "train_dataset_config", config, tokenizer)
    if config.eval_dataset_config is None:
        return Blocks(train=train, evaluation=None, manifest=manifest)
    evaluation, other = _load(config.eval_dataset_config, "eval_dataset_config", config, tokenizer)
    check_overlap(config, manifest, other)
    return Blocks(train=train, evaluation=evaluation, manifest=manifest)


def check_data(blocks: Blocks, model: PreTrainedModel, *, max_batch_size: int) -> bool:
    """Whether some block holds several examples; logs what there is to train.

    `max_batch_size`: the most blocks of a batch. Raises DataError as `check_blocks`, and ConfigError as
    `check_objective` and `check_rope`.
    """
    check_objective(model)
    facts = [check_blocks(blocks.train, model, key="train_dataset_config")]
    if blocks.evaluation is not None:
        facts.append(check_blocks(blocks.evaluation, model, key="eval_dataset_config"))
    for name, fact in zip(("Training", "Evaluation"), facts, strict=False):
        logger.info(
            "%s data: %s blocks, %s tokens, %s of them trained.",
            name,
            f"{fact.num_blocks:,}",
            f"{fact.num_tokens:,}",
            f"{fact.num_trained_tokens:,}",
        )
        check_rope(model, longest_example=fact.longest_example, is_mixed=fact.is_packed or max_batch_size > 1)
    return any(fact.is_packed for fact in facts)


def check_tokenizer(manifest: Manifest, tokenizer: PreTrainedTokenizerBase, *, key: str, allow_mismatch: bool) -> None:
    """DataError when another tokenizer made the blocks; with `allow_mismatch` a warning."""
    found = tokenizer_fingerprint(tokenizer)
    if found == manifest.tokenizer_fingerprint:
        return
    text = (
        f"{key}: the blocks were made with the tokenizer {manifest.tokenizer_fingerprint} of "
        f"`{manifest.base_model}`, `base_model` has the tokenizer {found}: the same ids mean other words."
    )
    if not allow_mismatch:
        raise DataError(f"{text} Run dataprep with this `base_model`, or write `allow_tokenizer_mismatch: true`.")
    logger.warning("%s Going on, as `allow_tokenizer_mismatch` says.", text)


def _load(
    dataset: DatasetConfig, key: str, config: FinetuneConfig, tokenizer: PreTrainedTokenizerBase
) -> tuple[Dataset, Manifest | None]:
    loaded = load_blocks(dataset, key=key)
    location = dataset_location(dataset)
    if location is None:
        logger.warning("%s names no path: whether its blocks fit this tokenizer cannot be checked.", key)
        return loaded, None
    manifest = read_manifest(location, **(dataset.kwargs.get("storage_options") or {}))
    num_blocks, is_part = manifest.counts.get("blocks"), "[" in str(dataset.kwargs.get("split"))
    if len(loaded) != num_blocks and not is_part and "::" not in dataset.method:
        logger.warning(
            "%s: `%s` has not the blocks that its manifest counts (%s, not %s): files are missing, or of another "
            "preparation. Run dataprep again, unless that is meant.",
            key,
            location,
            len(loaded),
            num_blocks,
        )
    check_tokenizer(manifest, tokenizer, key=key, allow_mismatch=config.allow_tokenizer_mismatch)
    return loaded, manifest


class _Blocks:
    """Some blocks as flat arrays: `ids`, `labels`, `positions` of all tokens, `sizes` and `num_nodes` of each
    block."""

    def __init__(self, table: pa.Table, *, key: str, first: int) -> None:
        self._key, self._first = key, first
        self.ids, self.sizes = flatten_lists(table["input_ids"])
        self.labels, self._num_labels = flatten_lists(table["labels"])
        self.positions, self._num_positions = flatten_lists(table["position_ids"])
        self.nodes, self.num_nodes = flatten_lists(table["node_lengths"])
        self.parents, self._num_parents = flatten_lists(table["node_parents"])

    def check_shape(self) -> None:
        """DataError where the columns do not fit together, or a node begins with a label."""
        block_of_node = np.repeat(np.arange(len(self.num_nodes)), self.num_nodes)
        node_tokens = np.bincount(block_of_node, weights=self.nodes, minlength=len(self.sizes))
        self._refuse(
            (self._num_labels != self.sizes) | (self._num_positions != self.sizes),
            "`labels`, `position_ids` and `input_ids` differ in length",
        )
        self._refuse(
            (node_tokens > self.sizes) | (node_tokens == 0) | (self._num_parents != self.num_nodes),
            "`node_lengths` and `node_parents` do not describe its tokens",
        )
        node_in_block = np.arange(len(self.nodes)) - np.repeat(_starts(self.num_nodes), self.num_nodes)
        self._refuse_nodes(self.parents >= node_in_block, "a node of `node_parents` comes before its parent")
        skipped = np.repeat(_starts(self.sizes) - _starts(node_tokens), self.num_nodes).astype(np.int64)
        is_label = self.labels[_starts(self.nodes) + skipped] >= 0
        self._refuse_nodes(is_label, "the first token of a node is a label, which no token of its node predicts")

    def check_limits(self, model: PreTrainedModel) -> None:
        """DataError for ids and positions that the model does not have."""
        vocab_size = vocabulary_size(model)
        for name, values in (("input_ids", self.ids), ("labels", self.labels)):
            wrong = (values >= vocab_size) | ((values < 0) if name == "input_ids" else False)
            if wrong.any():
                raise self._error_at(
                    int(wrong.argmax()),
                    f"`{name}` has the id {values[wrong.argmax()]}, the model knows 0 to {vocab_size - 1}",
                )
        limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        if limit is not None and len(self.positions) and self.positions.max() >= limit:
            worst = int(self.positions.argmax())
            raise self._error_at(
                worst,
                f"an example has {self.positions[worst] + 1} tokens, the model has positions for {limit}: "
                f"`chunksize` must not be above {limit}",
            )

    def check_labels(self) -> None:
        """DataError for a label that is neither the id of its own token nor the one that masks the others."""
        masked = self.labels.min(initial=0)
        wrong = (self.labels != self.ids) & (self.labels != masked)
        if wrong.any():
            place = int(wrong.argmax())
            raise self._error_at(
                place,
                f"`labels` has {self.labels[place]} for a token with the id {self.ids[place]}. A label is the id of "
                f"its own token (the model looks one token ahead by itself), or {masked}",
            )

    def _refuse(self, is_wrong: npt.NDArray[np.bool_], reason: str) -> None:
        if is_wrong.any():
            raise self._error(int(is_wrong.argmax()), reason)

    def _refuse_nodes(self, is_wrong: npt.NDArray[np.bool_], reason: str) -> None:
        if is_wrong.any():
            raise self._error(int(np.repeat(np.arange(len(self.num_nodes)), self.num_nodes)[is_wrong.argmax()]), reason)

    def _error_at(self, token: int, reason: str) -> DataError:
        return self._error(int(np.searchsorted(np.cumsum(self.sizes), token, side="right")), reason)

    def _error(self, block: int, reason: str) -> DataError:
        return DataError(f"{self._key}, block {self._first + block}: {reason}. Run dataprep again.")


def _check_columns(dataset: Dataset, key: str) -> None:
    missing = [name for name in COLUMNS if name not in dataset.column_names]
    if missing:
        raise DataError(
            f"{key}: no column {', '.join(missing)}; there are {', '.join(dataset.column_names)}. These are not "
            "blocks of dataprep: run it on the rows first, and name what it wrote."
        )
    for name in COLUMNS:
        inner = getattr(dataset.features[name], "feature", None)
        if not str(getattr(inner, "dtype", "")).startswith(("int", "uint")):
            raise DataError(
                f"{key}: column `{name}` must hold lists of integers, it is {dataset.features[name]}. Write the "
                "blocks with `save_to_disk` or `to_parquet`: csv keeps no lists."
            )
    if len(dataset) == 0:
        raise DataError(f"{key}: the data set has no blocks. See dataprep's report for why no row was kept.")


def _starts(lengths: npt.NDArray[Any]) -> npt.NDArray[Any]:
    starts: npt.NDArray[Any] = np.cumsum(lengths) - lengths
    return starts
