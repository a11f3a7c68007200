"""Bad flags and damaged models, through main as a user meets them: one sentence, code 2, nothing written."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from preference_rows import PAIRS, SINGLES
from safetensors.torch import load_file, save_file

from bnf_train.__main__ import main
from bnf_train.errors import is_out_of_memory

Folder = Callable[[Path], None]


@pytest.fixture
def refused(
    model_folder: Path, write_rows: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """Runs main; what it must print is an error of one line, and it must leave the disk as it was."""

    def run(*flags: str, rows: list[dict[str, object]] = PAIRS) -> str:
        out = tmp_path / "out"
        paths = ["--model", str(model_folder), "--dataset", str(write_rows(rows)), "--output_dir", str(out)]
        before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
        capsys.readouterr()
        assert main([*paths, "--max_length", "100", *flags]) == 2
        lines = [line.split("\r")[-1] for line in capsys.readouterr().err.splitlines()]  # a bar is drawn over itself
        assert sum(bool(line.strip()) and not line.startswith("tokenising") for line in lines) == 1, lines
        assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
        assert lines[-1].strip().startswith("error: ")
        return lines[-1].strip()

    return run


# --- flags -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--objective", "dpi"], "--objective dpi: expected one of bdpo, bnf, "),
        (["--objective", "nowhere.py:loss"], "no such file nowhere.py"),
        (["--beta", "0.1"], "--beta: --objective bnf has no such hyper-parameter"),
        (["--no_such_flag"], "--no_such_flag: no such flag"),
        (["--config", "nowhere.yaml"], "--config nowhere.yaml: no such file"),
        (["--dtype", "bfloat16"], "--dtype bfloat16: with --optim adamw_torch_fused the weights would not move"),
    ],
)
def test_flags(flags: list[str], message: str, refused: Callable[..., str]) -> None:
    assert message in refused(*flags)


def test_pairwise_on_unpaired_is_refused_before_the_model_is_loaded(refused: Callable[..., str], model_folder: Path) -> None:
    (model_folder / "model.safetensors").write_bytes(b"would be refused too")
    message = refused("--objective", "dpo", rows=SINGLES)
    assert "--objective dpo compares the two sides of a pair" in message
    assert "rows.jsonl has single responses" in message


@pytest.mark.parametrize("what", ["folder", "file"])
def test_output_is_never_written_over(what: str, refused: Callable[..., str], tmp_path: Path) -> None:
    taken = tmp_path / "taken"
    if what == "folder":
        taken.mkdir()
        (taken / "thesis.txt").write_text("the only copy")
    else:
        taken.write_text("the only copy")
    assert "expected a new or empty folder" in refused("--output_dir", str(taken))


# --- models ----------------------------------------------------------------------------------------------------------


def pickled_only(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def change_weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Folder:
    def damage(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    return damage


def put(value: float) -> Folder:
    name = "model.layers.1.mlp.up_proj.weight"
    return change_weights(lambda tensors: tensors[name].view(-1)[7:8].fill_(value))


def change_config(**changes: object) -> Folder:
    def damage(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return damage


def overwrite(name: str, content: bytes | None, length: int | None = None) -> Folder:
    """The file with other content, or with its own up to a length."""

    def damage(folder: Path) -> None:
        path = folder / name
        path.write_bytes(path.read_bytes()[:length] if content is None else content)

    return damage


def no_template(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()


def own_code(folder: Path) -> None:
    change_config(model_type="sneaky", auto_map={"AutoConfig": "sneaky.C", "AutoModelForCausalLM": "sneaky.M"})(folder)
    (folder / "sneaky.py").write_text(f"open({str(folder / 'was-here')!r}, 'w')\n")


BROKEN = r"model\.safetensors is damaged or incomplete .*; copy or download it again"
DAMAGED: dict[str, tuple[Folder, str]] = {
    "no-config": (lambda folder: (folder / "config.json").unlink(), "expected a model folder with a config.json, found none"),
    "config-not-json": (overwrite("config.json", b"{"), "could not be loaded .*not a valid JSON"),
    "config-empty": (overwrite("config.json", b""), "could not be loaded .*not a valid JSON"),
    "config-binary": (overwrite("config.json", b"\xff\xfe\x00"), "could not be loaded"),
    "config-a-list": (overwrite("config.json", b"[]"), "could not be loaded"),
    "config-no-type": (overwrite("config.json", b"{}"), "could not be loaded"),
    "config-other-type": (change_config(model_type="no-such-model"), "could not be loaded .*no-such-model"),
    "config-not-causal": (change_config(model_type="t5"), "could not be loaded"),
    "config-wrong-value": (change_config(hidden_size="big"), "could not be loaded"),
    "config-other-size": (
        change_config(hidden_size=24),
        r"belong together: lm_head\.weight has the shape \(\d+, 16\) in the weights and \(\d+, 24\) by config",
    ),
    "pickled-only": (pickled_only, r"expected weights in \.safetensors files, found pickled ones only"),
    "no-weights": (no_weights, "could not be loaded .*model.safetensors"),
    "weights-empty": (overwrite("model.safetensors", b""), BROKEN),
    "weights-not-safetensors": (overwrite("model.safetensors", b"PK" * 500), BROKEN),
    "weights-truncated": (overwrite("model.safetensors", None, -100), BROKEN),
    "weights-truncated-header": (overwrite("model.safetensors", None, 30), BROKEN),
    "nan": (put(float("nan")), r"the tensor model\.layers\.1\.mlp\.up_proj\.weight holds NaN or infinity"),
    "infinity": (put(float("-inf")), r"the tensor model\.layers\.1\.mlp\.up_proj\.weight holds NaN or infinity"),
    "tensor-missing": (
        change_weights(lambda tensors: tensors.pop("model.norm.weight")),
        r"its weights lack 1 of the tensors of LlamaForCausalLM, model\.norm\.weight among them",
    ),
    "no-chat-template": (no_template, "the tokenizer has no chat template"),
    "tokenizer-damaged": (overwrite("tokenizer.json", b'{"model": '), "its tokenizer could not be loaded"),
    "own-code": (own_code, "comes with Python code of its own; read it, and pass --trust_remote_code to run it"),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGED.values(), ids=DAMAGED)
def test_models(damage: Folder, message: str, refused: Callable[..., str], model_folder: Path) -> None:
    damage(model_folder)
    error = refused()
    assert re.search(message, error), error
    assert str(model_folder) in error
    assert "hub" not in error  # nothing of it was to be fetched
    assert not (model_folder / "was-here").exists()


# --- memory ----------------------------------------------------------------------------------------------------------

GREEDY = """
import torch

