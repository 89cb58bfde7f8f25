"""Memory maps of our own files: what was read is given back, and reads the same again."""

import os
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from llm.training.prep.file_pages import give_pages_back, map_file, maps_given_back, pages_given_back

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells the pages of a process")
MB = 2**20


@pytest.fixture
def large(tmp_path: Path) -> Path:
    """A file of 128 MB, the first megabyte of it ones, the second twos, and so on."""
    path = tmp_path / "large"
    path.write_bytes(b"".join(bytes([1 + number]) * MB for number in range(128)))
    return path


def megabytes_of_files() -> int:
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssFile")]
    return int(line.split()[1]) // 1024


def sums(buffer: pa.Buffer) -> list[int]:
    return [int(part.sum()) for part in np.frombuffer(buffer, dtype=np.uint8).reshape(128, MB)]


def test_read_pages_are_given_back_and_read_the_same_again(large: Path) -> None:
    before = megabytes_of_files()
    with pages_given_back():
        mapped = map_file(large)
        first = sums(mapped)
        time.sleep(0.5)  # no call: a library may be reading
        assert megabytes_of_files() < before + 40
        assert sums(mapped) == first == [(1 + number) * MB for number in range(128)]


def test_pages_that_were_not_to_be_given_back_stay(large: Path) -> None:
    with pages_given_back():
        pass
    before = megabytes_of_files()
    mapped = map_file(large)
    sums(mapped)
    give_pages_back()
    assert megabytes_of_files() > before + 120


def test_read_pages_of_a_table_are_given_back_with_the_table_alone(tmp_path: Path) -> None:
    path, other = tmp_path / "read.arrow", tmp_path / "other.arrow"
    for one in (path, other):
        with pa.OSFile(str(one), "wb") as sink, pa.ipc.new_stream(sink, pa.schema([("n", pa.int64())])) as writer:
            for number in range(16):
                writer.write_batch(pa.record_batch([np.full(MB, number)], names=["n"]))  # 8 MB
    table, left = (pa.ipc.open_stream(pa.memory_map(str(one))).read_all() for one in (path, other))
    before = megabytes_of_files()
    with pages_given_back(), maps_given_back(table, [str(path)]):
        first = pc.sum(table["n"]).as_py()
        time.sleep(0.5)
        assert megabytes_of_files() < before + 40
        assert pc.sum(table["n"]).as_py() == first == 120 * MB
        pc.sum(left["n"])
        time.sleep(0.5)
        assert megabytes_of_files() > before + 100


def test_maps_keep_no_file_open(large: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    maps = [map_file(large) for _ in range(20)]
    assert len(os.listdir("/proc/self/fd")) == before and all(one.size == 128 * MB for one in maps)
