"""Where the data set goes: what is accepted, and that it is old-whole, absent or new-whole at every moment."""

import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import fsspec
import pytest
from prep_helpers import make_config, settings, some_rows, write_jsonl

from llm.errors import ConfigError, DataError
from llm.training.prep.target import Target, open_targets, staged

pytest_plugins = ("prep_fixtures",)

NUM_FILES = 6  # data and what lies beside it


class Killed(BaseException):
    """Stands for SIGKILL: what follows does not happen."""


def opened(folder: Path, target: str | Path, **changes: Any) -> Target:
    source = write_jsonl(folder / "rows.jsonl", some_rows(2))
    return open_targets(make_config(folder, settings(source, folder, target, **changes)))[0]


def fill(target: Target, word: str) -> None:
    """What a run writes: data, ledger, config, report, manifest, each holding `word`."""
    main = Path(target.path)
    if target.is_folder:
        main.mkdir(parents=True)
        main = main / "data-00000-of-00001.arrow"
    for path in (main, *beside(target)):
        path.write_text(word)


def beside(target: Target) -> list[Path]:
    paths = (target.ledger_path, target.config_path, target.report_path, target.report_page_path, target.manifest_path)
    return list(map(Path, paths))


def words(target: Target) -> list[str | None]:
    """What data, ledger, config, report and manifest hold; None where one is absent."""
    main = Path(target.path)
    main = main / "data-00000-of-00001.arrow" if target.is_folder else main
    return [path.read_text() if path.exists() else None for path in (main, *beside(target))]


def run(target: Target, word: str) -> None:
    with staged(target) as (_, staging):
        fill(staging, word)


# --- what is accepted ------------------------------------------------------------------------------------------------


def test_folder_holds_its_ledger_report_and_manifest_and_a_file_has_them_beside() -> None:
    folder, file = Target(path="a/train", path_key="dataset_path"), Target(path="a/b.csv", path_key="path_or_buf")
    assert (folder.ledger_path, folder.manifest_path) == ("a/train/ledger.parquet", "a/train/manifest.json")
    assert (file.ledger_path, file.manifest_path) == ("a/b.csv.ledger.parquet", "a/b.csv.manifest.json")
    assert (folder.config_path, file.config_path) == ("a/train/dataprep.yaml", "a/b.csv.dataprep.yaml")
    assert (folder.report_path, folder.report_page_path) == ("a/train/report.json", "a/train/report.html")
    assert (file.report_path, file.report_page_path) == ("a/b.csv.report.json", "a/b.csv.report.html")
    assert (folder.is_folder, file.is_folder) == (True, False)


