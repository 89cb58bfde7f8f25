"""A new user's first ten minutes, typed for real: writes docs/first_ten_minutes.md.

    python examples/quickstart/base_model.py       (once: the model)
    python examples/first_ten_minutes.py

Every command runs in a fresh folder, mistakes included; what is printed, its exit code and how long it took are written
down. Standard output and error are one pipe, so that the progress bars of a terminal are lines or left out.
"""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MODEL = ROOT / ".cache" / "SmolLM2-135M-Instruct"
SOURCE = ROOT / "examples" / "quickstart" / "train.jsonl"
RECORDING = ROOT / "docs" / "first_ten_minutes.md"
NUM_ROWS = 120
SHORT_RUN = (
    "--set training_arguments.max_steps=24 --set training_arguments.per_device_train_batch_size=1 "
    "--set training_arguments.gradient_accumulation_steps=1 --set training_arguments.logging_steps=4 "
    "--set training_arguments.learning_rate=1e-3"
)
ASK = """\
import json

row = json.loads(open("holidays.jsonl").readline())
question, contexts = row["question"], row["contexts"]
this_folder = "output/model/final_output"

"""
ASKED = """
print("asked: ", question)
print("wanted:", row["answer"])
"""


@dataclass(frozen=True, kw_only=True)
class Step:
    """What is typed, after what thought; `interrupt_at`: Ctrl-C once a line begins with this."""

    say: str
    type: str
    interrupt_at: str | None = None


STEPS = (
    Step(say="What can it do?", type="llm-train --help"),
    Step(say="The rows: questions about holidays, with two sources each.", type="wc -l holidays.jsonl"),
    Step(say="", type="head -n 1 holidays.jsonl"),
    Step(
        say="Two YAML files for them. The columns are called `question` and `answer`: `init` sees what they are.",
        type="llm-train init holidays.jsonl --base-model SmolLM2-135M-Instruct",
    ),
    Step(say="", type="cat dataprep.yaml"),
    Step(
        say="**First mistake: a misspelt key.** These rows are short, so smaller blocks will do.",
        type="sed -i 's/^chunksize: 2048/chunk_size: 448/' dataprep.yaml; llm-train dataprep dataprep.yaml",
    ),
    Step(
        say="**Second mistake: a column that is not there.**",
        type='sed -i \'s/^chunk_size/chunksize/; s/: "question"/: "qestion"/\' dataprep.yaml; '
        "llm-train dataprep dataprep.yaml",
    ),
    Step(
        say="**Third mistake: a row with a number where text belongs.**",
        type='sed -i \'s/"qestion"/"question"/\' dataprep.yaml; '
        'sed -i \'7s/"answer": ".*"/"answer": 2021/\' holidays.jsonl; llm-train dataprep dataprep.yaml',
    ),
    Step(
        say="Mended. What will be trained?", type="sed -i 7d holidays.jsonl; llm-train inspect dataprep.yaml --rows 1"
    ),
    Step(say="", type="llm-train dataprep dataprep.yaml"),
    Step(
        say="A short run, and Ctrl-C in its middle.",
        type=f"llm-train finetune finetune.yaml {SHORT_RUN}",
        interrupt_at="step 8/",
    ),
    Step(say="The same command goes on.", type=f"llm-train finetune finetune.yaml {SHORT_RUN}"),
    Step(
        say="Asked as `final_output/README.md` says, with the contexts as documents.", type="cat ask.py; python ask.py"
    ),
)


def write_rows(folder: Path) -> None:
    """What the user brings: rows with other column names, and the model."""
    rows = [json.loads(line) for line in SOURCE.read_text(encoding="utf-8").splitlines()[:NUM_ROWS]]
    renamed = [{"question": row["input"], "contexts": row["contexts"], "answer": row["response"]} for row in rows]
    (folder / "holidays.jsonl").write_text("".join(json.dumps(row) + "\n" for row in renamed), encoding="utf-8")
    (folder / MODEL.name).symlink_to(MODEL)


def write_ask(folder: Path) -> None:
    """`ask.py`: the lines of the result's own README, for the first row with its contexts."""
    readme = (folder / "output/model/final_output/README.md").read_text(encoding="utf-8")
    lines = "\n".join(re.findall(r"```python\n(.*?)```", readme, re.DOTALL))
    with_contexts = lines.replace("add_gen", 'documents=[{"text": text} for text in contexts], add_gen')
    (folder / "ask.py").write_text(ASK + with_contexts + ASKED, encoding="utf-8")


def run(step: Step, folder: Path) -> str:
    """The Markdown of one step: what was thought, typed and printed, the exit code and the seconds."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    # A terminal's width, threads that sleep, no bytes of Python in between.
    environment = os.environ | {"PATH": path, "COLUMNS": "100", "OMP_WAIT_POLICY": "PASSIVE", "PYTHONUNBUFFERED": "1"}
    started = time.monotonic()
    process = subprocess.Popen(
        ["bash", "-c", step.type],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,  # as in a terminal: Ctrl-C goes to the command's own group
    )
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line.rstrip())
        if step.interrupt_at and line.startswith(step.interrupt_at):
            lines.append("^C")
            os.killpg(process.pid, signal.SIGINT)
    code = process.wait()
    seconds = time.monotonic() - started
    printed = without_machine("\n".join(lines), folder)
    exit_text = f", exit code {code % 256}" if code else ""
    return f"{step.say}\n\n```\n$ {step.type}\n{printed}\n```\n\n{seconds:.1f} s{exit_text}\n".lstrip("\n")


def without_machine(text: str, folder: Path) -> str:
    """The text with `~/holidays` for the folder that it ran in, and no process numbers."""
    text = re.sub(r"process \d+", "process 4711", text)
    for path in (folder.resolve(), folder):
        text = text.replace(str(path), "~/holidays")
    return text.replace(sys.prefix, "~/venv").replace(str(ROOT), "~/llm-train")


def record(steps: Sequence[Step]) -> list[str]:
    """The Markdown of each step, run one after the other in a fresh folder."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_rows(folder)
        texts = []
        for step in steps:
            if "ask.py" in step.type:
                write_ask(folder)
            texts.append(run(step, folder))
            print(texts[-1], flush=True)
        return texts


def main() -> int:
    """Record and write; 2 when the model is not there."""
    argparse.ArgumentParser(description="Record a new user's first ten minutes.").parse_args()
    if not MODEL.is_dir():
        print(f"{MODEL} is not there: python examples/quickstart/base_model.py makes it", file=sys.stderr)
        return 2
    started = time.monotonic()
    texts = record(STEPS)
    minutes, load = (time.monotonic() - started) / 60, os.getloadavg()[2]
    head = f"""\
# The first ten minutes

What a new user types and sees, with three typical mistakes, recorded by `python examples/first_ten_minutes.py` on
{os.cpu_count()} cores without a GPU, {minutes:.0f} minutes in all, beside other work (load average {load:.0f}).
Output went through a pipe: on a terminal there are progress bars with rate and remaining time.

"""
    RECORDING.parent.mkdir(exist_ok=True)
    RECORDING.write_text(head + "\n".join(texts), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
