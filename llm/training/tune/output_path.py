"""The copy of `local_output` at one output path: brought up to date, checked, and fetched back.

`INDEX` lists what we wrote, with sizes and hashes, and of which run: so a changed file of the same size is
seen, and nothing else is ever deleted. Of a whole folder the manifest arrives last and goes first.
"""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llm.training.tune.checkpoint_folder import CHECKPOINT, list_checkpoints, run_id_of
from llm.training.tune.output_store import OutputStore
from llm.training.tune.run_lock import LOCK
from llm.training.tune.whole_folder import (
    MANIFEST,
    UNCOUNTED,
    Damage,
    FileFact,
    fact_of,
    find_damage,
    list_files,
    parse_folder_manifest,
    read_folder_manifest,
    swap_folder,
)

logger = logging.getLogger(__name__)
INDEX = ".llm-train-index.json"
FINAL_OUTPUT = "final_output"
Check = Callable[[str, dict[str, Any]], None]
READ_BACK_BYTES = 64 * 2**20  # larger files are verified by size: reading them back costs as much as writing


@dataclass(frozen=True, kw_only=True)
class Part:
    """What is copied as one: a whole folder, or (with an empty `name`) the run's other files.

    Names of files are relative to `local_output`: `checkpoint-10/optimizer.pt`. `run_id`: of a checkpoint, the
    run that wrote it.
    """

    name: str
    files: dict[str, FileFact]
    run_id: str | None = None

    @property
    def marker(self) -> str | None:
        """The file that arrives last."""
        return f"{self.name}/{MANIFEST}" if self.name else None


def plan_parts(local_output: str) -> list[Part]:
    """The parts of `local_output` as it is now: checkpoints (newest first), `final_output`, other files.

    Left out: folders that are not whole, links, `training_args.bin`, and what we keep aside or have not
    finished.
    """
    folders = [os.path.basename(path) for _, path in list_checkpoints(local_output)] + [FINAL_OUTPUT]
    parts = [part for name in folders if (part := _whole_part(local_output, name))]
    others = [name for name in list_files(local_output) if _is_run_file(name)]
    return [*parts, Part(name="", files={name: fact_of(Path(local_output, name)) for name in others})]


def _whole_part(local_output: str, name: str) -> Part | None:
    folder = os.path.join(local_output, name)
    if os.path.islink(folder) or find_damage(folder, check_hashes=False):
        return None
    manifest = read_folder_manifest(folder)
    files = {f"{name}/{file}": fact for file, fact in manifest["files"].items()}
    linked = [file for file in files if Path(local_output, file).is_symlink()]
    if linked:
        logger.warning("%s is not copied: %s is a link", folder, linked[0])
        return None
    files[f"{name}/{MANIFEST}"] = fact_of(Path(folder, MANIFEST))
    return Part(name=name, files=files, run_id=run_id_of(manifest) if CHECKPOINT.fullmatch(name) else None)


def _is_run_file(name: str) -> bool:
    top, base = name.split("/")[0], os.path.basename(name)
    is_in_part = top.startswith(("checkpoint-", ".checkpoint-", FINAL_OUTPUT, f".{FINAL_OUTPUT}")) and top != name
    return not is_in_part and base not in (INDEX, LOCK) and base not in UNCOUNTED and not base.endswith(".tmp")


