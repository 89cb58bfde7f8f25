"""`ChatTemplateFormat`: any tokenizer's own chat template as a prompt format.

The default for a base model that the registry does not know but whose tokenizer has a template. The response is
what the template puts behind the prompt, up to the control token that ends it.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, Self

from jinja2 import TemplateError

from llm.errors import ConfigError, DataError
from llm.prompt_format import (
    Conversation,
    FormatTokenizer,
    Segment,
    TrainOn,
    Turn,
    merge_segments,
)

_PROBE = "probe-8d7f"  # a text that no template holds
_KNOWN_ROLES = ("system", "user", "assistant", "tool")


class TemplateRefusal(DataError):
    """The chat template raises an error for this conversation."""


def split_system(chat: Sequence[Mapping[str, Any]]) -> tuple[str, list[dict[str, Any]]]:
    """The system message ("" when there is none) and the messages behind it."""
    messages = [dict(message) for message in chat]
    has_system = bool(messages) and messages[0]["role"] == "system"
    return (str(messages[0]["content"]), messages[1:]) if has_system else ("", messages)


def answer_places(messages: Sequence[Mapping[str, Any]], train_on: TrainOn) -> list[int]:
    """Where the answers to be trained stand; the first message answers nothing, `weight: 0` is not trained."""
    answers = [place for place, message in enumerate(messages) if place and message["role"] == "assistant"]
    answers = answers[-1:] if train_on == "last" else answers
    return [place for place in answers if messages[place].get("weight") != 0]


class ChatTokenizer(FormatTokenizer, Protocol):
    """A tokenizer that has a chat template."""

    @property
    def chat_template(self) -> str | None:
        """The template, None when there is none."""

    def render_chat(self, messages: list[dict[str, Any]], *, is_open: bool, **kwargs: Any) -> str:
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
            messages.append(self._question(turn, "" if number else conversation.system))
            is_asked = turn.is_trained and not turn.is_example
            if is_asked:
                prompt = self._render(messages, is_open=True) + self.opening(turn.response_head)
                pieces.append(Segment(_behind(done, prompt), False))
                done = prompt
            if turn.response is not None:
                messages.append(_answer(turn))
            if is_asked and turn.response is not None:
                response, done = self._response(prompt, self._render(messages, is_open=False))
                pieces.append(Segment(response, True))
        return merge_segments(pieces)

    def chat_segments(
        self,
        conversation: Conversation,
        chat: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Any] = (),
        train_on: TrainOn = "all",
    ) -> list[Segment]:
        """The same for messages as they stand: tool calls, reasoning and other fields go to the template untouched.

        The last turn of `conversation` has what stands around them: its contexts belong to the last message of the
        user. What follows the last answer is left out; no segments when no answer is to be trained (`weight: 0`).
        """
        asked = conversation.turns[-1]
        system, said = split_system(chat)
        system = system or conversation.system
        said = self._with_contexts(said, asked.contexts)
        shown = [one for turn in conversation.turns[:-1] for one in (self._question(turn, ""), _answer(turn))]
        messages = [*self._system_messages(system), *shown, *said]
        if system and not self.has_system_role:
            messages[0]["content"] = self.content_separator.join([system, messages[0]["content"]])
        pieces: list[Segment] = []
        done = ""
        for number in answer_places(said, train_on):
            number += len(messages) - len(said)
            opened = self._render(messages[:number], is_open=True, tools=tools or None)
            prompt = opened + self.opening(asked.response_head)
            pieces.append(Segment(_behind(done, prompt), False))
            whole = self._render(messages[: number + 1], is_open=False, tools=tools or None)
            response, done = self._response(prompt, whole)
            pieces.append(Segment(response, True))
            _check_shown(messages[:number], prompt)
        return merge_segments(pieces)

    def _with_contexts(self, said: list[dict[str, Any]], contexts: Sequence[str]) -> list[dict[str, Any]]:
        """The messages with `contexts` before the last that the user said."""
        if not contexts:
            return said
        place = max((n for n, message in enumerate(said) if message["role"] == "user"), default=None)
        if place is None:
            raise TemplateRefusal("the row has contexts, and no message of a user that they belong to")
        content = self.content_separator.join([*contexts, said[place]["content"]])
        return [*said[:place], {**said[place], "content": content}, *said[place + 1 :]]

    def _question(self, turn: Turn, system: str) -> dict[str, Any]:
        """`system` stands before the first input where the template has no role for it."""
        before = [system] if system and not self.has_system_role else []
        return {"role": "user", "content": self.content_separator.join([*before, *turn.contexts, turn.input])}

    def _response(self, prompt: str, whole: str) -> tuple[str, str]:
        behind = _behind(prompt, whole)
        end = behind.rfind(self.stop)
        if end < 0:  # the template puts no control token there: ours ends the response
            return behind + self.stop, whole
        end += len(self.stop)
        return behind[:end], prompt + behind[:end]

    def _system_messages(self, system: str) -> list[dict[str, Any]]:
        return [{"role": "system", "content": system}] if system and self.has_system_role else []

    def _render(self, messages: list[dict[str, Any]], *, is_open: bool, **kwargs: Any) -> str:
        assert self._tokenizer is not None, "for_tokenizer comes first"
        try:
            return self._tokenizer.render_chat(messages, is_open=is_open, **kwargs, **self.template_kwargs)
        except (TemplateError, TypeError) as error:  # TypeError: it adds a text to what is none
            raise TemplateRefusal(f"ChatTemplateFormat: the template refuses the conversation: {error}") from error

    def _shows_system(self) -> bool:
        messages = [{"role": "system", "content": _PROBE}, {"role": "user", "content": "a"}]
        try:
            return _PROBE in self._render(messages, is_open=True)  # Phi-3's first template leaves it out
        except DataError:  # Gemma's refuses it
            return False


def _answer(turn: Turn) -> dict[str, Any]:
    return {"role": "assistant", "content": turn.response_head + (turn.response or "")}


def _first_control_token(text: str, control_tokens: Iterable[str]) -> str:
    found = [(text.find(token), -len(token), token) for token in control_tokens if token in text]
    return min(found)[2] if found else ""


def _check_shown(messages: Iterable[Mapping[str, Any]], prompt: str) -> None:
    """TemplateRefusal where a message of a role that templates need not know is left out in silence."""
    for message in messages:
        if message["role"] not in _KNOWN_ROLES and str(message.get("content", "")).strip() not in prompt:
            raise TemplateRefusal(f"the template leaves messages of the role `{message['role']}` out")


def _behind(start: str, whole: str) -> str:
    if whole.startswith(start):
        return whole[len(start) :]
    pairs = enumerate(zip(start, whole, strict=False))
    place = next((n for n, (a, b) in pairs if a != b), min(len(start), len(whole)))
    near = slice(max(0, place - 20), place + 20)
    raise DataError(
        "ChatTemplateFormat: the chat template renders the prompt differently once the answer follows, so what "
        f"is trained would not be what is served. First difference at character {place}: prompt "
        f"{start[near]!r}, whole {whole[near]!r}. Set `train_on: last`, set "
        "prompt_format_config.kwargs.template_kwargs (e.g. enable_thinking: false), or use a named format."
    )
