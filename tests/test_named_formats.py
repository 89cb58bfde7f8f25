"""Named formats against what their models' makers published: Jinja templates, or texts written down here."""

from dataclasses import replace

import pytest
from published_templates import GEMMA, LLAMA2, MISTRAL_V3, PUBLISHED, SMOLLM2, ZEPHYR, Published

from llm.errors import ConfigError, DataError
from llm.named_formats import (
    AlpacaFormat,
    ChatMLFormat,
    DollyFormat,
    GemmaFormat,
    Llama2Format,
    Llama3Format,
    MistralFormat,
    PlainFormat,
    RedpajamaFormat,
    TogetherLlama2Format,
    UserAssistantFormat,
    VicunaFormat,
)
from llm.prompt import Message, Prompt
from llm.prompt_format import PromptFormat
from llm.prompt_registry import PROMPT_FORMATS
from llm.registry import resolve_method

CONVERSATIONS = {
    "single turn": [Message("Hi")],
    "several turns": [Message("Hi", "Hello!"), Message("Who are\n\nyou?", "A model."), Message("Bye")],
    "white space": [Message("\n q ", " a\n\n"), Message("  r\t", "\nb ")],
    "Unicode": [Message("你好 👋🏽 é", "日本語"), Message("{text} {{ x }}")],
}
SYSTEMS = {"no system": "", "system": "Be brief.\nBe kind.", "system with white space": " Be brief. \n"}
LAST_ANSWER = "The end."


def published_text(published: Published, system: str, turns: list[Message], *, is_open: bool) -> str:
    messages = [{"role": "system", "content": system}] if system else []
    for turn in turns:
        messages.append({"role": "user", "content": turn.input})
        if turn.response is not None:
            messages.append({"role": "assistant", "content": turn.response})
    rendered = published.tokenizer().apply_chat_template(messages, tokenize=False, add_generation_prompt=is_open)
    return str(rendered)


def bound(name: str) -> PromptFormat:
    prompt_format = resolve_method(name, PROMPT_FORMATS, key="")()
    return prompt_format.for_tokenizer(PUBLISHED[name].prompt_tokenizer())


def is_unpublished(name: str, system: str, turns: list[Message]) -> bool:
    """Gemma 2 knows no system message."""
    return bool(system) and name == "GemmaFormat"


def test_named_formats_all_have_an_oracle_here() -> None:
    written_down = {"Alpaca", "Dolly", "Plain", "Redpajama", "TogetherLlama2", "UserAssistant", "Vicuna"}
    by_code = {"PromptFormat", "ChatTemplateFormat"}
    assert {*PUBLISHED, *by_code, *(f"{name}Format" for name in written_down)} == set(PROMPT_FORMATS)


CASES = [
    (name, turns, system)
    for name in PUBLISHED
    for turns in CONVERSATIONS
    for system in SYSTEMS
    if not is_unpublished(name, SYSTEMS[system], CONVERSATIONS[turns])
]


def test_format_cases_cover_all_but_the_unpublished() -> None:
    assert len(CASES) == 10 * 4 * 3 - 4 * 2


@pytest.mark.parametrize(("name", "turns", "system"), CASES)
def test_format_prompt_equals_published_template(name: str, turns: str, system: str) -> None:
    *history, last = CONVERSATIONS[turns]
    messages = [*(replace(turn, is_trained=False) for turn in history), Message(last.input)]
    ours = Prompt(system_message=SYSTEMS[system]).render(messages, bound(name))
    assert ours == published_text(PUBLISHED[name], SYSTEMS[system], messages, is_open=True)


@pytest.mark.parametrize("turns", CONVERSATIONS)
@pytest.mark.parametrize("name", PUBLISHED)
def test_format_answered_equals_published_template_up_to_the_stop_token(name: str, turns: str) -> None:
    *history, last = CONVERSATIONS[turns]
    messages = [*history, Message(last.input, last.response or LAST_ANSWER)]
    prompt_format = bound(name)
    ours = Prompt().render(messages, prompt_format)
    published = published_text(PUBLISHED[name], "", messages, is_open=False)
    behind = {"PhiFormat": "\n<|endoftext|>", "Llama2Format": "", "Llama3Format": "", "MistralFormat": "",
              "MistralV1Format": ""}  # fmt: skip
    assert ours.endswith(prompt_format.stop)
    assert ours + behind.get(name, "\n") == published


def test_gemma_with_system_stands_before_the_input_as_in_gemma_3() -> None:
    prompt_format = GemmaFormat().for_tokenizer(GEMMA.prompt_tokenizer())
    assert Prompt(system_message="Be brief.").render([Message("Hi")], prompt_format) == (
        "<bos><start_of_turn>user\nBe brief.\n\nHi<end_of_turn>\n<start_of_turn>model\n"
    )


def test_mistral_with_system_and_two_trained_turns_is_refused() -> None:
    """Its system message moves to the last input, so no prompt begins the next one."""
    prompt_format = MistralFormat().for_tokenizer(MISTRAL_V3.prompt_tokenizer())
    messages = [Message("Hi", "Hello"), Message("Bye", "Ciao")]
    with pytest.raises(DataError, match="MistralFormat: the system message stands in the last input.*train_on: last"):
        Prompt(system_message="Be brief.").render(messages, prompt_format)
    messages = [Message("Hi", "Hello", is_trained=False), Message("Bye", "Ciao")]
    assert Prompt(system_message="Be brief.").render(messages, prompt_format) == (
        "<s>[INST] Hi[/INST] Hello</s>[INST] Be brief.\n\nBye[/INST] Ciao</s>"
    )


