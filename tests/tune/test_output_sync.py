"""Copies at output paths: whole, verified, never in the way of training (F7 to F10 of the fault plan).

The S3 endpoint is moto's server on this machine, behind a proxy that fails requests on purpose.
"""

import json
import logging
import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
import s3fs
from fault_helpers import (
    REPEAT,
    FailingProxy,
    fail_at_random,
    running_process,
    tiny_trainer,
    train,
    wait_until,
    weights_digest,
    whole_folder,
)
from moto.moto_server.threaded_moto_server import ThreadedMotoServer
from test_export import watch

from llm.errors import CheckpointError, ConfigError, MissingExtraError
from llm.training.tune.checkpoints import CheckpointCallback
from llm.training.tune.output_path import INDEX
from llm.training.tune.output_sync import OutputSync
from llm.training.tune.whole_folder import MANIFEST, find_damage


@pytest.fixture(scope="module")
def server() -> Iterator[FailingProxy]:
    moto = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    moto.start()
    with FailingProxy(moto.get_host_and_port()).running() as proxy:
        yield proxy
    moto.stop()


@pytest.fixture
def s3(server: FailingProxy, monkeypatch: pytest.MonkeyPatch) -> Iterator[FailingProxy]:
    """The proxy, passing all on; s3fs finds it through the environment; `s3://bucket` is there and empty."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", server.url)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")  # so that the tries that count here are ours, and quick
    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 1)
    server.reset()
    s3fs.S3FileSystem.clear_instance_cache()
    store = s3fs.S3FileSystem()
    store.mkdir("bucket")
    server.reset()
    yield server
    server.reset()
    store.rm("bucket", recursive=True)


@pytest.fixture
def local(tmp_path: Path) -> Path:
    """A `local_output` with two whole checkpoints, `final_output` and a log."""
    output = tmp_path / "output"
    for step in (5, 10):
        files = {
            "model.safetensors": f"weights {step}".encode(),
            "sub/rng.pth": b"rng",
            "training_args.bin": b"token",
        }
        whole_folder(output / f"checkpoint-{step}", files, step=step)
    whole_folder(output / "final_output", {"model.safetensors": b"final", "run.json": b"{}"})
    (output / "runs").mkdir()
    (output / "runs/events.log").write_text("loss 1")
    return output


def quick(local: Path, *paths: str) -> OutputSync:
    return OutputSync(str(local), list(paths), attempts=6, backoff_seconds=0.01)


def tree(folder: Path) -> dict[str, bytes]:
    """Name -> content of what must be mirrored from, or lies at, a local folder."""
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    return {n: p.read_bytes() for n, p in files.items() if n != INDEX and p.name != "training_args.bin"}


def remote(url: str) -> dict[str, bytes]:
    """Name -> content of what lies at `url`, without the index."""
    fs, root = fsspec.core.url_to_fs(url)
    fs.invalidate_cache()
    return {p[len(root) + 1 :]: fs.cat_file(p) for p in fs.find(root) if not p.endswith(INDEX)}


@pytest.fixture(params=["s3://bucket/run", "memory://run", "folder"])
def target(request: pytest.FixtureRequest, tmp_path: Path, s3: FailingProxy) -> str:
    """An output path of each kind."""
    fsspec.filesystem("memory").store.clear()
    return str(tmp_path / "mirror") if request.param == "folder" else str(request.param)


def test_copy_is_complete_and_holds_no_training_args(local: Path, target: str) -> None:
    sync = quick(local, target)
    sync.probe()
    sync.sync()
    sync.close()
    assert remote(target) == tree(local)
    assert len(tree(local)) == 10
    assert sync.failures == 0


def test_changed_file_of_the_same_size_is_copied(local: Path, target: str) -> None:
    quick(local, target).close()
    whole_folder(local / "final_output", {"model.safetensors": b"FINAL"})
    (local / "runs/events.log").write_text("loss 2")
    quick(local, target).close()
    assert remote(target) == tree(local)
    assert remote(target)["final_output/model.safetensors"] == b"FINAL"


def test_nothing_changed_writes_nothing(local: Path, s3: FailingProxy) -> None:
    quick(local, "s3://bucket/run").close()
    s3.reset()
    quick(local, "s3://bucket/run").close()
    assert [request for request in s3.requests if request[0] != "GET" and request[0] != "HEAD"] == []


def test_manifest_arrives_last_and_goes_first(local: Path, s3: FailingProxy) -> None:
    quick(local, "s3://bucket/run").close()
    shutil.rmtree(local / "checkpoint-5")
    whole_folder(local / "checkpoint-10", {"model.safetensors": b"others"}, step=10)
    first, s3.requests = s3.requests, []
    quick(local, "s3://bucket/run").close()
    written = [path.split("?")[0] for method, path in first if method == "PUT"]
    for folder in ("checkpoint-5", "checkpoint-10", "final_output"):
        files = [path for path in written if f"/{folder}/" in path]
        assert len(files) == 3 and files[-1].endswith(MANIFEST)
    changes = [
        (method, path.split("?")[0].rsplit("/", 1)[-1])
        for method, path in s3.requests
        if method in ("PUT", "DELETE") and "/checkpoint-10/" in path
    ]
    assert changes[0] == ("DELETE", MANIFEST) and changes[-1] == ("PUT", MANIFEST)
    gone = [path for method, path in s3.requests if method == "DELETE" and "/checkpoint-5/" in path]
    assert len(gone) == 3 and gone[0].endswith(MANIFEST)


def test_only_what_we_wrote_is_deleted(local: Path, target: str) -> None:
    fs, root = fsspec.core.url_to_fs(target)
    foreign = ["notes.txt", "checkpoint-5/mine.txt", "checkpoint-1/theirs.bin", "final_output/mine.txt"]
    quick(local, target).close()
    for name in foreign:
        fs.makedirs(f"{root}/{name}".rsplit("/", 1)[0], exist_ok=True) if "s3" not in target else None
        fs.pipe_file(f"{root}/{name}", b"foreign")
    shutil.rmtree(local / "checkpoint-5")
    whole_folder(local / "checkpoint-15", {"model.safetensors": b"15"}, step=15)
    shutil.rmtree(local / "final_output")
    whole_folder(local / "final_output", {"adapter.safetensors": b"other"})
    quick(local, target).close()
    assert remote(target) == tree(local) | dict.fromkeys(foreign, b"foreign")


def test_damaged_links_and_unfinished_are_not_copied(local: Path, target: str, tmp_path: Path) -> None:
    expected = tree(local)
    (tmp_path / "secret").write_text("x")
    (local / "link").symlink_to(tmp_path / "secret")
    (local / "linked").symlink_to(tmp_path)
    for name in ("checkpoint-15", "checkpoint-3.damaged", "checkpoint-20.ahead", ".final_output.tmp"):
        (local / name).mkdir()
        (local / name / "model.safetensors").write_bytes(b"half")
    whole_folder(local / "checkpoint-30", {"model.safetensors": b"x"}, step=30)
    (local / "checkpoint-30/model.safetensors").unlink()
    (local / "checkpoint-30/model.safetensors").symlink_to(tmp_path / "secret")
    (local / "checkpoint-40").symlink_to(whole_folder(tmp_path / "elsewhere", {"a": b"x"}, step=40))
    (local / "runs/linked").symlink_to(tmp_path)
    quick(local, target).close()
    assert remote(target) == expected


def test_locally_damaged_checkpoint_never_gets_a_manifest_there(local: Path, target: str) -> None:
    (local / "checkpoint-10/model.safetensors").write_bytes(b"WEIGHTS 10")
    with pytest.raises(CheckpointError, match="checkpoint-10/manifest.json"):
        quick(local, target).close()
    assert not [name for name in remote(target) if name.startswith("checkpoint-10/manifest")]
    assert "checkpoint-5/manifest.json" in remote(target)


def test_file_lost_or_changed_there_is_written_again(local: Path, target: str) -> None:
    quick(local, target).close()
    fs, root = fsspec.core.url_to_fs(target)
    fs.rm_file(f"{root}/checkpoint-5/model.safetensors")
    fs.pipe_file(f"{root}/checkpoint-10/model.safetensors", b"Weights 10")  # the same size
    quick(local, target).close()
    assert remote(target) == tree(local)


@pytest.mark.parametrize("seed", range(3 * REPEAT))
def test_one_request_in_ten_fails_and_all_arrives(local: Path, s3: FailingProxy, seed: int) -> None:
    s3.fails = fail_at_random(0.1, seed)
    sync = quick(local, f"s3://bucket/{seed}")
    sync.probe()
    sync.close()
    assert s3.num_failed > 0
    s3.reset()
    assert remote(f"s3://bucket/{seed}") == tree(local)


def test_path_down_at_the_end_is_an_error_that_lists_what_is_missing(local: Path, s3: FailingProxy) -> None:
    s3.fails = lambda method, path: 503
    sync = quick(local, "s3://bucket/run")
    sync.sync()
    with pytest.raises(CheckpointError, match=r"s3://bucket/run: .*checkpoint-10, checkpoint-5, final_output"):
        sync.close()
    assert sync.failures >= 1
    s3.reset()
    quick(local, "s3://bucket/run").close()  # the command again
    assert remote("s3://bucket/run") == tree(local)


def test_one_path_forbidden_leaves_the_other_complete(local: Path, s3: FailingProxy) -> None:
    s3.fails = lambda method, path: 403 if "/closed/" in path and method == "PUT" else None
    with pytest.raises(CheckpointError, match="s3://bucket/closed") as caught:
        quick(local, "s3://bucket/closed", "s3://bucket/open").close()
    assert "s3://bucket/open" not in str(caught.value)
    assert remote("s3://bucket/open") == tree(local)


class DownInTheMiddle:
    """A mirror of a path that is down when the second checkpoint is copied, and up again at the third."""

    uploading = None

    def __init__(self, sync: OutputSync, s3: FailingProxy) -> None:
        self.copies = sync
        self.s3 = s3
        self.num_asked = 0

    def sync(self) -> None:
        self.num_asked += 1
        is_down = self.num_asked == 2
        self.s3.fails = lambda method, path: 500 if is_down else None
        failures = self.copies.failures
        self.copies.sync()
        wait_until(lambda: not is_down or self.copies.failures > failures)


def test_training_goes_on_while_the_path_is_down_for_a_while(
    tmp_path: Path, s3: FailingProxy, caplog: pytest.LogCaptureFixture
) -> None:
    output = tmp_path / "output"
    sync = OutputSync(str(output), ["s3://bucket/run"], attempts=1)
    callback = CheckpointCallback(mirror=DownInTheMiddle(sync, s3))
    with caplog.at_level(logging.WARNING):
        tiny_trainer(output, callbacks=[callback]).train()
        sync.close()
    assert "Training goes on" in caplog.text and sync.failures >= 1
    assert remote("s3://bucket/run") == tree(output)


def test_bucket_that_is_not_there_is_told_at_the_start(local: Path, s3: FailingProxy) -> None:
    with pytest.raises(CheckpointError, match=r"s3://absent/run` cannot be written \(FileNotFoundError"):
        quick(local, "s3://absent/run").probe()


@pytest.mark.parametrize(("method", "step"), [("PUT", "written"), ("GET", "read"), ("DELETE", "deleted")])
def test_path_without_a_permission_is_told_at_the_start(local: Path, s3: FailingProxy, method: str, step: str) -> None:
    s3.fails = lambda given, path: 403 if given == method else None
    with pytest.raises(CheckpointError, match=f"s3://bucket/run` cannot be {step} .PermissionError"):
        quick(local, "s3://bucket/run").probe()


def test_probe_leaves_nothing(local: Path, target: str) -> None:
    quick(local, target).probe()
    assert remote(target) == {}


@pytest.mark.parametrize("path", ["output", "output/copy", ".", "link/copy", "output/../output"])
def test_path_that_overlaps_local_output_is_refused(local: Path, tmp_path: Path, path: str) -> None:
    (tmp_path / "link").symlink_to(local)
    for url in (str(tmp_path / path), f"file://{tmp_path / path}"):
        with pytest.raises(ConfigError, match="same place"):
            quick(local, url)


def test_paths_that_overlap_one_another_are_refused(local: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="same place"):
        quick(local, str(tmp_path / "a"), str(tmp_path / "a/b"))
    with pytest.raises(ConfigError, match="same place"):
        quick(local, "memory://a", "memory://a")
    quick(local, str(tmp_path / "a"), str(tmp_path / "ab"), "memory://output")


@pytest.mark.parametrize(
    ("url", "error", "text"),
    [
        ("nowhere://x", ConfigError, "nowhere://x"),
        ("sftp://me:secret@host/x", ConfigError, "host"),
        ("dask://x/y", MissingExtraError, "not installed"),
    ],
)
def test_url_that_cannot_be_used_is_refused(local: Path, url: str, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text) as caught:
        quick(local, url)
    assert "secret" not in str(caught.value)


def test_empty_machine_restores_the_newest_whole_checkpoint(local: Path, target: str, tmp_path: Path) -> None:
    quick(local, target).close()
    empty = tmp_path / "elsewhere/output"
    assert quick(empty, target).restore() == str(empty / "checkpoint-10")
    assert os.listdir(empty) == ["checkpoint-10"]
    assert tree(empty / "checkpoint-10") == tree(local / "checkpoint-10")
    assert find_damage(str(empty / "checkpoint-10")) is None


def test_damaged_copy_is_passed_over(local: Path, target: str, tmp_path: Path) -> None:
    quick(local, target).close()
    fs, root = fsspec.core.url_to_fs(target)
    fs.pipe_file(f"{root}/checkpoint-10/model.safetensors", b"Weights 10")
    assert quick(tmp_path / "new", target).restore() == str(tmp_path / "new/checkpoint-5")
    assert os.listdir(tmp_path / "new") == ["checkpoint-5"]


def test_restore_prefers_the_path_with_the_newer_checkpoint(local: Path, tmp_path: Path) -> None:
    quick(local, str(tmp_path / "a")).close()
    whole_folder(local / "checkpoint-15", {"model.safetensors": b"15"}, step=15)
    quick(local, str(tmp_path / "b")).close()
    restored = quick(tmp_path / "new", str(tmp_path / "a"), str(tmp_path / "b")).restore()
    assert restored == str(tmp_path / "new/checkpoint-15")


def test_restore_leaves_the_checkpoints_of_an_abandoned_branch(local: Path, tmp_path: Path) -> None:
    quick(local, str(tmp_path / "a")).close()
    os.rename(local / "checkpoint-10", local / "checkpoint-10.ahead")  # the run went on from 5
    whole_folder(local / "checkpoint-7", {"model.safetensors": b"7"}, step=7)
    quick(local, str(tmp_path / "a")).close()
    assert quick(tmp_path / "new", str(tmp_path / "a")).restore() == str(tmp_path / "new/checkpoint-7")


def test_restore_keeps_what_is_whole_here(local: Path, target: str) -> None:
    quick(local, target).close()
    shutil.rmtree(local / "checkpoint-10")
    assert quick(local, target).restore() == str(local / "checkpoint-5")


def test_restore_from_nothing_is_none_and_from_a_path_down_an_error(tmp_path: Path, s3: FailingProxy) -> None:
    assert quick(tmp_path / "new").restore() is None
    assert quick(tmp_path / "new", "s3://bucket/run", str(tmp_path / "a")).restore() is None
    s3.fails = lambda method, path: 503
    with pytest.raises(CheckpointError, match="s3://bucket/run` cannot be read"):
        quick(tmp_path / "new", "s3://bucket/run").restore()


def test_run_goes_on_identical_on_an_empty_machine(tmp_path: Path, s3: FailingProxy) -> None:
    unbroken = train(tmp_path / "unbroken")
    first = quick(tmp_path / "first", "s3://bucket/run")
    trainer = tiny_trainer(tmp_path / "first", callbacks=[CheckpointCallback(mirror=first)])
    with first:
        trainer.train()
    shutil.rmtree(tmp_path / "first/checkpoint-12")
    quick(tmp_path / "first", "s3://bucket/run").close()
    second = quick(tmp_path / "second", "s3://bucket/run")
    checkpoint = second.restore()
    assert checkpoint == str(tmp_path / "second/checkpoint-9")
    trainer = tiny_trainer(tmp_path / "second", callbacks=[CheckpointCallback(mirror=second)])
    trainer.train(checkpoint)
    second.close()
    assert weights_digest(trainer.model) == unbroken
    assert remote("s3://bucket/run") == tree(tmp_path / "second")


def index_reads(s3: FailingProxy) -> int:
    return len([1 for method, path in s3.requests if path.endswith(INDEX) and method == "HEAD"])


def test_many_requests_while_one_copy_runs_make_one_more(local: Path, s3: FailingProxy) -> None:
    sync = quick(local, "s3://bucket/run")
    is_open = threading.Event()
    s3.fails = lambda method, path: None if is_open.wait(30) else 500
    sync.sync()
    wait_until(lambda: bool(s3.requests))
    for _ in range(5):
        sync.sync()
    is_open.set()
    wait_until(lambda: index_reads(s3) == 2)
    sync.close()
    assert index_reads(s3) == 4  # two copies, and at the end one to copy and one to verify


def test_checkpoint_rotated_while_it_is_copied_does_not_stop_the_rest(local: Path, s3: FailingProxy) -> None:
    def rotates(method: str, path: str) -> None:
        if method == "PUT" and "/checkpoint-10/model" in path:
            shutil.rmtree(local / "checkpoint-5", ignore_errors=True)

    s3.fails = rotates
    sync = quick(local, "s3://bucket/run")
    sync.sync()
    wait_until(lambda: ("PUT", "/bucket/run/runs/events.log") in s3.requests)
    sync.close()
    assert sync.failures == 0
    assert remote("s3://bucket/run") == tree(local)


def test_error_in_training_still_copies_what_is_whole(local: Path, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="broken"), quick(local, str(tmp_path / "mirror")) as sync:
        sync.sync()
        raise RuntimeError("broken")
    assert tree(tmp_path / "mirror") == tree(local)


def test_error_before_training_copies_nothing(local: Path, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="broken"), quick(local, str(tmp_path / "mirror")):
        raise RuntimeError("broken")
    assert not (tmp_path / "mirror").exists()


def test_file_url_is_a_folder(local: Path, tmp_path: Path) -> None:
    quick(local, f"file://{tmp_path}/a folder").close()
    assert tree(tmp_path / "a folder") == tree(local)


def test_index_that_cannot_be_read_copies_all_again(local: Path, target: str) -> None:
    quick(local, target).close()
    fs, root = fsspec.core.url_to_fs(target)
    fs.pipe_file(f"{root}/{INDEX}", b"{")
    quick(local, target).close()
    assert remote(target) == tree(local)
    assert set(json.loads(fs.cat_file(f"{root}/{INDEX}"))["files"]) == set(tree(local))


def replace_final_output(local: Path, mirror: str) -> None:
    for number in range(15):
        shutil.rmtree(local / "final_output")
        files = {f"{name}.bin": f"{number} {name}".encode() * 1000 for name in range(number % 5 + 1)}
        whole_folder(local / "final_output", files)
        quick(local, mirror).close()


def test_watcher_never_sees_a_torn_final_output_at_a_local_path(local: Path, tmp_path: Path) -> None:
    seen = []
    with running_process(replace_final_output, local, str(tmp_path / "mirror")) as process:
        while process.is_alive():
            seen.append(watch(tmp_path / "mirror/final_output"))
        assert process.exitcode == 0
    assert set(seen) - {None} == {"whole"}
    assert seen.count("whole") > 15
