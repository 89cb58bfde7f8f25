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
from llm.training.prep.dataset import check_source
from llm.training.prep.engine import encode_rows, for_source, open_encoder
from llm.training.prep.manifest import Manifest
from llm.training.prep.pack import choose_packing
from llm.training.prep.report import make_report
from llm.training.prep.reuse import reuse_of
from llm.training.prep.rows import load_source
from llm.training.prep.summary import ledger_with_blocks, make_manifest, print_summary
from llm.training.prep.target import open_target, staged
from llm.training.prep.write import check_writer, spill_blocks, write_dataset, write_records


def prepare(config: DataPrepConfig) -> Manifest:
    """The manifest of the data set that `config` asked for, written to its target.

    Raises ConfigError before any row is read, DataError for rows that cannot be used; the target is then as it was.
    """
    target = open_target(config)
    check_writer(config.dataset_writer_config)
    check_source(config.source_config)
    encoder = open_encoder(config)
    source = load_source(config.source_config, columns=config.columns, row_format=config.row_format)
    encoder = for_source(encoder, config, source)
    with staged(target) as (folder, staging):
        examples = encode_rows(source, encoder, folder, reuse=reuse_of(config, encoder, target))
        packing = choose_packing(examples, config)
        batches = iterate_blocks(
            examples.table, packing, padding(config, encoder.tokenizer), decode=encoder.tokenizer.decode
        )
        blocks = spill_blocks(batches, folder, num_blocks=packing.num_blocks)
        write_dataset(blocks, config.dataset_writer_config, staging)
        manifest = make_manifest(config, encoder, examples, packing)
        ledger = ledger_with_blocks(examples, packing)
        report = make_report(manifest, examples.table, ledger, encoder)
        write_records(ledger, report, manifest=manifest, config=config, target=staging)
    print_summary(manifest, config, target)
    return manifest
