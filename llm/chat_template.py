"""`ChatTemplateFormat`: any tokenizer's own chat template as a prompt format.

The default for a base model that the registry does not know but whose tokenizer has a template. The response is
what the template puts behind the prompt, up to the control token that ends it.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, Self

from jinja2 import TemplateError

from llm.errors import ConfigError, DataError
from llm.prompt_format import (
    Conversation,
    FormatTokenizer,
    Segment,
    merge_segments,
)

_PROBE = "probe-8d7f"  # a text that no template holds


class ChatTokenizer(FormatTokenizer, Protocol):
    """A tokenizer that has a chat template."""

    @property
    def chat_template(self) -> str | None:
        """The template, None when there is none."""

    def render_chat(self, messages: list[dict[str, str]], *, is_open: bool, **kwargs: Any) -> str:
        """The rendered messages."""


@dataclass(frozen=True)
class ChatTemplateFormat:
    """Renders with the tokenizer's template; `template_kwargs` go to it (e.g. `enable_thinking: false`)."""

    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    content_separator: str = "\n"
    """Between contexts and input, and behind a system message that the template has no role for."""
    stop: str = ""
    """The control token that ends a trained response; empty: the first that the template puts behind it."""
    has_system_role: bool | None = None
    """Whether the template takes a system message, else it stands before the first input; None: found out."""
    _tokenizer: ChatTokenizer | None = field(default=None, repr=False, compare=False)
    _lead: str = field(default="", repr=False, compare=False)

    def for_tokenizer(self, tokenizer: ChatTokenizer) -> Self:
        """This format bound to `tokenizer`; ConfigError when it has no template or no trainable one."""
        if tokenizer.chat_template is None:
            raise ConfigError(
                "prompt_format_config: ChatTemplateFormat needs a tokenizer with a chat template; this one has "
                "none. Use PlainFormat, or the format that the model was trained with."
            )
        bound = replace(self, _tokenizer=tokenizer)
        if self.has_system_role is None:
            bound = replace(bound, has_system_role=bound._shows_system())
        question, answer = {"role": "user", "content": "a"}, {"role": "assistant", "content": _PROBE}
        try:
            behind = _behind(bound._render([question], is_open=True), bound._render([question, answer], is_open=False))
        except DataError as error:
            raise ConfigError(str(error)) from error
        lead, _, ending = behind.partition(_PROBE)
        stop = self.stop or _first_control_token(ending, tokenizer.control_tokens)
        stop = stop or tokenizer.eos_token or ""
        if not stop:
            raise ConfigError(
                "ChatTemplateFormat: the template ends no response with a control token, and the tokenizer has "
                "no EOS: the model would never learn to stop."
            )
        return replace(bound, stop=stop, _lead=lead)

    @property
    def base_template(self) -> str:
        """The tokenizer's own chat template."""
        assert self._tokenizer and self._tokenizer.chat_template is not None, "for_tokenizer comes first"
        return self._tokenizer.chat_template

    def opening(self, response_head: str) -> str:
        """What the prompt has behind the open template: `response_head` as it is rendered there, or nothing."""
        return (self._lead + response_head).rstrip(" ") if response_head else ""

    def segments(self, conversation: Conversation) -> list[Segment]:
        """The rendered conversation; DataError when the template rewrites what it rendered before."""
        messages = self._system_messages(conversation.system)
        pieces: list[Segment] = []
        done = ""
        for number, turn in enumerate(conversation.turns):
            system = "" if number or self.has_system_role else conversation.system
            content = self.content_separator.join([*filter(None, [system]), *turn.contexts, turn.input])
            messages.append({"role": "user", "content": content})
            if not turn.is_example:
                prompt = self._render(messages, is_open=True) + self.opening(turn.response_head)
                pieces.append(Segment(_behind(done, prompt), False))
                done = prompt
            if turn.response is not None:
                answer = turn.response_head + turn.response
                messages.append({"role": "assistant", "content": answer})
            if turn.response is not None and not turn.is_example:
                response, done = self._response(prompt, self._render(messages, is_open=False))
                pieces.append(Segment(response, turn.is_trained))
        return merge_segments(pieces)

    def _response(self, prompt: str, whole: str) -> tuple[str, str]:
        behind = _behind(prompt, whole)
        end = behind.rfind(self.stop)
        if end < 0:  # the template puts no control token there: ours ends the response
            return behind + self.stop, whole
        end += len(self.stop)
        return behind[:end], prompt + behind[:end]

    def _system_messages(self, system: str) -> list[dict[str, str]]:
        return [{"role": "system", "content": system}] if system and self.has_system_role else []

    def _render(self, messages: list[dict[str, str]], *, is_open: bool) -> str:
        assert self._tokenizer is not None, "for_tokenizer comes first"
        try:
            return self._tokenizer.render_chat(messages, is_open=is_open, **self.template_kwargs)
        except TemplateError as error:
            raise DataError(f"ChatTemplateFormat: the template refuses the conversation: {error}") from error

    def _shows_system(self) -> bool:
        messages = [{"role": "system", "content": _PROBE}, {"role": "user", "content": "a"}]
        try:
            return _PROBE in self._render(messages, is_open=True)  # Phi-3's first template leaves it out
        except DataError:  # Gemma's refuses it
            return False


def _first_control_token(text: str, control_tokens: Iterable[str]) -> str:
    found = [(text.find(token), -len(token), token) for token in control_tokens if token in text]
    return min(found)[2] if found else ""


def _behind(start: str, whole: str) -> str:
    if whole.startswith(start):
        return whole[len(start) :]
    pairs = enumerate(zip(start, whole, strict=False))
    place = next((n for n, (a, b) in pairs if a != b), min(len(start), len(whole)))
    near = slice(max(0, place - 20), place + 20)
    raise DataError(
        "ChatTemplateFormat: the chat template renders the prompt differently once the answer follows, so what "
        f"is trained would not be what is served. First difference at character {place}: prompt "
        f"{start[near]!r}, whole {whole[near]!r}. Train the last turn only, set "
        "prompt_format_config.kwargs.template_kwargs (e.g. enable_thinking: false), or use a named format."
    )
