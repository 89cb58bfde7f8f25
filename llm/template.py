"""`Template`: text with `{text}` (contexts also `{index}`), the only things a prompt template can hold.

`{{` and `}}` are literal braces. Nothing else is interpreted: no attribute access, no format specification;
braces in the text that is filled in are data.
"""

import re
from dataclasses import dataclass, field

from llm.errors import ConfigError, did_you_mean

_TOKEN = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")


@dataclass(frozen=True)
class Template:
    """A parsed template: literal text and the names of the fields between, in order.

    Template("Source {index}: {text}", fields=("text", "index")).fill(text="a", index=1) == "Source 1: a"

    Raises ConfigError for an unknown field, a lone brace, or a template without exactly one `{text}`.
    """

    source: str
    fields: tuple[str, ...] = ("text",)
    name: str = "template"
    parts: tuple[tuple[str, str | None], ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Parses `source` into (literal, following field or None) pairs."""
        parts: list[tuple[str, str | None]] = []
        literal, position = "", 0
        for match in _TOKEN.finditer(self.source):
            literal += self.source[position : match.start()]
            position = match.end()
            if match[0] in ("{{", "}}"):
                literal += match[0][0]
            else:
                parts.append((literal, self._field(match)))
                literal = ""
        parts.append((literal + self.source[position:], None))
        if [name for _, name in parts].count("text") != 1:
            raise ConfigError(
                f"{self.name} {self.source!r}: needs `{{text}}` exactly once, else rows get the same text."
            )
        object.__setattr__(self, "parts", tuple(parts))

    def fill(self, *, text: str, index: int = 1) -> str:
        """The template with its fields replaced; `index` counts contexts from 1."""
        values = {"text": text, "index": str(index)}
        return "".join(literal + (values[name] if name else "") for literal, name in self.parts)

    def split(self) -> tuple[str, str]:
        """What stands before `{text}` and what stands behind it (only for templates of `{text}` alone)."""
        (head, _), (tail, _) = self.parts
        return head, tail

    def _field(self, match: re.Match[str]) -> str:
        name, where = match[1], f"{self.name} {self.source!r}, character {match.start() + 1}"
        if name is None:
            raise ConfigError(f"{where}: a lone `{match[0]}`. Write `{match[0] * 2}` for a literal brace.")
        if name not in self.fields:
            raise ConfigError(
                f"{where}: no field `{{{name}}}`. {did_you_mean(name, self.fields)} "
                f"Write `{{{{{name}}}}}` for literal braces."
            )
        return name
