"""The plan: sizes against real models, memory against measured runs, work against formulas by hand."""

import functools
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from preference_rows import PAIRS, SINGLES
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from bnf_train import demo
from bnf_train.data import model_inputs, packed
from bnf_train.data.collate import packed_behind_prompts
from bnf_train.model.attention import attend_varlen
from bnf_train.plan import __main__ as plan
from bnf_train.plan import estimate, memory, size, trace, work

measured_once = functools.cache(memory.base_bytes)  # in a process that imports everything, for every plan


@pytest.fixture(autouse=True)
def _measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimate, "base_bytes", measured_once)


def planned(capsys: pytest.CaptureFixture[str], *flags: str) -> dict[str, Any]:
    assert plan.main([*flags, "--json", "-"]) == 0
    result: dict[str, Any] = json.loads(capsys.readouterr().out)
    return result


LLAMA_3_8B = {  # what the plan reads of its config.json
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128_256,
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500_000.0,
    "tie_word_embeddings": False,
}
MEASURED = """
import sys
from matplotlib.figure import Figure
from bnf_train.__main__ import main
Figure.savefig = lambda self, file, **_: None  # a dozen figures after the peak
code = main(sys.argv[1:])
print(open("/proc/self/status").read())
sys.exit(code)
"""


def peak_of_a_run(*flags: str) -> int:
    """The most memory that `python -m bnf_train` held, in bytes, as Linux counts it: ru_maxrss would be that of pytest."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, *flags],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr
    found = re.search(r"VmHWM:\s+(\d+) kB", done.stdout)
    assert found is not None
    return int(found[1]) * 1024


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
    # what both sides begin with is computed once: 33 tokens of the prompt, and the "I" of "It is" and "I do not know"
    shared = 33 + 1
    assert data["tokens"] - data["computed"] == 8 * shared
    assert result["flops"]["backbone"] == 6 * linear * data["computed"] * 2
    squares = sum((33 + len(row[side]) + 1) ** 2 for row in PAIRS for side in ("chosen", "rejected")) - 8 * shared**2
    assert result["flops"]["attention"] == 6 * layers * dim * squares * 2
    assert result["flops"]["head"] == 3 * 2 * vocab * dim * responses * 2
    assert result["gpu_hours"] == pytest.approx(result["flops"]["total"] / 0.5e12 / 3600)
    for line in result["gpu_memory"] + result["cpu_memory"]:
        assert line["total"] == sum(v for k, v in line.items() if k not in ("method", "strategy", "checkpointing", "total"))
    full = result["cpu_memory"][0]
    assert full["optimizer"] == 2 * full["gradients"] == 8 * result["parameters"]["total"]


def test_ktos_estimate_is_a_forward_pass_more(
    model_folder: Path, write_rows: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """Over as many tokens, in each epoch; and the reference scores the mismatched responses, too."""
    flags = ("--model", str(model_folder), "--dataset", str(write_rows(SINGLES)), "--eval_size", "0", "--num_train_epochs", "2")
    fixed, kto = (planned(capsys, *flags, "--objective", objective)["flops"] for objective in ("kto_fixed", "kto"))
    assert "KL estimate" not in fixed
    assert kto["reference pass"] == 2 * fixed["reference pass"]
    assert kto["KL estimate"] == 2 * fixed["reference pass"]
    assert kto["total"] == fixed["total"] + 3 * fixed["reference pass"]


PADDED = {"input_ids": torch.zeros(3, 50, dtype=torch.long), "attention_mask": torch.ones(3, 50, dtype=torch.long).tril(40)}
PACKED = packed([torch.zeros(n, dtype=torch.long) for n in (41, 42, 50)])
SHARED, _ = packed_behind_prompts([torch.zeros(n, dtype=torch.long) for n in (41, 42, 50)], [30, 30, 30])


@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bf16"])
@pytest.mark.parametrize("batch", [PADDED, PACKED, SHARED], ids=["padded", "packed", "shared"])
def test_traced_memory_is_what_autograd_saves(batch: dict[str, Any], model_folder: Path, bf16: bool) -> None:
    traced = trace.trace(size.build(str(model_folder), False), batch | {"response_positions": torch.arange(9)}, bf16, False)
    model = AutoModelForCausalLM.from_pretrained(model_folder).train()
    attend_varlen(model)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved: dict[int, int] = {}
    kept = []

    def pack(x: torch.Tensor) -> torch.Tensor:
        if (storage := x.untyped_storage()).data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
            kept.append(storage)
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        hidden = model.base_model(**model_inputs(batch), use_cache=False).last_hidden_state
    assert hidden.requires_grad
    assert traced.after_forward == pytest.approx(sum(saved.values()), rel=0.1)
    assert traced.most >= traced.after_forward


def test_checkpointing_saves_activations_and_length_costs(model_folder: Path) -> None:
    def peak(length: int, checkpointing: bool) -> int:
        batch = {"input_ids": torch.zeros(1, length, dtype=torch.long), "response_positions": torch.arange(9)}
        return trace.trace(size.build(str(model_folder), False), batch, False, checkpointing).after_forward

    assert peak(200, True) < 0.5 * peak(200, False)
    assert peak(200, False) > 1.8 * peak(100, False)


def test_sharding_divides_by_the_gpus() -> None:
    model = size.ModelSize(1_000_000, 1000, 1000, 100, True, 900_000, 1000, 10, 64, 5000)
    assert memory.weight_bytes(model, "DDP", 8) == 4_000_000
    assert memory.weight_bytes(model, "FSDP2", 8) == 4 * (125_000 + 2 * 1000 + 1000)
    assert memory.gradient_bytes(model, 1_000_000, "DDP", 8) == 2 * memory.gradient_bytes(model, 1_000_000, "DDP", 1)
    assert memory.optimizer_bytes(1_000_000, "ZeRO-3", 8, "adamw_torch_fused") == 1_000_000
    assert math.isclose(work.gpu_hours(312e12 * 3600, 312, 0.5), 2)


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
def test_memory_is_that_of_a_measured_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(demo.MODEL)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=640,
        intermediate_size=1728,
        num_hidden_layers=10,
        num_attention_heads=10,
        num_key_value_heads=5,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = LlamaForCausalLM(config)  # most of what it takes is its own, not the interpreter's
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    rows = Path(demo.PREFERENCES).read_text().splitlines(keepends=True)[:8]
    (tmp_path / "rows.jsonl").write_text("".join(rows))
    flags = ["--model", str(tmp_path / "model"), "--dataset", str(tmp_path / "rows.jsonl"), "--output_dir", str(tmp_path / "o")]
    flags += ["--eval_size", "0", "--per_device_train_batch_size", "2", "--batch_size", "4", "--save_strategy", "no"]
    flags += ["--optim", "adamw_torch_fused", "--no_reference_cache", "--disable_tqdm", "true"]
    full = planned(capsys, *flags)["cpu_memory"][0]
    assert full["weights"] + full["gradients"] + full["optimizer"] > 0.4 * full["total"]
    assert full["total"] == pytest.approx(peak_of_a_run(*flags), rel=0.15)


@pytest.mark.slow  # loads and trains a model of 100 M parameters or more
@pytest.mark.skipif(not os.environ.get("BNF_PLAN_MODEL"), reason="BNF_PLAN_MODEL names the folder of a real model")
@pytest.mark.parametrize("batch_size", ["8", "2"], ids=["accumulated", "one batch a step"])
def test_memory_is_that_of_a_measured_run_of_a_real_model(
    batch_size: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = os.environ.get("BNF_PLAN_DATASET") or str(demo.PREFERENCES)
    flags = ["--model", os.environ["BNF_PLAN_MODEL"], "--dataset", data, "--output_dir", str(tmp_path / "o")]
    flags += ["--max_length", "512", "--per_device_train_batch_size", "2", "--batch_size", batch_size, "--eval_size", "0"]
    flags += ["--save_strategy", "no", "--optim", "adamw_torch_fused", "--no_reference_cache", "--disable_tqdm", "true"]
    full = planned(capsys, *flags)["cpu_memory"][0]
    assert full["total"] == pytest.approx(peak_of_a_run(*flags), rel=0.15)


def test_answers_to_check_are_counted_at_their_longest(
    model_folder: Path, write_rows: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    rows = str(write_rows([row | {"answer": "1"} for row in PAIRS]))
    flags = ["--model", str(model_folder), "--dataset", rows, "--eval_size", "3", "--batch_size", "1", "--check", "number"]
    flags += [
        "--check_max_new_tokens",
        "7",
        "--check_samples",
        "2",
        "--check_steps",
        "2",
        "--json",
        str(model_folder / "p.json"),
    ]
    assert plan.main(flags) == 0
    found = json.loads((model_folder / "p.json").read_text())
    assert found["steps"] == 5
    assert found["checked"] == {
        "times": 4,
        "answers": 3 * 3,
        "tokens": 4 * 9 * 7,
    }  # after steps 2 and 4, too
    assert "4 times 9, at most 252 tokens; not in what follows" in " ".join(capsys.readouterr().out.replace("│", " ").split())


def test_how_often_a_check_asks() -> None:
    def asked(held_out: int | None, steps: int, **flags: Any) -> dict[str, int] | None:
        default = {"check": "number", "check_dataset": None, "check_rows": 200, "check_samples": 4, "check_steps": None}
        return work.answers(cast(Any, SimpleNamespace)(**{"check_max_new_tokens": 10} | default | flags), held_out, steps)

    assert asked(3, 5, check=None) is None
    assert asked(3, 5) == {"times": 2, "answers": 15, "tokens": 300}  # before and after
    assert asked(3, 5, check_steps=5) == asked(3, 5)  # the last step's are those after training
    assert asked(3, 5, check_steps=4) == {"times": 3, "answers": 15, "tokens": 450}
    for found in (asked(3, 5, check_dataset="other.jsonl"), asked(None, 5), asked(999, 5)):
        assert found == {"times": 2, "answers": 1000, "tokens": 20_000}


def test_max_steps_limits_everything(
    model_folder: Path, write_rows: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("--model", str(model_folder), "--dataset", str(write_rows(PAIRS)), "--eval_size", "0", "--batch-size", "4")
    whole, half, twice = (planned(capsys, *flags, *more) for more in ((), ("--max_steps", "1"), ("--max_steps", "4")))
    assert (whole["steps"], half["steps"], twice["steps"]) == (2, 1, 4)
    assert half["tokens"] == round(whole["tokens"] / 2)
    assert twice["tokens"] == 2 * whole["tokens"] == 2 * whole["data"]["tokens"]
    for name, value in whole["flops"].items():
        share = 1 if name == "reference pass" else 0.5  # it goes over all rows before the first step
        if name != "total":
            assert half["flops"][name] == pytest.approx(share * value)
    assert half["gpu_hours"] / whole["gpu_hours"] == pytest.approx(half["flops"]["total"] / whole["flops"]["total"])


def test_tables_are_whole_in_80_columns(
    model_folder: Path, write_rows: Callable[..., Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    assert plan.main(["--model", str(model_folder), "--dataset", str(write_rows(PAIRS)), "--eval_size", "0"]) == 0
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 80
    assert "…" not in printed
    for words in ("ZeRO-3", "FSDP2", "bf16 copies", "gradients", "optimizer", "activations", "checkpointing", "GPU-hours"):
        assert words in printed
    assert len(re.findall(r"(?m)^\W*total ", printed)) == 4  # GPU and CPU, without and with checkpointing


def test_llama_3_8b_by_its_configuration_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_3_8B))
    flags = ("--model", str(tmp_path), "--rows", "60000", "--prompt_tokens", "200", "--response_tokens", "400")
    assert plan.main([*flags, "--json", str(tmp_path / "plan.json")]) == 0  # figures and tables of one plan
    result = json.loads((tmp_path / "plan.json").read_text())
    assert result["parameters"]["total"] == 8_030_261_248
    linear = 32 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14_336)
    assert result["parameters"]["backbone_linear"] == linear
    assert result["data"]["tokens"] == 60_000 * 2 * 600
    assert result["data"]["computed"] == 60_000 * (200 + 2 * 400)  # both sides share the prompt
    assert result["flops"]["backbone"] == 6 * linear * 60_000 * (200 + 2 * 400)
    assert result["steps"] == math.ceil(60_000 / 128)
    assert result["gpu_hours"] == pytest.approx(result["flops"]["total"] / (312e12 * 0.4) / 3600)
    assert result["paper_gpu_hours"] == 40
    assert result["paper_utilization"] == pytest.approx(result["flops"]["total"] / (312e12 * 40 * 3600))
    ddp, fsdp2 = (next(x for x in result["gpu_memory"] if x["strategy"] == name) for name in ("DDP", "FSDP2"))
    assert ddp["weights"] == 4 * 8_030_261_248
    assert fsdp2["optimizer"] == 8_030_261_248
    assert fsdp2["total"] < ddp["total"]
    printed = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "40 A100-hours for meta-llama/Meta-Llama-3-8B-Instruct" in printed
    assert "at 40% of 312 TFLOP/s" in printed


def test_bad_input_is_one_sentence(
    model_folder: Path, tmp_path: Path, write_rows: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    rows = str(write_rows(PAIRS))
    for flags, words in (
        (("--model", str(tmp_path / "none"), "--dataset", rows), "none"),
        (("--model", str(model_folder), "--dataset", str(tmp_path / "no.jsonl")), "no.jsonl: no such file"),
        (("--model", "meta-llama/Meta-Llama-3-8B-Instruct"), "a folder with its config.json and --rows are enough"),
        (("--model", str(model_folder)), "--dataset is missing"),
        (("--model", str(model_folder), "--dataset", rows, "--utilization", "2"), "--utilization"),
        (("--model", str(model_folder), "--dataset", rows, "--gpus", "0"), "--gpus"),
        (("--model", str(model_folder), "--rows", "0"), "--rows"),
    ):
        assert plan.main(list(flags)) == 2
        error = capsys.readouterr().err
        assert words in error
        assert error.count("\n") == 1


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
