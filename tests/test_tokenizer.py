import json
import os
from collections.abc import Sequence
from pathlib import Path

import pytest
from conftest import TOKENIZERS
from hypothesis import given, settings
from hypothesis import strategies as st
from published_templates import SMOLLM2, Published
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from llm.errors import ConfigError
from llm.fast_tokenizer import TokenIds
from llm.tokenizer import Encode, PromptTokenizer, load_prompt_tokenizer, tokenizer_fingerprint

MARKS = ("<|im_start|>", "<|im_end|>", "<|im")
TOKENIZER = Published(repo="", template="", bos="<s>", eos="</s>", marks=MARKS).prompt_tokenizer()
NUMBERS = [str(number) for number in TOKENIZER.control_tokens.values()]
PIECES = st.sampled_from([*MARKS, *NUMBERS, "<s>", "</s>", "<", "|>", "im", " ", "\n", "é", "😀", "\x00", "\uf8ff"])
TEXTS = st.lists(PIECES, max_size=8).map("".join)


def test_encode_recognises_control_tokens_and_adds_nothing() -> None:
    [ids] = TOKENIZER.encode(["a<|im_end|>"])
    assert ids[-1] == TOKENIZER.control_tokens["<|im_end|>"]
    assert TOKENIZER.decode([ids]) == ["a<|im_end|>"]


def test_encode_shares_its_texts_and_the_library_starts_no_threads_then(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [f"text {number} \uf8fd0\uf8fd" if number % 7 == 0 else f"text {number}" for number in range(350)]
    pieces: list[int] = []

    def backwards(encode: Encode, given: Sequence[Sequence[str]]) -> list[list[TokenIds]]:
        assert os.environ["TOKENIZERS_PARALLELISM"] == "false"
        pieces.extend(map(len, given))
        return [encode(piece) for piece in reversed(given)][::-1]

    expected = TOKENIZER.encode(texts)
    for before in ("true", None):
        monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)
        if before:
            monkeypatch.setenv("TOKENIZERS_PARALLELISM", before)
        with TOKENIZER.shared(backwards):
            assert TOKENIZER.encode(texts) == expected
        assert os.environ.get("TOKENIZERS_PARALLELISM") == before
    assert pieces == [100, 100, 100] * 2 and TOKENIZER.encode(texts) == expected


@given(TEXTS, TEXTS)
@settings(deadline=None)
def test_control_tokens_kept_as_text_never_become_control_tokens(before: str, data: str) -> None:
    kept = TOKENIZER.keep_as_text(data)
    [ids] = TOKENIZER.encode([f"{kept}<|im_end|>"])
    assert TOKENIZER.unmark(kept) == data
    assert TOKENIZER.decode([ids]) == [data + "<|im_end|>"]
    assert [number for number in ids if number in TOKENIZER.control_tokens.values()] == [
        TOKENIZER.control_tokens["<|im_end|>"]
    ]
    mixed = TOKENIZER.encode([before, f"{kept}<|im_end|>", before])
    assert mixed == [*TOKENIZER.encode([before]), ids, *TOKENIZER.encode([before])]


@pytest.mark.parametrize("name", TOKENIZERS)
def test_control_tokens_kept_as_text_in_every_kind_of_tokenizer(name: str) -> None:
    tokenizer = PromptTokenizer(TOKENIZERS[name]())
    kept = tokenizer.keep_as_text("a </s> b <|im_end|>")
    [ids] = tokenizer.encode([f"<s>{kept}</s>"])
    controls = {number: token for token, number in tokenizer.control_tokens.items() if token != "<unk>"}
    assert [controls[number] for number in ids if number in controls] == ["<s>", "</s>"]


@pytest.mark.parametrize("name", TOKENIZERS)
def test_text_kept_as_text_has_the_ids_that_it_has_where_nothing_is_a_control_token(name: str) -> None:
    added = TOKENIZERS[name]()
    added.add_tokens([AddedToken("<file>", normalized=False)])
    facts = json.loads(added.backend_tokenizer.to_str())
    facts["added_tokens"] = [token for token in facts["added_tokens"] if not token["special"]]
    plain = Tokenizer.from_str(json.dumps(facts | {"post_processor": None}))
    tokenizer = PromptTokenizer(added)
    texts = [
        "</s>",
        "a</s> b",
        "<file><|im_end|><file>",
        "</s></s>4<s>",
        " <s>\nThe fox</s>",
        "<|im_start|>user\n<file>",
    ]
    kept = tokenizer.encode([tokenizer.keep_as_text(text) for text in texts])
    assert [ids.tolist() for ids in kept] == [one.ids for one in plain.encode_batch(texts)]
    assert added.convert_tokens_to_ids("<file>") in kept[2]


