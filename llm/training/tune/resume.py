"""Where a run goes on: the checkpoint to start from, the same on every rank, and the end of a run that had
ended."""

import json
import logging
import os
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from peft import PeftModel, load_peft_weights, set_peft_model_state_dict
from transformers import AutoModelForCausalLM, PreTrainedModel, Trainer

from llm.errors import CheckpointError, ConfigError, LlmTrainError
from llm.training.config import FinetuneConfig
from llm.training.tune.checkpoint_folder import run_id_of
from llm.training.tune.output_sync import OutputSync
from llm.training.tune.run_record import check_record, passed_text
from llm.training.tune.whole_folder import find_damage, read_folder_manifest

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Start:
    """Where a run begins: a whole checkpoint, or None for step 0; `run_id` is new for a run that is."""

    checkpoint: str | None
    run_id: str


def find_start(config: FinetuneConfig, mirror: OutputSync, record: dict[str, Any]) -> Start:
    """Where `resume_from_checkpoint` says that the run begins. Call it on every rank; `record` counts on rank 0.

    `auto` is the newest whole checkpoint of `local_output` and the output paths, fetched. CheckpointError
    when the named one is not whole, ConfigError when it does not go with this run (`check_record`).
    """
    # Rank 0 decides, and tells its error too: the others would wait for it for ever.
    found: list[Start | LlmTrainError | None] = [None]
    if PartialState().is_main_process:
        try:
            found = [_find_start(config, mirror, record)]
        except LlmTrainError as error:
            found = [error]
    broadcast_object_list(found)
    start = found[0]
    if isinstance(start, LlmTrainError):
        raise start
    assert start is not None
    return start


def _find_start(config: FinetuneConfig, mirror: OutputSync, record: dict[str, Any]) -> Start:
    def check(path: str, manifest: dict[str, Any]) -> None:
        step, recorded = manifest.get("step", 0), manifest.get("run", {})
        check_record(path, recorded, record, step=step, allow_changed=config.allow_changed)

    asked, checkpoint = config.resume_from_checkpoint, None
    if asked == "auto":
        checkpoint = mirror.restore(check)
    elif isinstance(asked, str):
        checkpoint = _named_checkpoint(asked, config.local_output)
        check(checkpoint, read_folder_manifest(checkpoint))
    if checkpoint is not None:
        logger.info("Going on from %s.", checkpoint)
    is_same_run = checkpoint is not None and Path(checkpoint).resolve().parent == Path(config.local_output).resolve()
    run_id = run_id_of(read_folder_manifest(checkpoint)) if checkpoint and is_same_run else None
    return Start(checkpoint=checkpoint, run_id=run_id or uuid.uuid4().hex)


def _named_checkpoint(path: str, local_output: str) -> str:
    if not os.path.isdir(path):
        raise CheckpointError(
            f"resume_from_checkpoint: there is no folder `{path}`. Write `auto` for the newest checkpoint of "
            f"`{local_output}`, or the path of one."
        )
    damage = find_damage(path)
    if damage:
        raise CheckpointError(f"resume_from_checkpoint: `{path}` is not whole ({damage}). Name another one.")
    return path


def is_at_end(trainer: Trainer, checkpoint: str) -> bool:
    """Whether `checkpoint` is of the last step of this run: the Trainer would train one more when it resumes
    there. ConfigError when it is of a later step."""
    last_step = trainer.set_initial_training_values(trainer.args, trainer.get_train_dataloader())[-1]
    with open(os.path.join(checkpoint, "trainer_state.json"), encoding="utf-8") as file:
        step: int = json.load(file)["global_step"]
    if step > last_step:
        raise ConfigError(passed_text(checkpoint, step=step, last_step=last_step))
    return step == last_step


def load_weights(model: PreTrainedModel | PeftModel, checkpoint: str) -> None:
    """Puts the weights of `checkpoint` into `model`, as a resumed run has them."""
    if isinstance(model, PeftModel):
        set_peft_model_state_dict(model, load_peft_weights(checkpoint, device="cpu"))
    else:
        saved = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=model.dtype, trust_remote_code=False)
        model.load_state_dict(saved.state_dict())
