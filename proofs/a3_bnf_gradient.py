"""A.3, eq. 8: for any constant target distribution f, d(-sum_j f_j log pi_j) / d z_k = pi_k - f_k.

SymPy differentiates for every vocabulary from 2 to 6. By induction on the page for any V: d log pi_j / d z_k
= 1[j = k] - pi_k for every V (the quotient rule sees the other logits only through their sum), so the derivative is
-f_k + pi_k sum_j f_j, and sum_j f_j = 1 (A.2).
"""

import sympy as sp
from common import for_each_size, prove, vocabulary


def gradient(size: int, k: int) -> tuple[sp.Expr, list[sp.Symbol], list[sp.Symbol]]:
    """(d loss / d z_k, logits, target f), f_0 standing for 1 minus the other entries."""
    z, pi = vocabulary(size)
    f = list(sp.symbols(f"f0:{size}", real=True))
    loss = -sum(f_j * sp.log(pi_j) for f_j, pi_j in zip(f, pi, strict=True))
    return sp.diff(loss, z[k]), z, f


def check(size: int) -> None:
    _, pi = vocabulary(size)
    for k in (0, size - 1):  # the target and another token; the rest are like the latter
        derivative, _, f = gradient(size, k)
        unit = {f[0]: 1 - sum(f[1:])}
        prove(
            f"A.3, eq. 8: dL/dz_{k} = pi_{k} - f_{k}, V = {size}",
            "symbolic derivative for any f with sum 1",
            (derivative - (pi[k] - f[k])).subs(unit),
        )


def main() -> None:
    for_each_size(check)


if __name__ == "__main__":
    main()
