"""How a run ends: exit codes with a path that is down, `llm-train sync`, and one run at a time in a folder."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from fault_helpers import FailingProxy, running_process, wait_until
from test_finetune import make_config, prepare_blocks, save_base_model
from test_output_sync import local, quick, remote, s3, server, tree
from typer.testing import CliRunner

from llm.cli import app
from llm.errors import CheckpointError
from llm.training.config import FinetuneConfig
from llm.training.finetune import finetune
from llm.training.tune.checkpoint_folder import newest_whole_checkpoint
from llm.training.tune.run_lock import LOCK, only_writer

__all__ = ["local", "s3", "server"]  # fixtures
URL = "s3://bucket/run"


@pytest.fixture
def config(tmp_path: Path, s3: FailingProxy) -> FinetuneConfig:
    """A run of many steps that is copied to `URL`."""
    base = save_base_model(tmp_path / "base", "llama")
    prepare_blocks(tmp_path, base)
    arguments = {"max_steps": 500, "save_steps": 1}
    return make_config(tmp_path, base, training_arguments=arguments, additional_output_paths=[URL])


@pytest.mark.parametrize(("number", "exit_code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_interrupted_run_whose_path_is_down_ends_with_the_code_of_the_signal(
    number: signal.Signals, exit_code: int, config: FinetuneConfig, s3: FailingProxy, caplog: pytest.LogCaptureFixture
) -> None:
    def goes_down(method: str, path: str) -> int | None:
        if method == "PUT" and "/checkpoint-" in path:
            s3.fails = lambda method, path: 403
            os.kill(os.getpid(), number)
        return None

    s3.fails = goes_down
    with pytest.raises(SystemExit) as caught:
        finetune(config)
    assert caught.value.code == exit_code
    assert "its copy is not:\n- s3://bucket/run: PermissionError" in caplog.text
    assert "`llm-train sync finetune.yaml`" in caplog.text
    output = Path(config.local_output)
    assert newest_whole_checkpoint(str(output)) and not (output / "final_output").exists()
    s3.reset()
    check_that_sync_completes(config, output.parent)


def check_that_sync_completes(config: FinetuneConfig, folder: Path) -> None:
    (folder / "finetune.yaml").write_text(config.model_dump_json())
    result = CliRunner().invoke(app, ["sync", str(folder / "finetune.yaml")])
    assert result.exit_code == 0, result.output
    assert f"{URL}: " in result.output and "files verified; copied" in result.output
    assert "checkpoint-" in result.output
    copied = tree(Path(config.local_output))
    copied.pop(LOCK)
    assert remote(URL) == copied


def yaml_of(local: Path, *paths: str) -> str:
    lines = ["base_model: x/y", "train_dataset_config: blocks", f"local_output: {local}"]
    path = local.with_name("sync.yaml")
    path.write_text("\n".join([*lines, f"additional_output_paths: [{', '.join(paths)}]\n"]))
    return str(path)


def test_sync_copies_what_is_missing_and_then_nothing(local: Path, s3: FailingProxy, tmp_path: Path) -> None:
    expected = tree(local)
    yaml = yaml_of(local, URL, str(tmp_path / "folder"))
    first = CliRunner().invoke(app, ["sync", yaml])
    assert first.exit_code == 0, first.output
    assert first.output.count("10 files verified; copied 10 (0.0 MiB): checkpoint-10, checkpoint-5, final_output") == 2
    assert remote(URL) == tree(tmp_path / "folder") == expected
    (local / "runs/events.log").write_text("loss 2")
    second = CliRunner().invoke(app, ["sync", yaml])
    assert second.output.count("10 files verified; copied 1 (0.0 MiB): the run's files") == 2
    assert CliRunner().invoke(app, ["sync", yaml]).output.count("10 files verified; nothing to copy") == 2


def test_sync_to_a_path_that_is_down_ends_with_4_and_says_what_is_missing(local: Path, s3: FailingProxy) -> None:
    s3.fails = lambda method, path: 403
    result = CliRunner().invoke(app, ["sync", yaml_of(local, URL)])
    assert result.exit_code == 4
    assert "s3://bucket/run: PermissionError" in result.output and "checkpoint-10, checkpoint-5" in result.output


@pytest.mark.parametrize(("paths", "code", "text"), [([], 2, "is empty"), ([URL], 4, "holds no whole checkpoint")])
def test_sync_with_nothing_to_do_is_an_error(paths: list[str], code: int, text: str, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["sync", yaml_of(tmp_path / "none", *paths)])
    assert result.exit_code == code and text in result.output


def test_sync_loads_nothing_heavy(local: Path, tmp_path: Path) -> None:
    code = (
        "import sys\nfrom typer.testing import CliRunner\nfrom llm.cli import app\n"
        "print(CliRunner().invoke(app, ['sync', sys.argv[1]]).exit_code)\n"
        "print([n for n in ('torch', 'transformers', 'datasets', 'pyarrow', 'numpy') if n in sys.modules])\n"
    )
    command = [sys.executable, "-c", code, yaml_of(local, str(tmp_path / "folder"))]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["0", "[]"]


def hold(output: Path) -> None:
    with only_writer(str(output)):
        (output / "held").touch()
        time.sleep(60)


def test_second_run_in_a_folder_is_refused_with_the_process_of_the_first(tmp_path: Path) -> None:
    with running_process(hold, tmp_path) as process:
        wait_until((tmp_path / "held").exists)
        with (
            pytest.raises(CheckpointError, match=f"is in use by process {process.pid} on "),
            only_writer(str(tmp_path)),
        ):
            raise AssertionError("never here")
        with pytest.raises(CheckpointError, match=f"is in use by process {process.pid} on "):
            finetune_in(tmp_path)
        process.kill()
        process.join()
    with only_writer(str(tmp_path)):  # a kill leaves no lock behind
        assert (tmp_path / LOCK).read_text().startswith(f"process {os.getpid()} on ")


def finetune_in(output: Path, **changes: Any) -> None:
    folder = output / "inputs"
    base = save_base_model(folder / "base", "llama")
    prepare_blocks(folder, base)
    finetune(make_config(folder, base, local_output=str(output), **changes))


def test_folder_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="nothing can be written to"), only_writer(str(tmp_path / "file/out")):
        raise AssertionError("never here")


def test_lock_is_not_copied(local: Path, tmp_path: Path) -> None:
    with only_writer(str(local)):
        quick(local, str(tmp_path / "copy")).close()
    assert not (tmp_path / "copy" / LOCK).exists()
