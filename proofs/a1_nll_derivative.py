"""A.1: the derivative of the negative log-likelihood with respect to the target's logit is pi_y - 1.

Symbolic vocabulary: with respect to z_y the other logits enter only through A = sum_{j != y} e^{z_j} > 0, so
pi_y = e^{z_y} / (e^{z_y} + A) covers every vocabulary size at once.
"""

import sympy as sp
from common import prove


def claim() -> tuple[sp.Expr, sp.Symbol, sp.Symbol]:
    """(d NLL / d z_y, z_y, A)."""
    z, others = sp.Symbol("z_y", real=True), sp.Symbol("A", positive=True)
    pi = sp.exp(z) / (sp.exp(z) + others)
    return sp.diff(-sp.log(pi), z), z, others


def main() -> None:
    derivative, z, others = claim()
    pi = sp.exp(z) / (sp.exp(z) + others)
    prove(
        "A.1: |d NLL / d z_y| = 1 - pi_y",
        "symbolic derivative, any vocabulary (A = sum of the others' e^z)",
        derivative + (1 - pi),
    )


if __name__ == "__main__":
    main()
