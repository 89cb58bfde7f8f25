import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm.errors import ConfigError
from llm.template import Template


@pytest.mark.parametrize(
    ("source", "text", "filled"),
    [
        ("{text}", "a", "a"),
        ("Q: {text} A:", "", "Q:  A:"),
        ("{{{text}}}", "x", "{x}"),
        ("{{text}} {text}", "x", "{text} x"),
        ("{text}{{}}", "{text} {0.__class__} %s \\n", "{text} {0.__class__} %s \\n{}"),
        ("é😀\n{text}\x00", "日本", "é😀\n日本\x00"),
    ],
)
def test_template_filled_gives_literals_and_text(source: str, text: str, filled: str) -> None:
    assert Template(source).fill(text=text) == filled


def test_template_docstring_example_holds() -> None:
    assert Template("Source {index}: {text}", fields=("text", "index")).fill(text="a", index=1) == "Source 1: a"


def test_template_split_gives_what_stands_around_the_text() -> None:
    assert Template("{{A}}: {text} .").split() == ("{A}: ", " .")


@given(st.text(), st.text(), st.text())
def test_template_of_any_escaped_literals_gives_them_back(head: str, tail: str, text: str) -> None:
    escaped = [part.replace("{", "{{").replace("}", "}}") for part in (head, tail)]
    template = Template(f"{escaped[0]}{{text}}{escaped[1]}")
    assert template.fill(text=text) == head + text + tail
    assert template.split() == (head, tail)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("no field", "needs `{text}` exactly once"),
        ("{text} {text}", "needs `{text}` exactly once"),
        ("{{text}}", "needs `{text}` exactly once"),
        ("{txt}", "character 1: no field `{txt}`. Did you mean `text`? Write `{{txt}}` for literal braces."),
        ("{text} {index}", "character 8: no field `{index}`. Allowed: text."),
        ("{text.__class__}", "no field `{text.__class__}`"),
        ("{text!r}", "no field `{text!r}`"),
        ("{text:>5}", "no field `{text:>5}`"),
        ("{} {text}", "no field `{}`"),
        ("{text} }", "character 8: a lone `}`. Write `}}` for a literal brace."),
        ('{text} {"a": 1', "a lone `{`"),
    ],
)
def test_template_that_is_none_is_refused_with_the_place(source: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Template(source, name="input_template")
    assert str(caught.value).startswith("input_template ")
    assert message in str(caught.value)
