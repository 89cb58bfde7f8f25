"""Config files: every kind of mistake is found, placed, told with its remedy, and all come together."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from llm.errors import ConfigError
from llm.training.config import DataPrepConfig, FinetuneConfig
from llm.training.config_file import load_config

DATAPREP = """\
source_config: rows.jsonl
base_model: my-org/my-model
dataset_writer_config:
  method: save_to_disk
  kwargs: {dataset_path: output/train}
"""
FINETUNE = """\
base_model: my-org/my-model
train_dataset_config: output/train
local_output: output/run
"""
Schema = type[DataPrepConfig] | type[FinetuneConfig]
Failing = Callable[..., str]


def write(folder: Path, text: str | bytes) -> str:
    path = folder / "config.yaml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return str(path)


def dataprep(folder: Path, text: str, *overrides: str) -> DataPrepConfig:
    return load_config(write(folder, DATAPREP + text), DataPrepConfig, overrides=overrides)


def finetune(folder: Path, text: str, *overrides: str) -> FinetuneConfig:
    return load_config(write(folder, FINETUNE + text), FinetuneConfig, overrides=overrides)


@pytest.fixture
def error(tmp_path: Path) -> Failing:
    """The message for a whole file (`text`, `schema`), with the folder of the file left out."""

    def message(text: str | bytes, schema: Schema = FinetuneConfig, *overrides: str) -> str:
        with pytest.raises(ConfigError) as caught:
            load_config(write(tmp_path, text), schema, overrides=overrides)  # type: ignore[type-var]
        return str(caught.value).replace(f"{tmp_path}/", "")

    return message


# --- what is right ----------------------------------------------------------------------------------------


def test_load_config_minimal_dataprep_gives_defaults(tmp_path: Path) -> None:
    config = dataprep(tmp_path, "")
    assert config.source_config.kwargs == {"path": "rows.jsonl"}
    assert config.chunksize == 2048


def test_load_config_minimal_finetune_gives_defaults(tmp_path: Path) -> None:
    config = finetune(tmp_path, "")
    assert config.train_dataset_config.kwargs == {"path": "output/train"}
    assert config.lora_config == {}


def test_load_config_core_schema_values_are_plain_python(tmp_path: Path) -> None:
    text = "prompt_config:\n  method: m\n  kwargs:\n"
    scalars = {
        "1e-4": 1e-4, "2e5": 2e5, ".5e3": 500.0, "012": 12, "0o17": 15, "0x1F": 31, "-.inf": float("-inf"),
        "no": "no", "on": "on", "yes": "yes", "12:30": "12:30", "1_000": "1_000", "2024-01-01": "2024-01-01",
        "'12'": "12", "!!str 12": "12", "~": None, "null": None, "true": True, "FALSE": False,
        "[1, {a: b}]": [1, {"a": "b"}],
    }  # fmt: skip
    text += "".join(f"    k{index}: {scalar}\n" for index, scalar in enumerate(scalars))
    kwargs = dataprep(tmp_path, text).prompt_config.kwargs
    values = list(kwargs.values())
    assert values == list(scalars.values())
    assert [type(value) for value in values] == [type(value) for value in scalars.values()]
    assert type(kwargs) is dict and type(next(iter(kwargs))) is str


def test_load_config_yaml_1_1_directive_still_reads_1_2(tmp_path: Path) -> None:
    text = "%YAML 1.1\n---\n" + FINETUNE + "training_arguments: {save_strategy: no}\n"
    config = load_config(write(tmp_path, text), FinetuneConfig)
    assert config.training_arguments == {"save_strategy": "no"}


def test_load_config_alias_used_gives_its_value(tmp_path: Path) -> None:
    config = finetune(tmp_path, "eval_dataset_config: &e output/eval\nadditional_output_paths: [*e, *e]\n")
    assert config.additional_output_paths == ["output/eval", "output/eval"]


def test_load_config_empty_optional_section_is_none(tmp_path: Path) -> None:
    assert finetune(tmp_path, "quantization_config:\n").quantization_config is None


def test_environment_variable_set_is_put_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STEPS", "10")
    text = 'additional_output_paths: ["s3://b/${env:STEPS}", "${env:STEPS}"]\n'
    config = finetune(tmp_path, text + "training_arguments: {max_steps: '7', seed: 1}\n".replace("'7'", "7"))
    assert config.additional_output_paths == ["s3://b/10", "10"]


def test_environment_variable_unquoted_is_read_as_if_written_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STEPS", "10")
    assert finetune(tmp_path, "training_arguments:\n  max_steps: ${env:STEPS}\n").training_arguments == {
        "max_steps": 10
    }


def test_environment_variable_unset_is_an_error(error: Failing, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOT_SET", raising=False)
    message = error(FINETUNE + "additional_output_paths:\n- s3://${env:NOT_SET}/x\n")
    assert "config.yaml:5:3  additional_output_paths[0]\n    - s3://${env:NOT_SET}/x" in message
    assert "environment variable `NOT_SET` is not set" in message


# --- overrides --------------------------------------------------------------------------------------------


def test_override_new_and_known_keys_win_over_file(tmp_path: Path) -> None:
    text = "training_arguments: {learning_rate: oops}\n"
    overrides = ("training_arguments.learning_rate=1e-4", "lora_config.r=8", "report_to=[none]")
    config = finetune(tmp_path, text, *overrides)
    assert config.training_arguments == {"learning_rate": 1e-4}
    assert config.lora_config == {"r": 8}
    assert config.report_to == ["none"]


def test_override_unknown_key_is_placed_at_the_command_line(error: Failing) -> None:
    message = error(FINETUNE, FinetuneConfig, "training_arguments.max_stps=10")
    assert "--set  training_arguments.max_stps\n    training_arguments.max_stps=10\n" in message
    assert "Did you mean `max_steps`?" in message


@pytest.mark.parametrize(
    ("override", "text"),
    [
        ("max_steps", "write `--set key=value`"),
        ("a..b=1", "write `--set key=value`"),
        ("base_model.x=1", "`base_model` holds no keys in config.yaml:1:1. Set `base_model` itself."),
        ("local_output=a: b: c", "--set local_output:1:5"),
    ],
)
def test_override_malformed_is_an_error(error: Failing, override: str, text: str) -> None:
    assert text in error(FINETUNE, FinetuneConfig, override)


# --- files that cannot be read ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("", "config.yaml: the file is empty."),
        ("# nothing\n", "config.yaml: the file is empty."),
        ("# c\n- a\n", "config.yaml:2:1\n    - a\n    A config file holds `key: value` lines, not the list"),
        ("hello\n", 'holds `key: value` lines, not the text "hello"'),
        ("a:\n\tb: 1\n", "config.yaml:2:1\n    b: 1\n    A tab cannot indent YAML. Use spaces."),
        (b"a: 1\nb: caf\xe9\n", "config.yaml:2:7\n    b: caf\n    Byte 0xe9 is not UTF-8."),
        ("a: b\x07\n", "config.yaml:1:5\n    a: b?\n    The control character U+0007"),
        ("a: b: c\n", "config.yaml:1:5\n    a: b: c\n    A second `: ` in one value"),
        ("a: [1\nb: 2\n", "config.yaml:2:2\n    b: 2\n    The `[` of line 1 is not closed"),
        ("a: {b: ${env:X}, c: 1}\n", "config.yaml:1:9\n    a: {b: ${env:X}, c: 1}\n    Inside `{ }` the braces of"),
        ("a: {b: 1\n", "The `{` of line 1 is not closed"),
        ('a: "x\n', "The quote of line 1 is not closed"),
        ("a: 1\n---\nb: 1\n", "config.yaml:2:1\n    ---\n    A second document"),
        ('a: "\\UFFFFFFFF"\n', "a `\\U` escape names no character"),
        ("a: *b\n", "config.yaml:1:4\n    a: *b\n    This is not YAML: found undefined alias 'b'."),
        ("a: " + "[" * 40 + "]" * 40, "nested too deeply: at most 32 levels"),
        ("&a a: &b [*b]\n", "more than 100,000 values"),
        ("a: " + "x" * 1_000_001, "larger than 1,000,000 bytes"),
    ],
)
def test_read_yaml_unreadable_file_is_one_clear_error(error: Failing, content: str | bytes, text: str) -> None:
    assert text in error(content)


def test_read_yaml_exploding_aliases_are_an_error(error: Failing) -> None:
    lines = ["a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 9)]
    assert "an alias `*name` counts each time" in error("\n".join(lines))


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("no_such.yaml", "no_such.yaml: cannot read this file: no such file or directory."),
        (".", "cannot read this file: is a directory."),
        ("https://example.com/c.yaml", "a config is read from a local file only"),
        ("s3://bucket/c.yaml", "a config is read from a local file only"),
    ],
)
def test_load_config_path_not_a_local_file_is_an_error(path: str, text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(path, FinetuneConfig)
    assert text in str(caught.value)


# --- mistakes in a readable file --------------------------------------------------------------------------


def test_duplicate_key_names_both_lines(error: Failing) -> None:
    message = error(FINETUNE + "lora_config:\n  r: 8\n  r: 16\n")
    assert "config.yaml:6:3  lora_config.r\n    r: 16\n" in message
    assert "`r` is given twice, here and in line 5. Keep one." in message


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("1: a", "A key must be text."),
        ("? [a]\n: b", "A key must be text."),
        ("<<: {a: 1}", "YAML 1.2 has no merge key `<<`."),
        (
            "seed: !!python/object/apply:os.system [x]",
            "The tag `!!python/object/apply:os.system` is not read",
        ),
        ("seed: !mine 3", "The tag `!mine` is not read"),
        ("seed: !!int x", "`x` cannot be read as `!!int`."),
        ("chunksiz: 1", "dataprep has no key `chunksiz`. Did you mean `chunksize`?"),
        ("max_seq_length: 1", "Here it is called `chunksize`."),
        ("local_output: x", "It is a key of finetune: write it into the other file"),
        ("zzz: 1", "Allowed: allow_code, allow_special_tokens_in_data, base_model"),
        (
            'chunksize: "2048"',
            '`chunksize` must be an integer, not the text "2048". Write 2048 without quotes.',
        ),
        ("chunksize: 1e3", "must be an integer, not the number 1000.0. Write 1000."),
        ("chunksize: true", "must be an integer, not `true`."),
        ("chunksize:", "must be an integer, not `null` (an empty value). Fill it in, or delete the key."),
        ("chunksize: 0", "`chunksize` must be greater than 0, not 0."),
        ("pack: yes", "Write `true`: in YAML 1.2 `yes` is text."),
        ("pack: 'false'", "Write false without quotes."),
        ("on_too_long: dropp", '`on_too_long` cannot be the text "dropp". Did you mean `drop`?'),
        ("prompt_config: ZeroShotQA", "Write `prompt_config: {method: ZeroShotQA}`."),
        ("prompt_config: {method: x, text: y}", "Arguments of the method belong under `kwargs:`."),
        ("prompt_config: {method: 3}", "`method` must be text, not the number 3."),
        ("prompt_config: {kwargs: {}}", "`method` is missing. A registered name, or `path.to.module::name` of"),
        ("prompt_config: {method: m, kwargs: }", "`kwargs` must be a section of keys, not `null`"),
    ],
)
def test_load_config_dataprep_mistake_is_told_with_its_remedy(error: Failing, line: str, text: str) -> None:
    message = error(DATAPREP + line + "\n", DataPrepConfig)
    assert text in message
    assert message.startswith("config.yaml has 1 problem:\n\nconfig.yaml:6:")


@pytest.mark.parametrize(
    ("line", "text"),
    [
        (
            "learning_rate: 1e-4",
            "finetune has no key `learning_rate`. It belongs under `training_arguments:`.",
        ),
        ("chunksize: 10", "It is a key of dataprep"),
        ("eval_dataset_config: [a]", "must be a path, or a section with `method` and `kwargs`, not the list"),
        ("additional_output_paths: s3://b/x", 'must be a list, not the text "s3://b/x". Write `[s3://b/x]`.'),
        ("additional_output_paths: [3]", "`additional_output_paths[0]` must be text, not the number 3."),
        ("resume_from_checkpoint: 3", "must be `true`, `false` or text, not the number 3."),
        ("torch_dtype: bf17", "Allowed: auto, bfloat16, float16, float32."),
        ("lora_config: 8", "`lora_config` must be a section of keys, not the number 8."),
        ("training_arguments: {output_dir: x}", "`output_dir` is set by the key `local_output`."),
        (
            "load_in_4bit: true\nload_in_8bit: true",
            "`load_in_8bit` exclude each other: keep one.",
        ),
        ("load_in_4bit: true\nlora_config:", "A quantized base cannot be trained in full"),
        ("load_in_4bit: true\nquantization_config: {load_in_8bit: true}", "here and one level up. Keep one."),
        ("quantization_config: {bnb_4bit_quant_type: nf4}", "Add `load_in_4bit: true`."),
        ("training_arguments: {eval_strategy: steps}", "`eval_strategy` needs blocks to evaluate."),
        ("training_arguments: {eval_on_start: true}", "`eval_on_start` needs blocks to evaluate."),
        (
            "training_arguments: {load_best_model_at_end: true, eval_steps: 7}\neval_dataset_config: e",
            "needs `save_steps` (30) to be a multiple of `eval_steps` (7).",
        ),
        (
            "eval_dataset_config: e\ntraining_arguments: {load_best_model_at_end: true, save_strategy: no}",
            "needs the same `save_strategy` and `eval_strategy`, not `no` and `steps`.",
        ),
        ("training_arguments: {learning_rat: 1}", "Did you mean `learning_rate`?"),
        ("lora_config: {r: '8'}", '`r` must be an integer, not the text "8". Write 8 without quotes.'),
    ],
)
def test_load_config_finetune_mistake_is_told_with_its_remedy(error: Failing, line: str, text: str) -> None:
    message = error(FINETUNE + line + "\n")
    assert text in message
    assert message.startswith("config.yaml has 1 problem:\n\nconfig.yaml:")


def test_load_config_eval_strategy_no_without_eval_set_is_fine(tmp_path: Path) -> None:
    assert finetune(tmp_path, "training_arguments: {eval_strategy: no}\n").eval_dataset_config is None


def test_load_config_missing_keys_show_the_file_alone(error: Failing) -> None:
    message = error("local_output: x\n")
    assert "config.yaml  base_model\n    `base_model` is missing. Hub id or folder" in message
    assert "config.yaml  train_dataset_config\n    `train_dataset_config` is missing." in message


def test_load_config_misspelt_required_key_is_one_problem(error: Failing) -> None:
    message = error(FINETUNE.replace("base_model", "base_modl"))
    assert message.startswith("config.yaml has 1 problem:")
    assert "Did you mean `base_model`?" in message


def test_load_config_several_problems_come_in_one_message_by_line(error: Failing) -> None:
    message = error(
        FINETUNE
        + "load_in_4bit: 'true'\n"
        + "training_arguments:\n  evaluation_strategy: steps\n  learning_rate: '1e-4'\n  learning_rate: 2\n"
        + "quantization_config: {quant_type: nf4, load_in_4bit: true}\n"
        + "zzz: 1\n"
    )
    assert message.startswith("config.yaml has 6 problems:\n\n")
    places = [
        "4:1  load_in",
        "6:3  training",
        "7:3  training",
        "8:3  training",
        "9:23  quantization",
        "10:1  zzz",
    ]
    positions = [message.find(f"config.yaml:{place}") for place in places]
    assert -1 not in positions and positions == sorted(positions)


# --- secrets ----------------------------------------------------------------------------------------------

TOKEN = "hf_" + "aB3" * 11


@pytest.mark.parametrize(
    ("line", "secret", "text"),
    [
        (f"training_arguments: {{hub_token: {TOKEN}}}", TOKEN, "environment variable HF_TOKEN"),
        (f"train_dataset_config: {{kwargs: {{x: [{TOKEN}]}}}}", TOKEN, "environment variable HF_TOKEN"),
        ("wandb_api_key: 0123456789", "0123456789", "environment variable WANDB_API_KEY"),
        ("s: {password: hunter2}", "hunter2", "`password` is a secret"),
        ("s: {password: 12345}", "12345", "`password` is a secret"),
        ("s: AKIAABCDEFGHIJKLMNOP", "AKIAABCDEFGHIJKLMNOP", "AWS_ACCESS_KEY_ID"),
        ("s: sk-abcdefghijklmnopqrstuvwx", "sk-abc", "looks like a secret"),
        ("s: s3://user:hunter2@bucket/x", "hunter2", "looks like a secret"),
    ],
)
def test_secret_in_file_is_refused_and_never_shown(error: Failing, line: str, secret: str, text: str) -> None:
    message = error(FINETUNE.replace("train_dataset_config: output/train\n", "") + line + "\n")
    assert text in message
    assert secret not in message and "***" in message


def test_secret_on_the_command_line_is_refused_and_never_shown(error: Failing) -> None:
    for override in (f"training_arguments.hub_token={TOKEN}", f"base_model.hub_token={TOKEN}"):
        assert TOKEN not in error(FINETUNE, FinetuneConfig, override)


def test_secret_in_a_line_that_is_not_yaml_is_never_shown(error: Failing) -> None:
    assert "hunter2" not in error("password: hunter2: x\n")


def test_secret_lookalikes_are_allowed(tmp_path: Path) -> None:
    kwargs = "{pad_token: </s>, max_new_tokens: 9, token: true, path: hf_models/x}"
    assert (
        dataprep(tmp_path, f"prompt_config:\n  method: m\n  kwargs: {kwargs}\n").prompt_config.kwargs["pad_token"]
        == "</s>"
    )


# --- speed ------------------------------------------------------------------------------------------------


def test_load_config_bad_file_imports_nothing_heavy(tmp_path: Path) -> None:
    path = write(tmp_path, FINETUNE + "lora_config: {r: 0}\ntraining_arguments: {bf16: 1}\n")
    code = f"""
import sys
import llm.errors, llm.training.config, llm.training.config_file.library_keys, llm.training.config_file as config_file
try:
    config_file.load_config({path!r}, llm.training.config.FinetuneConfig)
except llm.errors.ConfigError:
    print([name for name in ("torch", "transformers", "datasets", "peft") if name in sys.modules])
"""
    run = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[1],
    )
    assert run.stdout == "[]\n"
