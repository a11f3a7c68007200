"""A.2: the dynamic target (eq. 6) is a probability distribution: f >= 0 and sum f = 1.

Symbolic vocabulary: the others enter the sum only through sum_{j != y} pi_j = 1 - pi_y.
f_j >= 0, not > 0 as printed: it is 0 for every j != y once pi_y >= pi_ref_y.
"""

import sympy as sp
from common import prove

p, r, share = sp.symbols("p r q", positive=True)  # pi_y, pi_ref_y, and q_j = pi_j / (1 - pi_y) for one j != y


def target(below: bool) -> tuple[sp.Expr, sp.Expr]:
    """(f_y, f_j) of eq. 6 in p = pi_y, r = pi_ref_y and q_j, on either side of the minimum."""
    f_y = p / r if below else sp.Integer(1)
    return f_y, (1 - f_y) / (1 - p) * share * (1 - p)


def main() -> None:
    for below, where in ((True, "below pi_ref"), (False, "from pi_ref on")):
        f_y, f_j = target(below)
        total = f_y + f_j.subs(share, 1)  # sum over j of q_j is 1
        prove(f"A.2: sum f = 1 {where}", "symbolic sum, any vocabulary (the q_j sum to 1)", total - 1)
        if below:  # p = r u with 0 < u < 1: f_y = u, f_j = (1 - u) q_j
            u = sp.Symbol("u", positive=True)
            prove(
                "A.2: f >= 0 below pi_ref",
                "with p = u r, 0 < u < 1: f_y = u and f_j = (1 - u) q_j",
                f_y.subs(p, u * r) - u,
                f_j.subs(p, u * r) - (1 - u) * share,
            )
        else:
            prove("A.2: f_y = 1 and f_j = 0 from pi_ref on", "by substitution: not f_j > 0, as printed", f_y - 1, f_j)


if __name__ == "__main__":
    main()
