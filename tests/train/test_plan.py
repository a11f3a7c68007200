"""The plan: sizes against real models, traced memory against what autograd saves, work against formulas by hand."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from preference_rows import PAIRS
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM

from bnf_train import plan


def planned(capsys: pytest.CaptureFixture[str], *flags: str) -> dict[str, Any]:
    assert plan.main([*flags, "--json", "-"]) == 0
    result: dict[str, Any] = json.loads(capsys.readouterr().out)
    return result


def test_counts_real_tokens_and_multiplies_by_hand(
    model_folder: Path, write_rows: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    (model_folder / "model.safetensors").unlink()  # no weights are needed
    flags = ("--model", str(model_folder), "--dataset", str(write_rows(PAIRS)), "--eval_size", "0", "--batch-size", "4")
    result = planned(capsys, *flags, "--num_train_epochs", "2", "--utilization", "0.5", "--peak-tflops", "1")
    vocab, dim, layers = 258, 16, 2
    linear = layers * (4 * dim * dim + 3 * dim * 32)
    assert result["parameters"]["total"] == 2 * vocab * dim + linear + (2 * layers + 1) * dim
    assert result["parameters"]["backbone_linear"] == linear
    assert not result["parameters"]["tied"]
    data = result["data"]
    assert (data["source"], data["rows"], data["responses"], result["steps"]) == ("counted", 8, 16, 4)
    responses = sum(len(row[side]) + 1 for row in PAIRS for side in ("chosen", "rejected"))  # a byte a token, end of turn
    assert data["response_tokens"] == responses
    assert result["flops"]["backbone"] == 6 * linear * data["tokens"] * 2
    assert result["flops"]["head"] == 3 * 2 * vocab * dim * responses * 2
    assert result["gpu_hours"] == pytest.approx(result["flops"]["total"] / 0.5e12 / 3600)
    for line in result["gpu_memory"] + result["cpu_memory"]:
        assert line["total"] == sum(v for k, v in line.items() if k not in ("method", "strategy", "checkpointing", "total"))
    full = result["cpu_memory"][0]
    assert full["optimizer"] == 2 * full["gradients"] == 8 * result["parameters"]["total"]


@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bf16"])
def test_traced_memory_is_what_autograd_saves(model_folder: Path, bf16: bool) -> None:
    batch = {"input_ids": torch.randint(258, (3, 50)), "attention_mask": torch.ones(3, 50, dtype=torch.long).tril(40)}
    with FakeTensorMode():
        traced = plan.trace(plan.build(str(model_folder), False), batch, bf16, False)
    model = AutoModelForCausalLM.from_pretrained(model_folder).train()
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved: dict[int, int] = {}
    kept = []

    def pack(x: torch.Tensor) -> torch.Tensor:
        if (storage := x.untyped_storage()).data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
            kept.append(storage)
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        hidden = model.base_model(**batch, use_cache=False).last_hidden_state
    assert hidden.requires_grad
    assert traced.after_forward == pytest.approx(sum(saved.values()), rel=0.1)
    assert traced.in_backward >= traced.after_forward


def test_checkpointing_saves_activations_and_length_costs(model_folder: Path) -> None:
    def peak(length: int, checkpointing: bool) -> int:
        batch = {"input_ids": torch.zeros(1, length, dtype=torch.long)}
        with FakeTensorMode():
            return plan.trace(plan.build(str(model_folder), False), batch, False, checkpointing).after_forward

    assert peak(200, True) < 0.5 * peak(200, False)
    assert peak(200, False) > 1.8 * peak(100, False)


def test_sharding_divides_by_the_gpus() -> None:
    size = plan.ModelSize(1_000_000, 1000, 1000, True, 900_000, 1000, 10, 64, 5000)
    assert plan.weight_bytes(size, "DDP", 8) == 4_000_000
    assert plan.weight_bytes(size, "FSDP2", 8) == 4 * (125_000 + 2 * 1000 + 1000)
    assert plan.gradient_bytes(size, 1_000_000, "DDP", 8) == 2 * plan.gradient_bytes(size, 1_000_000, "DDP", 1)
    assert plan.optimizer_bytes(1_000_000, "ZeRO-3", 8, "adamw_torch_fused") == 1_000_000
    assert math.isclose(plan.gpu_hours(312e12 * 3600, 312, 0.5), 2)


def test_bad_input_is_one_sentence(
    model_folder: Path, tmp_path: Path, write_rows: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    rows = str(write_rows(PAIRS))
    for flags, words in (
        (("--model", str(tmp_path / "none"), "--dataset", rows), "none"),
        (("--model", str(model_folder), "--dataset", str(tmp_path / "no.jsonl")), "no.jsonl: no such file"),
        (("--model", str(model_folder), "--dataset", rows, "--utilization", "2"), "--utilization"),
        (("--model", str(model_folder), "--dataset", rows, "--gpus", "0"), "--gpus"),
    ):
        assert plan.main(list(flags)) == 2
        error = capsys.readouterr().err
        assert words in error
        assert "Traceback" not in error


def test_without_a_tokenizer_tokens_are_estimated(
    model_folder: Path, write_rows: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    for file in model_folder.iterdir():
        if file.name != "config.json":
            file.unlink()
    flags = ("--model", str(model_folder), "--dataset", str(write_rows(PAIRS)), "--rows", "100", "--response_tokens", "30")
    data = planned(capsys, *flags, "--prompt-tokens", "20")["data"]
    assert data["source"].startswith("estimated")
    assert (data["rows"], data["tokens"], data["response_tokens"]) == (100, 200 * 50, 200 * 30)
