"""What a column of messages or tools holds -> plain mappings with our names for roles; for `rows.py`."""

import json
from typing import Any

from llm.errors import DataError

_ROLES = (
    dict.fromkeys(("assistant", "gpt", "chatgpt", "bard", "bing", "model", "bot"), "assistant")
    | dict.fromkeys(("user", "human", "prompter"), "user")
    | dict.fromkeys(("tool", "observation", "function_response"), "tool")
    | dict.fromkeys(("system", "developer"), "system")
)
_ONE_MESSAGE = '{"role": "user", "content": "..."}'


def null_text(where: str, name: str) -> str:
    """What is wrong with a row that has a null at `name`."""
    return (
        f"{where}: `{name}` is null, or not there. Every row needs an input and a response, and every context a text: "
        "mend the row or remove it."
    )


def parse_objects(value: Any, where: str, ours: str) -> list[dict[str, Any]]:
    """Messages or tools, which csv and some json files hold as text; DataError when they are none."""
    if not value:
        return []
    try:
        found = json.loads(value.strip() or "[]") if isinstance(value, str) else value
        objects = [_without_nulls(json.loads(one) if _is_json_object(one) else one) for one in found or []]
    except (json.JSONDecodeError, TypeError) as error:
        raise DataError(f"{where}: `{ours}` is neither a list nor the JSON of one ({error}).") from error
    if not all(isinstance(one, dict) for one in objects):
        raise DataError(f"{where}: `{ours}` must be a list of mappings, e.g. {_ONE_MESSAGE}; it holds {objects!r:.60}.")
    return objects


def _is_json_object(value: Any) -> bool:
    return isinstance(value, str) and value.lstrip().startswith("{")


def _without_nulls(value: Any) -> Any:
    """Arrow gives every message of a column the same keys: those that a message does not have are null."""
    if isinstance(value, dict):
        return {name: _without_nulls(one) for name, one in value.items() if one is not None}
    return [_without_nulls(one) for one in value] if isinstance(value, list) else value


def parse_message(message: dict[str, Any], where: str, name: str) -> dict[str, Any]:
    """The message with one of our roles, and text as content; DataError for one without a role, or nothing to say."""
    if "from" in message:
        weight = {"weight": message["weight"]} if "weight" in message else {}
        message = {"role": message["from"], "content": message.get("value"), **weight}
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str):
        raise DataError(f"{where}: {name} has no `role` and `content` (or `from` and `value`).")
    if content is None and "tool_calls" not in message:
        raise DataError(null_text(where, f"{name}.content"))
    said = {} if content is None else {"content": _joined(content, f"{where}: {name}")}
    return {**message, "role": _ROLES.get(role.lower(), role), **said}


def _joined(content: Any, where: str) -> Any:
    """The text of content in parts, as OpenAI has them; DataError where a part is no text."""
    if not isinstance(content, list):
        return content
    texts: list[Any] = [part.get("text") if isinstance(part, dict) else part for part in content]
    if not all(isinstance(text, str) for text in texts):
        raise DataError(f"{where} holds a part that is no text, such as an image: only text can be trained.")
    return "".join(texts)
