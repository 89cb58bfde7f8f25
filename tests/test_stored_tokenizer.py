"""A tokenizer that was built once comes back from the cache: the same ids and facts, without transformers."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import TOKENIZERS
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from llm.stored_tokenizer import StoredTokenizer, read_stored, stored_path, write_stored
from llm.tokenizer import PromptTokenizer, load_prompt_tokenizer

TEXTS = ["What is 2+2?", "<s>[INST] Wie geht's? [/INST]</s>", "  tabs\t\n\n<|im_end|>", "日本 é \U0001f600"]
TEMPLATE = "{% for message in messages %}<s>{{ message.content }}{% endfor %}"
FACTS = ("control_tokens", "cut_tokens", "eos_token", "pad_token_id", "added_bos", "chat_template", "fingerprint")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LLM_TRAIN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "tokenizers"


def saved(make: Callable[[], PreTrainedTokenizerFast], folder: Path, template: str | None = TEMPLATE) -> str:
    tokenizer = make()
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("template", [None, TEMPLATE])
def test_kept_tokenizer_is_the_one_that_was_built(name: str, template: str | None, tmp_path: Path, cache: Path) -> None:
    model = saved(TOKENIZERS[name], tmp_path / "model", template)
    built = PromptTokenizer(AutoTokenizer.from_pretrained(model))
    load_prompt_tokenizer(model)
    path = stored_path(model)
    assert path is not None and list(cache.iterdir()) == [path]
    kept = load_prompt_tokenizer(model)
    assert isinstance(read_stored(path, model), StoredTokenizer)
    assert [getattr(kept, fact) for fact in FACTS] == [getattr(built, fact) for fact in FACTS]
    assert kept.encode(TEXTS) == built.encode(TEXTS)
    assert kept.decode(kept.encode(TEXTS)) == built.decode(built.encode(TEXTS))
    if template:
        messages = [{"role": "user", "content": "Hi"}]
        assert kept.render_chat(messages, is_open=False) == built.render_chat(messages, is_open=False) == "<s>Hi"


def test_kept_tokenizer_needs_no_transformers(tmp_path: Path, cache: Path) -> None:
    model = saved(TOKENIZERS["byte_level"], tmp_path / "model")
    load_prompt_tokenizer(model)
    code = (
        "import sys\nfrom llm.tokenizer import load_prompt_tokenizer\n"
        "print(load_prompt_tokenizer(sys.argv[1]).encode(['What?']))\n"
        "print([name for name in ('torch', 'transformers') if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code, model], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [str(load_prompt_tokenizer(model).encode(["What?"])), "[]"]


def test_tokenizer_whose_files_changed_is_built_anew(tmp_path: Path, cache: Path) -> None:
    model = saved(TOKENIZERS["byte_level"], tmp_path / "model")
    load_prompt_tokenizer(model)
    path = tmp_path / "model" / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token": "<|im_end|>"}))
    assert load_prompt_tokenizer(model).eos_token == "<|im_end|>"
    assert len(list(cache.iterdir())) == 2


@pytest.mark.parametrize("damage", ["", "{}\n", "cut", "changed"])
def test_damaged_file_is_built_anew_and_put_right(damage: str, tmp_path: Path, cache: Path) -> None:
    model = saved(TOKENIZERS["sentencepiece"], tmp_path / "model")
    right = load_prompt_tokenizer(model).fingerprint
    (path,) = cache.iterdir()
    text = path.read_text()
    path.write_text({"cut": text[:-10], "changed": text.replace("<s>", "<q>")}.get(damage, damage))
    assert read_stored(path, model) is None
    assert load_prompt_tokenizer(model).fingerprint == right
    assert path.read_text() == text


def test_cache_that_cannot_be_written_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("LLM_TRAIN_CACHE", str(tmp_path / "file"))
    model = saved(TOKENIZERS["byte_level"], tmp_path / "model")
    assert load_prompt_tokenizer(model).encode(["What?"])


def test_tokenizer_whose_text_does_not_say_all_is_not_kept(tmp_path: Path) -> None:
    tokenizer = TOKENIZERS["byte_level"]()
    tokenizer.backend_tokenizer.encode_special_tokens = True
    write_stored(tmp_path / "kept", tokenizer)
    assert not (tmp_path / "kept").exists()


def test_hub_id_that_cannot_be_reached_has_no_place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert stored_path("nobody/no-such-model-8d7f") is None
