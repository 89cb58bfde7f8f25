"""The folder for what can be made again, only slower: kept tokenizers, tokenized rows. It may be deleted at any time.

`LLM_TRAIN_CACHE`, else `llm-train` in the cache of Hugging Face (`HF_HOME`), which people point at their large disk.
"""

import os
from collections.abc import Callable
from pathlib import Path


def cache_folder(name: str) -> Path:
    """The part of the cache that is called `name`; it may not be there yet."""
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface"
    return Path(os.environ.get("LLM_TRAIN_CACHE") or Path(home) / "llm-train").expanduser() / name


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """`write` makes a file at the path that it is given, which then moves to `path`: whole, or not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    staged = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        write(staged)
        with staged.open("rb") as file:
            os.fsync(file.fileno())
        staged.replace(path)
    finally:
        staged.unlink(missing_ok=True)
