"""Rows as people have them: other column names, conversations, Alpaca, ShareGPT; and what becomes of the odd ones."""

import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import byte_level_tokenizer
from datasets import Dataset
from prep_helpers import make_config, settings, write_jsonl

from llm.chat_template import ChatTemplateFormat
from llm.errors import DataError
from llm.named_formats import AlpacaFormat, ChatMLFormat, MistralFormat
from llm.prompt import Message, Prompt
from llm.prompt_format import PromptFormat
from llm.tokenizer import PromptTokenizer
from llm.training.config import DatasetConfig
from llm.training.dataprep import prepare
from llm.training.prep.encode import Dropped, Encoder, Example
from llm.training.prep.file_pages import give_unused_back, pages_given_back
from llm.training.prep.manifest import read_manifest
from llm.training.prep.rows import Row, iterate_rows, load_source, with_columns
from llm.training.tune.export import prompt_ids

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "Bye"},
    {"role": "assistant", "content": "Ciao"},
]
TURNS = (Message("Hi", "Hello"), Message("Bye", "Ciao"))
# Tools and reasoning as a template shows them; earlier reasoning stays, so every prompt begins the next one.
TEMPLATE = (
    "{% if tools %}<|im_start|>tools\n{{ tools | length }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.reasoning_content %}({{ m.reasoning_content }}){% endif %}{{ m.content }}"
    "{% for call in m.tool_calls or [] %}[{{ call.function.name }} {{ call.function.arguments | tojson }}]{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": "x"}}}
TOOL_CHAT = [
    {"role": "user", "content": "1+1?"},
    {"role": "assistant", "reasoning_content": "I add.", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "2"},
    {"role": "assistant", "content": "It is 2."},
]
TOOL = {"type": "function", "function": {"name": "add", "description": "Adds."}}


def read(rows: list[dict[str, Any]], **given: Any) -> list[Row]:
    source = with_columns(Dataset.from_list(rows), given.pop("columns", {}), **given)
    return [row for batch in iterate_rows(source, batch_size=2) for row in batch]


@pytest.mark.parametrize("change", [lambda d: d, lambda d: d.shuffle(seed=1), lambda d: d.select(range(3, 9))])
def test_rows_read_from_files_whose_pages_are_given_back_equal_those_in_memory(
    tmp_path: Path, change: Callable[[Dataset], Dataset]
) -> None:
    def rows_of(dataset: Dataset) -> Iterator[Row]:
        for batch in iterate_rows(with_columns(change(dataset), {}), batch_size=2):
            give_unused_back()
            yield from batch

    in_memory = Dataset.from_list([{"input": f"q{n}", "response": f"r{n}", "other": n} for n in range(11)])
    in_memory.save_to_disk(tmp_path / "saved", num_shards=2)
    with pages_given_back():
        found, wanted = map(list, map(rows_of, (Dataset.load_from_disk(tmp_path / "saved"), in_memory)))
    assert found == wanted and len(wanted) in (6, 11)


def encoder_of(kind: type[PromptFormat] = ChatMLFormat, **changes: Any) -> Encoder:
    tokenizer = PromptTokenizer(byte_level_tokenizer())
    form = kind().for_tokenizer(tokenizer)
    return replace(Encoder(tokenizer=tokenizer, prompt=Prompt(), prompt_format=form, max_tokens=10_000), **changes)


def chat_encoder(template: str = TEMPLATE, **changes: Any) -> Encoder:
    plain = byte_level_tokenizer()
    plain.chat_template = template
    tokenizer = PromptTokenizer(plain)
    form = ChatTemplateFormat().for_tokenizer(tokenizer)
    return encoder_of(tokenizer=tokenizer, prompt_format=form, **changes)


def one(encoder: Encoder, row: Row) -> Example:
    (outcome,) = encoder.encode([row])
    assert isinstance(outcome, Example), outcome
    return outcome


def trained_texts(encoder: Encoder, example: Example) -> list[str]:
    return encoder.tokenizer.decode([example.input_ids[start:end] for start, end in example.trained])


# --- columns ---------------------------------------------------------------------------------------------------------


