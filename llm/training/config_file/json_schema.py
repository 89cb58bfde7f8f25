"""The JSON Schema of each YAML file, by which an editor completes keys, shows their meaning and marks mistakes.

Made from the schemas of `config.py`, the registries, and the keys of the installed libraries. Run this file as a module
to write `schemas/` anew. Those in the repository are of the library versions in `constraints.txt`; `llm-train schema`
prints that of the installed ones.
"""

import ast
import json
import operator
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from llm.errors import ConfigError, did_you_mean
from llm.training.config import DTYPES, DataPrepConfig, FinetuneConfig
from llm.training.config_file.library_keys import SECTIONS, LibraryKey, keys_for_yaml
from llm.training.config_file.library_rules import LIMITS

SCRIPTS: dict[str, type[DataPrepConfig] | type[FinetuneConfig]] = {
    "dataprep": DataPrepConfig,
    "finetune": FinetuneConfig,
}
FOLDER = Path(__file__).parents[3] / "schemas"
Json = dict[str, Any]

_ENVIRONMENT: Json = {"type": "string", "pattern": r"\$\{env:[^}]*\}"}
_ONE_SOURCE: Json = {"oneOf": [{"required": ["source_config"]}, {"required": ["sources"]}]}
_OR_A_TEXT = ("report_to", "allow_code", "include")  # a text is short for a list of one
_WITHOUT_TEXT = {"integer", "number", "boolean"}
_TYPES = {
    "bool": "boolean",
    "int": "integer",
    "float": "number",
    "str": "string",
    "dict": "object",
    "Literal": "string",
    "list": "array",
    "tuple": "array",
    "None": "null",
}
_LIMIT_WORDS = {
    operator.ge: "minimum",
    operator.gt: "exclusiveMinimum",
    operator.le: "maximum",
    operator.lt: "exclusiveMaximum",
}


def json_schema(script: str) -> Json:
    """The JSON Schema of the YAML file of `script`; ConfigError when there is no such script."""
    if script not in SCRIPTS:
        raise ConfigError(f"There is no schema `{script}`. {did_you_mean(script, SCRIPTS)}")
    model = SCRIPTS[script]
    made = _without_titles(model.model_json_schema())
    properties = {key: _with_environment(key, value) for key, value in made["properties"].items()}
    properties |= _methods(properties) | _library_sections(properties)
    if "sources" in properties:
        properties["sources"] = _sources(properties, made["$defs"]["SourceConfig"])
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$comment": _comment(script),
        "title": f"{script}.yaml of llm-train",
        "description": (model.__doc__ or "").strip().splitlines()[0],
        "type": "object",
        "properties": properties,
        "additionalProperties": False,
        # What an included file gives, this one need not.
        "if": {"not": {"required": ["include"]}},
        "then": {"required": made["required"], **(_ONE_SOURCE if "sources" in properties else {})},
    }


def schema_text(script: str) -> str:
    """`json_schema` as it lies in `schemas/`."""
    return json.dumps(json_schema(script), indent=1, ensure_ascii=False) + "\n"


def _comment(script: str) -> str:
    packages = sorted({section.package for section in SECTIONS.values()})
    versions = ", ".join(f"{package} {version(package)}" for package in packages)
    return f"Made by `llm-train schema {script}`" + (f" with {versions}." if script == "finetune" else ".")


def _without_titles(value: Any) -> Any:
    """pydantic titles each key with its name in other letters."""
    if isinstance(value, dict):
        return {
            key: _without_titles(item) for key, item in value.items() if key != "title" or not isinstance(item, str)
        }
    return [_without_titles(item) for item in value] if isinstance(value, list) else value


def _with_environment(key: str, schema: Json) -> Json:
    """`schema`, which also takes what the loader turns into it: `${env:NAME}`, another name of a dtype, a lone text."""
    kinds = {one.get("type") for one in schema.get("anyOf", [schema])}
    if key == "torch_dtype":
        return schema | {"enum": list(DTYPES)}
    extra: list[Json] = [{"type": "string"}] if key in _OR_A_TEXT else []
    if kinds & _WITHOUT_TEXT and "string" not in kinds:
        extra = [_ENVIRONMENT]
    return _with_alternatives(schema, extra)


def _outer(schema: Json) -> Json:
    """What stays beside the alternatives of a key."""
    return {key: schema[key] for key in ("default", "description") if key in schema}


def _with_alternatives(schema: Json, extra: list[Json]) -> Json:
    if not extra:
        return schema
    outer = _outer(schema)
    inner = {key: value for key, value in schema.items() if key not in outer}
    return {"anyOf": [*inner.get("anyOf", [inner]), *extra], **outer}


# --- the sections with `method` and `kwargs` --------------------------------------------------------------


