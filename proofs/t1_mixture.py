"""T1: the dynamic target is a mixture, f = w onehot(y) + (1 - w) pi, with w = min(1, odds(pi_y) / odds(pi_ref_y)).

So the gradient is cross-entropy's, scaled: pi - f = w (pi - onehot(y)); and the value is w NLL + (1 - w) H(pi).
Symbolic vocabulary: pi_j = q_j (1 - pi_y) for j != y.
"""

import sympy as sp
from a2_valid_distribution import p, r, share, target
from common import for_each_size, prove, vocabulary


def weight(below: bool) -> sp.Expr:
    """w on either side of the minimum; the odds and the likelihoods compare alike."""
    return (p / (1 - p)) / (r / (1 - r)) if below else sp.Integer(1)


def value(size: int) -> tuple[sp.Expr, sp.Expr]:
    """(-sum f log pi, w NLL + (1 - w) H) for a target of weight w over `size` tokens."""
    _, pi = vocabulary(size)
    w = sp.Symbol("w", real=True)
    f = [w * int(j == 0) + (1 - w) * pi_j for j, pi_j in enumerate(pi)]
    entropy = -sum(x * sp.log(x) for x in pi)
    return -sum(a * sp.log(b) for a, b in zip(f, pi, strict=True)), -w * sp.log(pi[0]) + (1 - w) * entropy


def main() -> None:
    for below, where in ((True, "below pi_ref"), (False, "from pi_ref on")):
        w, (f_y, f_j) = weight(below), target(below)
        pi_j = share * (1 - p)
        prove(
            f"T1: f = w onehot(y) + (1 - w) pi {where}",
            "symbolic, any vocabulary",
            f_y - (w + (1 - w) * p),
            f_j - (1 - w) * pi_j,
        )
        prove(
            f"T1: pi - f = w (pi - onehot(y)) {where}",
            "symbolic, any vocabulary: eqs. 8, 9, A.3 and A.4 in one line",
            (p - f_y) - w * (p - 1),
            (pi_j - f_j) - w * pi_j,
        )
    prove(
        "T1: odds(p) < odds(r) exactly where p < r",
        "odds(r) - odds(p) = (r - p) / ((1 - r)(1 - p)), the sign of r - p",
        r / (1 - r) - p / (1 - p) - (r - p) / ((1 - r) * (1 - p)),
    )

    def check(size: int) -> None:
        left, right = value(size)
        prove(
            f"T1: -sum f log pi = w NLL + (1 - w) H(pi), V = {size}",
            "symbolic; linear in f, so for any V",
            sp.expand(left - right),
        )

    for_each_size(check)


if __name__ == "__main__":
    main()
