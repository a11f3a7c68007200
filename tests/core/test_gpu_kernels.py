"""Triton's kernels compile for GPUs that are not here: what the launcher would launch, through Triton's own compiler."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from children import ROOT, Said, run

pytest.importorskip("triton", reason="triton is not installed (pip install triton)")
SCRIPT = str(ROOT / "tests" / "core" / "compile_kernels.py")
SHARED = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes that a block may have


def rows(said: Said) -> list[dict[str, Any]]:
    return [json.loads(line) for line in said.out.splitlines()]


def test_every_kernel_compiles_for_every_gpu(tmp_path: Path) -> None:
    """No spills, registers and shared memory within the chip's limits, rows found by int64 offsets."""
    # nothing is taken from an earlier compilation
    said = run(SCRIPT, ",".join(map(str, SHARED)), TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(tmp_path / "cache"))
    results = {capability: [row for row in rows(said) if row["capability"] == capability] for capability in SHARED}
    assert len({len(found) for found in results.values()}) == 1
    for capability, found in results.items():
        assert [row for row in found if "error" in row] == []
        folds = [row for row in found if row["kernel"] == "fold_kernel"]
        assert {row["head"] for row in folds} >= {"Llama-3-8B", "Gemma-2-9B", "GPT-2", "a few tokens", "long"}
        assert {(row["SUMS"], row["MEAN"]) for row in folds} == {(True, True), (False, False)}
        assert {row["SOFTCAP"] for row in folds} == {None, 30.0}
        assert any(row["WIDTH"] % 16 for row in folds)
        for row in found:
            assert row["spilled"] == 0, row
            assert row["registers"] <= 96, row  # of 128 threads: at least 5 blocks on a multiprocessor
            assert row["shared"] <= SHARED[capability], row
            assert row["offsets"] == (["i64"] if row["kernel"] == "fold_kernel" else []), row


def test_a_kernel_that_does_not_compile_is_noticed(tmp_path: Path) -> None:
    """A number before the loop that is a block of numbers inside it: Triton's interpreter takes it, its compiler does not."""
    shutil.copytree(ROOT / "bnf_core", tmp_path / "bnf_core")
    shutil.copy(SCRIPT, tmp_path)
    kernels = tmp_path / "bnf_core" / "head" / "triton.py"
    source = kernels.read_text()
    line = "    total = tl.zeros([BLOCK], base.dtype)\n"
    assert source.count(line) == 1
    kernels.write_text(source.replace(line, f"{line}    x = tl.load(raw + row * raw_stride)\n"))
    said = run(
        str(tmp_path / "compile_kernels.py"),
        "90",
        "SmolLM2-135M",
        PYTHONPATH=str(tmp_path),
        TRITON_INTERPRET="0",
        TRITON_CACHE_DIR=str(tmp_path / "cache"),
    )
    errors = [row.get("error", "") for row in rows(said) if row["kernel"] == "fold_kernel"]
    assert errors
    assert all("Loop-carried variable x has initial type" in error for error in errors)
