"""T3: collapse rates. Under gradient flow on one dispreferred token's logit, others fixed,

    dz/dt = -w (1 - pi_y),   pi_y = e^z / (e^z + A),

the positive log-likelihood (w = 1) drifts linearly and BNF (w = odds / odds_ref once below the reference)
logarithmically: pi_y ~ e^{-t} against pi_y ~ 1/t.

With x = odds(pi_y) = e^z / A, so that 1 - pi_y = 1 / (1 + x) and dx/dt = x dz/dt:

    w = 1:          dx/dt = -x / (1 + x)            t = log(x0 / x) + (x0 - x)                 exactly
    w = x / x0:     dx/dt = -(x^2 / x0) / (1 + x)   t = x0 (1/x - 1/x0) + x0 log(x0 / x)       exactly

from x0 = odds(pi_ref) at t = 0. For small x the first is x ~ e^{-t}, the second x ~ x0 / t. This is gradient flow: an
optimizer that divides by the gradient's own size undoes part of it.
"""

import sympy as sp
from common import prove

x, x0, t = sp.symbols("x x0 t", positive=True)


def time_log_likelihood() -> sp.Expr:
    """t at which the odds have fallen from x0 to x under positive log-likelihood."""
    return sp.log(x0 / x) + (x0 - x)


def time_bnf() -> sp.Expr:
    """t at which the odds have fallen from x0 to x under BNF."""
    return x0 * (1 / x - 1 / x0) + x0 * sp.log(x0 / x)


def main() -> None:
    odds, z, others = sp.Symbol("x", positive=True), sp.Symbol("z", real=True), sp.Symbol("A", positive=True)
    pi = sp.exp(z) / (sp.exp(z) + others)
    prove("T3: 1 - pi_y = 1 / (1 + x)", "x = e^z / A", (1 - pi) - (1 / (1 + odds)).subs(odds, sp.exp(z) / others))
    for name, solution, w in (("w = 1", time_log_likelihood(), sp.Integer(1)), ("BNF, w = x / x0", time_bnf(), x / x0)):
        speed = -x * w / (1 + x)  # dx/dt
        prove(
            f"T3: closed-form solution, {name}",
            "dt/dx = 1 / (dx/dt), and t = 0 at x0",
            sp.diff(solution, x) - 1 / speed,
            solution.subs(x, x0),
        )
    assert sp.limit(x * sp.exp(time_log_likelihood()), x, 0, "+") == x0 * sp.exp(x0)
    print("proved: T3: under w = 1, x e^t -> x0 e^x0 as x -> 0: pi_y ~ e^{-t}, z drifts like -t\n        symbolic limit")
    assert sp.limit(x * time_bnf(), x, 0, "+") == x0
    print("proved: T3: under BNF, x t -> x0 as x -> 0: pi_y ~ 1 / t, z drifts like -log t\n        symbolic limit")


if __name__ == "__main__":
    main()
