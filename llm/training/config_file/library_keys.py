"""The keys of `training_arguments`, `lora_config`, `quantization_config`, from the installed libraries.

Takes a section's name and values, gives a text for each key that the library would refuse or, worse, ignore.
Sources are parsed, not imported: importing transformers takes seconds, a config error must come within one.
"""

import ast
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from llm.errors import MissingExtraError, did_you_mean
from llm.training.config_file.library_rules import CHOICES, LIMITS, NEVER_IN_YAML, RENAMED, SET_ELSEWHERE
from llm.training.config_file.problem import describe, wrong_type

_DOCS = "https://huggingface.co/docs"
MAX_NAMES_LISTED = 30


@dataclass(frozen=True, kw_only=True)
class LibrarySection:
    """Where the keys of a section are defined: a class in the first file; bases and enums in the others."""

    package: str
    class_name: str
    files: tuple[str, ...]
    docs: str


SECTIONS = {
    "training_arguments": LibrarySection(
        package="transformers",
        class_name="TrainingArguments",
        files=("training_args.py", "trainer_utils.py", "debug_utils.py"),
        docs=f"{_DOCS}/transformers/main_classes/trainer#transformers.TrainingArguments",
    ),
    "lora_config": LibrarySection(
        package="peft",
        class_name="LoraConfig",
        files=("tuners/lora/config.py", "config.py", "utils/peft_types.py"),
        docs=f"{_DOCS}/peft/package_reference/lora#peft.LoraConfig",
    ),
    "quantization_config": LibrarySection(
        package="transformers",
        class_name="BitsAndBytesConfig",
        files=("utils/quantization_config.py",),
        docs=f"{_DOCS}/transformers/main_classes/quantization#transformers.BitsAndBytesConfig",
    ),
}


@dataclass(frozen=True, kw_only=True)
class LibraryKey:
    """What a library says of one key: its annotation, `IntervalStrategy | str`, the values of an enum, its default as
    Python text (empty: none that is written down), and its meaning.
    """

    annotation: str
    choices: tuple[str, ...] = ()
    default: str = ""
    meaning: str = ""

    @property
    def types(self) -> list[ast.expr]:
        """What YAML may give, each without a union; an enum is given by its text."""
        types = list(_alternatives(ast.parse(self.annotation, mode="eval").body))
        return [one for one in types if not self.choices or _leaf(one) in _WORDS]

    @property
    def words(self) -> str:
        """The types as a sentence names them: `an integer or a number`."""
        words = dict.fromkeys(_words(one, self.choices) for one in self.types if _leaf(one) in _WORDS)
        return " or ".join(words) or "anything"


