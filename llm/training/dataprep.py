"""Rows -> rendered prompts -> tokens and labels -> packed blocks, saved: `python llm/training/dataprep.py X.yaml`."""

import sys
from pathlib import Path

if __name__ == "__main__":  # ahead of the imports below, which take seconds: a mistake in the YAML is told at once
    if not __package__:  # started as a file: Python put this folder first, where our module names would shadow others
        sys.path[0] = str(Path(__file__).resolve().parents[2])
    import typer

    from llm.cli import dataprep as command

    typer.run(command)

from llm.training.config import DataPrepConfig
from llm.training.prep.blocks import iterate_blocks, padding
from llm.training.prep.engine import encode_rows, for_source, open_encoder
from llm.training.prep.file_pages import pages_given_back
from llm.training.prep.manifest import Manifest
from llm.training.prep.pack import choose_packing
from llm.training.prep.report import make_report
from llm.training.prep.reuse import reuse_of
from llm.training.prep.selection import drop_duplicates
from llm.training.prep.sources import check_sources, draw_examples, load_rows
from llm.training.prep.split import split_examples
from llm.training.prep.summary import make_ledgers, make_manifest, print_summary
from llm.training.prep.target import all_staged, open_targets
from llm.training.prep.write import check_writer, spill_blocks, write_dataset, write_records


def prepare(config: DataPrepConfig) -> Manifest:
    """The manifest of the data set that `config` asked for, written to its target.

    Raises ConfigError before any row is read, DataError for rows that cannot be used; the target is then as it was.
    """
    targets = open_targets(config)
    check_sources(config)
    encoder = open_encoder(config)
    check_writer(config.dataset_writer_config)
    source = load_rows(config)
    encoder = for_source(encoder, config, source)
    with all_staged(targets) as stagings, pages_given_back():
        reuse = reuse_of(config, encoder, targets[0])
        examples = encode_rows(source, encoder, stagings[0][0], reuse=reuse, num_threads=config.num_proc)
        if config.dedupe:
            examples = drop_duplicates(examples)
        if config.sources:
            examples = draw_examples(examples, source, config)
        splits = split_examples(examples, config)
        packings = [choose_packing(split, config) for split in splits]
        ledgers = make_ledgers(splits, packings)
        written = zip(splits, packings, ledgers, stagings, strict=True)
        for split, packing, ledger, (folder, staging) in reversed(list(written)):  # what is held out comes first
            batches = iterate_blocks(
                split.table,
                packing,
                padding(config, encoder.tokenizer),
                decode=encoder.tokenizer.decode_bytes,
                places=split.places,
            )
            blocks = spill_blocks(batches, folder, num_blocks=packing.num_blocks)
            write_dataset(blocks, config.dataset_writer_config, staging)
            manifest = make_manifest(config, encoder, split, packing)
            report = make_report(manifest, split, ledger, encoder)
            write_records(ledger, report, manifest=manifest, config=config, target=staging)
    print_summary(manifest, config, *targets)
    return manifest
