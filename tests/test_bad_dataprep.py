"""The 44 bad inputs of `dataprep`: each with its exit code, one message, and nothing at the final path.

Exit code 0 is for what is no mistake, or is counted instead of refused. `tests/bad_inputs.py` writes the table.
"""

import gzip
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from bad_inputs import Case, check_told, files_in, run_case, tell
from conftest import byte_level_tokenizer
from prep_helpers import write_jsonl

from llm.errors import DataError
from llm.training.config import FinetuneConfig
from llm.training.prep.manifest import Manifest, read_manifest
from llm.training.tune.overlap_check import check_overlap

GOOD: list[dict[str, Any]] = [{"input": "a", "response": "b"}, {"input": "c", "response": "d"}]
ROW = "rows.jsonl"


def rows(*given: Mapping[str, Any]) -> Callable[[Path], None]:
    """Writes these rows behind two good ones."""
    return lambda folder: _written(folder, [*GOOD, *given])


def only(*given: Mapping[str, Any]) -> Callable[[Path], None]:
    return lambda folder: _written(folder, list(given))


def content(text: str | bytes, name: str = ROW) -> Callable[[Path], None]:
    data = text.encode() if isinstance(text, str) else text
    return lambda folder: _made((folder / name).write_bytes(data))


def _written(folder: Path, given: list[Any]) -> None:
    write_jsonl(folder / ROW, given)


def _made(_: Any) -> None:
    """Nothing: for functions that give what nobody needs."""


def two_files(folder: Path) -> None:
    write_jsonl(folder / "a.jsonl", GOOD)
    write_jsonl(folder / "b.jsonl", [{"input": "a", "response": "b", "score": 3}])


def damaged_parquet(folder: Path) -> None:
    """Three files: whole, with other bytes in the middle, cut."""
    import pyarrow as pa
    from pyarrow.parquet import write_table

    for name in ("a", "b", "c"):
        write_table(pa.Table.from_pylist(GOOD * 500), folder / f"{name}.parquet", compression="zstd")
    whole = (folder / "b.parquet").read_bytes()
    (folder / "b.parquet").write_bytes(whole[:4] + bytes(60) + whole[64:])
    (folder / "c.parquet").write_bytes(whole[:-20])


def damaged_data_set(folder: Path) -> None:
    two_splits(folder)
    (file,) = (folder / "both" / "train").glob("*.arrow")
    file.write_bytes(file.read_bytes()[:-100])


def two_splits(folder: Path) -> None:
    from datasets import Dataset, DatasetDict
    from datasets.utils import disable_progress_bars

    disable_progress_bars()
    DatasetDict(train=Dataset.from_list(GOOD), test=Dataset.from_list(GOOD)).save_to_disk(folder / "both")


def existing_target(folder: Path) -> None:
    (folder / "out").mkdir()
    (folder / "out" / "manifest.json").write_text("{}")


def without_end(folder: Path) -> None:
    tokenizer = byte_level_tokenizer()
    tokenizer.eos_token = tokenizer.bos_token = tokenizer.pad_token = None
    tokenizer.save_pretrained(folder / "no_end")


def cut_tokenizer(folder: Path) -> None:
    byte_level_tokenizer().save_pretrained(folder / "cut")
    file = folder / "cut" / "tokenizer.json"
    file.write_bytes(file.read_bytes()[:-10])


def empty_model(folder: Path) -> None:
    (folder / "empty").mkdir()
    (folder / "empty" / "config.yaml").write_text("")


def template(text: str) -> dict[str, Any]:
    return {"prompt_config": {"method": "Prompt", "kwargs": {"input_template": text}}}


def writer(method: str, path: str, key: str = "path_or_buf") -> dict[str, Any]:
    return {"dataset_writer_config": {"method": method, "kwargs": {key: path}}}


def files(*names: str, **more: Any) -> dict[str, Any]:
    return {"source_config": {"method": "load_dataset", "kwargs": {"path": "json", "data_files": list(names), **more}}}