def test_columns_names_map_to_ours() -> None:
    rows = [{"question": "Q", "answer": "A", "docs": ["D"], "id": 7, "persona": None}]
    columns = {"input": "question", "response": "answer", "contexts": "docs", "system": "persona"}
    assert read(rows, columns=columns) == [Row.of(number=0, input="Q", response="A", contexts=("D",))]
    rows[0]["persona"] = "Be brief."
    assert read(rows, columns=columns)[0].system == "Be brief."


def test_columns_name_that_is_not_there_is_a_data_error_with_the_nearest() -> None:
    with pytest.raises(DataError, match="columns: the rows have no column `qestion`. Did you mean `question`?"):
        read([{"question": "Q", "answer": "A"}], columns={"input": "qestion", "response": "answer"})


def test_columns_of_one_name_only_leave_the_others() -> None:
    with pytest.raises(DataError, match=r"no column `response`; .*columns: {input: question, response: answer}"):
        read([{"question": "Q", "answer": "A"}], columns={"input": "question"})
    assert read([{"question": "Q", "response": "A"}], columns={"input": "question"}) == [
        Row.of(number=0, input="Q", response="A")
    ]


# --- formats ---------------------------------------------------------------------------------------------------------

FROM = {"user": "human", "assistant": "gpt"}
FORMATS: dict[str, tuple[dict[str, Any], Row]] = {
    "messages": ({"messages": CHAT}, Row(number=0, turns=TURNS, system="Be brief.")),
    "sharegpt": (
        {"conversations": [{"from": FROM.get(m["role"], m["role"]), "value": m["content"]} for m in CHAT]},
        Row(number=0, turns=TURNS, system="Be brief."),
    ),
    "alpaca": (
        {"instruction": "Add.", "input": "1 and 2", "output": "3"},
        Row.of(number=0, input="Add.", response="3", contexts=("1 and 2",)),
    ),
    "dolly": (
        {"instruction": "Add.", "context": "1 and 2", "response": "3"},
        Row.of(number=0, input="Add.", response="3", contexts=("1 and 2",)),
    ),
}


@pytest.mark.parametrize("name", FORMATS)
def test_row_format_is_found_by_the_columns_and_said(name: str, caplog: pytest.LogCaptureFixture) -> None:
    row, expected = FORMATS[name]
    caplog.set_level(logging.INFO, logger="llm")
    assert read([row]) == [expected]
    assert f"source_config: read as {name} (`{next(iter(row))}` -> " in caplog.text


@pytest.mark.parametrize("name", FORMATS)
def test_row_format_input_response_refuses_the_others(name: str) -> None:
    with pytest.raises(DataError, match="no column `(input|response)`"):
        read([FORMATS[name][0]], row_format="input_response")


@pytest.mark.parametrize("name", FORMATS)
def test_row_format_forced_wins_over_input_and_response(name: str) -> None:
    row, expected = FORMATS[name]
    both = {"input": "other", "response": "other"} | row
    assert read([both])[0] == Row.of(number=0, input=both["input"], response=both["response"])
    assert read([both], row_format=name) == [expected]


def test_row_format_in_a_column_of_another_name_is_found_by_its_items() -> None:
    for name in ("messages", "sharegpt"):
        row, expected = FORMATS[name]
        assert read([{"dialog": next(iter(row.values()))}], columns={"messages": "dialog"}) == [expected]


SHAPES: dict[str, dict[str, Any]] = {
    "from in messages": {"messages": [{"from": FROM.get(m["role"], m["role"]), "value": m["content"]} for m in CHAT]},
    "role in conversations": {"conversations": CHAT},
    "roles of other names": {
        "messages": [m | {"role": {"user": "Prompter", "system": "developer"}.get(m["role"], "model")} for m in CHAT]
    },
    "content in parts": {"messages": [m | {"content": [{"type": "text", "text": m["content"]}]} for m in CHAT]},
    "messages as texts": {"messages": [json.dumps(m) for m in CHAT]},
    "no tools": {"messages": CHAT, "tools": ""},
}


