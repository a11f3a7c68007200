"""Figure 1 of the paper: the feedback curve of NLL and BNF against likelihood, for several references.

Lines are SymPy's, derived here from the loss (eqs. 4 and 6). Points are autograd's, through bnf_core.

    python proofs/plot_feedback_curve.py [feedback_curve.png]

--family draws that of a dispreferred token for every weight of a token, from the expressions of family_gradients.py:

    python proofs/plot_feedback_curve.py --family [feedback_family.png]
"""

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import sympy as sp
import torch
from family_gradients import weight
from t3_family import defaults

from bnf_core import OBJECTIVES, Objective, TokenBatch, bnf, token_log_odds

REFERENCES = (0.1, 0.3, 0.5, 0.8)
FAMILY = {  # name: label, colour, line style
    "bnf": ("BNF", "tab:blue", "-"),
    "log_likelihood": ("log-likelihood", "black", "--"),
    "unlikelihood": ("unlikelihood, CE-U", "tab:orange", "--"),
    "wga": ("WGA", "tab:green", "-"),
    "satimp": ("SatImp", "tab:olive", "-"),
    "tnpo": ("TNPO", "tab:red", "-"),
    "ppo_clip": ("PPO", "tab:purple", "-"),
    "cispo": ("CISPO", "tab:brown", "-"),
    "sapo": ("SAPO", "tab:pink", "-"),
    "dppo_tv": ("DPPO", "tab:cyan", "--"),
}


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


def autograd_feedback(
    p: np.ndarray, p_ref: float | None, vocab: int = 5, objective: Objective = bnf, preferred: bool = True
) -> np.ndarray:
    """|dL/dz_y| from autograd through the library, at one-token responses of likelihood p; None: NLL."""
    chance = torch.tensor(p, dtype=torch.float64)
    others = torch.linspace(-1, 1, vocab - 1, dtype=torch.float64).log_softmax(0)
    logits = torch.cat([chance.log().unsqueeze(1), torch.log1p(-chance).unsqueeze(1) + others], dim=1).requires_grad_()
    log_odds, entropy = token_log_odds(logits, torch.zeros(len(p), dtype=torch.long))
    # w = 1 everywhere makes BNF the log-likelihood: a reference that is never above the policy
    ref_log_odds = torch.full_like(log_odds, -torch.inf if p_ref is None else float(np.log(p_ref / (1 - p_ref))))
    labels = torch.full((len(p),), preferred)
    objective(log_odds, TokenBatch(torch.arange(len(p)), labels, None, ref_log_odds, entropy)).sum().backward()
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


def draw_family(path: Path) -> float:
    """Writes the figure of every weight of a token; returns the largest difference between a point and its line."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 5), layout="constrained")
    worst = 0.0
    for axis, p_ref, until in zip(axes, (0.5, 0.1), (1.0, 0.3), strict=True):
        line, points = np.linspace(0, until, 1001)[1:-1], until * np.linspace(0.025, 0.975, 20)
        axis.axvline(p_ref, color="lightgray", linewidth=1)
        for name, (label, colour, style) in FAMILY.items():
            p, r = sp.symbols("p r", positive=True)
            feedback = ((1 - p) * weight(name)).subs(defaults(name)).subs(r, sp.Rational(str(p_ref)))
            curve = np.vectorize(sp.lambdify(p, feedback, "math"))
            measured = autograd_feedback(points, p_ref, objective=OBJECTIVES[name], preferred=False)
            worst = max(worst, float(np.abs(measured - curve(points)).max()))
            axis.plot(line, curve(line), label=label, color=colour, linestyle=style, linewidth=3.5 if name == "bnf" else 1.5)
            axis.plot(points, measured, ".", color=colour, markersize=5)
        axis.set(
            xlabel=r"likelihood $\pi_\theta(y\,|\,x)$ of a dispreferred token",
            title=f"$\\pi_{{ref}}$ = {p_ref}",
            xlim=(0, until),
            ylim=(0, None),
        )
        axis.grid(alpha=0.3)
    axes[0].plot([], [], ".", color="gray", label="autograd through bnf_core")
    axes[0].set_ylabel(r"$|\partial \mathcal{L} / \partial z_y| \cdot |y|\; = \;w\,(1 - \pi)$")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=6)
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return worst


def main() -> None:
    parser = argparse.ArgumentParser(description="Feedback curves: |dL/dz_y| against likelihood.")
    parser.add_argument("path", nargs="?", type=Path, help="where to write; by default beside this script")
    parser.add_argument("--family", action="store_true", help="every weight of the family, on a dispreferred token")
    flags = parser.parse_args()
    if flags.family:
        path = flags.path or Path(__file__).with_name("feedback_family.png")
        print(f"autograd through bnf_core differs by at most {draw_family(path):.1e}")
    else:
        path = flags.path or Path(__file__).with_name("feedback_curve.png")
        nll, bnf_curve, p, r = feedback_expressions()
        print(f"NLL feedback: {nll}")
        print(f"BNF feedback: {bnf_curve}   ({p}: likelihood, {r}: the reference's)")
        print(f"autograd through bnf_core differs by at most {draw(path):.1e}")
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
