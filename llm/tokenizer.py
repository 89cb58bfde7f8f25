"""`PromptTokenizer`: a model's tokenizer as preparation needs it, text <-> ids and nothing hidden.

No BOS or EOS is ever added behind our back: what the tokenizer would add is told as `added_bos`, and the prompt
format puts it into the text. Control tokens that stand in user data can be kept as text (`keep_as_text`).
"""

import hashlib
import json
import os
import re
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import cached_property
from itertools import chain, groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from tokenizers import Tokenizer, decoders, models, normalizers

from llm.ascii_tokenizer import AsciiTokenizer, byte_characters, open_ascii
from llm.errors import ConfigError, loading_reason
from llm.events import libraries_told_here
from llm.fast_tokenizer import FastEncoder, TokenIds, library_ids, open_fast
from llm.model_files import damaged_file
from llm.model_registry import check_hub_answers, check_is_reachable
from llm.stored_tokenizer import StoredTokenizer, read_stored, stored_path, write_stored

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Two private-use characters: around the number of a control token that is text, and of one that is a mark.
_AS_TEXT, _AS_MARK = "\uf8fd", "\uf8fe"
_KEPT = re.compile(f"{_AS_TEXT}([0-9]+){_AS_TEXT}")
_LIKE_OURS = re.compile(f"{_AS_TEXT}[0-9]+{_AS_TEXT}|{_AS_MARK}[0-9]+{_AS_MARK}")
_TEXTS_AT_ONCE = 100
_LIBRARY_THREADS = "TOKENIZERS_PARALLELISM"  # which the library looks at whenever it encodes

Encode = Callable[[Sequence[str]], list[TokenIds]]
Share = Callable[[Encode, Sequence[Sequence[str]]], Sequence[list[TokenIds]]]
"""Calls a function for each of some pieces, in any threads, and gives what it gave, in order."""


