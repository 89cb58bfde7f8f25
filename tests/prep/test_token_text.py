"""What each token shows: one text a token, nothing hidden, nothing broken, for every kind of tokenizer."""

import pytest
from conftest import TOKENIZERS

from llm.tokenizer import PromptTokenizer
from llm.training.prep.token_text import CONTINUED, MARKS, shown_tokens, visible

BYTE_LEVEL, SENTENCEPIECE = "byte_level", "sentencepiece"


def shown(tokenizer: PromptTokenizer, text: str) -> list[str]:
    [ids] = tokenizer.encode([text])
    texts = shown_tokens(ids, tokenizer)
    assert len(texts) == len(ids)
    return texts


@pytest.mark.parametrize("name", TOKENIZERS)
def test_shown_tokens_put_together_are_the_text_with_its_spaces_seen(
    tokenizers: dict[str, PromptTokenizer], name: str
) -> None:
    texts = shown(tokenizers[name], "<s>the dog\n assistant: 2+2<|im_end|>")
    together = "".join(texts).replace(CONTINUED, "")
    # A WordPiece tokenizer takes newlines away, and decodes with spaces between words and signs.
    wanted = {"wordpiece": "<s>·the·dog·assistant·:·2·+·2<|im_end|>"}
    assert together == wanted.get(name, "<s>the·dog↵·assistant:·2+2<|im_end|>")
    assert texts[0] == "<s>" and texts[-1] == "<|im_end|>" and len(texts) > 5


@pytest.mark.parametrize("name", [BYTE_LEVEL, SENTENCEPIECE])
def test_character_of_several_tokens_stands_whole_at_its_first(
    tokenizers: dict[str, PromptTokenizer], name: str
) -> None:
    assert shown(tokenizers[name], "xé😀y")[-8:] == ["x", "é", "⋯", "😀", "⋯", "⋯", "⋯", "y"]


@pytest.mark.parametrize("name", [BYTE_LEVEL, SENTENCEPIECE])
def test_bytes_that_are_no_character_are_ids_and_never_swallow_a_control_token(
    tokenizers: dict[str, PromptTokenizer], name: str
) -> None:
    tokenizer = tokenizers[name]
    cut = tokenizer.encode(["x😀"])[0][:-1]
    end = tokenizer.control_tokens["<|im_end|>"]
    texts = shown_tokens([*cut, end, cut[-1], 999_999], tokenizer)
    lost = [f"<id {number}>" for number in cut[-3:]]
    assert texts[-7:] == ["x", *lost, "<|im_end|>", lost[-1], "<id 999999>"]


@pytest.mark.parametrize("name", [BYTE_LEVEL, SENTENCEPIECE])
def test_replacement_character_of_the_data_is_itself(tokenizers: dict[str, PromptTokenizer], name: str) -> None:
    assert shown(tokenizers[name], "x\ufffd<|im_end|>")[-5:] == ["x", "\ufffd", "⋯", "⋯", "<|im_end|>"]
    assert shown(tokenizers[name], "x\ufffdy")[-4:] == ["\ufffd", "⋯", "⋯", "y"]


def test_dummy_space_is_an_id_and_takes_no_text_from_the_next(tokenizers: dict[str, PromptTokenizer]) -> None:
    [dummy, two] = tokenizers[SENTENCEPIECE].encode(["2"])[0]
    assert shown_tokens([dummy, two], tokenizers[SENTENCEPIECE]) == [f"<id {dummy}>", "2"]


def test_context_keeps_the_space_that_a_first_token_would_lose(tokenizers: dict[str, PromptTokenizer]) -> None:
    tokenizer = tokenizers[SENTENCEPIECE]
    dog = tokenizer.encode(["x dog"])[0][2:]
    assert shown_tokens(dog, tokenizer, context=tokenizer.encode(["x"])[0])[0].startswith("·")
    assert not shown_tokens(dog, tokenizer)[0].startswith("·")


def test_control_token_text_of_the_data_is_not_one_token(tokenizers: dict[str, PromptTokenizer]) -> None:
    tokenizer = tokenizers[BYTE_LEVEL]
    texts = shown(tokenizer, tokenizer.keep_as_text("<s>"))
    assert len(texts) > 1 and "".join(texts) == "<s>"


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (" a\n\tb  ", "·a↵⇥b··"),
        ("\r\u00a0\u200b\x1b[31m", "<U+000D><U+00A0><U+200B><U+001B>[31m"),
        ("│·↵⇥⋯", "<U+2502><U+00B7><U+21B5><U+21E5><U+22EF>"),  # ours, so never the data's
        ("e\u0301", "e\u0301"),
        ("\u0301e", "<U+0301>e"),
        ("日本 é|[]", "日本·é|[]"),
        ("", ""),
    ],
)
def test_visible_shows_what_cannot_be_seen_or_could_be_a_mark(text: str, wanted: str) -> None:
    assert visible(text) == wanted


def test_marks_are_found_and_text_is_not() -> None:
    assert MARKS.findall("a·<U+00A0>│<id 5>⋯ <b> U+00A0 |") == ["·", "<U+00A0>", "│", "<id 5>", "⋯"]
