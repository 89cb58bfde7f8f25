"""Base model against tuned model on held-out rows.

    python examples/quickstart/evaluate.py --model output/quickstart/model/final_output \\
        --rows examples/quickstart/test.jsonl

Takes the folder of an adapter (with the tokenizer and chat template that were exported with it) and
rows `input`, `contexts`, `response`; gives a table, a few texts side by side, and
`evaluation.json` beside the folder. Both models see the very same prompt ids and answer greedily.
"""

import argparse
import json
import os
import sys
import time
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"  # read when the libraries are imported

FIELDS = ("country", "holiday", "date", "year")
BATCH_SIZE = 25
MAX_NEW_TOKENS = 64  # the longest response of the shipped rows has 53
NUM_TEXTS = 4
METRICS = {
    "exact": "exact match",
    "valid": "JSON validity",
    "f1": "field F1",
    "date": "right date anywhere",
}


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of a rows file."""

    input: str
    contexts: list[str]
    response: str


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Shares between 0 and 1; `METRICS` says what each is in words."""

    exact: float
    valid: float
    f1: float
    date: float


def parse_object(text: str) -> dict[str, object] | None:
    """The JSON object that the whole stripped text is; `None` when it is anything else."""
    try:
        value = json.loads(text.strip(), object_pairs_hook=unique_pairs)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def unique_pairs(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """The pairs as a dict; `ValueError` when a key comes twice."""
    if len({key for key, _ in pairs}) < len(pairs):
        raise ValueError("a key comes twice")
    return dict(pairs)


def is_valid(answer: str) -> bool:
    """Whether the whole answer is a JSON object with exactly the four keys."""
    value = parse_object(answer)
    return value is not None and set(value) == set(FIELDS)


def is_exact(answer: str, response: str) -> bool:
    """Whether the stripped answer is the response, character by character."""
    return answer.strip() == response


def has_date(answer: str, response: str) -> bool:
    """Whether the response's date stands anywhere in the answer, as YYYY-MM-DD."""
    return str(json.loads(response)["date"]) in answer


def field_f1(answers: Sequence[str], responses: Sequence[str]) -> float:
    """F1 over the fields of all rows; an answer that is no JSON object has no fields."""
    right = given = wanted = 0
    for answer, response in zip(answers, responses, strict=True):
        fields = (parse_object(answer) or {}).items()
        expected = json.loads(response)
        right += sum(expected.get(key) == value for key, value in fields)
        given += len(fields)
        wanted += len(expected)
    return 2 * right / (given + wanted)


def score(answers: Sequence[str], responses: Sequence[str]) -> Scores:
    """The four scores of `answers`, in the order of the responses."""
    pairs = list(zip(answers, responses, strict=True))
    return Scores(
        exact=mean(is_exact(*pair) for pair in pairs),
        valid=mean(is_valid(answer) for answer in answers),
        f1=field_f1(answers, responses),
        date=mean(has_date(*pair) for pair in pairs),
    )


def mean(flags: Iterable[bool]) -> float:
    """The share of true flags."""
    values = list(flags)
    return sum(values) / len(values)


def read_rows(path: Path) -> list[Row]:
    """The file's rows, one JSON object a line."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return [Row(**json.loads(line)) for line in lines]


def prompt_ids(tokenizer: Any, row: Row) -> list[int]:
    """The prompt's ids by the exported chat template, which carries the system message."""
    ids: list[int] = tokenizer.apply_chat_template(
        [{"role": "user", "content": row.input}],
        documents=[{"text": context} for context in row.contexts],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
    )["input_ids"]
    return ids


def batches(prompts: Sequence[list[int]], size: int) -> list[list[int]]:
    """Indexes of prompts in batches of similar length, so that little is padding."""
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    return [order[start : start + size] for start in range(0, len(order), size)]


def answer_batch(model: Any, tokenizer: Any, prompts: list[list[int]]) -> list[str]:
    """Greedy answers; each ends at its stop token, which is not part of the text."""
    padded = tokenizer.pad({"input_ids": prompts}, padding=True, padding_side="left", return_tensors="pt")
    length = padded["input_ids"].shape[1]
    output = model.generate(**padded.to(model.device), do_sample=False, max_new_tokens=MAX_NEW_TOKENS)
    texts: list[str] = tokenizer.batch_decode(output[:, length:], skip_special_tokens=True)
    return texts


def answer_all(model: Any, tokenizer: Any, prompts: list[list[int]], name: str) -> list[str]:
    """One answer a prompt, in the order of the prompts, under a progress bar called `name`."""
    from rich.progress import track

    answers = [""] * len(prompts)
    for batch in track(batches(prompts, BATCH_SIZE), description=f"{name} answers"):
        texts = answer_batch(model, tokenizer, [prompts[index] for index in batch])
        for index, text in zip(batch, texts, strict=True):
            answers[index] = text
    return answers


def load(folder: Path) -> tuple[Any, Any]:
    """The adapter on its base model, ready to generate, and the exported tokenizer."""
    import torch
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoTokenizer

    # peft 0.21.2 reads a name that transformers 5.23 renamed; delete when peft does not.
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoPeftModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device)
    return model.eval(), AutoTokenizer.from_pretrained(folder)


