"""`PromptFormat`: the role marks of a model family, and how a conversation becomes text with them.

Stage 2 of the road: takes a `Conversation` (the task's words, from `prompt.py`), gives `Segment`s of rendered text,
each trained or not. A format knows nothing of the task, a prompt nothing of the format: any goes with any.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, Protocol, Self

from llm.errors import ConfigError, DataError

TrainOn = Literal["all", "last"]
"""Which answers of a conversation are trained."""


@dataclass(frozen=True)
class Role:
    """The marks around the text of one speaker; `strip_text` takes white space off the text's ends."""

    prefix: str = ""
    suffix: str = ""
    strip_text: bool = True

    def clean(self, text: str) -> str:
        """`text`, stripped if this role strips."""
        return text.strip() if self.strip_text else text

    def render(self, text: str) -> str:
        """`text` between the marks."""
        return self.prefix + self.render_open(text)

    def render_open(self, text: str) -> str:
        """`text` and the closing mark, for where the opening mark already stands."""
        return self.clean(text) + self.suffix


@dataclass(frozen=True, kw_only=True)
class Turn:
    """One question and its answer as the task words them.

    `response_head` is what a response template puts before the answer: it belongs to the prompt. `response` is
    None where the model is to answer. `is_example`: few-shot, so never trained.
    """

    input: str
    contexts: tuple[str, ...] = ()
    response_head: str = ""
    response: str | None = None
    is_example: bool = False
    is_trained: bool = True


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """A system message (may be empty) and the turns, few-shot examples first."""

    system: str
    turns: tuple[Turn, ...]


class Segment(NamedTuple):
    """A piece of rendered text; `is_trained` says whether its tokens become labels."""

    text: str
    is_trained: bool


class FormatTokenizer(Protocol):
    """What a format asks of a tokenizer: its control tokens by text, and its own BOS and EOS."""

    control_tokens: dict[str, int]
    eos_token: str | None
    added_bos: str


