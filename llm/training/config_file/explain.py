"""What a key of the YAML files means: type, default, meaning, and which file it belongs into.

Used by `llm-train explain`. Our own keys come from `config.py`, those of the library sections from the installed
libraries' sources; nothing heavy is imported.
"""

import json
import textwrap
from collections.abc import Iterator
from typing import Any

from llm.errors import ConfigError, did_you_mean
from llm.model_registry import LORA_DEFAULTS
from llm.training.config import FOUR_BIT_DEFAULTS, DataPrepConfig, FinetuneConfig, default_training_arguments
from llm.training.config_file.key_table import default_words, type_words
from llm.training.config_file.library_keys import SECTIONS, keys_for_yaml
from llm.training.config_file.library_rules import NEVER_IN_YAML, RENAMED, SET_ELSEWHERE
from llm.training.config_file.schema import OTHER_NAMES, model_at

_SCRIPTS: dict[str, type[DataPrepConfig] | type[FinetuneConfig]] = {
    "dataprep": DataPrepConfig,
    "finetune": FinetuneConfig,
}
_WIDTH = 100


def explain(key: str) -> str:
    """What `key` means in each file that has it; a key of a library section may be given without the section.

    ConfigError, with today's name or the nearest one, when no file has it.
    """
    texts = [*_our_keys(key), *_library_keys(key)]
    if not texts:
        raise ConfigError(f"No key `{key}`. {_advice(key)}")
    return "\n\n".join(texts)


def list_keys() -> str:
    """Every key: ours with type and default, those of the library sections by name."""
    parts = []
    for script, model in _SCRIPTS.items():
        rows = [
            (name, type_words(field.annotation), default_words(field).strip("`"))
            for name, field in model.model_fields.items()
        ]
        widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
        lines = [f"  {name:<{widths[0]}}  {kind:<{widths[1]}}  {default}" for name, kind, default in rows]
        parts.append("\n".join([f"{script}.yaml", *lines]))
    for section in SECTIONS:
        names = ", ".join(keys_for_yaml(section))
        parts.append(f"finetune.yaml, under {section}\n{_wrapped(names, indent=2)}")
    return "\n\n".join([*parts, "More of one: llm-train explain KEY, or SECTION.KEY"])


def known_keys() -> list[str]:
    """Every key as `explain` takes it, library keys with their section: what a shell completes."""
    ours = {name for model in _SCRIPTS.values() for name in model.model_fields}
    return sorted(ours) + [f"{section}.{name}" for section in SECTIONS for name in keys_for_yaml(section)]


def _our_keys(key: str) -> Iterator[str]:
    *sections, name = key.split(".")
    for script, schema in _SCRIPTS.items():
        model = model_at(schema, tuple(sections))
        if model is not None and name in model.model_fields:
            field = model.model_fields[name]
            rows = [("type", type_words(field.annotation)), ("default", default_words(field).strip("`"))]
            yield _text(key, script, [*rows, ("meaning", field.description or "")])


def _library_keys(key: str) -> Iterator[str]:
    section, _, name = key.rpartition(".")
    for known in [section] if section in SECTIONS else SECTIONS if not section else []:
        found = keys_for_yaml(known).get(name)
        if found is None:
            continue
        rows = [("type", found.words), ("default", _library_default(known, name, found.default))]
        of = f"{SECTIONS[known].class_name} of {SECTIONS[known].package}"
        yield _text(
            f"{known}.{name}", "finetune", [*rows, ("meaning", found.meaning), ("see", f"{of}: {SECTIONS[known].docs}")]
        )


def _library_default(section: str, name: str, default: str) -> str:
    ours: dict[str, Any] = {
        "training_arguments": default_training_arguments(),
        "lora_config": LORA_DEFAULTS,
        "quantization_config": FOUR_BIT_DEFAULTS,
    }[section]
    theirs = {"None": "null", "True": "true", "False": "false", "": "none"}.get(default, default)
    if name not in ours:
        return theirs
    when = {"quantization_config": " with `load_in_4bit`", "lora_config": " unless the model has its own"}
    value = {"learning_rate": "2e-4, or 2e-5 without LoRA", "gradient_checkpointing": "true on a GPU, else false"}
    return f"{value.get(name) or json.dumps(ours[name])}{when.get(section, '')} (the library's own: {theirs})"


def _text(key: str, script: str, rows: list[tuple[str, str]]) -> str:
    lines = [f"  {name:<8} {_wrapped(text, indent=11).lstrip()}" for name, text in rows if text]
    return "\n".join([f"{key}  (in {script}.yaml)", *lines])


def _wrapped(text: str, *, indent: int) -> str:
    margin = " " * indent
    return textwrap.fill(
        text, _WIDTH, initial_indent=margin, subsequent_indent=margin, break_on_hyphens=False, break_long_words=False
    )


def _advice(key: str) -> str:
    section, _, name = key.rpartition(".")
    for known in [section] if section in SECTIONS else SECTIONS:
        if advice := RENAMED[known].get(name) or SET_ELSEWHERE[known].get(name) or NEVER_IN_YAML.get(name):
            return advice
    if name in OTHER_NAMES:
        return f"Here it is called {' or '.join(f'`{other}`' for other in OTHER_NAMES[name])}."
    ours = {known for model in _SCRIPTS.values() for known in model.model_fields}
    theirs = {known for part in ([section] if section in SECTIONS else SECTIONS) for known in keys_for_yaml(part)}
    near = did_you_mean(name, theirs if section in SECTIONS else ours | theirs)
    return near if near.startswith("Did") else "`llm-train explain` lists all of them."
