"""An adapter put into its base model: what servers and converters that read whole models take. After stage 9.

    merged/   config.json, weights, and the tokenizer, chat template, generation config and run record
              of the `final_output` that it comes from; README.md, manifest.json

An adapter alone does not stop by itself everywhere: transformers and peft read the generation config of the base
model, never that of an adapter's folder, and the base may not know the trained stop token.
"""

import logging
import os
import shutil
import warnings
from pathlib import Path

from peft import PeftConfig, PeftModel
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from llm.errors import CheckpointError
from llm.training.tune.base_model import loading_errors
from llm.training.tune.export import apply_umask, write_readme
from llm.training.tune.whole_folder import MANIFEST, find_damage, list_files, swap_folder, write_folder_manifest

logger = logging.getLogger(__name__)
OF_THE_ADAPTER = frozenset({"adapter_config.json", "adapter_model.safetensors", "README.md", MANIFEST})


def merge_adapter(final_output: str, target: str, *, base_model: str | None = None) -> str:
    """The path of `target`, a new folder with the whole model, in the dtype that the base is stored in.

    `base_model` takes the place of what the adapter was trained from (None: that one, as the YAML file named it;
    a relative path is looked up from where the process runs). CheckpointError when `final_output` holds no
    whole adapter or `target` exists, ConfigError when the base model cannot be loaded; then nothing is written.
    """
    _check_folders(final_output, target)
    disable_progress_bar()  # it fills the terminal for half a second of loading
    base = base_model or str(PeftConfig.from_pretrained(final_output).base_model_name_or_path)
    model = _merged(final_output, base)
    aside = Path(f"{target.rstrip('/')}.tmp")
    shutil.rmtree(aside, ignore_errors=True)  # of a run that was killed here
    aside.mkdir(parents=True)
    model.save_pretrained(str(aside))
    for name in list_files(final_output):
        if name not in OF_THE_ADAPTER:
            shutil.copyfile(Path(final_output, name), aside / name)
    write_readme(aside, base, is_adapter=False)
    apply_umask(aside)
    write_folder_manifest(str(aside))
    swap_folder(str(aside), target.rstrip("/"))
    logger.info("The adapter and its base model are one model now: %s", target)
    return target


def _check_folders(final_output: str, target: str) -> None:
    damage = find_damage(final_output)
    if damage:
        raise CheckpointError(f"`{final_output}` is not whole: {damage}. Name a `final_output` that finetune wrote.")
    if not Path(final_output, "adapter_config.json").is_file():
        raise CheckpointError(f"`{final_output}` holds no adapter: it is a whole model already. Use it as it is.")
    if os.path.lexists(target):
        raise CheckpointError(f"`{target}` exists already. Name a folder that does not, or remove this one.")


def _merged(final_output: str, base: str) -> PreTrainedModel:
    with loading_errors(base):
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(base, dtype="auto", trust_remote_code=False)
    # Before saving, which refuses a base's own when it is not valid.
    model.generation_config = GenerationConfig.from_pretrained(final_output)
    with warnings.catch_warnings():
        # peft 0.21.2 reads a name that transformers 5.23 renamed; delete when peft does not.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        adapted = PeftModel.from_pretrained(model, final_output)
    merged: PreTrainedModel = adapted.merge_and_unload(safe_merge=True)
    return merged