class PromptTokenizer:
    """Ids of texts exactly as inference makes them; see the module docstring."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase | StoredTokenizer") -> None:
        """Wraps `tokenizer`; ConfigError when it is not backed by the tokenizers library."""
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise ConfigError(
                f"base_model: the tokenizer {type(tokenizer).__name__} has no fast version (tokenizer.json), "
                "which preparation needs."
            )
        backend.no_truncation()
        backend.no_padding()
        self._tokenizer, self._backend = tokenizer, backend
        self._fast: FastEncoder | None = None
        self._opening: Future[FastEncoder | None] | None = None
        self._share: Share | None = None
        added = tokenizer.added_tokens_decoder
        self.control_tokens: dict[str, int] = {str(t): i for i, t in added.items() if t.special}
        self.cut_tokens = [str(t) for t in added.values() if t.special and not t.lstrip]
        """Control tokens whose left side is tokenized as if the text ended there."""
        self.most_cut_characters = max(map(len, self.cut_tokens), default=0)
        self.eos_token: str | None = tokenizer.eos_token
        self.pad_token_id: int = 0 if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        plain, whole = backend.encode("a", add_special_tokens=False), backend.encode("a")
        starts = range(len(whole.ids) - len(plain.ids) + 1)  # some add an EOS, too
        start = next((n for n in starts if whole.ids[n : n + len(plain.ids)] == plain.ids), 0)
        self.added_bos: str = self.decode([whole.ids[:start]])[0] if start else ""

    def encode(self, texts: Sequence[str]) -> list[TokenIds]:
        """The ids of each text, control tokens recognised, nothing added; uses all cores."""
        plain = [text for text in texts if _AS_TEXT not in text]
        if self._fast:
            encoded = iter(self._fast.encode(plain))
        elif self._share:
            pieces = [plain[start : start + _TEXTS_AT_ONCE] for start in range(0, len(plain), _TEXTS_AT_ONCE)]
            encoded = chain.from_iterable(self._share(self._encode_plain, pieces))
        else:
            encoded = iter(self._encode_plain(plain))
        return [self._encode_kept(text) if _AS_TEXT in text else next(encoded) for text in texts]

    @contextmanager
    def shared(self, share: Share) -> Iterator[None]:
        """Within, `encode` hands its texts to `share` in pieces, and the library starts no threads of its own.

        Where threads call `encode` anyway, the library's beside them take turns with these, and what one of them has
        allocated another one frees: 4 to 10 % more time on two cores.
        """
        before = os.environ.get(_LIBRARY_THREADS)
        os.environ[_LIBRARY_THREADS], self._share = "false", share
        try:
            yield
        finally:
            self._share = None
            del os.environ[_LIBRARY_THREADS]
            os.environ.update({} if before is None else {_LIBRARY_THREADS: before})

    def begin_fast(self) -> "Future[FastEncoder | None]":
        """What `use_fast` waits for: `fastokens` is opened beside what else is to be done, 0.25 s to 2 s."""
        if self._opening is None:
            pool = ThreadPoolExecutor(max_workers=1)
            # Of the text as it was kept: to look words up takes fastokens longer.
            self._opening = pool.submit(open_fast, _text_of(self._tokenizer), self._backend, self.control_tokens)
            pool.shutdown(wait=False)
        return self._opening

    @property
    def is_fast(self) -> bool:
        """Whether `fastokens` encodes, which has its own threads."""
        return self._fast is not None

    def use_fast(self) -> bool:
        """Encodes with `fastokens` from now on, if it is there and gives the same ids; whether it does."""
        self._fast = self.begin_fast().result()
        return self.is_fast

    def decode(self, batch: Sequence[Sequence[int]]) -> list[str]:
        """The text of each list of ids, control tokens included."""
        return list(self._backend.decode_batch([list(ids) for ids in batch], skip_special_tokens=False))

    def decode_bytes(self, batch: Sequence[TokenIds]) -> pa.LargeBinaryArray:
        """The UTF-8 of the text of each list of ids; faster than `decode` where tokens are bytes.

        There ids that end within a character give its first bytes, elsewhere U+FFFD.
        """
        if self._bytes is None:
            return pa.array(self.decode(batch), pa.large_string()).cast(pa.large_binary())
        pieces = self._bytes.take(pa.array(np.frombuffer(b"".join(batch), np.int32)))
        _, starts, joined = pieces.buffers()
        edges = np.frombuffer(starts, np.int64)[np.cumsum([0, *map(len, batch)])]
        return pa.Array.from_buffers(pa.large_binary(), len(batch), [None, pa.py_buffer(edges), joined])

    def gives_back(self, batch: Sequence[TokenIds], texts: Sequence[str]) -> list[bool]:
        """Whether each list of ids decodes to its text."""
        wanted = pa.array(texts, pa.large_string()).cast(pa.large_binary())
        found: list[bool] = pc.equal(self.decode_bytes(batch), wanted).to_pylist()
        return found

    def has_control_text(self, text: str) -> bool:
        """Whether `text`, or one of those that are joined in it, needs `keep_as_text`."""
        for first, (starts, tokens) in self._by_first.items():
            place = text.find(first)
            while place >= 0:
                if text.startswith(starts, place) and text.startswith(tokens, place):
                    return True
                place = text.find(first, place + 1)
        return False

    def keep_as_text(self, text: str) -> str:
        """`text` whose control tokens are marked to stay text; `encode` honours the marks, `unmark` lifts them.

        ValueError when `text` holds what could be taken for such a mark.
        """
        has_control_text = any(token in text for token in self.control_tokens)
        if _LIKE_OURS.search(text) or (has_control_text and (_AS_TEXT in text or _AS_MARK in text)):
            raise ValueError("the private characters U+F8FD, U+F8FE beside control tokens or numbers")
        if not has_control_text:
            return text
        for token, number in self._by_length:
            text = text.replace(token, f"{_AS_TEXT}{number}{_AS_TEXT}")
        return text

    def unmark(self, text: str) -> str:
        """The text as it was before `keep_as_text`."""
        # From left to right, not token by token: a digit may stand between two marks, as in `</s>4</s>`.
        return _KEPT.sub(lambda kept: self._names.get(int(kept[1]), kept[0]), text)

    def spelled(self, text: str) -> str:
        """`text` as this tokenizer spells it: with composed characters where it composes (NFC), as Qwen's does."""
        return self._composer.normalize_str(text) if self._composer else text

    def render_chat(self, messages: list[dict[str, Any]], *, is_open: bool, **kwargs: Any) -> str:
        """The tokenizer's chat template over `messages`; `is_open`: ends where the assistant is to answer."""
        text = self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=is_open, **kwargs)
        return str(text)

    @property
    def chat_template(self) -> str | None:
        """The tokenizer's own chat template; None when it has none."""
        try:
            return self._tokenizer.get_chat_template()
        except ValueError:
            return None

    @cached_property
    def fingerprint(self) -> str:
        """See `tokenizer_fingerprint`."""
        return tokenizer_fingerprint(self._tokenizer)

    @cached_property
    def is_lossless(self) -> bool:
        """Whether decoding gives back the text: false for tokenizers that lower-case or drop white space."""
        marks = self.control_tokens or [""]  # all: some take white space beside them away (Phi-3's)
        probe = "".join(f"{mark}Ab  c\n\n  {mark}\nd{mark}" for mark in marks)
        return self.decode(self.encode([probe])) == [probe]

    @cached_property
    def _ascii(self) -> AsciiTokenizer | None:
        return open_ascii(self._backend, self.control_tokens)

    @cached_property
    def _composer(self) -> normalizers.NFC | None:
        normalizer = self._backend.normalizer
        return normalizer if isinstance(normalizer, normalizers.NFC) else None

    @cached_property
    def _bytes(self) -> pa.LargeBinaryArray | None:
        """The bytes of each id, where a text is nothing but those of its tokens (byte-level BPE); else None."""
        if not isinstance(self._backend.decoder, decoders.ByteLevel):
            return None
        vocabulary = self._backend.get_vocab(with_added_tokens=True)
        found = [b""] * (max(vocabulary.values()) + 1)
        for token, number in vocabulary.items():
            found[number] = _token_bytes(token)
        return pa.array(found, pa.large_binary())

    @cached_property
    def _names(self) -> dict[int, str]:
        return {number: token for token, number in self.control_tokens.items()}

    @cached_property
    def _by_first(self) -> dict[str, tuple[tuple[str, ...], tuple[str, ...]]]:
        """What `has_control_text` looks for, the first two characters and the whole, by the first one, which is found
        fastest: Llama 3 has 256 control tokens."""
        texts = sorted([*self.control_tokens, _AS_TEXT, _AS_MARK])
        groups = {first: tuple(some) for first, some in groupby(texts, key=lambda text: text[:1])}
        return {first: (tuple({text[:2] for text in some}), some) for first, some in groups.items()}

    @cached_property
    def _by_length(self) -> list[tuple[str, int]]:
        return sorted(self.control_tokens.items(), key=lambda item: -len(item[0]))

    @cached_property
    def _renamed(self) -> tuple[Tokenizer, Mapping[int, int]]:
        """A tokenizer in which the control tokens bear private names, so that their usual names are plain text.

        And the numbers here of the added tokens that have others there: the model is shared, 0.2 s less than a copy.
        """
        model = self._backend.model
        if not isinstance(model, models.BPE):
            return self._renamed_copy, {}
        renamed = Tokenizer(model)
        renamed.normalizer, renamed.pre_tokenizer = self._backend.normalizer, self._backend.pre_tokenizer
        added = dict(sorted(self._backend.get_added_tokens_decoder().items()))
        for token in added.values():
            token.content = self._private_names.get(token.content, token.content)
        renamed.add_tokens([*added.values()])
        others = ((renamed.token_to_id(token.content), number) for number, token in added.items())
        numbers = {other: number for other, number in others if other is not None}
        is_other_word = any(model.id_to_token(other) for other, number in numbers.items() if other != number)
        return (self._renamed_copy, {}) if is_other_word else (renamed, numbers)

    @cached_property
    def _renamed_copy(self) -> Tokenizer:
        """The same where the usual name of a control token may be a word of the model: it is renamed there, too."""
        return Tokenizer.from_str(_with_names(self._backend.to_str(), self._private_names))

    @cached_property
    def _private_names(self) -> dict[str, str]:
        return {token: f"{_AS_MARK}{number}{_AS_MARK}" for token, number in self.control_tokens.items()}

    def _encode_plain(self, texts: Sequence[str]) -> list[TokenIds]:
        return self._ascii.encode(texts) if self._ascii else library_ids(self._backend, texts)

    def _encode_kept(self, text: str) -> TokenIds:
        for token, _ in self._by_length:
            text = text.replace(token, self._private_names[token])
        text = self.unmark(text)
        renamed, numbers = self._renamed
        ids = renamed.encode(text, add_special_tokens=False).ids
        if numbers and not (self._names.keys() - numbers.keys()).isdisjoint(ids):  # its name is a word of the model
            return array("I", self._renamed_copy.encode(text, add_special_tokens=False).ids)
        return array("I", [numbers.get(n, n) for n in ids])


