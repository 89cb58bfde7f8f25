"""fastokens makes the ids only where they are those of the tokenizer, and is found out where they are not."""

import json
import random
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from conftest import TOKENIZERS, byte_level_tokenizer
from tokenizers import Encoding, Tokenizer

from llm import fast_tokenizer
from llm.errors import DataError
from llm.fast_tokenizer import FastEncoder, open_fast
from llm.tokenizer import PromptTokenizer

PIECES = [*fast_tokenizer._PIECES, "<s>", "</s>", "<|im_start|>", "quick", " brown"]


def random_texts(number: int) -> list[str]:
    maker = random.Random(number)
    return ["".join(maker.choices(PIECES, k=maker.randrange(30))) for _ in range(number)]


class Other:
    """Stands in for the module: gives the right ids but where `wrong` is in the text."""

    def __init__(self, wrong: str) -> None:
        self.wrong, self.Tokenizer = wrong, self

    def from_json_str(self, text: str) -> "Other":
        self.right = Tokenizer.from_str(text)
        return self

    def encode_batch_flat(self, texts: Sequence[str], add_special_tokens: bool) -> tuple[bytes, bytes]:
        encoded = self.right.encode_batch(texts, add_special_tokens=add_special_tokens)
        ids = [[0] if self.wrong in text else one.ids for text, one in zip(texts, encoded, strict=True)]
        offsets = np.cumsum([0, *map(len, ids)]).astype(np.uint64)
        return np.array([i for one in ids for i in one], np.uint32).tobytes(), offsets.tobytes()


def test_fast_ids_are_those_of_the_tokenizer_or_it_is_not_used() -> None:
    used = []
    for name, make in TOKENIZERS.items():
        tokenizer = make()
        plain, fast = PromptTokenizer(tokenizer), PromptTokenizer(tokenizer)
        if fast.use_fast():
            used.append(name)
        texts = random_texts(3000)
        assert fast.encode(texts) == plain.encode(texts)
        kept = [plain.keep_as_text(text) for text in texts[:300]]
        assert fast.encode(kept) == plain.encode(kept)
    assert "byte_level" in used


def test_tokenizer_that_fastokens_does_not_know_keeps_its_own(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    facts = json.loads(byte_level_tokenizer().backend_tokenizer.to_str())
    facts["pre_tokenizer"] = {"type": "UnicodeScripts"}
    text = json.dumps(facts)
    assert open_fast(text, Tokenizer.from_str(text), []) is None
    assert "fastokens cannot be used with this tokenizer: " in caplog.text


def test_fastokens_that_differs_on_odd_texts_is_not_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    monkeypatch.setitem(sys.modules, "fastokens", Other(wrong="e\u0301"))  # type: ignore[arg-type]
    assert not PromptTokenizer(byte_level_tokenizer()).use_fast()
    assert "fastokens is not used: it gives other ids" in caplog.text


@pytest.mark.parametrize("number", [0, 299, 300, 500, 1500])
def test_difference_in_the_first_rows_or_one_of_a_hundred_is_an_error(
    number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "fastokens", Other(wrong="Zebra"))  # type: ignore[arg-type]
    tokenizer = PromptTokenizer(byte_level_tokenizer())
    assert tokenizer.use_fast()
    texts: list[Any] = [f"row {n}" for n in range(2000)]
    texts[number] = "A Zebra"
    with pytest.raises(DataError, match="for the text 'A Zebra'. Set `fast_tokenizer: false`."):
        for start in range(0, 2000, 500):
            tokenizer.encode(texts[start : start + 500])


def test_all_of_the_first_texts_are_compared_once_however_many_threads_begin() -> None:
    backend = byte_level_tokenizer().backend_tokenizer
    both, compared = threading.Barrier(2), []

    class Waiting(Other):
        def encode_batch_flat(self, texts: Sequence[str], add_special_tokens: bool) -> tuple[bytes, bytes]:
            both.wait(timeout=10)
            return super().encode_batch_flat(texts, add_special_tokens)

    class Counting:
        def encode_batch_fast(self, texts: list[str], add_special_tokens: bool) -> list[Encoding]:
            compared.append(len(texts))
            return backend.encode_batch_fast(texts, add_special_tokens=add_special_tokens)

    fast = FastEncoder(Counting(), Waiting(wrong="Zebra").from_json_str(backend.to_str()))  # type: ignore[arg-type]
    with ThreadPoolExecutor(max_workers=2) as pool:
        list(pool.map(fast.encode, [[f"row {n}" for n in range(1000)]] * 2))
    assert sorted(compared) == [10, 307]


def test_opening_begins_beside_what_else_is_done_and_once(monkeypatch: pytest.MonkeyPatch) -> None:
    threads, may_end = [], threading.Event()

    def opened(*args: Any) -> FastEncoder | None:
        threads.append(threading.current_thread())
        assert may_end.wait(timeout=10)
        return open_fast(*args)

    monkeypatch.setattr("llm.tokenizer.open_fast", opened)
    tokenizer = PromptTokenizer(byte_level_tokenizer())
    assert not tokenizer.begin_fast().done()
    assert tokenizer.encode(["a b"]) == PromptTokenizer(byte_level_tokenizer()).encode(["a b"])
    may_end.set()
    assert tokenizer.use_fast() and tokenizer.use_fast()
    assert len(threads) == 1 and threads[0] is not threading.main_thread()


def test_without_fastokens_all_is_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fastokens", None)  # type: ignore[arg-type]
    tokenizer = PromptTokenizer(byte_level_tokenizer())
    assert not tokenizer.use_fast() and tokenizer.encode(["a"])
