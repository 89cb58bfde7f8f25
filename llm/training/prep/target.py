"""Where a prepared data set goes: staged first and moved there whole, so that no half-written one is ever seen.

A local target is old-whole, absent or new-whole at every moment. An object store cannot rename, so there the manifest
is the commit: it leaves before the first upload and arrives last; the object `preparing` marks what is not whole.
"""

import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec

from llm.errors import ConfigError, DataError, MissingExtraError
from llm.training.config import DataPrepConfig, MethodConfig
from llm.training.prep.dataset import dataset_location
from llm.training.prep.manifest import manifest_path

KEY = "dataset_writer_config"
_PATH_KEYS = {
    "save_to_disk": "dataset_path",
    "to_parquet": "path_or_buf",
    "to_json": "path_or_buf",
    "to_csv": "path_or_buf",
}
_SUFFIXES = {
    "save_to_disk": ("",),
    "to_parquet": (".parquet",),
    "to_json": (".jsonl", ".json"),
    "to_csv": (".csv",),
}


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
    def is_folder(self) -> bool:
        """Whether the data set is a folder, with ledger, report and the rest in it; else they lie beside the file."""
        return self.manifest_path.startswith(f"{self.path}/")

    @property
    def manifest_path(self) -> str:
        """Where the manifest goes."""
        return manifest_path(self.path)

    @property
    def ledger_path(self) -> str:
        """Where the ledger goes."""
        return self._beside("ledger.parquet")

    @property
    def config_path(self) -> str:
        """Where the resolved config goes."""
        return self._beside("dataprep.yaml")

    @property
    def report_path(self) -> str:
        """Where the report's facts go (JSON)."""
        return self._beside("report.json")

    @property
    def report_page_path(self) -> str:
        """Where the report goes that is read in a browser."""
        return self._beside("report.html")

    @property
    def marker_path(self) -> str:
        """On an object store: there while a run writes, so that the next one knows what a killed run left."""
        return self._beside("preparing")

    @property
    def parts(self) -> list[Path]:
        """What is moved for a local data set: the folder, or the file and what lies beside it, manifest last."""
        main = Path(self.path)
        beside = (self.ledger_path, self.config_path, self.report_path, self.report_page_path, self.manifest_path)
        return [main] if self.is_folder else [main, *map(Path, beside)]

    @property
    def work(self) -> Path:
        """The folder beside a local target in which it is prepared."""
        return Path(self.path).parent / f".{Path(self.path).name}.preparing"

    @property
    def exists(self) -> bool:
        """Whether a whole data set is there."""
        if self.is_url:
            return bool(_store(self).exists(self.manifest_path))
        return Path(self.manifest_path).exists()

    @property
    def has_leftover(self) -> bool:
        """Whether a run that wrote it was killed (or goes on still)."""
        return bool(_store(self).exists(self.marker_path)) if self.is_url else self.work.exists()

    def _beside(self, name: str) -> str:
        return self.manifest_path.removesuffix("manifest.json") + name

    @property
    def held_out(self) -> "Target":
        """Where rows held out for evaluation go: `train` -> `train_eval`, `train.parquet` -> `train_eval.parquet`."""
        folder, slash, name = self.path.rpartition("/")
        stem, ending = (name, "") if self.is_folder else (Path(name).stem, Path(name).suffix)
        return Target(path=f"{folder}{slash}{stem}_eval{ending}", path_key=self.path_key)

    def staged_in(self, folder: Path) -> "Target":
        """The same data set inside `folder`."""
        return Target(path=str(folder / self.path.rsplit("/", 1)[-1]), path_key=self.path_key)


def open_targets(config: DataPrepConfig) -> list[Target]:
    """The target that `config` names, and that of the rows it holds out, if any; see `open_target`."""
    target = open_target(_named_target(config.dataset_writer_config), config)
    if not config.has_eval_split:
        return [target]
    # The held-out rows arrive first: without the others they are what a killed run left.
    is_leftover = not target.exists and target.has_leftover
    try:
        held_out = open_target(
            target.held_out, config.model_copy(update={"overwrite": True}) if is_leftover else config
        )
    except ConfigError as error:
        raise ConfigError(f"{error} It is where the rows go that `eval_fraction` or `eval_rows` holds out.") from error
    return [target, held_out]


