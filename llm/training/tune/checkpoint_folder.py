"""The checkpoints of a `local_output`: which there are, and which is the newest whole one. Loads nothing heavy."""

import logging
import os
import re
from typing import Any

from llm.training.tune.whole_folder import find_damage, free_name, read_folder_manifest

logger = logging.getLogger(__name__)
CHECKPOINT = re.compile(r"checkpoint-(\d+)")


def list_checkpoints(local_output: str) -> list[tuple[int, str]]:
    """(step, path) of every `checkpoint-N` folder, whole or not, newest first."""
    if not os.path.isdir(local_output):
        return []
    found = [(CHECKPOINT.fullmatch(entry.name), entry) for entry in os.scandir(local_output)]
    return sorted(((int(m[1]), entry.path) for m, entry in found if m and entry.is_dir()), reverse=True)


def newest_whole_checkpoint(local_output: str) -> str | None:
    """The path of the newest checkpoint whose every file matches its manifest; None when there is none.

    Newer ones that do not match are renamed aside and named in the log. Nothing is deleted or loaded.
    Call it on rank 0 only.
    """
    for step, path in list_checkpoints(local_output):
        damage = find_damage(path) or _wrong_step(path, step)
        if damage is None:
            return path
        aside = free_name(f"{path}.damaged")
        os.rename(path, aside)
        logger.warning("%s is not whole (%s): skipped, kept as %s", path, damage, os.path.basename(aside))
    return None


def run_id_of(manifest: dict[str, Any]) -> str | None:
    """The run that wrote the folder of `manifest`; None when it does not say."""
    run_id: str | None = manifest.get("run", {}).get("id")
    return run_id


def _wrong_step(path: str, step: int) -> str | None:
    recorded = read_folder_manifest(path).get("step")
    return None if recorded == step else f"its manifest is that of step {recorded}"