WORDS = {"<unk>": 0, "</s>": 1, "a": 2, "<": 3, "/": 4, "s": 5, ">": 6}


@pytest.mark.parametrize(
    "model",
    [
        models.BPE(WORDS, [], ignore_merges=True),
        models.Unigram([(word, -float(n)) for word, n in WORDS.items()], 0),
    ],
    ids=["merges ignored", "unigram"],
)
def test_control_token_that_the_model_knows_as_a_word_is_kept_as_text(model: models.Model) -> None:
    backend = Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens(["</s>"])
    tokenizer = PromptTokenizer(PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>"))
    [ids] = tokenizer.encode([f"{tokenizer.keep_as_text('a </s>')}</s>"])
    assert ids.tolist() == [2, 3, 4, 5, 6, 1]


def test_numbers_with_gaps_stay_those_of_their_words() -> None:
    backend = Tokenizer(models.BPE({"</s>": 0, "a": 1, "<": 2, "/": 4, "s": 5, ">": 6}, []))  # no 3; 6 are words
    backend.add_special_tokens(["</s>"])
    tokenizer = PromptTokenizer(PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>"))
    [ids] = tokenizer.encode([f"{tokenizer.keep_as_text('a</s>')}</s>"])
    assert ids.tolist() == [1, 2, 4, 5, 6, 0]


def test_control_token_of_one_character_is_kept_as_text() -> None:
    backend = Tokenizer(models.BPE({"a": 0, "@": 1, "<0x40>": 2}, [], byte_fallback=True))
    backend.add_special_tokens(["@"])
    tokenizer = PromptTokenizer(PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="@"))
    [ids] = tokenizer.encode([f"{tokenizer.keep_as_text('a@')}@"])
    assert ids.tolist() == [0, 2, 1]


def test_number_of_a_control_token_between_two_of_them_stays_a_number() -> None:
    text = "</s>{}<|im_end|>".format(TOKENIZER.control_tokens["<|im_end|>"])
    assert TOKENIZER.unmark(TOKENIZER.keep_as_text(text)) == text
    assert TOKENIZER.decode(TOKENIZER.encode([TOKENIZER.keep_as_text(text)])) == [text]


def test_text_without_control_tokens_is_kept_as_it_is() -> None:
    assert TOKENIZER.keep_as_text("a < b \uf8fd") == "a < b \uf8fd"


@pytest.mark.parametrize("text", ["</s> \uf8fd", "\uf8fe </s>", "\uf8fd1\uf8fd", "a\uf8fe20\uf8fe"])
def test_text_that_could_be_taken_for_our_marks_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"private characters U\+F8FD, U\+F8FE"):
        TOKENIZER.keep_as_text(text)


@pytest.mark.parametrize(
    ("name", "bos", "is_lossless"),
    [("byte_level", "", True), ("sentencepiece", "<s>", True), ("wordpiece", "", False)],
)
def test_facts_of_each_kind_are_found(name: str, bos: str, is_lossless: bool) -> None:
    tokenizer = PromptTokenizer(TOKENIZERS[name]())
    assert (tokenizer.added_bos, tokenizer.is_lossless, tokenizer.eos_token) == (bos, is_lossless, "</s>")


def test_bos_of_tokenizer_that_adds_eos_too_is_found() -> None:
    tokenizer = SMOLLM2.tokenizer()
    ids = [("<|im_start|>", tokenizer.convert_tokens_to_ids("<|im_start|>")), ("<|im_end|>", tokenizer.eos_token_id)]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A <|im_end|>", special_tokens=ids
    )
    assert PromptTokenizer(tokenizer).added_bos == "<|im_start|>"