class OutputPath:
    """One copy of `local_output`. Errors of the file system pass through once `store` has given up."""

    def __init__(self, store: OutputStore) -> None:
        self.store = store

    def copy(self, local_output: str, parts: list[Part], *, on_part: Callable[[str], None]) -> list[str]:
        """Brings the copy up to `parts`, gives the files written; `on_part` is told each part before it is read.

        Then the checkpoints that we wrote and that are older than ours and gone locally are deleted.
        """
        index = self._read_index()
        self._disown_other_run(parts, index)
        written: list[str] = []
        for part in parts:
            on_part(part.name)
            try:
                written += self._copy_part(local_output, part, index)
            except Damage as damage:  # rotated away meanwhile, or damaged: never a reason to stop the others
                logger.warning("%s is not copied: %s", part.name or "a run file", damage)
        steps = [int(match[1]) for part in parts if (match := CHECKPOINT.fullmatch(part.name))]
        if steps:
            self._delete_rotated(steps, index)
        return written

    def find_missing(self, parts: list[Part]) -> dict[str, str]:
        """File -> why it does not count: absent, another size or (up to `READ_BACK_BYTES`) other content."""
        missing: dict[str, str] = {}
        files = self._read_index()["files"]
        for part in parts:
            sizes = self._sizes(part)
            found = {name: self._why_wrong(name, fact, sizes, files) for name, fact in part.files.items()}
            missing |= {name: reason for name, reason in found.items() if reason}
        return missing

    def forget(self, names: list[str]) -> None:
        """Makes the next copy write `names` again, whatever the index says."""
        index = self._read_index()
        index["files"] |= dict.fromkeys(names)
        self._write_index(index)

    def list_steps(self) -> list[int]:
        """Steps of the checkpoints here, newest first, whole or not; none ahead of the last run's newest."""
        newest = self._read_index()["newest"]
        matches = [CHECKPOINT.fullmatch(name) for name in self.store.list_folders()]
        steps = [int(match[1]) for match in matches if match]
        return sorted((step for step in steps if newest is None or step <= newest), reverse=True)

    def run_id(self) -> str | None:
        """The run whose copy this is; None when there is none, or it does not say."""
        run_id: str | None = self._read_index()["run"]
        return run_id

    def newer_step(self, parts: list[Part]) -> int | None:
        """The step of the newest checkpoint here, when it is of the run of `parts` and newer than theirs."""
        index, newest = self._read_index(), next((part for part in parts if part.run_id), None)
        if newest is None or index["newest"] is None or index["run"] != newest.run_id:
            return None
        here: int = index["newest"]
        return here if here > int(newest.name.removeprefix("checkpoint-")) else None

    def fetch(self, step: int, local_output: str, check: Check) -> str | None:
        """The path of `checkpoint-<step>`, copied into `local_output`; None when it is not whole, or not of the run
        whose copy this is. `check` is given its URL and manifest first."""
        name = f"checkpoint-{step}"
        aside = Path(local_output, f".{name}.tmp")
        shutil.rmtree(aside, ignore_errors=True)
        try:
            manifest = parse_folder_manifest(self.store.read(f"{name}/{MANIFEST}"))
            if self._read_index()["run"] not in (None, run_id_of(manifest)):
                raise Damage("another run wrote it")
            check(f"{self.store.url}/{name}", manifest)
            for file in [*manifest["files"], MANIFEST]:
                self.store.get(f"{name}/{file}", aside / file)
            damage = find_damage(str(aside))
        except (FileNotFoundError, Damage) as error:
            damage = str(error)
        if damage:
            logger.warning("%s/%s is not whole (%s): skipped", self.store.url, name, damage)
            shutil.rmtree(aside, ignore_errors=True)
            return None
        swap_folder(str(aside), os.path.join(local_output, name))
        return os.path.join(local_output, name)

    def _copy_part(self, local_output: str, part: Part, index: dict[str, Any]) -> list[str]:
        files, sizes = index["files"], self._sizes(part)
        todo = [n for n, fact in part.files.items() if files.get(n) != asdict(fact) or sizes.get(n) != fact.size]
        stale = [n for n in files if part.marker and n.startswith(f"{part.name}/") and n not in part.files]
        if not todo and not stale:
            return []
        files |= dict.fromkeys(todo)  # the claim comes first: what a kill leaves is ours to replace or delete
        self._write_index(index)
        if part.name == FINAL_OUTPUT and self.store.is_local and set(sizes) <= set(files):
            self._replace_whole(local_output, part)
        else:
            self._replace_files(local_output, part, todo, stale)
        for name in stale:
            del files[name]
        files |= {name: asdict(part.files[name]) for name in part.files}
        self._write_index(index)
        return todo

    def _replace_whole(self, local_output: str, part: Part) -> None:
        aside = f".{part.name}.tmp"
        shutil.rmtree(self.store.path(aside), ignore_errors=True)
        for name, fact in part.files.items():
            self._put(local_output, name, fact, target=name.replace(part.name, aside, 1))
        self.store.swap_in(aside, part.name)

    def _replace_files(self, local_output: str, part: Part, todo: list[str], stale: list[str]) -> None:
        if part.marker:
            self.store.delete(part.marker)
        for name in todo:
            if name != part.marker:
                self._put(local_output, name, part.files[name])
        for name in stale:
            self.store.delete(name)
        if part.marker:
            self._put(local_output, part.marker, part.files[part.marker])

    def _put(self, local_output: str, name: str, fact: FileFact, target: str | None = None) -> None:
        source = Path(local_output, name)
        try:
            if "/" in name and not _is_run_file(name) and fact_of(source) != fact:
                raise Damage(f"{name} has other content than its manifest says")
            self.store.put(source, target or name)
        except FileNotFoundError as error:
            if source.exists():  # then it is the output path that is gone
                raise
            raise Damage(f"{name} is gone") from error

    def _disown_other_run(self, parts: list[Part], index: dict[str, Any]) -> None:
        """Makes this the copy of the run of `parts`; checkpoints that another run copied here are no longer ours."""
        run_id = next((part.run_id for part in parts if part.run_id), None)
        if run_id in (None, index["run"]):
            return
        if index["run"] is not None:
            others = {name.split("/")[0] for name in index["files"] if CHECKPOINT.fullmatch(name.split("/")[0])}
            listed = ", ".join(sorted(others)) or "no checkpoint"
            logger.warning(
                "%s held the copy of another run: its %s stay there, unless overwritten", self.store.url, listed
            )
            index["files"] = {n: fact for n, fact in index["files"].items() if n.split("/")[0] not in others}
            index["newest"] = None
        index["run"] = run_id
        self._write_index(index)

    def _delete_rotated(self, steps: list[int], index: dict[str, Any]) -> None:
        newest, files = max(steps), index["files"]
        owned = {name: CHECKPOINT.fullmatch(name.split("/")[0]) for name in files}
        owned_steps = {name: int(match[1]) for name, match in owned.items() if match}
        gone = [name for name, step in owned_steps.items() if step < newest and step not in steps]
        for name in sorted(gone, key=lambda name: not name.endswith(f"/{MANIFEST}")):  # the manifests first
            self.store.delete(name)
            del files[name]
        if gone or index["newest"] != newest:
            index["newest"] = newest
            self._write_index(index)

    def _why_wrong(self, name: str, fact: FileFact, sizes: dict[str, int], files: dict[str, Any]) -> str | None:
        if name not in sizes:
            return "absent"
        if sizes[name] != fact.size:
            return f"{sizes[name]} bytes instead of {fact.size}"
        if files.get(name) != asdict(fact):
            return "an older copy"
        is_other = fact.size <= READ_BACK_BYTES and hashlib.sha256(self.store.read(name)).hexdigest() != fact.sha256
        return "other content" if is_other else None

    def _sizes(self, part: Part) -> dict[str, int]:
        if part.name:
            return self.store.sizes_in(part.name)
        found = {name: self.store.size_of(name) for name in part.files}
        return {name: size for name, size in found.items() if size is not None}

    def _read_index(self) -> dict[str, Any]:
        try:
            index = json.loads(self.store.read(INDEX))
            return {"run": index.get("run"), "newest": index["newest"], "files": dict(index["files"])}
        except FileNotFoundError:
            return {"run": None, "newest": None, "files": {}}
        except (ValueError, KeyError, TypeError) as error:
            logger.warning("%s/%s cannot be read (%s): all is copied again", self.store.url, INDEX, error)
            return {"run": None, "newest": None, "files": {}}

    def _write_index(self, index: dict[str, Any]) -> None:
        self.store.write(INDEX, json.dumps({"format_version": 1, **index}, indent=1, ensure_ascii=False).encode())
