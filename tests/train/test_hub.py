"""A hub that does not answer: found out once, nothing of the process changed, caches used, and no waiting."""

import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest

from bnf_train import hub
from bnf_train.errors import UsageError
from bnf_train.model.load import context_length, load_model, load_tokenizer


@pytest.fixture(autouse=True)
def _nobody_listens(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    hub.reachable.cache_clear()
    yield
    hub.reachable.cache_clear()


def test_asking_changes_nothing() -> None:
    before = dict(os.environ)
    assert not hub.reachable()
    assert dict(os.environ) == before
    assert huggingface_hub.constants.HF_HUB_OFFLINE is False


def test_a_cached_model_is_loaded(model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commit, cache = "0" * 40, tmp_path / "hub"
    (cache / "models--some--model" / "refs").mkdir(parents=True)
    (cache / "models--some--model" / "refs" / "main").write_text(commit)
    shutil.copytree(model_folder, cache / "models--some--model" / "snapshots" / commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    started = time.perf_counter()
    assert load_tokenizer("some/model").eos_token == "<|im_end|>"
    assert context_length("some/model") == 256
    assert load_model("some/model").config.hidden_size == 16
    assert time.perf_counter() - started < 20  # one request that is tried again takes 23 seconds


def test_what_is_not_cached_is_one_sentence_at_once(tmp_path: Path) -> None:
    started = time.perf_counter()
    with pytest.raises(UsageError, match="the hub cannot be reached and nothing is cached"):
        load_model("some/model")
    with pytest.raises(UsageError, match="the hub cannot be reached and nothing is cached"):
        hub.load_hub_dataset("some/rows")
    assert time.perf_counter() - started < 20