@pytest.mark.parametrize("name", SHAPES)
def test_messages_of_public_data_sets_are_read(name: str) -> None:
    assert read([SHAPES[name]]) == [FORMATS["messages"][1]]


def test_keys_that_say_nothing_do_not_ask_for_a_chat_template() -> None:
    chat = [m | {"id": n, "tool_calls": []} for n, m in enumerate(CHAT)]
    rows = read(
        [{"messages": json.dumps(one)} for one in (chat, CHAT, [chat[0], chat[1] | {"name": "Ann"}, *chat[2:]])]
    )
    marked, bare, named = encoder_of().encode(rows)
    assert isinstance(marked, Example) and isinstance(bare, Example)
    assert marked.input_ids == bare.input_ids
    assert named == Dropped(row=2, reason="needs_chat_template")


def test_message_of_a_role_that_the_template_leaves_out_is_dropped() -> None:
    encoder = chat_encoder(TEMPLATE.replace("for m in messages %}", "for m in messages if m.role != 'critic' %}"))
    (row,) = read([{"messages": [*CHAT[:3], {"role": "critic", "content": "Odd."}, *CHAT[3:]]}])
    assert encoder.encode([row]) == [Dropped(row=0, reason="refused_by_template")]


def test_request_of_a_row_with_an_open_question_has_the_contexts_of_the_last_answer() -> None:
    chat = [*CHAT[1:3], {"role": "user", "content": "More?"}]
    (row,) = read([{"messages": chat, "contexts": ["C"]}])
    assert row.first_prompt("all") == {"messages": chat[:1], "contexts": ["C"], "tools": []}


def test_row_format_dolly_with_columns_takes_one_text_for_a_context() -> None:
    rows = [{"question": "Q", "answer": "A", "context": "C"}]
    columns = {"input": "question", "response": "answer"}
    expected = [Row.of(number=0, input="Q", response="A", contexts=("C",))]
    assert read(rows, columns=columns, row_format="dolly") == expected
    with pytest.raises(DataError, match="`context` must be a list of texts .*`row_format: dolly` takes one text"):
        read(rows, columns=columns | {"contexts": "context"})


def test_messages_as_json_text_are_read() -> None:
    assert read([{"messages": json.dumps(CHAT)}]) == [FORMATS["messages"][1]]


def test_alpaca_without_an_input_has_no_contexts() -> None:
    rows = [{"instruction": "Hi", "input": text, "output": "Hello"} for text in ("", None)]
    assert read(rows) == [Row.of(number=n, input="Hi", response="Hello") for n in range(2)]


def test_alpaca_rows_in_alpaca_format_give_the_published_text() -> None:
    encoder = encoder_of(AlpacaFormat)
    (row,) = read([FORMATS["alpaca"][0]])
    assert one(encoder, row).text == (
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
        "response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd.\n\n### Input:\n1 and 2\n\n### Response:3</s>"
    )


def test_messages_with_a_system_column_take_it_unless_they_have_their_own() -> None:
    rows = [{"messages": CHAT, "system": "Other."}, {"messages": CHAT[1:], "system": "Other."}]
    assert [row.system for row in read(rows)] == ["Be brief.", "Other."]


BAD = {
    "no role": ([{"content": "a"}], r"row 1 .*: messages\[0\] has no `role` and `content`"),
    "null content": ([{"role": "user", "content": None}], r"row 1 .*: `messages\[0\].content` is null"),
    "an image": (
        [{"role": "user", "content": [{"type": "image", "url": "x"}]}],
        r"row 1 .*: messages\[0\] holds a part that is no text",
    ),
    "texts": (["a"], r"row 1 .*: `messages` (must be a list of mappings|is neither a list nor the JSON)"),
}


@pytest.mark.parametrize("name", BAD)
def test_messages_that_cannot_be_used_are_a_data_error_that_names_the_row(name: str) -> None:
    messages, text = BAD[name]
    with pytest.raises(DataError, match=f"source_config: {text}"):
        read([{"messages": json.dumps(CHAT)}, {"messages": json.dumps(messages)}])


