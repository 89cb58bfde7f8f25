"""Batches through a function in order, several at a time: threads, since what takes long lets go of Python."""

import gc
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Self, TypeVar

ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT")

_CPU_LIMIT = Path("/sys/fs/cgroup/cpu.max")


class Threads:
    """`num_threads` threads, to be used in a `with`: each takes the next batch, or helps with one that is not done.

    The tokenizer, NumPy and Arrow let go of Python while they compute.
    """

    def __init__(self, num_threads: int) -> None:
        """Starts each thread when it is first needed."""
        self._num_threads = num_threads
        self._pool = ThreadPoolExecutor(max_workers=num_threads)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def in_order(self, function: Callable[[ItemT], ResultT], items: Iterable[ItemT]) -> Iterator[tuple[ItemT, ResultT]]:
        """Each item and what `function` gives for it, in the order of `items`; an error is raised where its turn comes.

        One item more than there are threads is taken ahead.
        """
        waiting: deque[tuple[ItemT, Future[ResultT]]] = deque()
        with _only_new_objects_collected():
            for item in items:
                waiting.append((item, self._pool.submit(function, item)))
                if len(waiting) > self._num_threads:
                    first, result = waiting.popleft()
                    yield first, result.result()
            for first, result in waiting:
                yield first, result.result()

    def share(self, function: Callable[[ItemT], ResultT], pieces: Sequence[ItemT]) -> list[ResultT]:
        """What `function` gives for each of `pieces`, computed by the calling thread and by those that find no item."""
        helped = [self._pool.submit(function, piece) for piece in pieces]
        # From the end, since the others begin at the start: one that has not begun is cancelled, and computed here.
        own = {place: function(pieces[place]) for place in reversed(range(len(pieces))) if helped[place].cancel()}
        return [own[place] if place in own else future.result() for place, future in enumerate(helped)]


def num_cores() -> int:
    """Cores that this process may use: those that it may run on, or fewer where a container is limited (cgroup v2)."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = _CPU_LIMIT.read_text().split()
        return max(1, min(cores, int(quota) // int(period)))
    except (OSError, ValueError):  # no such limit, "max"
        return cores


@contextmanager
def _only_new_objects_collected() -> Iterator[None]:
    """Python's collector does not look through the libraries again and again: 0.4 s of 20,000 rows."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
