"""Data preparation: ours, TRL's and the bare tokenizer on the same rows, in turns, and what they cost.

    python benchmarks/dataprep.py [--data FOLDER] [--trl-python PATH] [--rows 20000 100000 200000] [--repeats 3]
    python benchmarks/dataprep.py --memory [--rows 20000 200000]

Needs `python examples/quickstart/base_model.py` once. `--data`: parquet files with `input`, `contexts`, `response`, of
whose text half of the rows is made (dataprep_corpus.py says how). `--trl-python`: the Python of another environment,
with TRL (`pip install torch==2.13.0 trl==1.16.0`); without it that side is left out, as it is above `--trl-most` rows.

    ours    `python llm/training/dataprep.py X.yaml`: ChatML, blocks of 2048, saved with ledger, report and manifest;
            once with the model's tokenizer, once with fastokens (extra `fast`)
    TRL     `SFTTrainer` with packing (best-fit decreasing), up to where it could train; nothing is saved but its cache.
            One and two processes; from the second size on only what was faster
    bare    `encode_batch_fast` on the rendered texts, all threads, what all begin with once; and the same of fastokens

Net seconds are without imports (ours: prepared again in a process that has prepared a few rows), whole seconds and peak
memory are those of the process from start to end. Peak memory is the process's own peak, or with more than one process
the highest sum of their shares (PSS). No side sees rows that an earlier run left in a cache; ours finds the tokenizer
that its first start built (4 s).
"""

import argparse
import hashlib
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SIDES = ROOT / "benchmarks" / "dataprep_sides.py"
CHUNKSIZE = 2048
_POLL_SECONDS = 0.02
_SPEED = ["rows/s", "tokens/s", "net s", "x bare", "whole s", "cpu s", "peak MB"]
_COLUMNS = ["side", *_SPEED, "tokens", "stored", "blocks", "bound", "over", "density"]


@dataclass(frozen=True, kw_only=True)
class Run:
    """One process: its seconds from start to end, seconds of all its cores, peak memory, and what it printed."""

    whole_seconds: float
    cpu_seconds: float
    peak_mb: float
    peak_own_mb: float  # without pages of files, which the system takes back when it needs them
    facts: dict[str, Any]


@dataclass
class Side:
    """All runs of one side over one corpus."""

    name: str
    runs: list[Run] = field(default_factory=list)
    net_seconds: list[float] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Task:
    """One corpus, and the folders and settings that all sides share."""

    num_rows: int
    corpus: Path
    folder: Path
    model: str
    trl_python: str | None


def main() -> None:
    parser = argparse.ArgumentParser(description="Data preparation against TRL and the bare tokenizer")
    parser.add_argument("--rows", type=int, nargs="+")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--model", default=str(ROOT / ".cache" / "SmolLM2-135M-Instruct"))
    parser.add_argument("--trl-python", default=os.environ.get("TRL_PYTHON"))
    parser.add_argument("--trl-most", type=int, default=100_000)
    parser.add_argument("--work", type=Path, default=ROOT / ".cache" / "benchmarks", help="keeps the corpora")
    parser.add_argument("--memory", action="store_true", help="only ours, and how its peak grows with the rows")
    given = parser.parse_args()
    if not Path(given.model, "tokenizer.json").is_file():
        parser.error(f"no tokenizer.json in {given.model}: run examples/quickstart/base_model.py")
    print_machine()
    sizes = given.rows or ([20_000, 200_000] if given.memory else [20_000, 100_000, 200_000])
    num_procs: Sequence[int] = (1, 2)
    peaks = []
    for num_rows in sizes:
        corpus = made_corpus(given.work.resolve(), num_rows, given.seed, given.data)
        has_trl = bool(given.trl_python) and num_rows <= given.trl_most and not given.memory
        with tempfile.TemporaryDirectory(dir=given.work) as folder:
            task = Task(
                num_rows=num_rows,
                corpus=corpus,
                folder=Path(folder).resolve(),
                model=given.model,
                trl_python=given.trl_python if has_trl else None,
            )
            if given.memory:
                peaks.append([run_ours(task) for _ in range(given.repeats)])
                continue
            sides = compared(task, given.repeats, num_procs)
        print_table(task, sides)
        if has_trl and len(num_procs) > 1:
            num_procs = (fastest(sides[4:]).facts["num_proc"],)
        elif not has_trl:
            reason = "no --trl-python" if not given.trl_python else f"over --trl-most {given.trl_most}"
            print(f"  TRL left out: {reason}")
    if given.memory:
        print_memory(sizes, peaks)