# --- conversations as tokens -----------------------------------------------------------------------------------------


def test_conversation_trains_every_answer_and_its_stop_token() -> None:
    encoder = encoder_of()
    example = one(encoder, read([{"messages": CHAT}])[0])
    assert trained_texts(encoder, example) == ["Hello<|im_end|>", "Ciao<|im_end|>"]
    assert example.text == (
        "<s><|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello"
        "<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\nCiao<|im_end|>"
    ).removeprefix("" if encoder.prompt_format.BOS else "<s>")


def test_conversation_with_train_on_last_trains_the_last_answer_of_the_same_tokens() -> None:
    row = read([{"messages": CHAT}])[0]
    whole, last = (one(encoder_of(train_on=train_on), row) for train_on in ("all", "last"))
    assert last.input_ids == whole.input_ids
    assert last.trained == whole.trained[1:]


def test_answer_of_weight_zero_among_tool_messages_is_not_trained_and_the_request_has_no_weight() -> None:
    chat = [TOOL_CHAT[0], TOOL_CHAT[1] | {"weight": 0}, *TOOL_CHAT[2:]]
    (row,) = read([{"messages": json.dumps(chat)}])
    encoder = chat_encoder()
    assert trained_texts(encoder, one(encoder, row)) == ["It is 2.<|im_end|>"]
    assert row.first_prompt("all")["messages"] == TOOL_CHAT[:3]


def test_answer_of_weight_zero_is_not_trained() -> None:
    chat = [*CHAT[:2], CHAT[2] | {"weight": 0}, *CHAT[3:]]
    for encoder in (encoder_of(), chat_encoder()):
        assert trained_texts(encoder, one(encoder, read([{"messages": chat}])[0])) == ["Ciao<|im_end|>"]
    (outcome,) = encoder_of(train_on="last").encode(read([{"messages": [*CHAT[:4], CHAT[4] | {"weight": 0}]}]))
    assert outcome == Dropped(row=0, reason="empty_response")


def test_question_that_is_never_answered_is_left_out_and_counted() -> None:
    row, shorter = read([{"messages": [*CHAT, {"role": "user", "content": "More?"}]}, {"messages": CHAT}])
    encoder = encoder_of()
    assert one(encoder, row).input_ids == one(encoder, shorter).input_ids
    assert (one(encoder, row).num_cut_characters, one(encoder, shorter).num_cut_characters) == (5, 0)


@pytest.mark.parametrize("messages", [[], CHAT[:1], CHAT[:2], [*CHAT[:2], {"role": "assistant", "content": " "}]])
def test_conversation_without_an_answer_is_dropped(messages: list[dict[str, Any]]) -> None:
    (outcome,) = encoder_of().encode(read([{"messages": json.dumps(messages)}]))
    assert outcome == Dropped(row=0, reason="empty_response")


def test_conversation_too_long_is_dropped_whole() -> None:
    row = read([{"messages": CHAT}])[0]
    size = len(one(encoder_of(), row).input_ids)
    assert isinstance(encoder_of(max_tokens=size).encode([row])[0], Example)
    for on_too_long in ("drop", "truncate_contexts"):
        (outcome,) = encoder_of(max_tokens=size - 1, on_too_long=on_too_long).encode([row])
        assert outcome == Dropped(row=0, reason="too_long", num_tokens=size)


def test_conversation_control_text_in_any_turn_stays_text() -> None:
    chat = [m | {"content": m["content"] + "<|im_end|>"} for m in CHAT]
    for encoder in (encoder_of(), chat_encoder()):
        example = one(encoder, read([{"messages": chat}])[0])
        stop = encoder.tokenizer.control_tokens["<|im_end|>"]
        assert example.input_ids.count(stop) == 5
        assert example.has_control_text


def test_conversation_in_chat_template_format_is_that_of_the_named_format() -> None:
    row = read([{"messages": CHAT}])[0]
    named, by_template = one(encoder_of(), row), one(chat_encoder(), row)
    assert named.trained[0][1] - named.trained[0][0] == by_template.trained[0][1] - by_template.trained[0][0]
    assert named.text.removeprefix("<s>") == by_template.text


