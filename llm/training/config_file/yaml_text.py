"""A YAML file as plain Python values, with the place of every key.

Used by `include.py`, the first step of `config_file.load_config`: takes a path, gives a `Document`. YAML 1.2 core
schema: `1e-4` is a number, `no`, `on` and `12:30` are text, `012` is 12 (https://yaml.org/spec/1.2.2/#103-core-schema).
"""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, StringMark, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode
from ruamel.yaml.reader import ReaderError
from ruamel.yaml.resolver import BaseResolver

from llm.errors import ConfigError
from llm.training.config import KeyPath
from llm.training.config_file.problem import Place, Problem, describe, problem_text

MAX_FILE_BYTES = 1_000_000
MAX_VALUES = 100_000  # an alias counts each time it is used: nine lines of aliases can hold a billion values
MAX_DEPTH = 32  # also ends an anchor that holds itself

_TAG = "tag:yaml.org,2002:"
_CORE_SCHEMA = (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
)
_SCALAR_KINDS = {"str", *(name for name, _, _ in _CORE_SCHEMA)}
_ENV = re.compile(r"\$\{env:([^}]*)\}")


class CoreResolver(BaseResolver):
    """Which plain text is a number, a boolean or null: the core schema alone, whatever a `%YAML 1.1` line asks for."""

    def __init__(self, version: Any = None, loader: Any = None) -> None:
        super().__init__(loader)

    @property
    def processing_version(self) -> tuple[int, int]:
        """Always 1.2."""
        return (1, 2)


for _name, _pattern, _first in _CORE_SCHEMA:
    CoreResolver.add_implicit_resolver_base(_TAG + _name, re.compile(f"(?:{_pattern})\\Z"), _first)


@dataclass(frozen=True, kw_only=True)
class Document:
    """A YAML file: `data` as plain values, the `places` of its keys, and the `problems` met so far.

    `environment` has the text of each value that holds `${env:NAME}`, as it stands in the file.
    """

    source: str
    data: Any
    places: dict[KeyPath, Place]
    problems: list[Problem] = field(default_factory=list)
    environment: dict[KeyPath, str] = field(default_factory=dict)

    def place(self, path: KeyPath) -> Place:
        """The place of the key at `path`; of the nearest section around it when it is not in the file."""
        while path and path not in self.places:
            path = path[:-1]
        return self.places.get(path, Place(where=self.source))


def read_yaml(path: str) -> Document:
    """The YAML file at `path`, whose root must hold keys; ConfigError when it cannot be read at all."""
    document = parse_yaml(_read_text(path), source=path)
    root = document.places.pop((), Place(where=path))  # what concerns the whole file shows no line
    if document.data is None:
        raise ConfigError(f"{path}: the file is empty. Write keys such as `base_model: ...` into it.")
    if not isinstance(document.data, dict):
        raise _fatal(root, f"A config file holds `key: value` lines, not {describe(document.data)}.")
    return document


def parse_yaml(text: str, *, source: str) -> Document:
    """`text` as a Document; its `data` may be any YAML value. ConfigError when it is not YAML."""
    yaml = YAML(typ="safe", pure=True)
    yaml.Resolver = CoreResolver
    yaml.max_depth = MAX_DEPTH
    yaml.composer.warn_double_anchors = False  # YAML 1.2.2, 7.1: an anchor may be given anew
    lines = text.splitlines()
    try:
        node = yaml.compose(text)
    except MarkedYAMLError as error:
        raise _fatal(_place_of(error.problem_mark, source, lines), _syntax_text(error, lines)) from error
    except ReaderError as error:
        raise _fatal(_place_at(text, error.position, source), _character_text(error)) from error
    except YAMLError as error:
        raise ConfigError(f"{source}: this is not YAML: {error}") from error
    except (ValueError, OverflowError) as error:  # ruamel passes "\\U00110000" and above on to `chr`
        raise ConfigError(f"{source}: a `\\U` escape names no character: {error}.") from error
    reader = _NodeReader(source, lines)
    data = reader.value(node, ()) if node is not None else None
    return Document(
        source=source, data=data, places=reader.places, problems=reader.problems, environment=reader.environment
    )


def _read_text(path: str) -> str:
    if "://" in path:
        raise ConfigError(f"{path}: a config is read from a local file only. Copy it here first.")
    try:
        with Path(path).open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise ConfigError(f"{path}: cannot read this file: {reason}.") from error
    if len(data) > MAX_FILE_BYTES:
        raise ConfigError(f"{path}: the file is larger than {MAX_FILE_BYTES:,} bytes: is it a config file?")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        before = data[: error.start].decode("utf-8-sig")
        place = _place_at(before, len(before), path)
        text = f"Byte 0x{data[error.start]:02x} is not UTF-8. Save the file as UTF-8."
        raise _fatal(place, text) from error


