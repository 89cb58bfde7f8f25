"""`source_config` or `sources` -> rows; and, once they are examples, how often each of a mixed source is seen.

Every row is tokenized once, however often it is drawn. The ledger says of each row its `source`, its number there
(`source_row`), and, one line for each time that it is seen, the number of the `draw`.
"""

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from llm.errors import DataError
from llm.training.config import DataPrepConfig
from llm.training.prep.arrays import Ints
from llm.training.prep.dataset import check_source, file_size_bytes
from llm.training.prep.rows import Source, load_source
from llm.training.prep.selection import drop_examples
from llm.training.prep.store import Examples


def check_sources(config: DataPrepConfig) -> None:
    """`dataset.check_source` of each source."""
    for key, source in config.named_sources.items():
        check_source(source.source_config, key=key)


def local_size_bytes(config: DataPrepConfig) -> int:
    """The bytes of all sources that are files on this machine."""
    return sum(file_size_bytes(source.source_config) for source in config.named_sources.values())


def load_rows(config: DataPrepConfig) -> Source:
    """The rows of all sources, one source after the other; see `rows.load_source`."""
    first, *others = [
        load_source(
            source.source_config,
            columns=source.columns,
            row_format=source.row_format,
            on_bad_row=config.on_bad_row,
            key=key,
        )
        for key, source in config.named_sources.items()
    ]
    return replace(first, others=tuple(others))


def draw_examples(examples: Examples, source: Source, config: DataPrepConfig) -> Examples:
    """The examples of several sources, each as often as the weight of its source says.

    Whole passes first, then a random rest without replacement: 2.5 = every row twice and a random half a third time.
    With `mix_by` weights are shares of as many rows (tokens) as all sources have. DataError when a source has none.
    """
    firsts = np.cumsum([0, *(len(part.dataset) for part in source.parts)])
    source_of = np.searchsorted(firsts, examples.ledger["row"].to_numpy(), side="right") - 1
    examples = _with_sources(examples, source, source_of, firsts)
    was_kept = pc.not_equal(examples.ledger["outcome"], "dropped").to_numpy()
    times = _times(source_of[was_kept], examples.lengths, config)
    if not times.any():
        raise DataError("sources: the weights are so small that no row is drawn. Write larger ones.")
    return _repeated(drop_examples(examples, times == 0, reason="not_drawn"), times[times > 0])


def _with_sources(examples: Examples, source: Source, source_of: Ints, firsts: Ints) -> Examples:
    names = pa.array([part.key.removesuffix(".source_config") for part in source.parts])
    rows = pa.array(examples.ledger["row"].to_numpy() - firsts[source_of])
    ledger = examples.ledger.append_column("source", names.take(pa.array(source_of))).append_column("source_row", rows)
    return replace(examples, ledger=ledger)


def _times(source_of: Ints, lengths: Ints, config: DataPrepConfig) -> Ints:
    """How often each example is seen."""
    sizes = lengths if config.mix_by == "tokens" else np.ones_like(lengths)
    total_weight = sum(source.weight for source in config.sources)
    times = np.zeros(len(lengths), dtype=np.int64)
    for number, source in enumerate(config.sources):
        own = np.flatnonzero(source_of == number)
        passes = source.weight
        if config.mix_by:
            if not len(own):
                raise DataError(f"sources[{number}]: every row was dropped, so it can have no share. Take it out.")
            passes *= int(sizes.sum()) / total_weight / int(sizes[own].sum())
        rest = passes - int(passes)
        drawn = np.random.default_rng([config.seed or 0, number]).permutation(own)
        reached = np.concatenate([[0], np.cumsum(sizes[drawn])])
        num_drawn = np.abs(reached - rest * reached[-1]).argmin()  # the nearest
        times[own] = int(passes)
        times[drawn[:num_drawn]] += 1
    return times


def _repeated(examples: Examples, times: Ints) -> Examples:
    """Each example as often as `times` says, next to one another, and so in the ledger, with the number of the draw."""
    was_kept = pc.not_equal(examples.ledger["outcome"], "dropped").to_numpy()
    lines = np.ones(len(was_kept), dtype=np.int64)
    lines[was_kept] = times
    ledger = examples.ledger.take(pa.array(np.repeat(np.arange(len(lines)), lines)))
    draws = np.arange(lines.sum()) - np.repeat(np.cumsum(lines) - lines, lines)
    is_dropped = np.repeat(~was_kept, lines)
    numbers = np.repeat(np.arange(len(times)), times)
    return replace(
        examples,
        places=examples.places[numbers],
        lengths=examples.lengths[numbers],
        hashes=examples.hashes.take(numbers),
        ledger=ledger.append_column("draw", pa.array(draws, pa.int32(), mask=is_dropped)),
    )