@dataclass(frozen=True)
class PromptFormat:
    """Role marks and separators; without any, plain text.

    Segments of one turn with `Role("User: ")`, `Role("Assistant: ")` and EOS `</s>`:

        [Segment("User: Hi\\nAssistant:", is_trained=False), Segment(" Hello</s>", is_trained=True)]

    The prompt never ends in a space: spaces at its end belong to the response, since most tokenizers merge a
    space with the word behind it, and a prompt that ends in one asks for a token that training never showed.
    """

    input: Role = Role()
    response: Role = Role()
    system: Role = Role()
    contexts: Role = Role()
    examples: Role = Role()
    nested_system: bool = False
    """The system message stands inside the first input's marks."""
    system_in_last_input: bool = False
    """The system message belongs to the last turn, not to the first: only one answer can be trained then."""
    nested_contexts: bool = True
    """The contexts stand inside the input's marks."""
    contexts_first: bool = True
    """The contexts stand before the input."""
    role_separator: str = "\n"
    """Between two roles of a turn."""
    turn_separator: str | None = None
    """Between a response and the next turn; None: `role_separator`."""
    content_separator: str = "\n"
    """Between the contents of one role: contexts, nested system message, input."""
    BOS: str = ""
    """Before the first turn."""
    repeat_BOS: bool = False
    """BOS stands before every turn."""
    EOS: str = ""
    """After every response."""
    default_system: str = ""
    """The system message when the prompt has none."""
    default_system_with_contexts: str = ""
    """The same for a first turn with contexts; empty: `default_system`."""
    stop: str = ""
    """The control token that ends a trained response; empty: the last one in `response.suffix` + `EOS`, else
    the tokenizer's EOS, which is then appended to the responses that are not few-shot examples."""

    def for_tokenizer(self, tokenizer: FormatTokenizer) -> Self:
        """This format with `BOS` and `stop` as `tokenizer` has them.

        Raises ConfigError when a control mark of the format is plain text for the tokenizer, or when nothing
        could end a response.
        """
        ending = self.response.suffix + self.EOS
        stop = self.stop or last_control_token(ending, tokenizer.control_tokens)
        for name, mark in (("BOS", self.BOS), ("EOS", self.EOS), ("stop", self.stop)):
            if mark.strip() and not last_control_token(mark, tokenizer.control_tokens):
                raise ConfigError(
                    f"{type(self).__name__}: {name} `{mark}` is not a control token of this tokenizer, so the model "
                    f"would see it as plain text. Its EOS is `{tokenizer.eos_token}`: choose another "
                    f"prompt_format_config, or set prompt_format_config.kwargs.{name}."
                )
        stop = stop or tokenizer.eos_token or ""
        if not stop:
            raise ConfigError(
                f"{type(self).__name__} ends no response with a control token, and the tokenizer has no EOS: the "
                "model would never learn to stop. Set prompt_format_config.kwargs.stop to a control token."
            )
        return replace(self, stop=stop, BOS=self.BOS or tokenizer.added_bos)

    def segments(self, conversation: Conversation) -> list[Segment]:
        """The rendered conversation: prompt and response alternate, joined neighbours, nothing empty."""
        between = self.role_separator if self.turn_separator is None else self.turn_separator
        system = conversation.system or self._default_system(conversation.turns)
        self._check_system_place(system, conversation.turns)
        system_turn = len(conversation.turns) - 1 if self.system_in_last_input else 0
        pieces: list[Segment] = []
        for number, turn in enumerate(conversation.turns):
            prompt = "" if number == 0 else between
            prompt += self.BOS if number == 0 or self.repeat_BOS else ""
            prompt += self._examples_mark(conversation.turns, number)
            prompt += self._instruction(turn, system if number == system_turn else "")
            pieces += self._turn_segments(prompt + self.role_separator + self.response.prefix, turn)
        return merge_segments(pieces)

    def _check_system_place(self, system: str, turns: tuple[Turn, ...]) -> None:
        num_answers = sum(turn.is_trained and not turn.is_example for turn in turns)
        is_asked = bool(turns) and turns[-1].response is None
        if self.system_in_last_input and system and num_answers > 1 and not is_asked:
            raise DataError(
                f"{type(self).__name__}: the system message stands in the last input, so it moves with every turn, and "
                "no prompt begins the next one. Set `train_on: last`, or leave the system message out."
            )

    def _default_system(self, turns: tuple[Turn, ...]) -> str:
        has_contexts = bool(turns and turns[0].contexts)
        return (has_contexts and self.default_system_with_contexts) or self.default_system

    def _turn_segments(self, opening: str, turn: Turn) -> list[Segment]:
        head = turn.response_head.lstrip() if self.response.strip_text else turn.response_head
        prompt = (opening + head).rstrip(" ")
        if turn.response is None:
            return [Segment(prompt, False)]
        whole = opening + self.response.render_open(turn.response_head + turn.response) + self.EOS
        if not turn.is_example and self.stop not in self.response.suffix + self.EOS:
            whole += self.stop
        stopped = whole.rfind(self.stop) + len(self.stop) if self.stop in whole[len(prompt) :] else len(whole)
        is_trained = turn.is_trained and not turn.is_example
        return [
            Segment(prompt, False),
            Segment(whole[len(prompt) : stopped], is_trained),
            Segment(whole[stopped:], False),
        ]

    def _examples_mark(self, turns: tuple[Turn, ...], number: int) -> str:
        is_example, was_example = turns[number].is_example, number > 0 and turns[number - 1].is_example
        if is_example and not was_example:
            return self.examples.prefix
        return self.examples.suffix if was_example and not is_example else ""

    def _instruction(self, turn: Turn, system: str) -> str:
        systems = [self.system.render(system)] if system else []
        contexts = [self.contexts.render(self.content_separator.join(turn.contexts))] if turn.contexts else []
        inside = self._ordered(contexts if self.nested_contexts else [], turn.input)
        inside = systems + inside if self.nested_system else inside
        question = self.input.render(self.content_separator.join(inside))
        outside = self._ordered([] if self.nested_contexts else contexts, question)
        outside = outside if self.nested_system else systems + outside
        return self.role_separator.join(outside)

    def _ordered(self, contexts: list[str], question: str) -> list[str]:
        return [*contexts, question] if self.contexts_first else [question, *contexts]


def last_control_token(text: str, control_tokens: Iterable[str]) -> str:
    """The control token that ends latest in `text`, or "" when there is none."""
    found = [(text.rfind(token) + len(token), len(token), token) for token in control_tokens if token in text]
    return max(found)[2] if found else ""


def merge_segments(segments: Iterable[Segment]) -> list[Segment]:
    """Segments without empty ones, neighbours of the same kind joined."""
    merged: list[Segment] = []
    for segment in segments:
        if merged and merged[-1].is_trained == segment.is_trained:
            merged[-1] = Segment(merged[-1].text + segment.text, segment.is_trained)
        elif segment.text:
            merged.append(segment)
    return merged