class _NodeReader:
    """Turns composed nodes into plain values; notes the place of each key and collects problems."""

    def __init__(self, source: str, lines: list[str]) -> None:
        self._source = source
        self._lines = lines
        self._num_values = 0
        self.places: dict[KeyPath, Place] = {}
        self.problems: list[Problem] = []
        self.environment: dict[KeyPath, str] = {}

    def value(self, node: Node, path: KeyPath) -> Any:
        self._num_values += 1
        if self._num_values > MAX_VALUES or len(path) > MAX_DEPTH:
            limit = f"{MAX_VALUES:,} values (an alias `*name` counts each time) or {MAX_DEPTH} levels"
            raise _fatal(self._place(node), f"The file holds more than {limit}. Write out what is needed.")
        self.places.setdefault(path, self._place(node))  # that of its key, where it has one
        if isinstance(node, MappingNode) and node.tag == _TAG + "map":
            return {key: self.value(item, (*path, key)) for key, item in self._items(node, path)}
        if isinstance(node, SequenceNode) and node.tag == _TAG + "seq":
            return [self.value(item, (*path, index)) for index, item in enumerate(node.value)]
        return self._scalar(node, path)

    def _items(self, node: MappingNode, path: KeyPath) -> Iterator[tuple[str, Node]]:
        seen: dict[str, int] = {}
        for key_node, item in node.value:
            key, place = str(key_node.value), self._place(key_node)
            if not isinstance(key_node, ScalarNode) or key_node.tag != _TAG + "str":
                self._add(path, place, "A key must be text. Put it into quotes if you mean it as text.")
            elif key == "<<":
                self._add(path, place, "YAML 1.2 has no merge key `<<`. Write the keys out.")
            elif key in seen:
                text = f"`{key}` is given twice, here and in line {seen[key]}. Keep one."
                self._add((*path, key), place, text)
            else:
                seen[key] = place.line_number
                self.places[*path, key] = place
                yield key, item

    def _scalar(self, node: Node, path: KeyPath) -> Any:
        tag, text = str(node.tag), node.value
        if not isinstance(node, ScalarNode) or tag.removeprefix(_TAG) not in _SCALAR_KINDS:
            problem = f"The tag `{_short_tag(tag)}` is not read: write a plain value."
            self._add(path, self._place(node), problem)
            return None
        if "${env:" in text:
            self.environment[path] = text
            text = self._with_environment(text, path)
            if node.style is None:  # unquoted: read as if the variable's text stood here
                tag = str(CoreResolver().resolve(ScalarNode, text, (True, False)))
        try:
            return _scalar_value(tag.removeprefix(_TAG), text)
        except ValueError:
            self._add(path, self._place(node), f"`{text[:40]}` cannot be read as `{_short_tag(tag)}`.")
            return None

    def _with_environment(self, text: str, path: KeyPath) -> str:
        for name in _ENV.findall(text):
            if name not in os.environ:
                problem = f"The environment variable `{name}` is not set. Set it, or write the value here."
                self.problems.append(Problem(path=path, text=problem))
        return _ENV.sub(lambda match: os.environ.get(match[1], ""), text)

    def _add(self, path: KeyPath, place: Place, text: str) -> None:
        self.problems.append(Problem(path=path, text=text, place=place))

    def _place(self, node: Node) -> Place:
        return _place_of(node.start_mark, self._source, self._lines)


def _scalar_value(kind: str, text: str) -> str | int | float | bool | None:
    if kind == "int":
        return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))
    if kind == "float":
        return float(re.sub(r"\.(inf|nan)\Z", r"\1", text.lower()))
    if kind == "bool":
        return ["false", "true"].index(text.lower()) == 1
    return None if kind == "null" else text


def _short_tag(tag: str) -> str:
    return tag.replace(_TAG, "!!")


# --- what is wrong with a text that is not YAML, and where ------------------------------------------------


def _fatal(place: Place, text: str) -> ConfigError:
    return ConfigError(problem_text(Problem(path=(), text=text), place))


def _syntax_text(error: MarkedYAMLError, lines: list[str]) -> str:
    mark, problem = error.problem_mark, str(error.problem or error).splitlines()[0]
    line = lines[mark.line] if mark is not None and mark.line < len(lines) else ""
    if "\t" in line[: len(line) - len(line.lstrip())]:
        return "A tab cannot indent YAML. Use spaces."
    if "mapping values are not allowed" in problem:
        return "A second `: ` in one value, or wrong indentation. Put text that holds `: ` into quotes."
    if "maximum depth" in problem:
        return f"Lists or sections are nested too deeply: at most {MAX_DEPTH} levels."
    if "expected a single document" in str(error):
        return "A second document (`---`) begins here. A config file holds one."
    since = f"line {error.context_mark.line + 1}" if error.context_mark else ""
    if "${env:" in line and "flow mapping" in str(error.context):
        return "Inside `{ }` the braces of `${env:NAME}` mean something else. Write these keys on lines of their own."
    for context, what in _UNCLOSED.items():
        if context in str(error.context) and ("expected" in problem or "end of stream" in problem):
            return f"The {what} of {since} is not closed, or something is missing before this place."
    return f"This is not YAML: {problem}{f' ({error.context}, {since})' if since else ''}."


_UNCLOSED = {"quoted scalar": "quote", "flow sequence": "`[`", "flow mapping": "`{`"}


def _character_text(error: ReaderError) -> str:
    code = ord(error.character) if isinstance(error.character, str) else int(error.character)
    return f"The control character U+{code:04X} cannot stand in YAML. Delete it."


def _place_at(text: str, position: int, source: str) -> Place:
    before = text[:position]
    line_number, column = before.count("\n") + 1, position - (before.rfind("\n") + 1) + 1
    line = (text[position - column + 1 :].splitlines() or [""])[0]
    shown = "".join(character if character.isprintable() else "?" for character in line)
    return Place(where=f"{source}:{line_number}:{column}", file=source, line=shown, line_number=line_number)


def _place_of(mark: StringMark | None, source: str, lines: list[str]) -> Place:
    if mark is None:
        return Place(where=source)
    line = lines[mark.line] if mark.line < len(lines) else ""
    where = f"{source}:{mark.line + 1}:{mark.column + 1}"
    return Place(where=where, file=source, line=line, line_number=mark.line + 1)
