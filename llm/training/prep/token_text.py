"""Token ids -> what each of them shows: one text per token, every character visible, none broken.

Works through decoding alone, so it holds for any tokenizer; a character that is spread over several tokens stands at
the first of them.
"""

import re
import unicodedata
from collections.abc import Sequence

from llm.tokenizer import PromptTokenizer

BOUNDARY, SPACE, NEWLINE, TAB, CONTINUED = "│", "·", "↵", "⇥", "⋯"
MARKS = re.compile(f"[{BOUNDARY}{SPACE}{NEWLINE}{TAB}{CONTINUED}]|<U\\+[0-9A-F]{{4,6}}>|<id [0-9]+>")
_SHOWN = {" ": SPACE, "\n": NEWLINE, "\t": TAB}
_OURS = {BOUNDARY, SPACE, NEWLINE, TAB, CONTINUED}
_HIDDEN = ("C", "Z")  # Unicode categories: control and format characters, unassigned ones; separators
_BROKEN = "\ufffd"  # what a decoder gives for bytes that are no character
_MOST_TOKENS = 8  # a character has 4 bytes at most, and a token may end within the next one


def shown_tokens(ids: Sequence[int], tokenizer: PromptTokenizer, *, context: Sequence[int] = ()) -> list[str]:
    """What each of `ids` shows, as many texts as ids; `context`: the ids before them, of which the last few count.

        ids      4   9  31  32  33   7   2
        text    "Hi|  |      日     | \\n|</s>"
        shown    Hi  ·  日  ⋯   ⋯   ·↵ </s>

    `⋯` goes on with the character before; `<id 5>` has no text, neither alone nor with its neighbours.
    """
    names = {number: name for name, number in tokenizer.control_tokens.items()}
    shown: list[str] = []
    known = list(context[-_MOST_TOKENS:])
    while len(shown) < len(ids):
        rest = list(ids[len(shown) : len(shown) + _MOST_TOKENS])
        stop = next((place for place, number in enumerate(rest) if number in names), len(rest))
        size, text = _next_text(known, rest[:stop], tokenizer) if stop else (1, names[rest[0]])
        shown += [visible(text) or f"<id {rest[0]}>", *[CONTINUED] * (size - 1)]
        known = rest[:size]
    return shown


def visible(text: str) -> str:
    """`text` without a character that cannot be seen, or that could be taken for one of our marks."""
    return "".join(_visible_character(character, is_first=place == 0) for place, character in enumerate(text))


def _visible_character(character: str, *, is_first: bool) -> str:
    if character in _SHOWN:
        return _SHOWN[character]
    category = unicodedata.category(character)
    # At the start of a token a combining mark would sit on the boundary before it.
    if character in _OURS or category[0] in _HIDDEN or (is_first and category[0] == "M"):
        return f"<U+{ord(character):04X}>"
    return character


def _next_text(known: list[int], rest: list[int], tokenizer: PromptTokenizer) -> tuple[int, str]:
    """How many of `rest` it takes until they are whole characters, and these; (1, "") where they never are."""
    before = tokenizer.decode([known])[0] if known else ""
    for size in range(1, len(rest) + 1):
        text = tokenizer.decode([known + rest[:size]])[0]
        new = text[len(before) :] if text.startswith(before) else ""
        if text == before and _BROKEN not in text:  # nothing, and not for want of bytes: SentencePiece's dummy space
            return 1, ""
        # U+FFFD may stand in the data. Its ids are at the end: SentencePiece puts a dummy space before a text.
        if new and (_BROKEN not in new or tokenizer.encode([new])[0][-size:].tolist() == rest[:size]):
            return size, new
    alone = tokenizer.decode([rest[:1]])[0]
    return 1, alone if _BROKEN not in alone else ""
