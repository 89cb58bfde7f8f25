"""What `benchmarks/dataprep.py` starts: one side in its own process, whose last line is what it found, as JSON.

    python benchmarks/dataprep_sides.py bare CORPUS MODEL tokenizers|fastokens
    python benchmarks/dataprep_sides.py ours WARM_UP.yaml CONFIG.yaml
    python benchmarks/dataprep_sides.py trl  CORPUS MODEL CHUNKSIZE NUM_PROC

`net_seconds` is without imports. `bare` imports nothing but `tokenizers`; `trl` runs where llm-train is not installed.
"""

import json
import os
import sys
import tempfile
import time
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

# Said once for each message: ChatML whose line break stands before a message, so that a text ends with its stop token.
CHATML = (
    "{% for message in messages %}{% if not loop.first %}{{ '\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '\n<|im_start|>assistant\n' }}{% endif %}"
)
_AT_ONCE = 1000


def main() -> None:
    sides = {"bare": bare, "ours": ours, "trl": trl}
    found = sides[sys.argv[1]](*sys.argv[2:])
    print(json.dumps(found))


def bare(corpus: str, model: str, library: str) -> dict[str, Any]:
    """The library over the rendered texts, all threads, a thousand texts at once; ids are not handed to Python.

    What all texts begin with, up to a control token, is tokenized once.
    """
    tokenizer = import_module(library).Tokenizer.from_file(f"{model}/tokenizer.json")
    with open(f"{corpus}/texts.jsonl", encoding="utf-8") as file:
        texts = [json.loads(line) for line in file]
    opening = os.path.commonprefix([min(texts), max(texts)])
    opening = opening[: opening.rfind("<|im_start|>")]
    texts = [opening, *(text.removeprefix(opening) for text in texts)]
    start = time.perf_counter()
    tokens = 0
    for first in range(0, len(texts), _AT_ONCE):
        part = texts[first : first + _AT_ONCE]
        if library == "fastokens":
            tokens += len(tokenizer.encode_batch_flat(part, add_special_tokens=False)[0]) // 4
        else:
            tokens += sum(map(len, tokenizer.encode_batch_fast(part, add_special_tokens=False)))
    seconds = time.perf_counter() - start
    tokens += (len(texts) - 2) * len(tokenizer.encode(opening, add_special_tokens=False))
    return {"net_seconds": seconds, "tokens": tokens, "versions": {library: version(library)}}


def ours(warm_up: str, config: str) -> dict[str, Any]:
    """Our command once more in a process that has imported everything it needs, by preparing a few rows."""
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    from llm.cli import dataprep

    dataprep(warm_up)
    start = time.perf_counter()
    dataprep(config)
    return {"net_seconds": time.perf_counter() - start}


def trl(corpus: str, model: str, chunksize: str, num_proc: str) -> dict[str, Any]:
    """TRL's own preparation: what `SFTTrainer` does with conversational prompts and completions until it could train.

    The model has a few hundred weights for each token and is made before the clock starts, as are all imports.
    """
    import torch
    from datasets import disable_progress_bars, load_dataset
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer

    torch.set_num_threads(1)
    disable_progress_bars()
    small = LlamaConfig(
        vocab_size=50_000, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    tiny = LlamaForCausalLM(small)
    with tempfile.TemporaryDirectory() as output:
        start = time.perf_counter()
        tokenizer = AutoTokenizer.from_pretrained(model)
        tokenizer.chat_template = CHATML
        rows = load_dataset("parquet", data_files=f"{corpus}/trl.parquet", split="train")
        settings = SFTConfig(
            output_dir=output,
            max_length=int(chunksize),
            packing=True,
            packing_strategy="bfd",
            completion_only_loss=True,
            dataset_num_proc=int(num_proc) if int(num_proc) > 1 else None,  # None: in this process, without a copy
            report_to="none",
            use_cpu=True,
            bf16=False,
            disable_tqdm=True,
        )
        trainer = SFTTrainer(model=tiny, args=settings, train_dataset=rows, processing_class=tokenizer)
        seconds = time.perf_counter() - start
    packed = trainer.train_dataset
    tokens = sum(map(sum, packed.with_format("arrow")[:]["seq_lengths"].to_pylist()))
    names = ("trl", "transformers", "datasets", "tokenizers", "torch")
    versions = {name: version(name) for name in names}
    return {"net_seconds": seconds, "tokens": tokens, "blocks": len(packed), "versions": versions}


if __name__ == "__main__":
    main()
