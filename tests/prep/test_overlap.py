"""Batches in threads: in order, few held, errors where their turn comes, pieces computed by whoever is free."""

import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from llm.training.prep.overlap import Threads, num_cores


def test_results_come_in_the_order_of_the_items() -> None:
    def slow_first(number: int) -> int:
        time.sleep(0.02 if number == 0 else 0)
        return number * number

    with Threads(3) as threads:
        assert list(threads.in_order(slow_first, range(6))) == [(n, n * n) for n in range(6)]


def test_as_many_items_are_computed_at_once_as_there_are_threads() -> None:
    all_three = threading.Barrier(3, timeout=5)
    with Threads(3) as threads:
        assert len(list(threads.in_order(lambda number: all_three.wait(), range(6)))) == 6


def test_no_more_items_are_taken_ahead_than_threads_and_one() -> None:
    taken: list[int] = []

    def items() -> Iterator[int]:
        for number in range(10):
            taken.append(number)
            yield number

    with Threads(3) as threads:
        next(threads.in_order(lambda number: number, items()))
    assert taken == [0, 1, 2, 3]


def test_error_comes_after_the_results_before_it() -> None:
    def bad(number: int) -> int:
        if number >= 2:
            raise ValueError(f"item {number}")
        return number

    seen = []
    with Threads(3) as threads, pytest.raises(ValueError, match="item 2"):
        for number, _ in threads.in_order(bad, range(6)):
            seen.append(number)
    assert seen == [0, 1]


def test_thread_without_an_item_takes_pieces_of_another_s() -> None:
    both = threading.Barrier(2, timeout=5)

    def named(piece: int) -> tuple[int, str]:
        both.wait()
        return piece * piece, threading.current_thread().name

    with Threads(2) as threads:
        [(_, found)] = threads.in_order(lambda item: threads.share(named, range(6)), ["the only item"])
    assert [square for square, _ in found] == [0, 1, 4, 9, 16, 25]
    assert len({name for _, name in found}) == 2


def test_pieces_are_computed_where_all_other_threads_are_busy() -> None:
    done = threading.Event()

    def shares() -> list[int]:
        found = threads.share(lambda piece: piece + 1, range(4))
        done.set()
        return found

    with Threads(2) as threads:
        found = [result for _, result in threads.in_order(lambda job: job(), [lambda: done.wait(timeout=5), shares])]
    assert found == [True, [1, 2, 3, 4]]


@pytest.mark.parametrize("num_threads", [1, 2])
def test_error_of_a_piece_is_raised_where_the_pieces_were_given(num_threads: int) -> None:
    with Threads(num_threads) as threads, pytest.raises(ZeroDivisionError):
        list(threads.in_order(lambda item: threads.share(lambda piece: 1 // piece, [2, 1, 0]), ["item"]))


@pytest.mark.parametrize(("limit", "expected"), [("150000 100000", 1), ("50000 100000", 1), ("max 100000", None)])
def test_cores_are_those_that_a_container_may_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str, expected: int | None
) -> None:
    (tmp_path / "cpu.max").write_text(f"{limit}\n")
    monkeypatch.setattr("llm.training.prep.overlap._CPU_LIMIT", tmp_path / "cpu.max")
    assert num_cores() == (expected or len(os.sched_getaffinity(0)))