def problems_of(section: str, values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Each key of `values` that cannot be in `section`, with a text that says why and what to write."""
    keys = keys_of(section)
    for name, value in values.items():
        if name in SET_ELSEWHERE[section]:
            yield name, f"`{name}` does not belong here. {SET_ELSEWHERE[section][name]}"
        elif name not in keys:
            yield name, _unknown_text(section, name)
        elif problem := _type_problem(name, value, keys[name]) or _limit_problem(name, value):
            yield name, problem
    if section == "training_arguments":
        yield from _training_rules(values)


def keys_for_yaml(section: str) -> dict[str, LibraryKey]:
    """The keys of `keys_of` that a YAML file may give."""
    refused = {*SET_ELSEWHERE[section], *NEVER_IN_YAML}
    return {name: key for name, key in keys_of(section).items() if name not in refused}


@cache
def keys_of(section: str) -> dict[str, LibraryKey]:
    """The keys that the installed library takes in `section`.

    MissingExtraError when it is not installed, or does not define the class where it is known to be.
    """
    source = SECTIONS[section]
    classes = _classes(source)
    if source.class_name not in classes:
        installed = f"{source.package} {version(source.package)}"
        raise MissingExtraError(
            f"{installed} has no `{source.class_name}` in `{source.files[0]}`: this version is not "
            "supported. Install a supported one: pip install --upgrade llm-train"
        )
    enums = {name: values for name, node in classes.items() if (values := _enum_values(node))}
    meanings = _documented(ast.get_docstring(classes[source.class_name]) or "")
    return {
        name: LibraryKey(
            annotation="str | None" if name in CHOICES else ast.unparse(annotation),
            choices=CHOICES.get(name) or _listed_choices(default) or _choices(annotation, enums),
            default=_default_text(default),
            meaning=_help_text(default) or meanings.get(name, ""),
        )
        for name, annotation, default in _fields(classes[source.class_name], classes)
    }


# --- the checks -------------------------------------------------------------------------------------------


def _unknown_text(section: str, name: str) -> str:
    source, known = SECTIONS[section], keys_of(section)
    what = f"`{source.class_name}` of {source.package} {version(source.package)} has no `{name}`."
    advice = RENAMED[section].get(name) or did_you_mean(name, known)
    if advice.startswith("Allowed:") and len(known) > MAX_NAMES_LISTED:
        advice = f"All names: {source.docs}"
    return f"{what} {advice}"


def _type_problem(name: str, value: Any, key: LibraryKey) -> str:
    if not any(_fits(value, one) for one in key.types):
        return wrong_type(name, key.words.removesuffix(" or `null`").removeprefix("`null` or "), value)
    if key.choices and isinstance(value, str) and value not in key.choices:
        return f"`{name}` cannot be {describe(value)}. {did_you_mean(value, key.choices)}"
    return ""


def _limit_problem(name: str, value: Any) -> str:
    limits = LIMITS.get(name, ())
    if isinstance(value, str | None) or all(holds(value, limit) for holds, _, limit in limits):
        return ""
    words = " and ".join(f"{word} {limit:g}" for _, word, limit in limits if limit != float("inf"))
    return f"`{name}` must be {words}, not {value}."


def _training_rules(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Rules across the keys of `training_arguments`."""
    if values.get("bf16") is True and values.get("fp16") is True:
        yield "fp16", "`bf16` and `fp16` exclude each other. Keep `bf16` on a GPU that has it, else `fp16`."
    max_steps, epochs = values.get("max_steps", -1), values.get("num_train_epochs", 1)
    if _is_number(max_steps) and max_steps != -1 and max_steps < 1:
        yield "max_steps", f"`max_steps` must be at least 1, or -1 for whole epochs, not {max_steps}."
    elif _is_number(epochs) and not epochs > 0 and max_steps == -1:
        text = f"`num_train_epochs` must be greater than 0, not {epochs}: nothing would train."
        yield "num_train_epochs", text
    for name in ("logging_steps", "save_steps", "eval_steps"):
        steps = values.get(name, 1)
        if isinstance(steps, float) and steps > 1 and not steps.is_integer():
            yield name, f"`{name}` must be whole above 1 (below 1 it is a share of all steps), not {steps}."


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


_WORDS = {
    "bool": "`true` or `false`",
    "int": "an integer",
    "float": "a number",
    "str": "text",
    "dict": "a section of keys",
    "list": "a list",
    "tuple": "a list",
    "Literal": "text",
    "None": "`null`",
}
_ITEM_WORDS = {"str": "texts", "int": "integers", "float": "numbers"}
MAX_CHOICES_LISTED = 15


def _words(annotation: ast.expr, choices: tuple[str, ...]) -> str:
    word = _WORDS[_leaf(annotation)]
    if word == "text" and 0 < len(choices) <= MAX_CHOICES_LISTED:
        return "one of " + ", ".join(f"`{choice}`" for choice in choices)
    if word == "a list" and isinstance(annotation, ast.Subscript):
        items = _ITEM_WORDS.get(ast.unparse(annotation.slice))
        return f"{word} of {items}" if items else word
    return word


def _alternatives(annotation: ast.expr) -> Iterator[ast.expr]:
    """The types of a union, however it is written: `int | None`, `Optional[int]`, `Union[int, str]`."""
    if isinstance(annotation, ast.BinOp):
        yield from _alternatives(annotation.left)
        yield from _alternatives(annotation.right)
    elif isinstance(annotation, ast.Subscript) and _leaf(annotation) in ("Optional", "Union"):
        inner = annotation.slice
        for part in inner.elts if isinstance(inner, ast.Tuple) else [inner]:
            yield from _alternatives(part)
        if _leaf(annotation) == "Optional":
            yield ast.Constant(None)
    else:
        yield annotation


def _leaf(annotation: ast.expr) -> str:
    return ast.unparse(annotation.value if isinstance(annotation, ast.Subscript) else annotation)


def _fits(value: Any, annotation: ast.expr) -> bool:
    """Whether `value` may be given for a type without a union; a type unknown to YAML takes anything."""
    name = _leaf(annotation)
    if name in ("int", "float"):
        return _is_number(value) and (name == "float" or isinstance(value, int))
    if name == "list" and isinstance(annotation, ast.Subscript):
        types = list(_alternatives(annotation.slice))
        return isinstance(value, list) and all(any(_fits(item, one) for one in types) for item in value)
    if name == "Literal" and isinstance(annotation, ast.Subscript):
        return isinstance(value, str) or value in [item.value for item in _constants(annotation)]
    plain = {"bool": bool, "str": str, "dict": dict, "list": list, "tuple": list}
    if name == "None":
        return value is None
    if name in plain:
        return isinstance(value, plain[name])
    return value is not None or name == "Any"


# --- reading the sources ----------------------------------------------------------------------------------


def _classes(source: LibrarySection) -> dict[str, ast.ClassDef]:
    spec = find_spec(source.package)  # of a top-level package: finds it without importing it
    if spec is None or not spec.submodule_search_locations:
        raise MissingExtraError(f"{source.package} is not installed: pip install {source.package}")
    folder = Path(spec.submodule_search_locations[0])
    files = [folder / name for name in source.files if (folder / name).is_file()]
    trees = [ast.parse(file.read_text(encoding="utf-8")) for file in files]
    nodes = [node for tree in reversed(trees) for node in tree.body]
    return {node.name: node for node in nodes if isinstance(node, ast.ClassDef)}


Field = tuple[str, ast.expr, ast.expr | None]


def _fields(node: ast.ClassDef, classes: Mapping[str, ast.ClassDef]) -> list[Field]:
    """Name, annotation, default of each parameter of `__init__`, else of each field, bases first."""
    fields: dict[str, Field] = {}
    for base in (classes.get(ast.unparse(base)) for base in node.bases):
        fields |= {field[0]: field for field in (_fields(base, classes) if base else [])}
    for item in node.body:
        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name) and item.target.id[0] != "_":
            fields[item.target.id] = (item.target.id, item.annotation, item.value)
    return _parameters(node) or list(fields.values())


