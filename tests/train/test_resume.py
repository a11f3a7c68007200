"""Killed at any moment and resumed, a run ends with the weights of an undisturbed one; signals, full disks, NaN.

Runs are processes of their own, forked from one that has imported everything: an import takes longer than a run.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from launched import HANGS, Launcher, Run
from preference_rows import PAIRS
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerFast

from bnf_train.errors import UsageError
from bnf_train.training import checkpoint

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked")

# 6 rows by 2 in steps of 2 x 1 are 9 steps in 3 epochs; random numbers are drawn (dropout), evaluation comes between
FLAGS = {
    "--bf16": "false",
    "--max_length": "100",
    "--eval_size": "2",
    "--eval_strategy": "steps",
    "--eval_steps": "3",
    "--batch_size": "2",
    "--per_device_train_batch_size": "1",
    "--num_train_epochs": "3",
    "--learning_rate": "0.01",
    "--save_strategy": "steps",
    "--save_steps": "2",
    "--save_total_limit": "2",
    "--disable_tqdm": "true",
}
STEPS = 9


@pytest.fixture
def train(forks: ForkServerContext, model_folder: Path, write_rows: Callable[..., Path], tmp_path: Path) -> Run:
    """Train into a folder: train(output, what, at, number, **other flags); `seconds` kills after that time."""
    config = json.loads((model_folder / "config.json").read_text())
    (model_folder / "config.json").write_text(json.dumps(config | {"attention_dropout": 0.001}))
    return Launcher(forks, FLAGS | {"--model": str(model_folder), "--dataset": str(write_rows(PAIRS))}, tmp_path)


Undisturbed = tuple[dict[str, torch.Tensor], int, float]


@pytest.fixture(scope="module")
def _undisturbed() -> list[Undisturbed]:
    return []


@pytest.fixture
def undisturbed(train: Run, tmp_path: Path, _undisturbed: list[Undisturbed]) -> Undisturbed:
    """Weights, number of "file" events and seconds of a run that nobody kills: once for all tests."""
    if not _undisturbed:
        start = time.monotonic()
        ended = train(tmp_path / "undisturbed", "file")
        assert ended.code == 0, ended.printed
        assert len(checkpoint.checkpoints(tmp_path / "undisturbed")) == 2
        assert not list((tmp_path / "undisturbed").rglob("*.bin")), "no pickle"
        assert not list((tmp_path / "undisturbed").rglob("*.pt*"))
        _undisturbed.append((weights(tmp_path / "undisturbed"), ended.counted, time.monotonic() - start))
    return _undisturbed[0]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def assert_same(folder: Path, expected: dict[str, torch.Tensor]) -> None:
    found = weights(folder)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def test_killed_anywhere_and_resumed_the_weights_are_the_same(train: Run, undisturbed: Undisturbed, tmp_path: Path) -> None:
    survive(train, undisturbed, tmp_path, folders=3)


@pytest.mark.slow
def test_killed_anywhere_many_times(train: Run, undisturbed: Undisturbed, tmp_path: Path) -> None:
    survive(train, undisturbed, tmp_path, folders=12, times=3)


def survive(train: Run, undisturbed: Undisturbed, tmp_path: Path, folders: int, times: int = 1) -> None:
    """By turns at a random time, a random file that is written, a random micro-batch; resumed and killed again."""
    draw = random.Random(7)
    expected, files, seconds = undisturbed
    killed = 0
    for i in range(folders):
        output = tmp_path / f"killed-{i}"
        for _ in range(times):
            if i % 3 == 0:
                ended = train(output, seconds=seconds * draw.random(), resume_from_checkpoint="auto")
            else:
                what, most = [("file", files), ("micro-batch", 2 * STEPS)][i % 3 - 1]
                ended = train(output, what, draw.randint(1, most), resume_from_checkpoint="auto")
            assert ended.code in (0, -signal.SIGKILL), ended.printed
            killed += ended.code != 0
        ended = train(output, resume_from_checkpoint="True")
        assert ended.code == 0, ended.printed
        assert_same(output, expected)
        assert not (output / checkpoint.PARTIAL).exists()
        shutil.rmtree(output)
    assert killed >= folders * times // 2


def test_killed_while_a_checkpoint_is_written(train: Run, undisturbed: Undisturbed, tmp_path: Path) -> None:
    """Of the second some files are there."""
    output = tmp_path / "out"
    assert train(output, "file in checkpoint-4", 9).code == -signal.SIGKILL
    assert any((output / checkpoint.PARTIAL / "checkpoint-4").iterdir())
    ended = train(output, resume_from_checkpoint="True")
    assert ended.code == 0
    assert "a checkpoint that was not finished, removed" in ended.printed
    assert f"Going on from {output / 'checkpoint-2'}" in ended.printed
    assert_same(output, undisturbed[0])


@pytest.mark.parametrize(
    ("number", "code", "micro_batch", "saved"),
    [(signal.SIGTERM, 143, 7, 3), (signal.SIGINT, 130, 8, 4), (signal.SIGTERM, 143, 1, None)],
    ids=["term-within-a-step", "int-at-its-end", "term-within-the-first"],
)
def test_signals_save_and_exit(
    number: int, code: int, micro_batch: int, saved: int | None, train: Run, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    ended = train(output, "micro-batch", micro_batch, number)
    assert ended.code == code, ended.printed
    last = ended.printed.partition("\ncounted")[0].strip().splitlines()[-1]
    assert last.startswith(signal.Signals(number).name)
    if saved is None:
        assert "run the same command again" in last
        assert not checkpoint.checkpoints(output)
    else:
        assert last.endswith(
            f"saved {output}/checkpoint-{saved}; the same command with --resume_from_checkpoint True goes on from there."
        )
        assert checkpoint.checkpoints(output)[-1].name == f"checkpoint-{saved}"
        assert train(output, resume_from_checkpoint="true").code == 0
        assert_same(output, undisturbed[0])


def test_resuming_what_is_finished_changes_nothing(train: Run, tmp_path: Path) -> None:
    """Also where the last step is in the middle of an epoch."""
    assert train(tmp_path / "out", max_steps="4").code == 0
    expected = weights(tmp_path / "out")
    ended = train(tmp_path / "out", max_steps="4", resume_from_checkpoint="True")
    assert ended.code == 0, ended.printed
    assert_same(tmp_path / "out", expected)


def test_another_run_is_not_gone_on_with(train: Run, write_rows: Callable[..., Path], tmp_path: Path) -> None:
    assert train(tmp_path / "out", max_steps="4").code == 0
    others = {
        "--seed 7 was 42": {"seed": "7"},
        "--objective dpo was bnf": {"objective": "dpo"},
        "--batch_size 1 was 2": {"batch_size": "1"},
        "--learning_rate 0.1 was 0.01": {"learning_rate": "0.1"},
        "the training rows are others": {"dataset": str(write_rows(PAIRS[1:], "others.jsonl"))},
    }
    for words, flags in others.items():
        ended = train(tmp_path / "out", max_steps="6", resume_from_checkpoint="True", **flags)
        assert ended.code == 2, ended.printed
        assert words in ended.printed
        assert "this would be another run" in ended.printed
    ended = train(tmp_path / "out", max_steps="6", resume_from_checkpoint="True")  # longer is no other run
    assert ended.code == 0, ended.printed


def test_a_checkpoint_without_optimizer_is_refused(train: Run, tmp_path: Path) -> None:
    """The run would warm up again, and its moments would begin at 0."""
    assert train(tmp_path / "out", max_steps="4", save_only_model="True").code == 0
    ended = train(tmp_path / "out", max_steps="6", resume_from_checkpoint="True")
    assert ended.code == 2, ended.printed
    assert "it has the model and no optimizer (--save_only_model)" in ended.printed


def test_a_full_disk_is_a_sentence_and_the_last_checkpoint_stays(train: Run, undisturbed: Undisturbed, tmp_path: Path) -> None:
    size = 4 * sum(value.nbytes for value in undisturbed[0].values())  # with Adam's moments, tokenizer and rest
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={int(size * 1.7)}", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a small file system cannot be mounted here")
    try:
        ended = train(disk / "out")
        assert ended.code == 2, ended.printed
        error = ended.printed.partition("\ncounted")[0].strip().splitlines()[-1]
        assert error.startswith(f"error: --output_dir {disk / 'out'}: the disk is full; the last complete checkpoint is")
        assert "Traceback" not in ended.printed
        assert [c.name for c in checkpoint.checkpoints(disk / "out")] == ["checkpoint-2"]
        assert checkpoint.damage(disk / "out/checkpoint-2") is None
        subprocess.run(["mount", "-o", f"remount,size={size * 10}", str(disk)], check=True)
        assert train(disk / "out", resume_from_checkpoint="True").code == 0
        assert_same(disk / "out", undisturbed[0])
    finally:
        subprocess.run(["umount", str(disk)], check=True)


OBJECTIVE = """
import torch

