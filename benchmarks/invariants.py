"""The five invariants (DESIGN 4.2) and the serving template over real tokenizers: rows tried, violations.

    python benchmarks/invariants.py [--rows 1000] [--seed 0] [FOLDER ...]

Each FOLDER holds a tokenizer; default: the quickstart's model. `--rows` are shared out among the formats. The
oracle is not our code: ids come from the bare `transformers` tokenizer, texts from the untouched row.

    I1  ids before the first label = the tokenizer's ids of the prompt text
    I2  decoded ids = the rendered text, composed (NFC) where the tokenizer composes; where it gives no text
        back: the decoded prompt begins the decoded whole
    I3  every range of labels ends with the stop token, the last one at the last id
    I4  the ranges of labels decode to the answers to be trained: few-shot examples, contexts and other turns have none
    I5  as many control tokens as the same row has without control-token text
    serve  `apply_chat_template` with the serving template = the ids before the first label
    later  the same for the whole conversation before its last answer, where no other answer is trained. Where all are,
        an earlier one that would merge with its prompt stands there as it was generated, not as inference tokenizes it
        later (`merged`): no sequence has it both ways
    kept  no row is dropped for its boundary or its characters where the tokenizer gives its whole text back
"""

import argparse
import random
import string
import unicodedata
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from llm.chat_template import ChatTemplateFormat
from llm.errors import ConfigError, DataError
from llm.prompt import FewShotQA, Message, Prompt, StandaloneQuestion
from llm.prompt_format import PromptFormat
from llm.prompt_registry import PROMPT_FORMATS
from llm.registry import resolve_method
from llm.serving_template import serving_template
from llm.tokenizer import PromptTokenizer
from llm.training.prep.encode import Dropped, Encoder, Example
from llm.training.prep.rows import Row

QUICKSTART_MODEL = ".cache/SmolLM2-135M-Instruct"
CHECKS = ("I1", "I2", "I3", "I4", "I5", "serve", "later", "kept")
PROMPTS = (
    Prompt(),
    Prompt(system_message="Be {brief}.", input_template="Q: {text} ", response_template="A: {text}"),
    FewShotQA(),
    StandaloneQuestion(),
)
AnyFormat = PromptFormat | ChatTemplateFormat
ALPHABETS = {
    "words": string.ascii_letters + "    \n",
    "code": "def f(x):\n    return {x: [1, 2]}\t# \\n // ;\r\n",
    "json": '{"key": "Ünï", "n": [1.5e-3, null], "s": "\\u00e9"}\n',
    "cjk": "日本語中文한국어、。「」 \u3000",
    "emoji": "😀👩‍👩‍👧🇵🇪👍🏽❤️ a",
    "marks": "e\u0301a\u0308\u0323न\u093f\u200d\u202e\ufeffﬁ ",
    "white": " \t\n\r\u00a0\u2028▁  ",
    "odd": "\x00\x01\x7f\u0085\ufffd\U0010fffd\uf8ffa",
    "template": "{{ x }}{% if %}{# #}{text}{index}",
}


@dataclass
class Tally:
    """What was tried with one format."""

    rows: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    wrong: Counter[str] = field(default_factory=Counter)


