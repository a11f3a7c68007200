"""Every proof runs alone, and every proved expression is what the library computes."""

import inspect
import math
import re
import subprocess
import sys
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import sympy as sp
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from strategies import HYPER, probabilities

from bnf_core import (
    OBJECTIVES,
    PairLogps,
    TokenBatch,
    bnf,
    bnf_binary,
    bnf_weight,
    constraints,
    objective_spec,
    reference,
    token_log_odds,
)

PROOFS = Path(__file__).parents[2] / "proofs"
SCRIPTS = sorted(p.name for p in PROOFS.glob("*.py") if not p.name.startswith("plot_") and p.name != "common.py")


@pytest.mark.parametrize("script", SCRIPTS)
def test_proof_runs_alone(script: str) -> None:
    result = subprocess.run([sys.executable, script], capture_output=True, text=True, cwd=PROOFS)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("proved: ")


def test_the_table_lists_every_file() -> None:
    listed = re.findall(r"`(\w+\.py)`", (PROOFS / "README.md").read_text())
    assert sorted(listed) == sorted(p.name for p in PROOFS.glob("*.py") if p.name != "common.py")


def test_a_false_claim_is_not_proved() -> None:
    from common import prove  # type: ignore[import-not-found]

    x = sp.Symbol("x")
    with pytest.raises(AssertionError, match="not proved: squares"):
        prove("squares", "never", (x + 1) ** 2 - x**2 - 1)


def rows(p: float, extra: int = 2) -> torch.Tensor:
    """Logits of one position whose target, token 0, has likelihood p; the others share the rest unequally."""
    chance = torch.tensor(p, dtype=torch.float64)
    shares = torch.arange(1, extra + 2, dtype=torch.float64).log_softmax(0)
    return torch.cat([chance.log().reshape(1), torch.log1p(-chance) + shares]).reshape(1, -1)


interior = probabilities(interior=True).filter(lambda p: 1e-6 <= p <= 1 - 1e-6)
TARGET = torch.tensor([0])


@given(p=interior)
def test_a1(p: float) -> None:
    from a1_nll_derivative import claim  # type: ignore[import-not-found]

    derivative, z, others = claim()
    ours = sp.lambdify((z, others), derivative, "math")(torch.tensor(p / (1 - p)).double().log().item(), 1.0)
    assert -ours == pytest.approx(reference.nll_feedback(p).item(), rel=1e-7)


