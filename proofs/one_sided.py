"""One side or both: how soon a preferred token that has fallen below its reference comes back to it.

Gradient flow on the token's logit, others fixed, from pi_0 < pi_ref upwards: dz/dt = w (1 - pi). With x = odds(pi), so that
1 - pi = 1 / (1 + x) and dx/dt = w x / (1 + x), from x0 = odds(pi_0) to x1 = odds(pi_ref):

    one-sided, w = 1        dx/dt = x / (1 + x)            t = log(x1 / x0) + x1 - x0
    BNF, w = x / x1         dx/dt = x^2 / (x1 (1 + x))     t = x1 / x0 - 1 + x1 log(x1 / x0)

For x0 -> 0 the first takes log(1 / x0), the second x1 / x0: the time grows with the logarithm of the fall, or with the fall
itself.

What has the speeds 1 - pi and pi (1 - pi_ref) / pi_ref, the two branches of eq. 9, is the target's logit: dz/dt = |dL/dz_y|,
the likelihood-derivative feedback. With the others' logits fixed the log-odds log x moves with z, at the same speed. The
log-likelihood moves 1 - pi times as fast, (1 - pi)^2 and pi (1 - pi) (1 - pi_ref) / pi_ref, and the likelihood
pi (1 - pi) times as fast as the logit.
"""

import sympy as sp
from a2_valid_distribution import p, r
from common import prove

x, x0, x1 = sp.symbols("x x0 x1", positive=True)
WEIGHTS = {"one-sided, w = 1": sp.Integer(1), "BNF, w = x / x1": x / x1}


def time_one_sided() -> sp.Expr:
    """t at which the odds have risen from x0 to x under w = 1."""
    return sp.log(x / x0) + x - x0


def time_bnf() -> sp.Expr:
    """t at which the odds have risen from x0 to x, below the reference's x1, under BNF's w."""
    return x1 * (1 / x0 - 1 / x) + x1 * sp.log(x / x0)


def main() -> None:
    for (name, w), solution in zip(WEIGHTS.items(), (time_one_sided(), time_bnf()), strict=True):
        prove(
            f"return to the reference, {name}: the closed form solves dx/dt = w x / (1 + x)",
            "dt/dx = 1 / (dx/dt), and t = 0 at x0",
            sp.diff(solution, x) - (1 + x) / (w * x),
            solution.subs(x, x0),
        )
    back = [solution.subs(x, x1) for solution in (time_one_sided(), time_bnf())]
    prove(
        "return to the reference: log(x1 / x0) + x1 - x0 under w = 1, x1 / x0 - 1 + x1 log(x1 / x0) under BNF",
        "x = x1 in both",
        back[0] - (sp.log(x1 / x0) + x1 - x0),
        back[1] - (x1 / x0 - 1 + x1 * sp.log(x1 / x0)),
    )
    assert sp.limit(back[0] / sp.log(1 / x0), x0, 0, "+") == 1
    print("proved: the return under w = 1 takes as long as log(1 / x0) as x0 -> 0\n        symbolic limit of the ratio")
    assert sp.limit(back[1] * x0, x0, 0, "+") == x1
    print("proved: the return under BNF takes as long as x1 / x0 as x0 -> 0\n        symbolic limit of the product")

    z, others = sp.Symbol("z", real=True), sp.Symbol("A", positive=True)
    pi = sp.exp(z) / (sp.exp(z) + others)
    bnf = p / (1 - p) * (1 - r) / r
    prove(
        "speeds of the logit, dz/dt = w (1 - pi): 1 - pi under w = 1, pi (1 - pi_ref) / pi_ref under BNF below the reference",
        "w of T1, by substitution: eq. 9",
        bnf * (1 - p) - p * (1 - r) / r,
    )
    prove(
        "for a speed of the logit of 1, others fixed: 1 of the log-odds, 1 - pi of log pi, pi (1 - pi) of pi",
        "symbolic derivatives with respect to z_y, any vocabulary (A = sum of the others' e^z)",
        sp.diff(sp.log(pi / (1 - pi)), z) - 1,
        sp.diff(sp.log(pi), z) - (1 - pi),
        sp.diff(pi, z) - pi * (1 - pi),
    )


if __name__ == "__main__":
    main()
