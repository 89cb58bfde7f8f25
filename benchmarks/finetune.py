"""Fine-tuning: ours, TRL's SFTTrainer and a plain padded Trainer on the same rows, in turns, and what they cost.

    python benchmarks/finetune.py --gsm8k FILE --pubmedqa FILE [--trl-python PATH] [--dtype bfloat16] [--repetitions 3]
    python benchmarks/finetune.py --gsm8k FILE --quality [--trl-python PATH]

Needs `python examples/quickstart/base_model.py` once (or `--model`). FILE: parquet with `input`, `response` and maybe
`contexts`. `--trl-python`: the Python of another environment (`pip install torch==2.13.0 trl==1.16.0 peft==0.21.2`);
without it only the plain Trainer is compared. On a GPU: add `--device cuda` (written for it, never run on one).

    ours            blocks of `chunksize` as dataprep packs them (share_prefixes: auto), one at a time
    ours, repeated  the same with `share_prefixes: false`, where that differs
    TRL default     padded batches, gradient checkpointing
    TRL packed      best-fit decreasing, padding-free with `position_ids`, sdpa; no checkpointing
    TRL single      one row a batch, so without padding; no checkpointing
    Trainer padded  Hugging Face's Trainer with DataCollatorForSeq2Seq

All sides: same base model and dtype, LoRA r 16 on all linear layers, AdamW, the same ids and labels, one optimizer step
over all rows of the task (the mean over their trained tokens), which is repeated `--passes` times; so their losses must
agree, in the second pass too. Each repetition runs every side once, each in a fresh process; seconds are those of
`trainer.train()`, memory is the peak of the process (of the device on CUDA), with model and imports. On a machine that
does other work too, compare the processor's time: it is what a side computed, whoever else was waiting.

`--quality`: one epoch over 200 rows by ours, TRL packed and the plain Trainer; then all are evaluated by the same code
on 50 other rows.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from dataprep import ROOT, print_machine, ratio, shown

SIDES = ROOT / "benchmarks" / "finetune_sides.py"
CPU_FLAGS = ("avx512_bf16", "amx_bf16", "bf16")
_COLUMNS = ("side", "rows/s", "trained tok/s", "seconds", "cpu s", "peak MB", "computed tok", "steps", "loss")


@dataclass(frozen=True, kw_only=True)
class Task:
    """Rows and how they are batched; `shots`: that many first rows of the file are a few-shot prompt."""

    name: str
    num_rows: int
    chunksize: int
    padded_batch: int
    shots: int = 0
    num_eval_rows: int = 0


TASKS = {
    "gsm8k": Task(name="gsm8k", num_rows=16, chunksize=2048, padded_batch=8),
    # Two padded rows are about what a block holds: eight would take 19 GB in float32 without checkpointing.
    "pubmedqa": Task(name="pubmedqa", num_rows=8, chunksize=4096, padded_batch=2, shots=3),
}
QUALITY = Task(name="gsm8k", num_rows=200, chunksize=2048, padded_batch=8, num_eval_rows=50)


@dataclass
class Side:
    """All runs of one side: what each printed."""

    name: str
    program: str
    blocks: str = "shared"
    batch_size: int = 1
    rows_a_step: int = 0
    runs: list[dict[str, Any]] = field(default_factory=list)

    def values(self, name: str) -> list[float]:
        return [float(run[name]) for run in self.runs]

    def median(self, name: str) -> float:
        return statistics.median(self.values(name))


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """Files of a task: blocks with shared and with repeated prompts, single examples as JSON."""

    blocks: Mapping[str, str]
    num_blocks: Mapping[str, int]
    rows: str
    eval_rows: str
    num_tokens: int
    num_trained: int
    is_shared: bool


def main() -> None:
    given = parsed()
    print_machine()
    print(f"OMP_WAIT_POLICY {os.environ.get('OMP_WAIT_POLICY', 'not set')}")
    if given.dtype == "bfloat16" and given.device == "cpu":
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8").split() if Path("/proc/cpuinfo").exists() else []
        found = [flag for flag in CPU_FLAGS if flag in flags]
        print(f"bfloat16: this CPU has {found[0]}" if found else "bfloat16: EMULATED by this CPU, up to 25 x slower")
    for name in ("gsm8k", "pubmedqa"):
        source = getattr(given, name)
        if source is None or (given.quality and name != QUALITY.name):
            continue
        task = QUALITY if given.quality else replace(TASKS[name], num_rows=given.rows or TASKS[name].num_rows)
        with tempfile.TemporaryDirectory() as folder:
            prepared = prepare(task, source, Path(folder), given.model)
            sides = chosen_sides(task, prepared, given)
            for repetition in range(given.repetitions):
                for side in sides if repetition % 2 == 0 else reversed(sides):
                    side.runs.append(run(side, job(task, side, prepared, given, folder), folder, given.trl_python))
                    print(f"  {side.name}: {json.dumps(side.runs[-1])}", file=sys.stderr)  # kept when the rest is not
            print_table(task, prepared, sides, given)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Fine-tuning against TRL and the plain Trainer")
    parser.add_argument("--gsm8k", type=Path, help="parquet of rows")
    parser.add_argument("--pubmedqa", type=Path, help="parquet of rows; the first three become a few-shot prompt")
    parser.add_argument("--trl-python", default=os.environ.get("TRL_PYTHON"))
    parser.add_argument("--model", default=str(ROOT / ".cache" / "SmolLM2-135M-Instruct"))
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--attention", default="sdpa", help="of TRL and the plain Trainer, e.g. flash_attention_2")
    parser.add_argument("--rows", type=int, help="of the task, and so of a step; else 16 of GSM8K, 8 of PubMedQA")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--passes", type=int, default=1, help="optimizer steps of a run, each over all rows")
    parser.add_argument("--sides", nargs="+", help="only these, e.g. --sides ours 'TRL packed'")
    parser.add_argument("--quality", action="store_true")
    given = parser.parse_args()
    if not given.gsm8k and not given.pubmedqa:
        parser.error("no rows: give --gsm8k or --pubmedqa")
    if given.quality:
        given.repetitions = 1
    return given


def chosen_sides(task: Task, prepared: Prepared, given: argparse.Namespace) -> list[Side]:
    sides = [Side("ours", "ours")]
    if prepared.is_shared:
        sides.append(Side("ours, repeated", "ours", blocks="repeated"))
    if given.trl_python:
        sides += [Side("TRL packed", "trl-packed"), Side("TRL single", "trl-single")]
        sides.append(Side("TRL default", "trl-padded", batch_size=task.padded_batch))
    sides.append(Side("Trainer padded", "trainer", batch_size=task.padded_batch))
    wanted = given.sides or (["ours", "TRL packed", "Trainer padded"] if given.quality else [])
    return [side for side in sides if not wanted or side.name in wanted]


def prepare(task: Task, source: Path, folder: Path, model: str) -> Prepared:
    """Three data sets by the user's command: shared prompts, repeated prompts, single examples."""
    base = {"base_model": model, "chunksize": task.chunksize, "on_too_long": "error"}
    base["prompt_config"] = {"method": "Prompt", "kwargs": few_shot(task, source)}
    num_all = task.shots + task.num_rows + task.num_eval_rows
    splits = {"train": f"train[{task.shots}:{task.shots + task.num_rows}]", "eval": f"train[-{num_all}:]"}
    kinds: dict[str, dict[str, Any]] = {
        "shared": {"share_prefixes": "auto"},
        "repeated": {"share_prefixes": False},
        "single": {"pack": False, "share_prefixes": False, "pad_to_chunksize": False},
    }
    if task.num_eval_rows:
        splits["eval"] = f"train[-{task.num_eval_rows}:]"
        kinds["eval"] = kinds["single"]
    counts = {}
    for kind, settings in kinds.items():
        split = splits["eval" if kind == "eval" else "train"]
        rows = {"path": "parquet", "data_files": str(source.resolve()), "split": split}
        writer = {"method": "save_to_disk", "kwargs": {"dataset_path": str(folder / kind)}}
        if kind in ("single", "eval"):
            writer = {"method": "to_json", "kwargs": {"path_or_buf": str(folder / f"{kind}.jsonl")}}
        config = folder / f"{kind}.yaml"
        text = base | settings | {"dataset_writer_config": writer}
        text["source_config"] = {"method": "load_dataset", "kwargs": rows}
        config.write_text(json.dumps(text), encoding="utf-8")
        called([sys.executable, "llm/training/dataprep.py", str(config)], folder)
        if kind in ("shared", "repeated"):
            counts[kind] = json.loads((folder / kind / "manifest.json").read_text(encoding="utf-8"))["counts"]
    examples = single_examples(folder / "single.jsonl")
    return Prepared(
        blocks={kind: str(folder / kind) for kind in counts},
        num_blocks={kind: count["blocks"] for kind, count in counts.items()},
        rows=written(folder / "rows.json", examples),
        eval_rows=written(folder / "eval.json", single_examples(folder / "eval.jsonl")) if task.num_eval_rows else "",
        num_tokens=sum(len(example["input_ids"]) for example in examples),
        num_trained=sum(label >= 0 for example in examples for label in example["labels"]),
        is_shared=counts["shared"]["stored_tokens"] < counts["repeated"]["stored_tokens"],
    )


