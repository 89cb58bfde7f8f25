"""Packed blocks -> adapter or full model, checkpoints, `final_output`.

python llm/training/finetune.py config.yaml
"""

import os
import sys
from pathlib import Path

if __name__ == "__main__":  # ahead of the imports below, which take seconds: a mistake in the YAML is told at once
    if not __package__:  # started as a file: Python put this folder first, where our module names would shadow others
        sys.path[0] = str(Path(__file__).resolve().parents[2])
    import typer

    from llm.cli import finetune as command

    typer.run(command)

# Before PyTorch is imported, which then asks for pages of 2 MB, not of 4 kB, for large tensors on the CPU (Linux,
# pytorch/pytorch#107697): 5 to 9 % of a step's processor time, and 0.5 GB of 5 less.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

from transformers import set_seed

from llm.model_registry import find_model
from llm.training.config import FinetuneConfig
from llm.training.config_file import saved_data
from llm.training.tune.adapter import add_adapter
from llm.training.tune.base_model import load_base_model, load_tokenizer
from llm.training.tune.data_check import check_data, open_blocks
from llm.training.tune.export import export_model, final_output_path
from llm.training.tune.isolation import keeps_examples_apart
from llm.training.tune.objective import has_liger
from llm.training.tune.output_sync import OutputSync
from llm.training.tune.progress import RunSummary
from llm.training.tune.resume import find_start
from llm.training.tune.run import end_training, run_training, stop_training
from llm.training.tune.run_lock import only_writer
from llm.training.tune.run_record import run_record
from llm.training.tune.trainer import BlockTrainer, merged_arguments, training_arguments


def finetune(config: FinetuneConfig) -> RunSummary:
    """What the run that `config` asks for did; its result is `local_output/final_output`.

    What can be wrong is checked before the first step: ConfigError, DataError, CheckpointError. A signal ends
    the run with a checkpoint, without `final_output`, by SystemExit (143 for SIGTERM, 130 for Ctrl-C).
    """
    arguments = training_arguments(config)
    set_seed(arguments.seed)  # the Trainer does so too, but after the adapter has drawn its first weights
    tokenizer = load_tokenizer(config.base_model)
    blocks = open_blocks(config, tokenizer)
    is_writer = arguments.should_save  # rank 0
    output_paths = config.additional_output_paths if is_writer else []
    with (
        only_writer(config.local_output, is_needed=is_writer),
        OutputSync(config.local_output, output_paths) as mirror,
    ):
        mirror.probe()
        record = run_record(config, arguments, blocks=blocks.train, tokenizer=tokenizer) if is_writer else {}
        start = find_start(config, mirror, record)
        run = record | {"id": start.run_id, "config": saved_data(config)}
        model = load_base_model(config)
        most = max(arguments.per_device_train_batch_size, arguments.per_device_eval_batch_size)
        is_flat = keeps_examples_apart(model, is_packed=check_data(blocks, model, max_batch_size=most))
        adapted = add_adapter(model, config.lora_config, find_model(config.base_model).lora_config)
        trainer = BlockTrainer(
            adapted,
            arguments,
            train_dataset=blocks.train,
            eval_dataset=blocks.evaluation,
            is_flat=is_flat,
            has_liger=has_liger(config.training_arguments),
        )
        limit = merged_arguments(config)["save_total_limit"]
        signals = run_training(trainer, adapted, start.checkpoint, mirror=mirror, save_total_limit=limit, run=run)
        if signals.interrupted:
            stop_training(trainer, signals, mirror)
        if is_writer:
            export_model(
                adapted,
                tokenizer,
                blocks.manifest,
                local_output=config.local_output,
                base_model=config.base_model,
                run=run | {"throughput": trainer.work.rates(trainer.peak_flops)},
            )
    return end_training(trainer, result=final_output_path(config.local_output))
