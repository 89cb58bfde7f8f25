"""`final_output`: the tuned model with all that inference needs, written as a whole: stage 9 of the road.

    final_output/   adapter (or model), tokenizer, chat template, generation_config.json,
                    run.json (what made it), finetune.yaml (its config, to run again), README.md,
                    manifest.json (sizes and hashes)

Before anything is written, the exported chat template must give, for the sample rows of the prepared data,
the very ids that were trained.
"""

import copy
import json
import logging
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jinja2
from peft import PeftModel
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from llm.errors import CheckpointError
from llm.training.config_file import saved_text
from llm.training.prep.manifest import Manifest, Sample
from llm.training.tune.run_record import package_versions
from llm.training.tune.whole_folder import swap_folder, write_folder_manifest

logger = logging.getLogger(__name__)
FINAL_OUTPUT = "final_output"
# What `generate` warns of, and `save_pretrained` refuses, unless `do_sample` is set.
SAMPLING = ("temperature", "top_p", "top_k", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")


def export_model(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    manifest: Manifest | None,
    *,
    local_output: str,
    base_model: str,
    run: dict[str, Any],
) -> str:
    """The path of `local_output/final_output`, which is replaced as a whole.

    `base_model` is what the user wrote, `run` what `run.json` records besides data and versions (the resolved
    config: without secrets). CheckpointError when the exported prompt is not the trained one; then nothing is
    written. Call it on rank 0 only.
    """
    exported = copy.deepcopy(tokenizer)
    if manifest is not None:
        exported.chat_template = manifest.chat_template or exported.chat_template
        for sample in manifest.samples:
            _check_prompt(exported, sample)
    target = final_output_path(local_output)
    aside = Path(local_output, f".{FINAL_OUTPUT}.tmp")
    shutil.rmtree(aside, ignore_errors=True)  # of a run that was killed here
    aside.mkdir(parents=True)
    _save_weights(model, aside, base_model)
    exported.save_pretrained(str(aside))
    _generation_config(model, exported, manifest).save_pretrained(str(aside))
    _write_run(aside, base_model=base_model, manifest=manifest, run=run)
    write_readme(aside, base_model, is_adapter=isinstance(model, PeftModel))
    apply_umask(aside)
    write_folder_manifest(str(aside))
    swap_folder(str(aside), target)
    return target


def final_output_path(local_output: str) -> str:
    """Where the result of a run is."""
    return os.path.join(local_output, FINAL_OUTPUT)


def prompt_ids(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[dict[str, Any]],
    *,
    contexts: Sequence[str] = (),
    tools: Sequence[Any] = (),
) -> list[int]:
    """The ids that inference sees for a row: `messages` and `contexts` through the tokenizer's chat template."""
    ids = tokenizer.apply_chat_template(
        messages,
        tools=list(tools) or None,
        documents=[{"text": context} for context in contexts] or None,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=False,
    )
    return list(ids)


def _check_prompt(tokenizer: PreTrainedTokenizerBase, sample: Sample) -> None:
    where = f"the exported chat template, for the input {str(sample.messages[-1].get('content'))[:60]!r}"
    remedy = "Nothing was exported, the checkpoints are untouched. Prepare the data again with this llm-train."
    try:
        served = prompt_ids(tokenizer, sample.messages, contexts=sample.contexts, tools=sample.tools)
    except (ValueError, jinja2.TemplateError) as error:  # no template, or one that refuses
        raise CheckpointError(f"{where} gives no prompt ({error}). {remedy}") from error
    trained = sample.prompt_ids
    if served == trained:
        return
    pairs = zip(served, trained, strict=False)
    at = next((n for n, (left, right) in enumerate(pairs) if left != right), min(len(served), len(trained)))
    raise CheckpointError(
        f"{where}, does not give the prompt that was trained: from token {at} on it is "
        f"{_show(tokenizer, served, at)}, in training it was {_show(tokenizer, trained, at)}. {remedy}"
    )


def _show(tokenizer: PreTrainedTokenizerBase, ids: list[int], at: int) -> str:
    some = ids[at : at + 8]
    return f"{tokenizer.decode(some)!r} (ids {some})" if some else "the end"


def _save_weights(model: PreTrainedModel | PeftModel, folder: Path, base_model: str) -> None:
    if isinstance(model, PeftModel):
        for config in model.peft_config.values():
            config.base_model_name_or_path = base_model  # not the cache folder that it was loaded from
        # We never resize embeddings; to find that out, peft would ask the hub for the base's config.
        model.save_pretrained(str(folder), save_embedding_layers=False)
    else:
        model.save_pretrained(str(folder))


def _generation_config(
    model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, manifest: Manifest | None
) -> GenerationConfig:
    """The base model's own, that stops at the trained stop token too, and decodes greedily unless it says
    otherwise.
    """
    plain = model.get_base_model() if isinstance(model, PeftModel) else model
    base = getattr(plain, "generation_config", None)
    config = copy.deepcopy(base) if base is not None else GenerationConfig()
    own = config.eos_token_id if config.eos_token_id is not None else []
    stops = ([manifest.stop_token_id] if manifest else []) + (list(own) if isinstance(own, list) else [own])
    config.eos_token_id = list(dict.fromkeys(stops)) or tokenizer.eos_token_id
    if config.pad_token_id is None:
        has_pad = tokenizer.pad_token_id is not None
        config.pad_token_id = tokenizer.pad_token_id if has_pad else next(iter(stops), None)
    if not config.do_sample:
        for name in SAMPLING:
            setattr(config, name, None)
    return config


def _write_run(folder: Path, *, base_model: str, manifest: Manifest | None, run: dict[str, Any]) -> None:
    content = {
        "base_model": base_model,
        **run,
        "data": asdict(manifest) if manifest else None,
        "versions": package_versions(),
    }
    (folder / "run.json").write_text(json.dumps(content, indent=1, ensure_ascii=False), encoding="utf-8")
    if "config" in run:
        (folder / "finetune.yaml").write_text(saved_text(run["config"], "finetune"), encoding="utf-8")


_ASK = """\
prompt = tokenizer.apply_chat_template(
    [{"role": "user", "content": question}], add_generation_prompt=True, return_dict=True, return_tensors="pt"
)
ids = model.generate(**prompt, max_new_tokens=200)[0, prompt["input_ids"].shape[1] :]
print(tokenizer.decode(ids, skip_special_tokens=True))
"""


def write_readme(folder: Path, base_model: str, *, is_adapter: bool) -> None:
    """How to load the folder; over peft's model card, which is a form of empty headings and cannot be turned off."""
    load = (
        "from peft import AutoPeftModelForCausalLM\n"
        "from transformers import AutoTokenizer, GenerationConfig\n\n"
        "model = AutoPeftModelForCausalLM.from_pretrained(this_folder)\n"
        "# Else it stops only where its base model does: nothing reads an adapter's generation config by itself.\n"
        "model.generation_config = GenerationConfig.from_pretrained(this_folder)"
        if is_adapter
        else "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        "model = AutoModelForCausalLM.from_pretrained(this_folder)"
    )
    merge = "\n`llm-train merge this_folder merged` makes a whole model of adapter and base, for servers that need one."
    text = (
        f"# {'Adapter' if is_adapter else 'Model'} tuned from {base_model}\n\nMade by llm-train.\n\n"
        f"```python\n{load}\ntokenizer = AutoTokenizer.from_pretrained(this_folder)\n```\n\n"
        f"```python\n{_ASK}```\n\n"
        "The chat template makes the prompts that were trained (contexts go in as `documents=[{'text': ...}]`)."
        f"{merge if is_adapter else ''}\n`run.json` says which data, settings and versions made it; "
        "`manifest.json` holds sizes and hashes of the files.\n"
        "What it does well or badly was not written down: evaluate it before use.\n"
    )
    (folder / "README.md").write_text(text, encoding="utf-8")


def apply_umask(folder: Path) -> None:
    """Gives every file the mode of the umask: safetensors makes them readable by the owner only."""
    mode = folder.stat().st_mode & 0o666  # `mkdir` applied the umask
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(mode)
