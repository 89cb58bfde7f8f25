"""Which examples are the same: 16 bytes of hash an example, made from ids a batch at a time.

Takes examples, gives for each one the first that is equal to it.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from llm.training.prep.arrays import Ints

_BYTES = 16


@dataclass(frozen=True, kw_only=True)
class ExampleHashes:
    """Hashes of n examples as n x 16 bytes: `whole` of prompt and response, `prompt` of the prompt alone."""

    whole: pa.Array
    prompt: pa.Array

    @classmethod
    def joined(cls, parts: Sequence[Self]) -> Self:
        """The hashes of all `parts`, one behind the other."""
        none = pa.array([], pa.binary(_BYTES))
        whole, prompt = ([none, *(getattr(part, name) for part in parts)] for name in ("whole", "prompt"))
        return cls(whole=pa.concat_arrays(whole), prompt=pa.concat_arrays(prompt))

    def take(self, numbers: Ints) -> Self:
        """The hashes of the examples `numbers`."""
        indices = pa.array(numbers)
        return type(self)(whole=self.whole.take(indices), prompt=self.prompt.take(indices))

    def prompt_numbers(self) -> Ints:
        """Of each prompt the first 8 bytes of its hash: the same in every run and version, on every machine."""
        found: Ints = _flat(self.prompt).view("<i8").reshape(-1, 2)[:, 0]
        return found

    @property
    def fingerprint(self) -> str:
        """One hash of all examples, in their order."""
        return hashlib.blake2b(_flat(self.whole).tobytes(), digest_size=_BYTES).hexdigest()


def hash_examples(batch: pa.RecordBatch) -> ExampleHashes:
    """The hashes of the examples in `batch` (`store.SCHEMA`).

    Two examples have the same prompt when the ids before the first label are the same, and are the same when all ids
    and labels are. 3 microseconds an example of 340 tokens.
    """
    whole, prompt = [], []
    ids, spans = (_as_bytes(batch[name]) for name in ("input_ids", "trained"))
    for one, trained in zip(ids, spans, strict=True):
        prompt_bytes = int.from_bytes(trained[:4], "little") * 4
        hashed = hashlib.blake2b(one[:prompt_bytes], digest_size=_BYTES)
        prompt.append(hashed.digest())
        hashed.update(trained)  # fixes where the prompt ends, too
        hashed.update(one[prompt_bytes:])
        whole.append(hashed.digest())
    kind = pa.binary(_BYTES)
    return ExampleHashes(whole=pa.array(whole, kind), prompt=pa.array(prompt, kind))


def first_equals(hashes: pa.Array) -> Ints:
    """For each of n examples the number of the first with the same hash: its own when it is that one.

    hashes           a b a c b a
    first_equals     0 1 0 3 1 0
    """
    numbers = hashes.dictionary_encode().indices.to_numpy()
    _, firsts = np.unique(numbers, return_index=True)
    equals: Ints = firsts[numbers].astype(np.int64)
    return equals


def _flat(hashes: pa.Array) -> npt.NDArray[np.uint8]:
    """The bytes of all hashes, one behind the other."""
    if not len(hashes):
        return np.empty(0, dtype=np.uint8)
    start = hashes.offset * _BYTES
    return np.frombuffer(hashes.buffers()[1], dtype=np.uint8)[start : start + len(hashes) * _BYTES]


def _as_bytes(lists: pa.ListArray) -> list[bytes]:
    """The bytes of each list of int32; as `bytes`, since slices of a view wake the garbage collector (0.2 s)."""
    flat = lists.values.to_numpy().astype("<i4", copy=False).tobytes()
    edges = (lists.offsets.to_numpy().astype(np.int64) * 4).tolist()
    return [flat[start:end] for start, end in zip(edges[:-1], edges[1:], strict=True)]
