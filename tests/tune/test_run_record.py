"""A run goes on as it began: each changed setting is refused or announced (F15 of the fault plan)."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from test_finetune import are_equal, exported_weights, make_config, prepare_blocks, save_base_model
from tiny_models import make_packed_dataset

from llm.errors import ConfigError
from llm.training.config import DatasetConfig, FinetuneConfig
from llm.training.config_file import load_config
from llm.training.finetune import finetune
from llm.training.tune.run_record import base_model_fingerprint, blocks_fingerprint
from llm.training.tune.whole_folder import MANIFEST

RUN = {"max_steps": 4, "save_steps": 2}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with base model, blocks and the output of a run of 4 steps with dropout."""
    folder = tmp_path_factory.mktemp("finished")
    base = save_base_model(folder / "base", "llama")
    prepare_blocks(folder, base)
    finetune(make_config(folder, base, training_arguments=RUN))
    return folder


@pytest.fixture
def folder(finished: Path, tmp_path: Path) -> Path:
    """A copy of `finished` whose newest checkpoint is that of step 2, without a result."""
    copy = Path(shutil.copytree(finished, tmp_path / "copy"))
    shutil.rmtree(copy / "out/checkpoint-4")
    shutil.rmtree(copy / "out/final_output")
    return copy


def config_of(folder: Path, arguments: dict[str, Any] | None = None, **changes: Any) -> FinetuneConfig:
    base = Path(changes.pop("base_model", folder / "base"))
    return make_config(folder, base, training_arguments=RUN | (arguments or {}), **changes)


def recorded(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "out/checkpoint-2" / MANIFEST).read_text())
    return content


