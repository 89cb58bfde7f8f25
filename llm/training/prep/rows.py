"""Stage 1, second half: the columns of a source, whatever their names and their format -> `Row`s.

    input_response  input, response and, if there, contexts, system                the words of this project
    messages        messages: [{role: user, content}, {role: assistant, content}]  OpenAI, TRL
    sharegpt        conversations: [{from: human, value}, {from: gpt, value}]       ShareGPT, Vicuna
    alpaca          instruction, output and, if there, input (becomes a context)    Stanford Alpaca
    dolly           instruction, response and, if there, context                    Databricks Dolly

A message of `messages` or `conversations` may be of either kind.

`columns` of the config says what a column is called here, `row_format` forces one of these, `auto` finds it.
"""

import json
import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from llm.chat_template import answer_places, split_system
from llm.errors import DataError, did_you_mean, quoted
from llm.prompt import Message
from llm.prompt_format import TrainOn
from llm.training.config import ColumnName, DatasetConfig, RowFormat
from llm.training.prep.dataset import is_text, load_dataset_config

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)
_KEY = "source_config"
# Per format: our name for a column -> its usual name in the data.
_COLUMNS: dict[str, dict[ColumnName, str]] = {
    "input_response": {"input": "input", "response": "response", "contexts": "contexts", "system": "system"},
    "messages": {"messages": "messages", "contexts": "contexts", "system": "system", "tools": "tools"},
    "sharegpt": {"messages": "conversations", "contexts": "contexts", "system": "system", "tools": "tools"},
    "alpaca": {"input": "instruction", "response": "output", "contexts": "input", "system": "system"},
    "dolly": {"input": "instruction", "response": "response", "contexts": "context", "system": "system"},
}
_ONE_CONTEXT = ("alpaca", "dolly")  # their column of contexts holds one text
_REQUIRED = ("input", "response", "messages")
_ROLES = (
    dict.fromkeys(("assistant", "gpt", "chatgpt", "bard", "bing", "model", "bot"), "assistant")
    | dict.fromkeys(("user", "human", "prompter"), "user")
    | dict.fromkeys(("tool", "observation", "function_response"), "tool")
    | dict.fromkeys(("system", "developer"), "system")
)
# What a message can say beside its content; other keys (ids, languages, ratings) only a chat template may look at.
_SAYING = ("tool_calls", "function_call", "tool_call_id", "reasoning_content", "reasoning", "thinking", "name")
_ONE_MESSAGE = '{"role": "user", "content": "..."}'
# Where a column that is called otherwise mostly holds the same: for the advice only.
_OTHER_NAMES: dict[ColumnName, tuple[str, ...]] = {
    "input": ("question", "prompt", "instruction", "query", "problem", "text", "document"),
    "response": ("answer", "completion", "output", "target", "solution", "summary", "highlights", "label"),
    "contexts": ("context", "documents", "passages"),
    "system": ("system_prompt", "system_message"),
}


