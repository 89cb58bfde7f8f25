"""A filled frame is what prompt and format render, or there is none."""

import inspect
from collections.abc import Callable
from typing import Any

import pytest
from conftest import byte_level_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from llm import named_formats
from llm.prompt import DefaultPrompt, FewShotQA, Message, Prompt, StandaloneQuestion
from llm.prompt_format import PromptFormat, Role, Segment
from llm.tokenizer import PromptTokenizer
from llm.training.prep.encode import Encoder
from llm.training.prep.frame import Frames
from llm.training.prep.rows import Row

FORMATS: list[PromptFormat] = [
    *(kind(stop="</s>") for _, kind in inspect.getmembers(named_formats, inspect.isclass) if "Format" in kind.__name__),
    PromptFormat(input=Role("Q: "), response=Role("A: ", strip_text=False), stop="</s>", contexts_first=False),
]
PROMPTS = [
    Prompt(),
    DefaultPrompt(),
    FewShotQA(),
    StandaloneQuestion(),
    Prompt(input_template=" {text} ", response_template="\n{text}\n", context_template="{index}) {text} "),
]
texts = (
    st.lists(st.sampled_from(["a", "Wie?", " ", "\n", "\u2003", "{text}", "</", "s>", "é", "x y"]), max_size=4)
    .map("".join)
    .filter(lambda text: "</s>" not in text)
)


def rendering(prompt: Prompt, prompt_format: PromptFormat) -> Callable[[Message], list[Segment]]:
    return lambda message: prompt.segments([message], prompt_format)


@pytest.mark.parametrize("prompt_format", FORMATS, ids=lambda one: type(one).__name__)
@pytest.mark.parametrize("prompt", PROMPTS, ids=range(len(PROMPTS)))
@settings(max_examples=30, deadline=None)
@given(rows=st.lists(st.tuples(texts, texts, st.lists(texts, max_size=3)), min_size=1, max_size=4))
def test_frame_gives_what_is_rendered(prompt: Prompt, prompt_format: PromptFormat, rows: list[Any]) -> None:
    render = rendering(prompt, prompt_format)
    frames = Frames(render)
    for question, answer, contexts in rows:
        message = Message(question, answer, tuple(contexts))
        found = frames.segments(message)
        ends_in_text = all(text and text == text.strip() for text in (question, answer, *contexts))
        assert found == (render(message)[:2] if ends_in_text else None)


def test_what_a_row_changes_besides_its_texts_has_no_frame() -> None:
    def shouts(message: Message) -> list[Segment]:
        return [Segment(message.input.upper() + "!", False), Segment(message.response or "", True)]

    def repeats(message: Message) -> list[Segment]:
        return [Segment(message.input * 2, False), Segment(message.response or "", True)]

    def mixes(message: Message) -> list[Segment]:
        return [Segment("Q", False), Segment(f"{message.input}{message.response}", True)]

    def refuses(message: Message) -> list[Segment]:
        raise ValueError("no")

    for render in (shouts, repeats, mixes, refuses):
        assert Frames(render).segments(Message("a", "b")) is None
    odd = Message("\U000f0001", "b")  # a placeholder in the data itself
    render = rendering(Prompt(), FORMATS[-1])
    assert Frames(render).segments(odd) is None
    frames = Frames(render)
    assert frames.segments(Message("a", "b")) == render(Message("a", "b"))
    assert frames.segments(odd) == render(odd)


class OwnPrompt(Prompt):
    """Code of a user's own."""


@pytest.mark.parametrize(
    ("prompt", "row", "is_framed"),
    [
        (Prompt(), Row.of(number=0, input="a", response="b"), True),
        (OwnPrompt(), Row.of(number=0, input="a", response="b"), False),
        (Prompt(), Row(number=0, turns=(Message("a", "b"),), system="Be brief."), False),
        (Prompt(), Row(number=0, turns=(Message("a", "b"), Message("c", "d"))), False),
        (Prompt(), Row.of(number=0, input="a", response="b <|im_end|>"), False),
    ],
)
def test_rows_of_one_plain_turn_are_framed(
    prompt: Prompt, row: Row, is_framed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[Any] = []
    original = Frames.segments
    monkeypatch.setattr(Frames, "segments", lambda self, message: found.append(original(self, message)) or found[-1])
    tokenizer = PromptTokenizer(byte_level_tokenizer())
    form = named_formats.ChatMLFormat().for_tokenizer(tokenizer)
    encoder = Encoder(tokenizer=tokenizer, prompt=prompt, prompt_format=form, max_tokens=100)
    (example,) = encoder.encode([row])
    assert not hasattr(example, "reason")
    assert [one is not None for one in found] == [True] * is_framed
