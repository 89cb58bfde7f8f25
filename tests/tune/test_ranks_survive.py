"""Two ranks under torchrun: one is killed, the same command goes on to the same weights (F5 of the fault plan)."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch
from fault_helpers import REPEAT, free_port, join_ranks, running_process, wait_until
from test_finetune import (
    FINETUNE,
    SHARED,
    are_equal,
    exported_weights,
    make_config,
    prepare_blocks,
    run_command,
    save_base_model,
)
from transformers import Trainer

from llm.training.config import FinetuneConfig
from llm.training.finetune import finetune
from llm.training.tune.checkpoint_folder import list_checkpoints
from llm.training.tune.whole_folder import MANIFEST

STEPS = {"max_steps": 60, "save_steps": 10, "per_device_train_batch_size": 2, "logging_steps": 60}


def start(folder: Path, config: FinetuneConfig, *flags: str) -> subprocess.Popen[str]:
    """torchrun with two ranks, and what they write in `log`; the command that `run_command` waits for."""
    (folder / "finetune.yaml").write_text(config.model_dump_json())
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    command += [
        "--rdzv-backend=c10d",
        "--rdzv-endpoint=127.0.0.1:0",
        str(FINETUNE),
        str(folder / "finetune.yaml"),
        *flags,
    ]
    with open(folder / "log", "a", encoding="utf-8") as log:
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        return subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log, text=True)


def rank_process(torchrun: subprocess.Popen[str], rank: int) -> psutil.Process:
    ranks = psutil.Process(torchrun.pid).children()
    return next(one for one in ranks if one.environ().get("LOCAL_RANK") == str(rank))


def num_whole(output: Path) -> int:
    return len([path for _, path in list_checkpoints(str(output)) if (Path(path) / MANIFEST).is_file()])


@pytest.mark.slow
@pytest.mark.parametrize("system_message", ["", SHARED], ids=["packed", "shared"])
def test_one_rank_killed_ends_both_and_the_same_command_goes_on_identical(system_message: str, tmp_path: Path) -> None:
    base = save_base_model(tmp_path / "base", "llama")
    prepare_blocks(tmp_path, base, system_message=system_message)
    config = make_config(tmp_path, base, training_arguments=STEPS, lora_config={"lora_dropout": 0.1})
    run_unbroken(config)
    weights = exported_weights(tmp_path)
    for number in range(REPEAT):
        (tmp_path / "out").rename(tmp_path / f"before-{number}")
        kill_one_rank(tmp_path, config, rank=(number + 1) % 2, after=1 + number % 3)
        resumed = run_command(tmp_path, config, num_ranks=2)
        assert resumed.returncode == 0, resumed.stderr[-3000:]
        assert are_equal(exported_weights(tmp_path), weights)


@pytest.mark.slow
def test_json_of_two_ranks_has_a_rank_in_each_line_and_one_summary(tmp_path: Path) -> None:
    base = save_base_model(tmp_path / "base", "llama")
    prepare_blocks(tmp_path, base)
    short = {**STEPS, "max_steps": 2, "logging_steps": 1}
    torchrun = start(tmp_path, make_config(tmp_path, base, training_arguments=short), "--json")
    assert torchrun.wait(120) == 0, (tmp_path / "log").read_text()[-3000:]
    lines = [line for line in (tmp_path / "log").read_text().splitlines() if line.startswith("{")]
    told = [(found["rank"], found["event"]) for found in map(json.loads, lines) if found["event"] != "log"]
    assert [event for rank, event in told if rank == 0] == [*["training"] * 3, "trained", "end"]  # the last: evaluation
    assert [event for rank, event in told if rank == 1] == ["end"]


@pytest.mark.skipif(sys.platform != "linux", reason="the names of threads are read from /proc")
@pytest.mark.parametrize(("max_steps", "exit_code"), [(10, 0), (10_000, 143)], ids=["whole", "interrupted"])
def test_ranks_that_end_leave_no_thread_of_gloo(max_steps: int, exit_code: int, tmp_path: Path) -> None:
    base = save_base_model(tmp_path / "base", "llama")
    prepare_blocks(tmp_path, base)
    config, port = make_config(tmp_path, base, training_arguments=STEPS | {"max_steps": max_steps}), free_port()
    with (
        running_process(run_rank_and_look, config, 0, port) as first,
        running_process(run_rank_and_look, config, 1, port) as second,
    ):
        wait_until(lambda: num_whole(tmp_path / "out") > 0 or not first.is_alive())
        if exit_code:
            os.kill(int(second.pid or 0), signal.SIGTERM)
        first.join()
        second.join()
        assert (first.exitcode, second.exitcode) == (exit_code, exit_code)


def run_rank_and_look(config: FinetuneConfig, rank: int, port: int) -> None:
    """`run_rank`, which fails when a thread of gloo is there after the Trainer's end: such a thread may wait for
    Python's lock, and what frees it then with the lock held waits for ever (`leave_ranks`)."""
    end = Trainer.end

    def end_and_look(trainer: Trainer) -> None:
        threads = [path for path in Path("/proc/self/task").iterdir() if "gloo" in (path / "comm").read_text()]
        assert threads
        end(trainer)
        wait_until(lambda: not any(path.exists() for path in threads))  # they may be seen a moment after the join

    Trainer.end = end_and_look
    run_rank(config, rank, port)


def run_unbroken(config: FinetuneConfig) -> None:
    """The run on two ranks without torchrun, which takes 5 seconds more to start."""
    port = free_port()
    with running_process(run_rank, config, 0, port) as first, running_process(run_rank, config, 1, port) as second:
        first.join()
        second.join()
        assert (first.exitcode, second.exitcode) == (0, 0)


def run_rank(config: FinetuneConfig, rank: int, port: int) -> None:
    join_ranks(rank, port)
    # As for the others: sums of two threads round otherwise. accelerate would set two without the variable.
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    finetune(config)


def kill_one_rank(folder: Path, config: FinetuneConfig, *, rank: int, after: int) -> None:
    """Starts a run and kills a rank once `after` checkpoints are whole; torchrun and the other rank are gone."""
    torchrun = start(folder, config)
    try:
        wait_until(lambda: num_whole(folder / "out") >= after or torchrun.poll() is not None)
        assert torchrun.poll() is None, (folder / "log").read_text()[-3000:]
        ranks = psutil.Process(torchrun.pid).children()
        rank_process(torchrun, rank).send_signal(signal.SIGKILL)
        assert torchrun.wait(60) == 1
        assert not [one for one in ranks if one.is_running() and one.status() != psutil.STATUS_ZOMBIE]
    finally:
        if torchrun.poll() is None:
            torchrun.kill()
            torchrun.wait()
    assert not (folder / "out/final_output").exists()
    found = [step for step, _ in list_checkpoints(str(folder / "out"))]
    print(f"rank {rank} killed, checkpoints {found}")
