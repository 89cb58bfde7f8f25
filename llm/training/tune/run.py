"""One run of the trainer: resumed, watched, saved, and evaluated at its end. Stage 7 of the road."""

import os
from typing import Any, NoReturn

from peft import PeftModel
from transformers import PreTrainedModel, Trainer, TrainerState

from llm.training.tune.checkpoints import CheckpointCallback
from llm.training.tune.output_sync import OutputSync
from llm.training.tune.progress import ProgressCallback, RunSummary, print_summary, summarize
from llm.training.tune.resume import is_at_end, load_weights
from llm.training.tune.signals import SignalCallback
from llm.training.tune.trainer import BlockTrainer


def run_training(
    trainer: BlockTrainer,
    model: PreTrainedModel | PeftModel,
    checkpoint: str | None,
    *,
    mirror: OutputSync,
    save_total_limit: int | None,
    run: dict[str, Any],
) -> SignalCallback:
    """Whether a signal ended the training of `model`, which went from `checkpoint` (None: anew) to its end.

    A whole run ends with an evaluation. `run` is what each checkpoint records of the run.
    When `checkpoint` is the last one, only its weights are loaded.
    """
    signals, progress = SignalCallback(), ProgressCallback()
    checkpoints = CheckpointCallback(
        save_total_limit=save_total_limit, run=run, mirror=mirror, describe_step=trainer.describe_step
    )
    for callback in (progress, signals, checkpoints):  # the last one sees what the others ask for
        trainer.add_callback(callback)
    with signals, progress, checkpoints.clear_failed_save():
        if checkpoint is not None and is_at_end(trainer, checkpoint):
            load_weights(model, checkpoint)
            trainer.state = TrainerState.load_from_json(os.path.join(checkpoint, "trainer_state.json"))
        else:
            trainer.train(resume_from_checkpoint=checkpoint)
        if not signals.interrupted and trainer.eval_dataset is not None and not _is_evaluated(trainer.state):
            trainer.evaluate()
    model.config.use_cache = True  # the Trainer turned it off; what is exported generates with it
    return signals


def end_training(trainer: BlockTrainer, *, result: str) -> RunSummary:
    """The summary of the run, printed on rank 0; trackers and the process group are ended."""
    summary = _tell(trainer, result)
    leave_ranks(trainer)
    return summary


def stop_training(trainer: BlockTrainer, signals: SignalCallback, mirror: OutputSync) -> NoReturn:
    """Ends an interrupted run with the exit code of its signal, by which a scheduler knows to start it again.

    A last copy that fails is told: it does not change the code.
    """
    _tell(trainer, signals.message)  # first: the grace period may end while it copies
    mirror.close_and_tell()
    trainer.accelerator.wait_for_everyone()  # torchrun kills a rank that copies once another one has ended
    leave_ranks(trainer)
    raise SystemExit(signals.exit_code)


def leave_ranks(trainer: Trainer) -> None:
    """Ends trackers and the process group; the model that DDP wrapped is freed before.

    DDP would else be the group's last owner: freed with Python's lock held, it waits for gloo's threads, of which one
    may wait for this lock to free a tensor (pytorch/pytorch#56297, torch 2.13): 2 of 12 runs never ended.
    """
    trainer.model_wrapped = trainer.model  # type: ignore[assignment]  # None: with `model_init` only
    trainer.accelerator.free_memory()  # collects garbage: of compiled layers, the wrapped model is held by a cycle
    trainer.end()


def _tell(trainer: BlockTrainer, result: str) -> RunSummary:
    summary = summarize(trainer.state, rates=trainer.work.rates(trainer.peak_flops), result=result)
    if trainer.args.should_save:
        print_summary(summary)
    return summary


def _is_evaluated(state: TrainerState) -> bool:
    return any("eval_loss" in log and log["step"] == state.global_step for log in state.log_history)
