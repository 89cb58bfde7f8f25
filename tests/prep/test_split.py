"""Rows held out for evaluation: chosen by prompt, each part a whole data set, old or new at every moment."""

import hashlib
import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from prep_helpers import make_config, settings, write_jsonl

from llm.errors import ConfigError, DataError
from llm.training.config import DataPrepConfig, DatasetConfig
from llm.training.dataprep import prepare
from llm.training.prep.dataset import load_blocks
from llm.training.prep.duplicates import hash_examples
from llm.training.prep.manifest import manifest_path, read_manifest
from llm.training.prep.split import split_examples
from llm.training.prep.store import SCHEMA, Examples
from llm.training.prep.target import Target, open_targets

pytest_plugins = ("prep_fixtures",)

Rows = list[dict[str, Any]]


def rows_of_prompts(number: int = 1200, prompts: int = 400) -> Rows:
    """Each prompt has several answers, far apart."""
    return [{"input": f"{n % prompts} " + "dog " * (n % 7), "response": f"It is {n}."} for n in range(number)]


def config_of(folder: Path, model: Path, rows: Rows, name: str = "train", **changes: Any) -> DataPrepConfig:
    source = write_jsonl(folder / "rows.jsonl", rows)
    return make_config(folder, settings(source, model, name if "://" in name else folder / name, **changes))


def ledger_at(path: Path) -> Rows:
    found: Rows = pq.read_table(path / "ledger.parquet").to_pylist()
    return found


def blocks_at(path: str | Path) -> Rows:
    found: Rows = load_blocks(DatasetConfig.model_validate(str(path)), key="inspect").to_list()
    return found


def rows_in(path: Path) -> list[int]:
    return sorted(row for block in blocks_at(path) for row in block["example_rows"])


def examples_of(prompts: list[int], dropped: tuple[int, ...] = ()) -> Examples:
    """An example of each prompt, all answers different."""
    entries = [{"row": n, "text": "", "input_ids": [p, 0, n], "trained": [2, 3]} for n, p in enumerate(prompts)]
    table = pa.Table.from_pylist(entries, SCHEMA)
    outcomes = ["kept"] * len(prompts)
    return Examples(
        table=table,
        places=np.arange(len(prompts)),
        lengths=np.full(len(prompts), 3),
        hashes=hash_examples(table.to_batches()[0]),
        ledger=pa.table({"row": range(len(prompts)), "outcome": pa.array(outcomes, pa.string())}),
        samples=[],
        source_fingerprint="",
    )


def held_out(prompts: list[int], **keys: Any) -> set[int]:
    """The numbers of the examples that are held out."""
    config = DataPrepConfig.model_validate(settings("rows.jsonl", Path("m"), "out", **keys))
    training, others = split_examples(examples_of(prompts), config)
    assert sorted([*training.places, *others.places]) == list(range(len(prompts)))
    return {*others.places.tolist()}


# --- which rows ------------------------------------------------------------------------------------------------------


def test_examples_of_a_prompt_stay_together_and_about_the_fraction_is_held_out() -> None:
    prompts = [n % 5000 for n in range(10_000)]
    found = held_out(prompts, eval_fraction=0.1)
    assert {n for n in range(10_000) if prompts[n] in {prompts[m] for m in found}} == found
    assert abs(len(found) - 1000) < 4 * (10_000 * 0.1 * 0.9 * 2) ** 0.5


def test_rows_that_are_added_leave_the_others_where_they_were() -> None:
    few = held_out(list(range(1000)), eval_fraction=0.2)
    assert held_out(list(range(3000)), eval_fraction=0.2) & {*range(1000)} == few
    assert held_out(list(range(1000))[::-1], eval_fraction=0.2) == {999 - n for n in few}
    assert held_out(list(range(1000)), eval_fraction=0.1) < few


