import inspect
from dataclasses import replace

import pytest

from llm import prompt as prompt_module
from llm.errors import ConfigError
from llm.named_formats import ChatMLFormat, PlainFormat, UserAssistantFormat
from llm.prompt import DefaultPrompt, FewShotQA, Message, Prompt, StandaloneQuestion, ZeroShotQA
from llm.prompt_format import PromptFormat, Role, Segment, last_control_token, merge_segments

MARKS = replace(UserAssistantFormat(), EOS="</s>", stop="</s>")


def test_segments_docstring_example_holds() -> None:
    assert Prompt().segments([Message("Hi", "Hello")], MARKS) == [
        Segment("User: Hi\nAssistant:", is_trained=False),
        Segment(" Hello</s>", is_trained=True),
    ]


def test_segments_of_two_turns_train_both_answers() -> None:
    segments = Prompt().segments([Message("Hi", "Hello"), Message("Bye", "Ciao")], MARKS)
    assert [segment.text for segment in segments if segment.is_trained] == [" Hello</s>", " Ciao</s>"]
    assert [segment.text for segment in segments if not segment.is_trained] == [
        "User: Hi\nAssistant:",
        "\nUser: Bye\nAssistant:",
    ]


def test_segments_behind_the_stop_token_are_not_trained() -> None:
    behind = replace(MARKS, EOS="</s> ###")
    segments = Prompt().segments([Message("Hi", "Hello"), Message("Bye", "Ciao")], behind)
    assert segments[1] == Segment(" Hello</s>", True)
    assert segments[2].text.startswith(" ###\nUser: Bye")


def test_segments_stop_text_in_the_answer_is_not_taken_for_the_stop() -> None:
    segments = Prompt().segments([Message("Hi", "a</s>b")], MARKS)
    assert segments[1] == Segment(" a</s>b</s>", True)


def test_few_shot_examples_are_prompt_and_never_trained() -> None:
    segments = FewShotQA().segments([Message("Q?", "Yes.", ["C"])], MARKS)
    assert [segment.is_trained for segment in segments] == [False, True]
    assert segments[1].text == " Yes.</s>"
    assert segments[0].text.count("Assistant: Answer: ") == 3
    assert segments[0].text.endswith("User: Context: C\nQuestion: Q?\nAssistant: Answer:")


def test_few_shot_examples_marks_stand_around_them_once() -> None:
    marked = replace(MARKS, examples=Role("EXAMPLES\n", "NOW\n"))
    prompt = Prompt(examples=[Message("a", "b"), Message("c", "d")])
    assert prompt.render([Message("e")], marked) == (
        "EXAMPLES\nUser: a\nAssistant: b</s>\nUser: c\nAssistant: d</s>\nNOW\nUser: e\nAssistant:"
    )


def test_system_message_stands_once_before_the_first_turn() -> None:
    prompt = Prompt(system_message="Be brief.", examples=[Message("a", "b")])
    text = prompt.render([Message("c", "d"), Message("e")], MARKS)
    assert text.startswith("Be brief.\nUser: a\n")
    assert text.count("Be brief.") == 1


def test_context_templates_are_used_in_turn_and_count_from_one() -> None:
    prompt = Prompt(context_template=["Q{index} {text}", "A{index} {text}"])
    text = prompt.render([Message("x", contexts=["a", "b", "c"])], PlainFormat())
    assert text == "Q1 a\nA2 b\nQ3 c\nx\n"


def test_contexts_beside_and_behind_the_input_stand_where_the_format_says() -> None:
    beside = PromptFormat(input=Role("I "), contexts=Role("C "), response=Role("R "), nested_contexts=False)
    message = Message("x", contexts=["a", "b"])
    assert Prompt().render([message], beside) == "C a\nb\nI x\nR"
    assert Prompt().render([message], replace(beside, contexts_first=False)) == "I x\nC a\nb\nR"
    nested = replace(beside, nested_contexts=True, contexts_first=False)
    assert Prompt().render([message], nested) == "I x\nC a\nb\nR"


def test_response_template_head_is_prompt_and_tail_is_trained() -> None:
    segments = Prompt(response_template="A: {text} .").segments([Message("x", "y")], MARKS)
    assert segments == [Segment("User: x\nAssistant: A:", False), Segment(" y .</s>", True)]


def test_texts_with_braces_and_marks_are_data() -> None:
    prompt = DefaultPrompt(examples=[Message("{text}", "{index}")])
    text = prompt.render([Message("{0} {text} {{x}}", contexts=["{index}"])], PlainFormat())
    assert text == "Input: {text}\nResponse: {index}\nContext: {index}\nInput: {0} {text} {{x}}\nResponse:"


def test_prompt_with_bad_template_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"context_template 'a': needs `\{text\}` exactly once"):
        Prompt(context_template=["{text}", "a"])
    with pytest.raises(ConfigError, match=r"response_template .* no field `\{index\}`"):
        Prompt(response_template="{text} {index}")


@pytest.mark.parametrize("strip_text", [True, False])
def test_role_strips_only_where_it_says_so(strip_text: bool) -> None:
    role = Role("<", ">", strip_text=strip_text)
    assert role.render(" a\n") == ("<a>" if strip_text else "< a\n>")


def test_known_prompts_all_render_and_keep_their_system_message() -> None:
    kinds = [k for _, k in inspect.getmembers(prompt_module, inspect.isclass) if issubclass(k, Prompt)]
    assert len(kinds) == 6
    for kind in kinds:
        text = kind().render([Message("in", "out", ["one", "two"])], ChatMLFormat(stop="<|im_end|>"))
        assert kind().system_message in text
        assert text.endswith("out<|im_end|>")
        assert "one" in text and "two" in text


def test_standalone_question_contexts_are_the_conversation() -> None:
    text = StandaloneQuestion().render([Message("And?", contexts=["q", "a", "q2"])], PlainFormat())
    assert text.endswith("Question: q\nAnswer: a\nQuestion: q2\nFollow-up question: And?\nStandalone question:")


def test_zero_shot_without_contexts_renders_the_question_alone() -> None:
    assert ZeroShotQA().render([Message("Q?")], PlainFormat()).endswith("know.\nQuestion: Q?\nAnswer:")


def test_last_control_token_is_the_one_that_ends_latest() -> None:
    assert last_control_token("a</s>b<|end|>", ["</s>", "<|end|>", "d|>"]) == "<|end|>"
    assert last_control_token("plain", ["</s>"]) == ""


def test_merge_segments_drops_empty_and_joins_neighbours() -> None:
    given = [Segment("", False), Segment("a", False), Segment("", True), Segment("b", False), Segment("c", True)]
    assert merge_segments(given) == [Segment("ab", False), Segment("c", True)]
