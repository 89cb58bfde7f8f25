"""Views as lines: every kind is told by characters alone, and by colour as well."""

import re
from dataclasses import replace

import pytest
from conftest import byte_level_tokenizer
from rich.cells import cell_len

from llm.tokenizer import PromptTokenizer
from llm.training.prep.token_view import (
    Kind,
    Layout,
    Part,
    Run,
    View,
    legend,
    print_views,
    token_runs,
    view_lines,
)

PROMPT = Run(kind="prompt", ids=(3, 40, 198), shown=("<|im_start|>", "user", "↵"))
VIEW = View(
    title="Block 0: 12 tokens",
    parts=(
        Part(title="node 0, shared by node 1", runs=(Run(kind="shared", ids=(1, 22), shown=("<s>", "·Hi")),)),
        Part(
            title="row 7 (node 1)",
            runs=(
                PROMPT,
                Run(kind="trained", ids=(50, 51), shown=("日", "⋯")),
                Run(kind="stop", ids=(4,), shown=("<|im_end|>",)),
            ),
        ),
        Part(title=None, runs=(Run(kind="padding", ids=(4,) * 1037, shown=("<|im_end|>",) * 1037),)),
    ),
)


def plain(view: View, **layout: int) -> list[str]:
    return [line.plain for line in view_lines(view, Layout(**layout))]


def one_run(kind: Kind, *shown: str) -> View:
    run = Run(kind=kind, ids=tuple(range(100, 100 + len(shown))), shown=shown)
    return View(title="", parts=(Part(title=None, runs=(run,)),))


def test_view_in_plain_characters_tells_every_kind() -> None:
    assert plain(VIEW) == [
        "Block 0: 12 tokens",
        "--- node 0, shared by node 1",
        "shared   = <s>│·Hi",
        "--- row 7 (node 1)",
        "prompt     <|im_start|>│user│↵",
        "trained  > 日│⋯",
        "stop     > <|im_end|>",
        "padding    <|im_end|> x 1,037",
    ]


def test_ids_stand_below_their_tokens() -> None:
    assert plain(VIEW, has_ids=True)[5:] == [
        "prompt     <|im_start|>│user│↵",
        "         # 3           │40  │198",
        "trained  > 日│⋯",
        "         # 50│51",
        "stop     > <|im_end|>",
        "         # 4",
        "padding    <|im_end|> (id 4) x 1,037",
    ]


def test_padding_of_several_ids_is_told_for_each() -> None:
    run = Run(kind="padding", ids=(0, 0, 9, 0), shown=("<pad>", "<pad>", "x", "<pad>"))
    lines = plain(View(title="", parts=(Part(title=None, runs=(run,)),)))
    assert lines[1:] == ["padding    <pad> x 2", "           x x 1", "           <pad> x 1"]


@pytest.mark.parametrize("has_ids", [False, True])
def test_lines_are_broken_between_tokens_at_the_width_and_marked_each(has_ids: bool) -> None:
    tokens = ["·日本語", "·word"] * 20
    lines = plain(one_run("trained", *tokens), width=40, has_ids=has_ids)[1:]
    lines = [line for line in lines if "#" not in line]
    assert [line[:11] for line in lines] == ["trained  > ", *["         > "] * (len(lines) - 1)]
    assert [token.rstrip() for line in lines for token in line[11:].split("│")] == tokens
    assert max(map(cell_len, lines)) <= 40 < max(map(cell_len, lines)) + 8 and len(lines) > 5


def test_line_ends_after_a_newline_and_a_longer_token_than_the_line_is_kept_whole() -> None:
    lines = plain(one_run("prompt", "a", "b↵↵", "↵c", "d", "-" * 50), width=30)[1:]
    assert [line[11:] for line in lines] == ["a│b↵↵", "↵c│d", "-" * 50]


@pytest.mark.parametrize(("most", "first", "last"), [(5, "abc", "ij"), (1, "a", ""), (9, "abcde", "ghij")])
def test_long_run_is_cut_in_its_middle_and_says_so(most: int, first: str, last: str) -> None:
    lines = plain(one_run("trained", *"abcdefghij"), max_tokens=most)[1:]
    told = f"         > ... {10 - most} of 10 tokens left out (--tokens 0 shows all) ..."
    after = [f"         > {'│'.join(last)}"] if last else []
    assert lines == [f"trained  > {'│'.join(first)}", told, *after]


