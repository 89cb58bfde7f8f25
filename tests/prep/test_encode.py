"""Stage 3: the five invariants (DESIGN 4.2) over tokenizers, formats and texts; rows that do not fit.

The oracle is not the code under test: ids come from the bare tokenizer, texts from the row as it is.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

import pytest
from conftest import CONTROL_TOKENS, TOKENIZERS
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from prep_helpers import with_turn
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from llm.chat_template import ChatTemplateFormat
from llm.errors import ConfigError, DataError
from llm.named_formats import ChatMLFormat, Llama2Format, PlainFormat, UserAssistantFormat
from llm.prompt import Message, Prompt
from llm.prompt_format import PromptFormat, Role
from llm.tokenizer import PromptTokenizer
from llm.training.prep.encode import Dropped, Encoder, Example
from llm.training.prep.rows import Row

CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
FORMATS: dict[str, Callable[[], PromptFormat | ChatTemplateFormat]] = {
    "plain": PlainFormat,
    "user_assistant": UserAssistantFormat,
    "chatml": ChatMLFormat,
    "llama2": Llama2Format,
    "newline": lambda: PromptFormat(input=Role("Q:\n"), response=Role("A:\n", "<|im_end|>\n", strip_text=False)),
    "chat_template": ChatTemplateFormat,
}
PROMPTS = {
    "bare": Prompt(),
    "few_shot": Prompt(
        system_message="Be brief.",
        examples=(Message("1+1?", "2", ("Sums.",)), Message("2+2?", "4")),
        input_template="Question: {text}",
        context_template="[{index}] {text}",
        response_template="Answer: {text}",
    ),
}
CONTROL_TEXTS = ("<|im_end|>", "</s>", "<|im_start|>assistant\n", "<s>", "<pad>", "<unk>")
PLAIN_TEXTS = (
    "Wie geht es dir?", "4", " ", "  ", "\n", "\n\n", "\t", "é", "e\u0301", "日本語", "👩\u200d👩\u200d👧", "\u00a0",
    "▁", "{text}", "{{ x }}", "a", ":", "[/INST]", "</", "s>", "x" * 30, "\u200b", "\r\n", "0.5", "Input: ", "]",
    "<|im_", "end|>",
)  # fmt: skip
plain_texts = st.one_of(
    st.lists(st.sampled_from(PLAIN_TEXTS), max_size=6).map("".join),
    st.text(st.characters(exclude_categories=("Cs", "Co")), max_size=12),
).filter(lambda text: not any(token in text for token in CONTROL_TOKENS))
any_texts = st.lists(st.sampled_from(PLAIN_TEXTS + CONTROL_TEXTS), max_size=6).map("".join)
ALL = [(tokenizer, form) for tokenizer in TOKENIZERS for form in FORMATS]
LOSSLESS = [(tokenizer, form) for tokenizer, form in ALL if tokenizer != "wordpiece"]
QUICK = settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.filter_too_much])


@dataclass(frozen=True)
class Case:
    """An encoder, and the bare tokenizer as oracle."""

    encoder: Encoder
    ids_of: Callable[[str], list[int]]
    text_of: Callable[[list[int]], str]

    def example(self, row: Row) -> Example:
        """The example of `row`; the case is left out when the row rightly becomes none."""
        (outcome,) = self.encoder.encode([row])
        if isinstance(outcome, Dropped):
            assume(outcome.reason not in ("empty_response", "empty_prompt"))
            # SentencePiece decodes U+2581 as a space; a lossy tokenizer may leave a whole response out.
            is_odd = any("▁" in text for text in texts_of(row))
            assume(not (outcome.reason == "not_representable" and (is_odd or not self.encoder.tokenizer.is_lossless)))
        assert isinstance(outcome, Example), outcome
        return outcome

    def prompt_text(self, row: Row) -> str:
        """The prompt as inference renders it: it knows no response."""
        message = Message(row.turns[0].input, None, row.turns[0].contexts)
        segments = self.encoder.prompt_format.segments(self.encoder.prompt.conversation([message]))
        return "".join(segment.text for segment in segments)


@cache
def case(tokenizer: str, form: str, prompt: str = "few_shot") -> Case:
    bare = TOKENIZERS[tokenizer]()
    bare.chat_template = CHAT_TEMPLATE
    wrapped = PromptTokenizer(bare)
    encoder = Encoder(
        tokenizer=wrapped,
        prompt=PROMPTS[prompt],
        prompt_format=FORMATS[form]().for_tokenizer(wrapped),
        max_tokens=10_000,
    )
    oracle = Tokenizer.from_str(bare.backend_tokenizer.to_str())  # a copy that our code never touches
    return Case(
        encoder,
        lambda text: oracle.encode(text, add_special_tokens=False).ids,
        lambda ids: oracle.decode(ids, skip_special_tokens=False),
    )


def rows(texts: st.SearchStrategy[str]) -> st.SearchStrategy[Row]:
    return st.builds(
        Row.of, number=st.just(0), input=texts, response=texts, contexts=st.lists(texts, max_size=2).map(tuple)
    )


def num_control_tokens(ids: list[int], encoder: Encoder) -> int:
    return sum(number in encoder.tokenizer.control_tokens.values() for number in ids)


def texts_of(row: Row) -> list[str]:
    (turn,) = row.turns
    return [turn.input, turn.response, *turn.contexts]


def neutral(row: Row) -> Row:
    """`row` without control-token text."""
    question, answer, *contexts = map(replace_control_text, texts_of(row))
    return with_turn(row, input=question, response=answer, contexts=tuple(contexts))


def replace_control_text(text: str) -> str:
    for token in CONTROL_TOKENS:
        text = text.replace(token, "x")
    return text


# --- the five invariants ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize(("tokenizer", "form"), ALL)
@QUICK
@given(row=rows(plain_texts))
def test_i1_ids_before_the_first_label_are_those_of_the_prompt_alone(
    tokenizer: str, form: str, prompt: str, row: Row
) -> None:
    one = case(tokenizer, form, prompt)
    example = one.example(row)
    assert example.input_ids[: example.trained[0][0]].tolist() == one.ids_of(one.prompt_text(row))


@pytest.mark.parametrize(("tokenizer", "form"), LOSSLESS)
@QUICK
@given(row=rows(any_texts))
def test_i2_decoding_gives_the_rendered_text_with_one_bos(tokenizer: str, form: str, row: Row) -> None:
    one = case(tokenizer, form)
    example = one.example(row)
    message = Message(row.turns[0].input, row.turns[0].response, row.turns[0].contexts)
    segments = one.encoder.prompt_format.segments(one.encoder.prompt.conversation([message]))
    rendered = "".join(segment.text for segment in segments)
    stop = one.encoder.prompt_format.stop
    assert one.text_of(example.input_ids) == rendered[: rendered.rfind(stop) + len(stop)] == example.text
    bos = one.encoder.tokenizer.control_tokens["<s>"]
    if form == "chat_template":  # whether there is one is the template's business
        return
    has_bos = tokenizer == "sentencepiece" or form == "llama2"
    assert (example.input_ids[:1].tolist() == [bos]) is has_bos
    assert example.input_ids[1:2].tolist() != [bos]


@pytest.mark.parametrize("form", FORMATS)
@QUICK
@given(row=rows(plain_texts))
def test_i2_decoded_prompt_begins_the_decoded_whole_of_a_lossy_tokenizer(form: str, row: Row) -> None:
    one = case("wordpiece", form)
    example = one.example(row)
    prompt = one.text_of(example.input_ids[: example.trained[0][0]])
    assert one.text_of(example.input_ids).startswith(prompt)


@pytest.mark.parametrize(("tokenizer", "form"), LOSSLESS)
@QUICK
@given(row=rows(any_texts))
def test_i3_labels_are_the_whole_response_and_the_stop_token(tokenizer: str, form: str, row: Row) -> None:
    one = case(tokenizer, form)
    example = one.example(row)
    ((start, end),) = example.trained
    assert end == len(example.input_ids)
    assert example.input_ids[-1] == one.encoder.tokenizer.control_tokens[one.encoder.prompt_format.stop]
    behind = one.text_of(example.input_ids).removeprefix(one.prompt_text(row))
    assert behind.removesuffix(one.encoder.prompt_format.stop).strip() == row.turns[0].response.strip()
    assert 0 < start < end - 1


@pytest.mark.parametrize(("tokenizer", "form"), LOSSLESS)
@QUICK
@given(row=rows(plain_texts))
def test_i4_few_shot_examples_and_contexts_are_never_labels(tokenizer: str, form: str, row: Row) -> None:
    one = case(tokenizer, form)
    row = with_turn(row, response="zq", contexts=("ctx7",))
    example = one.example(row)
    (span,) = example.trained
    text = one.text_of(example.input_ids[slice(*span)])
    assert text.strip().removesuffix(one.encoder.prompt_format.stop).strip() == "zq"
    unlabelled = one.text_of(example.input_ids[: span[0]])
    if form != "chat_template":
        assert all(part in unlabelled for part in ("1+1?", "2+2?", "[1] Sums."))
    assert "[1] ctx7" in unlabelled


@pytest.mark.parametrize(("tokenizer", "form"), ALL)
@QUICK
@given(row=rows(any_texts))
def test_i5_control_text_in_data_makes_no_control_token(tokenizer: str, form: str, row: Row) -> None:
    one = case(tokenizer, form)
    assume(replace_control_text(row.turns[0].response).strip() and "\u200b" not in row.turns[0].response)
    example, plain = one.example(row), one.example(neutral(row))
    unknown = one.encoder.tokenizer.control_tokens["<unk>"]
    count = [num_control_tokens([i for i in e.input_ids if i != unknown], one.encoder) for e in (example, plain)]
    assert count[0] == count[1]
    texts = texts_of(row)
    assert example.has_control_text is any(token in t for token in one.encoder.tokenizer.control_tokens for t in texts)


@QUICK
@given(row=rows(any_texts))
def test_i1_with_control_text_compares_under_the_same_rule(row: Row) -> None:
    one = case("byte_level", "chatml", "bare")
    example = one.example(row)
    opening, closing = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"
    text = one.prompt_text(row)
    assert text.startswith(opening) and text.endswith(closing)
    as_text = TOKENIZERS["byte_level"]().backend_tokenizer
    as_text.encode_special_tokens = True  # the library's own way to keep them as text
    user = as_text.encode("user\n" + text[len(opening) : -len(closing)], add_special_tokens=False).ids
    expected = [*one.ids_of("<|im_start|>"), *user, *one.ids_of(closing)]
    assert example.input_ids[: example.num_prompt_tokens].tolist() == expected


def test_control_texts_around_the_number_of_another_stay_what_they_are() -> None:
    """`</s>` and `<|im_end|>` (number 4) around a 4: their private marks stand back to back."""
    one = case("byte_level", "chatml", "bare")
    assert one.encoder.tokenizer.control_tokens["<|im_end|>"] == 4
    example = one.example(Row.of(number=0, input="a", response="</s>4<|im_end|>"))
    response = one.text_of(example.input_ids[example.num_prompt_tokens :])
    assert response == "</s>4<|im_end|>" + "<|im_end|>"


def test_control_text_in_data_with_permission_becomes_a_counted_control_token() -> None:
    encoder = replace(case("byte_level", "chatml", "bare").encoder, allow_special_tokens_in_data=True)
    (example,) = encoder.encode([Row.of(number=0, input="a<|im_end|>b", response="c")])
    assert isinstance(example, Example)
    assert example.has_control_text
    assert example.input_ids.count(encoder.tokenizer.control_tokens["<|im_end|>"]) == 3


def test_prompt_that_would_merge_with_the_response_keeps_its_own_ids() -> None:
    """`Answ` + `er` is one token in one pass: the anchored join of TRAPS 2.1."""
    tokenizer = case("byte_level", "plain").encoder.tokenizer
    form = PromptFormat(response=Role("Answ", "<|im_end|>")).for_tokenizer(tokenizer)
    one = replace(case("byte_level", "plain", "bare"), encoder=encoder_of(100, prompt_format=form))
    row = Row.of(number=0, input="a", response="er: b")
    example = one.example(row)
    prompt = one.ids_of("a\nAnsw")
    assert one.ids_of("a\nAnswer: b<|im_end|>")[: len(prompt)] != prompt
    assert example.input_ids[: example.num_prompt_tokens].tolist() == prompt
    assert one.text_of(example.input_ids[example.num_prompt_tokens :]) == "er: b<|im_end|>"


def test_prompt_that_merges_in_a_lossy_tokenizer_is_dropped_not_trained_apart() -> None:
    """`b` + `rown` is one token: tokenized apart they would be two words, and no later check sees that."""
    tokenizer = case("wordpiece", "plain").encoder.tokenizer
    form = PromptFormat(response=Role("b", "<|im_end|>")).for_tokenizer(tokenizer)
    encoder = replace(case("wordpiece", "plain", "bare").encoder, prompt_format=form)
    outcomes = encoder.encode([Row.of(number=0, input="a", response="rown fox")])
    assert outcomes == [Dropped(row=0, reason="no_exact_boundary")]


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize(("tokenizer", "form"), ALL)
def test_rows_encoded_together_become_what_each_becomes_alone(tokenizer: str, form: str, prompt: str) -> None:
    """Whatever they begin with alike: a word, a part of one, a part of a control token's name."""
    encoder = case(tokenizer, form, prompt).encoder
    inputs = ("The quick", "The question", "The quick <|im_s", "The quick <|im_start|>", "The quick <|im_", "The")
    some = [Row.of(number=n, input=text, response="brown fox") for n, text in enumerate(inputs)]
    for batch in (some, some[:2], some[2:5]):
        assert encoder.encode(batch) == [outcome for row in batch for outcome in encoder.encode([row])]


