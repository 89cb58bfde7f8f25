from typing import Any

import pytest
from published_templates import CHATML, SMOLLM2, ZEPHYR

from llm.chat_template import ChatTemplateFormat
from llm.errors import ConfigError
from llm.named_formats import PlainFormat, SmolLM2Format
from llm.prompt import FewShotQA, Message, Prompt
from llm.prompt_format import PromptFormat, Role
from llm.prompt_registry import PROMPT_FORMATS, PROMPTS, make_prompt, make_prompt_format
from llm.registry import resolve_method
from llm.tokenizer import PromptTokenizer


def plain_tokenizer() -> PromptTokenizer:
    tokenizer = ZEPHYR.tokenizer()
    tokenizer.chat_template = None
    return PromptTokenizer(tokenizer)


def made_format(
    method: str | None, base_model: str = "", tokenizer: PromptTokenizer | None = None, **kwargs: Any
) -> PromptFormat | ChatTemplateFormat:
    tokenizer = tokenizer or SMOLLM2.prompt_tokenizer()
    return make_prompt_format(method, kwargs, base_model=base_model, tokenizer=tokenizer)


def test_registered_names_all_resolve() -> None:
    assert (len(PROMPTS), len(PROMPT_FORMATS)) == (6, 19)
    for registry in (PROMPTS, PROMPT_FORMATS):
        for name in registry:
            assert resolve_method(name, registry, key="k").__name__ == name


def test_prompt_with_examples_as_yaml_says_them_is_made() -> None:
    examples = [{"input": "a", "response": "b", "contexts": ["c"]}]
    assert make_prompt("Prompt", {"system_message": "s", "examples": examples}) == Prompt(
        system_message="s", examples=[Message("a", "b", ["c"])]
    )
    assert make_prompt("llm.prompt::FewShotQA", {}) == FewShotQA()


@pytest.mark.parametrize(
    ("method", "kwargs", "message"),
    [
        ("Promt", {}, "prompt_config.method: no method `Promt`. Did you mean `Prompt`?"),
        ("pathlib::Path", {}, "prompt_config.method: `pathlib::Path` gave a PosixPath, not a Prompt."),
        ("Prompt", {"system": "s"}, "prompt_config.kwargs: `Prompt` takes no `system`. Did you mean `system_message`?"),
        (
            "Prompt",
            {"system_message": 5},
            "prompt_config.kwargs.system_message: Input should be a valid string, not 5.",
        ),
        ("Prompt", {"input_template": "{x}"}, "input_template '{x}', character 1: no field `{x}`."),
        ("Prompt", {"examples": "a"}, "prompt_config.kwargs.examples: must be a list of examples, not 'a'."),
        (
            "Prompt",
            {"examples": [3]},
            "prompt_config.kwargs.examples[0]: must be a mapping of input, response, contexts",
        ),
        ("Prompt", {"examples": [{"input": "a"}]}, "prompt_config.kwargs.examples[0]: has no `response`"),
        ("Prompt", {"examples": [{"response": "a"}]}, "prompt_config.kwargs.examples[0]: Message.__init__() missing"),
        (
            "Prompt",
            {"examples": [{"input": "a", "response": "b", "context": []}]},
            "prompt_config.kwargs.examples[0]: `Message` takes no `context`. Did you mean `contexts`?",
        ),
        (
            "Prompt",
            {"examples": [{"input": "a", "response": 4}]},
            "prompt_config.kwargs.examples[0].response: Input should be a valid string, not 4.",
        ),
    ],
)
def test_prompt_that_cannot_be_is_refused(method: str, kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make_prompt(method, kwargs)
    assert str(caught.value).startswith(message)


def test_format_without_method_is_that_of_the_known_model() -> None:
    made = made_format(None, "HuggingFaceTB/SmolLM2-135M-Instruct")
    assert isinstance(made, SmolLM2Format)
    assert made.stop == "<|im_end|>"


def test_format_without_method_of_unknown_model_is_its_chat_template() -> None:
    assert isinstance(made_format(None, "me/mine"), ChatTemplateFormat)


def test_format_without_method_or_chat_template_is_plain() -> None:
    assert type(made_format(None, "me/mine", plain_tokenizer())) is PlainFormat


def test_format_by_method_goes_before_the_known_model() -> None:
    made = made_format("PlainFormat", "HuggingFaceTB/SmolLM2-135M-Instruct", EOS="<|endoftext|>")
    assert (type(made), made.stop) == (PlainFormat, "<|endoftext|>")


def test_format_role_given_in_part_keeps_the_rest_of_the_formats_own() -> None:
    made = made_format("ChatMLFormat", tokenizer=CHATML.prompt_tokenizer(), input={"strip_text": True})
    assert isinstance(made, PromptFormat)
    assert made.input == Role("<|im_start|>user\n", "<|im_end|>", strip_text=True)


def test_format_role_of_plain_format_is_made() -> None:
    made = made_format("PromptFormat", input={"prefix": "Q: "}, role_separator=" ")
    assert isinstance(made, PromptFormat)
    assert (made.input, made.role_separator) == (Role("Q: "), " ")


@pytest.mark.parametrize(
    ("method", "kwargs", "message"),
    [
        ("ChatML", {}, "prompt_format_config.method: no method `ChatML`. Did you mean `ChatMLFormat`?"),
        (
            "ChatMLFormat",
            {"input": "x"},
            "prompt_format_config.kwargs.input: must be a mapping of prefix, suffix, strip",
        ),
        (
            "ChatMLFormat",
            {"input": {"prefx": ""}},
            "prompt_format_config.kwargs.input: `Role` takes no `prefx`. Did you",
        ),
        ("ChatMLFormat", {"input": {"prefix": 1}}, "prompt_format_config.kwargs.input.prefix: Input should be a valid"),
        ("ChatMLFormat", {"nested_system": "no"}, "prompt_format_config.kwargs.nested_system: Input should be a valid"),
        (
            "ChatMLFormat",
            {"bos": ""},
            "prompt_format_config.kwargs: `ChatMLFormat` takes no `bos`. Did you mean `BOS`?",
        ),
        ("ChatMLFormat", {"stop": "<end>"}, "ChatMLFormat: stop `<end>` is not a control token of this tokenizer"),
        ("pathlib::Path", {}, "prompt_format_config.method: `pathlib::Path` gave a PosixPath, not a PromptFormat."),
        ("ChatTemplateFormat", {"input": {}}, "prompt_format_config.kwargs: `ChatTemplateFormat` takes no `input`."),
    ],
)
def test_format_that_cannot_be_is_refused(method: str, kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        made_format(method, **kwargs)
    assert str(caught.value).startswith(message)
