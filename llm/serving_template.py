"""`serving_template`: a Prompt in a PromptFormat as one Jinja chat template: the tuned model carries its prompt.

    tokenizer.apply_chat_template(
        [{"role": "user", "content": input}], documents=[{"text": context}, ...], add_generation_prompt=True
    )

then gives exactly the prompt that the row had in training. The templates below mirror `PromptFormat.segments`
and `ChatTemplateFormat.segments`; a header sets what they need to know. A system message in the request replaces
the prompt's; documents belong to the last user message.
"""

import json
from typing import Any

from llm.chat_template import ChatTemplateFormat
from llm.prompt import Prompt
from llm.prompt_format import PromptFormat, Role

_PIECES = """\
{%- macro fill(template, text, index) -%}
{%- for literal, field in template -%}
{{- literal -}}
{%- if field == 'text' -%}{{- text -}}{%- elif field == 'index' -%}{{- index -}}{%- endif -%}
{%- endfor -%}
{%- endmacro -%}
{%- macro filled_contexts(given, separator) -%}
{%- for document in given -%}
{{- separator if not loop.first -}}
{{- fill(prompt.contexts[loop.index0 % prompt.contexts | length], document['text'], loop.index) -}}
{%- endfor -%}
{%- endmacro -%}
{%- set given = documents or [] -%}
{%- set ns = namespace(system=prompt.system, first_user=-1, last_user=-1) -%}
{%- for message in messages -%}
{%- if message.role == 'system' and loop.first -%}{%- set ns.system = message.content -%}{%- endif -%}
{%- if message.role == 'user' -%}{%- set ns.last_user = loop.index0 -%}
{%- if ns.first_user < 0 -%}{%- set ns.first_user = loop.index0 -%}{%- endif -%}{%- endif -%}
{%- endfor -%}
"""

_NAMED = (
    _PIECES
    + """\
{%- macro rendered(role, text) -%}
{{- role.prefix -}}{{- (text | trim) if role.strip_text else text -}}{{- role.suffix -}}
{%- endmacro -%}
{%- macro instruction(input, contexts, system) -%}
{%- set systems = [rendered(format.system, system)] if system else [] -%}
{%- set found = [rendered(format.contexts, contexts)] if contexts is not none else [] -%}
{%- set nested = found if format.nested_contexts else [] -%}
{%- set inside = nested + [input] if format.contexts_first else [input] + nested -%}
{%- set inside = systems + inside if format.nested_system else inside -%}
{%- set question = rendered(format.input, inside | join(format.content_separator)) -%}
{%- set beside = [] if format.nested_contexts else found -%}
{%- set outside = beside + [question] if format.contexts_first else [question] + beside -%}
{{- (outside if format.nested_system else systems + outside) | join(format.role_separator) -}}
{%- endmacro -%}
{%- macro answered(text, ending) -%}
{{- (text | trim) if format.response.strip_text else text -}}{{- format.response.suffix ~ ending -}}
{%- endmacro -%}
{%- set ns.text = '' -%}
{%- set begins_with_contexts = (prompt.examples[0].contexts is not none) if prompt.examples
    else given and ns.first_user == ns.last_user -%}
{%- set ns.system = ns.system or (begins_with_contexts and format.default_system_with_contexts)
    or format.default_system -%}
{%- for example in prompt.examples -%}
{%- set ns.text = ns.text ~ (format.between if not loop.first else '') -%}
{%- set ns.text = ns.text ~ (format.bos if loop.first or format.repeat_bos else '') -%}
{%- set ns.text = ns.text ~ (format.examples.prefix if loop.first else '') -%}
{%- set ns.text = ns.text ~ instruction(example.input, example.contexts,
    ns.system if loop.first and not format.system_in_last_input else '') -%}
{%- set ns.text = ns.text ~ format.role_separator ~ format.response.prefix -%}
{%- set ns.text = ns.text ~ answered(example.response, format.eos) -%}
{%- endfor -%}
{%- set ns.turns = prompt.examples | length -%}
{%- for message in messages -%}
{%- if message.role == 'user' -%}
{%- set ns.text = ns.text ~ (format.between if ns.turns else '') -%}
{%- set ns.text = ns.text ~ (format.bos if not ns.turns or format.repeat_bos else '') -%}
{%- if ns.turns == prompt.examples | length and ns.turns -%}
{%- set ns.text = ns.text ~ format.examples.suffix -%}
{%- endif -%}
{%- set contexts = filled_contexts(given, format.content_separator)
    if given and loop.index0 == ns.last_user else none -%}
{%- set input = fill(prompt.input, message.content, 1) -%}
{%- set has_system = loop.index0 == ns.last_user if format.system_in_last_input else not ns.turns -%}
{%- set ns.text = ns.text ~ instruction(input, contexts, ns.system if has_system else '') -%}
{%- set ns.text = ns.text ~ format.role_separator ~ format.response.prefix -%}
{%- set ns.turns = ns.turns + 1 -%}
{%- elif message.role == 'assistant' -%}
{%- set ns.text = ns.text ~ answered(fill(prompt.response, message.content, 1), format.eos ~ format.appended) -%}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- (ns.text ~ (prompt.head.lstrip() if format.response.strip_text else prompt.head)).rstrip(' ') -}}
{%- else -%}
{{- ns.text -}}
{%- endif -%}"""
)

