"""What a person sees of a training run: steps, loss, rate and remaining time, and a table at the end."""

import resource
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from llm.events import tell_event
from llm.terminal import console as terminal
from llm.terminal import is_live, print_table

_UNKNOWN = "-"


@dataclass(frozen=True, kw_only=True)
class RunSummary:
    """What a run did. Losses are None when nothing was logged; rates count all ranks and leave evaluation out.

    `tflops_per_second` is None for a model whose work is not known, `mfu` (0 to 1) for a device whose peak is not.
    """

    steps: int
    first_loss: float | None
    last_loss: float | None
    eval_loss: float | None
    tokens_per_second: float
    trained_tokens_per_second: float
    examples_per_second: float
    tflops_per_second: float | None
    mfu: float | None
    peak_memory_bytes: int
    result: str


class ProgressCallback(TrainerCallback):
    """A progress bar on a terminal, else a line for each log; on rank 0 only.

    Use it as a context around `trainer.train()`, so that the terminal is given back after an error, too.
    """

    def __init__(self, console: Console | None = None) -> None:
        """`console`: where to write, by default standard error."""
        self._console = console or terminal
        self._bar: Progress | None = None
        self._task: Any = None
        self._started, self._first_step = 0.0, 0

    def __enter__(self) -> "ProgressCallback":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Shows the bar."""
        self._started, self._first_step = time.perf_counter(), state.global_step
        if state.is_world_process_zero and is_live(self._console):
            self._bar = Progress(
                TextColumn("training"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[facts]}"),
                TimeRemainingColumn(),
                console=self._console,
            )
            self._task = self._bar.add_task("", total=state.max_steps, completed=state.global_step, facts="")
            self._bar.start()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Moves the bar."""
        if self._bar:
            self._bar.update(self._task, completed=state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Shows loss and rate."""
        facts = format_facts(logs or {})
        if not facts or not state.is_world_process_zero:
            return
        tell_event("training", step=state.global_step, max_steps=state.max_steps, **(logs or {}))
        if self._bar:
            self._bar.update(self._task, facts=facts)
        else:
            remaining = "" if "eval_loss" in (logs or {}) else self._remaining(state)
            self._console.print(f"step {state.global_step}/{state.max_steps}  {facts}  {remaining}".rstrip())

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leaves the bar as it is."""
        self._stop()

    def _stop(self) -> None:
        if self._bar:
            self._bar.stop()
            self._bar = None

    def _remaining(self, state: TrainerState) -> str:
        done = state.global_step - self._first_step
        if done <= 0 or done == state.max_steps:
            return ""
        seconds = (time.perf_counter() - self._started) / done * (state.max_steps - state.global_step)
        return f"{int(seconds) // 60}:{int(seconds) % 60:02d} left"


def format_facts(logs: dict[str, float]) -> str:
    """`loss 1.2345  120 tokens/s  40 trained/s  1.5 examples/s  MFU 38.5%`, or the evaluation loss; empty when the log
    has neither."""
    parts = [f"{name.replace('_', ' ')} {logs[name]:.4f}" for name in ("loss", "eval_loss") if name in logs]
    if "tokens_per_second" in logs:
        parts.append(f"{logs['tokens_per_second']:,.0f} tokens/s")
    if "trained_tokens_per_second" in logs:
        parts.append(f"{logs['trained_tokens_per_second']:,.0f} trained/s")
    if "examples_per_second" in logs:
        parts.append(f"{logs['examples_per_second']:,.2f} examples/s")
    if "mfu" in logs:
        parts.append(f"MFU {logs['mfu']:.1%}")
    return "  ".join(parts)


def summarize(state: TrainerState, *, rates: Mapping[str, float], result: str) -> RunSummary:
    """The summary of a run that ended; `rates`: `Work.rates` of the whole run."""
    losses = [log["loss"] for log in state.log_history if "loss" in log]
    eval_losses = [log["eval_loss"] for log in state.log_history if "eval_loss" in log]
    return RunSummary(
        steps=state.global_step,
        first_loss=losses[0] if losses else None,
        last_loss=losses[-1] if losses else None,
        eval_loss=eval_losses[-1] if eval_losses else None,
        tokens_per_second=rates.get("tokens_per_second", 0.0),
        trained_tokens_per_second=rates.get("trained_tokens_per_second", 0.0),
        examples_per_second=rates.get("examples_per_second", 0.0),
        tflops_per_second=rates.get("tflops_per_second"),
        mfu=rates.get("mfu"),
        peak_memory_bytes=peak_memory_bytes(),
        result=result,
    )


def print_summary(summary: RunSummary) -> None:
    """The table at the end of a run, without what is not known."""
    tell_event("trained", **asdict(summary))
    rows = {
        "steps": f"{summary.steps:,}",
        "loss, first and last logged": f"{_number(summary.first_loss)}  {_number(summary.last_loss)}",
        "evaluation loss": _number(summary.eval_loss),
        "tokens per second": f"{summary.tokens_per_second:,.1f}",
        "trained tokens per second": f"{summary.trained_tokens_per_second:,.1f}",
        "examples per second": f"{summary.examples_per_second:,.2f}",
        "model TFLOPs per second": _number(summary.tflops_per_second, ".3g"),
        "model FLOP utilisation": _number(summary.mfu, ".1%"),
        "peak memory": f"{summary.peak_memory_bytes / 2**30:.2f} GiB",
        "result": summary.result,
    }
    print_table("Training", [row for row in rows.items() if row[1] != _UNKNOWN])


def peak_memory_bytes() -> int:
    """The most memory that this process held: on the GPU when there is one, else of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux KiB


def _number(number: float | None, form: str = ".4f") -> str:
    return _UNKNOWN if number is None else format(number, form)