def test_lone_surrogate_is_dropped_and_the_rows_beside_it_are_kept() -> None:
    texts = ("a", "\ud800", "b")
    outcomes = encoder_of(100).encode([Row.of(number=n, input=text, response="c") for n, text in enumerate(texts)])
    assert outcomes[1] == Dropped(row=1, reason="not_representable")
    assert all(isinstance(outcome, Example) for outcome in outcomes[::2])


def test_text_behind_the_stop_token_is_not_part_of_the_example() -> None:
    one = case("byte_level", "newline", "bare")
    assert one.example(Row.of(number=0, input="a", response="b")).text == "Q:\na\nA:\nb<|im_end|>"


# --- rows that do not fit --------------------------------------------------------------------------------------------

LONG = Row.of(number=7, input="What is it? " * 4, response="A fox.", contexts=("Ctx one.", "Ctx two.", "Ctx three."))


def encoder_of(max_tokens: int, **changes: object) -> Encoder:
    return replace(case("byte_level", "chatml", "bare").encoder, max_tokens=max_tokens, **changes)  # type: ignore[arg-type]


def num_tokens(row: Row) -> int:
    (outcome,) = encoder_of(10_000).encode([row])
    assert isinstance(outcome, Example)
    return len(outcome.input_ids)


@pytest.mark.parametrize("on_too_long", ["drop", "error", "truncate_contexts"])
@pytest.mark.parametrize("spare", [0, 1])
def test_row_of_chunksize_or_one_less_is_kept_whole(on_too_long: str, spare: int) -> None:
    (outcome,) = encoder_of(num_tokens(LONG) + spare, on_too_long=on_too_long).encode([LONG])
    assert isinstance(outcome, Example)
    assert not outcome.is_cut
    assert len(outcome.input_ids) == num_tokens(LONG)


