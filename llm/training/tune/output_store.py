"""The files of one output path, any fsspec URL: reading and writing them, with retries.

Names are relative to the path: `checkpoint-10/optimizer.pt`. A file on a local file system is written aside
and renamed; object stores put an object as a whole by themselves.
"""

import logging
import os
import random
import shutil
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar
from urllib.parse import urlsplit

import fsspec
from fsspec.implementations.local import LocalFileSystem

from llm.errors import CheckpointError, ConfigError, MissingExtraError
from llm.training.tune.whole_folder import free_name, fsync, swap_folder

logger = logging.getLogger(__name__)
LONGEST_WAIT_SECONDS = 30.0
_Result = TypeVar("_Result")


class OutputStore:
    """Files under `url`. The file system's own errors pass through after `attempts` tries.

    ConfigError when the URL cannot be used, MissingExtraError when its package is absent.
    """

    def __init__(self, url: str, *, attempts: int = 5, backoff_seconds: float = 1.0) -> None:
        self.url = url
        self.attempts = attempts
        self.backoff_seconds = backoff_seconds
        # Its own generator: the global one belongs to training, which must not depend on a bad network.
        self._jitter = random.Random()
        if urlsplit(url).password:
            raise ConfigError(
                f"`additional_output_paths` holds a URL with a password (host {urlsplit(url).hostname}): it "
                "would get into logs and run records. Use the credential chain of the file system instead."
            )
        try:
            self.fs, root = fsspec.core.url_to_fs(url)
        except ImportError as error:
            raise MissingExtraError(
                f"`{url}` needs a package that is not installed ({error}). For s3: `pip install 'llm-train[s3]'`."
            ) from error
        except ValueError as error:
            raise ConfigError(f"`additional_output_paths`: `{url}` cannot be used ({error}).") from error
        self.root = str(root).rstrip("/")
        self.is_local = isinstance(self.fs, LocalFileSystem)

    def probe(self) -> None:
        """Writes, reads and deletes a small file; CheckpointError when one of these fails."""
        name, content = f".llm-train-probe-{uuid.uuid4().hex}", b"llm-train"
        step = "written"
        try:
            self.write(name, content)
            step = "read"
            if self.read(name) != content:
                raise OSError("other bytes came back")
            step = "deleted"
            self.retry(lambda: self.fs.rm_file(self.path(name)))
        except Exception as error:  # each file system has its own error classes
            raise CheckpointError(
                f"`additional_output_paths`: a file in `{self.url}` cannot be {step} "
                f"({type(error).__name__}: {error}). Check that the place exists and that the credentials "
                "allow to write, read and delete there, or take the path out of the list."
            ) from error

    def put(self, source: Path, name: str) -> None:
        """Copies the local file `source` to `name`."""
        if self.is_local:
            self.retry(lambda: _replace(Path(self.path(name)), lambda aside: shutil.copyfile(source, aside)))
        else:
            self.retry(lambda: self.fs.put_file(str(source), self.path(name)))

    def write(self, name: str, content: bytes) -> None:
        """Makes the file `name`."""
        if self.is_local:
            self.retry(lambda: _replace(Path(self.path(name)), lambda aside: aside.write_bytes(content)))
        else:
            self.retry(lambda: self.fs.pipe_file(self.path(name), content))

    def read(self, name: str) -> bytes:
        """The content of `name`; FileNotFoundError when there is none."""
        return bytes(self.retry(lambda: self.fs.cat_file(self.path(name))))

    def get(self, name: str, target: Path) -> None:
        """Copies the file `name` to the local `target`."""
        target.parent.mkdir(parents=True, exist_ok=True)
        self.retry(lambda: self.fs.get_file(self.path(name), str(target)))

    def delete(self, name: str) -> None:
        """Deletes the file `name`, if it is there, and the local folders that it leaves empty."""
        try:
            self.retry(lambda: self.fs.rm_file(self.path(name)))
        except FileNotFoundError:
            return
        parent = Path(self.path(name)).parent
        while self.is_local and parent != Path(self.root) and not os.listdir(parent):
            parent.rmdir()
            parent = parent.parent

    def list_folders(self) -> list[str]:
        """Names at the top of the path."""
        self.fs.invalidate_cache()
        try:
            entries: list[str] = self.retry(lambda: self.fs.ls(self.root, detail=False))
        except FileNotFoundError:
            return []
        return [entry.rstrip("/").rsplit("/", 1)[-1] for entry in entries]

    def sizes_in(self, folder: str) -> dict[str, int]:
        """Name -> size in bytes of every file in `folder`, which may be absent."""
        self.fs.invalidate_cache()
        try:
            entries = self.retry(lambda: self.fs.find(self.path(folder), detail=True))
        except FileNotFoundError:
            return {}
        return {path[len(self.root) + 1 :]: int(entry["size"]) for path, entry in entries.items()}

    def size_of(self, name: str) -> int | None:
        """Size in bytes of the file `name`; None when it is absent."""
        self.fs.invalidate_cache()
        try:
            return int(self.retry(lambda: self.fs.info(self.path(name)))["size"])
        except FileNotFoundError:
            return None

    def swap_in(self, aside: str, name: str) -> None:
        """Puts the folder `aside` where `name` is; for local file systems, since only they rename folders."""
        swap_folder(self.path(aside), self.path(name))

    def path(self, name: str) -> str:
        """`name` as the file system wants it."""
        return f"{self.root}/{name}"

    def retry(self, action: Callable[[], _Result]) -> _Result:
        """The result of `action`, tried again with growing waits; its last error when none succeeds."""
        for attempt in range(1, self.attempts):
            try:
                return action()
            except (FileNotFoundError, PermissionError):
                raise  # waiting does not mend these
            except Exception as error:  # each file system has its own error classes
                logger.debug("%s: try %d failed (%s)", self.url, attempt, error)
                wait_seconds = min(LONGEST_WAIT_SECONDS, self.backoff_seconds * 2 ** (attempt - 1))
                time.sleep(wait_seconds * self._jitter.uniform(0.5, 1.5))
        return action()


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(free_name(str(path.with_name(f".{path.name}.tmp"))))
    try:
        write(aside)
        fsync(aside)
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
    fsync(path.parent)
