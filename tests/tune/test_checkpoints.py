"""Checkpoints survive kills, damage, full disks and NaN (F1, F2, F5, F6, F11, F14 of the fault plan)."""

import logging
import os
import random
import resource
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fault_helpers import (
    REPEAT,
    free_port,
    join_ranks,
    mirror_of,
    resume_and_train,
    running_process,
    tiny_trainer,
    train,
    weights_digest,
    whole_folder,
)
from transformers import TrainerCallback

from llm.errors import CheckpointError, LlmTrainError
from llm.training.tune import checkpoints
from llm.training.tune.checkpoint_folder import list_checkpoints, newest_whole_checkpoint
from llm.training.tune.checkpoints import CheckpointCallback
from llm.training.tune.run import leave_ranks
from llm.training.tune.whole_folder import MANIFEST, find_damage, read_folder_manifest

NUM_KILLS = 6 * REPEAT


def names(output: Path) -> set[str]:
    return {path.name for path in output.iterdir()}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The output of an unbroken LoRA run without its last checkpoint, and the digest of its weights."""
    output = tmp_path_factory.mktemp("finished")
    digest = train(output)
    shutil.rmtree(output / "checkpoint-12")
    return output, digest


@pytest.fixture
def output(finished: tuple[Path, str], tmp_path: Path) -> Path:
    """A copy of `finished`: whole checkpoint-6 and checkpoint-9."""
    return Path(shutil.copytree(finished[0], tmp_path / "output"))


def keep_only(*kept: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        for path in folder.iterdir():
            if path.name not in kept:
                path.unlink()

    return damage


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def cut(name: str, share: float = 0.5) -> Callable[[Path], None]:
    return lambda folder: os.truncate(folder / name, int((folder / name).stat().st_size * share))


def flip_bit(name: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        content = bytearray((folder / name).read_bytes())
        content[len(content) // 2] ^= 1
        (folder / name).write_bytes(content)

    return damage


WEIGHTS = "adapter_model.safetensors"
STATE = "trainer_state.json"
DAMAGES: dict[str, tuple[str, Callable[[Path], object]]] = {
    "empty folder": ("checkpoint-6", keep_only()),
    "killed after weights": ("checkpoint-6", keep_only(WEIGHTS)),
    "killed after optimizer": ("checkpoint-6", keep_only(WEIGHTS, "optimizer.pt")),
    "killed after scheduler": ("checkpoint-6", keep_only(WEIGHTS, "optimizer.pt", "scheduler.pt")),
    "killed after RNG": ("checkpoint-6", keep_only(WEIGHTS, "optimizer.pt", "scheduler.pt", "rng_state.pth")),
    "killed before manifest": ("checkpoint-6", remove(MANIFEST)),
    "manifest cut": ("checkpoint-6", cut(MANIFEST)),
    "manifest of another step": (
        "checkpoint-6",
        lambda folder: [shutil.rmtree(folder), shutil.copytree(folder.parent / "checkpoint-6", folder)],
    ),
    "state empty": ("checkpoint-6", cut(STATE, 0)),
    "state cut": ("checkpoint-6", cut(STATE)),
    "optimizer missing": ("checkpoint-6", remove("optimizer.pt")),
    "scheduler missing": ("checkpoint-6", remove("scheduler.pt")),
    "RNG missing": ("checkpoint-6", remove("rng_state.pth")),
    "adapter config missing": ("checkpoint-6", remove("adapter_config.json")),
    "weights missing": ("checkpoint-6", remove(WEIGHTS)),
    "weights cut": ("checkpoint-6", cut(WEIGHTS)),
    "weights empty": ("checkpoint-6", cut(WEIGHTS, 0)),
    "weights, one bit": ("checkpoint-6", flip_bit(WEIGHTS)),
    "optimizer cut": ("checkpoint-6", cut("optimizer.pt")),
    "optimizer, one bit": ("checkpoint-6", flip_bit("optimizer.pt")),
    "RNG cut": ("checkpoint-6", cut("rng_state.pth")),
    "stray empty checkpoint-999": ("checkpoint-9", lambda folder: (folder.parent / "checkpoint-999").mkdir()),
    "plain file checkpoint-999": ("checkpoint-9", lambda folder: (folder.parent / "checkpoint-999").touch()),
    "folder of another tool": ("checkpoint-9", lambda folder: (folder.parent / "checkpoint-15.tmp").mkdir()),
    "training_args.bin cut": ("checkpoint-9", cut("training_args.bin")),
    "foreign file inside": ("checkpoint-9", lambda folder: (folder / "notes.txt").write_text("mine")),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_newest_checkpoint_damaged_resumes_from_a_whole_one_identical(
    kind: str, finished: tuple[Path, str], output: Path, caplog: pytest.LogCaptureFixture
) -> None:
    expected, damage = DAMAGES[kind]
    damage(output / "checkpoint-9")
    before = names(output)
    with caplog.at_level(logging.WARNING):
        found = newest_whole_checkpoint(str(output))
    assert found == str(output / expected)
    set_aside = names(output) - before
    if expected == "checkpoint-6":
        assert set_aside == {"checkpoint-9.damaged"}
        assert "checkpoint-9 is not whole" in caplog.text
    assert {name for name in before if not (output / name).exists()} <= {"checkpoint-9", "checkpoint-999"}
    assert train(output, found) == finished[1]
    assert set_aside <= names(output)


def test_damages_are_as_many_as_the_plan_asks_for() -> None:
    assert len(DAMAGES) >= 23


def test_damaged_twice_keeps_both_aside(output: Path) -> None:
    for _ in range(2):
        (output / "checkpoint-20").mkdir()
        assert newest_whole_checkpoint(str(output)) == str(output / "checkpoint-9")
    assert {"checkpoint-20.damaged", "checkpoint-20.damaged-2"} <= names(output)


def test_manifest_that_leads_out_of_its_folder_is_damage(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("x")
    folder = whole_folder(tmp_path / "checkpoint-1", {"a": b"1"}, step=1)
    text = (folder / MANIFEST).read_text().replace('"a"', '"../secret"')
    (folder / MANIFEST).write_text(text)
    assert "outside" in str(find_damage(str(folder)))


def test_no_output_folder_has_no_checkpoint(tmp_path: Path) -> None:
    assert newest_whole_checkpoint(str(tmp_path / "absent")) is None


@pytest.mark.parametrize("settings", [{}, {"is_lora": False}], ids=["lora", "full"])
@pytest.mark.parametrize("kill", ["during a save", "at any time"])
def test_run_killed_resumes_identical_and_its_copy_is_complete(
    tmp_path: Path, settings: dict[str, Any], kill: str
) -> None:
    generator = random.Random(kill)
    resume_and_train_apart(tmp_path / "unbroken", settings)
    expected = (tmp_path / "unbroken/digest").read_text()
    num_kills = num_half_written = 0
    while num_kills < NUM_KILLS // 2:
        output = tmp_path / f"killed-{num_kills}"
        for _ in range(3):
            num_kills += kill_run(output, settings, generator, during_save=kill == "during a save")
        resume_and_train_apart(output, settings)
        assert (output / "digest").read_text() == expected
        num_half_written += len(list(output.glob("checkpoint-*.damaged*")))
        final = [newest_whole_checkpoint(str(folder)) for folder in (output, mirror_of(output))]
        assert final == [str(output / "checkpoint-12"), str(mirror_of(output) / "checkpoint-12")]
    print(f"{num_kills} kills, {num_half_written} half-written checkpoints")
    assert num_half_written or kill == "at any time", "no kill hit a save: wrong delays for this machine"


def resume_and_train_apart(output: Path, settings: dict[str, Any]) -> None:
    with running_process(resume_and_train, output, settings) as process:
        process.join()
        assert process.exitcode == 0


def kill_run(output: Path, settings: dict[str, Any], generator: random.Random, *, during_save: bool) -> bool:
    """Kills a run up to 60 ms after a new checkpoint appears, or any time; False when it ended before."""
    output.mkdir(exist_ok=True)
    with running_process(resume_and_train, output, settings) as process:
        known = set(list_checkpoints(str(output)))
        while during_save and process.is_alive() and not set(list_checkpoints(str(output))) - known:
            time.sleep(0.001)
        time.sleep(generator.uniform(0, 0.06 if during_save else 1.5))
        process.kill()
        process.join()
        return process.exitcode == -signal.SIGKILL


class Seen(TrainerCallback):
    """Runs before CheckpointCallback: which checkpoints are whole when Trainer has just written one."""

    def __init__(self) -> None:
        self.whole: list[list[int]] = []

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        found = list_checkpoints(args.output_dir)
        self.whole.append([step for step, path in found if not find_damage(path)])


def test_rotation_deletes_the_oldest_only_after_the_new_one_is_whole(tmp_path: Path) -> None:
    seen = Seen()
    tiny_trainer(tmp_path, callbacks=[seen, CheckpointCallback(save_total_limit=1)]).train()
    assert seen.whole == [[], [3], [6], [9]]
    assert names(tmp_path) == {"checkpoint-12"}


def test_rotation_never_counts_or_deletes_damaged_and_foreign(tmp_path: Path) -> None:
    class Intruder(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 3:
                (tmp_path / "checkpoint-3/notes.txt").write_text("mine")
            if state.global_step == 9:
                (tmp_path / "checkpoint-6" / WEIGHTS).write_bytes(b"")

    tiny_trainer(tmp_path, callbacks=[CheckpointCallback(save_total_limit=2), Intruder()]).train()
    assert names(tmp_path) == {"checkpoint-3.rotated", "checkpoint-6", "checkpoint-9", "checkpoint-12"}
    assert names(tmp_path / "checkpoint-3.rotated") == {"notes.txt"}


def test_rotation_spares_the_checkpoint_that_is_being_copied(tmp_path: Path) -> None:
    class Slow:
        uploading = str(tmp_path / "checkpoint-3")
        num_asked = 0

        def sync(self) -> None:
            self.num_asked += 1

    mirror = Slow()
    tiny_trainer(tmp_path, callbacks=[CheckpointCallback(save_total_limit=1, mirror=mirror)]).train()
    assert names(tmp_path) == {"checkpoint-3", "checkpoint-12"}
    assert mirror.num_asked == 4


def test_deletion_cut_short_is_ended_by_the_next_run(output: Path) -> None:
    os.rename(output / "checkpoint-6", output / "checkpoint-6.rotated")
    (output / "checkpoint-6.rotated" / WEIGHTS).unlink()
    train(output, str(output / "checkpoint-9"))
    assert "checkpoint-6.rotated" not in names(output)


def test_run_from_an_earlier_checkpoint_sets_later_ones_aside(output: Path) -> None:
    tiny_trainer(output, callbacks=[CheckpointCallback()], save_steps=5).train(str(output / "checkpoint-6"))
    assert "checkpoint-9.ahead" in names(output)
    assert newest_whole_checkpoint(str(output)) == str(output / "checkpoint-12")


def test_manifest_records_step_world_size_and_run(tmp_path: Path) -> None:
    tiny_trainer(tmp_path, callbacks=[CheckpointCallback(run={"seed": 7})], max_steps=3).train()
    manifest = read_folder_manifest(str(tmp_path / "checkpoint-3"))
    assert (manifest["step"], manifest["world_size"], manifest["run"]) == (3, 1, {"seed": 7})
    assert {WEIGHTS, "optimizer.pt", "scheduler.pt", "rng_state.pth", STATE} <= set(manifest["files"])
    assert "training_args.bin" not in manifest["files"]


class Poison(TrainerCallback):
    """Makes a gradient NaN in one step, or a weight infinite after it."""

    def __init__(self, step: int, *, in_weights: bool = False) -> None:
        self.step = step
        self.in_weights = in_weights
        self.before = ""

    def on_step_begin(self, args: Any, state: Any, control: Any, *, model: Any, **kwargs: Any) -> None:
        if state.global_step + 1 == self.step and not self.in_weights:
            self.before = weights_digest(model)
            weight = next(p for p in model.parameters() if p.requires_grad)
            weight.register_hook(lambda gradient: gradient * float("nan"))

    def on_optimizer_step(self, args: Any, state: Any, control: Any, *, model: Any, **kwargs: Any) -> None:
        if state.global_step + 1 == self.step and self.in_weights:
            next(p for p in model.parameters() if p.requires_grad).data[0, 0] = float("inf")


@pytest.mark.parametrize("step", [1, 3, 4, 6, 11])
@pytest.mark.parametrize("max_grad_norm", [1.0, 0.0])
def test_gradient_not_finite_stops_before_the_weights_change(tmp_path: Path, step: int, max_grad_norm: float) -> None:
    poison = Poison(step)
    trainer = tiny_trainer(tmp_path, callbacks=[poison, CheckpointCallback()], max_grad_norm=max_grad_norm)
    with pytest.raises(LlmTrainError, match=rf"Step {step}: the gradient of `.*lora_A.*` is not finite"):
        trainer.train()
    assert weights_digest(trainer.model) == poison.before
    assert [number for number, _ in list_checkpoints(str(tmp_path))] == list(range(3, step, 3))[::-1]


def test_weight_not_finite_is_never_saved(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path, callbacks=[Poison(6, in_weights=True), CheckpointCallback()])
    with pytest.raises(LlmTrainError, match=r"Step 6: the weight `.*` is not finite.*checkpoint-3` is whole"):
        trainer.train()
    assert names(tmp_path) == {"checkpoint-3"}


def test_disk_without_room_is_told_before_the_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Fills(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 5:
                usage = shutil.disk_usage(tmp_path)._replace(free=2**13)
                monkeypatch.setattr(checkpoints.shutil, "disk_usage", lambda path: usage)

    trainer = tiny_trainer(tmp_path, callbacks=[Fills(), CheckpointCallback()])
    with pytest.raises(CheckpointError, match=r"has 0.0 MiB free, the next checkpoint needs 0\.\d MiB"):
        trainer.train()
    assert names(tmp_path) == {"checkpoint-3"}


def train_with_small_files(output: Path, largest_bytes: int) -> None:
    """A run whose files cannot be larger than this, as if the disk were full; the error's text in `error`."""
    trainer = tiny_trainer(output, callbacks=[callback := CheckpointCallback()])
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest_bytes, resource.RLIM_INFINITY))
    checkpoint = newest_whole_checkpoint(str(output))
    try:
        with callback.clear_failed_save():
            trainer.train(checkpoint)
    except CheckpointError as error:
        (output / "error").write_text(str(error)[: largest_bytes - 1])


