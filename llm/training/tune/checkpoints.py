"""Checkpoints that are whole or do not count: stage 8 of the road.

Trainer writes straight into `checkpoint-N`; a kill leaves half of it, and Trainer would resume from it or
stop for ever. So each gets a manifest of sizes and hashes, written last, and only one that still matches is
resumed from.

    local_output/checkpoint-10/            whole: has a manifest.json that matches
    local_output/checkpoint-15.damaged/    was not whole when a run started; never deleted, never loaded
    local_output/checkpoint-20.ahead/      whole, but this run started before step 20
    local_output/checkpoint-5.other-run/   whole, but another run wrote it: never rotated, never resumed
"""

import contextlib
import itertools
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import PartialState
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import SaveStrategy

from llm.errors import CheckpointError, LlmTrainError
from llm.training.tune.checkpoint_folder import list_checkpoints, run_id_of
from llm.training.tune.whole_folder import (
    MANIFEST,
    find_damage,
    free_name,
    read_folder_manifest,
    remove_whole_folder,
    write_folder_manifest,
)

logger = logging.getLogger(__name__)


class Mirror(Protocol):
    """What copies whole checkpoints away in the background (`output_sync.OutputSync`)."""

    @property
    def uploading(self) -> str | None:
        """The checkpoint folder that is being read just now: it is not rotated away."""

    def sync(self) -> None:
        """Asks for a copy; returns at once."""


class CheckpointCallback(TrainerCallback):
    """Makes the checkpoints of a Trainer whole, rotates them, and never lets NaN or infinity be saved.

    `save_total_limit` whole ones are kept (None: all); the Trainer's own `save_total_limit` must be None,
    since it rotates before the new checkpoint is whole. `run` is written into each manifest; whole ones of
    another `id` than its own are set aside. `mirror` is asked for a copy after each. `describe_step` words,
    for an error, what the last step was. Put it after every
    callback that may ask for a save. Raises LlmTrainError for NaN or infinity, and CheckpointError when the
    disk is full.
    """

    def __init__(
        self,
        *,
        save_total_limit: int | None = 3,
        run: dict[str, Any] | None = None,
        mirror: Mirror | None = None,
        describe_step: Callable[[], str] | None = None,
    ) -> None:
        self.save_total_limit = save_total_limit
        self.run = run or {}
        self.mirror = mirror
        self.describe_step = describe_step
        self._saving: str | None = None  # the folder that Trainer is about to write or writes
        self._saved_step: int | None = None
        self._last_size_bytes = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Makes the folder ready: ends deletions that were cut short, sets later checkpoints aside."""
        assert args.save_total_limit is None, "rotation is ours: give Trainer save_total_limit=None"
        # Else the `save_steps` (and so on) of a resumed checkpoint win over the config's (transformers 5.23).
        state.compute_steps(args, state.max_steps)
        if not args.should_save or not os.path.isdir(str(args.output_dir)):
            return
        for rotated in Path(str(args.output_dir)).glob("checkpoint-*.rotated*"):
            if (rotated / MANIFEST).is_file():
                remove_whole_folder(str(rotated))
        for step, path in list_checkpoints(str(args.output_dir)):
            is_ahead = step > state.global_step
            if is_ahead or self._is_of_another_run(path):
                aside = free_name(f"{path}.{'ahead' if is_ahead else 'other-run'}")
                os.rename(path, aside)
                logger.warning("This run starts at step %d: %s is kept as %s", state.global_step, path, aside)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stops before NaN or infinity reaches the weights."""
        if args.fp16:  # infinity is normal here: the gradient scaler skips such a step
            return
        parameters = kwargs["model"].named_parameters()
        gradients = {name: p.grad for name, p in parameters if p.grad is not None}
        # The largest entry, not the root of the sum of squares: that one can overflow with finite gradients.
        if not torch.nn.utils.get_total_norm(gradients.values(), norm_type=float("inf")).isfinite():
            rate = kwargs["lr_scheduler"].get_last_lr()[0]
            described = f" {self.describe_step()}" if self.describe_step else ""
            raise LlmTrainError(
                f"Step {state.global_step + 1}: the gradient of `{_first_not_finite(gradients)}` is not "
                f"finite (learning rate {rate:.3g}).{described} The weights were not changed; {_what_is_safe(args)}. "
                "Lower `training_arguments: learning_rate`, or look at these rows."
            )

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Checks weights and disk when Trainer is about to save."""
        if control.should_save:
            self._prepare_save(args, state, kwargs["model"], kwargs.get("optimizer"))

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """As `on_step_end`: a signal asks for a save here, `save_strategy: best` right after."""
        if control.should_save or args.save_strategy == SaveStrategy.BEST:
            self._prepare_save(args, state, kwargs["model"], kwargs.get("optimizer"))

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """As `on_step_end`; a step that was saved already is not written again over itself."""
        if self._saved_step == state.global_step:
            control.should_save = False
        self.on_step_end(args, state, control, **kwargs)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Makes the new checkpoint whole, then rotates, then asks for a copy."""
        PartialState().wait_for_everyone()  # other ranks may still write their RNG state
        self._saved_step = state.global_step  # on every rank: they must ask for the same saves
        if not args.should_save:
            return
        folder = os.path.join(str(args.output_dir), f"checkpoint-{state.global_step}")
        _warn_of_missing_ranks(folder, args)
        write_folder_manifest(folder, step=state.global_step, world_size=args.world_size, run=self.run)
        self._saving = None
        self._last_size_bytes = sum(fact.size for fact in read_folder_manifest(folder)["files"].values())
        self._rotate(args, state)
        if self.mirror:
            self.mirror.sync()

    @contextlib.contextmanager
    def clear_failed_save(self) -> Iterator[None]:
        """Put `trainer.train()` into this: a save that fails is removed and told as a CheckpointError."""
        try:
            yield
        except LlmTrainError:
            raise
        except Exception as error:
            # A full disk is an OSError, a RuntimeError or a SafetensorError: it depends on the file.
            if self._saving is None or not os.path.isdir(self._saving):
                raise
            written = sum(path.stat().st_size for path in Path(self._saving).rglob("*") if path.is_file())
            shutil.rmtree(self._saving)  # began in this process, in a folder that was not there
            free = shutil.disk_usage(os.path.dirname(self._saving)).free
            raise CheckpointError(
                f"`{self._saving}` could not be written ({error}); {_mib(written)} had been, {_mib(free)} "
                "are free now. The unfinished folder was removed, earlier checkpoints are untouched. Make "
                "room and run the same command: it goes on from the newest whole checkpoint."
            ) from error

    def _is_of_another_run(self, path: str) -> bool:
        if find_damage(path, check_hashes=False):
            return False
        written_by = run_id_of(read_folder_manifest(path))
        return written_by is not None and written_by != self.run.get("id")

    def _prepare_save(
        self, args: TrainingArguments, state: TrainerState, model: torch.nn.Module, optimizer: Any
    ) -> None:
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not all(parameter.isfinite().all() for parameter in trained.values()):
            raise LlmTrainError(
                f"Step {state.global_step}: the weight `{_first_not_finite(trained)}` is not finite, so it "
                f"is not saved; {_what_is_safe(args)}. Lower `training_arguments: learning_rate`."
            )
        if not args.should_save:
            return
        folder = os.path.join(str(args.output_dir), f"checkpoint-{state.global_step}")
        if os.path.isdir(folder):
            os.rename(folder, free_name(f"{folder}.damaged"))  # never mix the files of two saves
        self._check_space(args, max(_size_bytes(model, optimizer), self._last_size_bytes))
        self._saving = folder

    def _check_space(self, args: TrainingArguments, needed_bytes: int) -> None:
        os.makedirs(str(args.output_dir), exist_ok=True)
        free_bytes = shutil.disk_usage(str(args.output_dir)).free
        if free_bytes < needed_bytes:
            raise CheckpointError(
                f"`{args.output_dir}` has {_mib(free_bytes)} free, the next checkpoint needs "
                f"{_mib(needed_bytes)}; nothing was written, {_what_is_safe(args)}. Make room, or lower "
                "`save_total_limit`, and run the same command: it goes on from there."
            )

    def _rotate(self, args: TrainingArguments, state: TrainerState) -> None:
        if not self.save_total_limit or self.save_total_limit < 1:
            return
        found = [path for _, path in list_checkpoints(str(args.output_dir))]
        whole = [path for path in found if find_damage(path, check_hashes=False) is None]
        best = state.best_model_checkpoint and os.path.realpath(state.best_model_checkpoint)
        in_use = self.mirror and self.mirror.uploading and os.path.realpath(self.mirror.uploading)
        for path in whole[self.save_total_limit :]:
            if os.path.realpath(path) not in (best, in_use):
                remove_whole_folder(path)