def _parameters(node: ast.ClassDef) -> list[Field]:
    init = next((f for f in node.body if isinstance(f, ast.FunctionDef) and f.name == "__init__"), None)
    if init is None:
        return []
    names = [argument.arg for argument in init.args.args[1:]]
    defaults = init.args.defaults
    values = [getattr(default, "value", None) for default in defaults]
    types = ["Any" if value is None else type(value).__name__ for value in values]
    return [(name, ast.Name(kind), default) for name, kind, default in zip(names, types, defaults, strict=True)]


def _enum_values(node: ast.ClassDef) -> tuple[str, ...]:
    if not any("Enum" in ast.unparse(base) for base in node.bases):
        return ()
    values = [item.value for item in node.body if isinstance(item, ast.Assign)]
    return tuple(one.value for one in values if isinstance(one, ast.Constant) and isinstance(one.value, str))


def _choices(annotation: ast.expr, enums: Mapping[str, tuple[str, ...]]) -> tuple[str, ...]:
    choices: list[str] = []
    alternatives = list(_alternatives(annotation))
    is_text_too = "str" in map(_leaf, alternatives)
    for part in alternatives:
        if isinstance(part, ast.Subscript) and _leaf(part) == "Literal" and not is_text_too:
            choices += [item.value for item in _constants(part) if isinstance(item.value, str)]
        choices += enums.get(ast.unparse(part), ())
    # peft's `pissa_niter_[number of iters]` describes values instead of listing them.
    return () if any("[" in choice for choice in choices) else tuple(choices)


def _constants(literal: ast.Subscript) -> list[ast.Constant]:
    values = literal.slice.elts if isinstance(literal.slice, ast.Tuple) else [literal.slice]
    return [item for item in values if isinstance(item, ast.Constant)]


def _listed_choices(default: ast.expr | None) -> tuple[str, ...]:
    """The `choices` in a field's metadata, where they are written out."""
    for node in ast.walk(default) if default else []:
        if isinstance(node, ast.Dict):
            for key, value in zip(node.keys, node.values, strict=True):
                if isinstance(key, ast.Constant) and key.value == "choices" and isinstance(value, ast.List):
                    return tuple(str(item.value) for item in value.elts if isinstance(item, ast.Constant))
    return ()


def _field_arguments(default: ast.expr | None) -> dict[str, ast.expr]:
    """The arguments of `field(...)`; a plain default is its `default`."""
    if isinstance(default, ast.Call):
        return {keyword.arg: keyword.value for keyword in default.keywords if keyword.arg}
    return {"default": default} if default else {}


def _default_text(default: ast.expr | None) -> str:
    arguments = _field_arguments(default)
    return ast.unparse(arguments["default"]) if "default" in arguments else ""


def _help_text(default: ast.expr | None) -> str:
    metadata = _field_arguments(default).get("metadata")
    for key, value in zip(metadata.keys, metadata.values, strict=True) if isinstance(metadata, ast.Dict) else []:
        if isinstance(key, ast.Constant) and key.value == "help":
            return _one_line(str(value.value)) if isinstance(value, ast.Constant) else ""
    return ""


def _documented(docstring: str) -> dict[str, str]:
    """The first paragraph under each `name (type, ...):` of a docstring."""
    entries = re.findall(r"^ {4}(\w+) ?\(.*\):?\n((?: {8}.*\n?)+)", docstring, re.MULTILINE)
    return {name: _one_line(text) for name, text in entries}


def _one_line(text: str) -> str:
    return " ".join(text.split())