def _methods(properties: Mapping[str, Json]) -> Json:
    """Each section with a method, with the names of its registry."""
    from llm.prompt_registry import PROMPT_FORMATS, PROMPTS  # heavy: they import the libraries of the texts
    from llm.training.prep.dataset import DATASET_METHODS
    from llm.training.prep.write import DATASET_WRITERS
    from llm.training.tune.tracking import TRACKERS

    names: dict[str, Mapping[str, Any]] = {
        "source_config": DATASET_METHODS,
        "train_dataset_config": DATASET_METHODS,
        "eval_dataset_config": DATASET_METHODS,
        "prompt_config": PROMPTS,
        "prompt_format_config": PROMPT_FORMATS,
        "dataset_writer_config": DATASET_WRITERS,
        "experiment_tracking_config": TRACKERS,
    }
    return {key: _method(schema, key, names[key]) for key, schema in properties.items() if key in names}


def _sources(properties: Mapping[str, Json], item: Json) -> Json:
    """The list of sources, each with the keys that a single one has beside it."""
    inner = {name: properties.get(name, schema) for name, schema in item["properties"].items()}
    rows = properties["source_config"]  # may be absent outside, not here
    required = [one for one in rows["anyOf"] if one != {"type": "null"}]
    inner["source_config"] = {"anyOf": required, "description": rows["description"]}
    section = {"type": "object", "properties": inner, "additionalProperties": False, "required": item["required"]}
    return {"type": "array", "items": section, **_outer(properties["sources"])}


def _method(schema: Json, key: str, names: Mapping[str, Any]) -> Json:
    is_dataset = key.endswith(("source_config", "dataset_config"))
    known: Json = {"enum": sorted(names)}
    method = known if key == "experiment_tracking_config" else {"anyOf": [known, {"type": "string", "pattern": "::"}]}
    section: Json = {
        "type": "object",
        "properties": {
            "method": {**method, "description": "A registered name, or `module::name` of a package in `allow_code`."},
            "kwargs": {"type": "object", "description": "Arguments of the method."},
        },
        "additionalProperties": False,
    }
    if not is_dataset:
        section["required"] = ["method"]
    alternatives: list[Json] = [{"type": "string", "description": "A path."}] if is_dataset else []
    if {"type": "null"} in schema.get("anyOf", []):
        alternatives.append({"type": "null"})
    outer = _outer(schema)
    return {"anyOf": [section, *alternatives], **outer} if alternatives else {**section, **outer}


# --- the sections of the libraries ------------------------------------------------------------------------


def _library_sections(properties: Mapping[str, Json]) -> Json:
    return {key: _library_section(key, schema) for key, schema in properties.items() if key in SECTIONS}


def _library_section(section: str, schema: Json) -> Json:
    inner = {
        "type": "object",
        "properties": {name: _library_key(name, key) for name, key in keys_for_yaml(section).items()},
        "additionalProperties": False,
    }
    outer = _outer(schema)
    return {"anyOf": [inner, {"type": "null"}], **outer} if "anyOf" in schema else {**inner, **outer}


def _library_key(name: str, key: LibraryKey) -> Json:
    description: Json = {"description": key.meaning} if key.meaning else {}
    kinds = [_TYPES.get(_name(one), "") for one in key.types]
    if "" in kinds:
        return description  # a type that YAML does not know: anything
    values = [value for one in key.types if _name(one) == "Literal" for value in _literals(one)]
    values = list(dict.fromkeys([*key.choices, *values]))
    others = [kind for kind in dict.fromkeys(kinds) if not (kind == "string" and key.choices)]
    alternatives: list[Json] = [{"type": kind, **_limits(name, kind)} for kind in others]
    alternatives = ([{"enum": values}] if values else []) + alternatives
    if "string" not in others:
        alternatives.append(_ENVIRONMENT)
    return ({"anyOf": alternatives} if len(alternatives) > 1 else alternatives[0]) | description


def _limits(name: str, kind: str) -> Json:
    limits = LIMITS.get(name, ()) if kind in ("integer", "number") else ()
    return {_LIMIT_WORDS[holds]: limit for holds, _, limit in limits if limit != float("inf")}


def _name(annotation: ast.expr) -> str:
    return ast.unparse(annotation.value if isinstance(annotation, ast.Subscript) else annotation)


def _literals(literal: ast.expr) -> list[Any]:
    return [node.value for node in ast.walk(literal) if isinstance(node, ast.Constant)]


def write_schemas() -> None:
    """Writes `schemas/` anew."""
    FOLDER.mkdir(exist_ok=True)
    for script in SCRIPTS:
        (FOLDER / f"{script}.schema.json").write_text(schema_text(script), encoding="utf-8")


if __name__ == "__main__":
    write_schemas()