def change_record(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = recorded(folder)
    change(content["run"])
    (folder / "out/checkpoint-2" / MANIFEST).write_text(json.dumps(content))


def fewer_blocks(folder: Path) -> dict[str, Any]:
    blocks = Dataset.load_from_disk(str(folder / "blocks"))
    blocks.select(range(5)).to_parquet(folder / "few.parquet")
    shutil.copy(folder / "blocks/manifest.json", folder / "few.parquet.manifest.json")
    return {"train_dataset_config": DatasetConfig(method="load_path", kwargs={"path": str(folder / "few.parquet")})}


def another_base(folder: Path) -> dict[str, Any]:
    return {"base_model": str(save_base_model(folder / "other-base", "llama", hidden_size=16))}


def two_ranks(folder: Path) -> dict[str, Any]:
    change_record(folder, lambda run: run["settings"].update(world_size=2))
    return {}


def of_full_run(folder: Path) -> dict[str, Any]:
    change_record(folder, lambda run: run["settings"].update(lora_config=None))
    return {}


ARGUMENTS = "training_arguments."
REFUSED: dict[str, tuple[Any, list[str]]] = {
    "seed": ({"seed": 7}, [ARGUMENTS + "seed: 42 in the checkpoint, 7 now"]),
    "data": (fewer_blocks, ["train_dataset_config: ", "few.parquet"]),
    "accumulation": (
        {"gradient_accumulation_steps": 2},
        [ARGUMENTS + "gradient_accumulation_steps: 1 in the checkpoint, 2 now"],
    ),
    "batch size": (
        {"per_device_train_batch_size": 2},
        [ARGUMENTS + "per_device_train_batch_size: 4 in the checkpoint, 2 now"],
    ),
    "batch size and accumulation, same step": (
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
        [ARGUMENTS + "gradient_accumulation_steps: 1", ARGUMENTS + "per_device_train_batch_size: 4"],
    ),
    "world 2 to 1": (two_ranks, ["world_size: 2 in the checkpoint, 1 now"]),
    "more steps": ({"max_steps": 8}, [ARGUMENTS + "max_steps: 4 in the checkpoint, 8 now"]),
    "fewer steps": ({"max_steps": 3}, [ARGUMENTS + "max_steps: 4 in the checkpoint, 3 now"]),
    "adapter on a full checkpoint": (of_full_run, ["lora_config: null in the checkpoint, {"]),
    "rank of the adapter": (lambda _: {"lora_config": {"r": 3}}, ["lora_config.r: 16 in the checkpoint, 3 now"]),
    "full on an adapter's checkpoint": (lambda _: {"lora_config": None}, ["lora_config: {", ", null now"]),
    "dtype": (lambda _: {"torch_dtype": "bfloat16"}, ["torch_dtype: float32 in the checkpoint, bfloat16 now"]),
    "base model": (another_base, ["base_model: sha256", "other-base"]),
    "schedule": ({"lr_scheduler_type": "linear"}, [ARGUMENTS + "lr_scheduler_type: cosine"]),
    "clipping": ({"max_grad_norm": 0.5}, [ARGUMENTS + "max_grad_norm: 1.0"]),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_changed_setting_is_refused_with_both_values_and_nothing_is_touched(kind: str, folder: Path) -> None:
    change, texts = REFUSED[kind]
    config = config_of(folder, **change(folder)) if callable(change) else config_of(folder, change)
    before = sorted(path.name for path in (folder / "out").iterdir())
    with pytest.raises(ConfigError) as caught:
        finetune(config)
    for text in [*texts, "allow_changed: [", "resume_from_checkpoint: false", "checkpoint-2` is of a"]:
        assert text in str(caught.value)
    assert sorted(path.name for path in (folder / "out").iterdir()) == before


def test_learning_rate_of_the_config_is_announced_to_have_no_effect(
    finished: Path, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    finetune(config_of(folder, {"learning_rate": 0.5, "weight_decay": 0.1}))
    told = [record.getMessage() for record in caplog.records if "has no effect" in record.getMessage()]
    assert "`training_arguments.learning_rate: 0.5` has no effect: a resumed run keeps the 0.01 of" in told[0]
    assert "weight_decay" in told[1] and len(told) == 2
    assert are_equal(exported_weights(folder), exported_weights(finished))


def test_what_has_no_part_in_training_may_change(
    finished: Path, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (folder / "base").rename(folder / "moved")
    arguments = {"logging_steps": 2, "save_steps": 1, "per_device_eval_batch_size": 1, "save_total_limit": 9}
    finetune(make_config(folder, folder / "moved", training_arguments=RUN | arguments))
    assert are_equal(exported_weights(folder), exported_weights(finished))
    assert (folder / "out/checkpoint-3").is_dir()  # the new `save_steps` count
    assert not [one for one in caplog.records if one.levelname == "WARNING" and "checkpoint-2" in one.getMessage()]


def test_fewer_steps_than_were_trained_is_refused_whatever_is_allowed(folder: Path) -> None:
    config = config_of(folder, {"max_steps": 1}, allow_changed=["max_steps"])
    with pytest.raises(ConfigError, match="has trained 2 steps, this config ends after 1"):
        finetune(config)


def test_fewer_epochs_than_were_trained_is_refused_whatever_is_allowed(folder: Path) -> None:
    few = fewer_blocks(folder)
    config = config_of(
        folder, {"max_steps": -1, "num_train_epochs": 0.1}, allow_changed=list(few) + ["max_steps"], **few
    )
    with pytest.raises(ConfigError, match="has trained 2 steps, this config ends after 1"):
        finetune(config)


@pytest.mark.parametrize("name", ["max_steps", "training_arguments.max_steps", "training_arguments"])
def test_allowed_change_goes_on_and_is_told(name: str, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert finetune(config_of(folder, {"max_steps": 5}, allow_changed=[name])).steps == 5
    assert "max_steps: 4 in the checkpoint, 5 now" in caplog.text


def test_only_what_is_named_is_allowed(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"allow_changed: \[training_arguments.seed\]") as caught:
        finetune(config_of(folder, {"max_steps": 5, "seed": 1}, allow_changed=["max_steps"]))
    assert "max_steps: 4" not in str(caught.value)


def test_allow_changed_with_a_wrong_name_says_the_nearest(folder: Path) -> None:
    with pytest.raises(ConfigError, match="`max_step` is not compared. Did you mean `max_steps`?"):
        finetune(config_of(folder, allow_changed=["max_step"]))


def test_other_versions_are_told_and_not_refused(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    change_record(folder, lambda run: run["versions"].update(torch="1.0"))
    finetune(config_of(folder))
    assert "written by other versions (torch 1.0 -> " in caplog.text


def test_checkpoint_without_a_record_is_resumed_with_a_warning(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    change_record(folder, lambda run: run.clear())
    finetune(config_of(folder))
    assert "does not say what made it" in caplog.text


def test_record_holds_what_the_issue_asks_for(folder: Path) -> None:
    run = recorded(folder)["run"]
    assert " blocks, sha256 " in run["settings"]["train_dataset_config"]
    assert set(run) == {"id", "config", "config_hash", "world_size", "versions", "settings"}
    training = run["settings"]["training_arguments"]
    assert (training["seed"], training["max_steps"], training["learning_rate"]) == (42, 4, 0.01)
    assert len(run["settings"]["tokenizer"]) == 32 and run["settings"]["world_size"] == 1
    assert FinetuneConfig(**run["config"]) == config_of(Path(run["config"]["local_output"]).parent)


def test_run_that_goes_on_keeps_its_id_and_a_new_one_has_another(folder: Path) -> None:
    run_id = recorded(folder)["run"]["id"]
    finetune(config_of(folder))
    assert json.loads((folder / "out/checkpoint-4" / MANIFEST).read_text())["run"]["id"] == run_id
    finetune(config_of(folder, resume_from_checkpoint=False))
    assert recorded(folder)["run"]["id"] != run_id


def test_blocks_fingerprint_is_of_the_content() -> None:
    blocks = make_packed_dataset(5)
    assert blocks_fingerprint(blocks) == blocks_fingerprint(Dataset.from_list(blocks.to_list()))
    others = [make_packed_dataset(4), make_packed_dataset(5, seed=1), blocks.select([1, 0, 2, 3, 4])]
    assert len({blocks_fingerprint(one) for one in (blocks, *others)}) == 4
    assert blocks_fingerprint(blocks).startswith("5 blocks, sha256 ")


def test_base_model_fingerprint_is_of_the_files_not_of_the_path(tmp_path: Path) -> None:
    first = save_base_model(tmp_path / "a", "llama")
    same = Path(shutil.copytree(first, tmp_path / "b"))
    assert base_model_fingerprint(str(first)) == base_model_fingerprint(str(same))
    weights = same / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    assert base_model_fingerprint(str(first)) != base_model_fingerprint(str(same))
    assert base_model_fingerprint("org/never-seen") == "org/never-seen"


@pytest.mark.parametrize("line", ["", "resume_from_checkpoint: auto", "resume_from_checkpoint: true"])
def test_resume_is_auto_by_default_and_true_is_another_word_for_it(line: str, tmp_path: Path) -> None:
    assert load(tmp_path, line).resume_from_checkpoint == "auto"


def load(folder: Path, line: str) -> FinetuneConfig:
    (folder / "c.yaml").write_text(f"base_model: x/y\ntrain_dataset_config: blocks\nlocal_output: out\n{line}\n")
    return load_config(str(folder / "c.yaml"), FinetuneConfig)


def test_save_only_model_is_refused_in_the_config(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"c.yaml:4:\d+  training_arguments.save_only_model[^`]*`save_only_model: true`"
    ):
        load(tmp_path, "training_arguments: {seed: 1, save_only_model: true}")
    assert load(tmp_path, "training_arguments: {save_only_model: false}").training_arguments == {
        "save_only_model": False
    }