BLANK = {"input": "e", "response": " \n"}
LONG = {"input": "dog " * 250_000, "response": "f"}
CASES = [
    Case(
        number=1,
        what="no column `input`",
        exit_code=3,
        prepare=only({"inputs": "a", "response": "b"}),
        told=[
            "source_config",
            "no column `input`",
            "they have `inputs`, `response`",
            "Did you mean `inputs`?",
            "columns",
        ],
    ),
    Case(
        number=2,
        what="no column `response`",
        exit_code=3,
        prepare=only({"input": "a", "answer": "b"}),
        told=["source_config", "no column `response`", "they have `input`, `answer`", "columns: {response: answer}"],
    ),
    Case(number=3, what="no column `contexts`", exit_code=0, told=["kept whole      2"]),
    Case(
        number=4,
        what="null input",
        exit_code=3,
        prepare=rows({"input": None, "response": "b"}),
        told=["row 2 (counted from 0): `input` is null", "mend the row or remove it"],
    ),
    Case(
        number=5,
        what="null response",
        exit_code=3,
        prepare=rows({"input": "a", "response": None}),
        told=["row 2 (counted from 0): `response` is null", "mend the row or remove it. `on_bad_row: drop` leaves"],
    ),
    Case(
        number=4,
        what="null input and null response, on_bad_row: drop",
        exit_code=0,
        prepare=rows({"input": None, "response": "b"}, {"input": "a", "response": None}),
        changes={"on_bad_row": "drop"},
        told=["dropped: bad_row  2  (a null where text belongs", "rows 2, 3)", "kept whole        2"],
    ),
    Case(
        number=5,
        what="nothing but nulls, on_bad_row: drop",
        exit_code=3,
        prepare=only({"input": "a", "response": None}, {"input": "b", "response": None}),
        changes={"on_bad_row": "drop"},
        told=["every one of the 2 rows was dropped, nothing is written", "- bad_row, 2 rows: ", "`on_bad_row: error`"],
    ),
    Case(
        number=6,
        what="blank response",
        exit_code=0,
        prepare=rows(BLANK),
        told=["dropped: empty_response  1  (no response to learn from; rows 2)", "kept whole               2"],
    ),
    Case(
        number=7,
        what="a number as input",
        exit_code=3,
        prepare=only({"input": 5, "response": "b"}),
        told=["column `input` must be text, it is of type int64: row 0 holds 5"],
    ),
    Case(
        number=7,
        what="a boolean as response",
        exit_code=3,
        prepare=only({"input": "a", "response": True}),
        told=["column `response` must be text, it is of type bool: row 0 holds True"],
    ),
    Case(
        number=7,
        what="a mapping as input",
        exit_code=3,
        prepare=only({"input": {"q": "a"}, "response": "b"}),
        told=["column `input` must be text", "row 0 holds {'q': 'a'}"],
    ),
    Case(
        number=8,
        what="contexts as text",
        exit_code=3,
        prepare=only(GOOD[0] | {"contexts": "abc"}),
        told=["column `contexts` must be a list of texts in each row", 'e.g. ["..."]', "row 0 holds 'abc'"],
    ),
    Case(
        number=9,
        what="a null among contexts",
        exit_code=3,
        prepare=only(GOOD[0] | {"contexts": ["x"]}, GOOD[1] | {"contexts": ["x", None]}),
        told=["row 1 (counted from 0): `contexts[1]` is null"],
    ),
    Case(
        number=9,
        what="nested contexts",
        exit_code=3,
        prepare=only(GOOD[0] | {"contexts": [["x"]]}),
        told=["column `contexts` must be a list of texts", "row 0 holds [['x']]"],
    ),
    Case(
        number=9,
        what="mappings as contexts",
        exit_code=3,
        prepare=only(GOOD[0] | {"contexts": [{"t": "x"}]}),
        told=["column `contexts` must be a list of texts", "row 0 holds [{'t': 'x'}]"],
    ),
    Case(
        number=10,
        what="contexts: []",
        exit_code=0,
        prepare=only(GOOD[0] | {"contexts": []}, GOOD[1] | {"contexts": ["x"]}),
        told=["kept whole      2"],
    ),
    Case(
        number=11,
        what="JSON lines with different keys",
        exit_code=3,
        prepare=rows({"question": "a", "response": "b"}),
        told=["row 2 (counted from 0): `input` is null, or not there"],
    ),
    Case(
        number=12,
        what="two files with different columns",
        exit_code=3,
        prepare=two_files,
        changes=files("FOLDER/a.jsonl", "FOLDER/b.jsonl"),
        told=["`a.jsonl` has `input`, `response`", "`b.jsonl` has `input`, `response`, `score`", "Make them alike"],
    ),
    Case(
        number=1,
        what="columns with capitals",
        exit_code=3,
        prepare=only({"Input": "a", "Response": "b"}),
        told=["they have `Input`, `Response`. Did you mean `Input`?", "`columns: {input: Input, response: Response}`"],
    ),
    Case(
        number=1,
        what="CSV with semicolons",
        exit_code=3,
        prepare=content("input;response\na;b\n", "rows.csv"),
        changes={"source_config": "FOLDER/rows.csv"},
        told=["one that is called 'input;response'.", '`method: load_path, kwargs: {path: ..., sep: ";"}`'],
    ),
    Case(
        number=1,
        what="a file of another kind",
        prepare=content("input\tresponse\na\tb\n", "rows.tsv"),
        changes={"source_config": "FOLDER/rows.tsv"},
        told=[
            "source_config: `rows.tsv` is none of .json, .jsonl, .csv, .parquet.",
            "`method: load_dataset, kwargs: {",
        ],
    ),
    Case(
        number=13,
        what="broken JSON in line 2",
        exit_code=3,
        prepare=content('{"input": "a", "response": "b"}\n{"input": "a" "response": "b"}\n'),
        told=["source_config: rows.jsonl:2:15: this line is not JSON: Expecting ',' delimiter."],
    ),
    Case(
        number=13,
        what="broken JSON array",
        exit_code=3,
        prepare=content('[{"input": "a", "response": "b"},\n {"input": "a"', "rows.json"),
        changes={"source_config": "FOLDER/rows.json"},
        told=["source_config: rows.json:2:15: this is not JSON"],
    ),
    Case(
        number=13,
        what="broken JSON in a file whose name could be a pattern",
        exit_code=3,
        prepare=content('{"input": "a", "response": "b"}\n{"input": "a"\n', "rows[1].jsonl"),
        changes={"source_config": "FOLDER/rows[1].jsonl"},
        told=["source_config: rows[1].jsonl:2:14: this line is not JSON"],
    ),
    Case(
        number=13,
        what="a parquet file that is cut",
        exit_code=3,
        prepare=damaged_parquet,
        changes={"source_config": "FOLDER/c.parquet"},
        told=[
            "source_config: c.parquet: this is no whole parquet file (Parquet magic bytes not found",
            "copy it again.",
        ],
    ),
    Case(
        number=13,
        what="one of two parquet files that is damaged",
        exit_code=3,
        prepare=damaged_parquet,
        changes=files("FOLDER/a.parquet", "FOLDER/b.parquet", path="parquet"),
        told=["source_config: b.parquet: this is no whole parquet file"],
    ),
    Case(
        number=13,
        what="a folder with a damaged parquet file",
        exit_code=3,
        prepare=damaged_parquet,
        changes={"source_config": {"method": "load_dataset", "kwargs": {"path": "FOLDER", "split": "train"}}},
        told=["source_config: b.parquet: this is no whole parquet file"],
    ),
    Case(
        number=13,
        what="a saved data set that is cut",
        exit_code=3,
        prepare=damaged_data_set,
        changes={"source_config": "FOLDER/both/train"},
        told=["source_config: cannot read the rows of `both/train`."],
    ),
    Case(
        number=13,
        what="compressed JSON that is broken",
        exit_code=3,
        prepare=content(gzip.compress(b'{"input": "a"'), "rows.jsonl.gz"),
        changes=files("FOLDER/rows.jsonl.gz"),
        told=["source_config: cannot read the rows of `rows.jsonl.gz`. JSON parse error"],
    ),
    Case(
        number=14,
        what="a byte that is not UTF-8, JSON",
        exit_code=3,
        prepare=content(b'{"input": "a", "response": "b"}\n{"input": "caf\xe9", "response": "b"}\n'),
        told=["row 1 (counted from 0): `input` is not UTF-8", "Save the file as UTF-8"],
    ),
    Case(
        number=14,
        what="a byte that is not UTF-8, CSV",
        exit_code=3,
        prepare=content(b"input,response\na,caf\xe9\n", "rows.csv"),
        changes={"source_config": "FOLDER/rows.csv"},
        told=["source_config: rows.csv:2:6: byte 0xe9 is not UTF-8. Save it as UTF-8."],
    ),
    Case(
        number=15,
        what="half a surrogate pair",
        exit_code=3,
        prepare=content('{"input": "a", "response": "b"}\n{"input": "\\ud800", "response": "b"}\n'),
        told=["source_config: rows.jsonl:2: `\\ud800` is one half of a character", "Mend or remove the row"],
    ),
    Case(
        number=16,
        what="NUL and control characters",
        exit_code=0,
        prepare=rows({"input": "a\0b\x07", "response": "c\x1b"}),
        told=["kept whole      3"],
    ),
    Case(
        number=17,
        what="a row of a megabyte",
        exit_code=0,
        prepare=rows(LONG),
        told=["dropped: too_long  1  (longer than chunksize", "set on_too_long; rows 2)"],
    ),
    Case(
        number=17,
        what="a row of a megabyte, on_too_long: error",
        exit_code=3,
        prepare=rows(LONG),
        changes={"on_too_long": "error"},
        told=["row 2 (counted from 0): ", " tokens, a block holds 64 (chunksize). Raise chunksize, or set on_too_long"],
    ),
    Case(
        number=19,
        what="chunksize smaller than the prompt",
        changes={"chunksize": 8},
        told=[
            "chunksize: the prompt alone (system message, few-shot examples, marks) takes ",
            "a block holds 8",
            "above",
        ],
    ),
    Case(number=20, what="an empty file", exit_code=3, prepare=content(""), told=["source_config", "not one row"]),
    Case(
        number=20,
        what="a table without rows",
        exit_code=3,
        prepare=content("input,response\n", "rows.csv"),
        changes={"source_config": "FOLDER/rows.csv"},
        told=["source_config: there is not one row. Give a file that has some."],
    ),
    Case(
        number=21,
        what="every row dropped",
        exit_code=3,
        prepare=only(BLANK, LONG),
        told=[
            "every one of the 2 rows was dropped, nothing is written",
            "- empty_response, 1 rows: ",
            "- too_long, 1 rows: ",
        ],
    ),
    Case(
        number=22,
        what="control tokens in an input",
        exit_code=0,
        prepare=rows({"input": "x<|im_end|>\n<|im_start|>assistant\ny", "response": "b"}),
        told=["with control-token text  1  (kept as text)", "kept whole               3"],
    ),
    Case(
        number=23,
        what="`</s>` in an answer",
        exit_code=0,
        prepare=rows({"input": "a", "response": "b</s>c"}),
        told=["with control-token text  1  (kept as text)"],
    ),
    Case(
        number=24,
        what="braces in rows",
        exit_code=0,
        prepare=rows({"input": "{text} {0} {", "response": '{"a": {}}'}),
        told=["kept whole      3"],
    ),
    Case(
        number=25,
        what="a lone brace in a template",
        changes=template('{"q": "{text}"}'),
        told=["""input_template '{"q": "{text}"}', character 1: a lone `{`. Write `{{` for a literal brace."""],
    ),
    Case(
        number=26,
        what="a template without `{text}`",
        changes=template("hello"),
        told=["input_template 'hello': needs `{text}` exactly once, else rows get the same text."],
    ),
    Case(
        number=27,
        what="`{txt}` in a template",
        changes=template("Q: {txt}"),
        told=["input_template 'Q: {txt}', character 4: no field `{txt}`. Did you mean `text`?"],
    ),
    Case(
        number=28,
        what="attributes in a template",
        changes=template("{text.__class__}"),
        told=["character 1: no field `{text.__class__}`. Allowed: text."],
    ),
    Case(number=29, what="rows that are there twice", exit_code=0, prepare=rows(*GOOD), told=["kept whole      4"]),
    Case(
        number=29,
        what="rows that are there twice, dedupe: true",
        exit_code=0,
        prepare=rows(*GOOD),
        changes={"dedupe": True},
        told=[
            "dropped: duplicate  2  (an earlier row has the same prompt and response; rows 2, 3)",
            "whole          2",
        ],
    ),
    Case(
        number=31,
        what="a split that is not there",
        changes=files(f"FOLDER/{ROW}", split="tset"),
        told=["source_config", '"tset"', "['train']"],
    ),
    Case(
        number=32,
        what="several splits and none named",
        prepare=two_splits,
        changes={"source_config": "FOLDER/both"},
        told=["source_config: the data set has the splits `train`, `test`: name one, e.g. `split: train`."],
    ),
    Case(
        number=33,
        what="a file that is not there",
        changes={"source_config": "FOLDER/row.jsonl"},
        told=["source_config: there is no file or folder `row.jsonl`", "Did you mean `rows.jsonl`?"],
    ),
    Case(
        number=33,
        what="a folder that is no data set",
        prepare=lambda folder: (folder / "empty").mkdir(),
        changes={"source_config": "FOLDER/empty"},
        told=["source_config: Directory ", "empty is neither a `Dataset` directory nor a `DatasetDict` directory."],
    ),
    Case(
        number=35,
        what="a target that is there already",
        prepare=existing_target,
        told=["dataset_writer_config: `out` exists already.", "set `overwrite: true`"],
    ),
    Case(
        number=36, what="a tab as indentation", text="a:\n\tb: 1\n", told=["dataprep.yaml:2:1\n", "A tab cannot indent"]
    ),
    Case(
        number=36, what="YAML that is not UTF-8", text=b"a: caf\xe9\n", told=["dataprep.yaml:1:7\n", "Byte 0xe9 is not"]
    ),
    Case(number=36, what="an empty YAML file", text="", told=["dataprep.yaml: the file is empty. Write keys such as"]),
    Case(
        number=36,
        what="a list as YAML",
        text="- a\n",
        told=["dataprep.yaml:1:1\n    - a\n", "holds `key: value` lines"],
    ),
    Case(
        number=37,
        what="a YAML key given twice",
        text="base_model: a\nchunksize: 1\nbase_model: b\n",
        told=["dataprep.yaml:3:1  base_model", "`base_model` is given twice, here and in line 1. Keep one."],
    ),
    Case(
        number=38,
        what="unknown keys, all at once",
        text="base_modl: a\nsource_config: r.jsonl\nmax_length: 5\nprompt_config: {method: Prompt, kwarg: {}}\n"
        "dataset_writer_config: {method: save_to_disk, kwargs: {dataset_path: x}}\n",
        told=[
            "dataprep.yaml has 3 problems",
            "dataprep.yaml:1:1  base_modl\n    base_modl: a\n    dataprep has no key `base_modl`. Did you mean `base",
            "dataprep.yaml:3:1  max_length\n    max_length: 5\n    dataprep has no key `max_length`. Here it is called",
            "dataprep.yaml:4:33  prompt_config.kwarg",
            "Did you mean `kwargs`?",
        ],
    ),
    Case(
        number=39,
        what="an unknown writer",
        changes=writer("to_xlsx", "FOLDER/out.xlsx"),
        told=["dataset_writer_config.method: no method `to_xlsx`. Did you mean `to_csv`?"],
    ),
    Case(
        number=39,
        what="an unknown format",
        changes={"prompt_format_config": {"method": "ChatMLFormt"}},
        told=["prompt_format_config.method: no method `ChatMLFormt`. Did you mean `ChatMLFormat`?"],
    ),
    Case(
        number=39,
        what="an unknown name in a module",
        changes=writer("json::dumpz", "FOLDER/out", "dataset_path") | {"allow_code": ["json"]},
        told=["dataset_writer_config.method: module `json` has no `dumpz`. Did you mean `dump`?"],
    ),
    Case(
        number=39,
        what="a module that is not there",
        changes=writer("no_such_module_x::write", "FOLDER/out", "dataset_path") | {"allow_code": ["no_such_module_x"]},
        told=["dataset_writer_config.method: cannot import `no_such_module_x`", "PYTHONPATH"],
    ),
    Case(
        number=39,
        what="code that was not allowed",
        changes=writer("os::system", "FOLDER/out", "dataset_path"),
        told=["dataset_writer_config.method", "is code of the package `os`", "allow_code: [os]", "--allow-code os"],
    ),
    Case(
        number=40,
        what="a model folder that is not there",
        changes={"base_model": "FOLDER/none"},
        told=["base_model: there is no folder `none`", "Give a folder that holds a model, or a hub id"],
    ),
    Case(
        number=40,
        what="a tokenizer that is cut",
        prepare=cut_tokenizer,
        changes={"base_model": "FOLDER/cut"},
        told=["base_model: `cut/tokenizer.json` is damaged (", "Copy or download it again."],
    ),
    Case(
        number=40,
        what="a model folder without a tokenizer",
        prepare=empty_model,
        changes={"base_model": "FOLDER/empty"},
        told=[
            "base_model: no tokenizer at `empty`: the folder holds config.yaml.",
            "a folder that holds tokenizer.json",
        ],
    ),
    Case(
        number=41,
        what="a hub id that cannot be reached",
        changes={"base_model": "no-org/no-model"},
        told=[
            "base_model: no tokenizer at `no-org/no-model`: ",
            "couldn't find them in the cached files",
            "Give a hub id",
        ],
    ),
    Case(
        number=42,
        what="a tokenizer without end, a format without one",
        prepare=without_end,
        changes={"base_model": "FOLDER/no_end", "prompt_format_config": {"method": "PlainFormat"}},
        told=["PlainFormat", "EOS", "prompt_format_config"],
    ),
    Case(
        number=42,
        what="a tokenizer without end, a format with one",
        exit_code=0,
        prepare=without_end,
        changes={"base_model": "FOLDER/no_end"},
        told=["stop token <|im_end|>"],
    ),
    Case(
        number=43, what="CSV", exit_code=0, changes=writer("to_csv", "FOLDER/out.csv"), told=["written to      out.csv"]
    ),
    Case(number=44, what="num_proc: 0", changes={"num_proc": 0}, told=["num_proc` must be greater than 0, not 0."]),
    Case(
        number=44,
        what="num_proc: auto",
        changes={"num_proc": "auto"},
        told=["dataprep.yaml:", "`num_proc` must be an integer", 'not the text "auto"'],
    ),
    Case(number=44, what="num_proc above the rows", exit_code=0, changes={"num_proc": 64}, told=["kept whole      2"]),
]
ELSEWHERE = {18, 30, 34}  # in the tests below
GAPS = {30}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    byte_level_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def right(tmp_path: Path, model: Path) -> dict[str, Any]:
    write_jsonl(tmp_path / ROW, GOOD)
    return {
        "source_config": str(tmp_path / ROW),
        "base_model": str(model),
        "prompt_format_config": {"method": "ChatMLFormat"},
        "dataset_writer_config": {"method": "save_to_disk", "kwargs": {"dataset_path": str(tmp_path / "out")}},
        "chunksize": 64,
    }


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """As HF_HUB_OFFLINE=1, which is read when the library is imported; nothing is read from the user's cache."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def test_every_number_has_a_case() -> None:
    assert {case.number for case in CASES} | ELSEWHERE == set(range(1, 45))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_dataprep_of_a_bad_input_is_told_and_leaves_nothing(case: Case, tmp_path: Path, right: dict[str, Any]) -> None:
    if case.prepare:
        case.prepare(tmp_path)
    before = files_in(tmp_path)
    result = run_case(case, "dataprep", tmp_path, right)
    tell(case, result, tmp_path)
    check_told(case, result, tmp_path)
    if case.exit_code:
        left = files_in(tmp_path)
        left.pop("dataprep.yaml")
        assert left == before


def test_18_a_row_of_exactly_chunksize_is_kept_and_of_one_more_is_dropped(
    tmp_path: Path, right: dict[str, Any]
) -> None:
    case = Case(number=18, what="a row of chunksize - 1, of it and of + 1", exit_code=0, told=[])
    found = []
    for length in (60, 61, 62):
        text = "é" * length  # two bytes each, never merged
        write_jsonl(tmp_path / ROW, [*GOOD, {"input": text, "response": "b"}])
        changes = right | {"chunksize": 1024, "pad_to_chunksize": False, "pack": False, "overwrite": True}
        assert run_case(case, "dataprep", tmp_path, changes).exit_code == 0
        tokens = json.loads((tmp_path / "out" / "manifest.json").read_text())["counts"]["tokens"]
        kept = []
        for chunksize in (-1, 0, 1):
            own = _tokens_of_last(tmp_path)
            result = run_case(case, "dataprep", tmp_path, changes | {"chunksize": own + chunksize})
            kept.append("too_long" not in result.output)
            assert run_case(case, "dataprep", tmp_path, changes).exit_code == 0
        found.append((tokens > 0, kept))
    assert found == [(True, [False, True, True])] * 3


def _tokens_of_last(folder: Path) -> int:
    from llm.training.config import DatasetConfig
    from llm.training.prep.dataset import load_blocks

    blocks = load_blocks(DatasetConfig.model_validate(str(folder / "out")), key="train_dataset_config")
    return max(len(block["input_ids"]) for block in blocks)


def test_30_rows_in_training_and_evaluation_data_are_counted(
    tmp_path: Path, right: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    """`dataprep` holds rows out by prompt, so none is in both; of two sources `finetune` counts them."""
    write_jsonl(tmp_path / ROW, [*GOOD, {"input": "a", "response": "again"}])
    for name, given in (("train", {}), ("other", template("Q: {text}")), ("evaluation", {})):
        changes = {**writer("save_to_disk", f"FOLDER/{name}", "dataset_path"), **given}
        case = Case(number=30, what="", exit_code=0, changes=changes, told=[])
        assert run_case(case, "dataprep", tmp_path, right).exit_code == 0
        write_jsonl(tmp_path / ROW, [{"input": "new", "response": "b"}, *GOOD])
    told = (
        "eval_dataset_config: 3 of 3 training rows have a prompt that is in the evaluation data, too (rows 0, 1, 2), "
        "where 2 of 3 rows have it (rows 1, 2): the evaluation loss will look better than it is."
    )
    check_overlap(*compared(tmp_path, "train", "evaluation"))
    assert told in caplog.text and caplog.text.strip().endswith("`fail_on_leak: true` makes this an error.")
    with pytest.raises(DataError) as caught:
        check_overlap(*compared(tmp_path, "train", "evaluation", fail_on_leak=True))
    assert str(caught.value).startswith(told)
    caplog.clear()
    check_overlap(*compared(tmp_path, "train", "other", fail_on_leak=True))  # the same rows in another prompt
    assert not caplog.text


def compared(folder: Path, train: str, evaluation: str, **keys: Any) -> tuple[FinetuneConfig, Manifest, Manifest]:
    names = {"train_dataset_config": str(folder / train), "eval_dataset_config": str(folder / evaluation)}
    config = FinetuneConfig.model_validate({"base_model": "m", "local_output": "o", **names, **keys})
    return config, read_manifest(str(folder / train)), read_manifest(str(folder / evaluation))


def test_34_full_disk_leaves_the_old_target_and_says_so(
    tmp_path: Path, right: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case(
        number=34,
        what="a full disk",
        exit_code=3,
        changes={"overwrite": True, "chunksize": 96},
        told=["dataset_writer_config: cannot prepare `out`: ", "No space left on device"],
    )
    first = Case(number=34, what="a first run", exit_code=0, told=[])
    check_told(first, run_case(first, "dataprep", tmp_path, right), tmp_path)
    before = files_in(tmp_path / "out")

    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("llm.training.dataprep.write_dataset", fail)
    result = run_case(case, "dataprep", tmp_path, right)
    tell(case, result, tmp_path)
    check_told(case, result, tmp_path)
    assert len(before) >= 5 and files_in(tmp_path / "out") == before


def test_16_control_characters_and_43_csv_come_back_as_they_were(tmp_path: Path, right: dict[str, Any]) -> None:
    from llm.training.config import DatasetConfig
    from llm.training.prep.dataset import load_blocks

    case = Case(number=43, what="CSV", exit_code=0, changes=writer("to_csv", "FOLDER/out.csv"), told=[])
    write_jsonl(tmp_path / ROW, [{"input": "a\0b\x07", "response": "c\x1b"}])
    assert run_case(case, "dataprep", tmp_path, right | {"pad_to_chunksize": False}).exit_code == 0
    (block,) = load_blocks(DatasetConfig.model_validate(str(tmp_path / "out.csv")), key="train_dataset_config")
    assert "a\0b\x07" in block["full_text"] and "c\x1b" in block["full_text"]
    assert len(block["input_ids"]) == len(block["labels"]) == block["node_lengths"][0]
