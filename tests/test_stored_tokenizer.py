"""A tokenizer that was built once comes back from the cache: the same ids and facts, without transformers."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import TOKENIZERS, byte_level_tokenizer
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers
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


def kept_and_built(tokenizer: Tokenizer, folder: Path) -> tuple[Tokenizer, Tokenizer]:
    """What is read again, and a copy that our code never touches."""
    tokenizer.enable_truncation(2)
    whole = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    write_stored(folder / "kept", whole)
    stored = read_stored(folder / "kept", "a model")
    whole.backend_tokenizer.no_truncation()
    assert stored is not None and stored.text == whole.backend_tokenizer.to_str()
    return stored.backend_tokenizer, Tokenizer.from_str(stored.text)


def ids(tokenizer: Tokenizer, *texts: str) -> list[list[int]]:
    return [one.ids for one in tokenizer.encode_batch(texts, add_special_tokens=False)]


def test_words_are_looked_up_where_merging_ends_there_too(tmp_path: Path) -> None:
    kept, built = kept_and_built(byte_level_tokenizer().backend_tokenizer, tmp_path)
    assert kept.model.ignore_merges and not built.model.ignore_merges
    words = [text for text, _ in sorted(built.get_vocab().items())]
    assert ids(kept, *TEXTS, *words) == ids(built, *TEXTS, *words)
    renamed = PromptTokenizer(PreTrainedTokenizerFast(tokenizer_object=kept))
    as_text = [renamed.keep_as_text(text) for text in ("</s>", "a<s> </s>4</s>")]
    right = PromptTokenizer(PreTrainedTokenizerFast(tokenizer_object=built))
    assert renamed.encode(as_text) == right.encode(as_text)


def with_words(words: dict[str, int], merges: list[tuple[str, str]]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(vocab=words, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer


WORDS = {"a": 0, "b": 1, "c": 2, "ab": 3, "bc": 4, "abc": 5, "<": 6, "s": 7, ">": 8, "<s>": 9}


def test_words_that_merging_does_not_reach_are_merged_as_before(tmp_path: Path) -> None:
    # `abc` becomes `ab`, `c`: there is no merge of these two.
    kept, built = kept_and_built(with_words(WORDS, [("a", "b"), ("b", "c"), ("a", "bc")]), tmp_path)
    assert ids(kept, "abc", "ab bc") == ids(built, "abc", "ab bc") == [[3, 2], [3, 4]]


def test_control_token_that_another_text_becomes_is_no_word(tmp_path: Path) -> None:
    tokenizer = with_words({name: n for name, n in WORDS.items() if name != "abc"}, [("a", "b"), ("b", "c")])
    kept, _ = kept_and_built(tokenizer, tmp_path)
    assert not kept.model.ignore_merges, "`<s>` is a word like others"
    tokenizer.add_special_tokens([AddedToken("<s>", normalized=False)])
    kept, built = kept_and_built(tokenizer, tmp_path)
    assert kept.model.ignore_merges and ids(kept, "<s> ab") == ids(built, "<s> ab") == [[9, 3]]
    tokenizer.normalizer = normalizers.Lowercase()
    kept, built = kept_and_built(tokenizer, tmp_path)
    assert ids(kept, "<S> ab") == ids(built, "<S> ab") == [[6, 7, 8, 3]]
    tokenizer.normalizer = normalizers.Sequence([])
    facts = json.loads(tokenizer.to_str())
    facts["added_tokens"][0]["single_word"], facts["normalizer"] = True, None
    tokenizer = Tokenizer.from_str(json.dumps(facts))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("a", "removed")
    kept, built = kept_and_built(tokenizer, tmp_path)
    assert ids(kept, "a<s>a") == ids(built, "a<s>a") == [[6, 7, 8]]


def test_control_token_that_a_space_is_written_as_is_no_word(tmp_path: Path) -> None:
    tokenizer = with_words({"Ġ": 0, "a": 1, "b": 2, "ab": 3, "Ġab": 4}, [("a", "b")])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens([AddedToken("Ġab", normalized=False)])
    kept, built = kept_and_built(tokenizer, tmp_path)
    assert ids(kept, " ab") == ids(built, " ab") == [[0, 3]]


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
