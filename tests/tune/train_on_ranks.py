"""Five steps on this rank and its fellows; rank 0 saves what came out. Started by `test_trainer.py` under
torchrun."""

import sys
from typing import Any

import torch
from tiny_models import make_model, make_packed_dataset, make_prompted_dataset
from transformers import TrainingArguments

from llm.training.tune.adapter import add_adapter
from llm.training.tune.run import leave_ranks
from llm.training.tune.trainer import BlockTrainer


def run(folder: str, *, is_lora: bool, is_prompted: bool, batch_size: int, accumulation: int = 1) -> dict[str, Any]:
    model = add_adapter(make_model("llama", initializer_range=0.1), {"r": 4} if is_lora else None, {})
    arguments = TrainingArguments(
        output_dir=folder,
        max_steps=5,
        optim="sgd",
        learning_rate=0.05,
        lr_scheduler_type="constant",
        max_grad_norm=0,
        remove_unused_columns=False,
        disable_tqdm=True,
        report_to="none",
        save_strategy="no",
        logging_steps=1,
        use_cpu=True,
        train_sampling_strategy="sequential",
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
        per_device_eval_batch_size=2,
    )
    trainer = BlockTrainer(
        model,
        arguments,
        train_dataset=make_prompted_dataset(40) if is_prompted else make_packed_dataset(40),
        eval_dataset=make_packed_dataset(7, seed=9),
    )
    trainer.train()
    metrics = trainer.evaluate()
    leave_ranks(trainer)
    return {
        "weights": {name: p.detach() for name, p in model.named_parameters() if p.requires_grad},
        "eval_loss": metrics["eval_loss"],
        "tokens": trainer.work.counts,
        "losses": [log["loss"] for log in trainer.state.log_history if "loss" in log],
        "is_main": trainer.is_world_process_zero(),
    }


if __name__ == "__main__":
    is_lora, is_prompted = (argument == "1" for argument in sys.argv[2:])
    found = run(sys.argv[1], is_lora=is_lora, is_prompted=is_prompted, batch_size=2, accumulation=2)
    if found["is_main"]:
        torch.save(found, f"{sys.argv[1]}/ranks.pt")
