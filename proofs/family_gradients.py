"""The family: each published loss on negative samples has the gradient -s w grad log pi(y_t), with w in closed form.

A token's loss depends on the policy through pi_y alone (detached factors are constants). So its gradient is dL/dlog pi_y times
grad log pi_y, whatever the vocabulary and the parameters, and dL/dlog pi_y = -s w is all there is to prove. The chain rule
is checked against logits for V = 2 to 6. A response's loss depends on log pi(y) = sum_t log pi_t, for T tokens, T a symbol, and
is differentiated with respect to the k-th. A detached factor is a symbol, `held`, and is filled in after the derivative.
Where a loss has a minimum or a clip that is not detached, each piece is one claim.

s = +1: preferred; -1: dispreferred. rho = pi / pi_ref. Names are those of bnf_core.OBJECTIVES.
"""

from dataclasses import dataclass

import sympy as sp
from a2_valid_distribution import p, r
from common import for_each_size, prove, sigmoid, vocabulary

s, held = sp.symbols("s held", real=True)
beta, beta1, beta2, epsilon, epsilon_low, epsilon_high = sp.symbols(
    "beta beta1 beta2 epsilon epsilon_low epsilon_high", positive=True
)
tau_pos, tau_neg, delta, most, lambda_ = sp.symbols("tau_pos tau_neg delta most lambda_", positive=True)
gamma, logp, ref = sp.symbols("gamma logp ref", real=True)  # log pi(y) and log pi_ref(y), sums over the response
length = sp.Symbol("length", integer=True, positive=True)
u, v = sp.symbols("u v", positive=True)
rho = p / r


@dataclass(frozen=True)
class Piece:
    """What a loss and its w are in one region, which `at` substitutes: u and v are any positive numbers."""

    where: str
    at: dict[sp.Symbol, sp.Expr]
    loss: sp.Expr
    w: sp.Expr


@dataclass(frozen=True)
class Loss:
    """A published loss, its w, what is detached in it, and the label that it is for (0: either, through s)."""

    loss: sp.Expr
    w: sp.Expr
    held: sp.Expr | None = None
    sign: int = 0
    pieces: tuple[Piece, ...] = ()


def detached(w: sp.Expr, sign: int = 0) -> Loss:
    """-s sg(w) log pi."""
    return Loss(-s * held * sp.log(p), w, held=w, sign=sign)


def clip(x: sp.Expr, low: sp.Expr, high: sp.Expr) -> sp.Expr:
    return sp.Min(sp.Max(x, low), high)


def ppo_clip() -> Loss:
    """-min(s rho, s clip(rho, 1 - epsilon, 1 + epsilon)), in three regions for each label."""
    regions = {
        "rho < 1 - epsilon": {p: r * (1 - epsilon - u)},
        "|rho - 1| < epsilon": {p: r * (1 + (u - v) / 2), epsilon: (u + v) / 2},
        "rho > 1 + epsilon": {p: r * (1 + epsilon + u)},
    }
    pieces = []
    for sign, moved in ((1, "rho > 1 + epsilon"), (-1, "rho < 1 - epsilon")):
        for where, at in regions.items():
            loss, w = (-s * (1 + s * epsilon), sp.Integer(0)) if where == moved else (-s * rho, rho)
            pieces.append(Piece(f"s = {sign:+d}, {where}", at | {s: sp.Integer(sign)}, loss, w))
    return Loss(
        -sp.Min(s * rho, s * clip(rho, 1 - epsilon, 1 + epsilon)),
        sp.Piecewise((0, s * (rho - 1) > epsilon), (rho, True)),
        pieces=tuple(pieces),
    )


def sapo(tau: sp.Symbol, sign: int) -> Loss:
    x = tau * (rho - 1)
    return Loss(-s * 4 / tau * sigmoid(x), 4 * sigmoid(x) * (1 - sigmoid(x)) * rho, sign=sign)


