"""Stage 3: rows -> examples (ids and which of them are trained), holding the five invariants for every one.

    I1  the ids before the first label are the ids of the prompt text alone, as inference makes them
    I2  decoding the ids gives the rendered text (as the tokenizer spells it, `PromptTokenizer.spelled`)
    I3  no prompt token is a label; every response token and the stop token are
    I4  few-shot examples and contexts are never labels
    I5  control-token text in a row stays text

Tokenizing prompt and response together can merge across the boundary, tokenizing them apart puts a stray space before
the answer with SentencePiece. So: the ids of the whole where the prompt's ids begin it, else the *anchored join*, the
ids of one character and the response behind the ids of that character.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

from llm.chat_template import ChatTemplateFormat, TemplateRefusal, answer_places, split_system
from llm.errors import ConfigError, DataError, did_you_mean
from llm.prompt import Message, Prompt
from llm.prompt_format import PromptFormat, Segment, TrainOn, last_control_token
from llm.tokenizer import PromptTokenizer
from llm.training.config import OnTooLong
from llm.training.prep.rows import Row

DropReason = Literal[
    "empty_response",
    "empty_prompt",
    "too_long",
    "not_representable",
    "no_exact_boundary",
    "needs_chat_template",
    "refused_by_template",
]
DROP_ADVICE: dict[str, str] = {
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
    input_ids = [48, 25, 220, 16, 30, 362, 25, 220, 17, 2]
    trained   = ((7, 10),)                  half-open ranges of ids that become labels; the last id is the stop token
    """

    row: int
    text: str
    input_ids: list[int]
    trained: tuple[tuple[int, int], ...]
    num_cut_contexts: int = 0
    num_cut_characters: int = 0
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


class _Joint(NamedTuple):
    """A prompt and its response, cut so that each piece is tokenized as it is in the whole text.

    `lead` is the stop token before (dropped again), `head` ends where a control token begins, `tail` is the rest of the
    prompt: mostly a constant such as `<|im_start|>assistant\\n`.
    """

    lead: str
    head: str
    tail: str
    response: str


