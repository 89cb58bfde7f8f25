"""Runs stages 1 to 3 over all rows on this machine: one process, a thread a core that tokenizes."""

import logging
import os
from dataclasses import replace
from pathlib import Path

from llm.errors import DataError
from llm.model_registry import find_model
from llm.prompt import Prompt
from llm.prompt_registry import make_prompt, make_prompt_format
from llm.terminal import progress_bar
from llm.tokenizer import load_prompt_tokenizer
from llm.training.config import DataPrepConfig, MethodConfig, kwargs_of
from llm.training.prep.encode import DROP_ADVICE, Encoder
from llm.training.prep.file_pages import give_unused_back
from llm.training.prep.overlap import Threads, num_cores
from llm.training.prep.reuse import Reuse
from llm.training.prep.rows import Source, iterate_rows
from llm.training.prep.sources import local_size_bytes
from llm.training.prep.store import Collector, Examples, ShardStore

logger = logging.getLogger(__name__)
_ROWS_AT_ONCE = 1000
_MOST_THREADS = 10  # a tenth of the work is Python's, which one thread does at a time
_FAST_THREADS = 3  # beside those of fastokens: the cores are idle less than with two
_MANY_BYTES = 10 << 20  # which the tokenizer needs a second for, on two cores; fastokens a fourth, and 0.25 s to open


def open_encoder(config: DataPrepConfig) -> Encoder:
    """The encoder of `config`; ConfigError for what is wrong with model, prompt or format, before any row is read."""
    if config.num_proc:
        os.environ["RAYON_NUM_THREADS"] = str(config.num_proc)  # read once, when the tokenizer first runs
    chosen_prompt = config.prompt_config or MethodConfig(method="DefaultPrompt")
    prompt = make_prompt(chosen_prompt.method, chosen_prompt.kwargs)
    tokenizer = load_prompt_tokenizer(config.base_model)
    if config.fast_tokenizer and local_size_bytes(config) >= _MANY_BYTES:
        tokenizer.begin_fast()
    chosen = config.prompt_format_config
    encoder = Encoder(
        tokenizer=tokenizer,
        prompt=prompt,
        prompt_format=make_prompt_format(
            chosen.method if chosen else None,
            kwargs_of(chosen),
            base_model=config.base_model,
            tokenizer=tokenizer,
        ),
        # A block may hold more tokens than the model has positions, an example may not.
        max_tokens=min(config.chunksize, find_model(config.base_model).max_length or config.chunksize),
        on_too_long=config.on_too_long,
        allow_special_tokens_in_data=config.allow_special_tokens_in_data,
        train_on=config.train_on,
    )
    encoder.check_room()
    return encoder


def for_source(encoder: Encoder, config: DataPrepConfig, source: Source) -> Encoder:
    """The encoder with the default prompt for the format of the rows, unless the config names one; fast for many."""
    if config.fast_tokenizer and source.size_bytes >= _MANY_BYTES:
        encoder.tokenizer.use_fast()
    formats = {part.row_format for part in source.parts}
    is_default = config.prompt_config is None and formats != {"input_response"}
    if is_default and "input_response" in formats:
        logger.info(
            "prompt_config: `Prompt` (the text itself) for the rows of all sources, since their formats differ."
        )
    return replace(encoder, prompt=Prompt()) if is_default else encoder


def encode_rows(
    source: Source, encoder: Encoder, folder: Path, *, reuse: Reuse | None = None, num_threads: int | None = None
) -> Examples:
    """The examples of all rows, spilled to `folder`, or with `reuse` to the cache; DataError when none is left.

    `num_threads` tokenize, None: as many as there are cores, up to 10.
    """
    num_rows = source.num_rows
    store = ShardStore(reuse.folder if reuse else folder / "rows")
    collector = Collector(encoder.train_on)
    if reuse:
        reuse.begin()
    batches = iterate_rows(source, batch_size=_ROWS_AT_ONCE)
    num_threads = _FAST_THREADS if encoder.tokenizer.is_fast else num_threads or min(num_cores(), _MOST_THREADS)
    threads = Threads(num_threads)
    with (
        encoder.tokenizer.shared(threads.share),
        threads,
        progress_bar("Tokenizing", total=num_rows, unit="rows") as advance,
    ):
        for batch, shard in threads.in_order(lambda rows: store.shard(rows, encoder.encode), batches):
            collector.add(batch, shard)
            advance(len(batch))
    if reuse:
        reuse.end(num_rows=num_rows, num_reused=collector.num_reused_rows)
    examples = collector.examples()
    give_unused_back()
    if not len(examples.lengths):
        reasons = {what.removeprefix("dropped: "): count for what, count in examples.counts().items()}
        told = "\n".join(f"- {reason}, {count} rows: {DROP_ADVICE[reason]}" for reason, count in reasons.items())
        raise DataError(f"{source.key}: every one of the {num_rows} rows was dropped, nothing is written:\n{told}")
    return examples
