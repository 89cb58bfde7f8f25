"""What became of every row: spilled examples, ledger, samples, counts, manifest, the table at the end."""

import json
from array import array
from pathlib import Path

import numpy as np
import pytest
from conftest import byte_level_tokenizer
from datasets import Dataset
from prep_helpers import make_config, settings, with_turn

from llm.errors import DataError
from llm.model_registry import KnownModel
from llm.named_formats import ChatMLFormat
from llm.prompt import Prompt
from llm.tokenizer import PromptTokenizer
from llm.training.config import DataPrepConfig
from llm.training.dataprep import prepare
from llm.training.prep.encode import Dropped, Encoder, Example
from llm.training.prep.engine import encode_rows, open_encoder
from llm.training.prep.manifest import Manifest, Sample, manifest_path, read_manifest, write_manifest
from llm.training.prep.overlap import Threads
from llm.training.prep.pack import pack_examples
from llm.training.prep.rows import Row, with_columns
from llm.training.prep.store import Collector, Examples, ShardStore
from llm.training.prep.summary import ledger_with_blocks, make_manifest, print_summary
from llm.training.prep.target import Target

pytest_plugins = ("prep_fixtures",)

ROWS = [Row.of(number=n, input=f"q{n}", response=f"a{n}", contexts=("c",) * (n % 2)) for n in range(6)]
OUTCOMES = [
    Example(row=0, text="t0", input_ids=array("I", [1, 2, 3]), trained=((1, 3),)),
    Dropped(row=1, reason="too_long", num_tokens=99),
    Example(row=2, text="t2", input_ids=array("I", [4, 5, 6, 7]), trained=((2, 4),), num_cut_contexts=1),
    Dropped(row=3, reason="empty_response"),
    Example(row=4, text="t4", input_ids=array("I", [8, 9]), trained=((1, 2),), has_control_text=True),
    Dropped(row=5, reason="too_long", num_tokens=50),
]


def spilled(folder: Path, rows: list[Row] = ROWS, batch_size: int = 4) -> Examples:
    """The shards of `rows`, and what is read back of them."""
    store, collector = ShardStore(folder), Collector("all")
    for start in range(0, len(rows), batch_size):
        batch = rows[start : start + batch_size]
        collector.add(batch, store.shard(batch, lambda batch: [OUTCOMES[row.number] for row in batch]))
    return collector.examples()


@pytest.fixture
def config(source: Path, model: Path, tmp_path: Path) -> DataPrepConfig:
    return make_config(tmp_path, settings(source, model, tmp_path / "out", chunksize=100))


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    tokenizer = PromptTokenizer(byte_level_tokenizer())
    form = ChatMLFormat().for_tokenizer(tokenizer)
    return Encoder(tokenizer=tokenizer, prompt=Prompt(), prompt_format=form, max_tokens=100)


def manifest_of(config: DataPrepConfig, encoder: Encoder, examples: Examples) -> Manifest:
    return make_manifest(config, encoder, examples, pack_examples(examples.lengths, chunksize=100))


# --- spilled examples ------------------------------------------------------------------------------------------------


def test_examples_come_back_as_they_went_in(tmp_path: Path) -> None:
    examples = spilled(tmp_path)
    kept = [outcome for outcome in OUTCOMES if isinstance(outcome, Example)]
    assert examples.lengths.tolist() == [3, 4, 2]
    assert examples.table.to_pylist() == [
        {
            "row": example.row,
            "text": example.text,
            "input_ids": example.input_ids.tolist(),
            "trained": list(example.trained[0]),
        }
        for example in kept
    ]


def test_every_row_is_in_the_ledger_once_with_its_outcome(tmp_path: Path) -> None:
    ledger = spilled(tmp_path).ledger.to_pylist()
    assert [entry["row"] for entry in ledger] == list(range(6))
    assert [entry["outcome"] for entry in ledger] == ["kept", "dropped", "cut", "dropped", "kept", "dropped"]
    assert [entry["reason"] for entry in ledger] == [None, "too_long", None, "empty_response", None, "too_long"]
    assert [entry["num_tokens"] for entry in ledger] == [3, 99, 4, None, 2, 50]
    assert [entry["num_trained_tokens"] for entry in ledger] == [2, None, 2, None, 1, None]
    assert ledger[2]["num_cut_contexts"] == 1


def test_batches_of_any_size_give_the_same(tmp_path: Path) -> None:
    one, other = spilled(tmp_path / "a", batch_size=1), spilled(tmp_path / "b", batch_size=6)
    assert one.table.to_pylist() == other.table.to_pylist()
    assert one.ledger.to_pylist() == other.ledger.to_pylist()
    assert one.lengths.tolist() == other.lengths.tolist()


def test_samples_are_whole_rows_without_control_text(tmp_path: Path) -> None:
    assert spilled(tmp_path).samples == [
        Sample(messages=[{"role": "user", "content": "q0"}], contexts=[], tools=[], prompt_ids=[1])
    ]