@dataclass(frozen=True, kw_only=True)
class Row:
    """One source row; `number` counts from 0 in the source.

    `turns` are its questions and answers (`response` None: never answered), `system` takes the place of the prompt's
    system message. `chat` holds `messages` and `tools` as they stand when they are more than that: tool calls,
    reasoning, other roles; `turns` are empty then.
    """

    number: int
    turns: tuple[Message, ...]
    system: str = ""
    chat: Mapping[str, Any] | None = None

    @property
    def contexts(self) -> tuple[str, ...]:
        """The contexts of all its turns."""
        found = self.chat["contexts"] if self.chat else [text for turn in self.turns for text in turn.contexts]
        return tuple(found)

    def answered(self, train_on: TrainOn) -> list[Message]:
        """The turns up to the last answer, each trained or not."""
        places = [place for place, turn in enumerate(self.turns) if turn.response is not None]
        turns = self.turns[: places[-1] + 1] if places else ()
        if train_on == "all":
            return list(turns)
        return [replace(turn, is_trained=turn.is_trained and turn is turns[-1]) for turn in turns]

    def first_prompt(self, train_on: TrainOn) -> dict[str, list[Any]]:
        """`messages`, `contexts` and `tools` before the first answer that is trained, as a request would have them."""
        turns = self.answered("all")
        system, chat = split_system(self.chat["messages"]) if self.chat else (self.system, _messages_of(turns))
        contexts = self.chat["contexts"] if self.chat else turns[-1].contexts
        end = answer_places(chat, train_on)[0]
        asked = [place for place, message in enumerate(chat) if message["role"] == "user"]
        said = [{name: value for name, value in message.items() if name != "weight"} for message in chat[:end]]
        return {
            "messages": ([{"role": "system", "content": system}] if system else []) + said,
            "contexts": list(contexts) if asked and asked[-1] < end else [],
            "tools": self.chat["tools"] if self.chat else [],
        }

    @classmethod
    def of(cls, *, number: int, input: str, response: str, contexts: Sequence[str] = ()) -> "Row":
        """The row of one question and its answer."""
        return cls(number=number, turns=(Message(input, response, tuple(contexts)),))


@dataclass(frozen=True, kw_only=True)
class Source:
    """A data set, the format of its rows, and which of its columns holds what (our name -> its name)."""

    dataset: "Dataset"
    row_format: RowFormat
    columns: Mapping[ColumnName, str]


def load_source(
    config: DatasetConfig, *, columns: Mapping[ColumnName, str] | None = None, row_format: RowFormat = "auto"
) -> Source:
    """The source rows, columns checked; DataError when their columns are not those of `row_format`."""
    return with_columns(load_dataset_config(config, key=_KEY), columns or {}, row_format)


def with_columns(dataset: "Dataset", given: Mapping[ColumnName, str], row_format: RowFormat = "auto") -> Source:
    """`dataset` and which of its columns holds what: as `given`, else by their usual names in `row_format`."""
    missing = sorted({*given.values()} - {*dataset.column_names})
    if missing:
        raise DataError(
            f"columns: the rows have no column {quoted(missing)}. {did_you_mean(missing[0], dataset.column_names)}"
        )
    chosen = _row_format(dataset, given) if row_format == "auto" else row_format
    found = {**_COLUMNS[chosen], **given}
    found = {ours: theirs for ours, theirs in found.items() if ours in _REQUIRED or theirs in dataset.column_names}
    source = Source(dataset=dataset, row_format=chosen, columns=found)
    _check_columns(source)
    if chosen != "input_response":
        told = ", ".join(f"`{theirs}` -> {ours}" for ours, theirs in found.items())
        logger.info(f"{_KEY}: read as {chosen} ({told}); `row_format` forces another, or refuses this one.")
    return source


def iterate_rows(source: Source, *, batch_size: int) -> Iterator[list[Row]]:
    """The rows of `source` in order, `batch_size` at a time; DataError at a null, with its row number."""
    reader = source.dataset.select_columns(list(source.columns.values())).with_format("arrow")
    start = 0
    for table in reader.iter(batch_size=batch_size):
        batch = {ours: _values(table, theirs, start) for ours, theirs in source.columns.items()}
        rows = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
        yield [_row(start + place, row, source) for place, row in enumerate(rows)]
        start += table.num_rows


def _values(table: pa.Table, column: str, start: int) -> list[Any]:
    """A column's values; DataError for a row that is not UTF-8, which the readers of JSON let through."""
    try:
        return list(table.column(column).to_pylist())
    except UnicodeDecodeError as error:
        for place, value in enumerate(table.column(column)):
            try:
                value.as_py()
            except UnicodeDecodeError:
                row = f"{_KEY}: row {start + place} (counted from 0)"
                raise DataError(f"{row}: `{column}` is not UTF-8 ({error.reason}). Save the file as UTF-8.") from error
        raise


