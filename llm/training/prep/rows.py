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
from llm.training.config import ColumnName, DatasetConfig, OnBadRow, RowFormat
from llm.training.prep.dataset import is_text, load_dataset_config
from llm.training.prep.file_pages import maps_given_back
from llm.training.prep.messages import null_text, parse_message, parse_objects

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
# What a message can say beside its content; other keys (ids, languages, ratings) only a chat template may look at.
_SAYING = ("tool_calls", "function_call", "tool_call_id", "reasoning_content", "reasoning", "thinking", "name")
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
    reasoning, other roles; `turns` are empty then. `problem` says why it could not be read: then it holds nothing else.
    """

    number: int
    turns: tuple[Message, ...]
    system: str = ""
    chat: Mapping[str, Any] | None = None
    problem: str | None = None
    origin: str = _KEY

    @property
    def where(self) -> str:
        """Its source and its number there, for errors; where several sources are mixed `origin` says both."""
        return f"{_KEY}: row {self.number} (counted from 0)" if self.origin == _KEY else self.origin

    @property
    def contexts(self) -> tuple[str, ...]:
        """The contexts of all its turns."""
        found = self.chat["contexts"] if self.chat else [text for turn in self.turns for text in turn.contexts]
        return tuple(found)

    def answered(self, train_on: TrainOn) -> list[Message]:
        """The turns up to the last answer, each trained or not."""
        turns = self.turns
        while turns and turns[-1].response is None:
            turns = turns[:-1]
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
    """A data set, the format of its rows, and which of its columns holds what (our name -> its name).

    `key` is its YAML key, for errors. `others` are the sources whose rows follow, where several are mixed.
    """

    dataset: "Dataset"
    row_format: RowFormat
    columns: Mapping[ColumnName, str]
    on_bad_row: OnBadRow = "error"
    key: str = _KEY
    others: tuple["Source", ...] = ()

    @property
    def parts(self) -> tuple["Source", ...]:
        """The sources, one after the other."""
        return (self, *self.others)

    @property
    def num_rows(self) -> int:
        """The rows of all sources."""
        return sum(len(part.dataset) for part in self.parts)

    @property
    def size_bytes(self) -> int:
        """About how many bytes the rows of all sources are, with the columns that are not used."""
        tables = [(len(part.dataset), part.dataset.data) for part in self.parts]
        return sum(table.nbytes * num_rows // table.num_rows for num_rows, table in tables)


def load_source(
    config: DatasetConfig,
    *,
    columns: Mapping[ColumnName, str] | None = None,
    row_format: RowFormat = "auto",
    on_bad_row: OnBadRow = "error",
    key: str = _KEY,
) -> Source:
    """The source rows, columns checked; DataError when their columns are not those of `row_format`."""
    source = with_columns(load_dataset_config(config, key=key), columns or {}, row_format, key=key)
    return replace(source, on_bad_row=on_bad_row)


def with_columns(
    dataset: "Dataset", given: Mapping[ColumnName, str], row_format: RowFormat = "auto", *, key: str = _KEY
) -> Source:
    """`dataset` and which of its columns holds what: as `given`, else by their usual names in `row_format`."""
    missing = sorted({*given.values()} - {*dataset.column_names})
    if missing:
        raise DataError(
            f"{key.removesuffix(_KEY)}columns: the rows have no column {quoted(missing)}. "
            f"{did_you_mean(missing[0], dataset.column_names)}"
        )
    chosen = _row_format(dataset, given) if row_format == "auto" else row_format
    found = {**_COLUMNS[chosen], **given}
    found = {ours: theirs for ours, theirs in found.items() if ours in _REQUIRED or theirs in dataset.column_names}
    source = Source(dataset=dataset, row_format=chosen, columns=found, key=key)
    _check_columns(source)
    if chosen != "input_response":
        told = ", ".join(f"`{theirs}` -> {ours}" for ours, theirs in found.items())
        logger.info(f"{key}: read as {chosen} ({told}); `row_format` forces another, or refuses this one.")
    return source


def iterate_rows(source: Source, *, batch_size: int) -> Iterator[list[Row]]:
    """The rows of `source` in order, `batch_size` at a time.

    DataError at one that cannot be read, with its number; where `on_bad_row` is `drop` it is a row with a `problem`.
    """
    if source.key == _KEY:
        yield from _own_rows(source, batch_size)
        return
    first = 0
    for part in source.parts:
        for rows in _own_rows(part, batch_size):
            yield [
                replace(row, number=first + row.number, origin=f"{part.key}: row {row.number} (counted from 0)")
                for row in rows
            ]
        first += len(part.dataset)


def _own_rows(source: Source, batch_size: int) -> Iterator[list[Row]]:
    """The rows of one source, numbered from 0."""
    start = 0
    for table in _tables(source, batch_size):
        batch = {ours: _values(table, theirs, start, source.key) for ours, theirs in source.columns.items()}
        rows = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
        yield [_row_or_problem(start + place, row, source) for place, row in enumerate(rows)]
        start += table.num_rows


def _tables(source: Source, batch_size: int) -> Iterator[pa.Table]:
    """The columns of `source` that are used, `batch_size` rows at a time."""
    whole = source.dataset.select_columns(list(source.columns.values())).with_format("arrow")
    with maps_given_back(whole.data.table, [file["filename"] for file in whole.cache_files]):
        yield from whole.iter(batch_size=batch_size)


def _values(table: pa.Table, column: str, start: int, key: str) -> list[Any]:
    """A column's values; a DataError in place of one that is not UTF-8, which the readers of JSON let through."""
    try:
        return list(table.column(column).to_pylist())
    except UnicodeDecodeError:
        where = [f"{key}: row {start + place} (counted from 0)" for place in range(table.num_rows)]
        return [_value(*one, column) for one in zip(table.column(column), where, strict=True)]


