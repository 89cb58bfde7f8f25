"""Tiny real tokenizers, made on the spot: byte-level BPE, SentencePiece-style with a dummy prefix, WordPiece-like."""

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from llm.tokenizer import PromptTokenizer

CACHE = tempfile.TemporaryDirectory(prefix="llm-train-cache-")
os.environ["LLM_TRAIN_CACHE"] = CACHE.name  # also for the processes that tests start

CORPUS = [
    "The quick brown fox jumps over the lazy dog. 0123456789",
    "user: What is 2+2?\nassistant: 4\n\n### Response:\nContext: Input: Question: Answer:",
    '{"country": "Peru", "date": "2026-06-04"}  def f(x):\n    return x',
    "[INST] <<SYS>> Wie geht es dir? <</SYS>> [/INST] Ganz gut, danke.",
] * 20
CONTROL_TOKENS = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<pad>"]


def byte_level_tokenizer() -> PreTrainedTokenizerFast:
    """Like GPT-2, Llama 3, Qwen, SmolLM2: bytes, a regular expression that splits words, BPE; adds no BOS."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        show_progress=False,
        special_tokens=CONTROL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return _wrapped(tokenizer)


def sentencepiece_tokenizer() -> PreTrainedTokenizerFast:
    """Like Llama 2 and Mistral: a dummy space before the text, bytes as a fallback; adds BOS by itself."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1, right=0),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=400, show_progress=False, special_tokens=CONTROL_TOKENS, max_token_length=8
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    facts = json.loads(tokenizer.to_str())
    vocabulary = facts["model"]["vocab"]
    vocabulary |= {f"<0x{byte:02X}>": len(vocabulary) + byte for byte in range(256)}
    tokenizer = Tokenizer.from_str(json.dumps(facts))
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return _wrapped(tokenizer)


def wordpiece_tokenizer() -> PreTrainedTokenizerFast:
    """Like BERT: lower case, words and punctuation apart, so decoding does not give back the text."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.train_from_iterator(
        CORPUS, trainers.WordPieceTrainer(vocab_size=400, show_progress=False, special_tokens=CONTROL_TOKENS)
    )
    return _wrapped(tokenizer)


TOKENIZERS: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "byte_level": byte_level_tokenizer,
    "sentencepiece": sentencepiece_tokenizer,
    "wordpiece": wordpiece_tokenizer,
}


def _wrapped(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"], clean_up_tokenization_spaces=False,
    )  # fmt: skip


@pytest.fixture(autouse=True)
def own_rows(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokenized rows are of one test only; built tokenizers serve all."""
    folder, shared = tmp_path_factory.mktemp("cache"), Path(CACHE.name) / "tokenizers"
    shared.mkdir(exist_ok=True)
    (folder / "tokenizers").symlink_to(shared)
    monkeypatch.setenv("LLM_TRAIN_CACHE", str(folder))


@pytest.fixture(scope="session")
def tokenizers() -> dict[str, PromptTokenizer]:
    """One wrapped tokenizer of each kind, by name."""
    return {name: PromptTokenizer(make()) for name, make in TOKENIZERS.items()}
