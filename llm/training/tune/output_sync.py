"""Copies of `local_output` at every output path, kept up in the background: stage 8 of the road.

Takes whole checkpoints, `final_output` and the run's other files; a copy that cannot be made never stops
training, is tried again at the next checkpoint, and is the end's error if it is still not complete.
"""

import logging
import os
import threading
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from llm.errors import CheckpointError, ConfigError, LlmTrainError
from llm.training.config import FinetuneConfig
from llm.training.tune.checkpoint_folder import newest_whole_checkpoint, run_id_of
from llm.training.tune.output_path import Check, OutputPath, Part, plan_parts
from llm.training.tune.output_store import OutputStore
from llm.training.tune.run_lock import only_writer
from llm.training.tune.whole_folder import read_folder_manifest

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class CopyReport:
    """What became of the last copy at `url`: what was written, or what is missing."""

    url: str
    text: str
    is_whole: bool


class OutputSync:
    """The copies of `local_output` at `output_paths`, fsspec URLs or folders; ranks other than 0 give none.

    `probe()` before the weights load, `restore()` before resuming, `sync()` after each checkpoint, `close()`
    at the end. In a `with` block the end closes; after an error what was asked for is still copied, and the
    error stays. ConfigError when a path is `local_output`, inside or above it, or another path;
    MissingExtraError when a file system's package is absent.
    """

    def __init__(
        self, local_output: str, output_paths: list[str], *, attempts: int = 5, backoff_seconds: float = 1.0
    ) -> None:
        self.local_output = local_output
        stores = [OutputStore(url, attempts=attempts, backoff_seconds=backoff_seconds) for url in output_paths]
        _refuse_overlap(local_output, stores)
        self.failures = 0
        self._paths = [OutputPath(store) for store in stores]
        self._uploading: str | None = None
        self._wanted = threading.Event()
        self._is_closing = False
        self._thread: threading.Thread | None = None

    def __enter__(self) -> "OutputSync":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
        elif self._thread and isinstance(error, Exception):  # a second Ctrl-C stops at once
            self.close_and_tell()

    @property
    def uploading(self) -> str | None:
        """The folder that is being read just now: rotation leaves it alone."""
        return self._uploading

    def probe(self) -> None:
        """Writes, reads and deletes a small file at each path; CheckpointError says where it fails and why."""
        for path in self._paths:
            path.store.probe()

    def restore(self, check: Check = lambda path, manifest: None) -> str | None:
        """The newest whole checkpoint of `local_output` and the output paths, fetched and verified; None for none.

        Where `local_output` has one, a path counts only with newer ones of the same run, and may be down. Else
        CheckpointError when a path cannot be read: a run must not start anew only because a network is down.
        `check` may refuse a checkpoint by an error, before it is fetched.
        """
        local = newest_whole_checkpoint(self.local_output)
        if local:
            check(local, read_folder_manifest(local))
        found = [(step, path) for path in self._paths for step in self._list_steps(path, local)]
        for step, path in sorted(found, key=lambda entry: -entry[0]):
            try:
                fetched = path.fetch(step, self.local_output, check)
            except LlmTrainError:
                raise
            except Exception as error:  # each file system has its own error classes
                if local is None:
                    raise _cannot_read(path, error) from error
                logger.warning("%s cannot be read (%s): going on from %s", path.store.url, error, local)
                continue
            if fetched:
                logger.warning("Resuming from a copy: %s was fetched from %s", fetched, path.store.url)
                return fetched
        return local

    def _list_steps(self, path: OutputPath, local: str | None) -> list[int]:
        """Steps at `path` to go on from; beside a `local` checkpoint newer ones of its run, not set aside here."""
        try:
            steps = path.list_steps()
            if local is None:
                return steps
            manifest = read_folder_manifest(local)
            if run_id_of(manifest) is None or path.run_id() != run_id_of(manifest):
                return []
            return [step for step in steps if step > manifest["step"] and not self._was_left(step)]
        except Exception as error:  # each file system has its own error classes
            if local is None:
                raise _cannot_read(path, error) from error
            logger.warning("%s cannot be read (%s): going on from %s", path.store.url, error, local)
            return []

    def _was_left(self, step: int) -> bool:
        """Whether this run was once resumed from before `step`, on purpose."""
        return any(Path(self.local_output).glob(f"checkpoint-{step}.ahead*"))

    def refuse_older(self) -> None:
        """CheckpointError when the copy at a path is ahead of `local_output`: the run went on on another machine."""
        parts = plan_parts(self.local_output)
        for path in self._paths:
            try:
                newer = path.newer_step(parts)
            except Exception:  # each file system has its own error classes; what is down `close` will tell
                continue
            if newer:
                raise CheckpointError(
                    f"`{path.store.url}` has checkpoint-{newer} of this run, newer than all in `{self.local_output}`: "
                    "the run went on elsewhere, and nothing was copied. Sync there, or finetune here, which goes on "
                    "from the newest of all."
                )

    def sync(self) -> None:
        """Asks for a copy and returns at once; while one runs, any number of calls make one more."""
        if not self._paths:
            return
        self._wanted.set()
        if self._thread is None:
            # A daemon: after a second Ctrl-C the process must not wait for a network.
            self._thread = threading.Thread(target=self._work, name="output-sync", daemon=True)
            self._thread.start()

    def close(self) -> list[CopyReport]:
        """Waits, makes the last copy and verifies it; CheckpointError names what is missing at which path."""
        self._is_closing = True
        self._wanted.set()
        if self._thread:
            self._thread.join()
            self._thread = None
        if not self._paths:
            return []
        parts = plan_parts(self.local_output)
        reports = [self._complete(path, parts) for path in self._paths]
        problems = [report for report in reports if not report.is_whole]
        if problems:
            listed = "\n".join(f"- {report.url}: {report.text}" for report in problems)
            raise CheckpointError(
                f"`{self.local_output}` is complete, its copy is not:\n{listed}\nOnce the path can be written, "
                "`llm-train sync finetune.yaml` (your YAML file) completes the copy; so does the same command again."
            )
        return reports

    def close_and_tell(self) -> None:
        """As `close`, where something else decides how the process ends: what is missing is logged."""
        try:
            self.close()
        except CheckpointError as error:
            logger.error("%s", error)

    def _work(self) -> None:
        while True:
            self._wanted.wait()
            self._wanted.clear()
            if self._is_closing:
                return
            for path in self._paths:
                self._copy(path)

    def _copy(self, path: OutputPath) -> None:
        try:
            # Planned anew for each path: the one before may have taken an hour.
            path.copy(self.local_output, plan_parts(self.local_output), on_part=self._note_part)
        except Exception as error:  # each file system has its own error classes; training must go on
            self.failures += 1
            logger.warning(
                "Copy to %s failed (%s: %s), failure %d of this run. Training goes on; the copy is tried "
                "again at the next checkpoint.",
                path.store.url,
                type(error).__name__,
                error,
                self.failures,
            )
        finally:
            self._uploading = None

    def _complete(self, path: OutputPath, parts: list[Part]) -> CopyReport:
        """What became of the copy at `path`, after a second try for what did not arrive."""
        url = path.store.url
        try:
            written = path.copy(self.local_output, parts, on_part=self._note_part)
            missing = path.find_missing(parts)
            if missing:
                path.forget(list(missing))
                written += path.copy(self.local_output, parts, on_part=self._note_part)
                missing = path.find_missing(parts)
        except Exception as error:  # each file system has its own error classes
            self.failures += 1
            unsure = ", ".join(part.name for part in parts if part.name) or "the run's files"
            text = f"{type(error).__name__}: {error}. Not verified: {unsure}."
            return CopyReport(url=url, text=text, is_whole=False)
        finally:
            self._uploading = None
        if missing:
            listed = ", ".join(f"{name} ({reason})" for name, reason in sorted(missing.items()))
            return CopyReport(url=url, text=listed, is_whole=False)
        return CopyReport(url=url, text=_copied_text(parts, set(written)), is_whole=True)

    def _note_part(self, name: str) -> None:
        self._uploading = os.path.join(self.local_output, name) if name else None