def open_target(target: Target, config: DataPrepConfig) -> Target:
    """`target`, put back first if a killed run left it half moved.

    Raises ConfigError when it is the source, is there already or cannot be written.
    """
    locations = [dataset_location(source.source_config) for source in config.named_sources.values()]
    sources = {os.path.abspath(os.path.expanduser(location)) for location in locations if location}
    if os.path.abspath(target.path) in sources:
        raise ConfigError(f"{KEY}: `{target.path}` is the source itself. Write to another place.")
    if target.is_url:
        _check_url(target, config.overwrite)
    else:
        _put_back(target)
        _check_path(target, config.overwrite)
    return target


@contextmanager
def all_staged(targets: Sequence[Target]) -> Iterator[list[tuple[Path, Target]]]:
    """`staged` of each: on leaving without an error the last is moved first, and the others only after it.

    So training rows never lie beside held-out rows that are older than they.
    """
    with ExitStack() as stack:
        yield [stack.enter_context(staged(target)) for target in targets]


@contextmanager
def staged(target: Target) -> Iterator[tuple[Path, Target]]:
    """A work folder, and a local target in it to write to; on leaving without an error that becomes `target`."""
    try:
        with _work_folder(target) as work:
            staging = target.staged_in(work)
            with _marked(target):
                yield work, staging
                if not staging.parts[0].exists():
                    raise DataError(f"{KEY}: the method wrote nothing to its `{target.path_key}`.")
            if target.is_url:
                _upload(staging, target)
            else:
                _replace(staging, target)
    except OSError as error:  # a full disk, a lost connection, a folder that nobody may write to
        raise DataError(f"{KEY}: cannot prepare `{target.path}`: {error}") from error


def _store(target: Target) -> Any:
    return fsspec.core.url_to_fs(target.path)[0]


def _named_target(writer: MethodConfig) -> Target:
    wanted = _PATH_KEYS.get(writer.method)
    for key in [wanted] if wanted else ["dataset_path", "path_or_buf"]:
        path = writer.kwargs.get(key)
        if isinstance(path, str) and path.strip("/"):
            _check_suffix(writer.method, path)
            path = path.removeprefix("file://").rstrip("/")
            return Target(path=path if "://" in path else os.path.expanduser(path), path_key=key)
    raise ConfigError(
        f"{KEY}.kwargs.{wanted or 'dataset_path'}: missing, or not a path. Say where the blocks go, e.g. "
        f"`{wanted or 'dataset_path'}: output/train{_SUFFIXES.get(writer.method, ('',))[0]}`."
    )


def _check_suffix(method: str, path: str) -> None:
    """What reads the data set goes by its ending; a folder has none of a file's."""
    suffix = Path(path.rstrip("/")).suffix
    known = {suffix for suffixes in _SUFFIXES.values() for suffix in suffixes}
    allowed = _SUFFIXES.get(method, (suffix,))
    if suffix not in allowed and not (allowed == ("",) and suffix not in known):
        ending = " or ".join(f"`{suffix}`" for suffix in allowed if suffix)
        wanted = f"a file that ends in {ending}" if ending else "a folder, which does not end as a file"
        raise ConfigError(f"{KEY}: `{method}` writes {wanted}; `{path}` is given.")


def _check_path(target: Target, overwrite: bool) -> None:
    path = Path(target.path)
    parent = next(parent for parent in path.absolute().parents if parent.exists())
    if not path.name.strip(".") or not parent.is_dir() or not os.access(parent, os.W_OK):
        raise ConfigError(f"{KEY}: cannot make `{target.path}`: `{parent}` is not a folder that you may write to.")
    if path.is_dir() and not any(path.iterdir()):
        return
    if any(part.exists() for part in target.parts):
        _check_overwrite(target, overwrite)
    is_ours = any((path / name).exists() for name in ("manifest.json", "state.json"))
    if path.is_dir() and not (target.is_folder and is_ours):
        raise ConfigError(
            f"{KEY}: `{target.path}` is a folder that holds something else than a data set, and `overwrite` would "
            f"delete it. Name a folder of its own, e.g. `{target.path}/prepared`."
        )