BNF = sp.Piecewise((p / (1 - p) * (1 - r) / r, p < r), (1, True))  # T1; the rest of eq. 4's value has no gradient
TOKEN: dict[str, tuple[Loss, ...]] = {
    "log_likelihood": (Loss(-s * sp.log(p), sp.Integer(1)),),
    "bnf": (detached(BNF),),
    "bnf_one_sided": (detached(BNF, sign=-1), Loss(-sp.log(p), sp.Integer(1), sign=1)),
    "unlikelihood": (Loss(s * sp.log(1 - p), p / (1 - p)),),
    "wga": (detached(p**beta),),
    "satimp": (detached(p**beta1 * (1 - p) ** beta2),),
    "tnpo": (Loss(-s * 2 / beta * sp.log(1 + rho**beta), 2 * rho**beta / (1 + rho**beta)),),
    "ppo_clip": (ppo_clip(),),
    "cispo": (detached(clip(rho, 1 - epsilon_low, 1 + epsilon_high)),),
    "sapo": (sapo(tau_pos, 1), sapo(tau_neg, -1)),
    "dppo_tv": (detached(sp.Piecewise((0, s * (p - r) > delta), (sp.Min(rho, most), True))),),
    "w_reinforce": (Loss(-lambda_ * sp.log(p), lambda_, sign=1), Loss(sp.log(p), sp.Integer(1), sign=-1)),
}
LIKELIHOOD = Loss(-logp, sp.Integer(1), sign=1)
RESPONSE: dict[str, tuple[Loss, ...]] = {
    "npo": (
        Loss(
            -2 / beta * sp.log(sigmoid(-beta * (logp - ref))),
            2 * sp.exp(beta * (logp - ref)) / (1 + sp.exp(beta * (logp - ref))),
            sign=-1,
        ),
        LIKELIHOOD,
    ),
    "sim_npo": (
        Loss(
            -2 / beta * sp.log(sigmoid(-beta * logp / length - gamma)),
            2 / length * sigmoid(beta * logp / length + gamma),
            sign=-1,
        ),
        Loss(-logp / length, 1 / length, sign=1),
    ),
    "topr": (Loss(held * logp, sp.Min(1, sp.exp(logp - ref)), held=sp.Min(1, sp.exp(logp - ref)), sign=-1), LIKELIHOOD),
}


def loss_for(name: str, sign: int) -> Loss:
    """The loss for one label, s filled in."""
    of = next(x for x in (TOKEN | RESPONSE)[name] if x.sign in (0, sign))
    return Loss(of.loss.subs(s, sign), of.w.subs(s, sign), of.held.subs(s, sign) if of.held is not None else None, sign)


def weight(name: str) -> sp.Expr:
    """w of a dispreferred token in p = pi and r = pi_ref; a response's w for a response of that one token."""
    return loss_for(name, -1).w.subs({logp: sp.log(p), ref: sp.log(r), length: 1})


def check_token(name: str, of: Loss) -> None:
    label = {0: "", 1: ", preferred", -1: ", dispreferred"}[of.sign]
    how = "derivative with respect to log pi, p d/dp"
    for piece in of.pieces:
        prove(
            f"{name}: dL/dlog pi = -s w, w = {piece.w}, where {piece.where}",
            f"L and w are {piece.loss} and {piece.w} there; {how}",
            (of.loss - piece.loss).subs(piece.at, simultaneous=True),
            (of.w - piece.w).subs(piece.at, simultaneous=True),
            p * sp.diff(piece.loss, p) + s * piece.w,
        )
    if not of.pieces:
        derivative = p * sp.diff(of.loss, p)
        if of.held is not None:
            derivative, how = derivative.subs(held, of.held), f"{how}, of sg(w) log pi"
        difference = (derivative + s * of.w).subs({s: of.sign} if of.sign else {})
        prove(f"{name}{label}: dL/dlog pi = -s w, w = {of.w}", how, difference)


def check_response(name: str, of: Loss) -> None:
    k = sp.Symbol("k", integer=True, positive=True)
    after = sp.Symbol("after", integer=True, nonnegative=True)
    t, tokens = sp.Symbol("t", integer=True, positive=True), k + after  # any k from 1 to T
    logps = sp.IndexedBase("logp", real=True)
    whole = {logp: sp.Sum(logps[t], (t, 1, tokens)), length: tokens}
    derivative = sp.diff(of.loss.subs(whole), logps[k]).doit()
    if of.held is not None:
        derivative = derivative.subs(held, of.held.subs(whole))
    prove(
        f"{name}, {'preferred' if of.sign > 0 else 'dispreferred'}: dL/dlog pi_k = -s w for every k, w = {of.w}",
        "derivative with respect to the k-th of T terms of a sum, k and T symbols",
        derivative + of.sign * of.w.subs(whole),
    )


def check_chain(size: int) -> None:
    z, pi = vocabulary(size)
    slope, function = sp.Symbol("slope", real=True), sp.Function("F")
    for k in (0, size - 1):  # the target and another token; the rest are like the latter
        derivative = sp.diff(function(sp.log(pi[0])), z[k])
        derivative = derivative.replace(lambda e: isinstance(e, sp.Subs), lambda e: slope)
        prove(
            f"any F(log pi_y): dF/dz_{k} = F' (1[{k} = y] - pi_{k}), V = {size}",
            "symbolic derivative of an unknown function",
            derivative - slope * (int(k == 0) - pi[k]),
        )


def main() -> None:
    for_each_size(check_chain)
    for name, losses in TOKEN.items():
        for of in losses:
            check_token(name, of)
    for name, losses in RESPONSE.items():
        for of in losses:
            check_response(name, of)


if __name__ == "__main__":
    main()
