"""Stage 3: rows -> examples (ids and which of them are trained), holding the five invariants for every one.

    I1  the ids before the first label are the ids of the prompt text alone, as inference makes them
    I2  decoding the ids gives the rendered text (as the tokenizer spells it, `PromptTokenizer.spelled`)
    I3  no prompt token is a label; every response token and the stop token are
    I4  few-shot examples and contexts are never labels
    I5  control-token text in a row stays text

How prompt and response are joined is in `join.py`.
"""

from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
from typing import Any, Literal

from llm.chat_template import ChatTemplateFormat, TemplateRefusal, answer_places, split_system
from llm.errors import ConfigError, DataError, did_you_mean
from llm.fast_tokenizer import TokenIds
from llm.prompt import Message, Prompt
from llm.prompt_format import PromptFormat, Segment, TrainOn
from llm.registry import is_ours
from llm.tokenizer import PromptTokenizer
from llm.training.config import OnTooLong
from llm.training.prep.frame import Frames
from llm.training.prep.join import JoinedIds, Pair, join_pairs
from llm.training.prep.rows import Row, plain

DropReason = Literal[
    "bad_row",
    "not_drawn",
    "duplicate",
    "empty_response",
    "empty_prompt",
    "too_long",
    "not_representable",
    "no_exact_boundary",
    "needs_chat_template",
    "refused_by_template",
]
DROP_ADVICE: dict[str, str] = {
    "bad_row": "a null where text belongs, or not to be read: `on_bad_row: error` says what is wrong with the first",
    "not_drawn": "left out by chance, since the weight of its source is below 1, or its share small",
    "duplicate": "an earlier row has the same prompt and response",
    "empty_response": "no response to learn from",
    "empty_prompt": "no prompt token from which to predict the response's first",
    "too_long": "longer than chunksize, or than the model can read: raise chunksize, or set on_too_long",
    "not_representable": "the tokenizer has no tokens for some of its characters",
    "no_exact_boundary": "prompt and response cannot be told apart in tokens",
    "needs_chat_template": "tools, or no turns of user and assistant: only ChatTemplateFormat has marks for that",
    "refused_by_template": "the chat template raises an error for these roles",
}