def test_llama2_dialog_equals_meta_chat_completion() -> None:
    """meta-llama/llama `generation.py`: B_SYS + system + E_SYS + input; BOS and EOS around every round."""
    prompt_format = Llama2Format().for_tokenizer(LLAMA2.prompt_tokenizer())
    messages = [Message(" Hi ", " Hello! "), Message("Bye", "Bye."), Message("More")]
    assert Prompt(system_message="Be brief.").render(messages, prompt_format) == (
        "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\n Hi [/INST] Hello! </s>"
        "<s>[INST] Bye [/INST] Bye. </s><s>[INST] More [/INST]"
    )


def test_vicuna_dialog_equals_fastchat_v1_1() -> None:
    """lm-sys/FastChat `conversation.py`, vicuna_v1.1: ADD_COLON_TWO, sep " ", sep2 "</s>"."""
    prompt_format = VicunaFormat().for_tokenizer(MISTRAL_V3.prompt_tokenizer())
    messages = [Message("Hello!", "Hi!"), Message("How are you?")]
    assert Prompt().render(messages, prompt_format) == (
        "<s>A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions. "
        "USER: Hello! ASSISTANT: Hi!</s>USER: How are you? ASSISTANT:"
    )


def test_alpaca_without_input_equals_prompt_no_input() -> None:
    """tatsu-lab/stanford_alpaca `train.py`: source + output + EOS, and the source ends in `### Response:`."""
    prompt_format = AlpacaFormat().for_tokenizer(ZEPHYR.prompt_tokenizer())
    assert Prompt().render([Message("Add 1 and 2.", "3")], prompt_format) == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd 1 and 2.\n\n### Response:3</s>"
    )


def test_alpaca_with_input_equals_prompt_input() -> None:
    prompt_format = AlpacaFormat().for_tokenizer(ZEPHYR.prompt_tokenizer())
    assert Prompt().render([Message("Add.", "3", ["1 and 2"])], prompt_format) == (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd.\n\n### Input:\n1 and 2\n\n### Response:3</s>"
    )


def test_dolly_with_input_equals_consts() -> None:
    """databrickslabs/dolly `training/consts.py`, PROMPT_WITH_INPUT_FORMAT; `### End` is its control token."""
    tokenizer = Published(repo="databricks/dolly-v2-3b", template="", eos="<|endoftext|>", marks=("### End",))
    prompt_format = DollyFormat().for_tokenizer(tokenizer.prompt_tokenizer())
    assert prompt_format.stop == "### End"
    assert Prompt().render([Message("Add.", "3", ["1 and 2"])], prompt_format) == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd.\n\nInput:\n1 and 2\n\n### Response:\n3\n\n### End"
    )


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        (RedpajamaFormat, "<human>: Hi\n<bot>: Hello</s>\n<human>: Bye\n<bot>:"),
        (TogetherLlama2Format, "[INST]\nHi\n[/INST]\n\nHello</s>[INST]\nBye\n[/INST]\n\n"),
        (UserAssistantFormat, "User: Hi\nAssistant: Hello</s>\nUser: Bye\nAssistant:"),
        (PlainFormat, "Hi\nHello</s>\nBye\n"),
    ],
)
def test_card_format_two_turns_gives_the_card_text(kind: type[PromptFormat], text: str) -> None:
    prompt_format = kind().for_tokenizer(ZEPHYR.prompt_tokenizer())
    assert Prompt().render([Message("Hi", "Hello"), Message("Bye")], prompt_format) == text


@pytest.mark.parametrize("name", [name for name in PROMPT_FORMATS if name != "ChatTemplateFormat"])
def test_format_prompt_never_ends_in_a_space(name: str) -> None:
    kind = resolve_method(name, PROMPT_FORMATS, key="")
    prompt = Prompt(response_template="A:  {text}")
    assert not prompt.render([Message("Hi")], kind()).endswith(" ")


def test_format_whose_bos_the_tokenizer_lacks_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"Llama3Format: BOS `<\|begin_of_text\|>` is not a control token"):
        Llama3Format().for_tokenizer(SMOLLM2.prompt_tokenizer())


def test_format_without_control_token_ends_responses_with_eos() -> None:
    prompt_format = PlainFormat().for_tokenizer(SMOLLM2.prompt_tokenizer())
    assert prompt_format.stop == "<|im_end|>"
    assert Prompt().render([Message("Hi", "Hello")], prompt_format) == "Hi\nHello<|im_end|>"


def test_format_stop_given_by_kwargs_is_appended() -> None:
    prompt_format = PlainFormat(stop="<|endoftext|>").for_tokenizer(SMOLLM2.prompt_tokenizer())
    assert Prompt().render([Message("Hi", "Hello")], prompt_format) == "Hi\nHello<|endoftext|>"


def test_chatml_stop_is_im_end_even_where_eos_is_another() -> None:
    tokenizer = Published(
        repo="", template="", eos="<|endoftext|>", marks=("<|im_start|>", "<|im_end|>")
    ).prompt_tokenizer()
    assert ChatMLFormat().for_tokenizer(tokenizer).stop == "<|im_end|>"
