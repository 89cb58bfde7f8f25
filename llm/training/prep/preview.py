"""What `llm-train inspect` shows: blocks of a prepared data set, or rows as a dataprep config would make them.

Takes a path or a config, gives views (`token_view.py`). Writes nothing.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

from llm.errors import ConfigError, DataError
from llm.tokenizer import PromptTokenizer, load_prompt_tokenizer
from llm.training.config import DataPrepConfig, DatasetConfig
from llm.training.prep.dataset import check_source, load_blocks
from llm.training.prep.encode import DROP_ADVICE, Dropped, Encoder, Example, Outcome
from llm.training.prep.engine import for_source, open_encoder
from llm.training.prep.manifest import Manifest, read_manifest
from llm.training.prep.rows import iterate_rows
from llm.training.prep.sources import check_sources, load_rows
from llm.training.prep.token_view import Part, View, token_runs

logger = logging.getLogger(__name__)
_KEY = "inspect"
Block = Mapping[str, Any]


def row_views(config: DataPrepConfig, *, first: int, num_rows: int) -> Iterator[View]:
    """Source rows `first` to `first + num_rows`, as dataprep would encode them; then how many there are.

    Raises what dataprep does before and at these rows: ConfigError, DataError.
    """
    config = config.model_copy(update={"fast_tokenizer": False})  # takes longer to open than a few rows do
    check_sources(config)
    encoder = open_encoder(config)
    source = load_rows(config)
    encoder = for_source(encoder, config, source)
    _check_first(first, source.num_rows, "rows")
    for batch in islice(iterate_rows(source, batch_size=1), first, first + num_rows):
        yield outcome_view(encoder.encode(batch)[0], encoder)
    yield _range_view("rows", first, num_rows, source.num_rows)


def block_views(path: str, *, first: int, num_blocks: int, base_model: str | None) -> Iterator[View]:
    """Blocks `first` to `first + num_blocks` of the prepared data set at `path`; then how many there are.

    Raises ConfigError when it is not there, DataError when it is no finished data set of dataprep or its
    tokenizer has changed; another `base_model` than the manifest's is only warned of when it does not fit.
    """
    location = DatasetConfig.model_validate(path)
    check_source(location, key=_KEY)
    blocks = load_blocks(location, key=_KEY)
    manifest = read_manifest(path)
    _check_first(first, len(blocks), "blocks")
    tokenizer = _tokenizer(manifest, path, base_model)
    for number in range(first, min(first + num_blocks, len(blocks))):
        yield block_view(blocks[number], number=number, tokenizer=tokenizer, stop_token_id=manifest.stop_token_id)
    yield _range_view("blocks", first, num_blocks, len(blocks))


def outcome_view(outcome: Outcome, encoder: Encoder) -> View:
    """One row: its tokens, or why it was dropped and what helps."""
    if isinstance(outcome, Dropped):
        size = f", {outcome.num_tokens:,} tokens" if outcome.num_tokens else ""
        return View(title=f"Row {outcome.row}: dropped, {outcome.reason}{size} ({DROP_ADVICE[outcome.reason]})")
    is_trained = [False] * len(outcome.input_ids)
    for start, end in outcome.trained:
        is_trained[start:end] = [True] * (end - start)
    runs = token_runs(
        outcome.input_ids,
        is_trained,
        untrained="prompt",
        tokenizer=encoder.tokenizer,
        stop_token_id=encoder.tokenizer.control_tokens[encoder.prompt_format.stop],
    )
    title = f"Row {outcome.row}: {_counts(is_trained)}{_remarks(outcome, encoder)}"
    return View(title=title, parts=(Part(title=None, runs=runs),))


def block_view(block: Block, *, number: int, tokenizer: PromptTokenizer, stop_token_id: int) -> View:
    """One block: its nodes, then its padding; DataError when its columns do not fit together.

    A node that others go on from is shared; of the rest each is one row where there are as many as `example_rows`.
    """
    _check_shape(block, number)
    ids, is_trained = block["input_ids"], [label >= 0 for label in block["labels"]]
    nodes = _Nodes(block)
    parts = []
    for node, (start, end) in enumerate(nodes.spans):
        runs = token_runs(
            ids[start:end],
            is_trained[start:end],
            untrained="shared" if nodes.children[node] else "prompt",
            tokenizer=tokenizer,
            stop_token_id=stop_token_id,
            context=nodes.parent_ids(node),
        )
        title = f"{nodes.title(node)}: {_counts(is_trained[start:end])}"
        parts.append(Part(title=title, runs=runs))
    rest = slice(nodes.spans[-1][1], None)
    padding = token_runs(
        ids[rest], is_trained[rest], untrained="padding", tokenizer=tokenizer, stop_token_id=stop_token_id
    )
    title = f"Block {number}: {_block_title(block, nodes, is_trained)}"
    return View(title=title, parts=(*parts, Part(title=None, runs=padding)))


class _Nodes:
    """The nodes of a block: `spans` of their tokens, and the `children` of each."""

    def __init__(self, block: Block) -> None:
        self._block = block
        self.parents: list[int] = block["node_parents"]
        self.spans: list[tuple[int, int]] = []
        for length in block["node_lengths"]:
            start = self.spans[-1][1] if self.spans else 0
            self.spans.append((start, start + length))
        self.children: list[list[int]] = [[] for _ in self.parents]
        for node, parent in enumerate(self.parents):
            if parent >= 0:
                self.children[parent].append(node)
        leaves = [node for node, below in enumerate(self.children) if not below]
        rows = block.get("example_rows") or []
        self._row_of = dict(zip(leaves, rows, strict=True)) if len(leaves) == len(rows) else {}

    def parent_ids(self, node: int) -> list[int]:
        """The ids that `node` goes on from; none for a root."""
        if self.parents[node] < 0:
            return []
        start, end = self.spans[self.parents[node]]
        ids: list[int] = self._block["input_ids"][start:end]
        return ids

    def title(self, node: int) -> str:
        """`row 7 (node 2, goes on from node 0 at position 80)`, `node 0, shared by nodes 1, 2`."""
        place = f"node {node}"
        if self.parents[node] >= 0:
            position = self._block["position_ids"][self.spans[node][0]]
            place += f", goes on from node {self.parents[node]} at position {position}"
        if self.children[node]:
            place += f", shared by {_numbers('node', self.children[node])}"
        return f"row {self._row_of[node]} ({place})" if node in self._row_of else place


def _block_title(block: Block, nodes: _Nodes, is_trained: Sequence[bool]) -> str:
    num_tokens = nodes.spans[-1][1]
    facts = [_counts(is_trained, num_tokens)]
    if num_padding := len(is_trained) - num_tokens:
        facts.append(f"{num_padding:,} padding")
    facts.append(_numbers("row", block.get("example_rows") or []))
    is_shared = any(nodes.children)
    structure = f"parents {' '.join(map(str, nodes.parents))}" if is_shared else "none shared"
    facts.append(f"{_plural(len(nodes.parents), 'node')}, {structure}")
    pairs = zip(block["input_ids"], block["labels"], strict=True)
    if num_other := sum(0 <= label != number for number, label in pairs):
        facts.append(f"{_plural(num_other, 'label')} not the token itself")
    return "; ".join(fact for fact in facts if fact)


def _check_shape(block: Block, number: int) -> None:
    lengths, parents = block["node_lengths"], block["node_parents"]
    sizes = {len(block[name]) for name in ("input_ids", "labels", "position_ids")}
    is_forest = all(-1 <= parent < node for node, parent in enumerate(parents))
    if len(sizes) != 1 or len(lengths) != len(parents) or not 0 < sum(lengths) <= max(sizes) or not is_forest:
        raise DataError(
            f"{_KEY}, block {number}: `input_ids`, `labels`, `position_ids`, `node_lengths` and `node_parents` do not "
            "fit together. Run dataprep again."
        )


def _tokenizer(manifest: Manifest, path: str, base_model: str | None) -> PromptTokenizer:
    try:
        tokenizer = load_prompt_tokenizer(base_model or manifest.base_model)
    except ConfigError as error:
        if base_model:
            raise
        raise ConfigError(f"{error} The manifest of `{path}` names it: --base-model gives another place.") from error
    if tokenizer.fingerprint == manifest.tokenizer_fingerprint:
        return tokenizer
    text = (
        f"{_KEY}: the blocks of `{path}` were made with the tokenizer {manifest.tokenizer_fingerprint} of "
        f"`{manifest.base_model}`, `{base_model or manifest.base_model}` has the tokenizer {tokenizer.fingerprint}: "
        "the same ids mean other words."
    )
    if base_model is None:
        raise DataError(f"{text} Run dataprep again, or give the right one with --base-model.")
    logger.warning("%s Going on, as --base-model says.", text)
    return tokenizer


def _check_first(first: int, num_found: int, what: str) -> None:
    if first >= num_found:
        raise ConfigError(f"--first {first}: there are {num_found:,} {what}, numbered from 0 to {num_found - 1}.")


def _range_view(what: str, first: int, num_shown: int, num_found: int) -> View:
    end = min(first + num_shown, num_found)
    shown = f"{what} {first} to {end - 1}" if end - first > 1 else f"{what.removesuffix('s')} {first}"
    more = f"; more: --first {end}" if end < num_found else ""
    return View(title=f"{shown} of {num_found:,}{more}")


def _remarks(example: Example, encoder: Encoder) -> str:
    remarks = []
    if example.num_cut_contexts:
        remarks.append(f"cut by {_plural(example.num_cut_contexts, 'context')}")
    if example.num_cut_characters:
        remarks.append(f"cut by {_plural(example.num_cut_characters, 'character')} of the input")
    if example.has_control_text:
        became = "became control tokens" if encoder.allow_special_tokens_in_data else "kept as text"
        remarks.append(f"control-token text {became}")
    return "".join(f"; {remark}" for remark in remarks)


def _counts(is_trained: Sequence[bool], num_tokens: int | None = None) -> str:
    size = len(is_trained) if num_tokens is None else num_tokens
    return f"{_plural(size, 'token')}, {sum(is_trained):,} trained"


def _plural(number: int, thing: str) -> str:
    return f"{number:,} {thing}{'' if number == 1 else 's'}"


def _numbers(thing: str, numbers: Sequence[int]) -> str:
    """`rows 3, 4, 5`."""
    return f"{thing}{'' if len(numbers) == 1 else 's'} {', '.join(map(str, numbers))}" if numbers else ""