def test_row_one_longer_than_chunksize_is_dropped_with_its_length() -> None:
    length = num_tokens(LONG)
    (outcome,) = encoder_of(length - 1).encode([LONG])
    assert outcome == Dropped(row=7, reason="too_long", num_tokens=length)


def test_row_one_longer_than_chunksize_is_an_error_that_names_row_and_lengths() -> None:
    length = num_tokens(LONG)
    with pytest.raises(DataError, match=rf"row 7 .*: {length} tokens, a block holds {length - 1} "):
        encoder_of(length - 1, on_too_long="error").encode([LONG])


@pytest.mark.parametrize("kept", [2, 1, 0])
def test_row_too_long_loses_whole_contexts_from_the_end_and_no_more_than_needed(kept: int) -> None:
    expected = with_turn(LONG, contexts=LONG.turns[0].contexts[:kept])
    (outcome,) = encoder_of(num_tokens(expected), on_too_long="truncate_contexts").encode([LONG])
    assert isinstance(outcome, Example)
    (whole,) = encoder_of(10_000).encode([expected])
    num_cut_tokens = num_tokens(LONG) - len(whole.input_ids)
    assert outcome == replace(whole, num_cut_contexts=3 - kept, num_cut_tokens=num_cut_tokens)


def test_row_too_long_without_contexts_loses_the_end_of_its_input() -> None:
    bare = with_turn(LONG, contexts=())
    (outcome,) = encoder_of(num_tokens(bare) - 1, on_too_long="truncate_contexts").encode([LONG])
    assert isinstance(outcome, Example)
    assert outcome.num_cut_contexts == 3
    kept = len(LONG.turns[0].input) - outcome.num_cut_characters
    (expected,) = encoder_of(10_000).encode([with_turn(bare, input=LONG.turns[0].input[:kept])])
    assert outcome.input_ids == expected.input_ids
    longer = with_turn(bare, input=LONG.turns[0].input[: kept + 1])
    assert outcome.num_cut_characters == 1 or num_tokens(longer) > num_tokens(bare) - 1