def _with_names(tokenizer: str, names: Mapping[str, str]) -> str:
    """The JSON of a tokenizer whose tokens have other `names`."""
    facts = json.loads(tokenizer)
    for token in facts["added_tokens"]:
        token["content"] = names.get(token["content"], token["content"])
    facts["post_processor"] = None  # it may look for tokens by their usual names
    vocabulary = facts["model"]["vocab"]
    if isinstance(vocabulary, dict):
        facts["model"]["vocab"] = {names.get(piece, piece): number for piece, number in vocabulary.items()}
    else:
        facts["model"]["vocab"] = [[names.get(piece, piece), score] for piece, score in vocabulary]
    if facts["model"].get("unk_token") in names:
        facts["model"]["unk_token"] = names[facts["model"]["unk_token"]]
    return json.dumps(facts)


_BYTES = {character: byte for byte, character in enumerate(byte_characters())}


def _token_bytes(token: str) -> bytes:
    """As the ByteLevel decoder does it: a token with another character is text itself."""
    try:
        return bytes(map(_BYTES.__getitem__, token))
    except KeyError:
        return token.encode()


def load_prompt_tokenizer(base_model: str) -> PromptTokenizer:
    """The tokenizer of a hub id or folder, from the cache if it was built before; ConfigError when there is none."""
    check_is_reachable(base_model)
    check_hub_answers(base_model)
    kept = stored_path(base_model)
    if kept and (stored := read_stored(kept, base_model)):
        return PromptTokenizer(stored)

    # Here, not above: 4 s with torch, once the configuration is known to be right.
    from transformers import AutoTokenizer

    libraries_told_here()
    try:
        built = AutoTokenizer.from_pretrained(base_model, trust_remote_code=False)
        if kept:
            write_stored(kept, built)
        return PromptTokenizer(built)
    except (OSError, ValueError, KeyError) as error:
        if damage := damaged_file(base_model):
            raise ConfigError(f"base_model: {damage}") from error
        reason = loading_reason(error).splitlines()[0]
        if Path(base_model).is_dir() and "code" not in reason:
            names = sorted(path.name for path in Path(base_model).iterdir())
            reason = f"the folder holds {', '.join(names[:8]) or 'nothing'}{', ...' if len(names) > 8 else ''}."
        raise ConfigError(
            f"base_model: no tokenizer at `{base_model}`: {reason} "
            "Give a hub id, or a folder that holds tokenizer.json."
        ) from error


def tokenizer_fingerprint(tokenizer: "PreTrainedTokenizerBase | StoredTokenizer") -> str:
    """A hash of everything that makes ids of text: vocabulary, merges, added tokens, normalisation.

    The same for a hub copy and a saved folder; padding, truncation and the chat template do not count.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        assert not isinstance(tokenizer, StoredTokenizer), "only one with a backend is kept"
        facts = json.dumps(tokenizer.get_vocab(), sort_keys=True)
    else:  # its own JSON, whose order is fixed; padding and truncation stand before the added tokens
        facts = _text_of(tokenizer).partition('"added_tokens"')[2]
    return hashlib.sha256(facts.encode()).hexdigest()[:32]


def _text_of(tokenizer: "PreTrainedTokenizerBase | StoredTokenizer") -> str:
    text: str = tokenizer.text if isinstance(tokenizer, StoredTokenizer) else tokenizer.backend_tokenizer.to_str()
    return text
