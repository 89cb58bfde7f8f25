"""What another run left in `local_output` or at an output path is neither resumed from, rotated nor deleted."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fault_helpers import FailingProxy, whole_folder
from test_finetune import make_config, prepare_blocks, save_base_model
from test_output_sync import quick, remote, s3, server, target, tree

from llm.errors import CheckpointError, ConfigError
from llm.training.config import DatasetConfig, FinetuneConfig
from llm.training.finetune import finetune
from llm.training.tune.checkpoint_folder import run_id_of
from llm.training.tune.output_sync import complete_copies
from llm.training.tune.whole_folder import read_folder_manifest

__all__ = ["s3", "server", "target"]  # fixtures


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prepared")
    prepare_blocks(folder, save_base_model(folder / "base", "llama"))
    return folder


def config_of(prepared: Path, output: Path, seed: int = 42, **changes: Any) -> FinetuneConfig:
    arguments = {"max_steps": 4, "save_steps": 1, "save_total_limit": 2, "seed": seed}
    base = prepared / "base"
    return make_config(prepared, base, local_output=str(output), training_arguments=arguments, **changes)


def run_ids(output: Path) -> dict[str, str | None]:
    folders = [path for path in output.glob("checkpoint-*") if path.is_dir()]
    return {path.name: run_id_of(read_folder_manifest(str(path))) for path in folders}


def test_starting_anew_keeps_the_old_checkpoints_aside_and_out_of_rotation(prepared: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    finetune(config_of(prepared, output))
    old = run_ids(output)
    assert set(old) == {"checkpoint-3", "checkpoint-4"}
    finetune(config_of(prepared, output, seed=1, resume_from_checkpoint=False))
    found = run_ids(output)
    assert set(found) == {"checkpoint-3", "checkpoint-4", "checkpoint-3.ahead", "checkpoint-4.ahead"}
    assert found["checkpoint-3.ahead"] == found["checkpoint-4.ahead"] == old["checkpoint-4"] != found["checkpoint-4"]
    finetune(config_of(prepared, output, seed=1))  # and goes on with the new one
    assert run_ids(output) == found


def test_checkpoint_from_elsewhere_leaves_the_runs_of_this_folder_aside(prepared: Path, tmp_path: Path) -> None:
    for name in ("first", "second"):
        finetune(config_of(prepared, tmp_path / name))
    shutil.rmtree(tmp_path / "second/checkpoint-4")
    config = config_of(prepared, tmp_path / "first", resume_from_checkpoint=str(tmp_path / "second/checkpoint-3"))
    shutil.copytree(tmp_path / "first/checkpoint-3", tmp_path / "first/checkpoint-2")
    finetune(config)
    names = set(run_ids(tmp_path / "first"))
    assert names == {"checkpoint-4", "checkpoint-2.other-run", "checkpoint-3.other-run", "checkpoint-4.ahead"}


def test_copy_of_another_run_is_refused_before_it_is_fetched(prepared: Path, tmp_path: Path) -> None:
    mirror = [str(tmp_path / "copy")]
    finetune(config_of(prepared, tmp_path / "first", additional_output_paths=mirror))
    copied = tree(tmp_path / "copy")
    with pytest.raises(ConfigError, match=r"copy/checkpoint-4` is of a run with other settings"):
        finetune(config_of(prepared, tmp_path / "second", seed=1, additional_output_paths=mirror))
    assert not list((tmp_path / "second").glob("*checkpoint*"))
    assert tree(tmp_path / "copy") == copied


def make_run(output: Path, run_id: str, steps: list[int]) -> dict[str, bytes]:
    """A `local_output` with whole checkpoints of this run; what is there."""
    shutil.rmtree(output, ignore_errors=True)
    for step in steps:
        content = f"{run_id} {step}".encode()
        whole_folder(output / f"checkpoint-{step}", {"model.safetensors": content}, step=step, run={"id": run_id})
    return tree(output)


def test_new_run_at_an_output_path_neither_deletes_nor_restores_what_the_old_one_left(
    target: str, s3: FailingProxy, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    output = tmp_path / "output"
    old = make_run(output, "old", [10, 15, 30])
    quick(output, target).close()
    make_run(output, "new", [10])
    quick(output, target).close()
    assert "held the copy of another run: its checkpoint-10, checkpoint-15, checkpoint-30 stay" in caplog.text
    new = make_run(output, "new", [10, 20])
    quick(output, target).close()
    kept = {name: content for name, content in old.items() if not name.startswith("checkpoint-10/")}
    assert remote(target) == kept | new
    fs, root = fsspec.core.url_to_fs(target)
    fs.pipe_file(f"{root}/checkpoint-20/model.safetensors", b"damaged")
    restored = quick(tmp_path / "empty", target).restore()  # not checkpoint-15, which is newer than 10
    assert restored == str(tmp_path / "empty/checkpoint-10")
    assert json.loads((tmp_path / "empty/checkpoint-10/manifest.json").read_text())["run"]["id"] == "new"
    assert os.listdir(tmp_path / "empty") == ["checkpoint-10"]


def test_sync_of_a_machine_that_the_run_has_left_copies_nothing(target: str, s3: FailingProxy, tmp_path: Path) -> None:
    make_run(tmp_path / "here", "run", [10, 20])
    quick(tmp_path / "here", target).close()
    copied = remote(target)
    make_run(tmp_path / "left", "run", [5, 10])
    config = FinetuneConfig(
        base_model="x/y",
        train_dataset_config=DatasetConfig(kwargs={"path": "x"}),
        local_output=str(tmp_path / "left"),
        additional_output_paths=[target],
    )
    with pytest.raises(CheckpointError, match="has checkpoint-20 of this run, newer than all in"):
        complete_copies(config)
    assert remote(target) == copied
    complete_copies(config.model_copy(update={"local_output": str(tmp_path / "here")}))


def test_machine_that_the_run_had_left_goes_on_from_the_newer_copy(
    target: str, s3: FailingProxy, tmp_path: Path
) -> None:
    make_run(tmp_path / "here", "run", [10, 20])
    quick(tmp_path / "here", target).close()
    make_run(tmp_path / "left", "run", [5, 10])
    assert quick(tmp_path / "left", target).restore() == str(tmp_path / "left/checkpoint-20")
    make_run(tmp_path / "other", "other", [10])
    assert quick(tmp_path / "other", target).restore() == str(tmp_path / "other/checkpoint-10")
    make_run(tmp_path / "back", "run", [5, 20])
    (tmp_path / "back/checkpoint-20").rename(tmp_path / "back/checkpoint-20.ahead")  # resumed from 5 on purpose
    assert quick(tmp_path / "back", target).restore() == str(tmp_path / "back/checkpoint-10")


def test_path_that_is_down_does_not_keep_a_run_from_its_local_checkpoint(
    s3: FailingProxy, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make_run(tmp_path / "out", "run", [10])
    quick(tmp_path / "out", "s3://bucket/run").close()
    s3.fails = lambda method, path: 403
    assert quick(tmp_path / "out", "s3://bucket/run").restore() == str(tmp_path / "out/checkpoint-10")
    assert "s3://bucket/run cannot be read" in caplog.text
