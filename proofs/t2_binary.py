"""T2: BNF is binary cross-entropy on the token's log-odds: -sum f log pi = BCE(sigmoid(l), f_y) + (1 - f_y) H(q).

l = z_y - log A with A = sum_{j != y} e^{z_j}; q_j = pi_j / (1 - pi_y). The entropy's term has no gradient: f is a
constant and q's own weights are f's. For any V: log pi_j = log q_j + log(1 - pi_y), so that
-sum_{j != y} (1 - f_y) q_j log pi_j = (1 - f_y) (H(q) - log(1 - pi_y)). What follows is used
everywhere: dl/dz_y = 1, dl/dz_j = -q_j.
"""

import sympy as sp
from common import for_each_size, prove, vocabulary


def sides(size: int) -> tuple[sp.Expr, sp.Expr, list[sp.Symbol], sp.Symbol]:
    """(-sum f log pi, BCE + (1 - f_y) H(q)) for the target with f_y given and the rest in proportion to q."""
    z, pi = vocabulary(size)
    f_y = sp.Symbol("f", real=True)
    others = sum(sp.exp(x) for x in z[1:])
    q = [sp.exp(x) / others for x in z[1:]]
    cross_entropy = -f_y * sp.log(pi[0]) - sum((1 - f_y) * q_j * sp.log(pi_j) for q_j, pi_j in zip(q, pi[1:], strict=True))
    log_odds = z[0] - sp.log(others)
    sigmoid = 1 / (1 + sp.exp(-log_odds))
    bce = -f_y * sp.log(sigmoid) - (1 - f_y) * sp.log(1 - sigmoid)
    entropy = -sum(x * sp.log(x) for x in q)
    return cross_entropy, bce + (1 - f_y) * entropy, z, f_y


def check(size: int) -> None:
    left, right, z, f_y = sides(size)
    # put u_j = e^{z_j} > 0: both sides are then rational in u inside logarithms
    u = list(sp.symbols(f"u0:{size}", positive=True))
    swap = {x: sp.log(v) for x, v in zip(z, u, strict=True)}
    difference = sp.expand_log(sp.simplify((left - right).subs(swap)), force=True)
    prove(f"T2: -sum f log pi = BCE(sigmoid(l), f_y) + (1 - f_y) H(q), V = {size}", "symbolic, u_j = e^z_j", difference)
    log_odds = z[0] - sp.log(sum(sp.exp(x) for x in z[1:]))
    q_last = sp.exp(z[-1]) / sum(sp.exp(x) for x in z[1:])
    prove(
        f"T2: dl/dz_y = 1 and dl/dz_j = -q_j, V = {size}",
        "symbolic derivative",
        sp.diff(log_odds, z[0]) - 1,
        sp.diff(log_odds, z[-1]) + q_last,
    )
    sigmoid = 1 / (1 + sp.exp(-log_odds))
    for k in (0, size - 1):
        bce = -f_y * sp.log(sigmoid) - (1 - f_y) * sp.log(1 - sigmoid)
        _, pi = vocabulary(size)
        f_k = f_y if k == 0 else (1 - f_y) * q_last
        prove(
            f"T2: d BCE / dz_{k} = pi_{k} - f_{k}, the gradient of the whole loss, V = {size}",
            "symbolic derivative; so the entropy's term has none",
            sp.diff(bce, z[k]) - (pi[k] - f_k),
        )


def main() -> None:
    for_each_size(check)


if __name__ == "__main__":
    main()
