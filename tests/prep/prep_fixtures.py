"""Fixtures of the tests of this folder; a file that needs them says `pytest_plugins = ("prep_fixtures",)`."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import byte_level_tokenizer
from prep_helpers import s3_server, some_rows, write_jsonl


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Nothing is read from or left in the user's cache of data sets, and nothing is looked up on the hub."""
    cache = str(tmp_path_factory.mktemp("datasets_cache"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", cache)
        patch.setenv("HF_DATASETS_CACHE", cache)
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a byte-level tokenizer, as `base_model`."""
    folder = tmp_path_factory.mktemp("model")
    byte_level_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A file of `some_rows()`."""
    return write_jsonl(tmp_path / "rows.jsonl", some_rows())


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """See `s3_server`."""
    with s3_server() as address:
        yield address
