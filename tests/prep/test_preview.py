"""`llm-train inspect`: blocks of every kind of data set, rows before preparing, and what is told instead of them."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import byte_level_tokenizer, sentencepiece_tokenizer
from prep_helpers import Rows, config_file, make_config, settings, some_rows, write_jsonl
from typer.testing import CliRunner, Result

from llm.cli import app
from llm.errors import DataError
from llm.tokenizer import PromptTokenizer
from llm.training.dataprep import prepare
from llm.training.prep.manifest import manifest_path
from llm.training.prep.preview import block_view
from llm.training.prep.token_view import Layout, legend, view_lines

pytest_plugins = ("prep_fixtures",)

TWO_ROWS = [{"input": "a dog", "response": "it is"}, {"input": "é", "response": "the fox"}]
BARE = {"prompt_config": {"method": "Prompt"}, "chunksize": 48}


def inspect(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, ["inspect", *map(str, arguments)])


def shown(*arguments: str | Path) -> str:
    result = inspect(*arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


def refused(code: int, *arguments: str | Path) -> str:
    result = inspect(*arguments)
    assert (result.exit_code, "Traceback" in result.output) == (code, False)
    return result.stderr


def prepared(folder: Path, model: Path, name: str = "train", rows: Rows = TWO_ROWS, **changes: Any) -> str:
    source = write_jsonl(folder / "source.jsonl", rows)
    target = name if "://" in name else str(folder / name)
    prepare(make_config(folder, settings(source, model, target, **(BARE | changes))))
    return target


def titles(output: str) -> list[str]:
    return [line for line in output.splitlines() if line.startswith(("Block", "Row", "block", "row"))]


# --- prepared --------------------------------------------------------------------------------------------------------


def test_prepared_blocks_show_every_token_of_each_row_then_the_padding(tmp_path: Path, model: Path) -> None:
    lines = shown(prepared(tmp_path, model)).splitlines()
    assert lines[:3] == [
        legend().plain,
        "Block 0: 27 tokens, 7 trained; 21 padding; rows 0, 1; 2 nodes, none shared",
        "--- row 0 (node 0): 14 tokens, 4 trained",
    ]
    assert lines[-3:] == ["padding    <pad> x 21", "", "block 0 of 1"]
    second = lines.index("--- row 1 (node 1): 13 tokens, 3 trained")
    for start, prompt, response in ((3, "a│·dog", "i│t│·is"), (second + 1, "é│⋯", "the│·fox")):
        row = lines[start:]
        assert row[0].startswith("prompt     <|im_start|>│") and row[1].endswith(f"{prompt}│<|im_end|>│↵")
        assert [line for line in row if line[9:10] == ">"][:2] == [f"trained  > {response}", "stop     > <|im_end|>"]


@pytest.mark.parametrize("name", ["train", "train.parquet", "train.jsonl", "train.csv"])
def test_data_set_of_every_writer_shows_the_same(tmp_path: Path, model: Path, name: str) -> None:
    (tmp_path / "other").mkdir()
    wanted = shown(prepared(tmp_path / "other", model))
    assert shown(prepared(tmp_path, model, name)) == wanted and "trained  > " in wanted


def test_data_set_on_s3_shows_the_same(tmp_path: Path, model: Path, s3: str) -> None:
    wanted = shown(prepared(tmp_path, model, "local"))
    assert shown(prepared(tmp_path, model, "s3://prep-tests/inspect/train")) == wanted


def test_rows_and_first_choose_the_blocks(tmp_path: Path, model: Path) -> None:
    path = prepared(tmp_path, model, rows=some_rows(6), pack=False, chunksize=256)
    assert [line[:9] for line in titles(shown(path))] == ["Block 0: ", "Block 1: ", "Block 2: ", "blocks 0 "]
    chosen = titles(shown(path, "--first", "4", "--rows", "1"))
    assert chosen[0].startswith("Block 4: ") and chosen[1:] == ["block 4 of 6; more: --first 5"]
    assert titles(shown(path, "--first", "4"))[2:] == ["blocks 4 to 5 of 6"]


def test_ids_and_tokens_are_shown_on_demand(tmp_path: Path, model: Path) -> None:
    path = prepared(tmp_path, model)
    assert " # " not in shown(path) and "left out" not in shown(path)
    output = shown(path, "--ids", "--tokens", "2")
    assert "         # 4\n" in output and "(id 5) x 21" in output  # <|im_end|> and <pad>
    assert "         > ... 1 of 3 tokens left out" in output


def test_tokens_left_out_by_default_are_those_over_200(tmp_path: Path, model: Path) -> None:
    path = prepared(tmp_path, model, rows=[{"input": "9" * 300, "response": "8" * 150}], chunksize=1024)
    assert shown(path).count("left out") == 1 and "left out" not in shown(path, "--tokens", "0")


def test_padding_with_the_stop_tokens_id_is_padding(tmp_path: Path, model: Path) -> None:
    tokenizer = byte_level_tokenizer()
    tokenizer.pad_token = "<|im_end|>"
    tokenizer.save_pretrained(tmp_path / "model")
    lines = shown(prepared(tmp_path, tmp_path / "model")).splitlines()
    assert lines[-3] == "padding    <|im_end|> x 21" and lines.count("stop     > <|im_end|>") == 2


def test_blocks_without_padding_have_no_line_of_it(tmp_path: Path, model: Path) -> None:
    assert "padding" not in shown(prepared(tmp_path, model, pad_to_chunksize=False))


# --- structure -------------------------------------------------------------------------------------------------------


def shared_block(tokenizer: PromptTokenizer, **changes: Any) -> dict[str, Any]:
    """A prompt that two rows go on from, of which the second has a child, too; a row of its own; padding."""
    stop, pad = tokenizer.control_tokens["<|im_end|>"], tokenizer.control_tokens["<pad>"]
    the, dog, fox = (tokenizer.encode([word])[0][0] for word in ("the", " dog", " fox"))
    no = -100
    return {
        "input_ids": [the, dog, fox, dog, stop, fox, the, stop, dog, stop, pad],
        "labels": [no, no, no, dog, stop, no, the, stop, dog, stop, no],
        "position_ids": [0, 1, 2, 3, 4, 2, 3, 4, 0, 1, 0],
        "node_lengths": [2, 3, 1, 2, 2],
        "node_parents": [-1, 0, 0, 2, -1],
        "example_rows": [7, 3, 9],
    } | changes


def lines_of(block: dict[str, Any], tokenizer: PromptTokenizer) -> list[str]:
    stop = tokenizer.control_tokens["<|im_end|>"]
    view = block_view(block, number=5, tokenizer=tokenizer, stop_token_id=stop)
    return [line.plain for line in view_lines(view, Layout())]


def test_shared_parts_and_what_goes_on_from_them(tokenizers: dict[str, PromptTokenizer]) -> None:
    tokenizer = tokenizers["byte_level"]
    assert lines_of(shared_block(tokenizer), tokenizer) == [
        "Block 5: 10 tokens, 6 trained; 1 padding; rows 7, 3, 9; 5 nodes, parents -1 0 0 2 -1",
        "--- node 0, shared by nodes 1, 2: 2 tokens, 0 trained",
        "shared   = the│·dog",
        "--- row 7 (node 1, goes on from node 0 at position 2): 3 tokens, 2 trained",
        "prompt     ·fox",
        "trained  > ·dog",
        "stop     > <|im_end|>",
        "--- node 2, goes on from node 0 at position 2, shared by node 3: 1 token, 0 trained",
        "shared   = ·fox",
        "--- row 3 (node 3, goes on from node 2 at position 3): 2 tokens, 2 trained",
        "trained  > the",
        "stop     > <|im_end|>",
        "--- row 9 (node 4): 2 tokens, 2 trained",
        "trained  > ·dog",
        "stop     > <|im_end|>",
        "padding    <pad> x 1",
    ]


def test_child_keeps_the_space_that_it_has_behind_its_parent(tokenizers: dict[str, PromptTokenizer]) -> None:
    tokenizer = tokenizers["sentencepiece"]
    head, rest = tokenizer.encode(["x"])[0], tokenizer.encode(["x dog"])[0]
    child = rest[len(head) :]
    block = {
        "input_ids": rest,
        "labels": [-100] * len(rest),
        "position_ids": list(range(len(rest))),
        "node_lengths": [len(head), len(child)],
        "node_parents": [-1, 0],
    }
    assert lines_of(block, tokenizer)[-1].startswith("prompt     ·d")


def test_rows_that_do_not_match_the_nodes_are_not_guessed(tokenizers: dict[str, PromptTokenizer]) -> None:
    lines = lines_of(shared_block(tokenizers["byte_level"], example_rows=[7, 3]), tokenizers["byte_level"])
    assert "rows 7, 3;" in lines[0] and not any(line.startswith("--- row") for line in lines)


def test_label_that_is_another_token_is_told(tokenizers: dict[str, PromptTokenizer]) -> None:
    block = shared_block(tokenizers["byte_level"])
    block["labels"][3] += 1
    assert lines_of(block, tokenizers["byte_level"])[0].endswith("; 1 label not the token itself")


def test_padding_with_a_label_is_shown_as_trained(tokenizers: dict[str, PromptTokenizer]) -> None:
    block = shared_block(tokenizers["byte_level"])
    block["labels"][-1] = block["input_ids"][-1]
    assert lines_of(block, tokenizers["byte_level"])[-1] == "trained  > <pad>"


@pytest.mark.parametrize(
    "changes",
    [
        {"labels": [1]},
        {"position_ids": [1]},
        {"node_lengths": [2, 3, 1, 2]},
        {"node_lengths": [2, 3, 1, 2, 4]},
        {"node_lengths": [], "node_parents": []},
        {"node_parents": [-1, 2, 0, 2, -1]},
        {"node_parents": [-2, 0, 0, 2, -1]},
    ],
)
def test_columns_that_do_not_fit_together_are_a_data_error(
    tokenizers: dict[str, PromptTokenizer], changes: dict[str, Any]
) -> None:
    with pytest.raises(DataError, match=r"inspect, block 5: .* do not fit together. Run dataprep again"):
        lines_of(shared_block(tokenizers["byte_level"], **changes), tokenizers["byte_level"])


# --- before preparing ------------------------------------------------------------------------------------------------


def yaml(folder: Path, model: Path, rows: Rows = TWO_ROWS, **changes: Any) -> Path:
    source = write_jsonl(folder / "source.jsonl", rows)
    return config_file(folder, settings(source, model, folder / "out" / "train", **(BARE | changes)))


def test_rows_before_preparing_show_the_tokens_that_dataprep_makes(tmp_path: Path, model: Path) -> None:
    before = shown(yaml(tmp_path, model)).splitlines()
    after = shown(prepared(tmp_path, model)).splitlines()
    assert titles("\n".join(before)) == [
        "Row 0: 14 tokens, 4 trained",
        "Row 1: 13 tokens, 3 trained",
        "rows 0 to 1 of 2",
    ]
    tokens = [line for line in before if not line.startswith(("Row", "rows")) and line]
    assert tokens == [line for line in after if not line.startswith(("Block", "block", "---", "padding")) and line]


def test_inspecting_rows_opens_no_fast_tokenizer(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llm.training.prep.engine._MANY_BYTES", 1)
    monkeypatch.setattr(PromptTokenizer, "begin_fast", lambda self: pytest.fail("it takes 0.25 s to 2 s"))
    assert len(titles(shown(yaml(tmp_path, model)))) >= 2


def test_inspecting_rows_writes_nothing(tmp_path: Path, model: Path) -> None:
    config = yaml(tmp_path, model)
    before = sorted(tmp_path.rglob("*"))
    shown(config)
    assert sorted(tmp_path.rglob("*")) == before


def test_dropped_row_tells_its_reason_and_what_helps(tmp_path: Path, model: Path) -> None:
    rows = [{"input": "a", "response": " "}, *TWO_ROWS, {"input": "b", "response": "word " * 50}]
    output = shown(yaml(tmp_path, model, rows), "--rows", "9")
    assert titles(output)[0] == "Row 0: dropped, empty_response (no response to learn from)"
    assert titles(output)[3].startswith("Row 3: dropped, too_long, ")
    assert titles(output)[3].endswith(" tokens (longer than chunksize, or than the model can read: raise chunksize, "
                                      "or set on_too_long)")  # fmt: skip
    assert output.count("stop     >") == 2


def test_cut_row_and_control_token_text_are_told(tmp_path: Path, model: Path) -> None:
    row = {"input": "x" * 60, "response": "a", "contexts": ["b", "c"]}
    config = yaml(tmp_path, model, [row, {"input": "</s>", "response": "a"}], on_too_long="truncate_contexts")
    cut, control, _ = titles(shown(config))
    assert "; cut by 2 contexts; cut by " in cut and cut.endswith(" characters of the input")
    assert control.endswith(" trained; control-token text kept as text")
    allowed = titles(shown(config, "--set", "allow_special_tokens_in_data=true"))[1]
    assert allowed.endswith("; control-token text became control tokens")


def test_first_and_set_hold_for_rows_too(tmp_path: Path, model: Path) -> None:
    config = yaml(tmp_path, model, some_rows(9), chunksize=256)
    output = titles(shown(config, "--first", "7", "--rows", "1", "--set", "chunksize=40"))
    assert output[0].startswith("Row 7: dropped, too_long") and output[1] == "row 7 of 9; more: --first 8"


def test_rows_before_a_mistake_are_shown(tmp_path: Path, model: Path) -> None:
    rows = [*TWO_ROWS, {"input": "b", "response": None}]
    result = inspect(yaml(tmp_path, model, rows))
    assert result.exit_code == 3 and len(titles(result.stdout)) == 2
    assert "row 2 (counted from 0): `response` is null" in result.stderr


# --- mistakes --------------------------------------------------------------------------------------------------------


def test_missing_data_set_rows_and_unfinished_sets_are_told(tmp_path: Path, model: Path) -> None:
    path = prepared(tmp_path, model)
    assert "inspect: there is no file or folder" in refused(2, tmp_path / "trian")
    assert "Did you mean `train`?" in refused(2, tmp_path / "trian")
    assert "inspect: these are no prepared blocks" in refused(3, tmp_path / "source.jsonl")
    Path(manifest_path(path)).unlink()
    assert "it is not a data set that dataprep finished" in refused(3, path)


def test_first_beyond_the_end_is_told_with_the_count(tmp_path: Path, model: Path) -> None:
    path = prepared(tmp_path, model)
    assert "error: --first 1: there are 1 blocks, numbered from 0 to 0." in refused(2, path, "--first", "1")
    assert "--first 2: there are 2 rows" in refused(2, yaml(tmp_path, model), "--first", "2")


def test_options_that_the_target_has_no_use_for_are_told(tmp_path: Path, model: Path) -> None:
    config = yaml(tmp_path, model)
    assert "Write --set base_model=a/b" in refused(2, config, "--base-model", "a/b")
    assert "is a data set, which has no keys" in refused(2, tmp_path, "--set", "chunksize=9")
    assert "Did you mean `chunksize`?" in refused(2, config, "--set", "chunk_size=9")
    assert inspect(config, "--rows", "0").exit_code == 2


def test_tokenizer_that_has_moved_is_told_and_given_by_hand(tmp_path: Path, model: Path) -> None:
    moved = shutil.copytree(model, tmp_path / "model")
    path = prepared(tmp_path, moved)
    wanted = shown(path)
    moved = moved.rename(tmp_path / "moved")
    told = refused(2, path)
    assert "base_model: there is no folder" in told and "--base-model gives another place" in told
    assert shown(path, "--base-model", moved) == wanted


def test_tokenizer_that_has_changed_is_an_error_and_given_by_hand_a_warning(
    tmp_path: Path, model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = prepared(tmp_path, model)
    other = tmp_path / "other"
    sentencepiece_tokenizer().save_pretrained(other)
    caplog.clear()
    caplog.set_level("WARNING")
    assert shown(path, "--base-model", model) and not caplog.records
    assert "Block 0: " in shown(path, "--base-model", other)
    [warning] = [record for record in caplog.records if record.levelname == "WARNING"]
    assert "the same ids mean other words" in warning.message
    manifest = Path(manifest_path(path))
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"base_model": str(other)}))
    told = refused(3, path)
    assert "the same ids mean other words. Run dataprep again, or give the right one with --base-model" in told
