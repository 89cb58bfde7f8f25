"""Plain lines where there is no terminal, a bar where there is one, and a summary that tells what happened."""

import io

import pytest
from rich.console import Console
from transformers import TrainerControl, TrainerState, TrainingArguments

from llm.training.tune.progress import ProgressCallback, RunSummary, format_facts, print_summary, summarize
from llm.training.tune.throughput import Work

LOG = {"loss": 1.25, "tokens_per_second": 1234.5, "trained_tokens_per_second": 500.0, "mfu": 0.385}


def run(console: Console, *, is_main: bool = True) -> None:
    arguments, control = TrainingArguments(output_dir="x", use_cpu=True, report_to="none"), TrainerControl()
    state = TrainerState(max_steps=3, is_world_process_zero=is_main)
    with ProgressCallback(console) as progress:
        progress.on_train_begin(arguments, state, control)
        state.global_step = 2
        progress.on_step_end(arguments, state, control)
        progress.on_log(arguments, state, control, logs=LOG)
        progress.on_log(arguments, state, control, logs={"train_runtime": 3.0})
        progress.on_train_end(arguments, state, control)


def test_without_a_terminal_each_log_is_one_line() -> None:
    output = io.StringIO()
    run(Console(file=output))
    assert output.getvalue() == "step 2/3  loss 1.2500  1,234 tokens/s  500 trained/s  MFU 38.5%  0:00 left\n"


def test_other_ranks_are_silent() -> None:
    output = io.StringIO()
    run(Console(file=output), is_main=False)
    assert output.getvalue() == ""


def test_on_a_terminal_there_is_a_bar_with_the_loss() -> None:
    output = io.StringIO()
    run(Console(file=output, force_terminal=True, width=120))
    assert "2/3" in output.getvalue() and "loss 1.2500" in output.getvalue()
    assert output.getvalue().rstrip("\n").endswith("\x1b[?25h")  # the cursor is given back


def test_bar_is_stopped_after_an_error() -> None:
    output = io.StringIO()
    arguments = TrainingArguments(output_dir="x", use_cpu=True, report_to="none")
    with (
        pytest.raises(RuntimeError),
        ProgressCallback(Console(file=output, force_terminal=True)) as progress,
    ):
        progress.on_train_begin(arguments, TrainerState(max_steps=3), TrainerControl())
        raise RuntimeError
    assert output.getvalue().rstrip("\n").endswith("\x1b[?25h")


def test_facts_of_an_evaluation() -> None:
    assert format_facts({"eval_loss": 2.0, "epoch": 1.0}) == "eval loss 2.0000"


def test_summary_of_a_run(capsys: pytest.CaptureFixture[str]) -> None:
    history = [{"loss": 2.0}, {"eval_loss": 1.5}, {"loss": 1.0}, {"train_loss": 1.4}]
    state = TrainerState(global_step=7, log_history=history)
    rates = Work(tokens=300, trained_tokens=100, examples=5, flops=4 * 10**13, seconds=10.0).rates(1e13)
    summary = summarize(state, rates=rates, result="somewhere")
    assert (summary.steps, summary.first_loss, summary.last_loss, summary.eval_loss) == (7, 2.0, 1.0, 1.5)
    assert (summary.tokens_per_second, summary.trained_tokens_per_second) == (30.0, 10.0)
    assert (summary.examples_per_second, summary.tflops_per_second, summary.mfu) == (0.5, 4.0, 0.4)
    print_summary(summary)
    assert "40.0%" in capsys.readouterr().err
    assert summary.peak_memory_bytes > 10 * 2**20


def test_summary_without_losses_is_printed() -> None:
    summary = summarize(TrainerState(), rates=Work().rates(None), result="somewhere")
    assert isinstance(summary, RunSummary) and summary.first_loss is None
    print_summary(summary)