_Pair = tuple[Segment, Segment]  # a prompt and its response
_JoinedIds = tuple[list[int], list[int] | None]  # the ids of a prompt and of its response, None where no join is exact


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

    def check_room(self) -> None:
        """ConfigError when the fixed part of the prompt (system message, few-shot examples, marks) leaves no room.

        Also when the format's stop is not a control token, so that no response could end with it.
        """
        if self.prompt_format.stop not in self.tokenizer.control_tokens:
            raise ConfigError(
                f"prompt_format_config: the stop `{self.prompt_format.stop}` is not a control token of this tokenizer. "
                f"{did_you_mean(self.prompt_format.stop, self.tokenizer.control_tokens)}"
            )
        empty = self._encode_all([Row.of(number=0, input="", response="")])[0]
        num_tokens = empty.num_tokens if isinstance(empty, Dropped) else len(empty.input_ids)
        if num_tokens >= self.max_tokens:
            raise ConfigError(
                f"chunksize: the prompt alone (system message, few-shot examples, marks) takes {num_tokens} tokens, "
                f"and a block holds {self.max_tokens}. Set chunksize above {num_tokens}, or shorten prompt_config."
            )

    def encode(self, rows: Sequence[Row]) -> list[Outcome]:
        """What became of each row, in order; DataError where `on_too_long: error` forbids dropping."""
        outcomes: dict[int, Outcome] = {}
        full = []
        for row in rows:
            reason = self._why_unusable(row)
            if reason:
                outcomes[row.number] = Dropped(row=row.number, reason=reason)
            else:
                full.append(row)
        for row, outcome in zip(full, self._encode_all(full), strict=True):
            outcomes[row.number] = self._fitted(row, outcome)
        return [outcomes[row.number] for row in rows]

    def _why_unusable(self, row: Row) -> DropReason | None:
        """What can be told without tokens."""
        answers = self._answers(row)
        if not answers or not all(answer.strip() for answer in answers):
            return "empty_response"
        if row.chat is not None and not isinstance(self.prompt_format, ChatTemplateFormat):
            return "needs_chat_template"
        return "not_representable" if _has_lone_surrogate(row) else None

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
                f"source_config: row {row.number} (counted from 0): {num_tokens} tokens, a block holds "
                f"{self.max_tokens} (chunksize). Raise chunksize, or set on_too_long to `drop` or `truncate_contexts`."
            )
        cut = self._truncate(row) if self.on_too_long == "truncate_contexts" else None
        return cut or Dropped(row=row.number, reason="too_long", num_tokens=num_tokens)

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

    def _encode_all(self, rows: Sequence[Row]) -> list[Outcome]:
        pairs = [_pairs(self._segments(row)) for row in rows]
        joints = [joint for one in pairs for joint in self._joints(one)]
        ids = iter(self._join_all(joints))
        outcomes = [self._example(row, one, ids) for row, one in zip(rows, pairs, strict=True)]
        return self._checked(outcomes)

    def _segments(self, row: Row) -> list[Segment]:
        """The rendered row, its control-token text marked to stay text; none when the template refuses it."""
        keep: Callable[[str], str] = str if self.allow_special_tokens_in_data else self.tokenizer.keep_as_text
        try:
            if row.chat is not None:
                return self._chat_segments(_with_texts(row.chat, keep))
            turns = [replace(turn, **_with_texts(_texts(turn), keep)) for turn in row.answered(self.train_on)]
            return self.prompt_format.segments(self.prompt.conversation(turns, system=keep(row.system)))
        except TemplateRefusal as error:
            if row.chat is not None:
                return []
            raise DataError(f"source_config: row {row.number} (counted from 0): {error}") from error
        except (ValueError, DataError) as error:
            raise DataError(f"source_config: row {row.number} (counted from 0): {error}") from error

    def _chat_segments(self, chat: Mapping[str, Any]) -> list[Segment]:
        assert isinstance(self.prompt_format, ChatTemplateFormat), "_why_unusable has seen to it"
        around = self.prompt.conversation([Message("", None, chat["contexts"])])
        messages = self.prompt.chat(chat["messages"])
        return self.prompt_format.chat_segments(around, messages, tools=chat["tools"], train_on=self.train_on)

    def _joints(self, pairs: Sequence[_Pair]) -> list[_Joint]:
        joints: list[_Joint] = []
        for prompt, response in pairs:
            lead = self.prompt_format.stop if joints else ""
            opening = lead + prompt.text
            token = last_control_token(opening, self.tokenizer.cut_tokens)
            cut = opening.rfind(token) if token else 0
            joints.append(_Joint(lead, opening[:cut], opening[cut:], response.text))
        return joints

    def _join_all(self, joints: Sequence[_Joint]) -> list[_JoinedIds]:
        """Per joint the prompt ids, and the response ids; None where no exact join exists."""
        texts = dict.fromkeys(joint.tail for joint in joints)
        texts |= dict.fromkeys(joint.head for joint in joints)
        texts |= dict.fromkeys(joint.tail + joint.response for joint in joints)
        ids_of = dict(zip(texts, self.tokenizer.encode(list(texts)), strict=True))
        found = []
        for joint in joints:
            head, tail, whole = (ids_of[t] for t in (joint.head, joint.tail, joint.tail + joint.response))
            response = whole[len(tail) :] if whole[: len(tail)] == tail else self._anchored(joint, tail, whole)
            found.append(((head + tail)[bool(joint.lead) :], response))
        return found

    def _anchored(self, joint: _Joint, tail: list[int], whole: list[int]) -> list[int] | None:
        text = self.tokenizer.decode([whole])[0]
        for anchor in (joint.tail[-1:], "\n", "]", ""):
            behind, both = self.tokenizer.encode([anchor, anchor + joint.response])
            response = both[len(behind) :]
            if both[: len(behind)] == behind and self.tokenizer.decode([tail + response])[0] == text:
                return response
        return None

    def _example(self, row: Row, pairs: Sequence[_Pair], ids: Iterator[_JoinedIds]) -> Outcome:
        if not pairs and row.chat is not None:
            return Dropped(row=row.number, reason="refused_by_template")
        input_ids: list[int] = []
        trained = []
        joined = [next(ids) for _ in pairs]
        for (_, segment), (prompt, response) in zip(pairs, joined, strict=True):
            if response is None:
                return Dropped(row=row.number, reason="no_exact_boundary")
            if segment.is_trained and len(response) == 1:  # the stop token: the tokenizer leaves the rest out
                num_tokens = sum(len(p) + len(r or ()) for p, r in joined)
                return Dropped(row=row.number, reason="not_representable", num_tokens=num_tokens)
            start = len(input_ids) + len(prompt)
            input_ids += prompt + response
            if segment.is_trained:
                trained.append((start, len(input_ids)))
        if not trained or trained[0][0] == 0:
            return Dropped(row=row.number, reason="empty_prompt", num_tokens=len(input_ids))
        marked = "".join(prompt.text + response.text for prompt, response in pairs)
        text = self.tokenizer.unmark(marked)
        has_control_text = self._has_control_text(row) if self.allow_special_tokens_in_data else text != marked
        return Example(
            row=row.number,
            text=text,
            input_ids=input_ids,
            trained=tuple(trained),
            num_cut_characters=sum(len(turn.input) for turn in row.turns[len(row.answered("all")) :]),
            has_control_text=has_control_text,
        )

    def _has_control_text(self, row: Row) -> bool:
        text = _all_text(row)
        return any(token in text for token in self.tokenizer.control_tokens)

    def _checked(self, outcomes: list[Outcome]) -> list[Outcome]:
        """I2 and the stop token, for every example."""
        examples = [outcome for outcome in outcomes if isinstance(outcome, Example)]
        decoded = dict(
            zip((e.row for e in examples), self.tokenizer.decode([e.input_ids for e in examples]), strict=True)
        )
        stop = self.tokenizer.control_tokens[self.prompt_format.stop]
        checked: list[Outcome] = []
        for outcome in outcomes:
            if isinstance(outcome, Example):
                assert outcome.input_ids[-1] == stop, "a format ends every response with its stop token"
                outcome = replace(outcome, text=self.tokenizer.spelled(outcome.text))
                if self.tokenizer.is_lossless and decoded[outcome.row] != outcome.text:
                    num_tokens = len(outcome.input_ids)
                    outcome = Dropped(row=outcome.row, reason="not_representable", num_tokens=num_tokens)
            checked.append(outcome)
        return checked


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
    turns = (text for turn in row.turns for text in (turn.input, turn.response or "", *turn.contexts))
    return "\n".join((row.system, *turns, *_strings(row.chat)))


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ()
    for part in parts:
        yield from _strings(part)


def _has_lone_surrogate(row: Row) -> bool:
    try:
        _all_text(row).encode()
    except UnicodeEncodeError:
        return True
    return False


def _pairs(segments: Sequence[Segment]) -> list[_Pair]:
    """Prompts and responses in turn, without what a format puts behind the stop token; none when a prompt is empty."""
    if not segments or segments[0].is_trained:
        return []
    return list(zip(segments[::2], segments[1::2], strict=False))
