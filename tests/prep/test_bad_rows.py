"""Rows that cannot be read: an error that names the first, or dropped and counted without touching the others."""

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from prep_helpers import make_config, settings, some_rows

from llm.errors import DataError
from llm.training.config import DatasetConfig
from llm.training.dataprep import prepare
from llm.training.prep.dataset import load_blocks
from llm.training.prep.rows import Row, iterate_rows
from llm.training.prep.sources import load_rows

pytest_plugins = ("prep_fixtures",)

GOOD = b'{"input": "a", "response": "b", "contexts": ["c"]}'
TALK = b'{"messages": "[{\\"role\\": \\"user\\", \\"content\\": \\"a\\"}]"}'
BAD = {
    "null input": (GOOD, b'{"input": null, "response": "b"}', "`input` is null"),
    "null response": (GOOD, b'{"input": "a"}', "`response` is null"),
    "null context": (GOOD, b'{"input": "a", "response": "b", "contexts": ["c", null]}', "`contexts[1]` is null"),
    "not UTF-8": (GOOD, b'{"input": "a", "response": "caf\xe9"}', "`response` is not UTF-8"),
    "context not UTF-8": (GOOD, b'{"input": "a", "response": "b", "contexts": ["\xe9"]}', "`contexts` is not UTF-8"),
    "no JSON": (TALK, b'{"messages": "nonsense"}', "`messages` is neither a list nor the JSON of one"),
    "no role": (TALK, b'{"messages": "[{}]"}', "messages[0] has no `role`"),
    "an image": (
        TALK,
        b'{"messages": "[{\\"role\\": \\"user\\", \\"content\\": [{}]}]"}',
        "messages[0] holds a part that is no text",
    ),
}


def read(folder: Path, lines: list[bytes], **changes: Any) -> list[Row]:
    (folder / "rows.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    config = make_config(folder, settings(folder / "rows.jsonl", folder, folder / "out", **changes))
    return [row for batch in iterate_rows(load_rows(config), batch_size=2) for row in batch]


@pytest.mark.parametrize("name", BAD)
def test_bad_row_is_named_or_dropped_and_the_others_are_as_they_were(name: str, tmp_path: Path) -> None:
    good, bad, text = BAD[name]
    with pytest.raises(DataError) as caught:
        read(tmp_path, [good, good, bad, good])
    assert f"row 2 (counted from 0): {text}" in str(caught.value)
    assert str(caught.value).endswith("`on_bad_row: drop` leaves such rows out and counts them.")
    rows = read(tmp_path, [good, good, bad, good], on_bad_row="drop")
    assert [row.number for row in rows] == [0, 1, 2, 3]
    assert [row.problem is None for row in rows] == [True, True, False, True]
    assert text in str(rows[2].problem) and rows[2].turns == ()
    without = read(tmp_path, [good, good, good])
    assert [(row.turns, row.chat) for row in rows if not row.problem] == [(row.turns, row.chat) for row in without]


def test_dataprep_with_bad_rows_dropped_has_the_blocks_of_the_others_and_counts_each(
    tmp_path: Path, model: Path
) -> None:
    rows = some_rows(1500)
    bad = {7: {"input": None}, 1001: {"response": None}, 1499: {"contexts": [None]}}
    lines = [json.dumps(row | bad.get(number, {})) for number, row in enumerate(rows)]
    (tmp_path / "mixed.jsonl").write_text("\n".join(lines))
    (tmp_path / "good.jsonl").write_text("\n".join(line for n, line in enumerate(lines) if n not in bad))
    texts = []
    for name in ("mixed", "good"):
        source, target = tmp_path / f"{name}.jsonl", tmp_path / name
        manifest = prepare(make_config(tmp_path, settings(source, model, target, on_bad_row="drop")))
        texts.append(load_blocks(DatasetConfig.model_validate(str(target)), key="inspect")["full_text"][:])
        dropped = {"bad_row": {"rows": 3, "first_rows": [7, 1001, 1499]}} if name == "mixed" else {}
        assert manifest.counts["rows_dropped"] == dropped
        assert (manifest.counts["rows_read"], manifest.counts["rows_kept"]) == (1497 + len(dropped) * 3, 1497)
    assert texts[0] == texts[1] and len(texts[0]) > 100
    ledger = pq.read_table(tmp_path / "mixed" / "ledger.parquet").to_pylist()
    assert [entry["row"] for entry in ledger if entry["reason"] == "bad_row"] == [7, 1001, 1499]
    assert "bad_row" in (tmp_path / "mixed" / "report.html").read_text()