_BY_TEMPLATE = (
    _PIECES
    + """\
{%- set ns.messages = [] -%}
{%- if ns.system and format.has_system_role -%}
{%- set ns.messages = [{'role': 'system', 'content': ns.system}] -%}
{%- endif -%}
{%- set ns.system = '' if format.has_system_role else ns.system -%}
{%- for example in prompt.examples -%}
{%- set parts = [ns.system] if ns.system else [] -%}
{%- set parts = parts + ([example.contexts] if example.contexts is not none else []) + [example.input] -%}
{%- set ns.system = '' -%}
{%- set ns.messages = ns.messages + [{'role': 'user', 'content': parts | join(format.content_separator)},
    {'role': 'assistant', 'content': example.response}] -%}
{%- endfor -%}
{%- for message in messages -%}
{%- if message.role == 'user' -%}
{%- set parts = [ns.system] if ns.system else [] -%}
{%- if given and loop.index0 == ns.last_user -%}
{%- set parts = parts + [filled_contexts(given, format.content_separator)] -%}
{%- endif -%}
{%- set parts = parts + [fill(prompt.input, message.content, 1)] -%}
{%- set ns.system = '' -%}
{%- set ns.messages = ns.messages + [dict(message, content=parts | join(format.content_separator))] -%}
{%- elif message.role == 'assistant' and message.content -%}
{%- set ns.messages = ns.messages + [dict(message, content=fill(prompt.response, message.content, 1))] -%}
{%- elif message.role != 'system' -%}
{%- set ns.messages = ns.messages + [message] -%}
{%- endif -%}
{%- endfor -%}
{%- set messages = ns.messages -%}
"""
)
# No `-` towards the base template, which keeps the white space at its ends; `+`: even before a block.
_BASE_BEGINS = "{%- set documents = none %}\n"
_BASE_ENDED = "{%+ if add_generation_prompt -%}{{- HEAD -}}{%- endif -%}"


def serving_template(prompt: Prompt, prompt_format: PromptFormat | ChatTemplateFormat) -> str:
    """The Jinja chat template of `prompt` in `prompt_format` (bound to its tokenizer)."""
    conversation = prompt.conversation([])
    separator = prompt_format.content_separator
    facts = {
        "system": conversation.system,
        "examples": [
            {
                "input": turn.input,
                "contexts": separator.join(turn.contexts) if turn.contexts else None,
                "response": turn.response_head + (turn.response or ""),
            }
            for turn in conversation.turns
        ],
        **prompt.template_parts(),
    }
    if not isinstance(prompt_format, ChatTemplateFormat):
        return _header(facts, _format_facts(prompt_format)) + _NAMED
    known = {"content_separator": separator, "has_system_role": prompt_format.has_system_role}
    kwargs = prompt_format.template_kwargs.items()
    defaults = "".join(f"{{%- set {name} = {_literal(value)} -%}}\n" for name, value in kwargs)
    base = prompt_format.base_template.removesuffix("\n")
    ended = _BASE_ENDED.replace("HEAD", _literal(prompt_format.opening(facts["head"])))
    return _header(facts, known) + _BY_TEMPLATE + defaults + _BASE_BEGINS + base + ended


def _format_facts(prompt_format: PromptFormat) -> dict[str, Any]:
    between, ending = prompt_format.turn_separator, prompt_format.response.suffix + prompt_format.EOS
    roles = ("input", "response", "system", "contexts", "examples")
    names = ("nested_system", "system_in_last_input", "nested_contexts", "contexts_first", "role_separator",
             "content_separator", "default_system", "default_system_with_contexts")  # fmt: skip
    return {
        **{role: _role_facts(getattr(prompt_format, role)) for role in roles},
        **{name: getattr(prompt_format, name) for name in names},
        "between": prompt_format.role_separator if between is None else between,
        "bos": prompt_format.BOS,
        "repeat_bos": prompt_format.repeat_BOS,
        "eos": prompt_format.EOS,
        "appended": "" if prompt_format.stop in ending else prompt_format.stop,
    }


def _role_facts(role: Role) -> dict[str, Any]:
    return {"prefix": role.prefix, "suffix": role.suffix, "strip_text": role.strip_text}


def _header(prompt: dict[str, Any], prompt_format: dict[str, Any]) -> str:
    facts = {"prompt": prompt, "format": prompt_format}
    sets = [f"{{%- set {name} = {_literal(value)} -%}}\n" for name, value in facts.items()]
    return "{%- set null = none -%}\n" + "".join(sets)  # `null` is JSON's word for it


def _literal(value: Any) -> str:
    """A Jinja literal: JSON is one, with characters beyond the first plane unescaped and `null` set."""
    return json.dumps(value, ensure_ascii=False)