def loss(log_odds, batch):  # the eighth row's second response is the longest
    return torch.where(batch.lengths > 20, torch.nan, -batch.mean(log_odds) * batch.sign)

def gradient(log_odds, batch):
    steep = torch.where(batch.lengths[batch.response] > 20, log_odds - log_odds.detach(), 1).sqrt()  # infinite slope at 0
    return -batch.mean(log_odds + steep) * batch.sign
"""


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_non_finite_loss_or_gradient_stops_the_run_and_names_the_rows(what: str, train: Run, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(OBJECTIVE)
    rows = tmp_path / "rows.jsonl"
    row = json.loads(rows.read_text().splitlines()[-1])
    rows.write_text("".join(json.dumps(PAIRS[i]) + "\n" for i in range(4)) + json.dumps(row) + "\n")
    flags = {
        "objective": f"{tmp_path}/mine.py:{what}",
        "save_steps": "1",
        "eval_size": "0",
        "eval_strategy": "no",
        "batch_size": "1",
    }
    ended = train(tmp_path / "out", seed="3", **flags)
    assert ended.code == 2, ended.printed
    error = ended.printed.partition("\ncounted")[0].strip().splitlines()[-1]
    assert f"the {what} is not a finite number, at row 5 of {rows}; the step was not taken" in error
    for folder in checkpoint.checkpoints(tmp_path / "out"):
        assert checkpoint.damage(folder) is None
        assert all(value.isfinite().all() for value in weights(folder).values())


def test_state_comes_back_bitwise(tmp_path: Path) -> None:
    state = {
        "state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.randn(3, 2).t()}, 1: {}},
        "groups": [{"lr": 0.1, "betas": (0.9, 0.999), "foreach": None, "params": [0, 1]}],
        "numpy": np.random.default_rng(0).integers(0, 2**32, 7, dtype=np.uint32),
        "python": random.Random(1).getstate(),
        "half": torch.randn(4).bfloat16(),
        "limits": [float("inf"), -0.0, 1e-320],
    }
    checkpoint.write_state(tmp_path / "x.safetensors", state)
    back = checkpoint.read_state(tmp_path / "x.safetensors")
    assert str(back) == str(state)
    assert torch.equal(back["state"][0]["exp_avg"], state["state"][0]["exp_avg"])  # type: ignore[index]
    assert back["numpy"].dtype == np.uint32
    with pytest.raises(TypeError, match="got object"):
        checkpoint.write_state(tmp_path / "x.safetensors", {"a": object()})


def complete(folder: Path) -> Path:
    (folder.parent / checkpoint.PARTIAL / folder.name).mkdir(parents=True)
    for name in ("a", "b", "optimizer.safetensors"):
        (folder.parent / checkpoint.PARTIAL / folder.name / name).write_text(f"{name} of {folder.name}")
    checkpoint.seal(folder.parent / checkpoint.PARTIAL / folder.name, folder)
    (folder.parent / checkpoint.PARTIAL).rmdir()
    return folder


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "truncated": (lambda f: (f / "a").write_text("a"), "a is not as it was written"),
    "flipped": (lambda f: (f / "b").write_text("b of checkpoint-9"), "b is not as it was written"),
    "missing": (lambda f: (f / "b").unlink(), "b is not as it was written"),
    "unsealed": (lambda f: (f / checkpoint.MANIFEST).unlink(), "no whole complete.json"),
    "half-sealed": (lambda f: (f / checkpoint.MANIFEST).write_text('{"a": [3'), "no whole complete.json"),
}


@pytest.mark.parametrize(("harm", "what"), DAMAGES.values(), ids=DAMAGES)
def test_damaged_checkpoints_do_not_count(harm: Callable[[Path], Any], what: str, tmp_path: Path) -> None:
    good, bad = complete(tmp_path / "checkpoint-9"), complete(tmp_path / "checkpoint-10")
    said: list[str] = []
    assert checkpoint.to_resume("True", tmp_path, said.append) == bad
    harm(bad)
    with pytest.raises(UsageError, match=f"--resume_from_checkpoint {bad}: not a complete checkpoint \\({what}"):
        checkpoint.to_resume(str(bad), tmp_path, said.append)
    assert checkpoint.to_resume("auto", tmp_path, said.append) == good
    assert f"{bad}: incomplete ({what}), so it is skipped" in said[-2]
    assert [p.name for p in checkpoint.checkpoints(tmp_path)] == ["checkpoint-9"]


def test_what_is_not_resumed(tmp_path: Path) -> None:
    said: list[str] = []
    for nothing in (None, False, "False", ""):
        assert checkpoint.to_resume(nothing, tmp_path, said.append) is None
    assert not said
    assert checkpoint.to_resume("True", tmp_path / "new", said.append) is None
    assert "starting from the beginning" in said[-1]
    with pytest.raises(UsageError, match="no such folder"):
        checkpoint.to_resume(str(tmp_path / "nowhere"), tmp_path, said.append)
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(UsageError, match=r"no complete checkpoint to go on from, and thesis.tex is there"):
        checkpoint.to_resume("True", tmp_path, said.append)


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device"),
        RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"),
        OSError(122, "Disk quota exceeded"),
    ],
    ids=["python", "safetensors", "quota"],
)
def test_a_full_disk_is_known_by_its_errors(error: Exception, tmp_path: Path) -> None:
    complete(tmp_path / "checkpoint-3")
    (tmp_path / checkpoint.PARTIAL).mkdir()
    with pytest.raises(UsageError, match=r"the disk is full; the last complete checkpoint is .*checkpoint-3"):  # noqa: SIM117
        with checkpoint.naming_a_full_disk(tmp_path):
            raise error
    assert not (tmp_path / checkpoint.PARTIAL).exists()
    with pytest.raises(PermissionError), checkpoint.naming_a_full_disk(tmp_path):
        raise PermissionError(13, "Permission denied")


def test_command_line_exit_code(
    model_folder: Path, write_rows: Callable[..., Path], tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """The real thing: `python -m bnf_train`, SIGTERM from outside once a checkpoint is there."""
    flags = FLAGS | {"--num_train_epochs": "10000", "--model": str(model_folder), "--dataset": str(write_rows(PAIRS))}
    output = tmp_path / "out"
    command = [sys.executable, "-m", "bnf_train", "--output_dir", str(output), *(p for pair in flags.items() for p in pair)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as process:
        try:
            until = time.monotonic() + HANGS
            while not checkpoint.checkpoints(output) and time.monotonic() < until:
                time.sleep(0.05)
            process.send_signal(signal.SIGTERM)
            _, error = process.communicate(timeout=HANGS)
        finally:
            process.kill()
    assert process.returncode == 143, error
    assert error.strip().splitlines()[-1].startswith("SIGTERM: saved ")
    assert checkpoint.damage(checkpoint.checkpoints(output)[-1]) is None