@pytest.mark.parametrize("change", [{"input": "q0 "}, {"response": ""}, {"contexts": ("",)}])
def test_source_fingerprint_changes_with_any_field(tmp_path: Path, change: dict[str, object]) -> None:
    same = spilled(tmp_path / "a").source_fingerprint
    assert spilled(tmp_path / "b").source_fingerprint == same
    changed = [with_turn(ROWS[0], **change), *ROWS[1:]]
    assert spilled(tmp_path / "c", changed).source_fingerprint != same


def test_source_fingerprint_tells_where_a_text_ends(tmp_path: Path) -> None:
    one = [Row.of(number=0, input="ab", response="c")]
    other = [Row.of(number=0, input="a", response="bc")]
    assert spilled(tmp_path / "a", one).source_fingerprint != spilled(tmp_path / "b", other).source_fingerprint


# --- ledger, counts, manifest ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [None, 3])
def test_ledger_names_the_block_of_every_kept_row(tmp_path: Path, seed: int | None) -> None:
    examples = spilled(tmp_path)
    packing = pack_examples(examples.lengths, chunksize=6, seed=seed)
    ledger = ledger_with_blocks(examples, packing).to_pylist()
    rows = examples.table["row"].to_pylist()
    for number, block in enumerate(packing.blocks()):
        assert {rows[n] for n in block} == {entry["row"] for entry in ledger if entry["block"] == number}
    assert [entry["block"] is None for entry in ledger] == [entry["outcome"] == "dropped" for entry in ledger]


def test_counts_add_up_and_name_the_first_rows(tmp_path: Path, config: DataPrepConfig, encoder: Encoder) -> None:
    counts = manifest_of(config, encoder, spilled(tmp_path / "spill")).counts
    assert counts == {
        "rows_read": 6,
        "rows_kept": 2,
        "rows_cut": 1,
        "rows_dropped": {
            "empty_response": {"rows": 1, "first_rows": [3]},
            "too_long": {"rows": 2, "first_rows": [1, 5]},
        },
        "rows_with_control_text": 1,
        "tokens": 9,
        "trained_tokens": 5,
        "stored_tokens": 9,
        "shared": {"nodes": 0, "tokens": 0, "saved_tokens": 0},
        "blocks": 1,
        "density": 0.09,
    }


def test_row_that_vanished_fails_the_run(tmp_path: Path, config: DataPrepConfig, encoder: Encoder) -> None:
    examples = spilled(tmp_path / "spill")
    with pytest.raises(AssertionError, match="an example vanished"):
        make_manifest(config, encoder, examples, pack_examples(examples.lengths[:2], chunksize=100))


def test_manifest_says_what_made_the_data_and_comes_back(
    tmp_path: Path, config: DataPrepConfig, encoder: Encoder
) -> None:
    manifest = manifest_of(config, encoder, spilled(tmp_path / "spill"))
    write_manifest(manifest, str(tmp_path))
    assert read_manifest(str(tmp_path)) == manifest
    assert manifest.tokenizer_fingerprint == encoder.tokenizer.fingerprint
    assert (manifest.stop_token, manifest.stop_token_id) == ("<|im_end|>", 4)
    assert manifest.prompt_format["method"] == "ChatMLFormat"
    assert manifest.source["fingerprint"] == spilled(tmp_path / "again").source_fingerprint
    assert (manifest.chunksize, manifest.ignore_index, manifest.seed) == (100, -100, None)
    assert set(manifest.versions) >= {"llm-train", "tokenizers", "datasets"}
    assert [sample.prompt_ids for sample in manifest.samples] == [[1]]


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("out/train", "out/train/manifest.json"),
        ("out/train/", "out/train/manifest.json"),
        ("s3://b/train", "s3://b/train/manifest.json"),
        ("out/train.parquet", "out/train.parquet.manifest.json"),
        ("s3://b/x.jsonl", "s3://b/x.jsonl.manifest.json"),
    ],
)
def test_manifest_lies_in_the_folder_or_beside_the_file(path: str, expected: str) -> None:
    assert manifest_path(path) == expected


