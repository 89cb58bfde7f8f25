"""What pydantic says of a config, in words for the person who wrote the YAML.

Step of `config_file.load_config`: takes plain data and a schema of `config.py`, gives the config or problems.
"""

import re
from collections.abc import Iterator
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from llm.errors import did_you_mean
from llm.training.config import DataPrepConfig, DatasetConfig, FinetuneConfig, KeyPath, MethodConfig
from llm.training.config_file import library_keys
from llm.training.config_file.problem import NO_REMOTE_CODE, Problem, describe, wrong_type

SchemaT = TypeVar("SchemaT", bound=BaseModel)

# Names that other tools use for keys of ours.
OTHER_NAMES = {
    "dataset": ("source_config", "train_dataset_config"),
    "max_length": ("chunksize",),
    "max_seq_length": ("chunksize",),
    "model": ("base_model",),
    "model_name_or_path": ("base_model",),
    "output_dir": ("local_output",),
    "peft_config": ("lora_config",),
}
_SCRIPTS: dict[type[BaseModel], str] = {DataPrepConfig: "dataprep", FinetuneConfig: "finetune"}
_EXPECTED = {
    "int_type": "an integer",
    "float_type": "a number",
    "bool_type": "`true` or `false`",
    "string_type": "text",
    "list_type": "a list",
    "dict_type": "a section of keys",
    "model_type": "a section of keys",
    "model_attributes_type": "a section of keys",
}
_LIMITS = {
    "greater_than": "greater than {gt}",
    "greater_than_equal": "at least {ge}",
    "less_than": "less than {lt}",
    "less_than_equal": "at most {le}",
}


def validate(data: dict[str, Any], schema: type[SchemaT]) -> tuple[SchemaT | None, list[Problem]]:
    """The config, or None and every problem that the schema finds in `data`."""
    try:
        return schema.model_validate(data), []
    except ValidationError as error:
        details = error.errors(include_url=False)
    by_path: dict[KeyPath, list[ErrorDetails]] = {}
    for detail in details:
        by_path.setdefault(_key_path(detail, data), []).append(detail)
    problems = [_problem(path, together, data, schema) for path, together in by_path.items()]
    misspelt = {name for problem in problems for name in re.findall(r"Did you mean `(\w+)`", problem.text)}
    return None, [problem for problem in problems if not _is_missing(problem, misspelt)]


def _is_missing(problem: Problem, names: set[str]) -> bool:
    """Whether it only says that a key is missing that stands there misspelt."""
    return problem.text.startswith(tuple(f"`{name}` is missing." for name in names))


def _key_path(detail: ErrorDetails, data: Any) -> KeyPath:
    """The error's path without the names that pydantic adds for the members of a union."""
    path: KeyPath = ()
    for part in detail["loc"]:
        children = dict(enumerate(data)) if isinstance(data, list) else data
        if isinstance(children, dict) and part in children:
            data = children[part]
        elif detail["type"] != "missing":
            break
        path = (*path, part)
    return path


def _problem(path: KeyPath, details: list[ErrorDetails], data: Any, schema: type[BaseModel]) -> Problem:
    """One problem for all that pydantic says of a key (one error for each member of a union)."""
    detail, key, model = details[0], _name(path), model_at(schema, path[:-1]) or schema
    kind, context, value = detail["type"], detail.get("ctx", {}), detail["input"]
    if kind == "value_error":
        text = str(context["error"])
        return Problem(path=_path_named_in(text, path, data), text=text[:1].upper() + text[1:] + ".")
    if kind == "extra_forbidden":
        text = _unknown_text(path, model)
    elif kind == "missing":
        text = f"`{key}` is missing. {model.model_fields[key].description or ''}".rstrip()
    elif kind == "literal_error":
        allowed = re.findall(r"'([^']*)'", context["expected"])
        text = f"`{key}` cannot be {describe(value)}. {did_you_mean(str(value), allowed)}"
    elif kind == "string_too_short":
        text = f"`{key}` must not be empty."
    elif kind in _LIMITS:
        text = f"`{key}` must be {_LIMITS[kind].format(**context)}, not {value}."
    else:
        text = _type_text(key, details, model_at(schema, path))
    return Problem(path=path, text=text)


def _type_text(key: str, details: list[ErrorDetails], model: type[BaseModel] | None) -> str:
    value, kinds = details[0]["input"], [detail["type"] for detail in details]
    if model is DatasetConfig:
        return wrong_type(key, "a path, or a section with `method` and `kwargs`", value)
    if isinstance(value, str) and model is MethodConfig:
        return f"`{key}` must be a section, not {describe(value)}. Write `{key}: {{method: {value}}}`."
    if any(kind not in _EXPECTED for kind in kinds):
        return f"`{key}`: {details[0]['msg']}."
    return wrong_type(key, " or ".join(dict.fromkeys(_EXPECTED[kind] for kind in kinds)), value)


def _unknown_text(path: KeyPath, model: type[BaseModel]) -> str:
    key = str(path[-1])
    where = f"`{path[-2]}`" if len(path) > 1 else _SCRIPTS.get(model, "This file")
    advice = _place_of_unknown(key, model) or did_you_mean(key, model.model_fields)
    return f"{where} has no key `{key}`. {advice}"


def _place_of_unknown(key: str, model: type[BaseModel]) -> str:
    """Where a key belongs that is right elsewhere; empty when it is known nowhere."""
    if key == "trust_remote_code":
        return NO_REMOTE_CODE
    if name := next((name for name in OTHER_NAMES.get(key, ()) if name in model.model_fields), None):
        return f"Here it is called `{name}`."
    if model is FinetuneConfig:
        for section in library_keys.SECTIONS:
            if key in library_keys.keys_of(section):
                return f"It belongs under `{section}:`."
    for other, name in _SCRIPTS.items():
        if key in other.model_fields and model in _SCRIPTS:
            return f"It is a key of {name}: write it into the other file, or delete it."
    if "kwargs" in model.model_fields:
        return f"Arguments of the method belong under `kwargs:`. {did_you_mean(key, model.model_fields)}"
    return ""


def _path_named_in(text: str, path: KeyPath, data: Any) -> KeyPath:
    """The path of the first key that a validator names in backticks, so that its line is shown."""
    for part in path:
        data = data[part]
    for name in re.findall(r"`(\w+)", text):
        if isinstance(data, dict) and name in data:
            return (*path, name)
    return path


def _name(path: KeyPath) -> str:
    """The key as a sentence names it: `contexts[0]` for an item of a list."""
    items: list[int] = []
    for part in reversed(path):
        if isinstance(part, str):
            return part + "".join(f"[{index}]" for index in reversed(items))
        items.append(part)
    return ""


def model_at(schema: type[BaseModel], path: KeyPath) -> type[BaseModel] | None:
    """The model of the section at `path`, or None where that is plain data."""
    model: type[BaseModel] | None = schema
    for part in path:
        if isinstance(part, int):  # an item of a list: the list's field has named the model
            continue
        field = model.model_fields.get(part) if model else None
        model = next(_models(field.annotation), None) if field else None
    return model


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    for one in (annotation, *get_args(annotation)):
        if isinstance(one, type) and issubclass(one, BaseModel):
            yield one
