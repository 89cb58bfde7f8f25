"""Ids from `fastokens`, several times faster than those from `tokenizers` and the same, or not used: extra `fast`.

It reads the text of the same tokenizer, and refuses what it does not know. What it gives is compared: many odd texts
before it is used, then the first texts of the data, then one in a hundred.
"""

import itertools
import logging
from array import array
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from tokenizers import Tokenizer

from llm.errors import DataError

logger = logging.getLogger(__name__)
if TYPE_CHECKING:
    TokenIds = array[int]
else:  # not to be subscripted before Python 3.12
    TokenIds = array
"""Ids as integers of 4 bytes, `array("I")`: NumPy and Arrow read them as they stand, the garbage collector need not."""

_NUM_FIRST = 300  # texts of the data that are all compared
_ONE_IN = 100
# Where tokenizers part: white space, marks that combine, cases that change length, digits, contractions, bytes.
_PIECES = (
    *("a", "The", " the", "B", "'s", "'LL", "1", "2345", "3.14", "-", "_", "{", '"', "\\", "://", "==", "<", "|>"),
    *(" ", "  ", "\n", "\r\n", "\t", "\0", "\x1c", "\x85", "\xa0", "\u200b", "\u2028", "\u202e", "\ufeff"),
    *("é", "e\u0301", "ß", "İ", "ſ", "K", "ﬁ", "日本", "の", "ह\u093f", "ا", "😀", "👍🏽", "\U000e0041", "…"),
)


class FastEncoder:
    """Encodes as `backend` does, faster."""

    def __init__(self, backend: Tokenizer, fast: Any) -> None:
        """Use `open_fast`."""
        self._backend, self._fast = backend, fast
        self._num_left = _NUM_FIRST

    def encode(self, texts: Sequence[str]) -> list[TokenIds]:
        """The ids of each text, nothing added; DataError when a compared one differs."""
        first, self._num_left = self._num_left, max(0, self._num_left - len(texts))  # before other threads come
        encoded = self._encode(texts)
        pairs = list(zip(texts, encoded, strict=True))
        if (wrong := first_difference(pairs[:first] + pairs[first::_ONE_IN], self._backend)) is not None:
            raise DataError(
                f"fastokens gives other ids than the tokenizer of the model for the text {wrong[:80]!r}. "
                "Set `fast_tokenizer: false`."
            )
        return encoded

    def is_right(self, texts: Sequence[str]) -> bool:
        """Whether all ids of `texts` are those of `backend`."""
        return first_difference(list(zip(texts, self._encode(texts), strict=True)), self._backend) is None

    def _encode(self, texts: Sequence[str]) -> list[TokenIds]:
        flat, offsets = self._fast.encode_batch_flat(list(texts), add_special_tokens=False)
        ids = array("I")
        ids.frombytes(flat)
        edges = np.frombuffer(offsets, np.uint64).tolist()
        return [ids[start:end] for start, end in itertools.pairwise(edges)]


def open_fast(text: str, backend: Tokenizer, control_tokens: Iterable[str]) -> FastEncoder | None:
    """An encoder made of the JSON of a tokenizer; None without `fastokens`, or where it does not do as `backend`."""
    try:
        import fastokens
    except ImportError:
        return None
    try:
        encoder = FastEncoder(backend, fastokens.Tokenizer.from_json_str(text))
    except Exception as error:  # its own classes, none documented: a part that it does not know is no mistake of ours
        logger.info("fastokens cannot be used with this tokenizer: %s.", error)
        return None
    if not encoder.is_right(odd_texts(list(control_tokens))):
        logger.info("fastokens is not used: it gives other ids than this tokenizer.")
        return None
    return encoder


def odd_texts(control_tokens: list[str]) -> list[str]:
    """Pairs of pieces, beside control tokens and beside letters, and longer chains: about 2,500 texts."""
    marks = [*control_tokens[:2], *control_tokens[-2:]]
    pairs = [f"{first}{second}{first}" for first in _PIECES for second in _PIECES]
    marked = [f"x{piece}{mark}{piece}{mark}{mark} y" for piece in _PIECES for mark in marks]
    chains = ["".join(_PIECES[start::step]) * 3 for start in range(len(_PIECES)) for step in (1, 3, 7)]
    return [*pairs, *marked, *chains, "", "a" * 5000, " " * 5000, "日" * 3000]


def first_difference(pairs: Sequence[tuple[str, TokenIds]], backend: Tokenizer) -> str | None:
    """The first text whose ids are not those of `backend`."""
    expected = library_ids(backend, [text for text, _ in pairs])
    return next((text for (text, ids), right in zip(pairs, expected, strict=True) if ids != right), None)


def library_ids(tokenizer: Tokenizer, texts: Sequence[str]) -> list[TokenIds]:
    """The ids of each text, control tokens recognised, nothing added."""
    return [array("I", one.ids) for one in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]
