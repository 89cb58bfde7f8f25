"""A tokenizer as `AutoTokenizer` built it, kept: the next start takes 0.1 s, without transformers or torch.

`AutoTokenizer` does not just read tokenizer.json: by model, class and version it rebuilds parts of it. So what it built
is kept, under a hash of everything that it was built from, and with it whether its words can be looked up.
"""

import hashlib
import importlib.metadata
import json
import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import AddedToken, Tokenizer, models

from llm.cache import cache_folder, write_whole

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)
_FORMAT = 2
_ONLY_ITSELF = re.compile("[!-~]+")  # neither bytes nor spaces are written as these characters
_SUFFIXES = (".json", ".jinja", ".model", ".tiktoken", ".txt", ".py")
# Which of these is installed decides how a tokenizer is built, and by which class.
_BUILDERS = ("transformers", "tokenizers", "sentencepiece", "tiktoken", "mistral-common", "protobuf")


@dataclass(frozen=True, kw_only=True)
class _Facts:
    """What stands before the tokenizer in its file; `digest` is that of the tokenizer's text."""

    digest: str
    has_words_as_tokens: bool
    eos_token: str | None
    pad_token_id: int | None
    chat_template: str | None


class StoredTokenizer:
    """Stands in for the tokenizer of transformers that it was kept from; only a chat needs that one itself."""

    def __init__(self, base_model: str, text: str, facts: _Facts) -> None:
        """The tokenizer of `base_model`, built before; `text` is its JSON."""
        self.backend_tokenizer = Tokenizer.from_str(text)
        if facts.has_words_as_tokens:
            self.backend_tokenizer.model.ignore_merges = True  # takes an eighth less time
        self.text = text
        self.eos_token, self.pad_token_id = facts.eos_token, facts.pad_token_id
        self._base_model, self._chat_template = base_model, facts.chat_template

    @property
    def added_tokens_decoder(self) -> dict[int, AddedToken]:
        """The added tokens by id."""
        return dict(self.backend_tokenizer.get_added_tokens_decoder())

    def get_chat_template(self) -> str:
        """The chat template; ValueError when there is none, as transformers has it."""
        if self._chat_template is None:
            raise ValueError("the tokenizer has no chat template")
        return self._chat_template

    def apply_chat_template(self, conversation: Any, **kwargs: Any) -> Any:
        """As transformers does it; loads it."""
        return self._original.apply_chat_template(conversation, **kwargs)

    @cached_property
    def _original(self) -> "PreTrainedTokenizerBase":
        from transformers import AutoTokenizer

        original: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(self._base_model, trust_remote_code=False)
        return original


def stored_path(base_model: str) -> Path | None:
    """Where the tokenizer of `base_model` (a folder, or a hub id) is kept, built or not; None when it has no files."""
    folder = Path(base_model) if Path(base_model).is_dir() else _downloaded(base_model)
    if folder is None:
        return None
    key = hashlib.sha256(json.dumps([_FORMAT, [installed_version(name) for name in _BUILDERS]]).encode())
    for path in _tokenizer_files(folder):
        key.update(f"\0{path.relative_to(folder)}\0".encode())
        key.update(hashlib.sha256(path.read_bytes()).digest())
    return cache_folder("tokenizers") / f"{key.hexdigest()[:32]}.tokenizer"


def read_stored(path: Path, base_model: str) -> StoredTokenizer | None:
    """What `write_stored` wrote to `path`; None when it is not there, or damaged."""
    try:
        first, _, text = path.read_text(encoding="utf-8").partition("\n")
        facts = _Facts(**json.loads(first))
    except (OSError, ValueError, TypeError):
        return None
    if hashlib.sha256(text.encode()).hexdigest() != facts.digest:
        return None
    return StoredTokenizer(base_model, text, facts)


def write_stored(path: Path, tokenizer: "PreTrainedTokenizerBase") -> None:
    """Keeps `tokenizer` at `path`, if its text says all of it; a disk that cannot be written to is no error.

    Without its truncation and padding, which preparation does not use.
    """
    backend: Tokenizer | None = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or backend.encode_special_tokens:  # that setting is not part of the text
        return
    text = backend.to_str()
    copy = Tokenizer.from_str(text)
    if copy.to_str() != text:
        return
    copy.no_truncation()
    copy.no_padding()
    text = copy.to_str()
    try:
        template = tokenizer.get_chat_template()
    except ValueError:
        template = None
    facts = _Facts(
        digest=hashlib.sha256(text.encode()).hexdigest(),
        has_words_as_tokens=_has_words_as_tokens(copy),
        eos_token=tokenizer.eos_token,
        pad_token_id=tokenizer.pad_token_id,
        chat_template=template,
    )
    whole = f"{json.dumps(vars(facts))}\n{text}"
    try:
        write_whole(path, lambda staged: staged.write_text(whole, encoding="utf-8"))
    except OSError as error:
        logger.debug("The tokenizer is not kept for the next start: %s", error)


def _has_words_as_tokens(tokenizer: Tokenizer) -> bool:
    """Whether a word that stands in the vocabulary of a BPE model is that token: whether merging, too, ends there.

    Tried with every token. But for added ones that no other text is written as: they are found before there are words.
    """
    model = tokenizer.model
    if not isinstance(model, models.BPE):
        return False
    added = [] if tokenizer.normalizer else tokenizer.get_added_tokens_decoder().values()
    found_before = {token.content for token in added if not token.single_word and _ONLY_ITSELF.fullmatch(token.content)}
    tokens = tokenizer.get_vocab(with_added_tokens=False)
    tried = [token for token in tokens if token not in found_before]
    encoded = Tokenizer(model).encode_batch_fast(tried, add_special_tokens=False)
    return all(one.ids == [tokens[token]] for token, one in zip(tried, encoded, strict=True))


def _downloaded(base_model: str) -> Path | None:
    """The folder of a hub id's tokenizer files; None when the hub does not give them: transformers says why."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(base_model, allow_patterns=[f"*{suffix}" for suffix in _SUFFIXES]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError):
        return None


def _tokenizer_files(folder: Path) -> Iterator[Path]:
    """Those that a tokenizer may be built from, in a fixed order."""
    for path in sorted([*folder.iterdir(), *folder.glob("additional_chat_templates/*")]):
        if path.suffix in _SUFFIXES and path.is_file():
            yield path


def installed_version(name: str) -> str | None:
    """The version of a distribution; None when it is not installed, as ours where a clone is run."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
