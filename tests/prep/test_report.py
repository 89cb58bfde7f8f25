"""The report: facts as counted by hand, and a page that stands alone, escapes everything and says all of it."""

import json
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from conftest import byte_level_tokenizer
from prep_helpers import make_config, settings, write_jsonl

from llm.named_formats import ChatMLFormat
from llm.prompt import Prompt
from llm.tokenizer import PromptTokenizer
from llm.training.config import DataPrepConfig
from llm.training.dataprep import prepare
from llm.training.prep.encode import Encoder
from llm.training.prep.engine import encode_rows
from llm.training.prep.pack import pack_examples
from llm.training.prep.report import Gap, Report, make_report
from llm.training.prep.report_page import render_page
from llm.training.prep.rows import load_source
from llm.training.prep.summary import ledger_with_blocks, make_manifest
from llm.training.prep.token_view import Run

pytest_plugins = ("prep_fixtures",)

SCRIPT = '<script>alert("x & y")</script>'
LONG = "z" * 400
ROWS: list[dict[str, Any]] = [
    {"input": "qq", "response": "a"},
    {"input": "qq", "response": "bbb"},  # the prompt of row 0
    {"input": SCRIPT, "response": f"{SCRIPT} <|im_end|>"},
    {"input": "", "response": " "},
    {"input": "qq", "response": "a"},  # row 0 again
    {"input": "r" * 32, "response": "é"},
    {"input": LONG, "response": "long"},
]
EMPTY_TAGS = {"meta", "br"}  # those of the pictures close themselves