def _first_not_finite(tensors: Mapping[str, torch.Tensor]) -> str:
    return next(name for name, tensor in tensors.items() if not tensor.isfinite().all())


def _what_is_safe(args: TrainingArguments) -> str:
    for _, path in list_checkpoints(str(args.output_dir)):
        if find_damage(path, check_hashes=False) is None:
            return f"`{path}` is whole"
    return "no checkpoint was written yet"


def _warn_of_missing_ranks(folder: str, args: TrainingArguments) -> None:
    ranks = range(args.world_size)
    absent = [rank for rank in ranks if not os.path.isfile(os.path.join(folder, f"rng_state_{rank}.pth"))]
    if args.world_size > 1 and absent and not args.save_only_model:
        logger.warning(
            "%s has no RNG state of the ranks %s: `local_output` is not shared by all machines, so a "
            "resumed run differs from an unbroken one",
            folder,
            absent,
        )


def _size_bytes(model: torch.nn.Module, optimizer: Any) -> int:
    """About what a checkpoint takes: the saved weights and the optimizer's tensors."""
    has_adapter = hasattr(model, "peft_config")
    weights = [p for p in model.parameters() if p.requires_grad or not has_adapter]
    states = optimizer.state.values() if optimizer is not None else []
    moments = [value for state in states for value in state.values() if isinstance(value, torch.Tensor)]
    return sum(tensor.numel() * tensor.element_size() for tensor in itertools.chain(weights, moments))


def _mib(size_bytes: int) -> str:
    return f"{size_bytes / 2**20:,.1f} MiB"