def main() -> None:
    parser = argparse.ArgumentParser(description="Invariants over real tokenizers")
    parser.add_argument("folders", nargs="*", default=[QUICKSTART_MODEL])
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    num_wrong = num_merged = 0
    print(f"{'tokenizer':<18} {'format':<22} {'rows':>5} {'dropped':>8}", *(f"{c:>5}" for c in CHECKS))
    for folder in given.folders:
        bare = AutoTokenizer.from_pretrained(folder)
        tokenizer = PromptTokenizer(bare)
        formats = fitting_formats(tokenizer)
        for name, prompt_format in formats.items():
            maker = random.Random(f"{given.seed} {name}")
            tally = tried(bare, tokenizer, prompt_format, maker, num_rows=-(-given.rows // len(formats)))
            num_merged += tally.wrong.pop("merged", 0)
            num_wrong += tally.wrong.total()
            counts = (f"{tally.wrong[check]:>5}" for check in CHECKS)
            dropped = ", ".join(f"{reason} {count}" for reason, count in tally.dropped.items())
            print(
                f"{Path(folder).name:<18} {name:<22} {tally.rows:>5} {tally.dropped.total():>8}",
                *counts,
                dropped,
                flush=True,
            )
    print(f"{num_wrong} violations; {num_merged} conversations merged")
    raise SystemExit(num_wrong > 0)


def fitting_formats(tokenizer: PromptTokenizer) -> dict[str, AnyFormat]:
    """Every known format bound to `tokenizer`; `*`: with its own BOS and EOS, since it lacks the format's."""
    found: dict[str, AnyFormat] = {}
    for name in PROMPT_FORMATS:
        kind = resolve_method(name, PROMPT_FORMATS, key="format")
        try:
            found[name] = kind().for_tokenizer(tokenizer)
        except ConfigError:
            if kind is not ChatTemplateFormat:
                kwargs = {"BOS": tokenizer.added_bos, "EOS": tokenizer.eos_token, "stop": tokenizer.eos_token}
                found[f"{name}*"] = kind(**kwargs).for_tokenizer(tokenizer)
    return found


def tried(
    bare: PreTrainedTokenizerBase,
    tokenizer: PromptTokenizer,
    prompt_format: AnyFormat,
    maker: random.Random,
    *,
    num_rows: int,
) -> Tally:
    """`num_rows` random rows through every check."""
    tally = Tally()
    encoders = [
        Encoder(tokenizer=tokenizer, prompt=prompt, prompt_format=prompt_format, max_tokens=10**9) for prompt in PROMPTS
    ]
    for number in range(num_rows):
        encoder = encoders[number % len(encoders)]
        encoder = replace(encoder, train_on="last") if number % 3 == 0 else encoder
        row = random_row(maker, number, list(tokenizer.control_tokens))
        tally.rows += 1
        try:
            outcome = encoder.encode([row])[0]
        except DataError:
            tally.dropped["refused"] += 1
            continue
        if isinstance(outcome, Dropped):
            tally.dropped[outcome.reason] += 1
            tally.wrong["kept"] += outcome.reason != "empty_response" and gives_back(row, encoder, bare)
        else:
            tally.wrong.update(violations(row, outcome, encoder, bare))
    return tally


def violations(row: Row, example: Example, encoder: Encoder, bare: PreTrainedTokenizerBase) -> Iterator[str]:
    """The names of the checks that `example` fails."""
    turns = row.answered(encoder.train_on)
    segments = encoder.prompt.segments(turns, encoder.prompt_format)
    texts = [text for turn in turns for text in (*turn.contexts, turn.input, turn.response or "")]
    ids, (start, _) = example.input_ids.tolist(), example.trained[0]
    controls = encoder.tokenizer.control_tokens
    has_control_text = any(token in text for token in controls for text in texts)
    if has_control_text != example.has_control_text or num_controls(ids, encoder) != num_marks(row, encoder):
        yield "I5"
    if not has_control_text and ids[:start] != bare(segments[0].text, add_special_tokens=False)["input_ids"]:
        yield "I1"
    places = [place for place, turn in enumerate(turns) if turn.is_trained]
    if not has_control_text and ids[:start] != served_ids(turns[: places[0] + 1], encoder, bare):
        yield "serve"
    if not has_control_text and ids[: example.trained[-1][0]] != served_ids(turns, encoder, bare):
        yield "later" if encoder.train_on == "last" else "merged"
    whole, opening, *answers = (
        str(bare.decode(part, clean_up_tokenization_spaces=False))
        for part in (ids, ids[:start], *(ids[slice(*span)] for span in example.trained))
    )
    if encoder.tokenizer.is_lossless:
        rendered = "".join(segment.text for segment in segments)
        if [whole, opening] != [spelled(rendered, bare), spelled(segments[0].text, bare)]:
            yield "I2"
    elif not whole.startswith(opening):
        yield "I2"
    stop = controls[encoder.prompt_format.stop]
    ends = [end for start, end in example.trained if start < end - 1 and ids[end - 1] == stop]
    if len(ends) != len(example.trained) or ends[-1] != len(ids):
        yield "I3"
    trained = [spelled(segment.text, bare) for segment in segments if segment.is_trained]
    if len(answers) != len(places) or (encoder.tokenizer.is_lossless and not same_ends(answers, trained)):
        yield "I4"


def same_ends(answers: list[str], trained: list[str]) -> bool:
    """Whether each answer is that text; SentencePiece takes a space off its beginning when it is decoded alone."""
    pairs = zip(answers, trained, strict=True)
    return all(text.endswith(answer) and len(text) - len(answer) <= 1 for answer, text in pairs)


def gives_back(row: Row, encoder: Encoder, bare: PreTrainedTokenizerBase) -> bool:
    """Whether the bare tokenizer gives the rendered text of `row` back."""
    text = encoder.prompt.render(row.answered(encoder.train_on), encoder.prompt_format)
    ids = bare(text, add_special_tokens=False)["input_ids"]
    return bare.decode(ids, clean_up_tokenization_spaces=False) == spelled(text, bare)


def served_ids(turns: list[Message], encoder: Encoder, bare: PreTrainedTokenizerBase) -> list[int]:
    """What inference sees before the last answer of `turns`, with the exported template."""
    messages = [
        message
        for turn in turns
        for message in ({"role": "user", "content": turn.input}, {"role": "assistant", "content": turn.response})
    ]
    return list(
        bare.apply_chat_template(
            messages[:-1],
            chat_template=serving_template(encoder.prompt, encoder.prompt_format),
            documents=[{"text": text} for text in turns[-1].contexts] or None,
            add_generation_prompt=True,
            return_dict=False,
        )
    )


def spelled(text: str, bare: PreTrainedTokenizerBase) -> str:
    """`text` in the composed characters that some tokenizers make of it first."""
    return unicodedata.normalize("NFC", text) if "NFC" in repr(bare.backend_tokenizer.normalizer) else text


def num_controls(ids: list[int], encoder: Encoder) -> int:
    """How many of `ids` are control tokens, without the one for what the tokenizer does not know."""
    names = encoder.tokenizer.control_tokens
    controls = set(names.values()) - {names.get("[UNK]"), names.get("<unk>")}
    return sum(number in controls for number in ids)


def num_marks(row: Row, encoder: Encoder) -> int:
    """The control tokens of the prompt format around `row`."""
    turns = tuple(replace(turn, input="x", response="x", contexts=("x",) * len(turn.contexts)) for turn in row.turns)
    [example] = encoder.encode([replace(row, turns=turns)])
    assert isinstance(example, Example)
    return num_controls(example.input_ids, encoder)


def random_row(maker: random.Random, number: int, control_tokens: list[str]) -> Row:
    """One turn with 0 to 3 contexts, in three rows of ten two or three turns; one in eight holds control-token text."""
    controls = control_tokens if maker.random() < 0.125 else []
    turns = [
        Message(random_text(maker, 20_000, controls), random_text(maker, 20_000, controls))
        for _ in range(maker.choice((1,) * 7 + (2, 2, 3)))
    ]
    contexts = tuple(random_text(maker, 2000, controls) for _ in range(maker.choice((0, 0, 1, 3))))
    return Row(number=number, turns=(*turns[:-1], replace(turns[-1], contexts=contexts)))


def random_text(maker: random.Random, longest: int, controls: list[str]) -> str:
    """Up to `longest` characters of one alphabet, and one of `controls` somewhere inside if there are any."""
    length = int(longest ** maker.random()) - (maker.random() < 0.1)
    alphabet = ALPHABETS[maker.choice(list(ALPHABETS))]
    made = "".join(maker.choices(alphabet, k=max(0, length)))
    if maker.random() < 0.3:  # the alphabet in its own order: whole words, whole graphemes
        made = (alphabet * (length // len(alphabet) + 1))[: max(0, length)]
    if controls:
        place = maker.randint(0, len(made))
        made = made[:place] + maker.choice(controls) + made[place:]
    return made


if __name__ == "__main__":
    main()
