"""What `benchmarks/finetune.py` starts: one side in its own process, whose last line is what it found, as JSON.

    python benchmarks/finetune_sides.py SIDE JOB.json

Sides: `ours`, `trl-packed`, `trl-padded`, `trl-single`, `trainer`. All but `ours` run where llm-train is not installed:
they get the ids and labels that our dataprep made, one example a row. Before the clock starts each side computes a
short random text forward and backward, so that weights are read and kernels chosen.
"""

import json
import resource
import sys
import time
from collections.abc import Mapping
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

Job = Mapping[str, Any]
LORA = {"r": 16, "lora_alpha": 32, "lora_dropout": 0.0, "target_modules": "all-linear"}
VERSIONS = ("torch", "transformers", "peft", "accelerate")


def main() -> None:
    name, job = sys.argv[1], json.loads(Path(sys.argv[2]).read_text(encoding="utf-8"))
    trainer = ours(job) if name == "ours" else plain(job) if name == "trainer" else trl(job, name.removeprefix("trl-"))
    found = measured(trainer, job)
    packages = (*VERSIONS, "trl") if name.startswith("trl-") else VERSIONS
    print(json.dumps(found | {"versions": {package: version(package) for package in packages}}))


def ours(job: Job) -> Any:
    """What `finetune` trains with, on the blocks that `dataprep` packed."""
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    import_module("llm.training.finetune")  # before PyTorch, which it sets up
    from datasets import load_from_disk
    from transformers import set_seed

    from llm.training.config import FinetuneConfig
    from llm.training.tune.adapter import add_adapter
    from llm.training.tune.base_model import load_base_model
    from llm.training.tune.isolation import keeps_examples_apart
    from llm.training.tune.trainer import BlockTrainer, training_arguments

    settings = arguments(job)
    config = FinetuneConfig(
        base_model=job["model"],
        train_dataset_config={"method": "load_from_disk", "kwargs": {"dataset_path": job["blocks"]}},
        local_output=settings.pop("output_dir"),
        torch_dtype=job["dtype"],
        lora_config=LORA,
        report_to=settings.pop("report_to"),
        training_arguments=settings,
    )
    made = training_arguments(config)
    set_seed(made.seed)
    model = load_base_model(config)
    is_flat = keeps_examples_apart(model, is_packed=True)
    adapted = add_adapter(model, config.lora_config, {})
    return BlockTrainer(adapted, made, train_dataset=load_from_disk(job["blocks"]), is_flat=is_flat)


def plain(job: Job) -> Any:
    """Hugging Face's Trainer with its own loss and sdpa attention, on batches padded to their longest row."""
    from peft import LoraConfig, get_peft_model
    from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments, set_seed

    made = TrainingArguments(**arguments(job), bf16=job["dtype"] == "bfloat16")
    set_seed(made.seed)
    model = get_peft_model(base_model(job), LoraConfig(**LORA, task_type="CAUSAL_LM"))
    collator = DataCollatorForSeq2Seq(tokenizer(job), padding=True, label_pad_token_id=-100)
    return Trainer(model=model, args=made, train_dataset=rows_of(job), data_collator=collator)


def trl(job: Job, mode: str) -> Any:
    """TRL's `SFTTrainer` on the same ids and labels.

    `padded`: its default (padded batches, gradient checkpointing). `single`: one row a batch, so without padding.
    `packed`: best-fit decreasing, padding-free: `position_ids` without a mask, from which transformers builds a block
    mask for sdpa; correct on the CPU, as its equal loss shows. The last two without checkpointing, which is faster.
    """
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    settings = arguments(job)
    if mode == "padded":
        settings.pop("gradient_checkpointing")
    made = SFTConfig(
        **settings,
        max_length=job["chunksize"],
        packing=mode == "packed",
        packing_strategy="bfd",
        bf16=job["dtype"] == "bfloat16",
    )
    return SFTTrainer(
        model=base_model(job),
        args=made,
        train_dataset=rows_of(job),
        processing_class=tokenizer(job),
        peft_config=LoraConfig(**LORA, task_type="CAUSAL_LM"),
    )


def arguments(job: Job) -> dict[str, Any]:
    """What all sides are told."""
    return {
        "output_dir": job["output"],
        "per_device_train_batch_size": job["batch_size"],
        "gradient_accumulation_steps": job["accumulation"],
        "max_steps": job["steps"],
        "num_train_epochs": job["epochs"],
        "learning_rate": job["learning_rate"],
        "lr_scheduler_type": "constant",
        "optim": "adamw_torch",
        "gradient_checkpointing": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "seed": job["seed"],
        "use_cpu": job["device"] == "cpu",
        "disable_tqdm": True,
        "dataloader_pin_memory": job["device"] != "cpu",
    }


def base_model(job: Job) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        job["model"], dtype=getattr(torch, job["dtype"]), attn_implementation=job["attention"]
    )


def tokenizer(job: Job) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(job["model"])


def rows_of(job: Job, name: str = "rows") -> Any:
    from datasets import Dataset

    return Dataset.from_list(json.loads(Path(job[name]).read_text(encoding="utf-8")))


def measured(trainer: Any, job: Job) -> dict[str, Any]:
    """The training of the job, timed without what comes before and after it."""
    num_tokens = [0]
    embeddings = trainer.model.get_input_embeddings()
    warm_up(trainer.model)
    embeddings.register_forward_pre_hook(lambda _, inputs: count(num_tokens, inputs[0]))
    cpu_before, start = cpu_seconds(), time.perf_counter()
    trainer.train()
    synchronize(job)
    seconds, cpu = time.perf_counter() - start, cpu_seconds() - cpu_before
    found = {
        "seconds": seconds,
        "cpu_seconds": cpu,
        "computed_tokens": num_tokens[0],
        "steps": trainer.state.global_step,
        "losses": [log["loss"] for log in trainer.state.log_history if "loss" in log],
        "peak_bytes": peak_bytes(job),
    }
    return found | ({"eval_loss": eval_loss(trainer.model, job)} if job["eval_rows"] else {})


def warm_up(model: Any) -> None:
    """A short random text forward and backward; no weight and no gradient of it remains."""
    import torch

    ids = torch.arange(3, 67, device=model.device)[None]
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    model.zero_grad()


def count(num_tokens: list[int], ids: Any) -> None:
    num_tokens[0] += ids.numel()


def eval_loss(model: Any, job: Job) -> float:
    """The token mean over the rows to evaluate, one at a time through the library's own sdpa attention: the same
    code for every side."""
    import torch
    from torch.nn import functional as F

    inner = model.get_base_model()
    inner.set_attn_implementation("sdpa")
    model.eval()
    total, num_labels = 0.0, 0
    for row in rows_of(job, "eval_rows"):
        ids, labels = (torch.tensor(row[name], device=model.device) for name in ("input_ids", "labels"))
        with torch.no_grad():
            logits = inner(input_ids=ids[None], use_cache=False).logits[0, :-1]
        total += float(F.cross_entropy(logits.float(), labels[1:], reduction="sum"))
        num_labels += int((labels[1:] != -100).sum())
    return total / num_labels


def synchronize(job: Job) -> None:
    import torch

    if job["device"] == "cuda":
        torch.cuda.synchronize()


def cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def peak_bytes(job: Job) -> int:
    """The most memory of the device, or of this process where that is the CPU."""
    import torch

    if job["device"] == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


if __name__ == "__main__":
    main()
