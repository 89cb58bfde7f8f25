"""Prompts and prompt formats by name, made from what YAML says of them."""

from collections.abc import Mapping
from typing import Any

from llm.chat_template import ChatTemplateFormat
from llm.errors import ConfigError
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

    Raises ConfigError for an unknown name, an argument that it does not take, or a template that is not one.
    """
    key = "prompt_config"
    kwargs = dict(kwargs)
    if "examples" in kwargs:
        kwargs["examples"] = [
            _made(Message, example, f"{key}.kwargs.examples[{number}]")
            for number, example in enumerate(kwargs["examples"])
        ]
    prompt = call_method(resolve_method(method, PROMPTS, key=f"{key}.method"), kwargs=kwargs, key=key)
    if not isinstance(prompt, Prompt):
        raise ConfigError(f"{key}.method: `{method}` gave a {type(prompt).__name__}, not a Prompt.")
    return prompt


def make_prompt_format(
    method: str | None, kwargs: Mapping[str, Any], *, base_model: str, tokenizer: PromptTokenizer
) -> PromptFormat | ChatTemplateFormat:
    """The format that `prompt_format_config` names, bound to `tokenizer`.

    `method` None: what the model registry knows for `base_model`, else the tokenizer's chat template if it has one, else
    plain text. Raises ConfigError as `make_prompt` does, and when the tokenizer lacks the format's control tokens.
    """
    key = "prompt_format_config"
    by_tokenizer = "ChatTemplateFormat" if tokenizer.chat_template else "PlainFormat"
    name = method or find_model(base_model).prompt_format or by_tokenizer
    roles = {role: _made(Role, kwargs[role], f"{key}.kwargs.{role}") for role in _ROLES if role in kwargs}
    made = call_method(
        resolve_method(name, PROMPT_FORMATS, key=f"{key}.method"), kwargs={**kwargs, **roles}, key=key
    )
    if not isinstance(made, PromptFormat | ChatTemplateFormat):
        raise ConfigError(f"{key}.method: `{name}` gave a {type(made).__name__}, not a PromptFormat.")
    return made.for_tokenizer(tokenizer)


def _made(kind: type[Any], values: Any, key: str) -> Any:
    """`kind(**values)`, whose values must be of the types it declares."""
    if not isinstance(values, Mapping):
        raise ConfigError(f"{key}: must be a mapping of {', '.join(kind.__dataclass_fields__)}, not {values!r}.")
    return call_method(kind, kwargs=values, key=key)
