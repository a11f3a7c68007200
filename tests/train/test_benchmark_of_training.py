"""python -m bnf_train.benchmark: figures of what it says, on a model so small that they mean nothing."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from preference_rows import PAIRS, SINGLES
from torch.utils._python_dispatch import TorchDispatchMode

from bnf_train.benchmark import mfu as share_of_the_peak
from bnf_train.benchmark import prefix
from bnf_train.benchmark.__main__ import main
from bnf_train.benchmark.mfu import mfu
from bnf_train.benchmark.ours import bnf, bnf_apart
from bnf_train.benchmark.peers import bare
from bnf_train.benchmark.task import Task, tokens_of
from bnf_train.model.load import load_tokenizer


def test_methods_count_the_same_tokens(model_folder: Path, write_rows: Callable[..., Path]) -> None:
    task = Task(str(model_folder), str(write_rows(PAIRS)), 100, ("--use_cpu=true",))
    tokens = tokens_of(task, load_tokenizer(str(model_folder)))
    figures = bnf(task)
    assert figures["tokens"] == tokens
    assert 0 < figures["with_reference"] < figures["tokens_per_second"]
    assert figures["peak_gib"] > 0.1
    assert bare(task)["tokens"] == 16 * round(tokens / 16)


def test_single_rows_count_too(model_folder: Path, write_rows: Callable[..., Path]) -> None:
    """Four responses in a micro-batch, as pairs have; without shared prompts the same tokens."""
    task = Task(str(model_folder), str(write_rows(SINGLES)), 100, ("--use_cpu=true",))
    assert len(task.responses()) == len(SINGLES)
    assert bnf(task)["tokens"] == bnf_apart(task)["tokens"] == tokens_of(task, load_tokenizer(str(model_folder)))


def test_what_a_shared_prompt_saves(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A point for each size and ratio, beside arithmetic's; the speeds themselves mean nothing here."""
    monkeypatch.setattr(prefix, "SIZES", (2, 4))
    monkeypatch.setattr(prefix, "RATIOS", (0.5, 2))
    points = prefix.sweep(str(model_folder), 120, 1)
    assert [(p["responses"], p["prompt"], p["response"]) for p in points] == [
        (2, 20, 40),
        (2, 40, 20),
        (4, 10, 20),
        (4, 20, 10),
    ]
    assert [p["limit"] for p in points] == pytest.approx([120 / 100, 120 / 80, 120 / 90, 120 / 60])
    assert all(p["apart"] > 0 and p["shared"] > 0 for p in points)
    prefix.draw(points, tmp_path / "prefix.png")
    assert (tmp_path / "prefix.png").stat().st_size > 0
    assert main(["--prefix"]) == 2
    assert "--prefix: --model is needed" in capsys.readouterr().err


class Products(TorchDispatchMode):
    """Dtypes of a forward pass's matrix products in which a dimension is `size`."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.dtypes = size, set[torch.dtype]()

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if function in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default) and self.size in (
            *args[-2].shape,
            *args[-1].shape,
        ):
            self.dtypes |= {args[-2].dtype, args[-1].dtype}
        return function(*args, **kwargs or {})


@pytest.mark.parametrize("unit", [False, True], ids=["without a bf16 unit", "with one"])
@pytest.mark.parametrize("lora", [False, True])
def test_share_of_the_peak_of_products_in_the_dtype_of_the_step(
    lora: bool, unit: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever this CPU has. The figures follow from one another; none is compared with a speed."""
    measured: list[torch.dtype] = []
    monkeypatch.setattr(share_of_the_peak, "bf16_in_hardware", lambda use_cpu: unit)
    monkeypatch.setattr(share_of_the_peak, "_peak_operations", lambda device, dtype: measured.append(dtype) or 2e9)
    shape = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1}
    products, attach = Products(128), share_of_the_peak.attach_log_odds_head
    monkeypatch.setattr(
        share_of_the_peak, "attach_log_odds_head", lambda model: (attach(model), products.dtypes.clear())
    )  # it tries
    with products:
        figures = mfu(2, 64, lora, 2, shape)
    assert [*products.dtypes] == measured == [torch.bfloat16 if unit else torch.float32]
    assert figures["bits"] == (16 if unit else 32)
    assert figures["peak_of_products"] == pytest.approx(2e-3)
    assert figures["mfu"] == pytest.approx(figures["tera_operations_per_second"] / 2e-3)
    weights = 512 * 64 + 2 * (64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 128)  # those that multiply a token, and the norms
    expected = (4 if lora else 6) * 64 * weights
    achieved = figures["tera_operations_per_second"] * 1e12 * 64 / figures["tokens_per_second"]
    assert achieved == pytest.approx(expected, rel=0.05)  # attention and norms are the rest


def test_the_peak_is_that_of_the_dtype_asked_for() -> None:
    with Products(1024) as products:
        assert share_of_the_peak._peak_operations(torch.device("cpu"), torch.float32) > 0
    assert products.dtypes == {torch.float32}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "--model and --dataset are needed"),
        (["--model", "m", "--dataset", "d", "--only", "sft"], "--only sft: expected some of bnf_train, bnf_train_apart, bare"),
        (["--model", "m", "--dataset", "nowhere.jsonl"], "--dataset nowhere.jsonl: no such file"),
    ],
)
def test_bad_input_is_one_sentence(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    assert words in capsys.readouterr().err