def test_path_may_be_below_home_or_a_file_url_or_end_in_a_slash(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert opened(tmp_path, "~/out").path == f"{tmp_path}/out"
    assert opened(tmp_path, f"file://{tmp_path}/out").path == f"{tmp_path}/out"
    assert opened(tmp_path, f"{tmp_path}/out/").path == f"{tmp_path}/out"


BAD_WRITERS = {
    "no path": ({"method": "save_to_disk"}, r"kwargs\.dataset_path: missing, .* `dataset_path: output/train`"),
    "no file": ({"method": "to_csv"}, r"kwargs\.path_or_buf: missing, .* `path_or_buf: output/train\.csv`"),
    "other key": ({"method": "to_csv", "kwargs": {"dataset_path": "a.csv"}}, r"kwargs\.path_or_buf: missing"),
    "null": ({"method": "save_to_disk", "kwargs": {"dataset_path": None}}, r"kwargs\.dataset_path: missing, or not"),
    "ending": ({"method": "to_parquet", "kwargs": {"path_or_buf": "a.csv"}}, "file that ends in `.parquet`; `a.csv`"),
    "no ending": ({"method": "to_json", "kwargs": {"path_or_buf": "a"}}, "ends in `.jsonl` or `.json`; `a`"),
    "folder": ({"method": "save_to_disk", "kwargs": {"dataset_path": "a.parquet"}}, "writes a folder"),
    "here": ({"method": "save_to_disk", "kwargs": {"dataset_path": "."}}, "cannot make `.`"),
    "up": ({"method": "save_to_disk", "kwargs": {"dataset_path": ".."}}, "cannot make `..`"),
    "scheme": ({"method": "save_to_disk", "kwargs": {"dataset_path": "nope://a/b"}}, "cannot reach `nope://a/b`"),
    "below a file": ({"method": "save_to_disk", "kwargs": {"dataset_path": "rows.jsonl/a"}}, "not a folder that you"),
    "source": ({"method": "to_json", "kwargs": {"path_or_buf": "rows.jsonl"}}, "`rows.jsonl` is the source itself"),
}


@pytest.mark.parametrize("name", BAD_WRITERS)
def test_target_that_cannot_be_is_a_config_error(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    writer, text = BAD_WRITERS[name]
    with pytest.raises(ConfigError, match=f"dataset_writer_config.*{text}"):
        opened(tmp_path, "out", dataset_writer_config=writer, overwrite=True)
    assert sorted(os.listdir(tmp_path)) == ["dataprep.yaml", "rows.jsonl"]


@pytest.mark.parametrize("name", ["out", "out.parquet"])
def test_existing_target_needs_overwrite(name: str, tmp_path: Path) -> None:
    run(opened(tmp_path, tmp_path / name), "old")
    with pytest.raises(ConfigError, match="exists already.*overwrite: true"):
        opened(tmp_path, tmp_path / name)
    run(opened(tmp_path, tmp_path / name, overwrite=True), "new")


def test_empty_folder_is_no_existing_target(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    target = opened(tmp_path, tmp_path / "out")
    run(target, "new")
    assert words(target) == ["new"] * NUM_FILES


@pytest.mark.parametrize("name", ["home", "out.parquet"])
def test_folder_of_something_else_is_never_overwritten(name: str, tmp_path: Path) -> None:
    (tmp_path / name).mkdir()
    (tmp_path / name / "thesis.txt").write_text("years of work")
    with pytest.raises(ConfigError, match="something else than a data set"):
        opened(tmp_path, tmp_path / name, overwrite=True)


# --- every moment ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["out", "out.parquet"])
@pytest.mark.parametrize("has_old", [False, True])
def test_error_in_the_middle_leaves_the_target_as_it_was(name: str, has_old: bool, tmp_path: Path) -> None:
    target = opened(tmp_path, tmp_path / name)
    if has_old:
        run(target, "old")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(DataError, match="row 1500"), staged(target) as (folder, staging):
        fill(staging, "new")
        (folder / "spill.arrow").write_text("x")
        raise DataError("row 1500")
    assert words(target) == ["old" if has_old else None] * NUM_FILES
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("name", ["out", "out.parquet"])
@pytest.mark.parametrize("has_old", [False, True])
def test_kill_before_any_move_is_put_right_and_never_mixes(
    name: str, has_old: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Data, ledger, config, report and manifest at every moment of `_replace`, and what the next run makes of it."""
    moves = (1 if name == "out" else NUM_FILES) * (2 if has_old else 1)
    states = []
    for number in range(moves + 1):
        folder = tmp_path / str(number)
        folder.mkdir()
        target = opened(folder, folder / name)
        if has_old:
            run(target, "old")
        kill_before_move(target, number, monkeypatch)
        states.append(words(target))
        again = opened(folder, folder / name, overwrite=has_old or number == moves)  # puts back
        whole = ["old"] * NUM_FILES if has_old else [None] * NUM_FILES
        assert words(again) == (["new"] * NUM_FILES if number == moves else whole)
        run(again, "newer") if number < moves else None
    for state in states:
        assert len({word for word in state if word}) <= 1 or state[-1] is None, "old data beside a new manifest"
        assert state[-1] is None or len(set(state)) == 1, "a manifest says whole, and something is missing"


def kill_before_move(target: Target, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that ends before its move `number`, or after the last one, with nothing tidied up."""
    rename, left = Path.rename, [number]

    def rename_or_die(path: Path, to: Path) -> Path:
        left[0] -= 1
        if left[0] < 0:
            raise Killed
        return rename(path, to)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", rename_or_die)
        patch.setattr("llm.training.prep.target._put_back", lambda target: None)
        patch.setattr("llm.training.prep.target._remove_work_folder", remove_at_start(target))
        with suppress(Killed):
            run(target, "new")


def remove_at_start(target: Target) -> Any:
    """The old work folder goes when a run starts; when it ends, the kill has come first."""
    from llm.training.prep.target import _remove_work_folder

    calls: list[Target] = []

    def remove(target: Target) -> None:
        if not calls:
            _remove_work_folder(target)
        calls.append(target)

    return remove


def test_kill_while_the_work_folder_is_removed_never_costs_the_old_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = opened(tmp_path, tmp_path / "out.parquet")
    run(target, "old")

    def remove_one_and_die(folder: Path, **_: Any) -> None:
        (folder / "out.parquet").unlink(missing_ok=True)
        if folder.exists():
            raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed), staged(target) as (_, staging):
        fill(staging, "new")
        patch.setattr("shutil.rmtree", remove_one_and_die)
        raise DataError("row 1500")
    assert words(opened(tmp_path, tmp_path / "out.parquet", overwrite=True)) == ["old"] * NUM_FILES


def test_writer_that_wrote_nothing_is_an_error_and_the_old_stays(tmp_path: Path) -> None:
    target = opened(tmp_path, tmp_path / "out")
    run(target, "old")
    with pytest.raises(DataError, match="wrote nothing to its `dataset_path`"), staged(target):
        pass
    assert words(target) == ["old"] * NUM_FILES


def test_full_disk_is_a_data_error_that_names_the_target(tmp_path: Path) -> None:
    target = opened(tmp_path, tmp_path / "out")
    with pytest.raises(DataError, match=r"cannot prepare `.*/out`: .*No space left"), staged(target):
        raise OSError(28, "No space left on device")
    assert not Path(target.path).exists()


# --- an object store -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["out", "out.parquet"])
def test_s3_manifest_leaves_before_the_first_upload_and_arrives_last(
    name: str, tmp_path: Path, s3: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = opened(tmp_path, f"s3://prep-tests/order/{name}")
    run(target, "old")
    done: list[str] = []
    store = fsspec.filesystem("s3")
    for method in ("put_file", "rm_file", "pipe_file"):
        monkeypatch.setattr(store, method, recorded(getattr(store, method), method, done))
    run(target, "new")
    manifest, marker = target.manifest_path.removeprefix("s3://"), target.marker_path.removeprefix("s3://")
    assert done[:2] == [f"pipe_file {marker}", f"rm_file {manifest}"]
    assert done[-2:] == [f"put_file {manifest}", f"rm_file {marker}"]
    assert len(done) == NUM_FILES + 3


def recorded(method: Any, name: str, done: list[str]) -> Any:
    def call(*arguments: Any) -> Any:
        path = arguments[1] if name == "put_file" else arguments[0]
        done.append(f"{name} {path.removeprefix('s3://')}")
        return method(*arguments)

    return call


@pytest.mark.parametrize("name", ["out", "out.parquet"])
def test_s3_upload_that_was_killed_is_incomplete_and_can_be_run_again(
    name: str, tmp_path: Path, s3: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = fsspec.filesystem("s3")
    for number in range(NUM_FILES):  # so many of them arrive
        target = opened(tmp_path, f"s3://prep-tests/killed/{number}/{name}")
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(store, "put_file", put_or_die(store.put_file, number))
            run(target, "new")
        assert not store.exists(target.manifest_path)
        run(opened(tmp_path, target.path), "newer")  # without `overwrite`: what lies there is no data set
        assert store.cat_file(target.manifest_path) == b"newer"
        assert not store.exists(target.marker_path)
        with pytest.raises(ConfigError, match="exists already"):
            opened(tmp_path, target.path)


def put_or_die(put: Any, number: int) -> Any:
    left = [number]

    def call(*arguments: Any) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise Killed
        return put(*arguments)

    return call


def test_s3_error_before_the_upload_leaves_the_old_and_no_marker(tmp_path: Path, s3: str) -> None:
    target = opened(tmp_path, "s3://prep-tests/error/out")
    run(target, "old")
    with pytest.raises(DataError, match="row 7"), staged(target) as (_, staging):
        fill(staging, "new")
        raise DataError("row 7")
    store = fsspec.filesystem("s3")
    store.invalidate_cache()
    assert {store.cat_file(path) for path in store.find("prep-tests/error/out")} == {b"old"}
    assert len(store.find("prep-tests/error/out")) == NUM_FILES


def test_s3_bucket_that_is_not_there_is_an_error_before_the_work(tmp_path: Path, s3: str) -> None:
    target = opened(tmp_path, "s3://no-such-bucket/out")
    with pytest.raises(DataError, match="cannot prepare `s3://no-such-bucket/out`"), staged(target):
        pytest.fail("the work began")