def answer_both(folder: Path, rows: list[Row]) -> dict[str, list[str]]:
    """`base` and `tuned` -> one answer a row, from the same prompt ids."""
    model, tokenizer = load(folder)
    prompts = [prompt_ids(tokenizer, row) for row in rows]
    with model.disable_adapter():
        base = answer_all(model, tokenizer, prompts, "base")
    return {"base": base, "tuned": answer_all(model, tokenizer, prompts, "tuned")}


def show(rows: list[Row], answers: dict[str, list[str]], scores: dict[str, Scores]) -> None:
    """The table of scores, then the first texts side by side."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    table = Table("", "base", "tuned", title=f"{len(rows)} held-out rows")
    for key, words in METRICS.items():
        table.add_row(words, *(f"{getattr(scores[name], key):.3f}" for name in ("base", "tuned")))
    texts = Table("question", "expected", "base", "tuned", show_lines=True)
    for index, row in enumerate(rows[:NUM_TEXTS]):
        cells = (row.input, row.response, answers["base"][index], answers["tuned"][index])
        texts.add_row(*(Text(cell.strip()) for cell in cells))
    console.print(table)
    console.print(texts)


def save(path: Path, rows: list[Row], answers: dict[str, list[str]], scores: dict[str, Scores]) -> None:
    """Scores and every answer as JSON at `path`."""
    result = {
        "num_rows": len(rows),
        "scores": {name: asdict(value) for name, value in scores.items()},
        "rows": [
            {**asdict(row), **{name: texts[index] for name, texts in answers.items()}} for index, row in enumerate(rows)
        ],
    }
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def parse_floor(text: str) -> dict[str, float]:
    """`exact=0.8,f1=0.93` as a dict; `ArgumentTypeError` for an unknown name or no number."""
    try:
        floor = {name: float(value) for name, value in (p.split("=") for p in text.split(","))}
    except ValueError:
        raise argparse.ArgumentTypeError(f"`{text}` is not like exact=0.8,valid=0.98") from None
    unknown = sorted(set(floor) - set(METRICS))
    if unknown:
        raise argparse.ArgumentTypeError(f"unknown {unknown[0]}; there are {', '.join(METRICS)}")
    return floor


def missed(scores: Scores, floor: dict[str, float]) -> list[str]:
    """What is below the floor, in words; empty when nothing is."""
    return [
        f"{METRICS[name]} {getattr(scores, name):.3f} < {least}"
        for name, least in floor.items()
        if getattr(scores, name) < least
    ]


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Base against tuned model on held-out rows.")
    parser.add_argument("--model", type=Path, required=True, help="folder of the tuned adapter")
    parser.add_argument("--rows", type=Path, required=True, help="rows file, JSON lines")
    parser.add_argument("--at-least", type=parse_floor, default={}, metavar="exact=0.8,...", help="else exit 1")
    return parser.parse_args()


def main() -> int:
    """Evaluate and print; 1 when the tuned model is below `--at-least`."""
    arguments = parse_arguments()
    started = time.monotonic()
    rows = read_rows(arguments.rows)
    answers = answer_both(arguments.model, rows)
    responses = [row.response for row in rows]
    scores = {name: score(texts, responses) for name, texts in answers.items()}
    path = arguments.model.parent / "evaluation.json"
    save(path, rows, answers, scores)
    show(rows, answers, scores)
    print(f"all answers in {path}; {time.monotonic() - started:.0f} s")
    below = missed(scores["tuned"], arguments.at_least)
    if below:
        print("the tuned model is below the floor: " + "; ".join(below), file=sys.stderr)
    return 1 if below else 0


if __name__ == "__main__":
    sys.exit(main())
