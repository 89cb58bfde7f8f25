"""The rows of `benchmarks/dataprep.py`, in the form each side reads; same seed and same texts, same bytes.

    python benchmarks/dataprep_corpus.py FOLDER --rows 20000 [--seed 0] [--data FOLDER]

Rows are made of passages of real text: half from the `input`, `contexts` and `response` of the parquet files in
`--data` (if given), the rest from the topics and docstrings of this Python's standard library. Every row is a new
selection of passages, so none repeats. Sizes: about 340 tokens a row with SmolLM2's tokenizer, log-normal, under 2048;
three rows in ten have contexts; a quarter of the characters is response. Of the prompts, one in six has characters
beyond ASCII (a dash, a quotation mark, an accent), which our preparation is slower with.

Writes `ours.parquet` (input, contexts, response), `trl.parquet` (the same as conversational prompt and completion) and
`texts.jsonl` (the same rendered as ChatML).
"""

import argparse
import ast
import json
import random
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

SYSTEM = "You are a helpful assistant. Use the text that is given, and answer briefly."
_AT_ONCE = 10_000
_MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
_OURS = pa.schema([("input", pa.string()), ("contexts", pa.list_(pa.string())), ("response", pa.string())])
_TRL = pa.schema([("prompt", _MESSAGES), ("completion", _MESSAGES)])


def main() -> None:
    parser = argparse.ArgumentParser(description="Rows for benchmarks/dataprep.py")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data", type=Path)
    given = parser.parse_args()
    pools = [pool for pool in (data_passages(given.data), library_passages()) if pool]
    given.folder.mkdir(parents=True, exist_ok=True)
    maker = random.Random(given.seed)
    with (
        pq.ParquetWriter(given.folder / "ours.parquet", _OURS) as ours,
        pq.ParquetWriter(given.folder / "trl.parquet", _TRL) as trl,
        open(given.folder / "texts.jsonl", "w", encoding="utf-8") as texts,
    ):
        for first in range(0, given.rows, _AT_ONCE):
            rows = [make_row(maker, pools) for _ in range(min(_AT_ONCE, given.rows - first))]
            ours.write_table(pa.Table.from_pylist(rows, _OURS))
            messages = [conversation(row) for row in rows]
            trl.write_table(pa.Table.from_pylist([{"prompt": m[:2], "completion": m[2:]} for m in messages], _TRL))
            texts.writelines(json.dumps(rendered(m)) + "\n" for m in messages)


def make_row(maker: random.Random, pools: list[list[str]]) -> dict[str, str | list[str]]:
    """One row of 150 to 5000 characters in all."""
    characters = min(max(maker.lognormvariate(6.8, 0.65), 150), 5000)
    has_contexts = maker.random() < 0.3
    number = maker.randint(1, 4) if has_contexts else 0
    contexts = [passages(maker, pools, characters * 0.5 / number) for _ in range(number)]
    return {
        "input": passages(maker, pools, characters * (0.25 if has_contexts else 0.75)),
        "contexts": contexts,
        "response": passages(maker, pools, characters * 0.25),
    }


def passages(maker: random.Random, pools: list[list[str]], characters: float) -> str:
    """Whole passages, the last one cut at a word so that there are about as many characters as asked for.

    No white space at the ends: where tokens merge across the start of a response, the sides have different tokens.
    """
    found: list[str] = []
    left = characters
    while left > 0:
        found.append(maker.choice(maker.choice(pools)))
        left -= len(found[-1])
    if left < 0:
        found[-1] = found[-1][: int(left)].rsplit(" ", 1)[0] or "yes"
    return maker.choice(" \n").join(found).strip() or "yes"


def conversation(row: dict[str, str | list[str]]) -> list[dict[str, str]]:
    """The messages that our `Prompt` and `ChatMLFormat` make of a row."""
    asked = "\n".join([*row["contexts"], str(row["input"])])
    turns = [("system", SYSTEM), ("user", asked), ("assistant", str(row["response"]))]
    return [{"role": role, "content": content} for role, content in turns]


def rendered(messages: list[dict[str, str]]) -> str:
    """ChatML up to the last stop token."""
    return "\n".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>" for m in messages)


def data_passages(folder: Path | None) -> list[str]:
    """The lines of all texts in the parquet files of `folder`."""
    found: list[str] = []
    for path in sorted(folder.glob("*.parquet")) if folder else []:
        for row in pq.read_table(path, columns=_OURS.names).to_pylist():
            for text in (row["input"], *(row["contexts"] or ()), row["response"]):
                found += filter(is_passage, text.split("\n"))
    return found


def library_passages() -> list[str]:
    """The paragraphs of Python's own documentation: its topics and the docstrings of its library."""
    from pydoc_data.topics import topics

    folder = Path(sysconfig.get_path("stdlib"))
    paths = [*sorted(folder.glob("*.py")), *sorted(folder.glob("[a-z]*/*.py"))]
    files = [path for path in paths if path.parent.name not in ("site-packages", "idlelib", "pydoc_data", "test")]
    texts = [str(topics[name]) for name in sorted(topics)] + [text for path in files for text in docstrings(path)]
    return [paragraph for text in texts for paragraph in text.split("\n\n") if is_passage(paragraph)]


def docstrings(path: Path) -> Iterator[str]:
    """Those of a module and of everything in it; none where it cannot be read."""
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            yield ast.get_docstring(node) or ""


def is_passage(text: str) -> bool:
    """Whether it is prose of a useful length."""
    return 40 <= len(text) <= 1500 and "<|" not in text


if __name__ == "__main__":
    main()
