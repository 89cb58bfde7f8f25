import pickle

import pytest

from llm.errors import CheckpointError, ConfigError, DataError, LlmTrainError, MissingExtraError, did_you_mean

FAMILY = {ConfigError: 2, MissingExtraError: 2, DataError: 3, CheckpointError: 4}


def test_family_is_complete() -> None:
    assert set(LlmTrainError.__subclasses__()) == set(FAMILY)


@pytest.mark.parametrize("kind", FAMILY)
def test_error_has_the_documented_exit_code(kind: type[LlmTrainError]) -> None:
    assert kind.exit_code == FAMILY[kind]


@pytest.mark.parametrize("kind", FAMILY)
def test_error_pickled_keeps_class_text_and_exit_code(kind: type[LlmTrainError]) -> None:
    back = pickle.loads(pickle.dumps(kind("row 3: é\n`x`")))
    assert (type(back), str(back), back.exit_code) == (kind, "row 3: é\n`x`", FAMILY[kind])


@pytest.mark.parametrize(
    ("name", "allowed", "sentence"),
    [
        ("defaultprompt", ["DefaultPrompt", "Prompt"], "Did you mean `DefaultPrompt`?"),
        ("inptu", {"input": 1, "response": 2}, "Did you mean `input`?"),
        ("zzz", ["b", "a"], "Allowed: a, b."),
        ("", ["a"], "Allowed: a."),
    ],
)
def test_did_you_mean_names_the_nearest_or_all(name: str, allowed: list[str], sentence: str) -> None:
    assert did_you_mean(name, allowed) == sentence
