"""Whether training rows are also in the evaluation data: told by the hashes of their prompts, before the model loads.

Takes the ledgers beside both data sets, of which `prompt_hash` is the same for the same prompt tokens.
"""

import logging

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from llm.errors import DataError
from llm.training.config import DatasetConfig, FinetuneConfig
from llm.training.prep.dataset import dataset_location
from llm.training.prep.manifest import Manifest
from llm.training.prep.target import Target

logger = logging.getLogger(__name__)
_COLUMNS = ["row", "prompt_hash", "split"]
_NUM_FIRST_ROWS = 5


def check_overlap(config: FinetuneConfig, train: Manifest | None, evaluation: Manifest | None) -> None:
    """Warns of training rows whose prompt the evaluation data has, too; with `fail_on_leak` that is a DataError.

    None for a manifest: the data set is not of files. Where a ledger or its hashes are missing, `fail_on_leak` is a
    DataError as well: what cannot be checked is not known to be right.
    """
    assert config.eval_dataset_config is not None, "there is something to compare with"
    ledgers = _rows_of(config.train_dataset_config, train), _rows_of(config.eval_dataset_config, evaluation)
    if ledgers[0] is None or ledgers[1] is None:
        text = (
            "eval_dataset_config: whether its prompts are also in the training data cannot be checked, since a "
            "`ledger.parquet` with `prompt_hash` is missing."
        )
        if config.fail_on_leak:
            raise DataError(f"{text} Run dataprep again, or delete `fail_on_leak`.")
        logger.info(text)
        return
    text = _overlap_text(*ledgers)
    if text and config.fail_on_leak:
        raise DataError(text)
    if text:
        logger.warning("%s `fail_on_leak: true` makes this an error.", text)


def _overlap_text(train: pa.Table, evaluation: pa.Table) -> str:
    """What is to be told; nothing when no prompt is in both."""
    common = np.intersect1d(train["prompt_hash"].to_numpy(), evaluation["prompt_hash"].to_numpy())
    if not len(common):
        return ""
    told = []
    for ledger in (train, evaluation):
        rows = ledger.filter(pc.is_in(ledger["prompt_hash"], pa.array(common)))["row"]
        first = ", ".join(map(str, rows.slice(0, _NUM_FIRST_ROWS).to_pylist()))
        told.append(
            (f"{len(rows):,} of {ledger.num_rows:,}", f"rows {first}{', ...' if len(rows) > _NUM_FIRST_ROWS else ''}")
        )
    (num_train, train_rows), (num_evaluation, evaluation_rows) = told
    return (
        f"eval_dataset_config: {num_train} training rows have a prompt that is in the evaluation data, too "
        f"({train_rows}), where {num_evaluation} rows have it ({evaluation_rows}): the evaluation loss will look "
        "better than it is. Take these rows out of one of them, or let dataprep hold rows out (`eval_fraction: 0.05`)."
    )


def _rows_of(dataset: DatasetConfig, manifest: Manifest | None) -> pa.Table | None:
    """Row numbers and prompt hashes of what the data set holds; None where its ledger has none."""
    location = dataset_location(dataset)
    if location is None or manifest is None:
        return None
    try:
        path = Target(path=location.rstrip("/"), path_key="").ledger_path
        with fsspec.open(path, "rb", **(dataset.kwargs.get("storage_options") or {})) as file:
            found = pq.ParquetFile(file)
            if not {*_COLUMNS} <= {*found.schema_arrow.names}:
                return None
            ledger = found.read(_COLUMNS)
    except FileNotFoundError:
        return None
    split = manifest.source.get("split", {}).get("name", "train")
    return ledger.filter(pc.equal(ledger["split"], split))  # null, of a dropped row, is left out