def _copied_text(parts: list[Part], written: set[str]) -> str:
    facts = {name: fact for part in parts for name, fact in part.files.items()}
    size_bytes = sum(fact.size for name, fact in facts.items() if name in written)
    names = [part.name or "the run's files" for part in parts if written & set(part.files)]
    copied = (
        f"copied {len(written)} ({size_bytes / 2**20:,.1f} MiB): {', '.join(names)}" if written else "nothing to copy"
    )
    return f"{len(facts)} files verified; {copied}"


def _cannot_read(path: OutputPath, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"`{path.store.url}` cannot be read ({type(error).__name__}: {error}), and `local_output` holds no "
        "whole checkpoint: it is not known whether there is one to go on from. Try again, or take the path "
        "out of `additional_output_paths`, or set `resume_from_checkpoint: false` to start anew."
    )


def _refuse_overlap(local_output: str, stores: list[OutputStore]) -> None:
    places = [("`local_output`", "", Path(os.path.realpath(local_output)))]
    for store in stores:
        # Only a path on this machine can be `local_output`; elsewhere a folder may bear the same name.
        scheme = "" if store.is_local else type(store.fs).__name__ + str(store.fs.storage_options)
        place = Path(os.path.realpath(store.root)) if store.is_local else Path(store.root)
        for other, other_scheme, other_place in places:
            if scheme == other_scheme and (place.is_relative_to(other_place) or other_place.is_relative_to(place)):
                raise ConfigError(
                    f"`additional_output_paths`: `{store.url}` is the same place as {other}, or one is "
                    f"inside the other ({place}, {other_place}): a copy would hold itself. Write a folder "
                    "beside it."
                )
        places.append((f"`{store.url}`", scheme, place))


def complete_copies(config: FinetuneConfig) -> list[CopyReport]:
    """Brings the copies of a run's `local_output` at all `additional_output_paths` up to date, and verifies them.

    Needs neither the model nor the data. ConfigError without an output path; CheckpointError when there is
    nothing whole to copy, a run is going on there or went on elsewhere, and for a copy that is not whole.
    """
    if not config.additional_output_paths:
        raise ConfigError("`additional_output_paths` is empty: write the paths that `local_output` is to be copied to.")
    if not any(part.name for part in plan_parts(config.local_output)):
        raise CheckpointError(
            f"`{config.local_output}` holds no whole checkpoint and no `final_output`: nothing to copy."
        )
    with only_writer(config.local_output):
        copies = OutputSync(config.local_output, config.additional_output_paths)
        copies.refuse_older()
        return copies.close()
