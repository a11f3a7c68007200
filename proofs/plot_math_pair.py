"""Figure 2 of the paper as numbers: DPO's constraint and BNF's weight along the same descent of a wrong answer's token.

A pair that differs in one token, at the paper's probabilities: 0.8 for the right one, 0.05 for the wrong one. The gap
is 2.77 nats (the 1.2 printed is its base-10 logarithm). The wrong token's likelihood is then pushed down, everything
else fixed: C_DPO / (beta / 2), 1 at the start, hardly notices; BNF's w falls with the odds.

    python proofs/plot_math_pair.py [math_pair.png]
"""

import math
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch

from bnf_core import PairLogps, bnf_weight
from bnf_core.constraints import dpo_constraint

RIGHT, WRONG = 0.8, 0.05
BETA = 0.1


def descent(wrong: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(C_DPO / (beta / 2), BNF's w) where the wrong token's likelihood has fallen from 0.05 to `wrong`."""
    one = torch.ones_like(wrong)
    right = (RIGHT * one).log()
    pairs = PairLogps(right, wrong.log(), right, (WRONG * one).log(), one, one)
    c, _ = dpo_constraint(pairs, beta=BETA)
    return c / (BETA / 2), bnf_weight(torch.logit(wrong), torch.logit(WRONG * one))


def draw(path: Path) -> dict[float, tuple[float, float]]:
    """Writes the figure; returns {likelihood: (C_DPO over its start, w)} at a few points of the descent."""
    wrong = torch.logspace(math.log10(WRONG), -6, 200, dtype=torch.float64)
    c, w = descent(wrong)
    figure, axis = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
    axis.semilogx(wrong, c, label=rf"$C_{{DPO}}$ / ($\beta$/2), $\beta$ = {BETA}")
    axis.semilogx(wrong, w, label="BNF's weight $w$")
    axis.invert_xaxis()
    axis.set(
        xlabel=rf"likelihood of the wrong token, falling from {WRONG} (the right one stays at {RIGHT})",
        ylabel="gradient weight, 1 at the start",
        title="What holds back a likelihood that falls (figure 2)",
        ylim=(0, 1.05),
    )
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(path, dpi=150)
    plt.close(figure)
    points = torch.tensor([0.05, 0.005, 5e-4, 5e-6], dtype=torch.float64)
    return {p: (a, b) for p, a, b in zip(points.tolist(), *(x.tolist() for x in descent(points)), strict=True)}


def main() -> None:
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_name("math_pair.png")
    print(f"gap of {RIGHT} against {WRONG}: {math.log(RIGHT / WRONG):.2f} nats, {math.log10(RIGHT / WRONG):.2f} in base 10")
    for likelihood, (c, w) in draw(path).items():
        print(f"wrong token at {likelihood:g}: C_DPO at {c:.3f} of its start, w = {w:.5f}")
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