class Page(HTMLParser):
    """Reads a page; fails where a tag is not closed, collects its texts, attributes and tags."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.texts: list[str] = []
        self._open: list[str] = []
        self.feed(html)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in EMPTY_TAGS:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    @property
    def text(self) -> str:
        """All that is to be read, white space folded."""
        return " ".join(" ".join(self.texts).split())


@pytest.fixture
def config(model: Path, tmp_path: Path) -> DataPrepConfig:
    source = write_jsonl(tmp_path / "rows.jsonl", ROWS)
    return make_config(tmp_path, settings(source, model, tmp_path / "out", chunksize=200))


def report_of(config: DataPrepConfig, folder: Path, **changes: Any) -> Report:
    tokenizer = PromptTokenizer(byte_level_tokenizer())
    form = ChatMLFormat().for_tokenizer(tokenizer)
    encoder = Encoder(tokenizer=tokenizer, prompt=Prompt(), prompt_format=form, max_tokens=200, **changes)
    folder.mkdir(exist_ok=True)
    examples = encode_rows(load_source(config.source_config), encoder, folder)
    packing = pack_examples(examples.lengths, chunksize=200)
    manifest = make_manifest(config, encoder, examples, packing)
    return make_report(manifest, examples, ledger_with_blocks(examples, packing), encoder)


@pytest.fixture
def report(config: DataPrepConfig, tmp_path: Path) -> Report:
    return report_of(config, tmp_path / "spill")


def with_rows(config: DataPrepConfig, rows: list[dict[str, Any]], folder: Path) -> DataPrepConfig:
    source = write_jsonl(folder / "other.jsonl", rows)
    return config.model_copy(update={"source_config": config.source_config.model_validate(str(source))})


# --- facts -----------------------------------------------------------------------------------------------------------


def test_report_counts_what_was_dropped_repeated_and_ambiguous(report: Report) -> None:
    assert [(found.reason, found.rows, found.first_rows) for found in report.dropped] == [
        ("empty_response", 1, [3]),
        ("too_long", 1, [6]),
    ]
    assert "raise chunksize" in report.dropped[1].advice
    assert (report.duplicates.rows, report.duplicates.first) == (1, [(4, 0)])
    assert (report.duplicates.ambiguous_prompts.rows, report.duplicates.ambiguous_prompts.first_rows) == (1, [0])
    assert (report.control_text.rows, report.control_text.first_rows) == (1, [2])
    assert report.cut.rows == 0


def test_report_lengths_are_those_of_the_tokens(report: Report) -> None:
    # a + stop, bbb + stop, a + stop, é (two bytes) + stop; the script in single bytes and <|im_end|> as text
    script = len(PromptTokenizer(byte_level_tokenizer()).encode([f"{SCRIPT} <"])[0])
    response, total = report.lengths["response"], report.lengths["total"]
    assert (response.rows, response.min, response.median) == (5, 2, 3)
    assert response.max == response.p95 > script
    assert response.mean == pytest.approx((2 + 4 + 2 + 3 + response.max) / 5, abs=0.05)
    assert total.mean * 5 == pytest.approx(report.counts["tokens"], abs=0.5)
    assert report.trained_share == pytest.approx(response.mean * 5 / report.counts["tokens"], abs=0.01)
    assert report.lengths["contexts"].rows == 0


def test_report_histograms_hold_every_row_once_in_the_right_bin(report: Report) -> None:
    edges = report.bin_edges
    assert edges[:6] == [2, 3, 4, 5, 6, 7]
    assert edges == sorted(set(edges))
    for lengths in report.lengths.values():
        assert sum(lengths.counts) == lengths.rows
        assert len(lengths.counts) == len(edges) - 1
    assert report.lengths["response"].counts[:3] == [2, 1, 1]
    assert edges[-2] <= report.lengths["total"].max < edges[-1]


def test_report_names_the_longest_rows_dropped_ones_too(report: Report) -> None:
    longest = report.longest
    assert (longest[0].row, longest[0].outcome, longest[0].num_prompt_tokens) == (6, "dropped: too_long", None)
    assert longest[0].num_tokens > 400
    assert [one.row for one in longest[1:]] == [2, 5, 1, 0, 4]
    assert [one.num_tokens for one in longest] == sorted((one.num_tokens for one in longest), reverse=True)


def test_report_of_cut_rows_says_what_they_lost(config: DataPrepConfig, tmp_path: Path) -> None:
    rows = [{"input": "q", "response": "a", "contexts": ["c" * 100, "d" * 150]}, {"input": LONG, "response": "b"}]
    config = with_rows(config, [{"contexts": [], **row} for row in rows], tmp_path)
    report = report_of(config, tmp_path / "spill", on_too_long="truncate_contexts")
    assert (report.cut.rows, report.cut.first_rows, report.cut.contexts) == (2, [0, 1], 1)
    assert 0 < report.cut.characters < 400
    assert report.lengths["contexts"].rows == 1
    assert 0 < report.lengths["contexts"].max <= 100
    assert "cut to fit" in report.examples[0].why


def test_report_shows_each_chosen_example_whole_and_says_why(report: Report) -> None:
    assert [example.row for example in report.examples] == [0, 1, 2, 4, 5]
    assert [example.why.split(",")[0] for example in report.examples] == [*["one of the first"] * 3, *["at random"] * 2]
    assert "the longest" in report.examples[2].why
    assert "holds control-token text" in report.examples[2].why
    for example in report.examples:
        runs = [part for part in example.parts if isinstance(part, Run)]
        assert sum(len(run.ids) for run in runs) == example.num_tokens
        assert [run.kind for run in runs] == ["prompt", "trained", "stop"]
        assert len(runs[1].ids) + 1 == example.num_trained_tokens


def test_report_shows_the_same_beginning_once_and_long_texts_in_part(config: DataPrepConfig, tmp_path: Path) -> None:
    rows = [{"input": "the same words " * 3 + chr(97 + n) + "xy" * 200 * (n == 3), "response": "a"} for n in range(30)]
    report = report_of(with_rows(config, rows, tmp_path), tmp_path / "spill")  # row 3 is too long
    assert len(report.examples) == 12
    assert not any(isinstance(part, Gap) for part in report.examples[0].parts)
    for example in report.examples[1:]:
        [gap] = [part for part in example.parts if isinstance(part, Gap)]
        assert gap.same_as_row == 0
        assert gap.num_tokens + sum(len(p.ids) for p in example.parts if isinstance(p, Run)) == example.num_tokens


def test_report_leaves_out_the_middle_of_a_long_text(
    config: DataPrepConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llm.training.prep.report._MOST_TOKENS", 20)
    monkeypatch.setattr("llm.training.prep.report._END_TOKENS", 5)
    rows = [{"input": "".join(map(chr, range(97, 122))), "response": "xyz"}]
    [example] = report_of(with_rows(config, rows, tmp_path), tmp_path / "spill").examples
    first, gap, last, trained, stop = example.parts
    assert isinstance(first, Run) and isinstance(gap, Gap) and isinstance(last, Run)
    assert (len(first.ids), len(last.ids), gap.same_as_row) == (5, 5, None)
    assert len(first.ids) + gap.num_tokens + len(last.ids) + 4 == example.num_tokens
    assert "".join(trained.shown) == "xyz" if isinstance(trained, Run) else False
    assert isinstance(stop, Run) and stop.shown == ("<|im_end|>",)
    assert f"{gap.num_tokens} tokens left out" in render_page(report_of(with_rows(config, rows, tmp_path), tmp_path))


# --- the page --------------------------------------------------------------------------------------------------------


def test_page_is_well_formed_and_needs_nothing_from_outside(report: Report) -> None:
    html = render_page(report)
    page = Page(html)
    assert html.startswith("<!DOCTYPE html>")
    links = [value for name, value in page.attributes if name in ("href", "src", "xlink:href", "action", "data")]
    assert links and all(link and link.startswith("#") for link in links)
    ids = {value for name, value in page.attributes if name == "id"}
    assert {link.removeprefix("#") for link in links if link} <= ids
    assert not {"script", "link", "iframe", "img", "object"} & {*page.tags}
    assert not any(word in html for word in ("http://", "https://", "url(", "@import"))


def test_page_escapes_what_rows_and_settings_hold(report: Report) -> None:
    evil = replace(report, base_model=SCRIPT, stop_token="</style><b onclick=x>", prompt='"><img src=x>')
    html = render_page(evil)
    page = Page(html)
    assert "<script" not in html and "<img" not in html and "onclick" not in {name for name, _ in page.attributes}
    assert SCRIPT in page.text
    assert "alert" in "".join("".join(page.texts).split())  # the row, shown token by token


def test_page_says_every_number_of_the_report(report: Report) -> None:
    page = Page(render_page(report))
    text = page.text
    counts = report.counts
    wanted = [counts["tokens"], counts["trained_tokens"], counts["blocks"], counts["rows_read"], report.chunksize]
    wanted += [n for one in report.longest for n in (one.row, one.num_tokens)]
    for lengths in report.lengths.values():
        if lengths.rows:
            wanted += [lengths.min, lengths.median, lengths.p95, lengths.max, lengths.mean]
    words = {*text.replace(":", " ").replace(";", " ").split()}
    assert len(wanted) > 25
    assert [number for number in wanted if f"{number:,}" not in words] == []
    for told in (
        f"{report.trained_share:.1%}".replace("%", " %"),
        f"{counts['density']:.1%}".replace("%", " %"),
        "5 of 7",
        "2 rows dropped (28.6 %)",
        "1 row repeated word for word",
        "4 (as 0)",
        "1 prompt with more than one response",
        "1 row with control-token text",
        "empty_response 1 no response to learn from 3",
        "No row has any.",
    ):
        assert told in text


def test_page_draws_a_bar_for_every_bin_that_holds_rows(report: Report) -> None:
    page = Page(render_page(report))
    num_bars = sum(count > 0 for lengths in report.lengths.values() for count in lengths.counts)
    assert page.tags.count("rect") == num_bars >= 10
    assert "2 tokens: 2 rows" in page.text


def test_page_without_findings_says_so_and_tells_savings_only_when_shared(
    config: DataPrepConfig, tmp_path: Path
) -> None:
    plain = report_of(with_rows(config, ROWS[:1], tmp_path), tmp_path / "spill")
    text = Page(render_page(plain)).text
    assert "Nothing dropped, cut or repeated, and no control-token text." in text
    assert "saved by sharing" not in text
    shared = {"shared": {"nodes": 1, "tokens": 7, "saved_tokens": 7}, "stored_tokens": 8}
    page = Page(render_page(replace(plain, counts=plain.counts | shared)))
    assert "saved by sharing" in page.text and "7 tokens; 8 stored" in page.text


def test_page_says_what_control_token_text_becomes(config: DataPrepConfig, tmp_path: Path) -> None:
    kept = report_of(config, tmp_path / "spill")
    allowed = report_of(config, tmp_path / "spill", allow_special_tokens_in_data=True)
    assert "never acts as a control token" in Page(render_page(kept)).text
    assert "becomes the control token" in Page(render_page(allowed)).text


# --- beside the data -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["out", "out.parquet"])
def test_dataprep_writes_the_report_beside_the_data_the_same_bytes_again(
    name: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_jsonl(tmp_path / "rows.jsonl", ROWS)
    paths = [
        tmp_path / (f"out/{kind}" if name == "out" else f"{name}.{kind}") for kind in ("report.json", "report.html")
    ]
    found = []
    for overwrite in (False, True):
        given = settings(source, model, tmp_path / name, chunksize=200, overwrite=overwrite, seed=1, reuse_tokens=False)
        prepare(make_config(tmp_path, given))
        found.append([path.read_bytes() for path in paths])
    assert found[0] == found[1]
    assert str(paths[1]) in capsys.readouterr().err
    facts = json.loads(paths[0].read_text(encoding="utf-8"))
    assert facts["counts"]["rows_read"] == 7
    assert facts["dropped"][1]["first_rows"] == [6]
    Page(paths[1].read_text(encoding="utf-8"))