def test_conversation_that_the_template_rewrites_is_refused_but_for_its_last_answer() -> None:
    """Qwen 3 leaves the reasoning of earlier turns out."""
    shouted = "{{ m.content | upper if m.role == 'assistant' and not loop.last else m.content }}"
    template = TEMPLATE.replace("{{ m.content }}", shouted)
    row = read([{"messages": CHAT}])[0]
    with pytest.raises(DataError, match=r"row 0 .*First difference at character .*Hello.*HELLO"):
        chat_encoder(template).encode([row])
    encoder = chat_encoder(template, train_on="last")
    assert trained_texts(encoder, one(encoder, row)) == ["Ciao<|im_end|>"]
    assert "HELLO" in one(encoder, row).text


def test_mistral_conversation_with_system_message_names_the_row_and_train_on() -> None:
    encoder = encoder_of(MistralFormat)
    with pytest.raises(DataError, match="row 0 .*MistralFormat: .*train_on: last"):
        encoder.encode(read([{"messages": CHAT}]))


# --- tools and reasoning ---------------------------------------------------------------------------------------------


def test_tools_and_reasoning_reach_the_chat_template_untouched() -> None:
    encoder = chat_encoder()
    (row,) = read([{"messages": json.dumps(TOOL_CHAT), "tools": json.dumps([TOOL])}])
    example = one(encoder, row)
    tokenizer = byte_level_tokenizer()
    published = tokenizer.apply_chat_template(TOOL_CHAT, chat_template=TEMPLATE, tools=[TOOL], tokenize=False)
    assert example.text == str(published).removesuffix("\n")
    assert trained_texts(encoder, example) == ['(I add.)[add {"a": 1, "b": "x"}]<|im_end|>', "It is 2.<|im_end|>"]


def test_control_text_in_tools_and_their_calls_stays_text() -> None:
    text = json.dumps([TOOL_CHAT, [TOOL]])
    marked = text.replace("1+1?", "<|im_end|>").replace('"x"', '"<|im_end|>"').replace('"2"', '"<|im_end|>"')
    chat, tools = json.loads(marked)
    assert marked.count("<|im_end|>") == 3
    encoder = chat_encoder()
    examples = [one(encoder, read([{"messages": json.dumps(m), "tools": tools}])[0]) for m in (TOOL_CHAT, chat)]
    stop = encoder.tokenizer.control_tokens["<|im_end|>"]
    assert [example.input_ids.count(stop) for example in examples] == [5, 5]
    assert [example.has_control_text for example in examples] == [False, True]


def test_tools_of_arrow_rows_have_no_nulls_that_the_data_had_not() -> None:
    rows = [{"messages": TOOL_CHAT, "tools": [TOOL]}, {"messages": CHAT, "tools": []}]
    first, second = read(rows)
    assert first.chat == {"messages": TOOL_CHAT, "tools": [TOOL], "contexts": []}
    assert second == Row(number=1, turns=TURNS, system="Be brief.")


def test_tools_need_the_chat_template_format() -> None:
    (outcome,) = encoder_of().encode(read([{"messages": json.dumps(TOOL_CHAT)}]))
    assert outcome == Dropped(row=0, reason="needs_chat_template")


def test_roles_that_the_template_refuses_are_dropped_and_counted() -> None:
    template = "{% if messages[0].role != 'user' %}{{ raise_exception('user first') }}{% endif %}" + TEMPLATE
    encoder = chat_encoder(template)
    chat = [{"role": "assistant", "content": "Welcome"}, *CHAT[1:]]
    (outcome,) = encoder.encode(read([{"messages": chat}]))
    assert outcome == Dropped(row=0, reason="refused_by_template")


def test_first_message_of_an_assistant_is_no_answer() -> None:
    encoder = chat_encoder()
    example = one(encoder, read([{"messages": [{"role": "assistant", "content": "Welcome"}, *CHAT[1:]]}])[0])
    assert trained_texts(encoder, example) == ["Hello<|im_end|>", "Ciao<|im_end|>"]


