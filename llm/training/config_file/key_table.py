"""The tables of keys in `llm/training/README.md`, made from the schemas of `config.py`.

`python -m llm.training.config_file.key_table` writes each anew, between `<!-- keys: DataPrepConfig -->` and
`<!-- end keys -->`.
"""

import json
import re
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from llm.errors import ConfigError, did_you_mean
from llm.training.config import DataPrepConfig, DatasetConfig, FinetuneConfig, MethodConfig, SourceConfig

README = Path(__file__).parents[1] / "README.md"
SCHEMAS: dict[str, type[BaseModel]] = {
    schema.__name__: schema for schema in (DataPrepConfig, FinetuneConfig, DatasetConfig, MethodConfig, SourceConfig)
}
_MARKED = re.compile(r"(<!-- keys: (\w+) -->\n).*?(<!-- end keys -->)", re.DOTALL)
_TYPES = {
    str: "text",
    int: "integer",
    float: "number",
    bool: "`true`, `false`",
    dict: "section",
    NoneType: "`null`",
    DatasetConfig: "path, or `method` and `kwargs`",
    MethodConfig: "`method` and `kwargs`",
    SourceConfig: "sections",
}


def key_table(schema: type[BaseModel]) -> str:
    """A Markdown table of the schema's keys: key, type, default, meaning."""
    rows = [
        " | ".join([f"| `{name}`", type_words(field.annotation), default_words(field), _meaning(field) + " |"])
        for name, field in schema.model_fields.items()
    ]
    return "\n".join(["| key | type | default | meaning |", "|---|---|---|---|", *rows]) + "\n"


def with_key_tables(text: str) -> str:
    """`text` with each marked table made anew; ConfigError for a marker that names no schema."""
    return _MARKED.sub(_marked_table, text)


def _marked_table(match: re.Match[str]) -> str:
    start, name, end = match.groups()
    if name not in SCHEMAS:
        raise ConfigError(f"<!-- keys: {name} -->: there is no such schema. {did_you_mean(name, SCHEMAS)}")
    return start + key_table(SCHEMAS[name]) + end


def type_words(annotation: Any) -> str:
    """The type of a key as a table names it: `list of text`."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return type_words(arguments[0])
    if origin is Literal:
        return ", ".join(f"`{choice}`" for choice in arguments)
    if origin is list:
        return f"list of {type_words(arguments[0])}"
    if origin in (Union, UnionType):
        return " or ".join(type_words(one) for one in arguments)
    return _TYPES[origin or annotation]


def default_words(field: FieldInfo) -> str:
    """The default of a key as YAML, or `required`."""
    if field.is_required():
        return "required"
    default = field.get_default(call_default_factory=True)
    if isinstance(default, MethodConfig | DatasetConfig):
        default = default.method
    return f"`{json.dumps(default).strip(chr(34))}`"  # JSON is YAML: `null`, `true`, `[]`


def _meaning(field: FieldInfo) -> str:
    return (field.description or "").replace("|", "\\|").replace("\n", " ")


if __name__ == "__main__":
    README.write_text(with_key_tables(README.read_text(encoding="utf-8")), encoding="utf-8")
