"""The whole run, through the real command lines: rows -> blocks -> checkpoints -> `final_output`."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from tiny_models import make_model
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from llm.errors import ConfigError, DataError
from llm.training.config import DataPrepConfig, DatasetConfig, FinetuneConfig, MethodConfig
from llm.training.config_file import load_config
from llm.training.dataprep import prepare
from llm.training.finetune import finetune
from llm.training.tune.progress import RunSummary

FINETUNE = Path(__file__).parents[2] / "llm" / "training" / "finetune.py"
CONTROL_TOKENS = ("<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<pad>")


@pytest.fixture
def base_model(tmp_path: Path) -> Path:
    """A folder with a tiny llama and a byte-level tokenizer."""
    return save_base_model(tmp_path / "base", "llama")


def save_base_model(folder: Path, architecture: str, **changes: Any) -> Path:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        [], trainers.BpeTrainer(initial_alphabet=alphabet, special_tokens=list(CONTROL_TOKENS), show_progress=False)
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    ).save_pretrained(folder)
    model = make_model(architecture, vocab_size=tokenizer.get_vocab_size(), initializer_range=0.1, **changes)
    model.save_pretrained(folder)
    return folder


SHARED = "Answer with the sum, in one short sentence, and with nothing else."  # tokens enough for a node


def prepare_blocks(
    folder: Path,
    base_model: Path,
    *,
    pack: bool = True,
    method: str = "save_to_disk",
    name: str = "blocks",
    system_message: str = "",
) -> Path:
    """Blocks of 36 rows, which share `system_message` if there is one."""
    rows = folder / "rows.jsonl"
    lines = [{"input": f"{n} + 1?", "response": f"It is {n + 1}." + "!" * (n % 5)} for n in range(36)]
    rows.write_text("\n".join(json.dumps(line) for line in lines))
    path_key = "dataset_path" if method == "save_to_disk" else "path_or_buf"
    writer = MethodConfig(method=method, kwargs={path_key: str(folder / name)})
    source = DatasetConfig(method="load_path", kwargs={"path": str(rows)})
    manifest = prepare(
        DataPrepConfig(
            source_config=source,
            base_model=str(base_model),
            prompt_config=MethodConfig(method="DefaultPrompt", kwargs={"system_message": system_message}),
            dataset_writer_config=writer,
            chunksize=128,
            pack=pack,
        )
    )
    assert bool(manifest.counts["shared"]["nodes"]) == bool(system_message)
    return folder / name


def make_config(folder: Path, base_model: Path, **changes: Any) -> FinetuneConfig:
    arguments = {
        "max_steps": 4,
        "save_steps": 2,
        "logging_steps": 1,
        "eval_strategy": "no",
        "learning_rate": 0.01,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 1,
    }
    blocks = DatasetConfig(method="load_from_disk", kwargs={"dataset_path": str(folder / "blocks")})
    settings: dict[str, Any] = {
        "base_model": str(base_model),
        "train_dataset_config": blocks,
        "eval_dataset_config": blocks,
        "local_output": str(folder / "out"),
        "torch_dtype": "float32",
        "report_to": ["none"],
    }
    arguments |= changes.pop("training_arguments", {})
    return FinetuneConfig(**settings | {"training_arguments": arguments} | changes)


def exported_weights(folder: Path) -> dict[str, Tensor]:
    (file,) = (folder / "out" / "final_output").glob("*.safetensors")
    return load_file(file)


def are_equal(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    assert left.keys() == right.keys() and len(left) > 0
    return all(bool((left[name] == right[name]).all()) for name in left)


def run_command(folder: Path, config: FinetuneConfig, *, num_ranks: int = 1) -> subprocess.CompletedProcess[str]:
    path = folder / "finetune.yaml"
    path.write_text(config.model_dump_json())  # JSON is YAML
    command = [sys.executable]
    if num_ranks > 1:
        command += ["-m", "torch.distributed.run", f"--nproc-per-node={num_ranks}"]
        command += ["--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*command, str(FINETUNE), str(path)],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def test_command_trains_exports_and_tells(tmp_path: Path, base_model: Path) -> None:
    prepare_blocks(tmp_path, base_model)
    config = make_config(tmp_path, base_model, additional_output_paths=[str(tmp_path / "copy")])
    result = run_command(tmp_path, config)
    assert result.returncode == 0, result.stderr
    for text in (
        "step 4/4  loss ",
        "evaluation loss",
        "tokens per second",
        "peak memory",
        f"{tmp_path}/out/final_output",
    ):
        assert text in result.stderr
    assert "FutureWarning" not in result.stderr and "UserWarning" not in result.stderr
    for place in ("out", "copy"):
        files = {path.name for path in (tmp_path / place / "final_output").iterdir()}
        assert {"adapter_model.safetensors", "tokenizer.json", "generation_config.json", "run.json"} <= files
    record = json.loads((tmp_path / "out" / "final_output" / "run.json").read_text())
    assert FinetuneConfig(**record["config"]) == config
    assert load_config(str(tmp_path / "out" / "final_output" / "finetune.yaml"), FinetuneConfig) == config


@pytest.mark.parametrize("system_message", ["", SHARED], ids=["packed", "shared"])
@pytest.mark.parametrize("lora_config", [{"lora_dropout": 0.1}, None], ids=["lora", "full"])
def test_resumed_run_ends_with_the_weights_of_a_straight_one(
    system_message: str, lora_config: dict[str, Any] | None, tmp_path: Path, base_model: Path
) -> None:
    prepare_blocks(tmp_path, base_model, system_message=system_message)
    config = make_config(tmp_path, base_model, lora_config=lora_config)
    straight = finetune(config)
    weights = exported_weights(tmp_path)
    assert (straight.steps, straight.result) == (4, str(tmp_path / "out" / "final_output"))
    (tmp_path / "out" / "checkpoint-4").rename(tmp_path / "gone")
    resumed = finetune(config)
    assert are_equal(weights, exported_weights(tmp_path))
    assert resumed.eval_loss == straight.eval_loss


@pytest.mark.parametrize("lora_config", [{}, None], ids=["lora", "full"])
def test_finished_run_exports_again_without_a_step(
    lora_config: dict[str, Any] | None, tmp_path: Path, base_model: Path
) -> None:
    prepare_blocks(tmp_path, base_model)
    config = make_config(tmp_path, base_model, lora_config=lora_config)
    first = finetune(config)
    weights = exported_weights(tmp_path)
    second = finetune(config)
    assert second.steps == 4 and second.tokens_per_second == 0
    assert are_equal(weights, exported_weights(tmp_path))
    assert second.eval_loss == pytest.approx(first.eval_loss, rel=1e-6)


def test_full_model_is_exported_with_its_cache_on(tmp_path: Path, base_model: Path) -> None:
    prepare_blocks(tmp_path, base_model)
    finetune(make_config(tmp_path, base_model, lora_config=None))
    facts = json.loads((tmp_path / "out" / "final_output" / "config.json").read_text())
    assert facts["use_cache"] is True
    assert not any("attn" in name and "llm_train" in str(value) for name, value in facts.items())
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "final_output")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out" / "final_output")
    assert model.generate(**tokenizer("1 + 1?", return_tensors="pt"), max_new_tokens=3).shape[0] == 1


@pytest.mark.parametrize("pack", [True, False], ids=["packed", "unpacked"])
def test_model_that_leaks_trains_on_unpacked_blocks_only(pack: bool, tmp_path: Path) -> None:
    base = save_base_model(tmp_path / "bloom", "bloom")
    prepare_blocks(tmp_path, base, pack=pack)
    config = make_config(tmp_path, base, lora_config=None)
    if pack:
        with pytest.raises(ConfigError, match="`bloom`.*`pack: false`"):
            finetune(config)
        assert not (tmp_path / "out" / "final_output").exists()
    else:
        summary = finetune(config)
        assert isinstance(summary, RunSummary) and summary.last_loss is not None


def test_same_seed_gives_the_same_adapter_and_another_seed_another(tmp_path: Path, base_model: Path) -> None:
    prepare_blocks(tmp_path, base_model)
    found = []
    for seed in (1, 1, 2):
        arguments = {"seed": seed, "max_steps": 1}
        finetune(make_config(tmp_path, base_model, training_arguments=arguments, resume_from_checkpoint=False))
        found.append(exported_weights(tmp_path))
    assert are_equal(found[0], found[1])
    assert not are_equal(found[0], found[2])


@pytest.mark.parametrize(("method", "name"), [("to_csv", "b.csv"), ("to_json", "b.jsonl"), ("to_parquet", "b.parquet")])
def test_blocks_of_every_writer_train_the_same_adapter(
    method: str, name: str, tmp_path: Path, base_model: Path
) -> None:
    prepare_blocks(tmp_path, base_model)
    path = prepare_blocks(tmp_path, base_model, method=method, name=name)
    dataset = DatasetConfig(method="load_path", kwargs={"path": str(path)})
    finetune(make_config(tmp_path, base_model, local_output=str(tmp_path / "folder" / "out")))
    finetune(
        make_config(tmp_path, base_model, local_output=str(tmp_path / "file" / "out"), train_dataset_config=dataset)
    )
    assert are_equal(exported_weights(tmp_path / "folder"), exported_weights(tmp_path / "file"))


def test_blocks_of_another_tokenizer_are_refused_with_exit_code_3(tmp_path: Path, base_model: Path) -> None:
    manifest = prepare_blocks(tmp_path, base_model) / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"tokenizer_fingerprint": "', '"tokenizer_fingerprint": "x'))
    config = make_config(tmp_path, base_model)
    with pytest.raises(DataError, match="allow_tokenizer_mismatch: true"):
        finetune(config)
    result = run_command(tmp_path, config)
    assert result.returncode == 3
    assert "Traceback" not in result.stderr and "allow_tokenizer_mismatch: true" in result.stderr


def test_two_ranks_end_with_the_weights_of_one(tmp_path: Path, base_model: Path) -> None:
    prepare_blocks(tmp_path, base_model)
    changes = {"optim": "sgd", "lr_scheduler_type": "constant", "max_grad_norm": 0.0, "save_steps": 4}
    alone = make_config(tmp_path, base_model, training_arguments=changes, lora_config={"lora_dropout": 0.0})
    finetune(alone)
    weights = exported_weights(tmp_path)
    (tmp_path / "out").rename(tmp_path / "alone")
    two = make_config(
        tmp_path,
        base_model,
        training_arguments=changes | {"per_device_train_batch_size": 2},
        lora_config={"lora_dropout": 0.0},
    )
    result = run_command(tmp_path, two, num_ranks=2)
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stderr.count("step 4/4  loss") == 1
    found = exported_weights(tmp_path)
    assert max(float((found[name] - weights[name]).abs().max()) for name in weights) < 1e-6


THP = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@pytest.mark.skipif(not THP.exists() or "[never]" in THP.read_text(), reason="this machine gives no large pages")
def test_large_tensors_lie_in_large_pages(tmp_path: Path) -> None:
    config = tmp_path / "finetune.yaml"
    config.write_text("base_model: x\ntrain_dataset_config: y\nlocal_output: z\ntraining_arguments: {max_steps: 1}\n")
    code = f"""
from llm.training.config import FinetuneConfig
from llm.training.config_file import load_config
load_config({str(config)!r}, FinetuneConfig)
import llm.training.finetune, torch
kept = torch.ones(1 << 26)
print(open("/proc/self/smaps_rollup").read())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("AnonHugePages:")]
    assert int(line.split()[1]) > 200_000  # kB of 262,144
