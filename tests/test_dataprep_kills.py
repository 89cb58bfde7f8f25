"""SIGKILL at random times: the target is old and whole, absent, or new and whole; the next run makes the same bytes.

`LLM_TRAIN_REPEAT_FAULTS=3` kills 24 times, as the fault plan asks; the default is 8.
"""

import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import s3fs
from prep_helpers import write_jsonl
from test_dataprep import (
    Forks,
    Job,
    blocks_at,
    files_of,
    files_on,
    forks,
    job,
    model,
    server,
    some_rows,
    store,
    writer_config,
)

from llm.errors import DataError
from llm.training.prep.manifest import read_manifest

__all__ = ["forks", "job", "model", "server", "store"]  # fixtures
NUM_KILLS = 2 * int(os.environ.get("LLM_TRAIN_REPEAT_FAULTS", "1"))  # of each kind
MOST_TRIES = 10 * NUM_KILLS  # one that ends before its time is no kill
URL = "s3://dataprep-tests/train"
Files = dict[str, bytes]


class Place:
    """Where the data set goes: what is there, whole or not at all, and how to put something else there."""

    def __init__(self, job: Job, store: s3fs.S3FileSystem | None) -> None:
        self.job, self.store = job, store
        self.target: Path | str = job.target if store is None else URL

    def files(self) -> Files:
        """All files but the marker of a run; nothing without a manifest, since then nobody takes it for a data set."""
        if self.store is None:
            return files_of(self.job.target)
        found = files_on(self.store, "dataprep-tests/train")
        found.pop("/preparing", None)
        return found if "/manifest.json" in found else {}

    def put(self, saved: Path | None) -> None:
        """The data set of the folder `saved` there, or nothing."""
        if self.store is None:
            shutil.rmtree(self.job.target, ignore_errors=True)
            if saved:
                shutil.copytree(saved, self.job.target)
            return
        self.store.invalidate_cache()
        for name in self.store.find("dataprep-tests"):
            self.store.rm_file(name)
        for path in sorted(saved.iterdir()) if saved else []:
            self.store.put_file(str(path), f"dataprep-tests/train/{path.name}")


@pytest.mark.slow
@pytest.mark.parametrize("place_name", ["disk", "s3"])
@pytest.mark.parametrize("has_old", [False, True], ids=["fresh", "overwriting"])
def test_dataprep_killed_at_any_time_leaves_an_old_or_a_new_target_and_reruns_to_the_same_bytes(
    place_name: str,
    has_old: bool,
    job: Job,
    forks: Forks,
    store: s3fs.S3FileSystem,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write_jsonl(job.rows, some_rows(1500))
    place = Place(job, store if place_name == "s3" else None)
    job.settings |= {"overwrite": True, "dataset_writer_config": writer_config(place.target)}
    local = writer_config(job.folder / "old")
    assert forks.run(job.write(dataset_writer_config=local)) == 0
    place.put(job.folder / "old" if has_old else None)
    before = place.files()
    began = time.monotonic()
    assert forks.run(job.write(chunksize=192, reuse_tokens=False)) == 0
    seconds = time.monotonic() - began
    after = place.files()
    assert after and after != before

    chance = random.Random(f"{place_name} {has_old}")
    codes, outcomes = [], []
    for number in range(MOST_TRIES):
        place.put(job.folder / "old" if has_old else None)
        monkeypatch.setenv("LLM_TRAIN_CACHE", str(job.folder / f"cache-{number}"))  # nothing is tokenized yet
        began = time.monotonic()
        codes.append(forks.run(job.write(chunksize=192), kill_after_seconds=seconds * chance.uniform(0.1, 1.0)))
        if codes[-1] == 0:  # the machine is faster than it was: as long as this one took is long enough
            seconds = time.monotonic() - began
        left = place.files()
        assert left in (before, after, {})
        outcomes.append("old" if left and left == before else "new" if left else "absent")
        check_that_what_is_left_can_be_used_or_is_refused(place, has_files=bool(left))
        assert forks.run(job.write(chunksize=192)) == 0
        assert place.files() == after
        assert job.leftovers() == []
        if codes.count(-signal.SIGKILL) == NUM_KILLS:
            break
    print(
        f"{place_name}: {codes.count(-signal.SIGKILL)} of {len(codes)} were killed before their end; left: {outcomes}"
    )
    assert codes.count(-signal.SIGKILL) == NUM_KILLS


def check_that_what_is_left_can_be_used_or_is_refused(place: Place, *, has_files: bool) -> None:
    s3fs.S3FileSystem.clear_instance_cache()
    if not has_files:
        with pytest.raises(DataError, match="manifest"):
            read_manifest(str(place.target))
        return
    assert read_manifest(str(place.target)).counts["rows_kept"] == 1500
    assert blocks_at(str(place.target))