def test_seed_chooses_other_rows_and_none_is_zero() -> None:
    found = [held_out(list(range(1000)), eval_fraction=0.2, **seed) for seed in ({}, {"seed": 0}, {"seed": 1})]
    assert found[0] == found[1]
    assert 10 < len(found[0] & found[2]) < 80  # 40 of 1,000 are in both by chance


@pytest.mark.parametrize("wanted", [1, 99, 100])
def test_eval_rows_are_exact_where_every_prompt_is_another(wanted: int) -> None:
    assert len(held_out(list(range(300)), eval_rows=wanted)) == wanted


def test_eval_rows_of_whole_prompts_are_the_nearest_count() -> None:
    prompts = [n // 10 for n in range(300)]
    assert [len(held_out(prompts, eval_rows=wanted)) for wanted in (1, 14, 16, 100, 286)] == [10, 10, 20, 100, 290]
    assert held_out(prompts, eval_rows=50) < held_out(prompts, eval_rows=100)


@pytest.mark.parametrize(
    ("prompts", "keys", "text"),
    [
        ([*range(20)], {"eval_fraction": 0.0001}, r"eval_fraction: 0.0001 of 20 rows holds out none. Write a larger"),
        ([*range(20)], {"eval_rows": 20}, r"eval_rows: 20 leaves no row to train on: there are 20 rows of 20 prompts"),
        (
            [7] * 20,
            {"eval_rows": 2},
            r"eval_rows: 2 leaves no row .* 20 rows of 1 prompts, and rows of the same prompt",
        ),
    ],
)
def test_split_with_an_empty_side_is_a_data_error(prompts: list[int], keys: dict[str, Any], text: str) -> None:
    with pytest.raises(DataError, match=text):
        held_out(prompts, **keys)


def test_hash_of_a_prompt_is_the_same_in_every_version() -> None:
    """Ledgers of different versions are compared: these numbers may never change."""
    numbers = examples_of([5, 6]).hashes.prompt_numbers()
    ids = b"\x05\0\0\0" + b"\0\0\0\0"  # 5, 0
    expected = hashlib.blake2b(ids, digest_size=16).digest()[:8]
    assert numbers.tolist()[0] == int.from_bytes(expected, "little", signed=True) == -3064411830072732283


# --- two data sets ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{"eval_fraction": 0.1}, {"eval_rows": 100, "seed": 3, "share_prefixes": True}])
def test_each_part_is_the_data_set_of_its_rows(changes: dict[str, Any], tmp_path: Path, model: Path) -> None:
    rows = rows_of_prompts()
    prepare(config_of(tmp_path, model, rows, **changes))
    held = rows_in(tmp_path / "train_eval")
    assert sorted([*rows_in(tmp_path / "train"), *held]) == list(range(1200))
    plain = {name: value for name, value in changes.items() if not name.startswith("eval")}
    for name, numbers in (("train", rows_in(tmp_path / "train")), ("train_eval", held)):
        alone = [rows[number] for number in numbers]
        prepare(config_of(tmp_path, model, alone, "alone", overwrite=True, **plain))
        blocks, others = blocks_at(tmp_path / name), blocks_at(tmp_path / "alone")
        assert len(blocks) > 5
        for block, other in zip(blocks, others, strict=True):
            assert block.pop("example_rows") == [numbers[row] for row in other.pop("example_rows")]
            assert block == other


def test_ledgers_and_manifests_of_both_parts_add_up(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = rows_of_prompts()
    rows[5] = rows[4]
    rows[6] = rows[6] | {"response": " "}
    manifest = prepare(config_of(tmp_path, model, rows, eval_rows=100, dedupe=True))
    told = capsys.readouterr().err
    evaluation = read_manifest(str(tmp_path / "train_eval"))
    assert read_manifest(str(tmp_path / "train")) == manifest
    whole, own = ledger_at(tmp_path / "train"), ledger_at(tmp_path / "train_eval")
    assert [entry["row"] for entry in whole] == list(range(1200))
    assert [entry for entry in whole if entry["split"] == "eval"] == own
    assert [entry["reason"] for entry in whole if entry["split"] is None] == ["duplicate", "empty_response"]
    assert {entry["prompt_hash"] for entry in own} & {e["prompt_hash"] for e in whole if e["split"] == "train"} == set()
    for name, split in (("train", "train"), ("train_eval", "eval")):
        blocks = blocks_at(tmp_path / name)
        for entry in whole:
            assert entry["split"] != split or entry["row"] in blocks[entry["block"]]["example_rows"]
        report = json.loads((tmp_path / name / "report.json").read_text())
        assert report["counts"] == (manifest if split == "train" else evaluation).counts
        assert report["lengths"]["total"]["rows"] == report["counts"]["rows_kept"]
    counts, held = manifest.counts, len(own)
    assert (counts["rows_read"], counts["rows_held_out"]) == (1200, held)
    assert counts["rows_kept"] + held + 2 == 1200 and abs(held - 100) < 3
    assert (evaluation.counts["rows_read"], evaluation.counts["rows_kept"]) == (held, held)
    facts, fingerprint = manifest.source["split"], evaluation.source["split"]["fingerprint"]
    assert facts == {"name": "train", "held_out": {"rows": held, "fingerprint": fingerprint}}
    assert f"eval_dataset_config: {tmp_path}/train_eval" in told and "held out" in told
    assert f"{held} held out for evaluation" in (tmp_path / "train" / "report.html").read_text()


@pytest.mark.parametrize("name", ["train", "train.parquet"])
def test_split_prepared_again_is_the_same_bytes(name: str, tmp_path: Path, model: Path) -> None:
    found = []
    for _ in range(2):
        prepare(config_of(tmp_path, model, rows_of_prompts(60, 20), name, eval_fraction=0.3, overwrite=True))
        paths = [path for path in sorted(tmp_path.rglob("*train*")) + sorted(tmp_path.rglob("*train*/*"))]
        found.append({path: path.read_bytes() for path in paths if path.is_file()})
    assert found[0] == found[1] and len(found[0]) >= 12


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("train", "train_eval"),
        ("out/train.parquet", "out/train_eval.parquet"),
        ("/a/b.c/train.jsonl", "/a/b.c/train_eval.jsonl"),
        ("s3://b/train", "s3://b/train_eval"),
        ("s3://b/train.csv", "s3://b/train_eval.csv"),
        ("out/v1.5", "out/v1.5_eval"),
    ],
)
def test_held_out_rows_go_beside_the_others(path: str, expected: str) -> None:
    assert Target(path=path, path_key="dataset_path").held_out == Target(path=expected, path_key="dataset_path")


