"""Secrets in a YAML file: found, refused, and masked in every message.

A config is copied beside each output and to every output path, so that a secret in it would be published.
"""

import re
from collections.abc import Iterator
from typing import Any

from llm.training.config import KeyPath

# Whole names, so that `pad_token` and `max_new_tokens` stay allowed.
_NAME = (
    r"(?:(?:\w*_)?(?:api_?key|access_key(?:_id)?|secret(?:_key)?|account_key|private_key|password|passwd|"
    r"credentials?|connection_string|(?:hub|hf|auth|access|api|session|security|sas|bearer)_token)|token)"
)
_KEY = re.compile(rf"{_NAME}\Z", re.IGNORECASE)
_KEY_AND_VALUE = re.compile(rf"(\b{_NAME}[\"']?\s*[:=]\s*)\S.*", re.IGNORECASE)

# As long as real ones are, so that the folder `hf_models/llama` stays allowed.
_VALUES = {
    r"\bhf_[A-Za-z0-9]{16,}": "HF_TOKEN",
    r"\b(?:AKIA|ASIA)[0-9A-Z]{12,}": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (or AWS_PROFILE)",
    r"\bsk-[A-Za-z0-9_-]{20,}": "OPENAI_API_KEY",
    r"(?<=://)[^/\s:@]+:[^/\s@]+(?=@)": "AWS_PROFILE, for instance",
}
_ANY_VALUE = re.compile("|".join(_VALUES))
_VARIABLES = {
    "hub": "HF_TOKEN",
    "hf": "HF_TOKEN",
    "token": "HF_TOKEN",
    "wandb": "WANDB_API_KEY",
    "comet": "COMET_API_KEY",
    "mlflow": "MLFLOW_TRACKING_PASSWORD",
    "aws": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (or AWS_PROFILE)",
}


def secret_problems(value: Any, path: KeyPath = ()) -> Iterator[tuple[KeyPath, str]]:
    """The path and a text for each secret in `value`, at any depth."""
    if isinstance(value, dict | list):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from secret_problems(item, (*path, key))
        return
    key = str(path[-1]) if path else ""
    if _KEY.match(key) and value not in (None, "") and not isinstance(value, bool):
        yield path, _text(f"`{key}` is a secret", _variable(path))
    elif isinstance(value, str):
        variables = [variable for pattern, variable in _VALUES.items() if re.search(pattern, value)]
        if variables:
            yield path, _text("This value looks like a secret", variables[0])


def mask_secrets(text: str) -> str:
    """`text` with `***` in place of each value that looks like a secret."""
    return _ANY_VALUE.sub("***", text)


def mask_line(line: str) -> str:
    """A line of YAML, or a `key=value`, with `***` in place of secrets and of what a secret's key holds."""
    return _KEY_AND_VALUE.sub(r"\1***", mask_secrets(line))


def _variable(path: KeyPath) -> str:
    words = re.split(r"[^a-z0-9]+", ".".join(map(str, path)).lower())
    return next((variable for word, variable in _VARIABLES.items() if word in words), "")


def _text(what: str, variable: str) -> str:
    given = f"the environment variable {variable}" if variable else "an environment variable (WANDB_API_KEY, ...)"
    return (
        f"{what}, and this file is copied beside every output. Delete it here and set {given}: "
        "the libraries read it by themselves."
    )
