"""One row's journey through data preparation, with the real value at every stage: the text in the README.

python examples/quickstart/journey.py > journey.md      (after base_model.py)
"""

from collections.abc import Iterator, Sequence

from llm.errors import LlmTrainError
from llm.training.config import DataPrepConfig
from llm.training.config_file import load_config
from llm.training.prep.encode import Example
from llm.training.prep.engine import open_encoder
from llm.training.prep.rows import iterate_rows
from llm.training.prep.sources import load_rows

CONFIG = "examples/quickstart/dataprep.yaml"


def journey() -> Iterator[str]:
    """The Markdown lines of the first training row's stages."""
    config = load_config(CONFIG, DataPrepConfig)
    encoder = open_encoder(config)
    row = next(iterate_rows(load_rows(config), batch_size=1))[0]
    (turn,) = row.turns
    yield from _code(
        "1. The row, as loaded", f"input     {turn.input}", *_contexts(turn.contexts), f"response  {turn.response}"
    )
    prompt, response = encoder.prompt.segments([turn], encoder.prompt_format)
    yield from _code("2. Rendered: the prompt", prompt.text)
    yield from _code("   and what is trained, with the stop token", response.text)
    example = encoder.encode([row])[0]
    if not isinstance(example, Example):
        raise LlmTrainError(f"the row was dropped: {example.reason}")
    start, end = example.trained[0]
    ids = example.input_ids
    yield from _code(
        f"3. Tokens: {len(ids)} ids, of which {end - start} are labels",
        f"input_ids  {_ends(ids[:start])} | {_ends(ids[start:])}",
        f"labels     {_ends([config.ignore_index] * start)} | {_ends(ids[start:end])}",
        f"as text    {encoder.tokenizer.decode([ids[start - 3 : start]])[0]!r} | "
        f"{encoder.tokenizer.decode([ids[start : start + 4]])[0]!r} ... {encoder.tokenizer.decode([ids[-2:]])[0]!r}",
    )


def _contexts(contexts: Sequence[str]) -> list[str]:
    return [f"contexts  {text}" if not number else f"          {text}" for number, text in enumerate(contexts)]


def _ends(ids: Sequence[int]) -> str:
    return f"{' '.join(map(str, ids[:3]))} ... {' '.join(map(str, ids[-3:]))}"


def _code(title: str, *lines: str) -> Iterator[str]:
    yield from (f"{title}", "", "```", *lines, "```", "")


if __name__ == "__main__":
    print("\n".join(journey()))
