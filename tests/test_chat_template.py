import pytest
from published_templates import CHATML, GEMMA, LLAMA3, MISTRAL_V1, MISTRAL_V3, PHI3, PUBLISHED, QWEN, Published

from llm.chat_template import ChatTemplateFormat
from llm.errors import ConfigError, DataError
from llm.prompt import FewShotQA, Message, Prompt
from llm.prompt_format import Segment

THINKING = (
    "{% for m in messages %}[{{ m.role }}]{% if m.role == 'assistant' and loop.last %}<think></think>{% endif %}"
    "{{ m.content }}</s>{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)


def bound(published: Published) -> ChatTemplateFormat:
    return ChatTemplateFormat().for_tokenizer(published.prompt_tokenizer())


def with_template(template: str, eos: str = "</s>") -> Published:
    return Published(repo="", template=template, eos=eos)


@pytest.mark.parametrize("name", PUBLISHED)
def test_chat_template_format_prompt_equals_the_template(name: str) -> None:
    published = PUBLISHED[name]
    chat = [{"role": "user", "content": "Hi"}]
    expected = published.tokenizer().apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert Prompt().render([Message("Hi")], bound(published)) == expected


@pytest.mark.parametrize(
    ("published", "stop"),
    [(CHATML, "<|im_end|>"), (LLAMA3, "<|eot_id|>"), (MISTRAL_V1, "</s>"), (GEMMA, "<end_of_turn>"), (PHI3, "<|end|>")],
)
def test_stop_is_the_first_control_token_behind_the_answer(published: Published, stop: str) -> None:
    """Phi-3 puts `<|endoftext|>` behind the last turn as well; the model stops at `<|end|>`."""
    assert bound(published).stop == stop
    segments = Prompt().segments([Message("Hi", "Hello")], bound(published))
    assert [segment.is_trained for segment in segments] == [False, True]
    assert segments[1].text.strip() == f"Hello{stop}"


def test_segments_of_two_turns_train_both_answers_and_join_to_the_template() -> None:
    segments = Prompt().segments([Message("Hi", "Hello"), Message("Bye", "Ciao")], bound(PHI3))
    assert segments == [
        Segment("<|user|>\nHi<|end|>\n<|assistant|>\n", False),
        Segment("Hello<|end|>", True),
        Segment("\n<|user|>\nBye<|end|>\n<|assistant|>\n", False),
        Segment("Ciao<|end|>", True),
    ]


def test_segments_with_few_shot_examples_train_the_last_answer_only() -> None:
    segments = FewShotQA().segments([Message("Q?", "Yes.", ["C"])], bound(QWEN))
    assert [segment.is_trained for segment in segments] == [False, True]
    assert segments[0].text.count("<|im_start|>assistant\n") == 4
    assert segments[0].text.endswith("Context: C\nQuestion: Q?<|im_end|>\n<|im_start|>assistant\nAnswer:")
    assert segments[1].text == " Yes.<|im_end|>"


def test_response_head_stands_behind_the_prefix_that_the_template_puts() -> None:
    segments = Prompt(response_template="A: {text}").segments([Message("Q", "R")], bound(MISTRAL_V1))
    assert segments == [Segment("<s> [INST] Q [/INST] A:", False), Segment(" R</s>", True)]


def test_system_message_without_system_role_stands_before_the_input() -> None:
    prompt_format = bound(GEMMA)
    assert prompt_format.has_system_role is False
    assert Prompt(system_message="Be brief.").render([Message("Hi")], prompt_format) == (
        "<bos><start_of_turn>user\nBe brief.\nHi<end_of_turn>\n<start_of_turn>model\n"
    )


def test_system_message_of_template_that_leaves_it_out_is_not_lost() -> None:
    """Phi-3's first template skips the system role without a word."""
    silent = with_template(
        "<s>{% for m in messages if m.role != 'system' %}[{{ m.role }}]{{ m.content }}</s>{% endfor %}"
    )
    assert "Be brief." in Prompt(system_message="Be brief.").render([Message("Hi")], bound(silent))


def test_has_system_role_given_is_not_overridden() -> None:
    prompt_format = ChatTemplateFormat(has_system_role=False).for_tokenizer(QWEN.prompt_tokenizer())
    assert prompt_format.has_system_role is False
    assert "<|im_start|>user\nBe brief.\nHi" in Prompt(system_message="Be brief.").render(
        [Message("Hi")], prompt_format
    )


def test_template_without_control_token_ends_with_eos() -> None:
    plain = with_template("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
    assert bound(plain).stop == "</s>"
    assert Prompt().segments([Message("Hi", "Hello")], bound(plain))[-1].text.endswith("Hello\n</s>")


def test_template_that_rewrites_the_prompt_is_refused_with_the_difference() -> None:
    rewriting = with_template("{{ messages | length }} messages{% for m in messages %}{{ m.content }}</s>{% endfor %}")
    with pytest.raises(ConfigError, match="First difference at character 0: prompt '1 messages.*whole '2 messages"):
        bound(rewriting)


def test_conversation_whose_history_is_rewritten_is_refused() -> None:
    prompt_format = bound(with_template(THINKING))
    assert Prompt().segments([Message("a", "b")], prompt_format)[1] == Segment("<think></think>b</s>", True)
    with pytest.raises(DataError, match="renders the prompt differently once the answer follows"):
        Prompt().segments([Message("a", "b"), Message("c", "d")], prompt_format)


def test_system_message_that_vanishes_once_answered_is_refused() -> None:
    """Mistral v3 renders it only where the last message is the user's."""
    prompt = Prompt(system_message="Be brief.")
    assert "Be brief." in prompt.render([Message("a")], bound(MISTRAL_V3))
    with pytest.raises(DataError, match="First difference at character 10: prompt '<s>.INST. Be brief"):
        prompt.segments([Message("a", "b")], bound(MISTRAL_V3))


def test_conversation_that_the_template_refuses_is_a_data_error() -> None:
    refusing = with_template(
        "{% for m in messages %}{% if m.content == 'bad' %}{{ raise_exception('No bad input.') }}{% endif %}"
        "{{ m.content }}</s>{% endfor %}"
    )
    with pytest.raises(DataError, match=r"refuses the conversation: No bad input\."):
        Prompt().segments([Message("bad", "b")], bound(refusing))


def test_tokenizer_without_chat_template_is_refused() -> None:
    tokenizer = CHATML.tokenizer()
    tokenizer.chat_template = None
    from llm.tokenizer import PromptTokenizer

    with pytest.raises(ConfigError, match="needs a tokenizer with a chat template; this one has none"):
        ChatTemplateFormat().for_tokenizer(PromptTokenizer(tokenizer))
