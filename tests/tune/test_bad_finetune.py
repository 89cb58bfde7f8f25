"""The 40 bad inputs of `finetune`: each with its exit code, one message, and nothing at the final path.

Exit code 0 is for what is no mistake, or is warned of. `tests/bad_inputs.py` writes the table.
"""

import logging
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from bad_inputs import Case, check_told, files_in, run_case, tell
from datasets import Dataset, load_from_disk
from test_finetune import prepare_blocks, save_base_model
from tiny_models import make_model
from transformers import TrainingArguments

from llm.errors import DataError
from llm.training.config import FOUR_BIT_DEFAULTS, FinetuneConfig
from llm.training.tune.adapter import add_adapter
from llm.training.tune.trainer import BlockTrainer


def arguments(**given: Any) -> dict[str, Any]:
    usual = {"max_steps": 1, "save_steps": 1, "logging_steps": 1, "per_device_train_batch_size": 2}
    return {"training_arguments": {**usual, **given}}


def yaml(text: str) -> str:
    """A right file, in block style, and `text`."""
    return f"base_model: FOLDER/base\ntrain_dataset_config: FOLDER/blocks\nlocal_output: FOLDER/out\n{text}\n"


def changed_blocks(change: Callable[[dict[str, Any]], dict[str, Any]]) -> Callable[[Path], None]:
    """The blocks with other columns, beside the manifest of the old ones."""

    def prepare(folder: Path) -> None:
        blocks = Dataset.from_list([change(block) for block in load_from_disk(str(folder / "blocks")).to_list()])
        _replace_blocks(folder, blocks)

    return prepare


def _replace_blocks(folder: Path, blocks: Dataset) -> None:
    manifest = (folder / "blocks" / "manifest.json").read_text()
    blocks.save_to_disk(folder / "changed")
    (folder / "changed" / "manifest.json").write_text(manifest)


def no_blocks(folder: Path) -> None:
    _replace_blocks(folder, load_from_disk(str(folder / "blocks")).select([]))