def compared(task: Task, repeats: int, num_procs: Sequence[int]) -> list[Side]:
    """Every side `repeats` times, in turns."""
    sides = [Side("bare"), Side("bare, fast"), Side("ours"), Side("ours, fast")]
    if task.trl_python:
        sides += [Side(f"TRL, {n} proc", facts={"num_proc": n}) for n in num_procs]
    for _ in range(repeats):
        for bare, library in zip(sides[:2], ("tokenizers", "fastokens"), strict=True):
            program = [sys.executable, str(SIDES), "bare", str(task.corpus), task.model, library]
            add(bare, measured(program, task.folder))
        for side, is_fast in zip(sides[2:4], (False, True), strict=True):
            add(side, run_ours(task, is_fast=is_fast))
            program = [sys.executable, str(SIDES), "ours", *map(str, configs(task, is_fast=is_fast))]
            side.net_seconds.append(measured(program, task.folder).facts["net_seconds"])
        for side in sides[4:]:
            program = [str(task.trl_python), str(SIDES), "trl", str(task.corpus), task.model, str(CHUNKSIZE)]
            add(side, measured([*program, str(side.facts["num_proc"])], task.folder))
    return sides


def add(side: Side, run: Run) -> None:
    side.runs.append(run)
    side.facts |= run.facts
    if "net_seconds" in run.facts:
        side.net_seconds.append(run.facts["net_seconds"])


def run_ours(task: Task, *, is_fast: bool = False) -> Run:
    """The command that a user gives; its facts are those of the manifest."""
    warm_up, config = configs(task, is_fast=is_fast)
    if not kept_tokenizers(task.folder).exists():
        measured([sys.executable, "llm/training/dataprep.py", str(warm_up)], task.folder)
    run = measured([sys.executable, "llm/training/dataprep.py", str(config)], task.folder)
    manifest = json.loads((task.folder / "prepared" / "manifest.json").read_text(encoding="utf-8"))
    facts = manifest["counts"] | {"versions": manifest["versions"]}
    return Run(**(vars(run) | {"facts": facts}))


def configs(task: Task, *, is_fast: bool) -> tuple[Path, Path]:
    """The YAML files (JSON is YAML) that prepare eight rows and the corpus."""
    found = []
    for name, split in (("warm_up", "train[:8]"), ("prepared", "train")):
        source = {"path": "parquet", "data_files": str(task.corpus / "ours.parquet"), "split": split}
        settings = {
            "source_config": {"method": "load_dataset", "kwargs": source},
            "base_model": task.model,
            "prompt_config": {"method": "Prompt", "kwargs": {"system_message": system_message(task.corpus)}},
            "prompt_format_config": {"method": "ChatMLFormat"},
            "chunksize": CHUNKSIZE,
            "fast_tokenizer": is_fast,
            "dataset_writer_config": {
                "method": "save_to_disk",
                "kwargs": {"dataset_path": str(task.folder / name)},
            },
            "overwrite": True,
        }
        path = task.folder / f"{name}.yaml"
        path.write_text(json.dumps(settings), encoding="utf-8")
        found.append(path)
    return found[0], found[1]


def system_message(corpus: Path) -> str:
    with open(corpus / "texts.jsonl", encoding="utf-8") as texts:
        return str(json.loads(next(texts))).split("<|im_end|>")[0].removeprefix("<|im_start|>system\n")


