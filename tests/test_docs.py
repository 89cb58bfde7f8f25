"""What the documents say is so: snippets load, tables are those of the schema, examples come out as shown."""

import ast
import re
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from llm.errors import EXIT_CODES
from llm.named_formats import SmolLM2Format
from llm.prompt import Message, Prompt
from llm.prompt_registry import PROMPT_FORMATS, PROMPTS
from llm.training.config import DataPrepConfig, FinetuneConfig
from llm.training.config_file import load_config
from llm.training.config_file.key_table import with_key_tables
from llm.training.prep.blocks import Padding, iterate_blocks
from llm.training.prep.pack import pack_examples
from llm.training.prep.token_view import legend

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "examples"))
import first_ten_minutes  # noqa: E402

README = (ROOT / "README.md").read_text(encoding="utf-8")
TRAINING_README = (ROOT / "llm/training/README.md").read_text(encoding="utf-8")


def code(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


@pytest.mark.parametrize("name", ["dataprep", "dataprep_eval", "finetune"])
def test_example_yaml_is_valid(name: str) -> None:
    schema = FinetuneConfig if name == "finetune" else DataPrepConfig
    assert load_config(str(ROOT / f"examples/quickstart/{name}.yaml"), schema).base_model


def test_every_yaml_of_the_repository_is_an_example() -> None:
    found = {path.relative_to(ROOT).as_posix() for path in ROOT.glob("*/**/*.yaml") if ".venv" not in path.parts}
    found = {name for name in found if not name.startswith((".", "output/"))}
    assert found == {f"examples/quickstart/{name}.yaml" for name in ("dataprep", "dataprep_eval", "finetune")}


def test_readme_configurations_are_valid(tmp_path: Path) -> None:
    snippets = [text for text in code(README, "yaml") if text.startswith("# ")]
    assert [text.splitlines()[0] for text in snippets] == ["# dataprep.yaml", "# finetune.yaml"]
    for text, schema in zip(snippets, (DataPrepConfig, FinetuneConfig), strict=True):
        (tmp_path / "config.yaml").write_text(text, encoding="utf-8")
        assert load_config(str(tmp_path / "config.yaml"), schema).base_model == "Qwen/Qwen2.5-0.5B-Instruct"


def test_key_tables_are_those_of_the_schema() -> None:
    assert with_key_tables(TRAINING_README) == TRAINING_README
    assert TRAINING_README.count("| `base_model` |") == 2


def test_readme_names_every_prompt_and_format() -> None:
    missing = [name for name in {**PROMPTS, **PROMPT_FORMATS} if f"`{name}`" not in README]
    assert missing == []


def test_exit_codes_of_the_readme_are_all_there_are() -> None:
    assert re.findall(r"^\| (\d+) \| (.+) \|$", README, re.MULTILINE) == [
        (str(n), text) for n, text in EXIT_CODES.items()
    ]


def test_recorded_mistakes_are_told_as_today(tmp_path: Path) -> None:
    recording = (ROOT / "docs/first_ten_minutes.md").read_text(encoding="utf-8")
    assert str(ROOT) not in recording and "/tmp" not in recording and "/home" not in recording
    steps = [step for step in first_ten_minutes.STEPS if "**" in step.say]
    assert (
        len(steps) == 3 and [step.type for step in first_ten_minutes.STEPS if f"$ {step.type}\n" not in recording] == []
    )
    first_ten_minutes.write_rows(tmp_path)
    (tmp_path / "dataprep.yaml").write_text(recording.split("$ cat dataprep.yaml\n")[1].split("\n```")[0])
    again = first_ten_minutes.run(steps[0], tmp_path)
    assert again.rsplit("\n\n", 1)[0] in recording  # all but the seconds


def test_packing_example_comes_out_as_printed() -> None:
    examples, blocks = (ast.literal_eval(text) for text in code(TRAINING_README, "python"))
    lengths = np.array([len(ids) for ids in examples])
    table = pa.table(
        {
            "row": pa.array(range(3), pa.int64()),
            "text": ["a", "b", "c"],
            "input_ids": pa.array(examples, pa.list_(pa.int32())),
            "trained": pa.array([[1, length] for length in lengths], pa.list_(pa.int32())),
        }
    )
    padding = Padding(length=9, token_id=0, ignore_index=-100)
    [batch] = iterate_blocks(table, pack_examples(lengths, chunksize=9), padding)
    assert batch.column("input_ids").to_pylist() == blocks
    assert batch.column("node_lengths").to_pylist() == [[4, 4], [6]]


def test_journey_of_the_readme_is_that_of_the_first_row() -> None:
    config = load_config(str(ROOT / "examples/quickstart/dataprep.yaml"), DataPrepConfig)
    row = ast.literal_eval((ROOT / "examples/quickstart/train.jsonl").read_text(encoding="utf-8").splitlines()[0])
    prompt_format = SmolLM2Format(stop="<|im_end|>")
    prompt, response = Prompt(**config.prompt_config.kwargs).segments(
        [Message(row["input"], row["response"], row["contexts"])], prompt_format
    )
    journey = README.split("<!-- journey -->")[1].split("<!-- end journey -->")[0]
    assert f"```\n{prompt.text}\n```" in journey and f"```\n{response.text}\n```" in journey


def test_inspected_row_of_the_readme_is_in_todays_form() -> None:
    lines = README.split("<!-- inspect -->\n```\n")[1].split("\n```")[0].splitlines()
    assert lines[0] == legend().plain and lines[1] == "Row 0: 140 tokens, 41 trained"
    shown = [line[11:].split("│") for line in lines[2:] if line[:8].strip() in ("", "prompt", "trained", "stop")]
    left_out = [int(cells[0].split()[1]) for cells in shown if "left out" in cells[0]]
    assert sum(len(cells) for cells in shown if "left out" not in cells[0] and cells != [""]) + sum(left_out) == 140


def test_readme_commands_name_files_that_exist() -> None:
    named = re.findall(r"(?:python|torchrun \S+ \S+) ((?:llm|examples)/\S+\.py)", README + TRAINING_README)
    assert len(named) >= 5 and [name for name in named if not (ROOT / name).is_file()] == []
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert [t for t in ("quickstart", "test", "check") if f"make {t}" not in README or f"\n{t}:" not in makefile] == []
