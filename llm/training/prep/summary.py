"""What a preparation did: the ledger with the block of every row, the manifest's facts, the table at the end."""

from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from llm.events import tell_event
from llm.serving_template import serving_template
from llm.terminal import print_table
from llm.training.config import DataPrepConfig, MethodConfig, kwargs_of
from llm.training.config_file import saved_data
from llm.training.prep.arrays import Ints
from llm.training.prep.encode import DROP_ADVICE, Encoder
from llm.training.prep.manifest import FORMAT_VERSION, Manifest
from llm.training.prep.nodes import shared_nodes
from llm.training.prep.pack import Packing
from llm.training.prep.store import Examples
from llm.training.prep.target import Target

_BLOCKS_AT_ONCE = 1000


def ledger_with_blocks(examples: Examples, packing: Packing) -> pa.Table:
    """The ledger and, for every row that was kept, the number of its block (null for a dropped one).

    Also how many tokens its contexts take, estimated: their share of its characters, of its tokens.
    """
    block_of = np.empty(len(packing.examples), dtype=np.int64)
    block_of[packing.examples] = np.repeat(np.arange(packing.num_blocks), np.diff(packing.block_starts))
    is_dropped = pc.equal(examples.ledger["outcome"], "dropped").to_numpy()
    blocks = np.full(len(is_dropped), -1)
    blocks[~is_dropped] = block_of
    estimates = pa.array(_contexts_tokens(examples, ~is_dropped), pa.int32(), mask=is_dropped)
    ledger = examples.ledger.append_column("estimated_contexts_tokens", estimates)
    ledger = ledger.append_column("block", pa.array(blocks, mask=is_dropped))
    prompt_hashes = np.zeros(len(is_dropped), dtype=np.int64)
    prompt_hashes[~is_dropped] = examples.hashes.prompt_numbers()
    ledger = ledger.append_column("prompt_hash", pa.array(prompt_hashes, mask=is_dropped))
    return ledger.append_column("split", pc.if_else(pa.array(is_dropped), pa.scalar(None, pa.string()), examples.split))


def make_ledgers(splits: Sequence[Examples], packings: Sequence[Packing]) -> list[pa.Table]:
    """The ledger of each split: that of the first, the training data, has all rows of the source, in their order.

    Asserts that none is missing.
    """
    own = [ledger_with_blocks(split, packing) for split, packing in zip(splits, packings, strict=True)]
    order = [(name, "ascending") for name in ("row", "draw") if name in own[0].column_names]
    whole = pa.concat_tables(own).sort_by(order) if len(own) > 1 else own[0]
    rows = np.unique(whole["row"].to_numpy())
    assert np.array_equal(rows, np.arange(len(rows))), "a row vanished"
    return [whole, *own[1:]]


def make_manifest(config: DataPrepConfig, encoder: Encoder, examples: Examples, packing: Packing) -> Manifest:
    """The facts of a finished preparation; asserts that the row counts add up."""
    return Manifest(
        format_version=FORMAT_VERSION,
        base_model=config.base_model,
        tokenizer_fingerprint=encoder.tokenizer.fingerprint,
        prompt=(config.prompt_config or MethodConfig(method=type(encoder.prompt).__name__)).model_dump(),
        prompt_format={
            "method": type(encoder.prompt_format).__name__,
            "kwargs": kwargs_of(config.prompt_format_config),
        },
        chat_template=serving_template(encoder.prompt, encoder.prompt_format),
        stop_token=encoder.prompt_format.stop,
        stop_token_id=encoder.tokenizer.control_tokens[encoder.prompt_format.stop],
        samples=examples.samples,
        # What a variable of the environment holds is not written down: it may be a secret.
        source=_source(config) | {"fingerprint": examples.source_fingerprint} | _split(examples),
        counts=_counts(examples, packing, config.chunksize),
        chunksize=config.chunksize,
        ignore_index=config.ignore_index,
        seed=config.seed,
        versions={name: version(name) for name in ("llm-train", "transformers", "tokenizers", "datasets", "pyarrow")},
    )