def _check_overwrite(target: Target, overwrite: bool) -> None:
    if not overwrite:
        raise ConfigError(
            f"{KEY}: `{target.path}` exists already. Choose another place, remove it, or set `overwrite: true`."
        )


def _check_url(target: Target, overwrite: bool) -> None:
    try:
        store = _store(target)
        store.invalidate_cache()
        is_whole, is_leftover = store.exists(target.manifest_path), store.exists(target.marker_path)
        exists = is_whole or (store.exists(target.path) and not is_leftover)
    except ImportError as error:
        raise MissingExtraError(
            f"{KEY}: `{target.path}` needs a library: {error}. pip install 'llm-train[s3]'"
        ) from error
    except Exception as error:  # the client libraries' classes for no credentials, no connection, no such scheme
        raise ConfigError(f"{KEY}: cannot reach `{target.path}`: {error}") from error
    if exists:
        _check_overwrite(target, overwrite)


@contextmanager
def _work_folder(target: Target) -> Iterator[Path]:
    """Beside a local target, so that nothing needs to be copied; else where temporary files go."""
    if target.is_url:
        with tempfile.TemporaryDirectory(prefix="llm-train-") as folder:
            yield Path(folder)
        return
    _remove_work_folder(target)  # left by a run that was killed
    target.work.mkdir(parents=True)
    try:
        yield target.work
    finally:
        _remove_work_folder(target)


def _remove_work_folder(target: Target) -> None:
    """The manifest first: without it `_put_back` leaves all as it is, also when a kill comes in between."""
    Path(target.staged_in(target.work).manifest_path).unlink(missing_ok=True)
    shutil.rmtree(target.work, ignore_errors=True)


@contextmanager
def _marked(target: Target) -> Iterator[None]:
    """The marker of an object store: set now, to find at once what cannot be written; `_upload` takes it away."""
    if not target.is_url:
        yield
        return
    store = _store(target)
    is_leftover = store.exists(target.marker_path)
    store.pipe_file(target.marker_path, b"")
    try:
        yield
    except BaseException:  # Ctrl-C, too: a run that failed leaves no marker of its own
        if not is_leftover:
            store.rm_file(target.marker_path)
        raise


def _upload(staging: Target, target: Target) -> None:
    """Every file to `target`, manifest last; the old manifest leaves first, shards that are no longer used go too."""
    store = _store(target)
    files = [path for part in staging.parts for path in sorted([part, *part.rglob("*")]) if path.is_file()]
    files.sort(key=lambda path: path == Path(staging.manifest_path))
    names = [str(path).removeprefix(staging.path) for path in files]
    if store.exists(target.manifest_path):
        store.rm_file(target.manifest_path)
    for shard in store.glob(f"{target.path}/data-*.arrow") if target.is_folder else []:
        if f"/{shard.rsplit('/', 1)[-1]}" not in names:
            store.rm_file(shard)
    for path, name in zip(files, names, strict=True):
        store.put_file(str(path), target.path + name)
    store.rm_file(target.marker_path)


def _replace(staging: Target, target: Target) -> None:
    """Moves the new parts to where the old are; the manifest, last of both, leaves first and arrives last."""
    try:
        for part in reversed(target.parts):
            if part.exists():
                part.rename(_aside(target, part))
        for new, part in zip(staging.parts, target.parts, strict=True):
            new.rename(part)
    except BaseException:  # Ctrl-C, too: the old parts lie in the work folder, which is removed next
        _put_back(target)
        raise


def _put_back(target: Target) -> None:
    """Undoes a `_replace` that did not come to its end: the old parts return, new ones that have arrived go."""
    staging = target.staged_in(target.work)
    if not staging.parts[-1].exists():  # the last of the new ones has arrived, or was not yet made
        return
    for new, part in zip(staging.parts, target.parts, strict=True):
        if _aside(target, part).exists():
            _aside(target, part).rename(part)
        elif part.exists() and not new.exists():
            part.unlink()


def _aside(target: Target, part: Path) -> Path:
    return target.work / f"old-{part.name}"
