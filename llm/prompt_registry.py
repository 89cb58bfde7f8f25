"""Prompts and prompt formats by name, made from what YAML says of them."""

from collections.abc import Mapping, Sequence
from dataclasses import is_dataclass, replace
from typing import Any, get_type_hints

from pydantic import TypeAdapter, ValidationError

from llm.chat_template import ChatTemplateFormat
from llm.errors import ConfigError, did_you_mean
from llm.model_registry import find_model
from llm.prompt import Message, Prompt
from llm.prompt_format import PromptFormat, Role
from llm.registry import call_method, resolve_method
from llm.tokenizer import PromptTokenizer

PROMPTS = {
    name: f"llm.prompt::{name}"
    for name in (
        "Prompt",
        "DefaultPrompt",
        "ZeroShotQA",
        "FewShotQA",
        "StandaloneQuestion",
        "TextSummarization",
    )
}
PROMPT_FORMATS = {
    "PromptFormat": "llm.prompt_format::PromptFormat",
    "ChatTemplateFormat": "llm.chat_template::ChatTemplateFormat",
} | {
    f"{name}Format": f"llm.named_formats::{name}Format"
    for name in (
        "Alpaca",
        "ChatML",
        "Dolly",
        "Gemma",
        "Llama2",
        "Llama3",
        "Mistral",
        "MistralV1",
        "Phi",
        "Plain",
        "Qwen",
        "Redpajama",
        "SmolLM2",
        "TogetherLlama2",
        "UserAssistant",
        "Vicuna",
        "Zephyr",
    )
}
_ROLES = ("input", "response", "system", "contexts", "examples")


def make_prompt(method: str, kwargs: Mapping[str, Any]) -> Prompt:
    """The prompt that `prompt_config` names; `examples` are mappings of `input`, `response`, `contexts`.

    Raises ConfigError for an unknown name, an argument that it does not take or of another type, or a template
    that is not one.
    """
    key = "prompt_config"
    kind = resolve_method(method, PROMPTS, key=f"{key}.method")
    if "examples" in kwargs:
        kwargs = {**kwargs, "examples": _examples(kwargs["examples"], f"{key}.kwargs.examples")}
    _check_types(kind, kwargs, f"{key}.kwargs")
    prompt = call_method(kind, kwargs=kwargs, key=key)
    if not isinstance(prompt, Prompt):
        raise ConfigError(f"{key}.method: `{method}` gave a {type(prompt).__name__}, not a Prompt.")
    return prompt


def make_prompt_format(
    method: str | None, kwargs: Mapping[str, Any], *, base_model: str, tokenizer: PromptTokenizer
) -> PromptFormat | ChatTemplateFormat:
    """The format that `prompt_format_config` names, bound to `tokenizer`.

    `method` None: what the model registry knows for `base_model`, else the tokenizer's chat template if it has one,
    else plain text. A role in `kwargs` changes what it names and keeps the rest. Raises ConfigError as `make_prompt`
    does, and when the tokenizer lacks the format's control tokens.
    """
    key = "prompt_format_config"
    by_tokenizer = "ChatTemplateFormat" if tokenizer.chat_template else "PlainFormat"
    name = method or find_model(base_model).prompt_format or by_tokenizer
    kind = resolve_method(name, PROMPT_FORMATS, key=f"{key}.method")
    roles = {
        role: _made(Role, kwargs[role], f"{key}.kwargs.{role}", default=getattr(kind, role, None))
        for role in _ROLES
        if role in kwargs
    }
    kwargs = {**kwargs, **roles}
    _check_types(kind, kwargs, f"{key}.kwargs")
    made = call_method(kind, kwargs=kwargs, key=key)
    if not isinstance(made, PromptFormat | ChatTemplateFormat):
        raise ConfigError(f"{key}.method: `{name}` gave a {type(made).__name__}, not a PromptFormat.")
    return made.for_tokenizer(tokenizer)


def _examples(given: Any, key: str) -> list[Message]:
    if not isinstance(given, Sequence) or isinstance(given, str):
        raise ConfigError(f"{key}: must be a list of examples, not {given!r}.")
    examples = [_made(Message, example, f"{key}[{number}]") for number, example in enumerate(given)]
    for number, example in enumerate(examples):
        if example.response is None:
            raise ConfigError(f"{key}[{number}]: has no `response`, so it is no example.")
    return examples


def _made(kind: type[Any], values: Any, key: str, *, default: Any = None) -> Any:
    """`kind(**values)`, whose values must be of the types it declares; those not given are `default`'s."""
    names = kind.__dataclass_fields__
    if not isinstance(values, Mapping):
        raise ConfigError(f"{key}: must be a mapping of {', '.join(names)}, not {values!r}.")
    for name in values:
        if name not in names:
            raise ConfigError(f"{key}: `{kind.__name__}` takes no `{name}`. {did_you_mean(str(name), names)}")
    _check_types(kind, values, key)
    try:
        return replace(default, **values) if isinstance(default, kind) else kind(**values)
    except TypeError as error:
        raise ConfigError(f"{key}: {error}.") from error


def _check_types(kind: Any, values: Mapping[str, Any], key: str) -> None:
    hints = get_type_hints(kind) if is_dataclass(kind) else {}
    for name in values.keys() & hints.keys():
        try:
            TypeAdapter(hints[name]).validate_python(values[name], strict=True)
        except ValidationError as error:
            raise ConfigError(f"{key}.{name}: {error.errors()[0]['msg']}, not {values[name]!r}.") from error