def guess_columns(names: Sequence[str]) -> dict[ColumnName, str]:
    """Columns that most likely hold `input` and `response` under other names; none for what has its own name."""
    return _near(names, ("input", "response"))


def _near(names: Sequence[str], wanted: Iterable[ColumnName]) -> dict[ColumnName, str]:
    found = {ours: [name for name in _OTHER_NAMES[ours] if name in names] for ours in wanted if ours not in names}
    return {ours: near[0] for ours, near in found.items() if near}


def _row_format(dataset: "Dataset", given: Mapping[ColumnName, str]) -> RowFormat:
    """The format whose columns are there: ours first."""
    names = {*dataset.column_names}
    if "messages" in given:
        return "messages"
    if {"input", "response"} & {*given} or {"input", "response"} <= names:
        return "input_response"
    if "messages" in names or "conversations" in names:
        return "messages" if "messages" in names else "sharegpt"
    formats: tuple[RowFormat, ...] = ("alpaca", "dolly")
    return next((one for one in formats if {"instruction", _COLUMNS[one]["response"]} <= names), "input_response")


def _check_columns(source: Source) -> None:
    """DataError when a column is missing, or not of text (`contexts`: lists of text; `messages`: lists)."""
    features = source.dataset.features
    for ours, theirs in source.columns.items():
        kind = features.get(theirs)
        if kind is None:
            raise DataError(_missing(source, theirs))
        if ours in ("messages", "tools") or _is_null(kind):
            continue
        is_contexts = ours == "contexts" and source.row_format not in _ONE_CONTEXT
        if not is_text(getattr(kind, "feature", None) if is_contexts else kind):
            wanted = 'a list of texts in each row, e.g. ["..."] (`row_format: dolly` takes one text)'
            wanted = wanted if is_contexts else "text"
            raise DataError(
                f"{_KEY}: column `{theirs}` must be {wanted}{';' if is_contexts else ','} it is {_kind_name(kind)}"
                f"{_example(source.dataset, theirs)}."
            )


def _missing(source: Source, wanted: str) -> str:
    names = source.dataset.column_names
    near = did_you_mean(wanted, names)
    hint = f"{near} " if near.startswith("Did") else ""
    talks = [name for name, kind in source.dataset.features.items() if _is_talk(kind)]
    guess: dict[ColumnName, str] = {"messages": talks[0]} if len(talks) == 1 else {}
    if not guess:
        guess = {ours: "..." for ours in _OTHER_NAMES if ours not in names and ours in _REQUIRED}
        guess |= _near(names, _OTHER_NAMES)
    mapped = ", ".join(f"{ours}: {theirs}" for ours, theirs in guess.items())
    return (
        f"{_KEY}: the rows have no column `{wanted}`; they have {quoted(names)}. {hint}"
        f"Say what the columns are called, e.g. `columns: {{{mapped}}}`, or give rows with `messages`."
    )


def _is_talk(feature: Any) -> bool:
    """Whether a column of this kind holds messages."""
    keys = getattr(feature, "feature", None)
    return isinstance(keys, Mapping) and ({"role", "content"} <= {*keys} or {"from", "value"} <= {*keys})


def plain(row: Row) -> Row:
    """`row` as turns where its messages hold more keys, but none that says something: for named formats."""
    if row.chat is None or any(message.get(name) for message in row.chat["messages"] for name in _SAYING):
        return row
    known = ("role", "content", "weight")
    messages = [{name: message[name] for name in known if name in message} for message in row.chat["messages"]]
    return _conversation(row.number, {**row.chat, "messages": messages}, row.system, tuple(row.chat["contexts"]))