def made_corpus(work: Path, num_rows: int, seed: int, data: Path | None) -> Path:
    """The folder of the rows, made in its own process: a child's peak counts from its parent's size."""
    script = ROOT / "benchmarks" / "dataprep_corpus.py"
    texts = [(path.name, path.stat().st_size) for path in sorted(data.glob("*.parquet"))] if data else []
    made_of = repr([script.read_bytes(), platform.python_version(), texts])
    folder = work / f"dataprep-{num_rows}-{seed}-{hashlib.sha256(made_of.encode()).hexdigest()[:8]}"
    if not (folder / "done").exists():
        program = [sys.executable, str(script), str(folder)]
        program += ["--rows", str(num_rows), "--seed", str(seed), *(["--data", str(data)] if data else [])]
        subprocess.run(program, check=True)
        (folder / "done").touch()
    return folder


def kept_tokenizers(folder: Path) -> Path:
    return folder / "llm-train" / "tokenizers"


def measured(program: list[str], folder: Path) -> Run:
    """Runs `program` with caches in `folder` that are empty, but for the tokenizer that our first start built."""
    ours = kept_tokenizers(folder).parent
    for cache in (folder / "cache", ours / "rows", ours / "last"):
        shutil.rmtree(cache, ignore_errors=True)
    environment = os.environ | {
        "HF_DATASETS_CACHE": str(folder / "cache"),
        "LLM_TRAIN_CACHE": str(ours),
        "HF_HUB_OFFLINE": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
        "TMPDIR": str(folder),
    }
    with open(folder / "out", "w+", encoding="utf-8") as out, open(folder / "err", "w+", encoding="utf-8") as err:
        start = time.perf_counter()
        process = subprocess.Popen(program, cwd=ROOT, env=environment, stdout=out, stderr=err)
        peak, peak_own = 0.0, 0.0
        while not (ended := os.wait4(process.pid, os.WNOHANG))[0]:
            shares, own = memory_mb(process.pid)
            peak, peak_own = max(peak, shares), max(peak_own, own)
            time.sleep(_POLL_SECONDS)
        whole = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(ended[1])
        out.seek(0)
        err.seek(0)
        if process.returncode:
            raise SystemExit(f"{' '.join(program)} failed:\n{err.read()[-3000:]}")
        lines = out.read().strip().splitlines()
    usage = ended[2]
    unit = 1 << 20 if sys.platform == "darwin" else 1 << 10
    return Run(
        whole_seconds=whole,
        cpu_seconds=usage.ru_utime + usage.ru_stime,
        peak_mb=max(peak, usage.ru_maxrss / unit),
        peak_own_mb=peak_own,
        facts=json.loads(lines[-1]) if lines and lines[-1].startswith("{") else {},
    )


def memory_mb(pid: int) -> tuple[float, float]:
    """The memory of a process and its children now, and that part of it which is no file; 0 where there is no /proc."""
    pids = [pid, *children(pid)]
    shares = [memory_share_kb(one) for one in pids] if len(pids) > 1 else [status_kb(pid, "VmRSS")]
    return sum(shares) / 1024, sum(status_kb(one, "RssAnon") for one in pids) / 1024


def children(pid: int) -> Iterator[int]:
    for listing in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in read_text(listing).split():
            yield int(child)
            yield from children(int(child))


def memory_share_kb(pid: int) -> int:
    """What a process holds, pages that it shares with others divided among them."""
    return next(
        (int(line.split()[1]) for line in read_text(f"/proc/{pid}/smaps_rollup").splitlines() if line[:4] == "Pss:"), 0
    )


def status_kb(pid: int, name: str) -> int:
    lines = read_text(f"/proc/{pid}/status").splitlines()
    return next((int(line.split()[1]) for line in lines if line.startswith(f"{name}:")), 0)


