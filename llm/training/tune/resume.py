"""Where a run goes on: the checkpoint to start from, the same on every rank, and the end of a run that had
ended."""

import json
import os

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from peft import PeftModel, load_peft_weights, set_peft_model_state_dict
from transformers import AutoModelForCausalLM, PreTrainedModel, Trainer

from llm.errors import CheckpointError, LlmTrainError
from llm.training.config import FinetuneConfig
from llm.training.tune.output_sync import OutputSync
from llm.training.tune.whole_folder import find_damage


def find_checkpoint(config: FinetuneConfig, mirror: OutputSync) -> str | None:
    """The checkpoint that `resume_from_checkpoint` names, whole; None to start anew. Call it on every rank.

    `true` is the newest whole one of `local_output`, else of an output path, fetched. CheckpointError when
    the named one is not whole.
    """
    # Rank 0 decides, and tells its error too: the others would wait for it for ever.
    found: list[str | LlmTrainError | None] = [None]
    if PartialState().is_main_process:
        try:
            found = [_find_checkpoint(config, mirror)]
        except LlmTrainError as error:
            found = [error]
    broadcast_object_list(found)
    if isinstance(found[0], LlmTrainError):
        raise found[0]
    return found[0]


def _find_checkpoint(config: FinetuneConfig, mirror: OutputSync) -> str | None:
    asked = config.resume_from_checkpoint
    if asked is False:
        return None
    if asked is True:
        return mirror.restore()
    if not os.path.isdir(asked):
        raise CheckpointError(
            f"resume_from_checkpoint: there is no folder `{asked}`. Write `true` for the newest checkpoint of "
            f"`{config.local_output}`, or the path of one."
        )
    damage = find_damage(asked)
    if damage:
        raise CheckpointError(f"resume_from_checkpoint: `{asked}` is not whole ({damage}). Name another one.")
    return asked


def is_at_end(trainer: Trainer, checkpoint: str) -> bool:
    """Whether `checkpoint` is of the last step of this run: the Trainer would train one more when it resumes
    there."""
    max_steps = trainer.set_initial_training_values(trainer.args, trainer.get_train_dataloader())[-1]
    with open(os.path.join(checkpoint, "trainer_state.json"), encoding="utf-8") as file:
        return bool(json.load(file)["global_step"] >= max_steps)


def load_weights(model: PreTrainedModel | PeftModel, checkpoint: str) -> None:
    """Puts the weights of `checkpoint` into `model`, as a resumed run has them."""
    if isinstance(model, PeftModel):
        set_peft_model_state_dict(model, load_peft_weights(checkpoint, device="cpu"))
    else:
        saved = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=model.dtype, trust_remote_code=False)
        model.load_state_dict(saved.state_dict())
