import sys
from pathlib import Path

import pytest

from llm.errors import ConfigError
from llm.registry import call_method, resolve_method

REGISTRY = {"Path": "pathlib::Path", "home": "pathlib::Path.home"}


def test_resolve_registered_name_gives_the_object() -> None:
    assert resolve_method("Path", REGISTRY, key="k") is Path
    assert resolve_method("home", REGISTRY, key="k")() == Path.home()


def test_resolve_reference_gives_the_object() -> None:
    assert resolve_method("os.path::join", {}, key="k")("a", "b") == "a/b"


def test_resolve_own_module_on_the_path_is_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_prompts_8d7f.py").write_text("def make(x=1):\n    return x\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert resolve_method("my_prompts_8d7f::make", {}, key="k")(x=3) == 3
    del sys.modules["my_prompts_8d7f"]


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("Pathh", "k: no method `Pathh`. Did you mean `Path`? Your own code is named as `path.to.module::name`."),
        ("os.path.join", "k: no method `os.path.join`. Allowed: Path, home."),
        ("no.such::thing", "k: cannot import `no.such` of `no.such::thing`: No module named 'no'."),
        ("pathlib::Pth", "k: module `pathlib` has no `Pth`. Did you mean `Path`?"),
        ("pathlib::Path.nothing", "k: module `pathlib` has no `Path.nothing`."),
        ("string::digits", "k: `string::digits` is not callable."),
        ("::x", "k: `::x` is no reference. Write `path.to.module::name`."),
        ("os::", "k: `os::` is no reference."),
        (".os::x", "k: `.os::x` is no reference."),
    ],
)
def test_resolve_unknown_method_is_refused(method: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve_method(method, REGISTRY, key="k")
    assert str(caught.value).startswith(message)


def test_resolve_error_lists_no_private_names() -> None:
    with pytest.raises(ConfigError) as caught:
        resolve_method("pathlib::qqqqqqqq", {}, key="k")
    assert "Path" in str(caught.value)
    assert "__" not in str(caught.value)


def example(first: int, *, second: int = 2) -> int:
    return first + second


def test_call_with_fitting_kwargs_gives_the_result() -> None:
    assert call_method(example, 1, kwargs={"second": 3}, key="k") == 4


@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    [
        ((1,), {"secnd": 3}, "k.kwargs: `example` takes no `secnd`. Did you mean `second`?"),
        ((), {"second": 3}, "k.kwargs: `example`: missing a required argument: 'first'."),
        ((1,), {"first": 3}, "k.kwargs: `example`: multiple values for argument 'first'."),
    ],
)
def test_call_with_unfitting_kwargs_is_refused(args: tuple[int, ...], kwargs: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        call_method(example, *args, kwargs=kwargs, key="k")
    assert str(caught.value) == message


def test_call_of_type_without_signature_is_refused() -> None:
    with pytest.raises(ConfigError, match="k.method: `dict` does not say which arguments it takes"):
        call_method(dict, kwargs={"a": 1}, key="k")