def read_text(path: str | Path) -> str:
    """A file of /proc; empty when its process has just ended."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, ProcessLookupError):
        return ""


def print_machine() -> None:
    git = ["git", "-C", str(ROOT)]
    commit = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    dirty = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True).stdout.strip()
    names = [line.split(":")[1].strip() for line in read_text("/proc/cpuinfo").splitlines() if "model name" in line]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = next((int(line.split()[1]) >> 20 for line in read_text("/proc/meminfo").splitlines()), 0)
    print(f"commit {commit}{' + changes' if dirty else ''}, Python {platform.python_version()}, {platform.system()}")
    print(f"{cores} cores of {names[0] if names else platform.machine()}, {memory} GB, load {os.getloadavg()[0]:.1f}")


def print_table(task: Task, sides: Sequence[Side]) -> None:
    """A line for each side (medians), then all runs, then what the issue asks about."""
    bare, bare_fast, ours, ours_fast = sides[:4]
    lines = [_COLUMNS, *(line(task, side, bare_fast if side.name.endswith("fast") else bare) for side in sides)]
    widths = [max(len(one[n]) for one in lines) for n in range(len(_COLUMNS))]
    print(f"\n{task.num_rows:,} rows, blocks of {CHUNKSIZE}, medians of {len(ours.runs)} runs in turns")
    for one in lines:
        print(
            "  " + "  ".join([one[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(one[1:], widths[1:], strict=True))])
        )
    for side in sides:
        net = ", ".join(f"{seconds:.2f}" for seconds in side.net_seconds)
        whole = ", ".join(f"{run.whole_seconds:.2f}" for run in side.runs)
        print(f"  all runs of {side.name}: net {net}; whole {whole}; versions {shown(side.facts['versions'])}")
    for one in (ours, ours_fast) if len(sides) > 4 else ():
        best = fastest(sides[4:])
        net = ratio(best.net_seconds, one.net_seconds)
        whole = ratio(*([run.whole_seconds for run in side.runs] for side in (best, one)))
        print(f"  {best.name} / {one.name}: whole {whole:.1f} x, net {net:.1f} x (medians of the ratios, run by run)")
    if len({side.facts["tokens"] for side in sides}) > 1:
        print(
            "  note: the sides do not have equally many tokens (rows left out as too long, or characters without token)"
        )


def line(task: Task, side: Side, bare: Side) -> list[str]:
    net = statistics.median(side.net_seconds)
    tokens, blocks = side.facts["tokens"], side.facts.get("blocks")
    stored = side.facts.get("stored_tokens", tokens)  # after sharing
    bound = -(-stored // CHUNKSIZE)
    whole, cpu, peak = (
        statistics.median(getattr(run, name) for run in side.runs)
        for name in ("whole_seconds", "cpu_seconds", "peak_mb")
    )
    speed = [f"{task.num_rows / net:,.0f}", f"{tokens / net:,.0f}", f"{net:.2f}"]
    costs = [f"{ratio(side.net_seconds, bare.net_seconds):.2f}", f"{whole:.2f}", f"{cpu:.2f}", f"{peak:,.0f}"]
    packed = (
        [f"{stored:,}", f"{blocks:,}", f"{bound:,}", f"{blocks / bound:.4f}", f"{stored / (blocks * CHUNKSIZE):.2%}"]
        if blocks
        else [""] * 5
    )
    return [side.name, *speed, *costs, f"{tokens:,}", *packed]


def ratio(slow: Sequence[float], fast: Sequence[float]) -> float:
    """The median over the repetitions: what was measured one after the other is compared."""
    return statistics.median(a / b for a, b in zip(slow, fast, strict=True))


def fastest(sides: Sequence[Side]) -> Side:
    return min(sides, key=lambda side: statistics.median(run.whole_seconds for run in side.runs))


def shown(versions: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {number}" for name, number in versions.items())


def print_memory(sizes: Sequence[int], runs: Sequence[Sequence[Run]]) -> None:
    """The peaks of ours for each size, and the growth from the first to the last."""
    print(f"\n{'rows':>10}{'peak MB':>10}{'no file':>10}   all peaks")
    for size, some in zip(sizes, runs, strict=True):
        peaks = [run.peak_mb for run in some]
        own = statistics.median(run.peak_own_mb for run in some)
        print(f"{size:>10,}{statistics.median(peaks):>10,.0f}{own:>10,.0f}   {', '.join(f'{p:,.0f}' for p in peaks)}")
    first, last = (statistics.median(run.peak_mb for run in runs[n]) for n in (0, -1))
    print(f"{sizes[0]:,} -> {sizes[-1]:,} rows: {last - first:+,.0f} MB")


if __name__ == "__main__":
    main()
