"""T3 for the family: how a dispreferred token's likelihood falls under the flow of each w.

One token, its logit moved alone, from pi = pi_ref at t = 0, as in t3_collapse.py: with x = odds(pi), 1 - pi = 1 / (1 + x),

    dz/dt = -w (1 - pi),    dx/dt = -w x / (1 + x),    t(x) = integral from x to x0 of (1 + u) / (u w(u)) du.

What w does as x -> 0 decides, since log pi / log x -> 1:

    w -> k > 0         t / log(1/x) -> 1 / k        log pi ~ -k t                  linear
    w ~ k x^b          x^b t -> 1 / (k b)           log pi ~ -(1/b) log t          logarithmic for b = 1
    w = 0 from some x on                            pi stays there                 stops

Both limits are L'Hopital's rule: t(x) and log(1/x), or x^-b, grow without bound, and the ratio of their derivatives is
(1 + x) / w, or (1 + x) x^b / (b w). So there is one limit to prove for each w, and one derivative for each closed form of t(x).
Weights of a response are those of a response of one token. That a whole response collapses linearly under gradient ascent and
logarithmically under NPO is a theorem of NPO's authors (arXiv:2404.05868); at one token it is the line of `npo` here. CISPO is
linear for epsilon_low < 1; from 1 on it has no lower bound, and w = rho, as TOPR's. DPPO stops for delta < pi_ref only; else
its w is rho all the way.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import sympy as sp
import t3_collapse
from a2_valid_distribution import p, r
from common import prove, sigmoid
from family_gradients import (
    beta,
    beta1,
    beta2,
    delta,
    epsilon,
    epsilon_high,
    epsilon_low,
    gamma,
    most,
    rho,
    tau_neg,
    u,
    v,
    weight,
)
from t3_collapse import x, x0
from table2_constraints import KTO, lambda_u, logp_l, ref_l, z0

ZERO, ONE = sp.Integer(0), sp.Integer(1)
Settings = dict[sp.Symbol, float]
DEFAULTS: Settings = {beta1: 5.0, beta2: 1.0, epsilon: 0.2, epsilon_low: 0.2, epsilon_high: 0.2, tau_neg: 1.05}
DEFAULTS |= {delta: 0.2, most: 10.0, gamma: 0.0}
BETA = {"wga": 1.0, "tnpo": 1.0, "npo": 0.1, "sim_npo": 4.5, "kto_fixed": 0.1}  # beta's default differs
TIMES = (10.0, 100.0, 1000.0)


@dataclass(frozen=True)
class Flow:
    """w on the way down from the reference, and what follows.

    Args:
      w: of a dispreferred token, in p = pi and r = pi_ref, from the reference down.
      power, k: w ~ k p^power as p -> 0.
      time: t at which the odds have fallen from x0 to x, where there is a closed form, with the hyper-parameters `at`.
      stop: the likelihood below which w is 0.
      ranges: what to put for p, or r, so that it stands for every likelihood on the way; by default nothing: w is valid.
      tail: w where p is small.
    """

    w: sp.Expr
    power: sp.Expr = ONE
    k: sp.Expr = ONE
    time: sp.Expr | None = None
    at: Settings = field(default_factory=dict)
    stop: sp.Expr | None = None
    ranges: tuple[dict[sp.Symbol, sp.Expr], ...] = ({},)
    tail: sp.Expr | None = None


BNF, LINEAR = p / (1 - p) * (1 - r) / r, t3_collapse.time_log_likelihood()
TNPO = 2 * rho**beta / (1 + rho**beta)
KTO_W = KTO.c_l.subs({logp_l: sp.log(p), ref_l: sp.log(r), z0: 0, lambda_u: 1})
TIME_PROB = x0 - x + 1 / x - 1 / x0 + 2 * sp.log(x0 / x)  # of w = pi
TIME_RHO = x0 / (1 + x0) * TIME_PROB  # of w = rho
BELOW_REFERENCE = ({r: p + u},)
FLOWS: dict[str, Flow] = {
    "log_likelihood": Flow(ONE, ZERO, time=LINEAR),
    "w_reinforce": Flow(ONE, ZERO, time=LINEAR),
    "cispo": Flow(
        sp.Max(rho, 1 - epsilon_low),
        ZERO,
        1 - epsilon_low,
        ranges=({p: r * (1 - epsilon_low - u)}, {p: r * (1 - v), epsilon_low: u + v}),
        tail=1 - epsilon_low,
    ),
    "bnf": Flow(BNF, k=(1 - r) / r, time=t3_collapse.time_bnf(), ranges=BELOW_REFERENCE),
    "bnf_one_sided": Flow(BNF, k=(1 - r) / r, time=t3_collapse.time_bnf(), ranges=BELOW_REFERENCE),
    "unlikelihood": Flow(p / (1 - p), time=1 / x - 1 / x0 + sp.log(x0 / x)),
    "wga": Flow(p**beta, beta, time=TIME_PROB, at={beta: 1}),
    "satimp": Flow(p**beta1 * (1 - p) ** beta2, beta1),
    "tnpo": Flow(TNPO, beta, 2 / r**beta, time=(LINEAR + TIME_RHO) / 2, at={beta: 1}),
    "npo": Flow(TNPO, beta, 2 / r**beta, time=(LINEAR + TIME_RHO) / 2, at={beta: 1}),
    "sim_npo": Flow(2 * sigmoid(beta * sp.log(p) + gamma), beta, 2 * sp.exp(gamma)),
    "kto_fixed": Flow(KTO_W, beta, beta / r**beta),
    "topr": Flow(rho, k=1 / r, time=TIME_RHO, ranges=({p: r * (1 - u)},)),
    "sapo": Flow(weight("sapo"), k=4 * sigmoid(tau_neg) * sigmoid(-tau_neg) / r),
    "ppo_clip": Flow(rho, time=TIME_RHO, stop=r * (1 - epsilon), ranges=({p: r * (1 - epsilon + u)},)),
    "dppo_tv": Flow(rho, time=TIME_RHO, stop=r - delta, ranges=({p: r - delta + u, most: (r - delta + u) / r + v},)),
}


def defaults(name: str) -> Settings:
    """The library's defaults."""
    return DEFAULTS | {beta: BETA.get(name, 1.0)}


