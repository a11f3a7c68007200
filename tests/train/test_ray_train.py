"""The example on Ray Train: two workers on CPUs, one of which is killed; Ray starts both again, to the same weights."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import children
import psutil
import pytest
import torch
from preference_rows import PAIRS
from safetensors.torch import load_file

from bnf_train.training import checkpoint

pytest.importorskip("ray", reason='ray is no dependency; pip install "ray[train]"')
EXAMPLE = Path(__file__).parents[2] / "bnf_train" / "examples" / "ray_train.py"


def workers(driver: int) -> list[psutil.Process]:
    """The processes that train, which Ray names so."""
    below = psutil.Process(driver).children(recursive=True)
    return [process for process in below if "RayTrainWorker" in " ".join(process.cmdline()[:1])]


@pytest.mark.slow  # Ray's own processes take half a minute to start, twice
def test_a_lost_worker_is_made_up_for(model_folder: Path, write_rows: Callable[..., Path], tmp_path: Path) -> None:
    flags = ["--model", str(model_folder), "--dataset", str(write_rows(PAIRS)), "--bf16", "false", "--max_length", "100"]
    flags += ["--eval_size", "0", "--batch_size", "4", "--per_device_train_batch_size", "2", "--num_train_epochs", "10"]
    flags += ["--learning_rate", "0.001", "--save_strategy", "steps", "--save_steps", "2", "--disable_tqdm", "true"]
    told = {"PYTHONPATH": children.PYTHONPATH, "CUDA_VISIBLE_DEVICES": "", "RAY_TRAIN_V2_ENABLED": "1"}
    printed = {}
    for name, kill in (("undisturbed", False), ("killed", True)):
        output = tmp_path / name
        command = [sys.executable, str(EXAMPLE), "2", *flags, "--output_dir", str(output)]
        with (tmp_path / f"{name}.log").open("w") as log:
            driver = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | told, cwd=tmp_path)
            try:
                until, killed = time.monotonic() + children.HANGS, False
                while driver.poll() is None and time.monotonic() < until:
                    if kill and not killed and checkpoint.checkpoints(output):
                        workers(driver.pid)[1].send_signal(signal.SIGKILL)
                        killed = True
                    time.sleep(0.02)
            finally:
                driver.kill()
                driver.wait()
        printed[name] = (tmp_path / f"{name}.log").read_text()
        assert driver.returncode == 0, printed[name]
        assert killed == kill
    assert "Going on from" not in printed["undisturbed"]
    assert "Going on from" in printed["killed"]
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("killed", "undisturbed"))
    for name, value in theirs.items():
        assert torch.equal(ours[name], value), name