def damaged_model(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    """A copy of the base model in which one file is another."""

    def prepare(folder: Path) -> None:
        shutil.copytree(folder / "base", folder / "damaged")
        file = folder / "damaged" / name
        file.write_bytes(change(file.read_bytes()))

    return prepare


def other_tokenizer(folder: Path) -> None:
    path = folder / "blocks" / "manifest.json"
    path.write_text(path.read_text().replace('"tokenizer_fingerprint": "', '"tokenizer_fingerprint": "x'))


def short_model(folder: Path) -> None:
    save_base_model(folder / "short", "llama", max_position_embeddings=16)


def leaking_model(folder: Path) -> None:
    save_base_model(folder / "leaking", "bloom")


def file_in_the_way(folder: Path) -> None:
    (folder / "file").write_text("")


LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
CHANGED = {"train_dataset_config": "FOLDER/changed"}
MUST_1 = "must be at least 1, not 0."
CASES = [
    Case(
        number=1,
        what="learning_rate: 1e-4",
        exit_code=0,
        text=yaml("training_arguments:\n  learning_rate: 1e-4"),
        told=[],
    ),
    Case(
        number=2,
        what='gradient_checkpointing: "false"',
        text=yaml('training_arguments:\n  gradient_checkpointing: "false"'),
        told=[
            "finetune.yaml:5:3  training_arguments.gradient_checkpointing",
            "must be `true` or `false`",
            "without quotes",
        ],
    ),
    Case(
        number=3,
        what="load_in_4bit: no",
        text=yaml("load_in_4bit: no"),
        told=["finetune.yaml:4:1  load_in_4bit", "Write `false`: in YAML 1.2 `no` is text."],
    ),
    Case(
        number=3,
        what="max_steps: 12:30",
        text=yaml("training_arguments:\n  max_steps: 12:30"),
        told=['`max_steps` must be an integer, not the text "12:30".'],
    ),
    Case(
        number=4,
        what="unknown, renamed and removed training arguments",
        text=yaml(
            "training_arguments:\n  learning_rat: 1\n  evaluation_strategy: steps\n  warmup_ratio: 0.1\n"
            "  group_by_length: true"
        ),
        told=[
            "finetune.yaml has 4 problems",
            "finetune.yaml:5:3  training_arguments.learning_rat\n",
            "Did you mean `learning_rate`?",
            "finetune.yaml:6:3",
            "It is called `eval_strategy` today.",
            "finetune.yaml:7:3",
            "Write `warmup_steps: 0.03`",
            "finetune.yaml:8:3",
            "Write `train_sampling_strategy: group_by_length`.",
        ],
    ),
    Case(
        number=5,
        what="batch size 0",
        changes=arguments(per_device_train_batch_size=0),
        told=["train_batch_size", MUST_1],
    ),
    Case(
        number=6,
        what="gradient_accumulation_steps: 0",
        changes=arguments(gradient_accumulation_steps=0),
        told=["training_arguments.gradient_accumulation_steps", MUST_1],
    ),
    Case(
        number=7, what="learning_rate: -1", changes=arguments(learning_rate=-1), told=["must be greater than 0", "-1."]
    ),
    Case(
        number=7, what="learning_rate: 0", changes=arguments(learning_rate=0), told=["must be greater than 0", "not 0."]
    ),
    Case(
        number=8,
        what="bf16 and fp16",
        text=yaml("training_arguments:\n  bf16: true\n  fp16: true"),
        told=["finetune.yaml:6:3  training_arguments.fp16", "`bf16` and `fp16` exclude each other."],
    ),
    Case(
        number=10,
        what="misspelt strategies, optimizer and schedule",
        text=yaml(
            "training_arguments:\n  save_strategy: epochs\n  eval_strategy: step\n  optim: adam_torch\n"
            "  lr_scheduler_type: cosin"
        ),
        told=[
            "finetune.yaml:5:3  training_arguments.save_strategy",
            "Did you mean `epoch`?",
            "finetune.yaml:6:3  training_arguments.eval_strategy",
            "Did you mean `steps`?",
            "finetune.yaml:7:3  training_arguments.optim",
            "Did you mean `adamw_torch`?",
            "finetune.yaml:8:3  training_arguments.lr_scheduler_type",
            "Did you mean `cosine`?",
        ],
    ),
    Case(
        number=11,
        what="eval_strategy without evaluation data",
        changes=arguments(eval_strategy="steps"),
        told=["training_arguments.eval_strategy", "needs blocks to evaluate. Add `eval_dataset_config`"],
    ),
    Case(
        number=12,
        what="load_best_model_at_end at other steps",
        changes=arguments(load_best_model_at_end=True, save_steps=10, eval_steps=7)
        | {"eval_dataset_config": "FOLDER/blocks"},
        told=["training_arguments.load_best_model_at_end", "`save_steps` (10) to be a multiple of `eval_steps` (7)."],
    ),
    Case(
        number=13,
        what="an unknown metric",
        changes=arguments(metric_for_best_model="accuracy"),
        told=["training_arguments.metric_for_best_model", "cannot be `accuracy`: what is measured is `eval_loss`."],
    ),
    Case(
        number=14,
        what="an unknown tracker",
        changes={"report_to": ["wandbb"]},
        told=["finetune.yaml:", "report_to[0]", "There is no tracker `wandbb`. Did you mean `wandb`?"],
    ),
    Case(
        number=14,
        what="a tracker that is not installed",
        changes={"report_to": "comet_ml"},
        told=["report_to: `comet_ml` is not installed: pip install comet_ml.", "`report_to: none` trains without."],
    ),
    Case(
        number=15,
        what='max_steps: "10"',
        changes=arguments(max_steps="10"),
        told=["`max_steps` must be an integer", 'not the text "10". Write 10 without quotes.'],
    ),
    Case(
        number=16,
        what="num_train_epochs: 0",
        changes={"training_arguments": {"num_train_epochs": 0}},
        told=["`num_train_epochs` must be greater than 0, not 0: nothing would train."],
    ),
    Case(
        number=17,
        what="LoRA: r 0, alpha as text, unknown key, wrong task",
        text=yaml("lora_config:\n  r: 0\n  lora_alpha: '8'\n  lora_rank: 8\n  task_type: CAUSAL"),
        told=[
            "finetune.yaml:5:3  lora_config.r",
            MUST_1,
            "finetune.yaml:6:3  lora_config.lora_alpha",
            "Write 8 without quotes.",
            "finetune.yaml:7:3  lora_config.lora_rank",
            "It is called `r`.",
            "finetune.yaml:8:3  lora_config.task_type",
            "Did you mean `CAUSAL_LM`?",
        ],
    ),
    Case(
        number=18,
        what="LoRA on modules that are not there",
        changes={"lora_config": {"target_modules": ["c_attn"]}},
        told=[
            "lora_config.target_modules: no module of this model is called `c_attn`.",
            "Its linear modules: down_proj",
        ],
    ),
    Case(
        number=18,
        what="LoRA on a pattern that matches nothing",
        changes={"lora_config": {"target_modules": ".*c_attn"}},
        told=[
            "lora_config.target_modules: no module of this model matches `.*c_attn`.",
            "Its linear modules: down_proj",
        ],
    ),
    Case(
        number=19,
        what="LoRA on a module that is there and one that is not",
        changes={"lora_config": {"target_modules": ["q_proj", "vproj"]}},
        told=["lora_config.target_modules: no module of this model is called `vproj`.", "Did you mean `v_proj`?"],
    ),
    Case(
        number=20,
        what="modules_to_save that are not there",
        changes={"lora_config": {"modules_to_save": ["embed_token"]}},
        told=["lora_config.modules_to_save: no module of this model is called `embed_token`.", "`embed_tokens`?"],
    ),
    Case(
        number=22,
        what="lora_alpha: 0, lora_dropout: 1.0",
        changes={"lora_config": {"lora_alpha": 0, "lora_dropout": 1.0}},
        told=[
            "`lora_alpha` must be greater than 0, not 0.",
            "`lora_dropout` must be at least 0 and less than 1, not 1.0.",
        ],
    ),
    Case(
        number=23,
        what="an unknown key of quantization_config",
        changes={"load_in_4bit": True, "quantization_config": {"quant_type": "nf4"}},
        told=["quantization_config.quant_type", "It is called `bnb_4bit_quant_type`."],
    ),
    Case(
        number=24,
        what="4 and 8 bits",
        text=yaml("load_in_4bit: true\nload_in_8bit: true"),
        told=["finetune.yaml:4:1  load_in_4bit", "`load_in_4bit` and `load_in_8bit` exclude each other: keep one."],
    ),
    Case(
        number=25,
        what="torch_dtype: bf17",
        changes={"torch_dtype": "bf17"},
        told=["torch_dtype", "Allowed: auto, bfloat16, float16, float32."],
    ),
    Case(
        number=26,
        what="4 bits and full fine-tuning",
        changes={"load_in_4bit": True, "lora_config": None},
        told=["A quantized base cannot be trained in full: leave out `lora_config: null`, or the quantization."],
    ),
    Case(
        number=27,
        what="a model folder that is not there",
        changes={"base_model": "FOLDER/none"},
        told=["base_model: there is no folder `none`", "Give a folder that holds a model, or a hub id"],
    ),
    Case(
        number=27,
        what="weights that are cut",
        prepare=damaged_model("model.safetensors", lambda data: data[:-10]),
        changes={"base_model": "FOLDER/damaged"},
        told=["base_model: `damaged/model.safetensors` is damaged (", "Copy or download it again."],
    ),
    Case(
        number=27,
        what="weights that Git LFS did not fetch",
        prepare=damaged_model("model.safetensors", lambda _: LFS_POINTER),
        changes={"base_model": "FOLDER/damaged"},
        told=["`damaged/model.safetensors` is a pointer of Git LFS, not the file itself. Run `git lfs pull`"],
    ),
    Case(
        number=27,
        what="a configuration that is cut",
        prepare=damaged_model("config.json", lambda data: data[:-10]),
        changes={"base_model": "FOLDER/damaged"},
        told=["base_model: `damaged/config.json` is damaged (", "Copy or download it again."],
    ),
    Case(
        number=28,
        what="rows instead of blocks",
        exit_code=3,
        changes={"train_dataset_config": "FOLDER/rows.jsonl"},
        told=[
            "train_dataset_config: these are no prepared blocks, `input_ids`",
            "They have `input`, `response`",
            "Run dataprep",
        ],
    ),
    Case(
        number=29,
        what="an id beyond the vocabulary",
        exit_code=3,
        prepare=changed_blocks(lambda block: block | {"input_ids": [9999, *block["input_ids"][1:]]}),
        changes=CHANGED,
        told=[
            "train_dataset_config, block 0: `input_ids` has the id 9999, the model knows 0 to ",
            "Run dataprep again.",
        ],
    ),
    Case(
        number=30,
        what="blocks of another tokenizer",
        exit_code=3,
        prepare=other_tokenizer,
        told=["train_dataset_config: the blocks were made with the tokenizer x", "`allow_tokenizer_mismatch: true`"],
    ),
    Case(
        number=31,
        what="an example longer than the model's positions",
        exit_code=3,
        prepare=short_model,
        changes={"base_model": "FOLDER/short"},
        told=[
            "train_dataset_config, block ",
            "the model has positions for 16: `chunksize` must not be above 16. Run dataprep",
        ],
    ),
    Case(
        number=32,
        what="no label at all",
        exit_code=3,
        prepare=changed_blocks(lambda block: block | {"labels": [-100] * len(block["labels"])}),
        changes=CHANGED,
        told=["train_dataset_config: none of the ", " tokens is trained: every label is masked.", "`ignore_index`"],
    ),
    Case(
        number=32,
        what="labels shifted by one",
        exit_code=3,
        prepare=changed_blocks(lambda block: block | {"labels": [*block["labels"][1:], -100]}),
        changes=CHANGED,
        told=["train_dataset_config, block 0: `labels` has ", "A label is the id of its own token", "or -100."],
    ),
    Case(
        number=33,
        what="no block at all",
        exit_code=3,
        prepare=no_blocks,
        changes=CHANGED,
        told=["train_dataset_config: there is not one row."],
    ),
    Case(
        number=34,
        what="an output path that cannot be written",
        exit_code=4,
        prepare=file_in_the_way,
        changes={"additional_output_paths": ["FOLDER/file/copy"]},
        told=["file/copy"],
    ),
    Case(
        number=35,
        what="an output path inside local_output",
        changes={"additional_output_paths": ["FOLDER/out/copy"]},
        told=["`additional_output_paths`", "a copy would hold itself. Write a folder beside it."],
    ),
    Case(
        number=35,
        what="an output path that is local_output",
        changes={"additional_output_paths": ["FOLDER/out"]},
        told=["`additional_output_paths`", "is the same place as `local_output`"],
    ),
    Case(
        number=38,
        what="a checkpoint that is not there",
        exit_code=4,
        changes={"resume_from_checkpoint": "FOLDER/checkpoint-7"},
        told=["resume_from_checkpoint: there is no folder `checkpoint-7`.", "Write `auto` for the newest checkpoint"],
    ),
    Case(
        number=38,
        what="a folder that is no checkpoint",
        exit_code=4,
        changes={"resume_from_checkpoint": "FOLDER/base"},
        told=["resume_from_checkpoint: `base` is not whole ("],
    ),
    Case(
        number=40,
        what="packed blocks for a model that mixes examples",
        prepare=leaking_model,
        changes={"base_model": "FOLDER/leaking"},
        told=["`bloom`", "`pack: false`"],
    ),
]
ELSEWHERE = {9, 21, 36, 37, 39}  # in the tests below


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model, rows and blocks."""
    folder = tmp_path_factory.mktemp("prepared")
    prepare_blocks(folder, save_base_model(folder / "base", "llama"))
    return folder


@pytest.fixture
def folder(tmp_path: Path, prepared: Path) -> Path:
    """A folder with links to the model and a copy of the blocks."""
    (tmp_path / "base").symlink_to(prepared / "base")
    (tmp_path / "rows.jsonl").symlink_to(prepared / "rows.jsonl")
    shutil.copytree(prepared / "blocks", tmp_path / "blocks")
    return tmp_path


@pytest.fixture
def right(folder: Path) -> dict[str, Any]:
    return {
        "base_model": str(folder / "base"),
        "train_dataset_config": str(folder / "blocks"),
        "local_output": str(folder / "out"),
        "torch_dtype": "float32",
        "report_to": "none",
    } | arguments()


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Nothing is looked up on the hub, or read from the user's cache."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def trained_with(monkeypatch: pytest.MonkeyPatch) -> list[FinetuneConfig]:
    """The configs that came as far as training, which does not begin."""
    found: list[FinetuneConfig] = []
    monkeypatch.setattr("llm.training.finetune.finetune", found.append)
    return found


def test_every_number_has_a_case() -> None:
    assert {case.number for case in CASES} | ELSEWHERE == set(range(1, 41))


@pytest.mark.parametrize("case", [case for case in CASES if case.exit_code], ids=lambda case: case.name)
def test_finetune_of_a_bad_input_is_told_and_leaves_nothing(case: Case, folder: Path, right: Mapping[str, Any]) -> None:
    if case.prepare:
        case.prepare(folder)
    before = files_in(folder)
    result = run_case(case, "finetune", folder, right)
    tell(case, result, folder)
    check_told(case, result, folder)
    left = files_in(folder)
    left.pop("finetune.yaml")
    assert left == before
    assert not (folder / "out" / "final_output").exists()


def test_1_learning_rate_in_scientific_notation_is_a_number(
    folder: Path, right: dict[str, Any], trained_with: list[FinetuneConfig]
) -> None:
    (case,) = [case for case in CASES if not case.exit_code]
    result = run_case(case, "finetune", folder, right)
    tell(case, result, folder)
    assert result.exit_code == 0 and result.output == ""
    assert trained_with[0].training_arguments == {"learning_rate": 0.0001}


def test_7_high_learning_rate_is_warned_of_with_its_line(
    folder: Path, right: dict[str, Any], trained_with: list[FinetuneConfig], caplog: pytest.LogCaptureFixture
) -> None:
    rate = yaml("training_arguments:\n  learning_rate: 5")
    case = Case(number=7, what="learning_rate: 5", exit_code=0, text=rate, told=[])
    result = run_case(case, "finetune", folder, right)
    tell(case, result, folder)
    assert result.exit_code == 0 and len(trained_with) == 1
    assert "finetune.yaml:5:3  training_arguments.learning_rate\n    learning_rate: 5\n" in caplog.text
    assert "is high: with it training mostly diverges. Usual are 2e-4 (LoRA) and 2e-5 (full)." in caplog.text


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        ("neftune_noise_alpha", "5", "it would be too weak, by another factor in each batch. Delete it."),
        ("liger_kernel_config", "{cross_entropy: true}", "`cross_entropy` of Liger has no effect"),
    ],
)
def test_what_a_flattened_batch_would_change_is_refused_with_its_line(
    key: str, value: str, text: str, folder: Path, right: dict[str, Any]
) -> None:
    lines = yaml(f"training_arguments:\n  use_liger_kernel: true\n  {key}: {value}")
    result = run_case(Case(number=0, what=key, text=lines, told=[]), "finetune", folder, right)
    assert result.exit_code == 2
    assert "finetune.yaml:6:" in result.output and f"training_arguments.{key}" in result.output
    assert text in result.output


def test_torch_compile_is_warned_of_with_its_line(
    folder: Path, right: dict[str, Any], trained_with: list[FinetuneConfig], caplog: pytest.LogCaptureFixture
) -> None:
    case = Case(number=0, what="torch_compile", told=[], text=yaml("training_arguments:\n  torch_compile: true"))
    assert run_case(case, "finetune", folder, right).exit_code == 0 and len(trained_with) == 1
    assert "finetune.yaml:5:3  training_arguments.torch_compile\n" in caplog.text
    assert "compiles the model anew for every batch of other example lengths" in caplog.text


def test_9_bfloat16_where_it_is_slow_is_warned_of_and_the_log_says_what_is_used(
    folder: Path, right: dict[str, Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True})
    case = Case(number=9, what="bf16 on a processor without it", exit_code=0, changes=arguments(bf16=True), told=[])
    with caplog.at_level(logging.INFO):
        result = run_case(case, "finetune", folder, right)
    tell(case, result, folder)
    assert result.exit_code == 0, result.output
    assert (
        caplog.text.count("training_arguments.bf16: the processor has no bfloat16 unit, so bfloat16 is emulated") == 1
    )
    assert "float32 weights (as `torch_dtype` says)" in caplog.text


def test_21_no_target_modules_means_all_linear_ones_of_any_architecture() -> None:
    for architecture in ("llama", "gpt_neox"):
        found = add_adapter(make_model(architecture), {}, {}).peft_config["default"].target_modules
        assert len(found) >= 4 and "lm_head" not in found


def test_36_local_output_that_cannot_be_written_is_told_before_the_weights_load(
    folder: Path, right: dict[str, Any]
) -> None:
    (folder / "file").write_text("")
    case = Case(
        number=36,
        what="a local_output that cannot be written",
        exit_code=4,
        changes={"local_output": "FOLDER/file/out"},
        told=["local_output", "file/out"],
    )
    result = run_case(case, "finetune", folder, right)
    tell(case, result, folder)
    check_told(case, result, folder)


def test_37_checkpoints_of_another_run_are_not_gone_on_from(folder: Path, right: dict[str, Any]) -> None:
    first = Case(number=37, what="a first run", exit_code=0, told=[])
    assert run_case(first, "finetune", folder, right).exit_code == 0
    other = arguments(max_steps=2, seed=7)
    case = Case(
        number=37, what="checkpoints of a run with another seed", changes=other, told=["other settings", "seed"]
    )
    result = run_case(case, "finetune", folder, right)
    tell(case, result, folder)
    check_told(case, result, folder)


def test_39_more_ranks_than_blocks_is_a_data_error(prepared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = load_from_disk(str(prepared / "blocks"))
    ranks = TrainingArguments(output_dir=str(prepared / "out"), report_to=[], use_cpu=True)
    monkeypatch.setattr(TrainingArguments, "world_size", property(lambda self: len(blocks) + 1))
    with pytest.raises(DataError, match=f"{len(blocks)} blocks cannot be shared among {len(blocks) + 1} ranks. Start"):
        BlockTrainer(make_model("llama"), ranks, train_dataset=blocks)


def test_23_four_bits_are_nf4_with_bfloat16_whatever_else_is_given() -> None:
    assert FOUR_BIT_DEFAULTS["bnb_4bit_quant_type"] == "nf4"
    assert FOUR_BIT_DEFAULTS["bnb_4bit_compute_dtype"] == "bfloat16"