@dataclass(frozen=True, kw_only=True)
class Example:
    """The tokens of one row.

    text      = "Q: 1+1? A: 2</s>"
    input_ids = [48, 25, 220, 16, 30, 362, 25, 220, 17, 2]      array of type I, 4 bytes each
    trained   = ((7, 10),)                  half-open ranges of ids that become labels; the last id is the stop token
    """

    row: int
    text: str
    input_ids: TokenIds
    trained: tuple[tuple[int, int], ...]
    num_cut_contexts: int = 0
    num_cut_characters: int = 0
    num_cut_tokens: int = 0
    has_control_text: bool = False

    @property
    def is_cut(self) -> bool:
        """Whether contexts or input were shortened to fit."""
        return bool(self.num_cut_contexts or self.num_cut_characters)

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens before the first label."""
        return self.trained[0][0]

    @property
    def num_trained_tokens(self) -> int:
        """Tokens that become labels."""
        return sum(end - start for start, end in self.trained)


@dataclass(frozen=True, kw_only=True)
class Dropped:
    """A row that became no example, and why; `num_tokens` where it was tokenized."""

    row: int
    reason: DropReason
    num_tokens: int = 0


Outcome = Example | Dropped


@dataclass(frozen=True, kw_only=True)
class Encoder:
    """Turns rows into examples of at most `max_tokens` tokens."""

    tokenizer: PromptTokenizer
    prompt: Prompt
    prompt_format: PromptFormat | ChatTemplateFormat
    max_tokens: int
    on_too_long: OnTooLong = "drop"
    allow_special_tokens_in_data: bool = False
    train_on: TrainOn = "all"

    @cached_property
    def _frames(self) -> Frames | None:
        """None where the rendering may look into the texts: a chat template, code that is not ours."""
        is_blind = isinstance(self.prompt_format, PromptFormat) and is_ours(self.prompt, self.prompt_format)
        return Frames(self._rendered) if is_blind else None

    def check_room(self) -> None:
        """ConfigError when the fixed part of the prompt (system message, few-shot examples, marks) leaves no room.

        Also when the format's stop is not a control token, so that no response could end with it.
        """
        if self.prompt_format.stop not in self.tokenizer.control_tokens:
            raise ConfigError(
                f"prompt_format_config: the stop `{self.prompt_format.stop}` is not a control token of this tokenizer. "
                f"{did_you_mean(self.prompt_format.stop, self.tokenizer.control_tokens)}"
            )
        empty = self._unchecked([Row.of(number=0, input="", response="")])[0]
        num_tokens = empty.num_tokens if isinstance(empty, Dropped) else len(empty.input_ids)
        if num_tokens >= self.max_tokens:
            raise ConfigError(
                f"chunksize: the prompt alone (system message, few-shot examples, marks) takes {num_tokens} tokens, "
                f"and a block holds {self.max_tokens}. Set chunksize above {num_tokens}, or shorten prompt_config."
            )

    def encode(self, rows: Sequence[Row]) -> list[Outcome]:
        """What became of each row, in order; DataError where `on_too_long: error` forbids dropping."""
        rows = rows if isinstance(self.prompt_format, ChatTemplateFormat) else [plain(row) for row in rows]
        plain_rows = self._plain_rows(rows)
        reasons = {row.number: self._why_unusable(row, is_plain=row.number in plain_rows) for row in rows}
        full = [row for row in rows if reasons[row.number] is None]
        encoded = iter(self._encode_all(full, plain_rows))
        outcomes: list[Outcome] = []
        for row in rows:
            reason = reasons[row.number]
            outcomes.append(Dropped(row=row.number, reason=reason) if reason else self._fitted(row, next(encoded)))
        return outcomes

    def _plain_rows(self, rows: Sequence[Row]) -> Set[int]:
        """The numbers of rows without control-token text or a lone surrogate: nothing in them need be kept as text."""
        if self._is_plain("\n".join(chain.from_iterable(map(_texts_of, rows)))):  # mostly, and faster than one by one
            return {row.number for row in rows}
        half = len(rows) // 2
        return self._plain_rows(rows[:half]) | self._plain_rows(rows[half:]) if half else set()

    def _is_plain(self, text: str) -> bool:
        return not self.tokenizer.has_control_text(text) and not _has_lone_surrogate(text)

    def _why_unusable(self, row: Row, *, is_plain: bool) -> DropReason | None:
        """What can be told without tokens."""
        if row.problem:
            return "bad_row"
        answers = self._answers(row)
        if not answers or not all(answer.strip() for answer in answers):
            return "empty_response"
        if row.chat is not None and not isinstance(self.prompt_format, ChatTemplateFormat):
            return "needs_chat_template"
        return "not_representable" if not is_plain and _has_lone_surrogate(_all_text(row)) else None

    def _answers(self, row: Row) -> list[str]:
        """What is to be trained."""
        if row.chat is None:
            return [turn.response or "" for turn in row.answered(self.train_on) if turn.is_trained]
        _, messages = split_system(row.chat["messages"])
        trained = [messages[place] for place in answer_places(messages, self.train_on)]
        return [str(said.get("tool_calls") or said["content"]) for said in trained]

    def _fitted(self, row: Row, outcome: Outcome) -> Outcome:
        if isinstance(outcome, Dropped) or len(outcome.input_ids) <= self.max_tokens:
            return outcome
        num_tokens = len(outcome.input_ids)
        if self.on_too_long == "error":
            raise DataError(
                f"{row.where}: {num_tokens} tokens, a block holds "
                f"{self.max_tokens} (chunksize). Raise chunksize, or set on_too_long to `drop` or `truncate_contexts`."
            )
        cut = self._truncate(row) if self.on_too_long == "truncate_contexts" else None
        if cut is None:
            return Dropped(row=row.number, reason="too_long", num_tokens=num_tokens)
        return replace(cut, num_cut_tokens=num_tokens - len(cut.input_ids))

    def _truncate(self, row: Row) -> Example | None:
        """The example with as many leading contexts as fit, else with as much of the input (1 character or more).

        None where neither is enough, and for a conversation: to cut one would take answers away.
        """
        if len(row.turns) != 1:
            return None
        (turn,) = row.turns
        for kept in range(len(turn.contexts) - 1, -1, -1):
            example = self._try(row, replace(turn, contexts=turn.contexts[:kept]))
            if example:
                return replace(example, num_cut_contexts=len(turn.contexts) - kept)
        low, high, best = 1, len(turn.input), None
        while low < high:  # the longest input that fits, by bisection over characters
            middle = (low + high) // 2
            example = self._try(row, replace(turn, contexts=(), input=turn.input[:middle]))
            best, low, high = (example, middle + 1, high) if example else (best, low, middle)
        cut = len(turn.input) - (low - 1)
        return best and replace(best, num_cut_contexts=len(turn.contexts), num_cut_characters=cut)

    def _try(self, row: Row, turn: Message) -> Example | None:
        outcome = self._encode_all([replace(row, turns=(turn,))])[0]
        return outcome if isinstance(outcome, Example) and len(outcome.input_ids) <= self.max_tokens else None

    def _encode_all(self, rows: Sequence[Row], plain_rows: Set[int] = frozenset()) -> list[Outcome]:
        return self._checked(self._unchecked(rows, plain_rows))

    def _unchecked(self, rows: Sequence[Row], plain_rows: Set[int] = frozenset()) -> list[Outcome]:
        pairs = [_pairs(self._segments(row, is_plain=row.number in plain_rows)) for row in rows]
        joined = join_pairs(pairs, self.tokenizer, stop=self.prompt_format.stop)
        found = zip(rows, pairs, joined, strict=True)
        return [self._example(*one, is_plain=one[0].number in plain_rows) for one in found]

    def _segments(self, row: Row, *, is_plain: bool) -> list[Segment]:
        """The rendered row, its control-token text marked to stay text; none when the template refuses it."""
        if is_plain and (framed := self._framed(row)):
            return framed
        is_kept = is_plain or self.allow_special_tokens_in_data
        keep: Callable[[str], str] = str if is_kept else self.tokenizer.keep_as_text
        try:
            if row.chat is not None:
                return self._chat_segments(_with_texts(row.chat, keep))
            turns = row.answered(self.train_on)
            if not is_kept:
                turns = [replace(turn, **_with_texts(_texts(turn), keep)) for turn in turns]
            return self.prompt_format.segments(self.prompt.conversation(turns, system=keep(row.system)))
        except TemplateRefusal as error:
            if row.chat is not None:
                return []
            raise DataError(f"{row.where}: {error}") from error
        except (ValueError, DataError) as error:
            raise DataError(f"{row.where}: {error}") from error

    def _rendered(self, message: Message) -> list[Segment]:
        return self.prompt.segments([message], self.prompt_format)

    def _framed(self, row: Row) -> list[Segment] | None:
        if self._frames is None or len(row.turns) != 1 or not row.turns[0].is_trained or row.system:
            return None
        return self._frames.segments(row.turns[0])

    def _chat_segments(self, chat: Mapping[str, Any]) -> list[Segment]:
        assert isinstance(self.prompt_format, ChatTemplateFormat), "_why_unusable has seen to it"
        around = self.prompt.conversation([Message("", None, chat["contexts"])])
        messages = self.prompt.chat(chat["messages"])
        return self.prompt_format.chat_segments(around, messages, tools=chat["tools"], train_on=self.train_on)

    def _example(self, row: Row, pairs: Sequence[Pair], joined: Sequence[JoinedIds], *, is_plain: bool) -> Outcome:
        if not pairs and row.chat is not None:
            return Dropped(row=row.number, reason="refused_by_template")
        input_ids = array("I")
        trained = []
        for prompt, response in joined:
            if response is None:
                return Dropped(row=row.number, reason="no_exact_boundary")
            if len(response) == 1:  # the stop token: the tokenizer leaves the rest out
                num_tokens = sum(len(p) + len(r or ()) for p, r in joined)
                return Dropped(row=row.number, reason="not_representable", num_tokens=num_tokens)
            start = len(input_ids) + len(prompt)
            input_ids += prompt + response
            trained.append((start, len(input_ids)))
        if not trained or trained[0][0] == 0:
            return Dropped(row=row.number, reason="empty_prompt", num_tokens=len(input_ids))
        marked = "".join([segment.text for pair in pairs for segment in pair])
        text = marked if is_plain else self.tokenizer.unmark(marked)
        has_control_text = text != marked or (not is_plain and self._lets_control_text_through(row))
        return Example(
            row=row.number,
            text=text,
            input_ids=input_ids,
            trained=tuple(trained),
            num_cut_characters=sum(len(turn.input) for turn in row.turns if turn.response is None),
            has_control_text=has_control_text,
        )

    def _lets_control_text_through(self, row: Row) -> bool:
        text = _all_text(row)
        return self.allow_special_tokens_in_data and any(token in text for token in self.tokenizer.control_tokens)

    def _checked(self, outcomes: list[Outcome]) -> list[Outcome]:
        """I2 and the stop token, for every example."""
        examples = [outcome for outcome in outcomes if isinstance(outcome, Example)]
        stop = self.tokenizer.control_tokens[self.prompt_format.stop]
        assert all(example.input_ids[-1] == stop for example in examples), "every response ends with its stop token"
        texts = [self.tokenizer.spelled(example.text) for example in examples]
        ids = [example.input_ids for example in examples]
        is_lossless = self.tokenizer.is_lossless
        given_back = iter(self.tokenizer.gives_back(ids, texts) if is_lossless else [True] * len(texts))
        spelled = iter(texts)
        return [
            self._as_spelled(outcome, next(spelled), next(given_back)) if isinstance(outcome, Example) else outcome
            for outcome in outcomes
        ]

    def _as_spelled(self, example: Example, text: str, is_given_back: bool) -> Outcome:
        if not is_given_back:
            return Dropped(row=example.row, reason="not_representable", num_tokens=len(example.input_ids))
        return example if text == example.text else replace(example, text=text)


def _texts(turn: Message) -> dict[str, Any]:
    return {"input": turn.input, "response": turn.response, "contexts": turn.contexts}


def _with_texts(value: Any, change: Callable[[str], str]) -> Any:
    """`value` with every text in it changed, but for the names of keys and roles."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {name: one if name in ("role", "type") else _with_texts(one, change) for name, one in value.items()}
    return [_with_texts(one, change) for one in value] if isinstance(value, list | tuple) else value


def _all_text(row: Row) -> str:
    return "\n".join(_texts_of(row))


def _texts_of(row: Row) -> list[str]:
    found = [row.system]
    for turn in row.turns:
        found += (turn.input, turn.response or "", *turn.contexts)
    return found if row.chat is None else [*found, *_strings(row.chat)]


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ()
    for part in parts:
        yield from _strings(part)


def _has_lone_surrogate(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


def _pairs(segments: Sequence[Segment]) -> list[Pair]:
    """Prompts and responses in turn, without what a format puts behind the stop token; none when a prompt is empty."""
    if not segments or segments[0].is_trained:
        return []
    return list(zip(segments[::2], segments[1::2], strict=False))
