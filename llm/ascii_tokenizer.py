"""Ids of ASCII texts from a byte-level tokenizer, the same in two thirds of the time.

Such a tokenizer splits a text into words, writes each in characters that stand for its bytes (`Ġ` for a space), and
looks that up; writing word by word takes the library nearly as long as all the rest. In ASCII a character is a byte:
the whole text can be written first, and split by the same patterns, which are written in these characters as well.
"""

import codecs
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any
from unicodedata import category

from tokenizers import Regex, Tokenizer, models, pre_tokenizers

from llm.fast_tokenizer import TokenIds, first_difference, library_ids, odd_texts


def byte_characters() -> list[str]:
    """The printable character that byte-level BPE writes for each byte (openai/gpt-2 `encoder.py`)."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = (chr(256 + n) for n in range(256))
    return [chr(byte) if byte in printable else next(others) for byte in range(256)]


_BYTES = byte_characters()
_WRITTEN: dict[str, str] = {chr(byte): _BYTES[byte] for byte in (*b"\t\n\r", *range(ord(" "), ord("~") + 1))}
_TABLE = "".join(_WRITTEN.get(chr(byte), "\ufffe") for byte in range(256))  # U+FFFE: an error
_IN_NO_TEXT = _BYTES[0]
_KEEP_ASCII = ("NFC", "NFD", "NFKC", "NFKD")  # normalizers

# By what the ByteLevel pre-tokenizer splits (huggingface/tokenizers, byte_level.rs).
_GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# And where each digit is split off before, as SmolLM and StarCoder have it: a fifth faster than to split twice.
_DIGITS_GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"
_DIGITS = {"type": "Digits", "individual_digits": True}

_AFTER = f"[^\0-{max(_BYTES)}]"  # no byte is written as such a character
_RANGE = f"[0-9]-[0-9]|[A-Z]-[A-Z]|[a-z]-[a-z]|{_AFTER}-{_AFTER}"
_PART = re.compile(rf"\\p\{{\w+\}}|\\.|\(\?i:['a-z|\[\]]+\)|\(\?[:=!>]?|\[\^?|{_RANGE}|&&|.", re.DOTALL)
_ONE_CHARACTER = {r"\t": "\t", r"\n": "\n", r"\r": "\r", r"\ ": " "}

_Part = dict[str, Any]


class _CannotWrite(Exception):
    """A part of a tokenizer of which is not known what it does with written texts."""


class AsciiTokenizer:
    """Encodes as `backend` does; faster where a text is printable ASCII, tabs and line breaks alone."""

    def __init__(self, backend: Tokenizer, writing: Tokenizer) -> None:
        """Use `open_ascii`; `writing` takes written texts."""
        self._backend, self._writing = backend, writing

    def encode(self, texts: Sequence[str]) -> list[TokenIds]:
        """The ids of each text, nothing added."""
        written = [_written(text) for text in texts]
        unwritten = [text for text, one in zip(texts, written, strict=True) if one is None]
        fast = iter(library_ids(self._writing, [one for one in written if one is not None]))
        slow = iter(library_ids(self._backend, unwritten))
        return [next(slow if one is None else fast) for one in written]


def open_ascii(backend: Tokenizer, control_tokens: Iterable[str]) -> AsciiTokenizer | None:
    """An encoder that gives the ids of `backend`; None where that is no byte-level BPE, or has unknown parts.

    Its ids of many odd texts were compared.
    """
    try:
        encoder = AsciiTokenizer(backend, _writing_tokenizer(backend))
    except _CannotWrite:
        return None
    texts = [text for text in odd_texts(list(control_tokens)) if _written(text) is not None]
    wrong = first_difference(list(zip(texts, encoder.encode(texts), strict=True)), backend)
    return encoder if wrong is None else None


def _written(text: str) -> str | None:
    """`text` in the characters of its bytes; None where it holds others than those of `_WRITTEN`."""
    if not text.isascii():
        return None
    try:
        return codecs.charmap_decode(text.encode(), "strict", _TABLE)[0]  # as encodings/cp1252.py has it
    except UnicodeDecodeError:
        return None


def _writing_tokenizer(backend: Tokenizer) -> Tokenizer:
    """The tokenizer of written texts: the same model, added tokens and splits."""
    model = backend.model
    normalizers, splits = _parts(backend)
    if not isinstance(model, models.BPE) or any(one["type"] not in _KEEP_ASCII for one in normalizers):
        raise _CannotWrite
    writing = Tokenizer(model)  # shared
    writing.pre_tokenizer = pre_tokenizers.Sequence([*_splits(splits)])
    added = dict(sorted(backend.get_added_tokens_decoder().items()))
    for token in added.values():
        if token.lstrip or token.rstrip or token.single_word:
            raise _CannotWrite
        token.content = _written_token(token.content)
    writing.add_tokens([*added.values()])
    if backend.encode_special_tokens or any(writing.token_to_id(token.content) != n for n, token in added.items()):
        raise _CannotWrite
    return writing


def _written_token(content: str) -> str:
    """What stands in written texts where `content` stands in texts; as it is where that is in neither."""
    written = _written(content)
    if written is None and set(content) <= set(_BYTES):
        raise _CannotWrite
    return content if written is None else written


def _splits(parts: Sequence[_Part]) -> Iterator[pre_tokenizers.PreTokenizer]:
    """What splits a written text where `parts` split the text; the last of them writes it."""
    if not parts or parts[-1]["type"] != "ByteLevel" or parts[-1]["add_prefix_space"]:
        raise _CannotWrite
    *parts, last = parts
    if last["use_regex"] and parts == [_DIGITS]:
        parts = [_isolated(_DIGITS_GPT2_PATTERN)]
    elif last["use_regex"]:
        parts.append(_isolated(_GPT2_PATTERN))
    for part in parts:
        if part["type"] == "Digits":
            yield pre_tokenizers.Digits(individual_digits=part["individual_digits"])
        elif part["type"] == "Split" and "Regex" in part["pattern"]:
            behavior = re.sub("(?<=.)(?=[A-Z])", "_", part["behavior"]).lower()  # MergedWithNext -> merged_with_next
            yield pre_tokenizers.Split(_compiled(_written_pattern(part["pattern"]["Regex"])), behavior, part["invert"])
        else:
            raise _CannotWrite


def _parts(backend: Tokenizer) -> tuple[list[_Part], list[_Part]]:
    """Normalizers and pre-tokenizers, and what each is made with: only the JSON of a tokenizer says that."""
    small = Tokenizer(models.BPE())
    if backend.normalizer is not None:
        small.normalizer = backend.normalizer
    if backend.pre_tokenizer is not None:
        small.pre_tokenizer = backend.pre_tokenizer
    facts = json.loads(small.to_str())
    found = (facts["normalizer"] or {"normalizers": []}, facts["pre_tokenizer"] or {"pretokenizers": []})
    return found[0].get("normalizers", [found[0]]), found[1].get("pretokenizers", [found[1]])


def _compiled(pattern: str) -> Regex:
    try:
        return Regex(pattern)
    except Exception as error:  # Oniguruma's, of no class of its own: the tokenizer itself can still be used
        raise _CannotWrite from error


def _isolated(pattern: str) -> _Part:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def _written_pattern(pattern: str) -> str:
    """The pattern that finds in each written text what `pattern` finds in the text.

    Its characters are written, its classes listed: `\\s` is `[ĉĊčĠ]`. Anchors and classes that would need more than
    that (nested ones, ranges other than of letters and digits) are not known.
    """
    found, is_in_class = [], False
    parts = _PART.findall(pattern)
    for part, following in zip(parts, [*parts[1:], ""], strict=True):
        is_opening = part.startswith("[")
        if is_in_class:
            is_known = not part.startswith(("[", "(?", "&&")) and (part != "-" or following == "]")
        else:
            is_known = part not in (*".^$", "(?") and not (is_opening and following == "]")
        if not is_known or (not part.isascii() and not re.match(_AFTER, part)):
            raise _CannotWrite
        found.append(_written_part(part))
        is_in_class = (is_in_class or is_opening) and part != "]"
    return "".join(found)


def _written_part(part: str) -> str:
    if not part.startswith("\\"):
        return _WRITTEN.get(part, part)
    if part in _ONE_CHARACTER:
        return _WRITTEN[_ONE_CHARACTER[part]]
    if part[1].isprintable() and not part[1].isalnum():
        return part
    members = [written for character, written in _WRITTEN.items() if _is_member(character, part)]
    listed = "".join(map(re.escape, members)) or _IN_NO_TEXT
    return f"[{listed}]"  # within another class, too: Oniguruma takes that for one


def _is_member(character: str, escaped: str) -> bool:
    """Whether `character` is of the class `escaped`: `\\s`, `\\S`, or a general category of Unicode."""
    if escaped in (r"\s", r"\S"):
        return character.isspace() == (escaped == r"\s")
    if not re.fullmatch(r"\\p\{[LMNPSZC][a-z]?\}", escaped):
        raise _CannotWrite
    return category(character).startswith(escaped[3:-1])
