"""`Prompt`: the task in words (system message, few-shot examples, templates), whatever the model.

Stage 2 of the road: takes `Message`s, gives a `Conversation` that a `PromptFormat` renders.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from llm.prompt_format import Conversation, Segment, Turn
from llm.template import Template


@dataclass(frozen=True)
class Message:
    """One question: `input`, what to answer it from (`contexts`), and the answer (None: the model's to give).

    `is_trained` is False for an answer that is only there to be answered from, as in an earlier turn.
    """

    input: str
    response: str | None = None
    contexts: Sequence[str] = ()
    is_trained: bool = True


class Renderer(Protocol):
    """A `PromptFormat` or `ChatTemplateFormat`."""

    def segments(self, conversation: Conversation) -> list[Segment]:
        """The rendered conversation."""


@dataclass(frozen=True)
class Prompt:
    """The task. Templates hold `{text}`, the context template also `{index}` (from 1).

    A list of context templates is used in turn, e.g. for contexts that are questions and answers by turns.
    Raises ConfigError when a template is not one.
    """

    system_message: str = ""
    examples: Sequence[Message] = ()
    input_template: str = "{text}"
    context_template: str | Sequence[str] = "{text}"
    response_template: str = "{text}"
    _input: Template = field(init=False, repr=False)
    _contexts: tuple[Template, ...] = field(init=False, repr=False)
    _response: Template = field(init=False, repr=False)
    _examples: tuple[Turn, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Parses the templates, so that a mistake in one is found here."""
        contexts = self.context_template
        contexts = [contexts] if isinstance(contexts, str) else contexts
        fields = ("text", "index")
        object.__setattr__(self, "_input", Template(self.input_template, name="input_template"))
        object.__setattr__(self, "_response", Template(self.response_template, name="response_template"))
        parsed = tuple(Template(source, fields, "context_template") for source in contexts)
        object.__setattr__(self, "_contexts", parsed)
        examples = tuple(replace(self._turn(message), is_example=True) for message in self.examples)
        object.__setattr__(self, "_examples", examples)

    def conversation(self, messages: Sequence[Message], *, system: str = "") -> Conversation:
        """The few-shot examples and then `messages`, worded by the templates; `system` replaces `system_message`."""
        turns = tuple(map(self._turn, messages))
        return Conversation(system=system or self.system_message, turns=self._examples + turns)

    def chat(self, messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Chat messages with what users and assistants say worded by the templates, all else as it stands."""
        templates = {"user": self._input, "assistant": self._response}
        return [
            {**message, "content": templates[message["role"]].fill(text=message["content"])}
            if message["role"] in templates and isinstance(message.get("content"), str) and message["content"]
            else dict(message)
            for message in messages
        ]

    def segments(self, messages: Sequence[Message], prompt_format: Renderer) -> list[Segment]:
        """The rendered `messages`: text that is prompt, text that is trained, alternating."""
        return prompt_format.segments(self.conversation(messages))

    def render(self, messages: Sequence[Message], prompt_format: Renderer) -> str:
        """The rendered text of `messages`, as one string."""
        return "".join(segment.text for segment in self.segments(messages, prompt_format))

    def template_parts(self) -> dict[str, Any]:
        """The templates as (literal, field) pairs, and the `head` of a response, for the serving template."""
        return {
            "input": self._input.parts,
            "contexts": [template.parts for template in self._contexts],
            "response": self._response.parts,
            "head": self._response.split()[0],
        }

    def _turn(self, message: Message) -> Turn:
        head, tail = self._response.split()
        templates = self._contexts
        return Turn(
            input=self._input.fill(text=message.input),
            contexts=tuple(
                templates[number % len(templates)].fill(text=text, index=number + 1)
                for number, text in enumerate(message.contexts)
            ),
            response_head=head,
            response=None if message.response is None else message.response + tail,
            is_trained=message.is_trained,
        )


@dataclass(frozen=True)
class DefaultPrompt(Prompt):
    """Usable for most tasks, best for none: `Context:`, `Input:`, `Response:`."""

    input_template: str = "Input: {text}"
    context_template: str | Sequence[str] = "Context: {text}"
    response_template: str = "Response: {text}"


@dataclass(frozen=True)
class ZeroShotQA(Prompt):
    """A question answered from the contexts and nothing else."""

    system_message: str = (
        "Answer the question from the given contexts and from nothing else. "
        "If they do not hold the answer, say that you do not know."
    )
    input_template: str = "Question: {text}"
    context_template: str | Sequence[str] = "Context: {text}"
    response_template: str = "Answer: {text}"


_RADIO_CONTEXTS = (
    "The Radio Telescope Service opened its second dish in the valley of Arden in 1987, after six years of work.",
    "Visitors reach the dish by the narrow-gauge railway, which runs from May to October.",
)


@dataclass(frozen=True)
class FewShotQA(ZeroShotQA):
    """`ZeroShotQA` with three examples, one of which cannot be answered."""

    examples: Sequence[Message] = (
        Message(
            input="Which law governs the contract?",
            contexts=(
                "No waiver. A delay in exercising a right under this agreement does not waive that right.",
                "This agreement and any dispute arising from it are governed by the law of Scotland.",
            ),
            response="The law of Scotland.",
        ),
        Message(input="When did the second dish open?", contexts=_RADIO_CONTEXTS, response="In 1987."),
        Message(input="Who paid for the railway?", contexts=_RADIO_CONTEXTS, response="I do not know."),
    )


@dataclass(frozen=True)
class StandaloneQuestion(Prompt):
    """A follow-up question made to stand alone; contexts are the conversation: question, answer, question..."""

    system_message: str = (
        "Rephrase the follow-up question so that it can be understood without the conversation. "
        "Give a short search query."
    )
    examples: Sequence[Message] = (
        Message(
            input="When was it opened?",
            contexts=("What is in the valley of Arden?", "The second dish of the Radio Telescope Service."),
            response="When was the second dish of the Radio Telescope Service opened?",
        ),
        Message(
            input="Who are the parties to the contract?",
            contexts=("Which law governs the contract?", "The law of Scotland."),
            response="Who are the parties to the contract?",
        ),
    )
    input_template: str = "Follow-up question: {text}"
    context_template: str | Sequence[str] = ("Question: {text}", "Answer: {text}")
    response_template: str = "Standalone question: {text}"


@dataclass(frozen=True)
class TextSummarization(Prompt):
    """A summary of the input."""

    system_message: str = "Create a concise summary of the given text."
    input_template: str = "Text: {text}"
    response_template: str = "Summary: {text}"
