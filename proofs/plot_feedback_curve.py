"""Figure 1 of the paper: the feedback curve of NLL and BNF against likelihood, for several references.

Lines are SymPy's, derived here from the loss (eqs. 4 and 6). Points are autograd's, through bnf_core.

    python proofs/plot_feedback_curve.py [feedback_curve.png]
"""

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import sympy as sp
import torch

from bnf_core import TokenBatch, bnf, token_log_odds

REFERENCES = (0.1, 0.3, 0.5, 0.8)


def feedback_expressions() -> tuple[sp.Expr, sp.Expr, sp.Symbol, sp.Symbol]:
    """(NLL, BNF) feedback |dL/dz_y| as expressions in p = pi_y and r = pi_ref_y, for one preferred token.

    Only pi_y matters (A.4), so two tokens are enough: y and everything else. The target is a constant for the
    gradient: it is differentiated as a symbol and filled in afterwards.
    """
    z, other, target = sp.symbols("z other f", real=True)
    p, r = sp.symbols("p r", positive=True)
    pi = sp.exp(z) / (sp.exp(z) + sp.exp(other))
    loss = -(target * sp.log(pi) + (1 - target) * sp.log(1 - pi))
    derivative = sp.simplify(sp.diff(loss, z).subs(z, other + sp.log(p / (1 - p))))
    nll = sp.simplify(-derivative.subs(target, 1))
    bnf_target = sp.Piecewise((p / r, p < r), (1, True))  # eq. 6
    return nll, sp.piecewise_fold(sp.simplify(-derivative.subs(target, bnf_target))), p, r


def autograd_feedback(p: np.ndarray, p_ref: float | None, vocab: int = 5) -> np.ndarray:
    """|dL/dz_y| from autograd through the library, at one-token responses of likelihood p; None: NLL."""
    chance = torch.tensor(p, dtype=torch.float64)
    others = torch.linspace(-1, 1, vocab - 1, dtype=torch.float64).log_softmax(0)
    logits = torch.cat([chance.log().unsqueeze(1), torch.log1p(-chance).unsqueeze(1) + others], dim=1).requires_grad_()
    log_odds, entropy = token_log_odds(logits, torch.zeros(len(p), dtype=torch.long))
    # w = 1 everywhere makes BNF the log-likelihood: a reference that is never above the policy
    ref_log_odds = torch.full_like(log_odds, -torch.inf if p_ref is None else float(np.log(p_ref / (1 - p_ref))))
    batch = TokenBatch(torch.arange(len(p)), torch.ones(len(p), dtype=torch.bool), None, ref_log_odds, entropy)
    bnf(log_odds, batch).sum().backward()
    assert logits.grad is not None
    return logits.grad[:, 0].abs().numpy()


def draw(path: Path) -> float:
    """Writes the figure; returns the largest difference between a point and its line."""
    nll, bnf_curve, p, r = feedback_expressions()
    line, points = np.linspace(0, 1, 1001), np.linspace(0.02, 0.98, 25)
    figure, axis = plt.subplots(figsize=(6.4, 4.4), layout="constrained")
    worst = 0.0
    for p_ref in (None, *REFERENCES):
        curve = sp.lambdify(p, nll if p_ref is None else bnf_curve.subs(r, sp.Rational(str(p_ref))), "numpy")
        measured = autograd_feedback(points, p_ref)
        worst = max(worst, float(np.abs(measured - curve(points)).max()))
        name = "NLL" if p_ref is None else f"BNF, $\\pi_{{ref}}$ = {p_ref}"
        drawn = axis.plot(line, curve(line), label=name, linestyle="--" if p_ref is None else "-")
        axis.plot(points, measured, ".", color=drawn[0].get_color(), markersize=5)
    axis.plot([], [], ".", color="gray", label="autograd through bnf_core")
    axis.set(
        xlabel=r"likelihood $\pi_\theta(y\,|\,x)$",
        ylabel=r"$|\partial \mathcal{L} / \partial z_y| \cdot |y|$",
        title="Likelihood-derivative feedback (eq. 9, figure 1)",
        xlim=(0, 1),
        ylim=(0, 1.02),
    )
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return worst


def main() -> None:
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_name("feedback_curve.png")
    nll, bnf_curve, p, r = feedback_expressions()
    print(f"NLL feedback: {nll}")
    print(f"BNF feedback: {bnf_curve}   ({p}: likelihood, {r}: the reference's)")
    print(f"autograd through bnf_core differs by at most {draw(path):.1e}")
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