def few_shot(task: Task, source: Path) -> dict[str, Any]:
    """The first rows of the file as the examples of a `Prompt`; read in another process, to keep this one small."""
    if not task.shots:
        return {}
    code = "import json, sys, pyarrow.parquet as p; print(json.dumps(p.read_table(sys.argv[1]).to_pylist()[:3]))"
    code = code.replace("3", str(task.shots))
    read = subprocess.run([sys.executable, "-c", code, str(source)], capture_output=True, text=True, check=True)
    names = ("input", "response", "contexts")
    return {"examples": [{name: row[name] for name in names} for row in json.loads(read.stdout)]}


def single_examples(path: Path) -> list[dict[str, list[int]]]:
    lines = path.read_text(encoding="utf-8").splitlines()
    return [{name: json.loads(line)[name] for name in ("input_ids", "labels")} for line in lines]


def written(path: Path, value: Any) -> str:
    path.write_text(json.dumps(value), encoding="utf-8")
    return str(path)


def job(task: Task, side: Side, prepared: Prepared, given: argparse.Namespace, folder: str) -> dict[str, Any]:
    """What a side is told. One step a pass (accumulation ends with the rows), or for quality 16 rows a step, or two
    blocks, which hold about as many."""
    accumulation = task.num_rows
    if given.quality:
        accumulation = 2 if side.program != "trl-single" else 16
    return {
        "model": given.model,
        "dtype": given.dtype,
        "device": given.device,
        "attention": given.attention,
        "chunksize": task.chunksize,
        "blocks": prepared.blocks[side.blocks],
        "rows": prepared.rows,
        "eval_rows": prepared.eval_rows,
        "batch_size": side.batch_size,
        "accumulation": accumulation,
        "steps": -1 if given.quality else given.passes,
        "epochs": 1 if given.quality else given.passes,
        "learning_rate": 2e-4,
        "seed": 7,
        "output": f"{folder}/output",
    }