@given(room=st.integers(1, 80), size=st.integers(0, 60))
@settings(max_examples=40, deadline=None)
def test_cut_row_keeps_response_and_stop_token_and_fits(room: int, size: int) -> None:
    row = Row.of(number=0, input="ab " * size, response="Yes, a fox.", contexts=("c" * size,))
    (outcome,) = encoder_of(room, on_too_long="truncate_contexts").encode([row])
    if isinstance(outcome, Dropped):
        smallest = num_tokens(with_turn(row, input=row.turns[0].input[:1], contexts=()))
        assert smallest > room
        return
    assert len(outcome.input_ids) <= room
    assert outcome.text.endswith("<|im_start|>assistant\nYes, a fox.<|im_end|>")


def test_check_room_with_a_prompt_as_long_as_chunksize_is_a_config_error() -> None:
    length = num_tokens(Row.of(number=0, input="", response="x")) - 1
    encoder_of(length + 1).check_room()
    with pytest.raises(ConfigError, match=rf"chunksize: the prompt alone .* takes {length} tokens"):
        encoder_of(length).check_room()


def test_check_room_with_a_stop_of_plain_text_is_a_config_error() -> None:
    encoder = encoder_of(
        100, prompt_format=replace(case("byte_level", "chat_template").encoder.prompt_format, stop="END")
    )
    with pytest.raises(ConfigError, match="stop `END` is not a control token"):
        encoder.check_room()


