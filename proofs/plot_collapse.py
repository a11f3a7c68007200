"""T3's collapse curves: a dispreferred token's likelihood under gradient flow, log-likelihood against BNF.

Lines are the closed-form solutions of t3_collapse.py; points are gradient descent in small steps on
bnf_core's own gradient.

    python proofs/plot_collapse.py [collapse.png]

--family draws every weight of the family, with lines from t3_family.py:

    python proofs/plot_collapse.py --family [collapse_family.png]
"""

import argparse
import inspect
from functools import partial
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import sympy as sp
import t3_collapse
import t3_family
import torch
from family_gradients import beta

from bnf_core import OBJECTIVES, Objective, TokenBatch, reference

START = 0.5  # pi_ref
TIMES = (1.0, 3.0, 10.0, 30.0, 100.0)
FAMILY: dict[str, tuple[t3_family.Settings, str, str, str]] = {  # name: settings, label, colour, line style
    "log_likelihood": ({}, "log-likelihood, W-REINFORCE", "black", "-"),
    "cispo": ({}, "CISPO", "tab:brown", "-"),
    "npo": ({}, r"NPO, $\beta$ = 0.1", "tab:gray", "-"),
    "kto_fixed": ({beta: 1.0}, r"KTO, $\beta$ = 1", "tab:orange", "-"),
    "tnpo": ({}, r"TNPO, NPO, $\beta$ = 1", "tab:red", "-"),
    "topr": ({}, "TOPR", "tab:purple", "-"),
    "sapo": ({}, "SAPO", "tab:pink", "-"),
    "bnf": ({}, "BNF", "tab:blue", "-"),
    "unlikelihood": ({}, "unlikelihood, CE-U", "goldenrod", "--"),
    "wga": ({}, r"WGA, $\beta$ = 1", "tab:green", "-"),
    "sim_npo": ({}, r"SimNPO, $\beta$ = 4.5", "navy", "-"),
    "satimp": ({}, "SatImp", "tab:olive", "-"),
    "dppo_tv": ({}, "DPPO", "tab:cyan", ":"),
    "ppo_clip": ({}, "PPO", "magenta", ":"),
}


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


def descend_family(objective: Objective, times: tuple[float, ...], step: float) -> list[float]:
    """log pi at `times`, by descent on the log-odds of a response of one token, in steps of `step` times 1 + t."""
    start = torch.tensor([np.log(START / (1 - START))], dtype=torch.float64)
    batch = TokenBatch(torch.tensor([0]), torch.tensor([False]), ref_log_odds=start)
    log_odds, time, found = start.clone().requires_grad_(), 0.0, []
    for until in times:
        while time < until:
            dt = min(step * (1 + time), until - time)
            (gradient,) = torch.autograd.grad(objective(log_odds, batch).sum(), log_odds)
            log_odds = (log_odds - dt * gradient).detach().requires_grad_()
            time += dt
        found.append(torch.nn.functional.logsigmoid(log_odds).item())
    return found


def draw_family(path: Path, step: float = 0.01) -> float:
    """Writes the figure of the family; returns the largest relative difference of log pi between a point and its line."""
    figure, axis = plt.subplots(figsize=(9, 5.6), layout="constrained")
    line, times, worst = np.geomspace(0.1, 1000, 200), (1.0, 10.0, 100.0, 1000.0), 0.0
    below, ends = -12.0, []
    aside = {"log_likelihood": (0.5, -10), "cispo": (40, -10), "npo": (40, -11)}  # labels of those that leave the figure
    for name, (settings, label, colour, style) in FAMILY.items():
        exact = np.array(t3_family.log_likelihoods(name, line.tolist(), settings, START))
        axis.semilogx(line, exact, color=colour, linestyle=style)
        takes = inspect.signature(OBJECTIVES[name]).parameters
        hyper = {s.name: value for s, value in settings.items() if s.name in takes}
        points = np.array(descend_family(partial(OBJECTIVES[name], **hyper), times, step))
        axis.semilogx(times, points, ".", color=colour, markersize=8)
        worst = max(worst, float(np.abs(points / t3_family.log_likelihoods(name, times, settings, START) - 1).max()))
        if name in aside:
            at = np.interp(aside[name][1], exact[::-1], line[::-1]), aside[name][1]
            arrow = {"arrowstyle": "-", "color": colour, "linewidth": 0.7}
            axis.annotate(label, at, aside[name], color=colour, va="center", arrowprops=arrow)
        else:
            ends.append((float(exact[-1]), label, colour))
    axis.semilogx([], [], ".", color="gray", label="gradient descent through bnf_core")
    height = 0.0
    for value, label, colour in sorted(ends, reverse=True):  # a label beside the end of its line, or below the one before
        height = min(value, height - 0.42)
        axis.annotate(label, (1000, value), (1250, height), color=colour, va="center", annotation_clip=False)
    axis.set(
        xlim=(0.1, 1000),
        ylim=(below, 0),
        xlabel=r"time under gradient flow from $\pi = \pi_{ref}$ = " + str(START),
        ylabel="log-likelihood of the dispreferred token",
        title="How fast a dispreferred token collapses under each weight (T3)",
    )
    axis.grid(alpha=0.3)
    axis.legend(loc="lower left")
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return worst


def main() -> None:
    parser = argparse.ArgumentParser(description="A dispreferred token's likelihood under gradient flow.")
    parser.add_argument("path", nargs="?", type=Path, help="where to write; by default beside this script")
    parser.add_argument("--family", action="store_true", help="every weight of the family")
    flags = parser.parse_args()
    if flags.family:
        path = flags.path or Path(__file__).with_name("collapse_family.png")
        print(f"descent differs from the flow by at most {draw_family(path):.1%} of log pi (steps of 0.01 (1 + t))")
    else:
        path = flags.path or Path(__file__).with_name("collapse.png")
        print(f"descent differs from the closed form by at most {draw(path):.1%} of log pi (steps of 0.02)")
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
