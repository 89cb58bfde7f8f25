"""Where a prepared data set goes: staged beside the target and renamed, so that no half-written one is ever seen.

A local target is old-whole, absent or new-whole at every moment. On an object store, where nothing can be renamed, the
manifest is the commit: it is deleted first and written last.
"""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import fsspec

from llm.errors import ConfigError
from llm.training.config import MethodConfig
from llm.training.prep.manifest import manifest_path

_PATH_KEYS = ("dataset_path", "path_or_buf")
KEY = "dataset_writer_config"


@dataclass(frozen=True, kw_only=True)
class Target:
    """The place a writer was given: `path` (folder, file or URL) under the argument `path_key`."""

    path: str
    path_key: str

    @property
    def is_url(self) -> bool:
        """Whether it is on an object store or the like."""
        return "://" in self.path

    @property
    def files(self) -> list[Path]:
        """What belongs to a local data set: the folder, or the file and what lies beside it, manifest last."""
        main = Path(self.path)
        beside = [Path(self.ledger_path), Path(manifest_path(self.path))]
        return [main] if manifest_path(self.path).startswith(f"{self.path}/") else [main, *beside]

    @property
    def ledger_path(self) -> str:
        """Where the ledger of the data set goes."""
        return manifest_path(self.path).removesuffix("manifest.json") + "ledger.parquet"


def find_target(writer: MethodConfig) -> Target:
    """The target that a writer names; ConfigError when it names none."""
    for key in _PATH_KEYS:
        path = writer.kwargs.get(key)
        if isinstance(path, str) and path.rstrip("/"):
            return Target(path=path.rstrip("/"), path_key=key)
    wanted = "dataset_path" if writer.method == "save_to_disk" else "path_or_buf"
    raise ConfigError(f"{KEY}.kwargs.{wanted}: is missing: where should the blocks go?")


def check_target(target: Target, *, overwrite: bool) -> None:
    """ConfigError when something is already there and `overwrite` does not allow to replace it."""
    if target.is_url:
        exists = fsspec.core.url_to_fs(target.path)[0].exists(target.path)
    else:
        exists = any(path.exists() for path in target.files)
    if exists and not overwrite:
        raise ConfigError(
            f"{KEY}: `{target.path}` exists already. Choose another place, remove it, or set `overwrite: true`."
        )


@contextmanager
def staged(target: Target) -> Iterator[tuple[Path, Target]]:
    """A work folder, and the target to write to meanwhile; on leaving without an error it becomes the real one."""
    if target.is_url:
        manifest = manifest_path(target.path)
        file_system = fsspec.core.url_to_fs(manifest)[0]
        with tempfile.TemporaryDirectory(prefix="llm-train-") as folder:
            if file_system.exists(manifest):
                file_system.rm(manifest)
            yield Path(folder), target
        return
    path = Path(target.path)
    work = path.with_name(f".{path.name}.preparing")
    shutil.rmtree(work, ignore_errors=True)  # left by a run that was killed
    work.mkdir(parents=True)
    try:
        staging = Target(path=str(work / path.name), path_key=target.path_key)
        yield work, staging
        _replace(staging.files, target.files, work)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _replace(new: list[Path], old: list[Path], work: Path) -> None:
    """Moves `new` to where `old` are; the manifest, last of both, leaves first and arrives last."""
    for path in reversed(old):
        if path.exists():
            path.rename(work / f"old-{path.name}")
    for source, path in zip(new, old, strict=True):
        source.rename(path)