@pytest.mark.parametrize(
    "stops_at",
    [WEIGHTS, "optimizer.pt", "scheduler.pt", "rng_state.pth", STATE, "README.md", "adapter_config.json"],
)
def test_disk_full_while_saving_removes_only_the_unfinished_folder(
    stops_at: str, finished: tuple[Path, str], output: Path
) -> None:
    limit = (output / "checkpoint-9" / stops_at).stat().st_size - 1
    before = names(output)
    with running_process(train_with_small_files, output, limit) as process:
        process.join()
    assert "checkpoint-12` could not be written" in (output / "error").read_text()
    assert names(output) == before | {"error"}
    assert not find_damage(str(output / "checkpoint-9"))
    assert train(output, newest_whole_checkpoint(str(output))) == finished[1]


def train_as_rank(output: Path, rank: int, port: int) -> None:
    """One of two ranks; rank 1 writes its RNG state late."""
    settings = join_ranks(rank, port)
    if rank == 1:
        save = torch.save

        def save_late(*arguments: Any, **kwargs: Any) -> None:
            time.sleep(0.5)
            save(*arguments, **kwargs)

        torch.save = save_late
    trainer = tiny_trainer(output, callbacks=[CheckpointCallback()], max_steps=3, **settings)
    trainer.train()
    leave_ranks(trainer)


def test_manifest_of_two_ranks_waits_for_the_slower(tmp_path: Path) -> None:
    port = free_port()
    with (
        running_process(train_as_rank, tmp_path, 0, port) as first,
        running_process(train_as_rank, tmp_path, 1, port) as second,
    ):
        first.join()
        second.join()
        assert (first.exitcode, second.exitcode) == (0, 0)
    manifest = read_folder_manifest(str(tmp_path / "checkpoint-3"))
    assert manifest["world_size"] == 2
    assert {"rng_state_0.pth", "rng_state_1.pth"} <= set(manifest["files"])
    assert newest_whole_checkpoint(str(tmp_path)) == str(tmp_path / "checkpoint-3")