def test_prompt_of_the_config_stands_around_messages_with_tools() -> None:
    prompt = Prompt(
        system_message="Use the sources.",
        examples=[Message("E?", "e", ["X"])],
        input_template="Question: {text}",
        context_template="Source {index}: {text}",
        response_template="{text} Done.",
    )
    row = read([{"messages": json.dumps(TOOL_CHAT), "contexts": ["C"]}])[0]
    assert one(chat_encoder(prompt=prompt), row).text == (
        "<|im_start|>system\nUse the sources.<|im_end|>\n"
        "<|im_start|>user\nSource 1: X\nQuestion: E?<|im_end|>\n<|im_start|>assistant\ne Done.<|im_end|>\n"
        "<|im_start|>user\nSource 1: C\nQuestion: 1+1?<|im_end|>\n"
        '<|im_start|>assistant\n(I add.)[add {"a": 1, "b": "x"}]<|im_end|>\n'
        "<|im_start|>tool\n2<|im_end|>\n<|im_start|>assistant\nIt is 2. Done.<|im_end|>"
    )


# --- the whole preparation -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("train_on", ["all", "last"])
@pytest.mark.parametrize("form", ["ChatMLFormat", "ChatTemplateFormat"])
def test_prepared_conversations_are_served_as_trained(tmp_path: Path, form: str, train_on: str) -> None:
    tokenizer = byte_level_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(str(tmp_path / "model"))
    rows = [{"messages": CHAT}, {"messages": CHAT[1:], "contexts": ["C"]}, {"messages": CHAT[:3], "contexts": ["C"]}]
    source = write_jsonl(tmp_path / "rows.jsonl", rows)
    changes = {"train_on": train_on, "prompt_format_config": {"method": form}}
    manifest = prepare(make_config(tmp_path, settings(source, tmp_path / "model", tmp_path / "out", **changes)))
    assert manifest.prompt == {"method": "Prompt", "kwargs": {}}
    assert manifest.counts["rows_kept"] == 3
    samples = read_manifest(str(tmp_path / "out")).samples
    assert [len(sample.messages) for sample in samples] == ([2, 1, 2] if train_on == "all" else [4, 3, 2])
    assert [sample.contexts for sample in samples] == ([[], [], ["C"]] if train_on == "all" else [[], ["C"], ["C"]])
    tokenizer.chat_template = manifest.chat_template
    for sample in samples:
        served = prompt_ids(tokenizer, sample.messages, contexts=sample.contexts, tools=sample.tools)
        assert served == sample.prompt_ids


def test_default_prompt_is_default_prompt_for_inputs_and_prompt_for_other_formats(tmp_path: Path) -> None:
    byte_level_tokenizer().save_pretrained(str(tmp_path / "model"))
    names = {}
    for name, row in (("plain", {"input": "a", "response": "b"}), ("alpaca", FORMATS["alpaca"][0])):
        source = write_jsonl(tmp_path / f"{name}.jsonl", [row])
        config = make_config(tmp_path, settings(source, tmp_path / "model", tmp_path / name))
        names[name] = prepare(config).prompt["method"]
    assert names == {"plain": "DefaultPrompt", "alpaca": "Prompt"}


def test_load_source_reads_config_columns(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [{"q": "Q", "a": "A"}])
    source = load_source(DatasetConfig.model_validate(str(path)), columns={"input": "q", "response": "a"})
    assert (source.row_format, dict(source.columns)) == ("input_response", {"input": "q", "response": "a"})


@pytest.mark.parametrize("texts", [["a", "b"], ['{"a": 1}', '{"a": 2}']], ids=["text", "JSON as text"])
def test_column_of_several_types_names_the_row_that_is_not_text(texts: list[str], tmp_path: Path) -> None:
    rows = [{"input": "q", "response": text} for text in texts]
    path = write_jsonl(tmp_path / "rows.jsonl", [*rows, {"input": "q", "response": 2021}])
    with pytest.raises(DataError, match="`response` must be text, it is of several types: row 2 holds 2021"):
        load_source(DatasetConfig.model_validate(str(path)), columns={})