@pytest.mark.parametrize("response", ["", "  ", "\n"])
def test_blank_response_is_dropped(response: str) -> None:
    outcomes = encoder_of(100).encode([Row.of(number=3, input="a", response=response)])
    assert outcomes == [Dropped(row=3, reason="empty_response")]


def test_empty_prompt_is_dropped_since_nothing_predicts_the_first_token() -> None:
    tokenizer = case("byte_level", "plain").encoder.tokenizer
    form = PromptFormat(role_separator="").for_tokenizer(tokenizer)
    encoder = Encoder(tokenizer=tokenizer, prompt=Prompt(), prompt_format=form, max_tokens=100)
    encoder.check_room()
    outcomes = encoder.encode([Row.of(number=0, input="", response="b"), Row.of(number=1, input="a", response="b")])
    assert isinstance(outcomes[0], Dropped)
    assert outcomes[0].reason == "empty_prompt"
    assert isinstance(outcomes[1], Example)


def test_prompt_of_no_tokens_is_dropped_though_it_is_some_text() -> None:
    outcomes = case("wordpiece", "plain", "bare").encoder.encode([Row.of(number=0, input="", response="brown fox")])
    assert isinstance(outcomes[0], Dropped)
    assert outcomes[0].reason == "empty_prompt"


def test_character_that_the_tokenizer_lacks_is_dropped_not_changed() -> None:
    facts = json.loads(TOKENIZERS["byte_level"]().backend_tokenizer.to_str())
    del facts["model"]["vocab"]["Î"]  # the first byte of α, as SmolLM2 lacks 21 bytes
    facts["model"]["merges"] = [pair for pair in facts["model"]["merges"] if "Î" not in "".join(pair)]
    lacking = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(facts)))
    encoder = replace(encoder_of(100), tokenizer=PromptTokenizer(lacking))
    kept, dropped = encoder.encode(
        [Row.of(number=0, input="a", response="e"), Row.of(number=1, input="α", response="e")]
    )
    assert isinstance(kept, Example)
    assert isinstance(dropped, Dropped)
    assert dropped.reason == "not_representable"


def test_private_marks_in_data_are_an_error_that_names_the_row() -> None:
    with pytest.raises(DataError, match=r"source_config: row 4 .*U\+F8FD"):
        encoder_of(100).encode([Row.of(number=4, input="</s>\uf8fd", response="a")])


def test_encode_gives_the_outcomes_in_row_order() -> None:
    some = [Row.of(number=n, input=f"q{n}", response="" if n % 3 == 0 else f"a{n}") for n in range(10)]
    assert [outcome.row for outcome in encoder_of(100).encode(some)] == list(range(10))
