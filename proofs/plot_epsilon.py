"""What epsilons of 1e-6 do to the gradient: the formula of eq. 6 guarded by them, against the exact one.

Eq. 6 as it is printed divides by pi_ref and by 1 - pi_y and takes 1 - f_y; code that guards the three with + 1e-6 gets

    f_y = min(pi_y / (pi_ref + e), 1),   c = (1 - f_y + e) / (1 - pi_y + e),   f_j = c pi_j,

whose sum is no longer 1. Its gradient pi_y sum f - f_y is wrong where pi_ref is small or pi_y is near 1. The log-odds
form needs no epsilon.

    python proofs/plot_epsilon.py [epsilon.png]
"""

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch

from bnf_core import reference

EPSILON = 1e-6


def guarded_gradient(p: np.ndarray, p_ref: np.ndarray, miss: np.ndarray) -> np.ndarray:
    """-dL/dz_y with the epsilons, in float64; `miss` is 1 - p, given so that it keeps its digits."""
    f_y = np.minimum(p / (p_ref + EPSILON), 1)
    c = (1 - f_y + EPSILON) / (miss + EPSILON)
    return np.asarray(f_y - p * (f_y + c * miss))


def relative_error(p: np.ndarray, p_ref: np.ndarray, miss: np.ndarray) -> np.ndarray:
    """Of the guarded gradient, against eq. 9 (bnf_core's below pi_ref; 1 - pi_y from it on, kept in full)."""
    below = reference.bnf_feedback(torch.from_numpy(p), torch.from_numpy(p_ref)).numpy()
    exact = np.where(p < p_ref, below, miss)
    return np.asarray(np.abs(guarded_gradient(p, p_ref, miss) / exact - 1))


def curves(count: int = 400) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    small, one = np.logspace(-10, -1, count), np.ones(count)
    return {
        r"rare: $\pi_{ref}$ = x, $\pi_y$ = x/2": (small, relative_error(small / 2, small, 1 - small / 2)),
        r"certain: 1 $-$ $\pi_y$ = x, $\pi_{ref}$ = 0.5": (small, relative_error(1 - small, 0.5 * one, small)),
    }


def draw(path: Path) -> dict[str, float]:
    """Writes the figure; returns the largest relative error of each curve."""
    figure, axis = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
    found = curves()
    for (name, (x, error)), style in zip(found.items(), ("-", "--"), strict=True):
        axis.loglog(x, np.maximum(error, 1e-17), style, label=name)
    axis.set(
        xlabel="x",
        ylabel=r"relative error of $\partial \mathcal{L} / \partial z_y$",
        title="The gradient with three epsilons of 1e-6",
    )
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return {name: float(error.max()) for name, (_, error) in found.items()}


def main() -> None:
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_name("epsilon.png")
    for name, worst in draw(path).items():
        print(f"{name}: relative error up to {worst:.3g}")
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
