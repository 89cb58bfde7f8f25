"""Examples that are the same are found by their tokens, whatever batch they came in."""

from itertools import pairwise

import numpy as np
import pyarrow as pa
import pytest

from llm.training.prep.duplicates import ExampleHashes, first_equals, hash_examples
from llm.training.prep.store import SCHEMA

EXAMPLES = [
    ([1, 2, 3, 4], [2, 4]),
    ([1, 2, 3, 5], [2, 4]),  # another response
    ([1, 2, 3, 4], [2, 4]),  # the first again
    ([1, 2, 3, 4], [1, 4]),  # its prompt ends elsewhere
    ([1, 2, 3, 4], [2, 3, 3, 4]),  # the same ids, other labels
    ([1, 2, 3], [2, 3]),
]


def batches(sizes: list[int]) -> list[pa.RecordBatch]:
    rows = [{"row": n, "text": "", "input_ids": i, "trained": t} for n, (i, t) in enumerate(EXAMPLES)]
    starts = np.cumsum([0, *sizes])
    return [pa.RecordBatch.from_pylist(rows[start:end], SCHEMA) for start, end in pairwise(starts)]


@pytest.mark.parametrize("batch_sizes", [[6], [1] * 6, [0, 3, 0, 3, 0]])
def test_hashes_tell_examples_and_prompts_apart_in_any_batches(batch_sizes: list[int]) -> None:
    hashes = ExampleHashes.joined([hash_examples(batch) for batch in batches(batch_sizes)])
    assert hashes.whole.type == hashes.prompt.type == pa.binary(16)
    assert first_equals(hashes.whole).tolist() == [0, 1, 0, 3, 4, 5]
    assert first_equals(hashes.prompt).tolist() == [0, 0, 0, 3, 0, 0]


def test_hashes_of_a_slice_are_those_of_its_examples() -> None:
    (batch,) = batches([6])
    whole, part = hash_examples(batch), hash_examples(batch.slice(2, 3))
    assert part.whole.to_pylist() == whole.whole.to_pylist()[2:5]


def test_hashes_of_no_examples_are_none() -> None:
    assert first_equals(ExampleHashes.joined([]).whole).tolist() == []
