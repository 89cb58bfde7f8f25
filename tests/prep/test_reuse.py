"""Tokenized rows that are used again: only where nothing that shapes them changed, after a stop, the same bytes."""

import json
import logging
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from conftest import byte_level_tokenizer, sentencepiece_tokenizer
from prep_helpers import make_config, settings, some_rows, write_jsonl

from llm.cache import cache_folder
from llm.prompt import Prompt
from llm.training.dataprep import prepare
from llm.training.prep import engine, reuse
from llm.training.prep.encode import Encoder, Outcome
from llm.training.prep.rows import Row

pytest_plugins = ("prep_fixtures",)

NUM_ROWS = 2500  # three batches of at most 1000
Changes = dict[str, Any]


@pytest.fixture
def run(
    tmp_path: Path, model: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., str]:
    """Prepares `rows`, and gives what was said about using tokens again."""
    monkeypatch.setattr(engine, "_ROWS_AT_ONCE", 1000)
    caplog.set_level(logging.INFO, logger=reuse.__name__)

    def prepared(rows: Sequence[dict[str, Any]] | None = None, **changes: Any) -> str:
        source = write_jsonl(tmp_path / "rows.jsonl", some_rows(NUM_ROWS) if rows is None else rows)
        caplog.clear()
        prepare(make_config(tmp_path, settings(source, model, tmp_path / "out", overwrite=True) | changes))
        return "\n".join(record.getMessage() for record in caplog.records if record.name == reuse.__name__)

    return prepared


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The first row of each batch that is tokenized."""
    firsts: list[int] = []
    encode = Encoder.encode

    def noted(self: Encoder, rows: Sequence[Row]) -> list[Outcome]:
        firsts.append(rows[0].number)
        return encode(self, rows)

    monkeypatch.setattr(Encoder, "encode", noted)
    return firsts


def test_rows_are_tokenized_once(run: Callable[..., str], encoded: list[int]) -> None:
    assert run() == ""
    assert sorted(encoded) == [0, 1000, 2000]
    assert run() == "The tokens of all 2,500 rows are used again."
    assert run(seed=7, pack=False, share_prefixes=False, num_proc=1) == "The tokens of all 2,500 rows are used again."
    assert len(encoded) == 3


def test_only_batches_whose_rows_changed_are_tokenized_anew(run: Callable[..., str], encoded: list[int]) -> None:
    rows = some_rows(NUM_ROWS)
    run(rows)
    rows[1500]["response"] += "!"
    assert run(rows).startswith("The tokens of 1,500 rows are used again, 1,000 were not there: rows that changed")
    assert encoded[3:] == [1000]


def test_batches_whose_rows_have_other_numbers_are_tokenized_anew(run: Callable[..., str], encoded: list[int]) -> None:
    rows = some_rows(NUM_ROWS)
    run(rows)
    run(rows[1000:])
    assert sorted(encoded[3:]) == [0, 1000]


@pytest.mark.parametrize(
    "changes",
    [
        {"chunksize": 100},
        {"prompt_config": {"method": "Prompt", "kwargs": {"system_message": "Be brief."}}},
        {"prompt_format_config": {"method": "VicunaFormat"}},
        {"on_too_long": "truncate_contexts"},
        {"allow_special_tokens_in_data": True},
        {"train_on": "last"},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_changed_setting_is_named_and_all_rows_are_tokenized_anew(
    changes: Changes, run: Callable[..., str], encoded: list[int]
) -> None:
    run()
    assert run(**changes) == f"All rows are tokenized anew: `{next(iter(changes))}` changed."
    assert len(encoded) == 6


def test_changed_tokenizer_is_named(run: Callable[..., str], tmp_path: Path, encoded: list[int]) -> None:
    format_config = {"prompt_format_config": {"method": "VicunaFormat"}}
    byte_level_tokenizer().save_pretrained(tmp_path / "changing")
    run(base_model=str(tmp_path / "changing"), **format_config)
    sentencepiece_tokenizer().save_pretrained(tmp_path / "changing")
    told = run(base_model=str(tmp_path / "changing"), **format_config)
    assert told == "All rows are tokenized anew: `base_model` changed."
    assert len(encoded) == 6


def test_changed_code_is_named(run: Callable[..., str], encoded: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    run()
    monkeypatch.setattr(reuse, "_CODE", ("*.py",))
    assert run() == "All rows are tokenized anew: `llm-train` changed."
    assert len(encoded) == 6


def test_changed_date_is_a_change_where_the_template_renders_it(
    tmp_path: Path, encoded: list[int], run: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = byte_level_tokenizer()
    tokenizer.chat_template = (
        "{{ strftime_now('%Y') }}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tokenizer.save_pretrained(tmp_path / "dated")
    changes = {"base_model": str(tmp_path / "dated"), "prompt_format_config": {"method": "ChatTemplateFormat"}}
    run(some_rows(3), **changes)
    assert run(some_rows(3), **changes) == "The tokens of all 3 rows are used again."

    class Tomorrow:
        @staticmethod
        def today() -> "Tomorrow":
            return Tomorrow()

        def isoformat(self) -> str:
            return "2100-01-01"

    monkeypatch.setattr(reuse, "date", Tomorrow)
    assert run(some_rows(3), **changes) == "All rows are tokenized anew: `prompt_format_config` changed."


def test_stopped_run_goes_on_from_its_whole_batches(
    run: Callable[..., str], encoded: list[int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    encode = Encoder.encode

    def stops(self: Encoder, rows: Sequence[Row]) -> list[Outcome]:
        if rows[0].number == 2000:
            raise KeyboardInterrupt
        return encode(self, rows)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Encoder, "encode", stops)
        run()
    assert run().startswith("The tokens of 2,000 rows are used again, 500 were not there")
    assert sorted(encoded) == [0, 1000, 2000]
    continued = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    for path in cache_folder("rows").glob("*/*"):
        path.unlink()
    run()
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == continued


@pytest.mark.parametrize("damage", [b"", b"ARROW1 no", None])
def test_damaged_or_missing_file_is_made_anew(
    damage: bytes | None, run: Callable[..., str], encoded: list[int], tmp_path: Path
) -> None:
    run()
    before = (tmp_path / "out" / "ledger.parquet").read_bytes()
    for kind in ("examples", "ledger"):
        path = sorted(cache_folder("rows").glob(f"*/*.{kind}.arrow"))[0]
        path.unlink() if damage is None else path.write_bytes(damage)
    assert "rows are used again" in run()
    assert len(encoded) in (4, 5)
    assert (tmp_path / "out" / "ledger.parquet").read_bytes() == before


def test_reuse_tokens_false_leaves_nothing_in_the_cache(run: Callable[..., str], encoded: list[int]) -> None:
    for _ in range(2):
        assert run(reuse_tokens=False) == ""
    assert len(encoded) == 6 and not cache_folder("rows").exists()


def test_prompt_whose_code_is_not_ours_is_rendered_each_time(
    run: Callable[..., str], encoded: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Own(Prompt):
        pass

    monkeypatch.setattr(engine, "make_prompt", lambda method, kwargs: Own())
    for _ in range(2):
        assert run() == ""
    assert len(encoded) == 6


def test_cache_that_cannot_be_written_is_no_error(
    run: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("LLM_TRAIN_CACHE", str(tmp_path / "file" / "cache"))
    assert run(some_rows(3)) == ""


def test_what_no_run_used_for_long_is_removed(run: Callable[..., str], encoded: list[int]) -> None:
    run()
    made = sorted(cache_folder("rows").glob("*/*"))
    old = time.time() - (reuse.DAYS_KEPT + 1) * 86400
    for path in made:
        os.utime(path, (old, old))
    run()
    assert sorted(cache_folder("rows").glob("*/*")) == made, "they were used"
    for path in made:
        os.utime(path, (old, old))
    run(chunksize=100)
    assert len(made) == 6 and not any(path.exists() for path in made)
    assert len(list(cache_folder("rows").iterdir())) == 1


def test_no_setting_is_written_in_clear(run: Callable[..., str]) -> None:
    run(prompt_config={"method": "Prompt", "kwargs": {"system_message": "hunter2"}})
    (path,) = cache_folder("last").iterdir()
    assert set(json.loads(path.read_text())) >= {"prompt_config", "base_model"} and "hunter2" not in path.read_text()
