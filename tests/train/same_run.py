"""Two runs are one: every metric that was logged, and the weights."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

# of a log: what is not computed from the rows; transformers counts the share of an epoch in micro-batches
OF_THE_MACHINE = ("runtime", "per_second", "total_flos", "epoch")


def logged(folder: Path, but: tuple[str, ...] = ()) -> list[dict[str, float]]:
    """All that was logged, by step; without what depends on the machine."""
    found, left_out = json.loads((folder / "metrics.json").read_text()), OF_THE_MACHINE + but
    return [{k: v for k, v in log.items() if not any(part in k for part in left_out)} for log in found["log"]]


def assert_same_run(folder: Path, expected: Path, rel: float = 1e-4, weights: float = 1e-4, but: tuple[str, ...] = ()) -> None:
    """Every metric of the training log and of the evaluations, and the weights; `but` are parts of names to leave out."""
    ours, theirs = logged(folder, but), logged(expected, but)
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        assert one.keys() == other.keys()
        for name, value in other.items():
            if other["step"] == 1 and ("clipped" in name or "rewards" in name):
                continue  # the policy is the reference: rounding decides which of two equals is larger, and how far apart
            assert one[name] == pytest.approx(value, rel=rel, abs=rel / 10), (other["step"], name)
    for path in expected.glob("*model.safetensors"):
        found, wanted = load_file(folder / path.name), load_file(path)
        assert found.keys() == wanted.keys()
        for name, value in wanted.items():
            torch.testing.assert_close(found[name], value, rtol=0, atol=weights, msg=lambda m, n=name: f"{n}: {m}")
