"""Eq. 9: the feedback curve |dL/dz_y| |y| is p (1 - r) / r below r = pi_ref and 1 - p from r on.

It is continuous at r, linear on both sides, rising below and falling above, greatest exactly at r, and 0 at both ends.
"""

import sympy as sp
from a2_valid_distribution import p, r, target
from common import prove

BELOW, ABOVE = p * (1 - r) / r, 1 - p


def curve() -> sp.Piecewise:
    """Eq. 9 in p = pi_y and r = pi_ref_y."""
    return sp.Piecewise((BELOW, p < r), (ABOVE, True))


def main() -> None:
    prove("eq. 9, below pi_ref: f_y - pi_y = p (1 - r) / r", "from eqs. 6 and 8", target(True)[0] - p - BELOW)
    prove("eq. 9, from pi_ref on: f_y - pi_y = 1 - p", "from eqs. 6 and 8", target(False)[0] - p - ABOVE)
    prove("eq. 9 is continuous at pi_ref", "both sides are 1 - r there", BELOW.subs(p, r) - (1 - r), ABOVE.subs(p, r) - (1 - r))
    prove("eq. 9 is linear on each side", "second derivatives are 0", sp.diff(BELOW, p, 2), sp.diff(ABOVE, p, 2))
    odds = sp.Symbol("o", positive=True)  # r = 1 / (1 + o) covers 0 < r < 1
    slope = sp.simplify(sp.diff(BELOW, p).subs(r, 1 / (1 + odds)))
    assert slope.is_positive
    assert sp.diff(ABOVE, p).is_negative
    prove(
        "eq. 9 is greatest exactly at pi_ref",
        f"slope {slope} > 0 below (o the odds against, any 0 < r < 1), -1 above, and continuous",
        sp.diff(ABOVE, p) + 1,
    )
    prove("eq. 9 is 0 at both ends", "by substitution", BELOW.subs(p, 0), ABOVE.subs(p, 1))


if __name__ == "__main__":
    main()