def print_summary(
    manifest: Manifest, config: DataPrepConfig, target: Target, held_out_target: Target | None = None
) -> None:
    """The table at the end of `dataprep`."""
    counts = manifest.counts
    tell_event("prepared", path=target.path, chunksize=manifest.chunksize, **counts)
    rows = [("rows read", f"{counts['rows_read']:,}"), ("kept whole", f"{counts['rows_kept']:,}")]
    if counts["rows_cut"]:
        rows.append(("kept in part", f"{counts['rows_cut']:,}"))
    for reason, found in counts["rows_dropped"].items():
        first = ", ".join(map(str, found["first_rows"]))
        rows.append((f"dropped: {reason}", f"{found['rows']:,}  ({DROP_ADVICE[reason]}; rows {first})"))
    if num_repeats := counts.get("rows_repeated"):
        rows.append(("seen once more", f"{num_repeats:,}  (by the weights of `sources`; among those kept)"))
    for found in counts.get("sources", []):
        share = f"{found['tokens'] / counts['tokens']:.0%} of all"
        told = f"{found['rows_kept']:,} kept of {found['rows']:,} rows, {found['tokens']:,} tokens ({share})"
        rows.append((found["source"], told))
    if num_held_out := counts.get("rows_held_out"):
        rows.append(("held out", f"{num_held_out:,}  ({num_held_out / counts['rows_read']:.1%}, for evaluation)"))
    if counts["rows_with_control_text"]:
        became = "become control tokens" if config.allow_special_tokens_in_data else "kept as text"
        rows.append(("with control-token text", f"{counts['rows_with_control_text']:,}  ({became})"))
    share = counts["trained_tokens"] / counts["tokens"]
    rows += [
        ("tokens", f"{counts['tokens']:,}"),
        ("trained tokens", f"{counts['trained_tokens']:,}  ({share:.0%})"),
    ]
    if shared := counts["shared"]["tokens"]:
        saved = counts["shared"]["saved_tokens"]
        told = f"{shared:,} tokens stored once, saves {saved:,} ({saved / counts['tokens']:.0%})"
        rows.append(("shared prompts", told))
    rows += [
        ("blocks", f"{counts['blocks']:,} of {manifest.chunksize:,} tokens, {counts['density']:.1%} full"),
        ("format", f"{manifest.prompt_format['method']}, stop token {manifest.stop_token}"),
        ("written to", target.path),
        ("report", target.report_page_path),
    ]
    if held_out_target:
        rows.append(("held-out rows", f"in {held_out_target.path}; for finetune.yaml:"))
        rows.append(("", f"eval_dataset_config: {held_out_target.path}"))
    print_table("Prepared", rows)


def _contexts_tokens(examples: Examples, is_kept: npt.NDArray[np.bool_]) -> Ints:
    """An estimate a row, 0 for one that is not kept: to count them, each text would be tokenized once more."""
    characters = examples.ledger["num_contexts_characters"].filter(pa.array(is_kept)).to_numpy()
    all_characters = pc.utf8_length(examples.table["text"]).to_numpy()[examples.places]
    estimates = np.zeros(len(is_kept), dtype=np.int64)
    estimates[is_kept] = np.rint(characters / all_characters * examples.lengths)
    return estimates


def _source(config: DataPrepConfig) -> dict[str, Any]:
    data = saved_data(config)
    found: dict[str, Any] = data["source_config"] or {"sources": data["sources"], "mix_by": data["mix_by"]}
    return found


def _split(examples: Examples) -> dict[str, Any]:
    """Which part of the source this is, where rows are held out: the training part says which rows these are."""
    if examples.held_out is not None:
        held_out = {"rows": len(examples.held_out.lengths), "fingerprint": examples.held_out.hashes.fingerprint}
        return {"split": {"name": examples.split, "held_out": held_out}}
    is_part = examples.split == "eval"
    return {"split": {"name": examples.split, "fingerprint": examples.hashes.fingerprint}} if is_part else {}


