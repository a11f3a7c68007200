"""T3's collapse curves: a dispreferred token's likelihood under gradient flow, log-likelihood against BNF.

Lines are the closed-form solutions of t3_collapse.py; points are gradient descent in small steps on
bnf_core's own gradient.

    python proofs/plot_collapse.py [collapse.png]
"""

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import sympy as sp
import t3_collapse
import torch

from bnf_core import reference

START = 0.5  # pi_ref
TIMES = (1.0, 3.0, 10.0, 30.0, 100.0)


def solution(expression: sp.Expr, odds: np.ndarray) -> np.ndarray:
    """Time at which the odds have fallen to `odds`, from a closed form of t3_collapse."""
    at = expression.subs(t3_collapse.x0, START / (1 - START))
    return np.asarray(sp.lambdify(t3_collapse.x, at, "numpy")(odds))


def descend(bnf: bool, step: float = 2e-3) -> list[float]:
    """pi_y at TIMES, moving only the target's logit by bnf_core's gradient for a dispreferred token."""
    logits = torch.tensor([[[np.log(START / (1 - START)), 0.0]]], dtype=torch.float64)
    label, dispreferred = torch.tensor([[0]]), torch.tensor([False])
    # where the reference is below everything, w = 1: the log-likelihood
    ref_logits = logits.clone() if bnf else torch.tensor([[[-100.0, 0.0]]], dtype=torch.float64)
    found, time = [], 0.0
    for until in TIMES:
        while time < until - step / 2:
            logits[0, 0, 0] -= step * reference.bnf_logit_gradient(logits, ref_logits, label, dispreferred)[0, 0, 0]
            time += step
            if not bnf and logits[0, 0, 0] < -40:
                break
        found.append(logits.softmax(-1)[0, 0, 0].item())
    return found


def draw(path: Path, step: float = 0.02) -> float:
    """Writes the figure; returns the largest relative difference of log pi between a point and its line, for BNF."""
    figure, axis = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
    odds = np.logspace(0, -35, 4000) * START / (1 - START)
    worst = 0.0
    for name, expression, bnf in (
        ("log-likelihood: $\\pi_y \\sim e^{-t}$", t3_collapse.time_log_likelihood(), False),
        ("BNF: $\\pi_y \\sim 1/t$", t3_collapse.time_bnf(), True),
    ):
        time = solution(expression, odds)
        line = axis.loglog(time[1:], (odds / (1 + odds))[1:], label=name)
        points = descend(bnf, step)
        exact = np.exp(np.interp(np.log(TIMES), np.log(np.maximum(time, 1e-300)), np.log(odds / (1 + odds))))
        kept = [i for i, p in enumerate(points) if p > 1e-16]
        axis.loglog([TIMES[i] for i in kept], [points[i] for i in kept], ".", color=line[0].get_color(), markersize=9)
        if bnf:
            worst = float(np.abs(np.log(points) / np.log(exact) - 1).max())
    axis.plot([], [], ".", color="gray", label="gradient descent through bnf_core")
    axis.set(
        xlim=(0.1, 200),
        ylim=(1e-14, 1),
        xlabel="time under gradient flow",
        ylabel="likelihood of the dispreferred token",
        title="How fast a dispreferred token collapses (T3)",
    )
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return worst


def main() -> None:
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_name("collapse.png")
    print(f"descent differs from the closed form by at most {draw(path):.1%} of log pi (steps of 0.02)")
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
