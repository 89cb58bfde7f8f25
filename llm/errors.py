"""The errors that a user can cause, and the exit code of each.

    LlmTrainError
    |-- ConfigError        your YAML        exit code 2
    |-- MissingExtraError  install this     exit code 2
    |-- DataError          your rows        exit code 3
    `-- CheckpointError    your files       exit code 4

Each holds one clear text: what was given and where, why it cannot be, what to write instead. All are
picklable, since worker processes raise them. The command line prints the text without a traceback. All codes that a
command ends with are in `EXIT_CODES`.
"""

import difflib
from collections.abc import Iterable

EXIT_CODES = {
    0: "done",
    1: "a bug of ours",
    2: "your YAML or command line",
    3: "your rows",
    4: "your files (a checkpoint, an output path)",
    130: "Ctrl-C",
    143: "SIGTERM",
}
"""What each exit code means, in `llm-train --help` and in the README."""


class LlmTrainError(Exception):
    """A mistake that the user can mend; `exit_code` is what the process ends with."""

    exit_code = 1


class ConfigError(LlmTrainError):
    """The YAML file asks for something that cannot be."""

    exit_code = 2


class MissingExtraError(LlmTrainError):
    """An optional library is needed: the text says which command installs it."""

    exit_code = 2


class DataError(LlmTrainError):
    """A source row, or a prepared data set, cannot be used."""

    exit_code = 3


class CheckpointError(LlmTrainError):
    """A checkpoint or an output path cannot be read or written."""

    exit_code = 4


def did_you_mean(name: str, allowed: Iterable[str]) -> str:
    """A sentence that names the nearest of `allowed`, or lists them all when none is near."""
    names = sorted(allowed)
    by_lower = {known.lower(): known for known in names}
    near = difflib.get_close_matches(name.lower(), by_lower, n=1, cutoff=0.6)
    if near:
        return f"Did you mean `{by_lower[near[0]]}`?"
    return f"Allowed: {', '.join(names)}."


def loading_reason(error: BaseException) -> str:
    """Why a model or tokenizer was not loaded, in the library's words, unless these tell to run code of the model's."""
    if "trust_remote_code" in str(error):
        return (
            "it brings code of its own, and such code is never run. Choose a model that transformers knows by itself."
        )
    return str(error).strip() or type(error).__name__


def quoted(names: Iterable[str]) -> str:
    """The names for a message: `` `a`, `b` ``."""
    return ", ".join(f"`{name}`" for name in names)
