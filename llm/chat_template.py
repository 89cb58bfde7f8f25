"""`ChatTemplateFormat`: any tokenizer's own chat template as a prompt format.

The default for a base model that the registry does not know but whose tokenizer has a template. The response is what
the template puts behind the prompt, up to its last control token.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, Self

from jinja2 import TemplateError

from llm.errors import ConfigError, DataError
from llm.prompt_format import (
    Conversation,
    FormatTokenizer,
    Segment,
    last_control_token,
    merge_segments,
)


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
    """The control token that ends a trained response; empty: the last one that the template puts behind it."""
    has_system_role: bool = True
    _tokenizer: ChatTokenizer | None = field(default=None, repr=False, compare=False)

    def for_tokenizer(self, tokenizer: ChatTokenizer) -> Self:
        """This format bound to `tokenizer`; ConfigError when it has no template or one that cannot be trained."""
        if tokenizer.chat_template is None:
            raise ConfigError(
                "prompt_format_config: ChatTemplateFormat needs a tokenizer with a chat template; this one has none. "
                "Use PlainFormat, or the format that the model was trained with."
            )
        bound = replace(self, _tokenizer=tokenizer, has_system_role=_has_system_role(tokenizer))
        question, answer = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
        try:
            behind = _behind(
                bound._render([question], is_open=True), bound._render([question, answer], is_open=False)
            )
        except DataError as error:
            raise ConfigError(str(error)) from error
        stop = self.stop or last_control_token(behind, tokenizer.control_tokens) or tokenizer.eos_token or ""
        if not stop:
            raise ConfigError(
                "ChatTemplateFormat: the template ends no response with a control token, and the tokenizer has no EOS: "
                "the model would never learn to stop."
            )
        return replace(bound, stop=stop)

    @property
    def base_template(self) -> str:
        """The tokenizer's own chat template."""
        assert self._tokenizer is not None and self._tokenizer.chat_template is not None, "for_tokenizer comes first"
        return self._tokenizer.chat_template

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
                prompt = self._render(messages, is_open=True) + turn.response_head.rstrip(" ")
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
        return self._tokenizer.render_chat(messages, is_open=is_open, **self.template_kwargs)


def _has_system_role(tokenizer: ChatTokenizer) -> bool:
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    try:
        return "s" in tokenizer.render_chat(messages, is_open=True)
    except TemplateError:  # how templates without the role refuse it, e.g. Gemma's
        return False


def _behind(start: str, whole: str) -> str:
    if whole.startswith(start):
        return whole[len(start) :]
    pairs = enumerate(zip(start, whole, strict=False))
    place = next((n for n, (a, b) in pairs if a != b), min(len(start), len(whole)))
    raise DataError(
        "ChatTemplateFormat: the chat template renders the prompt differently once the answer follows, so what is "
        f"trained would not be what is served. First difference at character {place}: prompt "
        f"{start[place - 20 : place + 20]!r}, whole {whole[place - 20 : place + 20]!r}. Train the last turn only, set "
        "prompt_format_config.kwargs.template_kwargs (e.g. enable_thinking: false), or use a named format."
    )
