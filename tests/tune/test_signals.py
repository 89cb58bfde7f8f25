"""SIGTERM and Ctrl-C: the step is finished and saved, the run goes on from there (F4 of the fault plan)."""

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from fault_helpers import (
    free_port,
    join_ranks,
    running_process,
    tiny_trainer,
    train,
    wait_until,
    weights_digest,
)
from transformers import TrainerCallback

from llm.training.tune.checkpoint_folder import list_checkpoints, newest_whole_checkpoint
from llm.training.tune.checkpoints import CheckpointCallback
from llm.training.tune.run import leave_ranks
from llm.training.tune.signals import SignalCallback


class Sends(TrainerCallback):
    """Sends signals to this process during a step, or during the evaluation after it."""

    def __init__(self, step: int, *numbers: signal.Signals, in_evaluation: bool = False) -> None:
        self.step = step
        self.numbers = numbers
        self.in_evaluation = in_evaluation

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step + 1 == self.step and not self.in_evaluation:
            self._send()

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step and self.in_evaluation:
            self._send()
            self.numbers = ()

    def _send(self) -> None:
        for number in self.numbers:
            os.kill(os.getpid(), number)


def steps_in(output: Path) -> list[int]:
    return [step for step, _ in list_checkpoints(str(output))]


@pytest.mark.parametrize(("number", "exit_code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
@pytest.mark.parametrize("step", [1, 4, 6])
def test_signal_saves_the_step_and_the_run_goes_on_identical(
    tmp_path: Path, number: signal.Signals, exit_code: int, step: int
) -> None:
    unbroken = train(tmp_path / "unbroken")
    before = [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)]
    signals = SignalCallback()
    output = tmp_path / "interrupted"
    callbacks = [Sends(step, number), signals, CheckpointCallback()]
    tiny_trainer(output, callbacks=callbacks).train()
    assert (signals.interrupted, signals.exit_code) == (number, exit_code)
    assert f"{number.name} at step {step} of 12" in signals.message and f"checkpoint-{step}" in signals.message
    assert [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)] == before
    assert steps_in(output)[0] == step
    assert train(output, newest_whole_checkpoint(str(output))) == unbroken


def test_no_signal_is_no_interruption(tmp_path: Path) -> None:
    signals = SignalCallback()
    tiny_trainer(tmp_path, callbacks=[signals, CheckpointCallback()], max_steps=3).train()
    assert (signals.interrupted, signals.exit_code, signals.message) == (None, 0, "")


def test_signal_in_an_evaluation_saves_right_after_it(tmp_path: Path) -> None:
    signals = SignalCallback()
    callbacks = [Sends(2, signal.SIGTERM, in_evaluation=True), signals, CheckpointCallback()]
    tiny_trainer(tmp_path, callbacks=callbacks, eval_strategy="steps", eval_steps=2).train()
    assert signals.interrupted == signal.SIGTERM
    assert steps_in(tmp_path) == [2]
    assert newest_whole_checkpoint(str(tmp_path)) == str(tmp_path / "checkpoint-2")


def test_signal_at_the_last_step_of_an_epoch_saves_once(tmp_path: Path) -> None:
    class Counts(TrainerCallback):
        num_saves = 0

        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.num_saves += 1

    counts, signals = Counts(), SignalCallback()
    callbacks = [Sends(6, signal.SIGTERM), signals, CheckpointCallback(), counts]
    tiny_trainer(tmp_path, callbacks=callbacks, save_strategy="epoch").train()
    assert counts.num_saves == 1
    assert newest_whole_checkpoint(str(tmp_path)) == str(tmp_path / "checkpoint-6")


def test_second_ctrl_c_stops_at_once(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGINT)
    callbacks = [Sends(4, signal.SIGINT, signal.SIGINT), signals := SignalCallback(), CheckpointCallback()]
    trainer = tiny_trainer(tmp_path, callbacks=callbacks)
    with pytest.raises(KeyboardInterrupt), signals:
        trainer.train()
    assert steps_in(tmp_path) == [3]
    assert signal.getsignal(signal.SIGINT) is before


def test_error_in_training_puts_the_handlers_back(tmp_path: Path) -> None:
    class Fails(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            raise RuntimeError("broken")

    before = signal.getsignal(signal.SIGTERM)
    trainer = tiny_trainer(tmp_path, callbacks=[Fails(), signals := SignalCallback()])
    with pytest.raises(RuntimeError, match="broken"), signals:
        trainer.train()
    assert signal.getsignal(signal.SIGTERM) is before


class Slow(TrainerCallback):
    """Time for a signal from outside; `started` says that there is something to interrupt."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        Path(args.output_dir, f"started-{args.process_index}").touch()
        time.sleep(0.05)


def train_until_told(output: Path, rank: int | None = None, port: int = 0) -> None:
    """A long run; exits as `finetune` does: with the signal's code and without `final_output` when
    interrupted.
    """
    settings = {} if rank is None else join_ranks(rank, port)
    signals = SignalCallback()
    callbacks = [Slow(), signals, CheckpointCallback()]
    trainer = tiny_trainer(output, callbacks=callbacks, max_steps=2000, save_steps=1000, **settings)
    trainer.train()
    (output / f"steps-{rank}").write_text(f"{trainer.state.global_step} {weights_digest(trainer.model)}")
    leave_ranks(trainer)
    sys.exit(signals.exit_code)


@pytest.mark.parametrize(("number", "exit_code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signal_from_outside_ends_the_process_with_its_code(
    tmp_path: Path, number: signal.Signals, exit_code: int
) -> None:
    with running_process(train_until_told, tmp_path) as process:
        wait_until((tmp_path / "started-0").exists)
        os.kill(int(process.pid or 0), number)
        process.join()
        assert process.exitcode == exit_code
    step = (tmp_path / "steps-None").read_text().split()[0]
    assert newest_whole_checkpoint(str(tmp_path)) == str(tmp_path / f"checkpoint-{step}")


def test_signal_to_one_rank_stops_both_at_the_same_step(tmp_path: Path) -> None:
    port = free_port()
    with (
        running_process(train_until_told, tmp_path, 0, port) as first,
        running_process(train_until_told, tmp_path, 1, port) as second,
    ):
        wait_until((tmp_path / "started-1").exists)
        os.kill(int(second.pid or 0), signal.SIGTERM)
        first.join()
        second.join()
        assert (first.exitcode, second.exitcode) == (143, 143)
    assert (tmp_path / "steps-0").read_text() == (tmp_path / "steps-1").read_text()
    step = (tmp_path / "steps-0").read_text().split()[0]
    assert newest_whole_checkpoint(str(tmp_path)) == str(tmp_path / f"checkpoint-{step}")
