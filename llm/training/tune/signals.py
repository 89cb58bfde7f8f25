"""SIGTERM and Ctrl-C end a run at a step end, with a checkpoint: stage 7 of the road."""

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import reduce
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class SignalCallback(TrainerCallback):
    """On SIGTERM or the first Ctrl-C: the step (or evaluation) is finished and saved, and training stops.

    `interrupted` is then the signal, `exit_code` what the process should end with, `message` the line to
    print. All ranks stop at the same step. A second Ctrl-C raises KeyboardInterrupt at once. Handlers are set
    while training runs and put back afterwards; `with signals:` around `trainer.train()` puts them back after
    an error too. Put it before `CheckpointCallback`.
    """

    def __init__(self) -> None:
        self.interrupted: signal.Signals | None = None
        self.message = ""
        self._received: signal.Signals | None = None
        self._previous: dict[signal.Signals, Any] = {}
        self._process = os.getpid()

    @property
    def exit_code(self) -> int:
        """143 after SIGTERM, 130 after Ctrl-C, 0 when training was not interrupted."""
        return 128 + self.interrupted if self.interrupted else 0

    def __enter__(self) -> "SignalCallback":
        self._set_handlers()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.restore_handlers()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Sets the handlers, unless `with` did."""
        self._set_handlers()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Asks for a save and the end of training when any rank had a signal."""
        self.interrupted = self.interrupted or self._agree()
        if self.interrupted:
            control.should_save = control.should_training_stop = True
            control.should_evaluate = False  # the grace period may be short: the save comes first
            checkpoint = os.path.join(str(args.output_dir), f"checkpoint-{state.global_step}")
            self.message = (
                f"Interrupted by {self.interrupted.name} at step {state.global_step} of {state.max_steps}: "
                f"run the same command to go on from {checkpoint}."
            )

    on_evaluate = on_step_end  # a save comes right after an evaluation, too

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Puts the handlers back."""
        self.restore_handlers()

    def restore_handlers(self) -> None:
        """Puts the handlers back that were set before; doing it twice is harmless."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def _set_handlers(self) -> None:
        # Python allows it in the main thread only; elsewhere the program around us has the say.
        if not self._previous and threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._receive) for number in SIGNALS}

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # a forked data loader worker: its parent decides
            return
        if self._received and number == signal.SIGINT:
            self.restore_handlers()
            raise KeyboardInterrupt
        self._received = signal.Signals(number)

    def _agree(self) -> signal.Signals | None:
        """The signal that any rank received: all ranks must save and stop at the same step."""
        if PartialState().num_processes == 1:
            return self._received
        received = [int(self._received is number) for number in SIGNALS]
        flags = torch.tensor(received, device=PartialState().device)
        votes = reduce(flags, "sum").tolist()
        return next((number for number, count in zip(SIGNALS, votes, strict=True) if count), None)