@pytest.mark.parametrize("content", [None, "{", "[]", '{"format_version": 99}', '{"format_version": 1}'])
def test_missing_broken_or_foreign_manifest_is_a_data_error(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(DataError, match="Run dataprep again"):
        read_manifest(str(tmp_path))


@pytest.mark.parametrize("allowed", [False, True])
def test_summary_names_reasons_rows_and_place(
    allowed: bool, tmp_path: Path, config: DataPrepConfig, encoder: Encoder, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config.model_copy(update={"allow_special_tokens_in_data": allowed})
    target = Target(path="out/train", path_key="dataset_path")
    print_summary(manifest_of(config, encoder, spilled(tmp_path / "spill")), config, target)
    shown = capsys.readouterr().err
    assert "\x1b" not in shown
    lines = [line.split() for line in shown.splitlines()]
    advice = "2 (longer than chunksize, or than the model can read: raise chunksize, or set on_too_long; rows 1, 5)"
    assert ["dropped:", "too_long", *advice.split()] in lines
    assert "become control tokens" in shown if allowed else "kept as text" in shown
    assert ["written", "to", "out/train"] in lines
    assert ["report", "out/train/report.html"] in lines
    assert not any(line.endswith(" ") for line in shown.splitlines())


def test_ledger_estimates_contexts_by_their_share_of_characters(tmp_path: Path) -> None:
    rows = [Row.of(number=n, input="q", response="a", contexts=("12345", "67890")) for n in range(2)]
    whole = Example(row=0, text="x" * 40, input_ids=array("I", range(20)), trained=((18, 20),))
    cut = Example(row=1, text="x" * 40, input_ids=array("I", range(8)), trained=((6, 8),), num_cut_contexts=1)
    collector = Collector("all")
    collector.add(rows, ShardStore(tmp_path).shard(rows, lambda batch: [whole, cut]))
    examples = collector.examples()
    ledger = ledger_with_blocks(examples, pack_examples(examples.lengths, chunksize=20))
    assert ledger["num_contexts_characters"].to_pylist() == [10, 5]
    assert ledger["estimated_contexts_tokens"].to_pylist() == [5, 1]  # 10 of 40, 5 of 40 characters


def test_ledger_counts_the_contexts_of_a_conversation_that_stays_as_it_is(tmp_path: Path) -> None:
    row = Row(number=0, turns=(), chat={"messages": [], "tools": [], "contexts": ["12345", "678"]})
    collector = Collector("all")
    example = Example(row=0, text="x" * 40, input_ids=array("I", range(20)), trained=((18, 20),), has_control_text=True)
    collector.add([row], ShardStore(tmp_path).shard([row], lambda batch: [example]))
    assert collector.examples().ledger["num_contexts_characters"].to_pylist() == [8]


# --- the engine ------------------------------------------------------------------------------------------------------


def test_open_encoder_takes_everything_from_the_config(config: DataPrepConfig) -> None:
    changes = {"on_too_long": "error", "allow_special_tokens_in_data": True}
    encoder = open_encoder(config.model_copy(update=changes))
    assert (encoder.max_tokens, encoder.on_too_long, encoder.allow_special_tokens_in_data) == (100, "error", True)
    assert encoder.prompt_format.stop == "<|im_end|>"
    assert type(encoder.prompt).__name__ == "DefaultPrompt"


def test_open_encoder_of_a_known_model_takes_no_example_longer_than_it_can_read(
    config: DataPrepConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = KnownModel(max_length=40)
    monkeypatch.setattr("llm.training.prep.engine.find_model", lambda base_model: known)
    assert open_encoder(config.model_copy(update={"chunksize": 100})).max_tokens == 40
    assert open_encoder(config.model_copy(update={"chunksize": 39})).max_tokens == 39


def test_encode_rows_in_several_batches_numbers_rows_through(
    tmp_path: Path, encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llm.training.prep.engine._ROWS_AT_ONCE", 4)
    rows = Dataset.from_list([{"input": f"q{n}", "response": "" if n == 5 else f"a{n}"} for n in range(10)])
    examples = encode_rows(with_columns(rows, {}), encoder, tmp_path)
    assert examples.ledger["row"].to_pylist() == list(range(10))
    assert examples.table["row"].to_pylist() == [0, 1, 2, 3, 4, 6, 7, 8, 9]
    assert np.all(examples.lengths > 0)


@pytest.mark.parametrize(("num_proc", "cores", "expected"), [(None, 3, 3), (None, 64, 10), (1, 3, 1), (12, 3, 12)])
def test_as_many_threads_tokenize_as_num_proc_says_else_one_a_core(
    config: DataPrepConfig, monkeypatch: pytest.MonkeyPatch, num_proc: int | None, cores: int, expected: int
) -> None:
    asked: list[int] = []

    class Counted(Threads):
        def __init__(self, num_threads: int) -> None:
            asked.append(num_threads)
            super().__init__(num_threads)

    monkeypatch.setattr("llm.training.prep.engine.num_cores", lambda: cores)
    monkeypatch.setattr("llm.training.prep.engine.Threads", Counted)
    monkeypatch.setenv("RAYON_NUM_THREADS", "2")  # set by `prepare`; here it is put back
    prepare(config.model_copy(update={"num_proc": num_proc}))
    assert asked == [expected]


def test_encode_rows_with_all_dropped_is_a_data_error_that_counts_the_reasons(tmp_path: Path, encoder: Encoder) -> None:
    rows = Dataset.from_list([{"input": "a" * 500, "response": "b"}, {"input": "a", "response": " "}])
    with pytest.raises(DataError, match="every one of the 2 rows was dropped") as caught:
        encode_rows(with_columns(rows, {}), encoder, tmp_path)
    assert "- too_long, 1 row" in str(caught.value)
    assert "- empty_response, 1 row" in str(caught.value)


def test_manifest_is_plain_json(tmp_path: Path, config: DataPrepConfig, encoder: Encoder) -> None:
    write_manifest(manifest_of(config, encoder, spilled(tmp_path / "spill")), str(tmp_path))
    facts = json.loads((tmp_path / "manifest.json").read_text(encoding="utf-8"))
    assert facts["prompt"] == {"method": "Prompt", "kwargs": {}}