def _value(value: pa.Scalar, where: str, column: str) -> Any:
    try:
        return value.as_py()
    except UnicodeDecodeError as error:
        return DataError(f"{where}: `{column}` is not UTF-8 ({error.reason}). Save the file as UTF-8.")


def guess_columns(names: Sequence[str]) -> dict[ColumnName, str]:
    """Columns that most likely hold `input` and `response` under other names; none for what has its own name."""
    return _near(names, ("input", "response"))


def _near(names: Sequence[str], wanted: Iterable[ColumnName]) -> dict[ColumnName, str]:
    by_lower = {name.lower(): name for name in names}
    found = {ours: [by_lower[name] for name in (ours, *_OTHER_NAMES[ours]) if name in by_lower] for ours in wanted}
    return {ours: near[0] for ours, near in found.items() if near and ours not in names}


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
            wanted = f"{wanted};" if is_contexts else "text,"
            raise DataError(
                f"{source.key}: column `{theirs}` must be {wanted} it is {_kind_name(kind)}"
                f"{_example(source.dataset, theirs)}."
            )


def _missing(source: Source, wanted: str) -> str:
    names = source.dataset.column_names
    if len(names) == 1 and (separator := next((one for one in (";", "\t", "|") if one in names[0]), "")):
        arguments = f"{{path: ..., sep: {json.dumps(separator)}}}"
        return (
            f"{source.key}: the rows have no column `{wanted}`, but one that is called {names[0]!r}. Say what "
            f"separates the columns of the file: `method: load_path, kwargs: {arguments}`."
        )
    near = did_you_mean(wanted, names)
    hint = f"{near} " if near.startswith("Did") else ""
    talks = [name for name, kind in source.dataset.features.items() if _is_talk(kind)]
    guess: dict[ColumnName, str] = {"messages": talks[0]} if len(talks) == 1 else {}
    if not guess:
        guess = {ours: "..." for ours in _OTHER_NAMES if ours not in names and ours in _REQUIRED}
        guess |= _near(names, _OTHER_NAMES)
    mapped = ", ".join(f"{ours}: {theirs}" for ours, theirs in guess.items())
    return (
        f"{source.key}: the rows have no column `{wanted}`; they have {quoted(names)}. {hint}"
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


def _row_or_problem(number: int, values: dict[ColumnName, Any], source: Source) -> Row:
    try:
        return _row(number, values, source)
    except DataError as error:
        if source.on_bad_row == "drop":
            return Row(number=number, turns=(), problem=str(error))
        raise DataError(f"{error} `on_bad_row: drop` leaves such rows out and counts them.") from error


def _row(number: int, values: dict[ColumnName, Any], source: Source) -> Row:
    where = f"{source.key}: row {number} (counted from 0)"
    for value in values.values():
        if isinstance(value, DataError):
            raise value
    contexts = values.get("contexts") or []
    contexts = [contexts] if isinstance(contexts, str) else contexts  # Alpaca's input
    if None in contexts:
        raise DataError(null_text(where, f"contexts[{contexts.index(None)}]"))
    system = values.get("system") or ""
    tools = parse_objects(values.get("tools"), where, "tools")
    if "messages" in values:
        found = parse_objects(values["messages"], where, "messages")
        messages = [parse_message(one, where, f"messages[{place}]") for place, one in enumerate(found)]
        return _conversation(number, {"messages": messages, "tools": tools}, system, tuple(contexts))
    for ours in ("input", "response"):
        if values[ours] is None:
            raise DataError(null_text(where, source.columns[ours]))
    if not tools:
        return Row(number=number, turns=(Message(values["input"], values["response"], tuple(contexts)),), system=system)
    messages = [{"role": "user", "content": values["input"]}, {"role": "assistant", "content": values["response"]}]
    return _conversation(number, {"messages": messages, "tools": tools}, system, tuple(contexts))


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
