"""ASCII texts have the ids of the tokenizer, for every published pattern; what is not known is left to it."""

import json
import random
from collections.abc import Callable, Iterable
from typing import Any

import pytest
from conftest import CORPUS, TOKENIZERS, byte_level_tokenizer
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers.pre_tokenizers import ByteLevel, Digits, PreTokenizer, Sequence, Split

from llm import ascii_tokenizer, fast_tokenizer
from llm.ascii_tokenizer import AsciiTokenizer, open_ascii
from llm.tokenizer import PromptTokenizer

GPT2 = ByteLevel(add_prefix_space=False)
CONTRACTION = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
BEFORE = r"[^\r\n\p{L}\p{N}]?"
END = r"\s*[\r\n]+|\s+(?!\S)|\s+"
DEEPSEEK = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+|"""
    rf" ?[\p{{P}}\p{{S}}]+[\r\n]*|{END}"
)


def split(*patterns: str) -> Sequence:
    parts = [Split(Regex(pattern), "isolated") for pattern in patterns]
    return Sequence([*parts, ByteLevel(add_prefix_space=False, use_regex=False)])


# As the tokenizer.json of these models has them (most also transformers, `convert_slow_tokenizer.py` and others).
PUBLISHED: dict[str, PreTokenizer] = {
    "gpt2, pythia": GPT2,
    "smollm, starcoder2": Sequence([Digits(individual_digits=True), GPT2]),
    "digits together": Sequence([Digits(individual_digits=False), GPT2]),
    "llama3": split(rf"{CONTRACTION}|{BEFORE}\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{END}"),
    "qwen2": split(rf"{CONTRACTION}|{BEFORE}\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{END}"),
    "qwen3.5": split(rf"{CONTRACTION}|{BEFORE}[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{END}"),
    "mistral (tekken)": split(
        rf"{BEFORE}{UPPER}*{LOWER}+|{BEFORE}{UPPER}+{LOWER}*|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{END}"
    ),
    "cl100k": split(
        r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
    ),
    "gpt-oss (o200k)": split(
        rf"{BEFORE}{UPPER}*{LOWER}+{CONTRACTION}?|{BEFORE}{UPPER}+{LOWER}*{CONTRACTION}?|"
        rf"\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{END}"
    ),
    "deepseek-v3": split(r"\p{N}{1,3}", "[一-龥぀-ゟ゠-ヿ]+", DEEPSEEK),
    "escaped": split(r"\.\ \[+|[\]\ ]+"),
    "words removed": Sequence(
        [Split(Regex(r"[\S-]+"), "removed", invert=True), ByteLevel(add_prefix_space=False, use_regex=False)]
    ),
}
PIECES = [
    *(piece for piece in fast_tokenizer._PIECES if piece.isascii()),
    "\t\n",
    "\r",
    "I'M",
    "don't",
    "x=1;",
    "/\n",
    "~",
]
TEXTS = st.text(st.sampled_from("\t\n\r !'-./09=AKSZ[\\]^_`ast{|}~")) | st.lists(st.sampled_from(PIECES)).map("".join)


def written(pre_tokenizer: PreTokenizer) -> PreTokenizer:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizer
    return ascii_tokenizer._writing_tokenizer(backend).pre_tokenizer


WRITTEN = {name: written(pre_tokenizer) for name, pre_tokenizer in PUBLISHED.items()}


def trained(
    pre_tokenizer: PreTokenizer,
    normalizer: normalizers.Normalizer | None = None,
    special_tokens: Iterable[str] = ("<s>",),
) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizer, decoders.ByteLevel()
    if normalizer:
        tokenizer.normalizer = normalizer
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        show_progress=False,
        initial_alphabet=ByteLevel.alphabet(),
        special_tokens=[*special_tokens],
    )
    tokenizer.train_from_iterator([*CORPUS, *PIECES * 3, " ".join(PIECES) * 3], trainer)
    return tokenizer


def ids_of(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    return [one.ids for one in tokenizer.encode_batch(texts, add_special_tokens=False)]


@pytest.mark.parametrize("name", PUBLISHED)
@given(text=TEXTS)
@example(text="aStaSA aAs \t\n\r\n  1 12345 's'S {x}--~/\n")
def test_written_text_is_split_into_the_words_of_the_text(name: str, text: str) -> None:
    if (as_bytes := ascii_tokenizer._written(text)) is None:
        assert set(text) & {"\0", "\x1c"}
        return
    assert WRITTEN[name].pre_tokenize_str(as_bytes) == PUBLISHED[name].pre_tokenize_str(text)


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("normalizer", [None, normalizers.NFC(), normalizers.Sequence([])])
def test_ids_are_those_of_the_tokenizer(name: str, normalizer: normalizers.Normalizer | None) -> None:
    backend = trained(PUBLISHED[name], normalizer)
    backend.add_special_tokens(["<|im start|>", "<｜end▁of▁text｜>"])
    encoder = open_ascii(backend, ["<s>", "<|im start|>"])
    assert encoder is not None
    maker = random.Random(0)
    pieces = [*PIECES, *fast_tokenizer._PIECES, "<s>", "<|im start|>", "<｜end▁of▁text｜>"]
    texts = ["".join(maker.choices(pieces if n % 2 else PIECES, k=maker.randrange(25))) for n in range(3000)]
    assert [ids.tolist() for ids in encoder.encode(texts)] == ids_of(backend, texts)


def test_only_texts_of_ascii_are_written() -> None:
    texts = ["", "a b\t\r\n~", "\x7f", "é", "a\0", " "]
    assert [ascii_tokenizer._written(text) for text in texts] == ["", "aĠbĉčĊ~", None, None, None, "Ġ"]


def changed(change: Callable[[dict[str, Any]], object]) -> Tokenizer:
    facts = json.loads(byte_level_tokenizer().backend_tokenizer.to_str())
    change(facts)
    return Tokenizer.from_str(json.dumps(facts))


@pytest.mark.parametrize(
    "pattern",
    [
        "a.b",
        "^a",
        "a$",
        r"\bA",
        r"\w+",
        r"\P{L}",
        r"\p{Han}",
        "[a[b]]",
        "[a&&b]",
        "[!-~]",
        "[+--]",
        "(?i: a)",
        "(?<= )a",
    ]
    + ["(?x) a", "é", "[à-é]", r"\x20", "\\\t", "[]a]", "[^]a]"],
)
def test_pattern_that_is_not_known_is_left_to_the_tokenizer(pattern: str) -> None:
    assert open_ascii(trained(split(pattern)), []) is None


@pytest.mark.parametrize(
    "pre_tokenizer",
    [
        ByteLevel(add_prefix_space=True),
        Sequence([]),
        Sequence([GPT2, Digits()]),
        Sequence([pre_tokenizers.Punctuation(), GPT2]),
        Sequence([Split(" ", "isolated"), GPT2]),
    ],
)
def test_pre_tokenizer_that_is_not_known_is_left_alone(pre_tokenizer: PreTokenizer) -> None:
    assert open_ascii(trained(pre_tokenizer), []) is None


@pytest.mark.parametrize("name", ["sentencepiece", "wordpiece"])
def test_tokenizer_without_bytes_is_left_alone(name: str) -> None:
    assert open_ascii(TOKENIZERS[name]().backend_tokenizer, []) is None
    assert open_ascii(changed(lambda facts: facts.update(pre_tokenizer=None)), []) is None


def test_model_or_added_tokens_that_read_more_than_the_text_are_left_alone() -> None:
    assert open_ascii(byte_level_tokenizer().backend_tokenizer, []) is not None
    assert open_ascii(changed(lambda facts: facts["model"].update(dropout=0.1)), []) is None
    assert open_ascii(changed(lambda facts: facts.update(normalizer={"type": "Lowercase"})), []) is None
    replace = {"type": "Replace", "pattern": {"String": "Zebra"}, "content": "x"}
    assert open_ascii(changed(lambda facts: facts.update(normalizer=replace)), []) is None
    for name in ("lstrip", "rstrip", "single_word"):
        assert open_ascii(changed(lambda facts, name=name: facts["added_tokens"][3].update({name: True})), []) is None
    backend = byte_level_tokenizer().backend_tokenizer
    backend.add_tokens([AddedToken("Ġthe", normalized=False)])  # is no text, but could be a written one
    assert open_ascii(backend, []) is None
    backend = byte_level_tokenizer().backend_tokenizer
    backend.encode_special_tokens = True
    assert open_ascii(backend, []) is None
    backend = trained(GPT2, special_tokens=["<|im start|>"])  # stands in the vocabulary as it is, not written
    assert open_ascii(backend, []) is None


def test_encoder_that_differs_on_odd_texts_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = trained(PUBLISHED["smollm, starcoder2"])
    assert open_ascii(backend, []) is not None
    monkeypatch.setattr(ascii_tokenizer, "_DIGITS_GPT2_PATTERN", ascii_tokenizer._GPT2_PATTERN)
    assert open_ascii(backend, []) is None


def test_pattern_that_cannot_be_compiled_is_left_to_the_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ascii_tokenizer, "_written_pattern", lambda pattern: f"({pattern}")
    assert open_ascii(trained(GPT2), []) is None


def test_prompt_tokenizer_encodes_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    given_texts = []

    class Seen(AsciiTokenizer):
        def encode(self, texts: Any) -> Any:
            given_texts.extend(texts)
            return super().encode(texts)

    monkeypatch.setattr(ascii_tokenizer, "AsciiTokenizer", Seen)
    tokenizer = PromptTokenizer(byte_level_tokenizer())
    backend = byte_level_tokenizer().backend_tokenizer
    texts = ["What is 2+2?", "é", "<|im_start|>user\n"]
    assert [ids.tolist() for ids in tokenizer.encode(texts)] == ids_of(backend, texts)
    assert given_texts[-3:] == texts
