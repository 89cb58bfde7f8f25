"""A checked config as the YAML file that is saved beside its output and loads back to the same config.

Includes, `--set` and defaults are written out. A value that came from `${env:NAME}` is written as that text again: it
may be nobody else's business, and what is saved is copied to every output path.
"""

import io
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.nodes import ScalarNode
from ruamel.yaml.representer import SafeRepresenter

from llm.training.config import DataPrepConfig, FinetuneConfig, KeyPath
from llm.training.config_file.yaml_text import CoreResolver


class QuotedText(str):
    """`${env:NAME}` for a value that is text: in quotes it stays text, whatever the variable holds."""


class _Representer(SafeRepresenter):
    def represent_text(self, data: str) -> ScalarNode:
        # In quotes, too, what ruamel would write as it is and read back without it: a line separator at the end.
        is_quoted = isinstance(data, QuotedText) or not data.isprintable()
        return self.represent_scalar("tag:yaml.org,2002:str", str(data), style='"' if is_quoted else None)


_Representer.add_representer(str, _Representer.represent_text)
_Representer.add_representer(QuotedText, _Representer.represent_text)


def saved_data(config: DataPrepConfig | FinetuneConfig) -> dict[str, Any]:
    """`config` as plain data, with the text `${env:NAME}` where a value came from the environment."""
    data = config.model_dump(mode="json")
    for path, text in config.environment.items():
        holder: Any = data
        for part in path[:-1]:
            holder = holder[part]
        holder[path[-1]] = QuotedText(text) if isinstance(holder[path[-1]], str) else text
    return data


def saved_text(data: dict[str, Any], command: str) -> str:
    """`saved_data` as the text of a YAML file, of which `llm-train <command>` makes the same output."""
    yaml = YAML(typ="safe", pure=True)
    yaml.Resolver = CoreResolver  # text such as `012`, which would be read as a number, is put into quotes
    yaml.Representer = _Representer
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]  # it is annotated as None
    yaml.width = 100_000  # the line breaks of a text are its own
    stream = io.StringIO()
    yaml.dump(data, stream)
    return f"# All that made what lies beside it. Once more: llm-train {command} THIS_FILE\n{stream.getvalue()}"


def path_in_config(path: KeyPath, data: dict[str, Any]) -> KeyPath:
    """Where `data`, a config as plain data, has what a YAML file gives at `path`: a bare text is short for more.

    `source_config: rows.jsonl` is the `path` of its `kwargs`, `report_to: wandb` the one item of a list.
    """
    value: Any = data
    for part in path:
        value = value[part]
    if isinstance(value, list):
        return (*path, 0)
    return (*path, "kwargs", "path") if isinstance(value, dict) else path
