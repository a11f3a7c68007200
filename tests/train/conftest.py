"""A tiny model folder with a byte-level tokenizer: everything real, nothing pretrained."""

import json
import multiprocessing.forkserver
from collections.abc import Callable, Iterator
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import children
import huggingface_hub
import pytest
import torch
from matplotlib.figure import Figure
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture(autouse=True)
def _reference_cache_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test leaves files in the user's cache folder, nor finds any there."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HOME", str(tmp_path / "hf_home"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf_home"))


PNG = bytes.fromhex(  # one white pixel
    "89504e470d0a1a0a0000000d49484452000000010000000108000000003a7e9b550000000a49444154789c63f80f00010101"
    "00b138f6140000000049454e44ae426082"
)
SVG = b'<svg xmlns="http://www.w3.org/2000/svg" width="1" height="1"/>'


@pytest.fixture(scope="session", autouse=True)
def _rendering() -> Iterator[list[str]]:
    """Every run draws a dozen figures. They are made, and saved as an empty image: rendering takes longer than the run."""
    asked_for: list[str] = []
    save = Figure.savefig

    def save_empty(self: Figure, file: Any, **options: Any) -> None:
        if asked_for:
            save(self, file, **options)
        elif hasattr(file, "write"):
            file.write(SVG if options["format"] == "svg" else PNG)
        else:
            assert Path(file).suffix == ".png"
            Path(file).write_bytes(PNG)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", save_empty)
        yield asked_for


@pytest.fixture
def rendered(_rendering: list[str], request: pytest.FixtureRequest) -> Iterator[None]:
    """For a test of what is to be seen."""
    _rendering.append(request.node.nodeid)
    yield
    _rendering.clear()


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte; pad and end-of-turn are one token, as in many real models."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|im_end|>", additional_special_tokens=["<|im_start|>"]
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


@pytest.fixture
def model_folder(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> Path:
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=256,
            initializer_range=0.3,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    folder = tmp_path / "tiny"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def write_rows(tmp_path: Path) -> Callable[..., Path]:
    def write(rows: list[dict[str, Any]], name: str = "rows.jsonl") -> Path:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        return path

    return write


@pytest.fixture(scope="session")
def forks() -> ForkServerContext:
    """Processes forked from one that has imported everything, by `preloaded.py`: an import takes longer than a run."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["preloaded"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", children.PYTHONPATH)  # where it finds `preloaded`; it would go on without
        multiprocessing.forkserver.ensure_running()
    return context
