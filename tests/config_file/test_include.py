"""`include`: files laid under one another key by key, and mistakes told at the file and line they stand in."""

from pathlib import Path

import pytest

from llm.errors import ConfigError
from llm.training.config import FinetuneConfig
from llm.training.config_file import load_config
from llm.training.config_file.include import MAX_DEPTH, MAX_FILES

BASE = """\
base_model: my-org/my-model
train_dataset_config: output/train
local_output: output/base
training_arguments:
  learning_rate: 1e-4
  max_steps: 10
lora_config: {r: 8, target_modules: [q_proj, v_proj]}
"""


def write(folder: Path, **files: str) -> str:
    """Files by name without ending (`sub/base` by `sub__base`); the path of `main`."""
    for name, text in files.items():
        path = folder / (name.replace("__", "/") + ".yaml")
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_text(text)
    return str(folder / "main.yaml")


def load(folder: Path, *overrides: str, **files: str) -> FinetuneConfig:
    return load_config(write(folder, **files), FinetuneConfig, overrides=overrides)


def refused(folder: Path, **files: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load(folder, **files)
    return str(caught.value).replace(f"{folder}/", "")


def test_including_file_wins_key_by_key_and_sections_are_joined(tmp_path: Path) -> None:
    main = (
        "include: base.yaml\nlocal_output: output/mine\ntraining_arguments: {max_steps: 20, seed: 3}\n"
        "lora_config: {target_modules: [k_proj]}\n"
    )
    config = load(tmp_path, base=BASE, main=main)
    assert (config.base_model, config.local_output) == ("my-org/my-model", "output/mine")
    assert config.training_arguments == {"learning_rate": 1e-4, "max_steps": 20, "seed": 3}
    assert config.lora_config == {"r": 8, "target_modules": ["k_proj"]}
    assert config.include == [] and "include" not in config.model_dump()


def test_null_and_a_path_replace_a_whole_section(tmp_path: Path) -> None:
    base = BASE.replace("output/train", "{method: load_dataset, kwargs: {path: x}}")
    config = load(tmp_path, base=base, main="include: base.yaml\nlora_config:\ntrain_dataset_config: output/other\n")
    assert config.lora_config is None and config.train_dataset_config.kwargs == {"path": "output/other"}


def test_later_files_win_and_paths_are_relative_to_the_file_that_names_them(tmp_path: Path) -> None:
    files = {
        "main": "include: [sub/one.yaml, sub/two.yaml]\n",
        "sub__one": "include: deep/base.yaml\nlocal_output: one\nlora_config: {r: 1}\n",
        "sub__two": "local_output: two\n",
        "sub__deep__base": BASE,
    }
    config = load(tmp_path, "lora_config.r=4", **files)
    assert config.local_output == "two" and config.lora_config == {"r": 4, "target_modules": ["q_proj", "v_proj"]}


def test_same_file_included_on_two_ways_is_fine(tmp_path: Path) -> None:
    files = {"main": "include: [one.yaml, two.yaml]\n", "one": "include: base.yaml\n", "two": "include: base.yaml\n"}
    assert load(tmp_path, base=BASE, **files).local_output == "output/base"


def test_environment_variable_in_the_path_is_put_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SITE", "base")
    assert load(tmp_path, base=BASE, main="include: ${env:SITE}.yaml\n").local_output == "output/base"


def test_problems_are_placed_at_their_own_file_and_line(tmp_path: Path) -> None:
    base = BASE + "training_argument: {}\n"
    message = refused(tmp_path, base=base.replace("1e-4", "'x'"), main="include: base.yaml\nlora_config: {r: 0}\nq: 1")
    assert message.startswith("main.yaml has 4 problems:\n\nmain.yaml:2:15  lora_config.r\n")
    places = [
        "main.yaml:3:1  q",
        "base.yaml:5:3  training_arguments.learning_rate",
        "base.yaml:8:1  training_argument\n",
    ]
    positions = [message.find(place) for place in places]
    assert -1 not in positions and positions == sorted(positions)
    assert "    learning_rate: 'x'\n" in message


def test_problems_of_what_is_replaced_are_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOT_SET", raising=False)
    base = BASE.replace("output/base", "${env:NOT_SET}").replace("1e-4", "${env:NOT_SET}")
    main = "include: base.yaml\nlocal_output: mine\n"
    message = refused(tmp_path, base=base, main=main)
    assert message.startswith("main.yaml has 2 problems:\n\nbase.yaml:5:3  training_arguments.learning_rate\n")
    assert load(tmp_path, "training_arguments.learning_rate=1", base=base, main=main).local_output == "mine"


def test_secret_in_an_included_file_is_refused_at_its_line(tmp_path: Path) -> None:
    message = refused(tmp_path, base=BASE + "hub_token: abcdef\n", main="include: base.yaml\n")
    assert "base.yaml:8:1  hub_token\n    hub_token: ***\n" in message


@pytest.mark.parametrize(
    ("main", "text"),
    [
        (
            "include: bas.yaml\n",
            "main.yaml:1:1  include\n    include: bas.yaml\n    There is no file `bas.yaml`. Did you",
        ),
        (
            "include:\n- base.yaml\n- no.yaml\n",
            "main.yaml:3:3  include\n    - no.yaml\n    There is no file `no.yaml`.",
        ),
        ("include: .\n", "There is no file `"),
        ("include: https://example.com/base.yaml\n", "a config is read from a local file only."),
        ("include: s3://bucket/base.yaml\n", "a config is read from a local file only."),
        ("include: main.yaml\n", "These files include one another: main.yaml -> main.yaml."),
        ("include: 3\n", "`include` must be a path or a list of paths, not the number 3."),
        ("include: [3, base.yaml]\n", "`include` must be a path or a list of paths, not the number 3."),
        ("include: {a: b}\n", "`include` must be a path or a list of paths, not a section."),
        ("include: broken.yaml\n", "broken.yaml:1:5\n    a: b: c\n    A second `: ` in one value"),
        ("include: empty.yaml\n", "empty.yaml: the file is empty."),
        ("include: list.yaml\n", "list.yaml:1:1\n    - a\n    A config file holds `key: value` lines"),
        ("include: circle.yaml\n", "circle.yaml:1:1  include\n    include: sub/../main.yaml\n    These files include"),
    ],
)
def test_include_that_cannot_be_is_one_clear_error(tmp_path: Path, main: str, text: str) -> None:
    files = {"base": BASE, "broken": "a: b: c\n", "empty": "", "list": "- a\n", "circle": "include: sub/../main.yaml\n"}
    assert text in refused(tmp_path, main=main, sub__x="", **files)


def test_include_too_deep_or_too_often_is_an_error(tmp_path: Path) -> None:
    files = {f"f{n}": f"include: f{n + 1}.yaml\n" for n in range(MAX_DEPTH)}
    assert load(tmp_path, main="include: f1.yaml\n", **files, **{f"f{MAX_DEPTH}": BASE}).lora_config
    message = refused(tmp_path, main="include: f0.yaml\n", **files, **{f"f{MAX_DEPTH}": BASE})
    assert f"f{MAX_DEPTH - 1}.yaml:1:1  include" in message and f"more than {MAX_DEPTH} deep" in message
    many = refused(tmp_path, main="include: [" + "base.yaml, " * MAX_FILES + "]\n", base=BASE)
    assert f"More than {MAX_FILES} files are included." in many


def test_include_on_the_command_line_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--set include=base.yaml: files are included before `--set` is read."):
        load(tmp_path, "include=base.yaml", main=BASE, base=BASE)
