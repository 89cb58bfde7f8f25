"""Tokens of rows are kept in the cache, and used again by a run with the same rows and all that shapes their tokens."""

import hashlib
import importlib.metadata
import json
import logging
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from datetime import date
from pathlib import Path
from typing import Any

import llm
from llm.cache import cache_folder, write_whole
from llm.chat_template import ChatTemplateFormat
from llm.registry import is_ours
from llm.training.config import DataPrepConfig, kwargs_of
from llm.training.prep.encode import Encoder
from llm.training.prep.target import Target

logger = logging.getLogger(__name__)
DAYS_KEPT = 14
_CODE = ("*.py", "training/prep/*.py")
_LIBRARIES = ("tokenizers", "jinja2", "transformers")

Parts = dict[str, str]
"""What shapes tokens, by the key that the user knows it by, each hashed: it may hold what is secret."""


class Reuse:
    """Where the tokens of a run are, and what to tell about it."""

    def __init__(self, config: DataPrepConfig, encoder: Encoder, target: Target) -> None:
        """`config` made `encoder`; the last run to `target` is remembered."""
        self._parts = _parts(config, encoder)
        name = hashlib.sha256(str(Path(target.path).absolute() if not target.is_url else target.path).encode())
        self._last = cache_folder("last") / f"{name.hexdigest()[:32]}.json"
        self._before = _read_parts(self._last)
        self.folder = cache_folder("rows") / _hash(self._parts)

    def begin(self) -> None:
        """Notes what this run is, for the next one: before the work, which may be killed."""
        text = json.dumps(self._parts)
        write_whole(self._last, lambda path: path.write_text(text))

    def end(self, *, num_rows: int, num_reused: int) -> None:
        """Logs what was used again, or what changed since the last run to this target; removes what is old."""
        _remove_unused()
        changed = [key for key, part in self._parts.items() if self._before.get(key) != part]
        if num_reused == num_rows:
            logger.info("The tokens of all %s rows are used again.", f"{num_rows:,}")
        elif num_reused:
            told = f"{num_reused:,} rows are used again, {num_rows - num_reused:,}"
            logger.info(
                "The tokens of %s were not there: rows that changed, or that a stopped run did not reach.", told
            )
        elif self._before and changed:
            logger.info("All rows are tokenized anew: `%s` changed.", "`, `".join(changed))
        elif self._before:
            logger.info("All rows are tokenized anew: they changed, or the cache was emptied.")


def reuse_of(config: DataPrepConfig, encoder: Encoder, target: Target) -> Reuse | None:
    """None where nothing is used again: not asked for, a prompt whose code is not ours, a cache we may not write to."""
    if not config.reuse_tokens or not is_ours(encoder.prompt, encoder.prompt_format):
        return None
    folder = cache_folder("rows")
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    return Reuse(config, encoder, target) if existing.is_dir() and os.access(existing, os.W_OK) else None


def _remove_unused() -> None:
    """Deletes the tokens that no run used for so many days, and which run it was."""
    oldest = time.time() - DAYS_KEPT * 86400
    for path in (*cache_folder("rows").glob("*/*"), *cache_folder("last").glob("*")):
        with suppress(FileNotFoundError):  # another run may be about the same
            if path.stat().st_mtime < oldest:
                path.unlink()
    for folder in cache_folder("rows").glob("*"):
        with suppress(OSError):  # not empty
            folder.rmdir()


def _parts(config: DataPrepConfig, encoder: Encoder) -> Parts:
    tokenizer, prompt_format = encoder.tokenizer, encoder.prompt_format
    template = tokenizer.chat_template if isinstance(prompt_format, ChatTemplateFormat) else None
    day = date.today().isoformat() if template and "strftime_now" in template else None  # it renders the date
    facts: Mapping[str, Any] = {
        "base_model": [tokenizer.fingerprint, tokenizer.eos_token],
        "prompt_config": [type(encoder.prompt).__name__, kwargs_of(config.prompt_config)],
        "prompt_format_config": [type(prompt_format).__name__, kwargs_of(config.prompt_format_config), template, day],
        "chunksize": encoder.max_tokens,
        "on_too_long": encoder.on_too_long,
        "allow_special_tokens_in_data": encoder.allow_special_tokens_in_data,
        "train_on": encoder.train_on,
        "llm-train": _code(),
    }
    return {key: _hash(value) for key, value in facts.items()}


def _code() -> list[str]:
    """What stands in our files, and the versions of those who work on texts."""
    package = Path(llm.__file__).parent
    paths = sorted(path for pattern in _CODE for path in package.glob(pattern))
    return [*(path.read_text(encoding="utf-8") for path in paths), *map(importlib.metadata.version, _LIBRARIES)]


def _hash(value: Any) -> str:
    return hashlib.blake2b(json.dumps(value, default=repr).encode(), digest_size=16).hexdigest()


def _read_parts(path: Path) -> Parts:
    try:
        found: Parts = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found
