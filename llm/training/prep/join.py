"""Stage 3, inner half: prompt and response as text -> their ids, each token on its own side of the boundary.

Tokenizing prompt and response together can merge across the boundary, tokenizing them apart puts a stray space before
the answer with SentencePiece. So: the ids of the whole where the prompt's ids begin it, else the *anchored join*, the
ids of one character and the response behind the ids of that character.
"""

import os
from collections.abc import Sequence
from typing import NamedTuple

from llm.fast_tokenizer import TokenIds
from llm.prompt_format import Segment, last_control_token
from llm.tokenizer import PromptTokenizer

Pair = tuple[Segment, Segment]  # a prompt and its response
_NEAR_CHARACTERS = 256  # from the end of a prompt, where its last control token mostly is

JoinedIds = tuple[TokenIds, TokenIds | None]  # the ids of a prompt and of its response, None where no join is exact


class _Joint(NamedTuple):
    """A prompt and its response, cut so that each piece is tokenized as it is in the whole text.

    `lead` is the stop token before (dropped again), `head` ends where a control token begins, `tail` is the rest of the
    prompt: mostly a constant such as `<|im_start|>assistant\\n`.
    """

    lead: str
    head: str
    tail: str
    response: str


def join_pairs(batch: Sequence[Sequence[Pair]], tokenizer: PromptTokenizer, *, stop: str) -> list[list[JoinedIds]]:
    """Per row of the batch, per pair: the ids of its prompt (as if tokenized alone, or behind `stop`) and response.

    What all prompts of the batch begin with (system message, few-shot examples) is tokenized once.
    """
    joints = [_joints(pairs, tokenizer, stop) for pairs in batch]
    ids = iter(_join_all([joint for one in joints for joint in one], tokenizer))
    return [[next(ids) for _ in one] for one in joints]


def _joints(pairs: Sequence[Pair], tokenizer: PromptTokenizer, stop: str) -> list[_Joint]:
    joints: list[_Joint] = []
    for prompt, response in pairs:
        lead = stop if joints else ""
        opening = lead + prompt.text
        cut = last_cut(opening, tokenizer)
        joints.append(_Joint(lead, opening[:cut], opening[cut:], response.text))
    return joints


def last_cut(text: str, tokenizer: PromptTokenizer) -> int:
    """Where the last control token of `text` begins: what stands before is tokenized as if it ended there."""
    near, place = max(0, len(text) - _NEAR_CHARACTERS), 0
    for start in (near, 0):
        token = last_control_token(text[start:], tokenizer.cut_tokens)
        place = text.rfind(token) if token else 0
        if place >= start + tokenizer.most_cut_characters:  # none that begins before `start` can end behind it
            break
    return place


def _join_all(joints: Sequence[_Joint], tokenizer: PromptTokenizer) -> list[JoinedIds]:
    start = _common_start([joint.head for joint in joints if not joint.lead], tokenizer)
    heads = [joint.head[len(start) :] if not joint.lead else joint.head for joint in joints]
    wholes = [joint.tail + joint.response for joint in joints]
    texts = dict.fromkeys([start, *heads, *(joint.tail for joint in joints), *wholes])
    ids_of = dict(zip(texts, tokenizer.encode(list(texts)), strict=True))
    found: list[JoinedIds] = []
    for joint, head, text in zip(joints, heads, wholes, strict=True):
        tail, whole = ids_of[joint.tail], ids_of[text]
        is_prefix = whole[: len(tail)] == tail
        response = whole[len(tail) :] if is_prefix else _anchored(joint, tail, whole, tokenizer)
        prompt = ids_of[head] + tail
        found.append((prompt[1:] if joint.lead else ids_of[start] + prompt, response))
    return found


def _common_start(heads: Sequence[str], tokenizer: PromptTokenizer) -> str:
    """What all `heads` begin with, up to a control token that is in all of them."""
    common = os.path.commonprefix([min(heads), max(heads)]) if len(heads) > 1 else ""
    return common[: last_cut(common, tokenizer)]


def _anchored(joint: _Joint, tail: TokenIds, whole: TokenIds, tokenizer: PromptTokenizer) -> TokenIds | None:
    text = tokenizer.decode([whole])[0]
    for anchor in (joint.tail[-1:], "\n", "]", ""):
        behind, both = tokenizer.encode([anchor, anchor + joint.response])
        response = both[len(behind) :]
        if both[: len(behind)] == behind and tokenizer.decode([tail + response])[0] == text:
            return response
    return None