@pytest.mark.parametrize("name", ["train", "train.parquet", "s3://prep-tests/refused/train"])
def test_held_out_target_that_is_there_is_refused_before_any_work(
    name: str, tmp_path: Path, model: Path, s3: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare(config_of(tmp_path, model, rows_of_prompts(20, 20), name.replace("train", "train_eval")))
    monkeypatch.setattr("llm.training.dataprep.open_encoder", lambda config: pytest.fail("the work began"))
    with pytest.raises(ConfigError, match=r"train_eval.*exists already.*`eval_fraction` or `eval_rows` holds out"):
        prepare(config_of(tmp_path, model, rows_of_prompts(20, 20), name, eval_rows=5))


# --- every moment ----------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """Stands for SIGKILL: what follows does not happen."""


def generation(path: Path) -> str | None:
    """What made the whole data set at `path`: how many rows it read; None where there is none."""
    if not Path(manifest_path(str(path))).exists():
        return None
    manifest = read_manifest(str(path))
    assert sum(len(block["example_rows"]) for block in blocks_at(path)) == manifest.counts["rows_kept"]
    return "old" if manifest.source["fingerprint"] == OLD else "new"


OLD = ""


@pytest.mark.parametrize(
    ("name", "has_old"),
    [("train", False), ("train", True), pytest.param("train.parquet", True, marks=pytest.mark.slow)],
)
def test_kill_before_any_move_leaves_no_training_rows_beside_older_held_out_rows(
    name: str, has_old: bool, tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / name
    evaluation = Path(Target(path=str(target), path_key="").held_out.path)
    keys: dict[str, Any] = {"eval_rows": 10}
    states = []
    for number in itertools.count():
        if has_old:
            found = prepare(config_of(tmp_path, model, rows_of_prompts(40, 40), name, overwrite=True, **keys))
            monkeypatch.setattr(f"{__name__}.OLD", found.source["fingerprint"])
        config = config_of(tmp_path, model, rows_of_prompts(60, 60), name, overwrite=has_old, **keys)
        with monkeypatch.context() as patch:
            patch.setattr(Path, "rename", dying_at(number))
            patch.setattr("llm.training.prep.target._put_back", lambda target: None)
            patch.setattr("llm.training.prep.target._remove_work_folder", lambda target: None)
            is_killed = not runs(config)
        open_targets(config.model_copy(update={"overwrite": True}))  # puts back
        states.append((generation(target), generation(evaluation)))
        if not is_killed:
            break
        prepare(config)  # the same command goes through, also without `overwrite`
        assert (generation(target), generation(evaluation)) == ("new", "new")
        if not has_old:
            for path in [*tmp_path.glob("train*")]:
                path.unlink() if path.is_file() else shutil.rmtree(path)
    before = ("old", "old") if has_old else (None, None)
    assert (states[0], states[-1]) == (before, ("new", "new"))
    assert {*states} <= {before, (before[0], "new"), ("new", "new")}
    assert (before[0], "new") in states


def dying_at(number: int) -> Any:
    """`Path.rename`, the call `number` of which never happens."""
    rename, calls = Path.rename, itertools.count()
    return lambda path, to: die_or(rename, next(calls) == number, path, to)


def die_or(rename: Any, dies: bool, path: Path, to: Path) -> Path:
    if dies:
        raise Killed
    moved: Path = rename(path, to)
    return moved


def runs(config: DataPrepConfig) -> bool:
    try:
        prepare(config)
    except Killed:
        return False
    return True


def test_s3_held_out_rows_are_whole_before_the_others_arrive(
    tmp_path: Path, model: Path, s3: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "s3://prep-tests/split/train"
    store = fsspec.filesystem("s3")
    arrived: list[str] = []
    put = store.put_file
    monkeypatch.setattr(store, "put_file", lambda path, to: (arrived.append(to), put(path, to)))
    prepare(config_of(tmp_path, model, rows_of_prompts(40, 40), name, eval_rows=10))
    assert arrived.index(f"{name}_eval/manifest.json") < min(
        number for number, path in enumerate(arrived) if path.startswith(f"{name}/")
    )
    assert arrived[-1] == f"{name}/manifest.json"
    assert len(blocks_at(f"{name}_eval")) >= 1


def test_s3_run_killed_between_both_goes_through_again_without_overwrite(
    tmp_path: Path, model: Path, s3: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "s3://prep-tests/killed-split/train"
    config = config_of(tmp_path, model, rows_of_prompts(40, 40), name, eval_rows=10)
    store = fsspec.filesystem("s3")
    put = store.put_file
    with monkeypatch.context() as patch:
        patch.setattr(store, "put_file", lambda path, to: die_or(put, to.startswith(f"{name}/"), path, to))
        assert not runs(config)
    store.invalidate_cache()
    assert (store.exists(f"{name}_eval/manifest.json"), store.exists(f"{name}/manifest.json")) == (True, False)
    assert runs(config)
    with pytest.raises(ConfigError, match="exists already"):
        prepare(config)