def _counts(examples: Examples, packing: Packing, chunksize: int) -> dict[str, Any]:
    ledger = examples.ledger
    outcomes = examples.counts()
    dropped = {
        outcome.removeprefix("dropped: "): {"rows": count, "first_rows": _first_rows(ledger, outcome)}
        for outcome, count in sorted(outcomes.items())
        if outcome.startswith("dropped: ")
    }
    held_out = {} if examples.held_out is None else {"rows_held_out": len(examples.held_out.lengths)}
    num_repeats = _num_repeats(examples) + (_num_repeats(examples.held_out) if examples.held_out else 0)
    tokens = int(examples.lengths.sum())
    shared = _sharing(examples, packing)
    stored = tokens - shared["saved_tokens"]
    counts = {
        "rows_read": ledger.num_rows + sum(held_out.values()) - num_repeats,
        "rows_kept": outcomes["kept"],
        "rows_cut": outcomes["cut"],
        "rows_dropped": dropped,
        **held_out,
        **_of_sources(ledger, num_repeats),
        "rows_with_control_text": pc.sum(ledger["has_control_text"]).as_py() or 0,
        "tokens": tokens,
        "trained_tokens": pc.sum(ledger["num_trained_tokens"]).as_py(),
        "stored_tokens": stored,
        "shared": shared,
        "blocks": packing.num_blocks,
        "density": round(stored / (packing.num_blocks * chunksize), 4),
    }
    num_dropped = sum(count for outcome, count in outcomes.items() if outcome.startswith("dropped: "))
    num_kept = outcomes["kept"] + outcomes["cut"]
    assert ledger.num_rows == num_kept + num_dropped, "a row vanished"
    assert len(packing.examples) == num_kept, "an example vanished"
    return counts


def _num_repeats(examples: Examples) -> int:
    """How many examples are there once more, since their source has a weight above 1."""
    ledger = examples.ledger
    return pc.sum(pc.greater(ledger["draw"], 0)).as_py() or 0 if "draw" in ledger.column_names else 0


def _of_sources(ledger: pa.Table, num_repeats: int) -> dict[str, Any]:
    """Where several sources are mixed, what there is of each, without held-out rows; repeats count as kept."""
    if "source" not in ledger.column_names:
        return {}
    sources = []
    for name in dict.fromkeys(ledger["source"].to_pylist()):
        own = ledger.filter(pc.equal(ledger["source"], name))
        kept = own.filter(pc.not_equal(own["outcome"], "dropped"))
        rows = pc.count_distinct(own["row"]).as_py()
        tokens = pc.sum(kept["num_tokens"]).as_py() or 0
        sources.append({"source": name, "rows": rows, "rows_kept": kept.num_rows, "tokens": tokens})
    return {"rows_repeated": num_repeats, "sources": sources}


def _sharing(examples: Examples, packing: Packing) -> dict[str, int]:
    """How many shared nodes the blocks have, the tokens in them, and how many tokens that saves."""
    num_nodes = num_tokens = num_saved = 0
    for first in range(0, packing.num_blocks if packing.forest else 0, _BLOCKS_AT_ONCE):
        assert packing.forest is not None
        starts = packing.block_starts[first : first + _BLOCKS_AT_ONCE + 1]
        numbers = packing.examples[starts[0] : starts[-1]]
        nodes = shared_nodes(packing.forest, numbers, examples.lengths[numbers], np.diff(starts))
        num_nodes += len(nodes.lengths) - len(numbers)
        num_tokens += nodes.num_shared_tokens
        num_saved += int(nodes.num_skipped.sum())
    return {"nodes": num_nodes, "tokens": num_tokens, "saved_tokens": num_saved}


def _first_rows(ledger: pa.Table, outcome: str) -> list[int]:
    rows: list[int] = ledger.filter(pc.equal(ledger["reason"], outcome.removeprefix("dropped: ")))["row"].to_pylist()
    return rows[:5]
