"""A.4: the gradient on all other tokens together is the target's: sum_{k != y} |pi_k - f_k| = |pi_y - f_y| = f_y - pi_y.

Symbolic vocabulary: pi_k - f_k = q_k [(1 - pi_y) - (1 - f_y)] for k != y, with q_k >= 0 and sum q_k = 1.
"""

from a2_valid_distribution import p, r, share, target
from common import prove


def main() -> None:
    for below, where in ((True, "below pi_ref"), (False, "from pi_ref on")):
        f_y, f_k = target(below)
        other = share * (1 - p) - f_k  # pi_k - f_k
        prove(
            f"A.4: pi_k - f_k = q_k (f_y - pi_y) {where}, so the others sum to f_y - pi_y",
            "symbolic, any vocabulary; both sides have one sign because f_y >= pi_y",
            other - share * (f_y - p),
        )
    prove(
        "A.4: f_y >= pi_y",
        "pi_y / pi_ref - pi_y = pi_y (1 - pi_ref) / pi_ref >= 0, and 1 - pi_y >= 0",
        (p / r - p) - p * (1 - r) / r,
    )


if __name__ == "__main__":
    main()
