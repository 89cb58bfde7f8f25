"""The tables of keys in the README say what the schema says."""

import pytest
from pydantic import BaseModel, Field

from llm.errors import ConfigError
from llm.training.config import DataPrepConfig, FinetuneConfig, MethodConfig
from llm.training.config_file.key_table import SCHEMAS, key_table, with_key_tables


class Small(BaseModel):
    name: str = Field(description="A | B.")
    count: int | None = Field(default=None, gt=0, description="How many.")
    paths: list[str] = Field(default_factory=list, description="Where.")
    is_on: bool = Field(default=True, description="Whether.")
    task: MethodConfig = Field(default=MethodConfig(method="DefaultPrompt"), description="What.")


def test_key_table_small_schema_gives_one_row_a_key() -> None:
    assert key_table(Small) == (
        "| key | type | default | meaning |\n"
        "|---|---|---|---|\n"
        "| `name` | text | required | A \\| B. |\n"
        "| `count` | integer or `null` | `null` | How many. |\n"
        "| `paths` | list of text | `[]` | Where. |\n"
        "| `is_on` | `true`, `false` | `true` | Whether. |\n"
        "| `task` | `method` and `kwargs` | `DefaultPrompt` | What. |\n"
    )


@pytest.mark.parametrize("schema", [DataPrepConfig, FinetuneConfig])
def test_key_table_both_scripts_have_every_key_with_its_meaning(schema: type[BaseModel]) -> None:
    rows = key_table(schema).splitlines()[2:]
    assert len(rows) == len(schema.model_fields) > 10
    for row, (name, field) in zip(rows, schema.model_fields.items(), strict=True):
        assert row.startswith(f"| `{name}` | ") and field.description and row.count(" | ") == 3


def test_with_key_tables_marked_text_is_replaced_and_stable() -> None:
    text = "# Keys\n<!-- keys: MethodConfig -->\nold\n<!-- end keys -->\nend\n"
    new = with_key_tables(text)
    assert new == text.replace("old\n", key_table(SCHEMAS["MethodConfig"]))
    assert with_key_tables(new) == new


def test_with_key_tables_unknown_schema_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"no such schema. Did you mean `FinetuneConfig`\?"):
        with_key_tables("<!-- keys: FinetunConfig -->\n<!-- end keys -->")
