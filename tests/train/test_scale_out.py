"""Two processes, DDP or FSDP2, compute what one computes, and leave the same model folder; did weights move at all."""

import json
import logging
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import ClusterConfig
from preference_rows import PAIRS
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainingArguments

from bnf_train.__main__ import main
from bnf_train.weights_moved import WeightsMoved

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "bnf_train" / "configs").glob("*.yaml"))
# of the two-process runs: tied, bf16, more flags
RUNS: list[tuple[Any, ...]] = [(True, False), (False, True), (False, False, "--use_peft", "--lora_r", "4")]


@pytest.fixture
def flags(tokenizer: PreTrainedTokenizerFast, write_rows: Callable[..., Path], tmp_path: Path) -> Callable[..., list[str]]:
    """Flags of a run of six steps of four pairs; the model is made on first use."""
    rows = write_rows(PAIRS)

    def make(output: str, processes: int, tied: bool, bf16: bool, *more: str) -> list[str]:
        folder = tmp_path / ("tied" if tied else "untied")
        if not folder.exists():
            torch.manual_seed(0)
            sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
            vocab = {"vocab_size": len(tokenizer), "max_position_embeddings": 256, "tie_word_embeddings": tied}
            LlamaForCausalLM(LlamaConfig(**sizes, **vocab, initializer_range=0.3)).save_pretrained(folder)
            tokenizer.save_pretrained(folder)
        return [
            *("--model", str(folder), "--dataset", str(rows), "--output_dir", str(tmp_path / output)),
            *("--batch_size", "4", "--per_device_train_batch_size", str(4 // processes), "--num_train_epochs", "3"),
            *("--learning_rate", "1e-2", "--warmup_steps", "0", "--eval_size", "0", "--max_length", "128"),
            *("--bf16", str(bf16), "--save_strategy", "no", "--disable_tqdm", "true", *more),
        ]

    return make


def torchrun(*command: str, **environment: str) -> None:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(port)]
    environment = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT), **environment}
    done = subprocess.run(
        [*launcher, *command], env={**os.environ, **environment}, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-5000:]


def trace(folder: Path) -> list[float]:
    return [log["loss"] for log in json.loads((folder / "metrics.json").read_text())["log"] if "loss" in log]


def same_run(folder: Path, expected: Path, file: str = "model.safetensors", loss: float = 1e-5, weights: float = 1e-4) -> None:
    assert len(trace(expected)) == 6
    assert trace(folder) == pytest.approx(trace(expected), rel=loss)
    ours, theirs = load_file(folder / file), load_file(expected / file)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=0, atol=weights, msg=lambda m, n=name: f"{n}: {m}")


def test_two_processes_with_ddp_are_one(flags: Callable[..., list[str]], tmp_path: Path) -> None:
    assert main(flags("one", 1, True, False)) == 0
    torchrun("-m", "bnf_train", *flags("two", 2, True, False))
    same_run(tmp_path / "two", tmp_path / "one")


def test_two_processes_with_fsdp2_are_one(flags: Callable[..., list[str]], tmp_path: Path) -> None:
    """Tied and untied, float32 and bf16 autocast, all weights or an adapter; what is saved is a whole ordinary folder."""
    settings = yaml.safe_load((ROOT / "bnf_train" / "configs" / "fsdp2.yaml").read_text())["fsdp_config"]
    name = {run: "-".join(map(str, run)) for run in RUNS}
    lines = [json.dumps(flags(f"two-{name[run]}", 2, *run)) for run in RUNS]
    (tmp_path / "runs.jsonl").write_text("\n".join(lines))
    torchrun(
        str(Path(__file__).with_name("fsdp2_on_cpu.py")),
        str(tmp_path / "runs.jsonl"),
        ACCELERATE_USE_FSDP="true",
        **{key.upper(): str(value).lower() if isinstance(value, bool) else str(value) for key, value in settings.items()},
    )
    for run in RUNS:
        assert main(flags(f"one-{name[run]}", 1, *run)) == 0
        one, two = tmp_path / f"one-{name[run]}", tmp_path / f"two-{name[run]}"
        if run[2:]:
            same_run(two, one, "adapter_model.safetensors")
        else:
            # in bf16 the same products in another order differ by its spacing
            same_run(two, one, **({"loss": 2e-2, "weights": 3e-2} if run[1] else {}))
            assert AutoModelForCausalLM.from_pretrained(two).dtype == torch.float32


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_a_configuration_is_what_accelerate_reads(path: Path) -> None:
    text = path.read_text()
    assert f"accelerate launch --config_file {path.name}" in text.split("compute_environment")[0]  # its launch line
    config = ClusterConfig.from_yaml_file(yaml_file=path)
    assert config.mixed_precision == "no"  # the flag --bf16 decides
    if path.name in ("fsdp2.yaml", "multi_node.yaml"):
        assert config.fsdp_config["fsdp_version"] == 2
        assert config.fsdp_config["fsdp_cpu_ram_efficient_loading"] is False


@pytest.mark.parametrize(
    ("dtype", "low", "high"), [(torch.float32, 0.99, 1.0), (torch.bfloat16, 0.0, 0.02)], ids=["float32", "bfloat16"]
)
def test_updates_lost_to_rounding_are_noticed(
    dtype: torch.dtype, low: float, high: float, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """AdamW at the paper's 5e-7, weights of a usual size; rows of an embedding without a gradient do not count."""
    model = nn.Sequential(nn.Embedding(1000, 64), nn.Linear(64, 300)).to(dtype)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.02)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-7, weight_decay=0)
    args = TrainingArguments(output_dir=str(tmp_path), learning_rate=5e-7, use_cpu=True, report_to=[])
    callback, logged = WeightsMoved(), []
    shared: dict[str, Any] = {"args": args, "state": None, "control": None, "model": model, "optimizer": optimizer}
    with caplog.at_level(logging.WARNING):
        for learning_rate in (0.0, 1e-8, 5e-7, 5e-7):  # warm-up begins where nothing can move
            optimizer.param_groups[0]["lr"] = learning_rate
            callback.on_step_begin(**shared)
            (10 * model(torch.arange(500, 600))).pow(2).sum().backward()
            callback.on_pre_optimizer_step(**shared)
            optimizer.step()
            optimizer.zero_grad()
            callback.on_step_end(**shared)
            logged.append(callback.take())
    before, low_rate, log, after = logged
    assert before == low_rate == after == {}  # measured once
    assert low <= log["bnf/weights_moved"] <= high
    assert ("lost to rounding" in caplog.text) == (dtype == torch.bfloat16)