@given(p=interior, p_ref=interior)
def test_a2(p: float, p_ref: float) -> None:
    import a2_valid_distribution as a2  # type: ignore[import-not-found]

    expressions = a2.target(p < p_ref)
    z = rows(p)
    q = z.softmax(-1)[0, 1] / (1 - z.softmax(-1)[0, 0])
    expected = [float(e.subs({a2.p: p, a2.r: p_ref, a2.share: q.item()})) for e in map(sp.sympify, expressions)]
    f = reference.dynamic_target(z, rows(p_ref), TARGET)[0]
    assert f[:2].tolist() == pytest.approx(expected, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("size", [2, 4])
def test_a3(size: int) -> None:
    from a3_bnf_gradient import gradient  # type: ignore[import-not-found]

    torch.manual_seed(0)
    logits, ref_logits = torch.randn(2, 1, 1, size, dtype=torch.float64)
    label, preferred = torch.tensor([[0]]), torch.tensor([True])
    ours = reference.bnf_logit_gradient(logits, ref_logits, label, preferred).flatten()
    target = reference.dynamic_target(logits, ref_logits, label).flatten().tolist()
    for k in range(size):
        expression, z, f = gradient(size, k)
        value = sp.lambdify((*z, *f), expression, "math")(*logits.flatten().tolist(), *target)
        assert ours[k].item() == pytest.approx(value, rel=1e-9)


@given(p=interior, p_ref=interior)
def test_a4(p: float, p_ref: float) -> None:
    gradient = reference.bnf_logit_gradient(
        rows(p).unsqueeze(0), rows(p_ref).unsqueeze(0), TARGET.unsqueeze(0), torch.tensor([True])
    ).flatten()
    assert gradient[1:].abs().sum().item() == pytest.approx(gradient[0].abs().item(), rel=1e-9)
    assert gradient[0] <= 0 <= gradient[1:].min()


@given(p=interior, p_ref=interior)
def test_eq9(p: float, p_ref: float) -> None:
    import eq9_feedback  # type: ignore[import-not-found]

    value = sp.lambdify((eq9_feedback.p, eq9_feedback.r), eq9_feedback.curve(), "math")(p, p_ref)
    assert reference.bnf_feedback(p, p_ref).item() == pytest.approx(value, rel=1e-12)


@given(p=interior, p_ref=interior)
def test_t1(p: float, p_ref: float) -> None:
    import t1_mixture  # type: ignore[import-not-found]

    w = sp.lambdify((t1_mixture.p, t1_mixture.r), t1_mixture.weight(p < p_ref), "math")(p, p_ref)
    log_odds = [token_log_odds(rows(x), TARGET)[0] for x in (p, p_ref)]
    assert bnf_weight(*log_odds).item() == pytest.approx(w, rel=1e-6)


@given(p=interior, p_ref=interior)
def test_t2(p: float, p_ref: float) -> None:
    """The two sides of the identity: `bnf` with its entropy, and `bnf_binary` plus (1 - f_y) H(q)."""
    import t2_binary  # type: ignore[import-not-found]

    left, right, z, f_y = t2_binary.sides(4)
    logits = rows(p)
    log_odds, entropy = token_log_odds(logits, TARGET)
    ref_log_odds, _ = token_log_odds(rows(p_ref), TARGET)
    batch = TokenBatch(TARGET, torch.tensor([True]), ref_log_odds=ref_log_odds, entropy=entropy)
    f = reference.dynamic_target(logits, rows(p_ref), TARGET)[0]
    at = (*logits[0].tolist(), f[0].item())
    exact = [sp.lambdify((*z, f_y), side, "math")(*at) for side in (left, right)]
    assert exact[0] == pytest.approx(exact[1], rel=1e-9, abs=1e-9)
    assert bnf(log_odds, batch).item() == pytest.approx(exact[0], rel=1e-9, abs=1e-9)
    q = logits[0, 1:].softmax(0)
    without_entropy = exact[1] + (1 - f[0]).item() * (q * q.log()).sum().item()
    assert bnf_binary(log_odds, batch).item() == pytest.approx(without_entropy, rel=1e-8, abs=1e-8)


@pytest.mark.parametrize("bnf_flow", [False, True], ids=["log-likelihood", "bnf"])
def test_t3(bnf_flow: bool) -> None:
    """A step of bnf_core's gradient moves time in the closed form by the same step."""
    import t3_collapse as t3  # type: ignore[import-not-found]

    expression = t3.time_bnf() if bnf_flow else t3.time_log_likelihood()
    time = sp.lambdify((t3.x, t3.x0), expression, "math")
    x0, step = 0.7, 1e-6
    ref_logits = torch.tensor([[[x0 if bnf_flow else 1e-30, 1.0]]], dtype=torch.float64).log()
    for x in (0.5, 0.1, 1e-3):
        logits = torch.tensor([[[x, 1.0]]], dtype=torch.float64).log()
        slope = reference.bnf_logit_gradient(logits, ref_logits, torch.tensor([[0]]), torch.tensor([False]))[0, 0, 0].item()
        moved = x * torch.tensor(-slope * step, dtype=torch.float64).exp().item()
        assert time(moved, x0) - time(x, x0) == pytest.approx(step, rel=1e-3)


values = st.floats(-20, -0.01)


@pytest.mark.parametrize("name", constraints.CONSTRAINTS)
@given(data=st.data())
def test_table2(name: str, data: st.DataObject) -> None:
    """The proved constraints, and the losses they were derived from, are the library's."""
    import table2_constraints as t2  # type: ignore[import-not-found]

    inputs = dict(zip(t2.INPUTS, data.draw(st.tuples(*[values] * 4, *[st.integers(1, 9).map(float)] * 2)), strict=True))
    most = 1 if name == "bdpo" else 2  # a share
    hyper = {s: data.draw(st.floats(0.1, most), label=s.name) for s in t2.CLAIMS[name][0].hyper}
    at = inputs | hyper
    gap = inputs[t2.logp_w] - inputs[t2.logp_l]
    r_w = inputs[t2.logp_w] - inputs[t2.ref_w]
    second = (name == "slic_hf" and gap > hyper.get(t2.delta, 0)) or (name == "dpop" and r_w < 0)
    claim = t2.CLAIMS[name][1 if second else 0]
    pairs = PairLogps(*(torch.tensor([float(inputs[s])], dtype=torch.float64) for s in t2.INPUTS))
    keywords: dict[str, Any] = {s.name: v for s, v in hyper.items()}
    c_w, c_l = constraints.CONSTRAINTS[name](pairs, **keywords)
    for ours, theirs in ((c_w, claim.c_w), (c_l, claim.c_l)):
        expected = sp.lambdify(tuple(at), theirs, "mpmath")(*at.values())
        assert ours.item() == pytest.approx(float(expected), rel=1e-8, abs=1e-12)

    # one token per response carries the whole log-likelihood where the lengths are 1
    ones = at | {t2.len_w: 1.0, t2.len_l: 1.0}
    logits = torch.tensor([float(inputs[s]) for s in t2.INPUTS[:4]], dtype=torch.float64)
    log_odds = logits - torch.log(-torch.expm1(logits))
    batch = TokenBatch(torch.tensor([0, 1]), torch.tensor([True, False]), torch.tensor([0, 0]), ref_log_odds=log_odds[2:])
    loss = OBJECTIVES[name](log_odds[:2], batch, **keywords)
    expected = sp.lambdify(tuple(ones), claim.loss, "mpmath")(*ones.values())
    assert loss.item() == pytest.approx(float(expected), rel=1e-6, abs=1e-9)


@given(log_ratio=st.tuples(st.floats(-20, 20), st.floats(-20, 20)), data=st.data())
def test_table2_of_kto(log_ratio: tuple[float, float], data: st.DataObject) -> None:
    import table2_constraints as t2  # type: ignore[import-not-found]

    hyper: dict[str, Any] = {key: data.draw(values, label=key) for key, values in HYPER["kto_fixed"].items()} | {
        "z0": data.draw(st.floats(0, 10), label="z0")
    }
    found = constraints.kto_constraint(torch.tensor(log_ratio, dtype=torch.float64), torch.tensor([True, False]), **hyper)
    at = {s: hyper[s.name] for s in t2.KTO.hyper} | dict(zip((t2.logp_w, t2.logp_l), log_ratio, strict=True))
    for ours, claim in zip(found.tolist(), (t2.KTO.c_w, t2.KTO.c_l), strict=True):
        expected = sp.lambdify(tuple(at), claim.subs({t2.ref_w: 0, t2.ref_l: 0}), "mpmath")(*at.values())
        assert ours == pytest.approx(float(expected), rel=1e-8, abs=1e-300)


# --- the family ------------------------------------------------------------------------------------------------------


@cache
def evaluated(name: str, sign: int) -> tuple[Callable[..., Any], Callable[..., Any], list[str]]:
    """(loss, w) of a proved claim as functions of all of its symbols, in the order of the names that come third."""
    import family_gradients as family  # type: ignore[import-not-found]

    of = family.loss_for(name, sign)
    loss = of.loss.subs(family.held, of.held) if of.held is not None else of.loss
    symbols = sorted(loss.free_symbols | of.w.free_symbols, key=str)
    return *(sp.lambdify(symbols, e, "mpmath") for e in (loss, of.w)), [s.name for s in symbols]


TOKENWISE = sorted(n for n, f in OBJECTIVES.items() if objective_spec(f).per == "token" and n != "bnf_binary")


@pytest.mark.parametrize("sign", [1, -1], ids=["preferred", "dispreferred"])
@pytest.mark.parametrize("name", TOKENWISE)
@given(p=interior, p_ref=interior, data=st.data())
def test_family(name: str, sign: int, p: float, p_ref: float, data: st.DataObject) -> None:
    """The proved w and the loss that it was derived from are the library's."""
    hyper = {k: "both" if k == "side" else data.draw(values, label=k) for k, values in HYPER[name].items()}
    loss, w, names = evaluated(name, sign)
    for edge in (abs(p / p_ref - 1) - hyper.get("epsilon", 2), abs(p - p_ref) - hyper.get("delta", 2)):
        assume(abs(edge) > 1e-6)  # a jump of w
    at = [({"p": p, "r": p_ref} | hyper)[symbol] for symbol in names]
    spec = objective_spec(partial(OBJECTIVES[name], **hyper))
    log_odds, ref_log_odds = torch.tensor([[p], [p_ref]], dtype=torch.float64).logit()
    labels = torch.tensor([sign], dtype=torch.float64)
    assert spec.token_constraint(log_odds, ref_log_odds, labels).item() == pytest.approx(float(w(*at)), rel=1e-6, abs=1e-9)
    assert spec.token_loss is not None
    ours = spec.token_loss(log_odds, labels, *([ref_log_odds] if spec.reference else []))
    assert ours.item() == pytest.approx(float(loss(*at)), rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("name", ["npo", "sim_npo", "topr"])
@given(logps=st.lists(st.floats(-9, -0.01), min_size=3, max_size=3), ref=st.floats(-20, -0.1), data=st.data())
def test_family_of_responses(name: str, logps: list[float], ref: float, data: st.DataObject) -> None:
    """Of a preferred response and a dispreferred one, three tokens each."""
    hyper = {k: data.draw(values, label=k) for k, values in HYPER[name].items()}

    def odds(logp: torch.Tensor) -> torch.Tensor:
        return logp - torch.log(-torch.expm1(logp))

    log_odds = odds(torch.tensor(2 * logps, dtype=torch.float64))
    ref_log_odds = odds(torch.full((6,), ref / 3, dtype=torch.float64))
    batch = TokenBatch(torch.tensor([0, 0, 0, 1, 1, 1]), torch.tensor([True, False]), ref_log_odds=ref_log_odds)
    constraint = objective_spec(partial(OBJECTIVES[name], **hyper)).constraint
    assert constraint is not None
    found = zip(OBJECTIVES[name](log_odds, batch, **hyper).tolist(), constraint(log_odds, batch).tolist(), strict=True)
    for sign, ours in zip((1, -1), found, strict=True):
        *expected, names = evaluated(name, sign)
        at = [({"logp": sum(logps), "ref": ref, "length": 3} | hyper)[symbol] for symbol in names]
        assert ours == pytest.approx([float(e(*at)) for e in expected], rel=1e-8, abs=1e-12)


@pytest.mark.parametrize("name", ["unlikelihood", "bnf"])
def test_unlikelihood(name: str) -> None:
    """The proved derivatives are autograd's, through the library."""
    import unlikelihood as claim  # type: ignore[import-not-found]

    logits = torch.tensor([[-0.5, 0.3, 1.0, -2.0]], dtype=torch.float64, requires_grad=True)
    p, p_ref = logits.softmax(-1)[0, 0].item(), 0.3
    assert p < p_ref
    ref_log_odds = torch.tensor([p_ref], dtype=torch.float64).logit()
    batch = TokenBatch(torch.tensor([0]), torch.tensor([False]), ref_log_odds=ref_log_odds)
    OBJECTIVES[name](token_log_odds(logits, TARGET)[0], batch).sum().backward()
    assert logits.grad is not None
    for k in range(4):
        of, z = claim.gradients(4, k)
        value = sp.lambdify((*z, claim.r), of[name], "math")(*logits[0].tolist(), p_ref)
        assert logits.grad[0, k].item() == pytest.approx(value, rel=1e-12)


@pytest.mark.parametrize("name", ["bnf", "bnf_one_sided"])
def test_one_sided(name: str) -> None:
    """A step of bnf_core's gradient on a preferred token moves time in the closed form by the same step."""
    import one_sided  # type: ignore[import-not-found]

    expression = one_sided.time_bnf() if name == "bnf" else one_sided.time_one_sided()
    time = sp.lambdify((one_sided.x, one_sided.x0, one_sided.x1), expression, "math")
    x0, x1, step = 1e-4, 0.7, 1e-6
    batch = TokenBatch(torch.tensor([0]), torch.tensor([True]), ref_log_odds=torch.tensor([x1], dtype=torch.float64).log())
    for x in (1e-3, 0.1, 0.6):
        log_odds = torch.tensor([x], dtype=torch.float64).log().requires_grad_()
        (slope,) = torch.autograd.grad(OBJECTIVES[name](log_odds, batch).sum(), log_odds)
        moved = x * math.exp(-slope.item() * step)
        assert time(moved, x0, x1) - time(x, x0, x1) == pytest.approx(step, rel=1e-3)


def three_digits(value: float) -> str:
    return f"{value:#.3g}".rstrip(".")


COLLAPSE = {  # log pi after t = 10, 100, 1000 from pi = pi_ref = 1/2
    "log_likelihood": ["-9.00", "-99.0", "-999"],
    "bnf": ["-2.28", "-4.58", "-6.90"],
    "wga": ["-2.01", "-4.52", "-6.89"],
    "tnpo": ["-3.27", "-5.93", "-8.29"],
    "tnpo, beta = 0.1": ["-7.47", "-29.5", "-53.4"],
    "ppo_clip": ["-0.916"] * 3,
}


def test_t3_family() -> None:
    """The table, to three digits; where there is a closed form, it gives the time back."""
    import t3_family as t3  # type: ignore[import-not-found]

    found = t3.table()
    assert {row: list(map(three_digits, found[row])) for row in COLLAPSE} == COLLAPSE
    published = re.findall(r"^\| `(\w+)` \|.*\| (-[\d.]+), (-[\d.]+), (-[\d.]+) \|", (PROOFS / "README.md").read_text(), re.M)
    assert {name: list(map(three_digits, found[name])) for name in t3.FLOWS} == {name: values for name, *values in published}

    checked = 0
    for name, flow in t3.FLOWS.items():
        if flow.time is not None:
            logp = t3.log_likelihoods(name, [0.5, 10.0], flow.at)
            closed = sp.lambdify(t3.x, flow.time.subs(t3.x0, 1), "math")
            times = [closed(math.exp(x) / -math.expm1(x)) for x in logp]
            assert times[0] == pytest.approx(0.5, rel=1e-6), name
            assert (flow.stop is None) == (times[1] == pytest.approx(10, rel=1e-6)), name
            checked += 1
    assert checked == 11


def test_t3_family_has_the_defaults_of_the_library() -> None:
    import t3_family as t3

    for name in t3.FLOWS:
        takes = inspect.signature(OBJECTIVES[name]).parameters
        ours = {symbol.name: value for symbol, value in t3.defaults(name).items() if symbol.name in takes}
        assert ours == {k: takes[k].default for k in ours}
        used = {s.name for s in t3.FLOWS[name].w.free_symbols} - {"p", "r"}
        assert used <= ours.keys()