def test_tokenizer_one_of_whose_marks_takes_white_space_away_is_not_lossless() -> None:
    """As Phi-3's `<|assistant|>`, which takes the line break behind it."""
    tokenizer = SMOLLM2.tokenizer()
    assert PromptTokenizer(tokenizer).is_lossless
    tokenizer.add_special_tokens({"additional_special_tokens": [AddedToken("<|end|>", rstrip=True)]})
    assert not PromptTokenizer(tokenizer).is_lossless


def test_tokenizer_that_composes_characters_spells_so() -> None:
    """As Qwen's; a row with decomposed characters is no loss."""
    tokenizer = SMOLLM2.tokenizer()
    assert PromptTokenizer(tokenizer).spelled("e\u0301") == "e\u0301"
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    composing = PromptTokenizer(tokenizer)
    assert composing.spelled("e\u0301") == "\u00e9"
    assert composing.decode(composing.encode(["e\u0301"])) == ["\u00e9"]
    assert composing.is_lossless


def test_slow_tokenizer_is_refused() -> None:
    class Slow(PreTrainedTokenizerBase):
        def __init__(self) -> None:
            pass

    with pytest.raises(ConfigError, match=r"base_model: the tokenizer Slow has no fast version \(tokenizer.json\)"):
        PromptTokenizer(Slow())


def test_load_from_folder_gives_the_same_fingerprint(tmp_path: Path) -> None:
    tokenizer = SMOLLM2.tokenizer()
    tokenizer.save_pretrained(str(tmp_path))
    loaded = load_prompt_tokenizer(str(tmp_path))
    assert loaded.fingerprint == tokenizer_fingerprint(tokenizer)
    assert loaded.chat_template == SMOLLM2.template
    assert loaded.eos_token == "<|im_end|>"


@pytest.mark.parametrize("has_config", [True, False])
def test_load_from_folder_without_tokenizer_is_refused(tmp_path: Path, has_config: bool) -> None:
    if has_config:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    with pytest.raises(ConfigError, match=r"base_model: no tokenizer at .* Give a hub id, or a folder that holds"):
        load_prompt_tokenizer(str(tmp_path))


def test_fingerprint_depends_on_ids_and_not_on_padding_or_template() -> None:
    tokenizer = SMOLLM2.tokenizer()
    before = tokenizer_fingerprint(tokenizer)
    tokenizer.backend_tokenizer.enable_padding()
    tokenizer.backend_tokenizer.enable_truncation(5)
    tokenizer.chat_template = "other"
    assert tokenizer_fingerprint(tokenizer) == before
    tokenizer.add_tokens(["new"])
    assert tokenizer_fingerprint(tokenizer) != before


def test_truncation_and_padding_of_the_folder_are_switched_off() -> None:
    tokenizer = SMOLLM2.tokenizer()
    tokenizer.backend_tokenizer.enable_truncation(2)
    tokenizer.backend_tokenizer.enable_padding(length=9)
    assert [len(ids) for ids in PromptTokenizer(tokenizer).encode(["abcd", "a"])] == [4, 1]


def test_chat_template_absent_is_none() -> None:
    tokenizer = SMOLLM2.tokenizer()
    tokenizer.chat_template = None
    assert PromptTokenizer(tokenizer).chat_template is None


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_gives_back_agrees_with_decoding(kind: str) -> None:
    tokenizer = PromptTokenizer(TOKENIZERS[kind]())
    texts = ["Hi there", "日本語 👩\u200d👩\u200d👧 é", "</s><|im_end|>", "\x00\x7f\n", "", " "]
    ids = tokenizer.encode(texts)
    assert (tokenizer._bytes is None) == (kind != "byte_level")
    assert tokenizer.gives_back(ids, texts) == [
        decoded == t for decoded, t in zip(tokenizer.decode(ids), texts, strict=True)
    ]
    assert tokenizer.gives_back([ids[0][:-1], *ids[1:]], texts)[0] is False


def test_bytes_of_every_token_are_what_the_decoder_gives(tokenizers: dict[str, PromptTokenizer]) -> None:
    tokenizer = tokenizers["byte_level"]
    assert tokenizer._bytes is not None
    pairs = [
        (one.decode("utf-8", "replace"), tokenizer.decode([[n]])[0])
        for n, one in enumerate(tokenizer._bytes.to_pylist())
    ]
    assert len(pairs) > 256
    assert all(ours == decoded for ours, decoded in pairs)
