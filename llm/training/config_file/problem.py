"""One problem of a config file, its place, and the words that tell it.

Made by every check of `config_file.load_config`, which gathers them into one ConfigError.
"""

import re
from dataclasses import dataclass
from typing import Any

from llm.training.config import KeyPath
from llm.training.config_file.secret import mask_line, mask_secrets

NO_REMOTE_CODE = "Code that comes with a model or a data set is never run: delete `trust_remote_code`."


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a key stands: `where` is `finetune.yaml:7:3` (or `--set`), `line` the text there, `file` its file."""

    where: str
    file: str = ""
    line: str = ""
    line_number: int = 0


@dataclass(frozen=True, kw_only=True)
class Problem:
    """What is wrong with the key at `path`; `place` only where it is not the place of that key."""

    path: KeyPath
    text: str
    place: Place | None = None


def describe(value: Any) -> str:
    """`value` in words: `the text "2048"`, `the number 2.5`, `a list`."""
    if isinstance(value, str):
        return f'the text "{_short(value)}"' if value else "an empty text"
    if value is None:
        return "`null` (an empty value)"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, list):
        return f"the list {_short(str(value))}" if value else "an empty list"
    return "a section" if isinstance(value, dict) else f"the number {value}"


def _short(text: str) -> str:
    return text if len(text) <= 40 else text[:40] + "..."


def wrong_type(key: str, expected: str, value: Any) -> str:
    """The sentence for a `value` that is not what `expected` says, with what to write instead."""
    words = expected.split(" or ")
    either = " or ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)
    return f"`{key}` must be {either}, not {describe(value)}.{_remedy(expected, value)}"


def _remedy(expected: str, value: Any) -> str:
    is_bool, is_number = "`true`" in expected, "integer" in expected or "number" in expected
    if value is None:
        return " Fill it in, or delete the key."
    if isinstance(value, float) and is_number and value.is_integer():
        return f" Write {int(value)}."
    if not isinstance(value, str):
        return ""
    if is_bool and value.lower() in ("yes", "on", "y", "no", "off", "n"):
        return f" Write `{str(value.lower() in ('yes', 'on', 'y')).lower()}`: in YAML 1.2 `{value}` is text."
    if expected == "a list" or expected.startswith("a list of texts"):
        return f" Write `[{value}]`."
    is_quoted_number = re.fullmatch(r"[-+]?[0-9]*\.?[0-9]+(e[-+]?[0-9]+)?", value, re.IGNORECASE)
    if (is_bool and value.lower() in ("true", "false")) or (is_number and is_quoted_number):
        return f" Write {value} without quotes."
    return ""


def problem_text(problem: Problem, place: Place) -> str:
    """The lines for one problem: place and key path, the line itself, what is wrong; secrets are masked."""
    parts = [f"[{part}]" if isinstance(part, int) else f".{part}" for part in problem.path]
    line = f"    {mask_line(place.line.strip())[:110]}\n" if place.line.strip() else ""
    return f"{place.where}  {''.join(parts).lstrip('.')}".rstrip() + f"\n{line}    {mask_secrets(problem.text)}"