def _row(number: int, values: dict[ColumnName, Any], source: Source) -> Row:
    where = f"{_KEY}: row {number} (counted from 0)"
    contexts = values.get("contexts") or []
    contexts = [contexts] if isinstance(contexts, str) else contexts  # Alpaca's input
    if None in contexts:
        raise DataError(_null(where, f"contexts[{contexts.index(None)}]"))
    system = values.get("system") or ""
    tools = _objects(values.get("tools"), where, "tools")
    if "messages" in values:
        found = _objects(values["messages"], where, "messages")
        messages = [_message(one, where, f"messages[{place}]") for place, one in enumerate(found)]
        return _conversation(number, {"messages": messages, "tools": tools}, system, tuple(contexts))
    for ours in ("input", "response"):
        if values[ours] is None:
            raise DataError(_null(where, source.columns[ours]))
    messages = [{"role": "user", "content": values["input"]}, {"role": "assistant", "content": values["response"]}]
    return _conversation(number, {"messages": messages, "tools": tools}, system, tuple(contexts))


def _null(where: str, name: str) -> str:
    return (
        f"{where}: `{name}` is null, or not there. Every row needs an input and a response, and every context a text: "
        "mend the row or remove it."
    )


def _objects(value: Any, where: str, ours: str) -> list[dict[str, Any]]:
    """Messages or tools, which csv and some json files hold as text; DataError when they are none."""
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


def _message(message: dict[str, Any], where: str, name: str) -> dict[str, Any]:
    """The message with one of our roles, and text as content; DataError for one without a role, or nothing to say."""
    if "from" in message:
        weight = {"weight": message["weight"]} if "weight" in message else {}
        message = {"role": message["from"], "content": message.get("value"), **weight}
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str):
        raise DataError(f"{where}: {name} has no `role` and `content` (or `from` and `value`).")
    if content is None and "tool_calls" not in message:
        raise DataError(_null(where, f"{name}.content"))
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


def _conversation(number: int, chat: dict[str, list[Any]], system: str, contexts: tuple[str, ...]) -> Row:
    """Turns of a system message, questions and answers; anything else stays as it stands."""
    messages = chat["messages"]
    has_system = bool(messages) and messages[0]["role"] == "system"
    said = messages[has_system:]
    roles = [message["role"] for message in said]
    is_plain = roles == (["user", "assistant"] * len(roles))[: len(roles)] and all(
        {*message} <= {"role", "content", "weight"} and isinstance(message.get("content"), str) for message in messages
    )
    if not is_plain or chat["tools"]:
        messages = messages if has_system or not system else [{"role": "system", "content": system}, *messages]
        return Row(number=number, turns=(), chat={**chat, "messages": messages, "contexts": list(contexts)})
    questions, answers = said[::2], said[1::2]
    turns = [
        Message(
            question["content"],
            answers[place]["content"] if place < len(answers) else None,
            contexts if place == len(answers) - 1 else (),
            is_trained=place < len(answers) and answers[place].get("weight") != 0,
        )
        for place, question in enumerate(questions)
    ]
    return Row(number=number, turns=tuple(turns), system=messages[0]["content"] if has_system else system)


def _messages_of(turns: Sequence[Message]) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = []
    for turn in turns:
        messages.append({"role": "user", "content": turn.input})
        if turn.response is not None:
            messages.append({"role": "assistant", "content": turn.response, "weight": int(turn.is_trained)})
    return messages


def _kind_name(feature: Any) -> str:
    if type(feature).__name__ == "Json":  # what datasets makes of a column of several types
        return "of several types"
    return f"of type {feature.dtype}" if isinstance(getattr(feature, "dtype", None), str) else f"{feature}"


def _example(dataset: "Dataset", column: str) -> str:
    """`: row 3 holds 7`, the first row of the rarest type: where few are wrong, one of those."""
    kinds = [type(value) for value in dataset[column]]
    counts = Counter(kind for kind in kinds if kind is not type(None))
    if not counts:
        return ""
    number = kinds.index(min(counts, key=counts.__getitem__))
    return f": row {number} holds {repr(dataset[number][column])[:60]}"


def _is_null(feature: Any) -> bool:
    inner = getattr(feature, "feature", feature)  # a column of nulls, or of empty lists only
    return getattr(inner, "dtype", None) == "null"
