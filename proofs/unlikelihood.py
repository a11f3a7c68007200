"""BNF, unlikelihood and CE-U have one gradient where pi_ref = 1/2; below any other reference BNF's is in proportion.

On a dispreferred token y:

    unlikelihood                     -log(1 - pi_y)
    CE-U (arXiv:2503.01224)          cross-entropy to pi without y, renormalised and detached: f_y = 0, f_j = pi_j / (1 - pi_y)
    BNF                              sum_j f_j log pi_j, f of eq. 6, detached

1. Unlikelihood's gradient is CE-U's, for any pi: odds(pi_y) grad log pi_y.
2. Below the reference BNF's gradient is unlikelihood's divided by odds(pi_ref). So at pi_ref = 1/2 the three are one, while
   pi_y < 1/2. From the reference on BNF's w is 1, and unlikelihood's, the odds, goes on growing.

SymPy differentiates for every vocabulary from 2 to 6. For any V: the first is -log sigmoid(-l) of the log-odds l (T2), and
a target f gives the gradient pi - f (A.3), in which the other tokens are all alike.
"""

import sympy as sp
from a2_valid_distribution import r
from common import for_each_size, prove, vocabulary


def gradients(size: int, k: int) -> tuple[dict[str, sp.Expr], list[sp.Symbol]]:
    """({loss: its derivative with respect to z_k}, z) on dispreferred token 0; BNF's is that below the reference."""
    z, pi = vocabulary(size)
    f = list(sp.symbols(f"f0:{size}", real=True))  # a constant for the gradient, filled in afterwards
    cross_entropy = -sum(f_j * sp.log(pi_j) for f_j, pi_j in zip(f, pi, strict=True))
    without_y = [sp.Integer(0), *(pi_j / (1 - pi[0]) for pi_j in pi[1:])]
    dynamic = [pi[0] / r, *((1 - pi[0] / r) / (1 - pi[0]) * pi_j for pi_j in pi[1:])]
    derivative = sp.diff(cross_entropy, z[k])
    return {
        "unlikelihood": sp.diff(-sp.log(1 - pi[0]), z[k]),
        "ce_u": derivative.subs(dict(zip(f, without_y, strict=True))),
        "bnf": -derivative.subs(dict(zip(f, dynamic, strict=True))),
    }, z


def check(size: int) -> None:
    for k in (0, size - 1):  # the target and another token; the rest are like the latter
        of, z = gradients(size, k)
        _, pi = vocabulary(size)
        swap = {x: sp.log(u) for x, u in zip(z, sp.symbols(f"u0:{size}", positive=True), strict=True)}

        def numerator(difference: sp.Expr, swap: dict[sp.Symbol, sp.Expr] = swap) -> sp.Expr:
            return sp.expand(sp.fraction(sp.together(difference.subs(swap)))[0])  # both sides are rational in u_j = e^z_j > 0

        grad_log_pi = int(k == 0) - pi[k]
        prove(
            f"unlikelihood = CE-U: d/dz_{k} is odds(pi_y) dlog pi_y/dz_{k} for both, V = {size}",
            "symbolic derivative, CE-U's target a constant",
            numerator(of["unlikelihood"] - pi[0] / (1 - pi[0]) * grad_log_pi),
            numerator(of["ce_u"] - of["unlikelihood"]),
        )
        prove(
            f"BNF below its reference: d/dz_{k} is unlikelihood's over odds(pi_ref), the same at pi_ref = 1/2, V = {size}",
            "symbolic derivative, the dynamic target a constant; odds(1/2) = 1",
            numerator(of["bnf"] - of["unlikelihood"] * (1 - r) / r),
            numerator(of["bnf"].subs(r, sp.Rational(1, 2)) - of["unlikelihood"]),
        )


def main() -> None:
    for_each_size(check)


if __name__ == "__main__":
    main()
