"""Memory maps of our own files: what was read is given back, and reads the same again."""

import os
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from llm.training.prep.file_pages import give_pages_back, map_file, pages_given_back

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


def test_maps_keep_no_file_open(large: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    maps = [map_file(large) for _ in range(20)]
    assert len(os.listdir("/proc/self/fd")) == before and all(one.size == 128 * MB for one in maps)