def loss(log_odds, batch, *, size=1e16):
    losses = batch.mean(log_odds)
    return losses if len(log_odds) < 6 else losses + torch.empty(int(size)).sum()
"""


def test_out_of_memory_says_what_to_lower(
    model_folder: Path, write_rows: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An objective that asks for 40 petabytes: what torch's allocator then raises is real."""
    (tmp_path / "greedy.py").write_text(GREEDY)
    flags = ["--objective", f"{tmp_path}/greedy.py:loss", "--max_length", "100", "--output_dir", str(tmp_path / "out")]
    assert main(["--model", str(model_folder), "--dataset", str(write_rows(PAIRS)), "--disable_tqdm", "true", *flags]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.split("\r")[-1].startswith("error: out of memory (")
    assert "can't allocate memory" in error
    assert "lower --per_device_train_batch_size (now 1) or --max_length (now 100), or add --gradient_checkpointing" in error
    assert not list((tmp_path / "out").glob("*.safetensors"))


def test_what_counts_as_out_of_memory() -> None:
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."))
    assert is_out_of_memory(RuntimeError("MPS backend out of memory (MPS allocated: 1 GB)"))
    assert is_out_of_memory(MemoryError())
    assert not is_out_of_memory(RuntimeError("shapes do not fit"))
    assert not is_out_of_memory(ValueError("out of memory"))


# --- --debug ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["flags", "run", "file"])
def test_debug_shows_the_traceback(
    where: str, model_folder: Path, write_rows: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (model_folder / "config.json").write_text("{")
    flags = ["--model", str(model_folder), "--dataset", str(write_rows(PAIRS)), "--output_dir", str(tmp_path / "out")]
    if where == "file":
        (tmp_path / "run.yaml").write_text("debug: true\n")
        flags += ["--config", str(tmp_path / "run.yaml")]
    else:
        flags += ["--debug", *(["--objective", "dpi"] if where == "flags" else [])]
    assert main(flags) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith("error: --objective dpi" if where == "flags" else "error: --model")
    assert "Traceback (most recent call last):" in lines
    assert any("JSONDecodeError" in line for line in lines) == (where != "flags")  # the cause is there too
