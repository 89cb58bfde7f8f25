"""Stage 2 for most rows: one question and its answer, rendered by filling a frame.

What a prompt and a format put around the texts of a row is the same for all rows with as many contexts. So a row of
placeholders is rendered, and its text cut where they stand:

    prompt      "<|im_start|>user\\n"  input  "<|im_end|>\\n<|im_start|>assistant\\n"
    response    response  "<|im_end|>"

Few-shot examples are rendered once, not once a row.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from llm.errors import DataError
from llm.prompt import Message
from llm.prompt_format import Segment

_FIRST, _MOST = 0xF0000, 1000  # placeholders: private characters that no template holds
_PLACEHOLDER = re.compile(f"([{chr(_FIRST)}-{chr(_FIRST + _MOST + 1)}])")

Render = Callable[[Message], list[Segment]]


class Frames:
    """The frames of a `render` that looks into no text but for what it strips off the ends."""

    def __init__(self, render: Render) -> None:
        """Each frame is made when it is first needed, and compared with `render` for that message."""
        self._render = render
        self._frames: dict[int, _Frame | None] = {}

    def segments(self, message: Message) -> list[Segment] | None:
        """As `render` gives them; None where something may be stripped, and where there is no frame.

        `message` is to be trained, and its texts hold no control token.
        """
        texts = message.input, message.response or "", *message.contexts
        for text in texts:
            if not text or text.strip() != text:
                return None
        number = len(message.contexts)
        if number not in self._frames:
            self._frames[number] = self._tried_frame(message, texts)
        frame = self._frames[number]
        return frame.filled(texts) if frame else None

    def _tried_frame(self, message: Message, texts: Sequence[str]) -> "_Frame | None":
        placeholders = [chr(_FIRST + place) for place in range(len(texts))]
        if len(texts) > _MOST or any(map(_PLACEHOLDER.search, texts)):
            return None
        try:
            frame = _Frame.of(self._render(Message(placeholders[0], placeholders[1], placeholders[2:])), len(texts))
            return frame if frame and frame.filled(texts) == self._render(message)[:2] else None
        except (ValueError, DataError):  # a row that cannot be rendered: who renders it says why
            return None


@dataclass(frozen=True, kw_only=True)
class _Frame:
    """Text of the prompt, in which the texts of a row stand at `slots` (place, number of the text), and around the
    response, which is text 1."""

    prompt: list[str]
    slots: list[tuple[int, int]]
    before: str
    after: str

    @classmethod
    def of(cls, segments: Sequence[Segment], num_texts: int) -> "_Frame | None":
        """The frame of rendered placeholders; None where one of them is missing, repeated, or of the other segment."""
        if [segment.is_trained for segment in segments[:2]] != [False, True]:
            return None
        prompt, response = (_PLACEHOLDER.split(segment.text) for segment in segments[:2])
        slots = [(place, ord(prompt[place]) - _FIRST) for place in range(1, len(prompt), 2)]
        is_whole = sorted(number for _, number in slots) == [0, *range(2, num_texts)]
        if not is_whole or response[1::2] != [chr(_FIRST + 1)]:
            return None
        return cls(prompt=prompt, slots=slots, before=response[0], after=response[2])

    def filled(self, texts: Sequence[str]) -> list[Segment]:
        """A prompt and its response."""
        pieces = self.prompt.copy()
        for place, number in self.slots:
            pieces[place] = texts[number]
        return [Segment("".join(pieces), False), Segment(self.before + texts[1] + self.after, True)]