@pytest.mark.parametrize("most", [0, 10, 11])
def test_run_that_is_no_longer_than_the_limit_is_whole(most: int) -> None:
    assert plain(one_run("trained", *"abcdefghij"), max_tokens=most)[1:] == ["trained  > a│b│c│d│e│f│g│h│i│j"]


def test_runs_tell_prompt_trained_and_the_stop_token_that_ends_it() -> None:
    tokenizer = PromptTokenizer(byte_level_tokenizer())
    stop = tokenizer.control_tokens["<|im_end|>"]
    dog = tokenizer.encode([" dog"])[0][0]
    # A stop token in the prompt, one amid the response, one at its end; then a second turn, which ends without.
    ids = [dog, stop, dog, stop, dog, stop, stop, dog]
    flags = [False, False, True, True, True, True, False, True]
    runs = token_runs(ids, flags, untrained="prompt", tokenizer=tokenizer, stop_token_id=stop)
    assert [(run.kind, "".join(run.shown)) for run in runs] == [
        ("prompt", "·dog<|im_end|>"),
        ("trained", "·dog<|im_end|>·dog"),
        ("stop", "<|im_end|>"),
        ("prompt", "<|im_end|>"),
        ("trained", "·dog"),
    ]
    assert [number for run in runs for number in run.ids] == ids


def test_run_does_not_join_its_bytes_with_those_of_the_next() -> None:
    tokenizer = PromptTokenizer(byte_level_tokenizer())
    ids = tokenizer.encode(["é"])[0]
    runs = token_runs(ids, [False, True], untrained="shared", tokenizer=tokenizer, stop_token_id=1)
    assert [(run.kind, run.shown) for run in runs] == [
        ("shared", (f"<id {ids[0]}>",)),
        ("trained", (f"<id {ids[1]}>",)),
    ]


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NO_COLOR", "TTY_COMPATIBLE", "COLUMNS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")


def printed(capsys: pytest.CaptureFixture[str], view: View = VIEW) -> str:
    print_views([view, replace(view, parts=())], has_ids=False, max_tokens=0)
    out, err = capsys.readouterr()
    assert err == ""
    return out


def test_print_in_a_pipe_is_plain_text(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    lines = [legend().plain, *plain(VIEW), "", VIEW.title]
    assert printed(capsys) == "".join(f"{line}\n" for line in lines)
    assert len(legend().plain) <= 80 and all(mark in legend().plain for mark in "│·↵⇥⋯>")


@pytest.mark.usefixtures("terminal")
def test_print_on_a_terminal_has_another_style_for_each_kind(capsys: pytest.CaptureFixture[str]) -> None:
    out = printed(capsys)
    styles = {
        text: re.findall(rf"\x1b\[([\d;]*)m{text}", out)
        for text in ("<s>", "日", r"<\|im_end\|>\x1b", r"<\|im_end\|> x 1,037")
    }
    assert list(styles.values()) == [["36"], ["1;32"], ["1;30;42"], ["2"]]
    assert re.search(r"(^|\n|0m)prompt     <\|im_start\|>", out), "the prompt has no style"


@pytest.mark.usefixtures("terminal")
@pytest.mark.parametrize(("name", "value"), [("NO_COLOR", "1"), ("TERM", "dumb")])
def test_print_without_colour_has_the_same_characters(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    in_colour = printed(capsys)
    monkeypatch.setenv(name, value)
    without = printed(capsys)
    escapes = r"\x1b\[([\d;]*)m"
    colours = {code for found in re.findall(escapes, without) for code in found.split(";") if len(code) > 1}
    assert colours == set() and "\x1b[36m" in in_colour
    assert re.sub(escapes, "", without) == re.sub(escapes, "", in_colour)


def test_markup_and_emoji_codes_of_the_data_stay_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    out = printed(capsys, one_run("prompt", "[red]", ":smile:", "[/]"))
    assert "prompt     [red]│:smile:│[/]\n" in out
