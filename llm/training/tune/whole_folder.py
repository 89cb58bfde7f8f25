"""Folders that are whole or do not count: a manifest of sizes and hashes, written last.

Checkpoints (`checkpoints.py`), `final_output` (`export.py`) and their copies (`output_path.py`) are such
folders. `training_args.bin` is left out of all of it: nothing loads it, and it may hold tokens in clear.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

MANIFEST = "manifest.json"
FORMAT_VERSION = 1
UNCOUNTED = frozenset({MANIFEST, "training_args.bin"})


@dataclass(frozen=True, kw_only=True)
class FileFact:
    """The content of one file: its size in bytes and its SHA-256 in hex."""

    size: int
    sha256: str


class Damage(Exception):
    """A folder is not whole; the text says which file and why."""


def fact_of(path: str | Path) -> FileFact:
    """Size and hash of the file at `path`, from one reading."""
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return FileFact(size=file.tell(), sha256=digest)


def list_files(folder: str | Path) -> Iterator[str]:
    """Relative names (`a/b.bin`) of the regular files in `folder`; links are left out and not followed."""
    for parent, _, names in os.walk(folder):
        for name in names:
            path = Path(parent, name)
            if path.is_file() and not path.is_symlink():
                yield path.relative_to(folder).as_posix()


def write_folder_manifest(folder: str, **facts: Any) -> None:
    """Makes `folder` whole: every file hashed and on the disk, then the manifest with `facts`, by rename."""
    names = sorted(name for name in list_files(folder) if name not in UNCOUNTED)
    with ThreadPoolExecutor() as pool:  # hashlib releases the lock: as fast as the cores are
        files = list(pool.map(lambda name: fact_of(Path(folder, name)), names))
    for path in {Path(folder, name) for name in names} | {Path(folder, name).parent for name in names}:
        fsync(path)
    content = {
        "format_version": FORMAT_VERSION,
        **facts,
        "files": {name: asdict(fact) for name, fact in zip(names, files, strict=True)},
    }
    write_durably(Path(folder, MANIFEST), json.dumps(content, indent=1, ensure_ascii=False))


def read_folder_manifest(folder: str) -> dict[str, Any]:
    """The manifest of `folder`, its `files` as `FileFact`s; Damage when absent, unreadable or unsafe."""
    path = Path(folder, MANIFEST)
    try:
        return parse_folder_manifest(path.read_bytes())
    except FileNotFoundError as error:
        raise Damage(f"no {MANIFEST}: it was not finished") from error


def parse_folder_manifest(content: bytes) -> dict[str, Any]:
    """As `read_folder_manifest`, from the content of the file."""
    try:
        manifest: dict[str, Any] = json.loads(content)
        if manifest["format_version"] != FORMAT_VERSION:
            raise Damage(f"{MANIFEST} has format version {manifest['format_version']}, not {FORMAT_VERSION}")
        manifest["files"] = {name: FileFact(**fact) for name, fact in manifest["files"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Damage(f"{MANIFEST} cannot be read ({error})") from error
    # A manifest may come from an output path that others can write: it must not lead out of its folder.
    unsafe = [n for n in manifest["files"] if PurePosixPath(n).is_absolute() or ".." in PurePosixPath(n).parts]
    if unsafe:
        raise Damage(f"{MANIFEST} names a file outside of its folder: {unsafe[0]}")
    return manifest


def find_damage(folder: str, *, check_hashes: bool = True) -> str | None:
    """Why `folder` is not whole, or None when it is; without `check_hashes` only sizes are compared."""
    try:
        files: dict[str, FileFact] = read_folder_manifest(folder)["files"]
    except Damage as damage:
        return str(damage)
    for name, expected in files.items():
        path = Path(folder, name)
        if not path.is_file():
            return f"{name} is missing"
        size = path.stat().st_size
        if size != expected.size:
            return f"{name} has {size} bytes, the manifest says {expected.size}"
        if check_hashes and fact_of(path) != expected:
            return f"{name} has other content than the manifest says"
    return None


def remove_whole_folder(folder: str) -> None:
    """Deletes what the manifest of `folder` lists, the manifest last; files of others stay, under a new name.

    The rename comes first: a kill in between leaves a name that no one takes for a checkpoint.
    """
    aside = free_name(f"{folder}.rotated") if not folder.endswith(".rotated") else folder
    os.replace(folder, aside)
    for name in [*read_folder_manifest(aside)["files"], "training_args.bin", MANIFEST]:
        Path(aside, name).unlink(missing_ok=True)
    for parent, _, _ in os.walk(aside, topdown=False):
        if not os.listdir(parent):
            os.rmdir(parent)


def swap_folder(new: str, target: str) -> None:
    """Puts the finished folder `new` where `target` is: at any moment there is the old one, none, or it."""
    for name in list_files(new):
        fsync(Path(new, name))
    for parent, _, _ in os.walk(new):
        fsync(Path(parent))
    old = free_name(os.path.join(os.path.dirname(target), f".{os.path.basename(target)}.old"))
    if os.path.isdir(target):
        os.rename(target, old)
    os.rename(new, target)
    fsync(Path(target).parent)
    shutil.rmtree(old, ignore_errors=True)


def write_durably(path: Path, text: str) -> None:
    """Writes a small file so that, whatever happens, `path` holds the old or the new text."""
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    fsync(path.parent)


def fsync(path: Path) -> None:
    """Waits until the file or folder at `path` is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def free_name(path: str) -> str:
    """`path`, or `path-2`, `path-3`, ... when that is taken."""
    number, free = 1, path
    while os.path.lexists(free):
        number += 1
        free = f"{path}-{number}"
    return free