def log_likelihoods(name: str, times: Sequence[float], settings: Settings | None = None, start: float = 0.5) -> list[float]:
    """log pi at `times`, rising, from pi = pi_ref = `start` at 0: Runge-Kutta of order 4, in steps of log(1 + t)."""
    flow, at = FLOWS[name], defaults(name) | (settings or {}) | {r: start}
    w = sp.lambdify(p, flow.w.subs(at), "math")
    floor = math.log(float(flow.stop.subs(at))) if flow.stop is not None else -math.inf  # a stop is reached, and not passed

    def slope(z: float, tau: float) -> float:
        """dz/dtau for tau = log(1 + t), dt/dtau = e^tau."""
        x = math.exp(z)
        return -w(x / (1 + x)) / (1 + x) * math.exp(tau)

    z, tau, found = math.log(start / (1 - start)), 0.0, []
    for until in times:
        steps = max(1, math.ceil((math.log1p(until) - tau) / 0.01))
        h = (math.log1p(until) - tau) / steps
        for _ in range(steps):
            a = slope(z, tau)
            b = slope(z + h / 2 * a, tau + h / 2)
            c = slope(z + h / 2 * b, tau + h / 2)
            z += h / 6 * (a + 2 * b + 2 * c + slope(z + h * c, tau + h))
            tau += h
        found.append(max(z - math.log1p(math.exp(z)), floor))
    return found


ROWS: dict[str, tuple[str, Settings]] = {name: (name, {}) for name in FLOWS} | {"tnpo, beta = 0.1": ("tnpo", {beta: 0.1})}


def table() -> dict[str, list[float]]:
    """log pi at TIMES, from pi = pi_ref = 1/2, with the library's defaults."""
    return {row: log_likelihoods(name, TIMES, settings) for row, (name, settings) in ROWS.items()}


def check_general() -> None:
    """The two ratios of derivatives, for any w of that form."""
    k, b = sp.symbols("k b", positive=True)
    rate = (1 + x) / x  # -dt/dx is this over w
    for claim, growing, w, expected in (
        ("w -> k: t / log(1/x) -> 1 / k, log pi ~ -k t", sp.log(1 / x), k, 1 / k),
        ("w ~ k x^b: x^b t -> 1 / (k b), log pi ~ -(1/b) log t", x**-b, k * x**b, 1 / (k * b)),
    ):
        ratio = sp.powsimp(sp.simplify(-rate / w / sp.diff(growing, x)))
        prove(f"T3: {claim}", "L'Hopital: the limit of the ratio of derivatives", sp.limit(ratio, x, 0, "+") - expected)
    prove("T3: log pi / log x -> 1, and pi / x -> 1", "pi = x / (1 + x)", sp.limit(1 / (1 + x), x, 0, "+") - 1)


def check(name: str, flow: Flow) -> None:
    published = flow.w if name == "kto_fixed" else weight(name)  # KTO's is a claim of table2_constraints.py
    odds = {p: x / (1 + x), r: x0 / (1 + x0)}
    prove(
        f"{name}: w = {flow.w} from the reference down",
        "substitution of every such likelihood; u and v are any positive numbers",
        *((published - flow.w).subs(at, simultaneous=True) for at in flow.ranges),
    )
    if flow.stop is not None:
        stopped = published.subs(p, flow.stop - r * u)
        decided = stopped.replace(lambda e: isinstance(e, sp.Rel), lambda e: e.func(sp.expand(e.lhs - e.rhs), 0))
        prove(f"{name} stops: w = 0 below pi = {flow.stop}", "substitution of every pi below", decided)
    else:
        tail = flow.w if flow.tail is None else flow.tail
        if flow.tail is not None:
            prove(f"{name}: w = {tail} where pi is small", "substitution", (flow.w - tail).subs(flow.ranges[0]))
        law = f"-({flow.k}) t, linear" if flow.power == 0 else f"-(1/{flow.power}) log t" if flow.power != 1 else "-log t"
        ratio = sp.powsimp(sp.expand_log(sp.powsimp(tail / p**flow.power)))
        how = f"limit of w / pi^({flow.power}) as pi -> 0: {flow.k}"
        prove(f"{name}: log pi ~ {law}", how, sp.limit(ratio, p, 0, "+") - flow.k)
    if flow.time is not None:
        prove(
            f"{name}{', beta = 1' if flow.at else ''}: t = {flow.time}",
            "dt/dx = 1 / (dx/dt), and t = 0 at x0",
            sp.diff(flow.time, x) + (1 + x) / (x * flow.w.subs(flow.at).subs(odds)),
            flow.time.subs(x, x0),
        )


def main() -> None:
    check_general()
    for name, flow in FLOWS.items():
        check(name, flow)
    print(f"log pi from pi = pi_ref = 1/2, at t = {', '.join(f'{t:g}' for t in TIMES)}")
    for row, values in table().items():
        print(f"  {row:20}" + "".join(f"{value:10.2f}" for value in values))


if __name__ == "__main__":
    main()
