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

from llm.errors import ConfigError
from llm.training.config import FinetuneConfig
from llm.training.finetune import finetune
from llm.training.tune.checkpoint_folder import run_id_of
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