def run(side: Side, settings: Mapping[str, Any], folder: str, trl_python: str | None) -> dict[str, Any]:
    path = Path(folder, "job.json")
    path.write_text(json.dumps(settings), encoding="utf-8")
    python = trl_python if side.program.startswith("trl") and trl_python else sys.executable
    lines = called([python, str(SIDES), side.program, str(path)], Path(folder)).strip().splitlines()
    found: dict[str, Any] = json.loads(lines[-1])
    return found


def called(program: Sequence[str], folder: Path) -> str:
    """What `program` prints. Nothing is downloaded."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(folder / "cache")}
    ended = subprocess.run(program, cwd=ROOT, env=environment, capture_output=True, text=True)
    if ended.returncode:
        raise SystemExit(f"{' '.join(program)} failed:\n{ended.stderr[-4000:]}")
    return ended.stdout


def print_table(task: Task, prepared: Prepared, sides: Sequence[Side], given: argparse.Namespace) -> None:
    shots = f", {task.shots}-shot prompt" if task.shots else ""
    counts = f"{prepared.num_tokens:,} tokens, {prepared.num_trained:,} trained; chunksize {task.chunksize}"
    print(f"\n{task.name}: {task.num_rows} rows{shots}, {counts}; {given.dtype} on {given.device}")
    print(f"medians of {given.repetitions} repetitions in turns, a fresh process each")
    lines = [_COLUMNS, *(line(task, prepared, side) for side in sides)]
    widths = [max(len(one[n]) for one in lines) for n in range(len(_COLUMNS))]
    for one in lines:
        cells = [one[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(one[1:], widths[1:], strict=True))]
        print("  " + "  ".join(cells))
    print_ratios(sides)
    for side in sides:
        seconds = ", ".join(f"{value:.1f}" for value in side.values("seconds"))
        losses = ", ".join(f"{loss:.4f}" for loss in side.runs[0]["losses"])
        print(f"  all runs of {side.name}: {seconds} s; losses {losses}; {shown(side.runs[0]['versions'])}")
    if task.num_eval_rows:
        for side in sides:
            print(
                f"  evaluation loss of {side.name} on {task.num_eval_rows} other rows: {side.runs[0]['eval_loss']:.4f}"
            )


def line(task: Task, prepared: Prepared, side: Side) -> tuple[str, ...]:
    steps = side.runs[0]["steps"]
    passes = 1 if task.num_eval_rows else steps
    seconds = side.median("seconds")
    return (
        side.name,
        f"{task.num_rows * passes / seconds:.3f}",
        f"{prepared.num_trained * passes / seconds:.1f}",
        f"{seconds:.1f}",
        f"{side.median('cpu_seconds'):.1f}",
        f"{side.median('peak_bytes') / 2**20:,.0f}",
        f"{side.runs[0]['computed_tokens']:,}",
        str(steps),
        f"{side.runs[0]['losses'][0]:.4f}",
    )


def print_ratios(sides: Sequence[Side]) -> None:
    """How much faster each of ours is than each other side: medians of the ratios of what ran in the same round."""
    for mine in (side for side in sides if side.program == "ours"):
        for other in (side for side in sides if side.program != "ours"):
            wall, cpu = (ratio(other.values(name), mine.values(name)) for name in ("seconds", "cpu_seconds"))
            memory = other.median("peak_bytes") / mine.median("peak_bytes")
            print(f"  {mine.name} is {wall:.2f} x {other.name} (cpu time {cpu:.2f} x; its peak memory {memory:.2f} x)")


if __name__ == "__main__":
    main()
