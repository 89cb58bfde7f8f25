"""Three batches at a time: in order, few held, errors where their turn comes."""

import threading
import time
from collections.abc import Iterator

import pytest

from llm.training.prep.overlap import three_at_a_time


def test_results_come_in_the_order_of_the_items() -> None:
    def slow_first(number: int) -> int:
        time.sleep(0.02 if number == 0 else 0)
        return number * number

    assert list(three_at_a_time(slow_first, range(6))) == [(n, n * n) for n in range(6)]


def test_three_items_are_computed_at_once() -> None:
    all_three = threading.Barrier(3, timeout=5)
    assert len(list(three_at_a_time(lambda number: all_three.wait(), range(6)))) == 6


def test_no_more_than_four_items_are_taken_ahead() -> None:
    taken: list[int] = []

    def items() -> Iterator[int]:
        for number in range(10):
            taken.append(number)
            yield number

    results = three_at_a_time(lambda number: number, items())
    next(results)
    assert taken == [0, 1, 2, 3]


def test_error_comes_after_the_results_before_it() -> None:
    def bad(number: int) -> int:
        if number >= 2:
            raise ValueError(f"item {number}")
        return number

    seen = []
    with pytest.raises(ValueError, match="item 2"):
        for number, _ in three_at_a_time(bad, range(6)):
            seen.append(number)
    assert seen == [0, 1]
