"""Memory, around all stages: memory maps, whose pages are given back while they are read.

Pages of a memory map count as memory of the process until the kernel wants them back: 1.6 GB of 200,000 rows.
"""

import ctypes
import mmap
import sys
import threading
import time
import weakref
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa

_SECONDS_BETWEEN_LOOKS = 0.01  # in which 5 to 30 MB are read
_LEAST_SECONDS = 0.0003  # a look takes 0.02 ms, and in 1 ms 30 MB more may be mapped
_MOST_BYTES = 16 << 20
_MAPS = Path("/proc/self/maps")
_SIZES = Path("/proc/self/statm")  # in pages: all, in memory, of these in memory from files


class _Map:
    """Where a file is in memory: `size` bytes at `address`, which stay there as long as `_owner` is used."""

    def __init__(self, address: int, size: int, owner: object) -> None:
        self.address, self.size, self._owner = address, size, owner


class _FilePages:
    """The files that are mapped, and how many pages of files may be in memory."""

    def __init__(self) -> None:
        self._maps: weakref.WeakSet[_Map] = weakref.WeakSet()
        self._lock = threading.Lock()  # a set must not grow while it is gone through
        self._most = sys.maxsize
        self._next_look = 0.0

    def map_file(self, path: Path) -> pa.Buffer:
        with pa.memory_map(str(path)) as file:
            whole = file.read_buffer()
        mapped = _Map(whole.address, whole.size, whole)
        self.add([mapped])
        return pa.foreign_buffer(whole.address, whole.size, base=mapped)

    def add(self, maps: Iterable[_Map]) -> None:
        with self._lock:
            self._maps.update(maps)

    def limit(self) -> None:
        """Allows 16 MB more than there are now, most of which are libraries."""
        self._most = _num_pages() + _MOST_BYTES // mmap.PAGESIZE

    def lift(self) -> None:
        self._most = sys.maxsize

    def give_back(self, *, at_once: bool = False) -> None:
        now = time.monotonic()
        if self._most == sys.maxsize or not (at_once or now >= self._next_look):
            return
        self._next_look = now + _LEAST_SECONDS
        if at_once or _num_pages() > self._most:
            # Not `mmap`, which keeps a file open for each map: 1,024 are allowed. PyDLL keeps Python's lock.
            madvise = ctypes.PyDLL(None).madvise
            with self._lock:
                for mapped in self._maps:
                    place, size = ctypes.c_void_p(mapped.address), ctypes.c_size_t(mapped.size)
                    madvise(place, size, mmap.MADV_DONTNEED)
            self.limit()


_pages = _FilePages()


def map_file(path: Path) -> pa.Buffer:
    """The bytes of a file, read when they are used; OSError without the file."""
    return _pages.map_file(path)


@contextmanager
def maps_given_back(table: pa.Table, paths: Collection[str]) -> Iterator[None]:
    """Within, what is read of `table` is given back, too, where it lies in maps of the files `paths`."""
    chunks = [chunk for column in table.columns for chunk in column.chunks]
    places = np.sort([buffer.address for chunk in chunks for buffer in chunk.buffers() if buffer])
    held = []
    for start, size in _read_only_maps(paths):
        # Another map of these files may end at any time, and its place be used anew; one that `table` is in does not.
        first, last = np.searchsorted(places, (start, start + size))
        held += [_Map(start, size, table)] if first < last else []
    _pages.add(held)
    yield
    held.clear()


def give_pages_back() -> None:
    """Lets go of what was read of such maps when that is more than 16 MB; who reads on gets it from the file again."""
    _pages.give_back()


def give_unused_back() -> None:
    """Lets go of what the stage before has read and what its allocators keep for more: 50 to 90 MB each.

    Of 200,000 rows: once they are read, tokenized, written and reported.
    """
    pa.default_memory_pool().release_unused()
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):  # glibc
        trim(0)
    _pages.give_back(at_once=True)


@contextmanager
def pages_given_back() -> Iterator[None]:
    """Within, `give_pages_back` limits the memory, and is called while libraries read the files; only on Linux."""
    if not _SIZES.exists():
        yield
        return
    _pages.limit()
    done = threading.Event()
    watch = threading.Thread(target=_watch, args=(done,), name="pages", daemon=True)
    watch.start()
    try:
        yield
    finally:
        done.set()
        watch.join()
        _pages.lift()


def _watch(done: threading.Event) -> None:
    while not done.wait(_SECONDS_BETWEEN_LOOKS):
        give_pages_back()


def _read_only_maps(paths: Collection[str]) -> Iterator[tuple[int, int]]:
    """Address and size of each place where one of the files is mapped."""
    for line in _MAPS.read_text().splitlines() if _MAPS.exists() else ():
        place, rights, *_, path = line.split(maxsplit=5)
        if rights.startswith("r--") and path in paths:
            start, end = (int(edge, 16) for edge in place.split("-"))
            yield start, end - start


def _num_pages() -> int:
    return int(_SIZES.read_bytes().split()[2])
