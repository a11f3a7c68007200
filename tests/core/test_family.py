"""The family of weights: what each is, where it is 1, what it does at the ends, and that its objectives move by it."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import PairCase, pair_cases
from torch import Tensor
from torch.nn.functional import logsigmoid
from torch.utils._python_dispatch import TorchDispatchMode

from bnf_core import OBJECTIVES, TokenBatch, linear_token_loss, objective_spec, weighted, weights


@dataclass(frozen=True)
class Row:
    """What a weight's paper says of it.

    Attributes:
      hyper: hyper-parameters that are tried.
      low, high: its range.
      at_reference: it is 1 where the policy is the reference.
      rises: with the likelihood.
    """

    low: float = 0
    high: float = math.inf
    at_reference: bool = True
    rises: bool = True
    hyper: tuple[dict[str, float], ...] = ({},)


TOKENS: dict[str, Row] = {
    "one": Row(1, 1),
    "bnf": Row(0, 1),
    "odds": Row(at_reference=False),
    "prob": Row(0, 1, at_reference=False, hyper=({}, {"beta": 0.1}, {"beta": 5.0})),
    "satimp": Row(
        0, 1, at_reference=False, rises=False, hyper=({}, {"beta1": 0.0, "beta2": 1.0}, {"beta1": 2.0, "beta2": 0.0})
    ),
    "tnpo": Row(0, 2, hyper=({}, {"beta": 0.1}, {"beta": 5.0})),
    "ppo_clip": Row(hyper=({}, {"epsilon": 0.5})),
    "cispo": Row(0.8, 1.2, hyper=({}, {"epsilon_low": 0.1, "epsilon_high": 0.1})),
    "sapo": Row(rises=False, hyper=({}, {"tau": 3.0})),
    "dppo_tv": Row(0, 10, hyper=({}, {"delta": 0.01})),
}
RESPONSES: dict[str, Row] = {
    "npo": Row(0, 2, hyper=({}, {"beta": 2.0})),
    "sim_npo": Row(0, 2, at_reference=False, hyper=({}, {"gamma": 1.5})),
    "topr": Row(0, 1),
}
EVERY = TOKENS | RESPONSES
CASES = [pytest.param(name, hyper, id=f"{name}-{hyper}") for name, row in EVERY.items() for hyper in row.hyper]
LOG_ODDS = torch.tensor([-1e4, -120, -30, -8, -3, -1, -0.2, 0, 0.2, 1, 3, 8, 30, 120, 1e4, math.inf], dtype=torch.float64)


def weight(name: str, hyper: dict[str, float], log_odds: Tensor, ref_log_odds: Tensor) -> Tensor:
    """Of each token; of a response, of responses of one token."""
    w: Callable[..., Tensor] = getattr(weights, name)
    if name in TOKENS:
        return w(log_odds, ref_log_odds, **hyper)
    response, preferred = torch.arange(len(log_odds)), torch.zeros(len(log_odds), dtype=torch.bool)
    return w(log_odds, TokenBatch(response, preferred, ref_log_odds=ref_log_odds), **hyper)


def test_every_weight_is_here() -> None:
    assert set(EVERY) | {"weighted"} == set(weights.__all__)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("name", "hyper"), CASES)
def test_range_and_saturation(name: str, hyper: dict[str, float], dtype: torch.dtype) -> None:
    """From hopeless to certain, for the policy and for the reference: finite, in its range, with the digits of float64."""
    policy, reference = torch.cartesian_prod(LOG_ODDS, LOG_ODDS).to(dtype).unbind(1)
    w = weight(name, hyper, policy, reference)
    assert w.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert not w.requires_grad
    assert w.isfinite().all()
    assert (w >= EVERY[name].low * (1 - 1e-6)).all()
    assert (w <= EVERY[name].high * (1 + 1e-6)).all()
    exact = weight(name, hyper, policy.double(), reference.double())
    some = (exact < 1e30) & (exact > 1e-30)  # beyond, float32 counts it as its greatest number, or as 0
    torch.testing.assert_close(w[some].double(), exact[some], rtol=2e-4, atol=0)


@pytest.mark.parametrize(("name", "hyper"), CASES)
@settings(max_examples=10)
@given(ref=st.floats(-20, 20))
def test_1_at_the_reference(name: str, hyper: dict[str, float], ref: float) -> None:
    at = torch.tensor([ref], dtype=torch.float64)
    w = weight(name, hyper, at, at)
    if EVERY[name].at_reference:
        torch.testing.assert_close(w, torch.ones_like(w))
    else:  # it does not look at the reference
        assert torch.equal(w, weight(name, hyper, at, at + 1))


@pytest.mark.parametrize(("name", "hyper"), [case for case in CASES if EVERY[case.values[0]].rises])
@settings(max_examples=10)
@given(ref=st.floats(-5, 5))
def test_it_rises_with_the_likelihood(name: str, hyper: dict[str, float], ref: float) -> None:
    policy = torch.linspace(-30, 12, 500, dtype=torch.float64)
    assert (weight(name, hyper, policy, torch.full_like(policy, ref)).diff() >= -1e-12).all()


@pytest.mark.parametrize("name", [name for name, row in EVERY.items() if not row.rises])
def test_it_has_a_top(name: str) -> None:
    policy = torch.linspace(-30, 12, 500, dtype=torch.float64)
    w = weight(name, {}, policy, torch.full_like(policy, -3))
    top = int(w.argmax())
    assert 0 < top < 499
    assert (w[: top + 1].diff() >= 0).all()
    assert (w[top:].diff() <= 0).all()


def test_where_bnf_stands() -> None:
    """Unlikelihood's below pi_ref = 1/2; a hard minimum where token-wise NPO (beta 1) of the odds has a soft one."""
    below, half = torch.linspace(-20, 0, 50, dtype=torch.float64), torch.zeros(50, dtype=torch.float64)
    torch.testing.assert_close(weights.bnf(below, half), weights.odds(below))
    policy, reference = 4 * torch.randn(2, 1000, dtype=torch.float64)
    ratio = (policy - reference).exp()
    soft = 2 * ratio / (1 + ratio)
    assert (weights.bnf(policy, reference) <= soft.clamp(max=1) + 1e-12).all()
    assert (soft <= 2 * weights.bnf(policy, reference)).all()


@pytest.mark.parametrize("name", ["ppo_clip", "dppo_tv"])
def test_a_trust_region_is_of_either_label(name: str) -> None:
    """A preferred token is let go above, a dispreferred one below."""
    policy, reference = torch.tensor([2.0, -2.0]), torch.zeros(2)
    w = getattr(weights, name)
    assert (w(policy, reference, torch.ones(2)) == 0).tolist() == [True, False]
    assert (w(policy, reference) == 0).tolist() == (w(policy, reference, -torch.ones(2)) == 0).tolist() == [False, True]


# --- objectives ------------------------------------------------------------------------------------------------------

# the published loss of each weight, and its hyper-parameters under the weight's names
PUBLISHED: dict[str, str] = {"one": "log_likelihood", "odds": "unlikelihood", "prob": "wga"}


@pytest.mark.parametrize("side", ["both", "dispreferred"])
@pytest.mark.parametrize(("name", "hyper"), CASES)
@settings(max_examples=15)
@given(case=pair_cases(max_pairs=2, max_length=3))
def test_weighted_moves_by_the_weight(name: str, hyper: dict[str, float], side: Any, case: PairCase) -> None:
    """-s w grad log pi, by central differences with w held; one-sided, preferred responses have w = 1."""
    log_odds, batch = case.log_odds.clone().requires_grad_(), case.batch
    losses = weighted(getattr(weights, name), side=side, **hyper)(log_odds, batch)
    losses.sum().backward()
    w: Any = partial(getattr(weights, name), **hyper)
    sign = batch.sign.double()
    if name in RESPONSES:
        of_response = w(case.log_odds, batch)
        scale = torch.where(batch.preferred & (side == "dispreferred"), 1, of_response)[batch.response]
    else:
        takes_sign = (sign[batch.response],) if name in ("ppo_clip", "dppo_tv") else ()
        scale = w(case.log_odds, batch.ref_log_odds, *takes_sign)
        scale = (
            torch.where(batch.preferred[batch.response] & (side == "dispreferred"), 1, scale) / batch.lengths[batch.response]
        )
    step = 1e-6
    difference = (logsigmoid(case.log_odds + step) - logsigmoid(case.log_odds - step)) / (2 * step)
    expected = -sign[batch.response] * scale * difference
    torch.testing.assert_close(log_odds.grad, expected, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("name", sorted(TOKENS))
@settings(max_examples=20)
@given(case=pair_cases(max_pairs=2, max_length=3), side=st.sampled_from(["both", "dispreferred"]))
def test_a_published_loss_has_its_weights_gradient(name: str, case: PairCase, side: Any) -> None:
    published = PUBLISHED.get(name, name)
    if name == "one" and side == "dispreferred":
        return  # the same
    told = {} if name == "one" else {"side": side}
    if name == "sapo":  # one tau for both labels, as the weight has
        told |= {"tau_pos": 1.0, "tau_neg": 1.0}
    gradients = []
    for loss in (partial(OBJECTIVES[published], **told), weighted(getattr(weights, name), side=side)):
        log_odds = case.log_odds.clone().requires_grad_()
        loss(log_odds, case.batch).sum().backward()
        assert log_odds.grad is not None
        gradients.append(log_odds.grad)
    torch.testing.assert_close(*gradients, rtol=1e-8, atol=1e-300)


@pytest.mark.usefixtures("unchecked_shapes")
def test_weighted_says_what_it_is() -> None:
    per = {name: objective_spec(weighted(getattr(weights, name))).per for name in EVERY}
    assert per == dict.fromkeys(TOKENS, "token") | dict.fromkeys(RESPONSES, "response")
    asked = {name for name in TOKENS if objective_spec(weighted(getattr(weights, name))).reference}
    assert asked == {"bnf", "tnpo", "ppo_clip", "cispo", "sapo", "dppo_tv"}
    assert weighted(weights.tnpo, beta=2.0).__name__ == "weighted_tnpo"
    with pytest.raises(ValueError, match=r"side: expected one of both, dispreferred, got 'left'"):
        weighted(weights.bnf, side="left")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="gamma: expected a hyper-parameter of tnpo, which has beta"):
        weighted(weights.tnpo, gamma=1.0)
    with pytest.raises(ValueError, match="beta: expected a positive number, got -1"):
        weighted(weights.tnpo, beta=-1.0)(
            torch.zeros(1), TokenBatch(torch.zeros(1).long(), torch.tensor([True]), ref_log_odds=torch.zeros(1))
        )


def test_a_weight_of_ones_own() -> None:
    def square(log_odds: Tensor, ref_log_odds: Tensor, *, power: float = 2.0) -> Tensor:
        return weights.bnf(log_odds, ref_log_odds) ** power

    batch = TokenBatch(torch.tensor([0, 1]), torch.tensor([True, False]), ref_log_odds=torch.zeros(2))
    log_odds = torch.full((2,), -1.0, requires_grad=True)
    weighted(square, side="dispreferred", power=3.0)(log_odds, batch).sum().backward()
    assert log_odds.grad is not None
    assert log_odds.grad.tolist() == pytest.approx([-1 / (1 + math.exp(-1)), math.exp(-3) / (1 + math.exp(-1))])


def test_one_sided_is_bnf_with_a_side() -> None:
    entropy = torch.rand(4, dtype=torch.float64)
    batch = TokenBatch(
        torch.tensor([0, 0, 1, 1]), torch.tensor([True, False]), ref_log_odds=torch.zeros(4).double(), entropy=entropy
    )
    log_odds = torch.tensor([-1.0, 1, -2, 2], dtype=torch.float64)
    one_sided = OBJECTIVES["bnf_one_sided"](log_odds, batch)
    assert torch.equal(one_sided, OBJECTIVES["bnf"](log_odds, batch, side="dispreferred"))
    assert one_sided[0] == OBJECTIVES["log_likelihood"](log_odds, batch)[0]
    assert one_sided[1] == OBJECTIVES["bnf"](log_odds, batch)[1]


class Products(TorchDispatchMode):
    """How many matrix products have the vocabulary among their axes."""

    def __init__(self, vocab: int) -> None:
        super().__init__()
        self.vocab, self.count = vocab, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in ("mm", "addmm", "bmm", "baddbmm", "matmul", "linear"):
            self.count += any(self.vocab in x.shape for x in args if isinstance(x, Tensor))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", [n for n, o in OBJECTIVES.items() if objective_spec(o).per == "token"])
def test_one_of_tokens_is_three_products(name: str) -> None:
    hidden, weight = torch.randn(5, 6, requires_grad=True), torch.randn(37, 6, requires_grad=True)
    batch = TokenBatch(torch.tensor([0, 0, 0, 1, 1]), torch.tensor([True, False]), ref_log_odds=torch.zeros(5))
    spec = objective_spec(OBJECTIVES[name])
    with Products(37) as products:
        loss, *_ = linear_token_loss(
            hidden, weight, torch.arange(5), spec.weighted_token_loss, *spec.per_token(batch, 1.0), implementation="chunked"
        )
        loss.backward()
    assert products.count == 3


# --- one token under gradient flow -----------------------------------------------------------------------------------

FLOW = {  # log pi at t = 10, 100, 1000 from pi = pi_ref = 1/2
    "one": ({}, (-9, -99, -999)),
    "bnf": ({}, (-2.29, -4.58, -6.90)),
    "odds": ({}, (-2.29, -4.58, -6.90)),
    "prob": ({}, (-2.01, -4.52, -6.89)),
    "tnpo": ({}, (-3.27, -5.93, -8.29)),
    "tnpo-0.1": ({"beta": 0.1}, (-7.5, -29.5, -53.4)),
    "ppo_clip": ({}, (-0.92, -0.92, -0.92)),
}


@pytest.mark.parametrize("name", FLOW)
def test_the_flow_of_one_dispreferred_token(name: str) -> None:
    """dl/dt = -w (1 - pi), in small steps of log time (Heun)."""
    hyper, expected = FLOW[name]
    log_odds, reference, time = torch.zeros(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64), 0.0

    def speed(at: Tensor) -> Tensor:
        return -weight(name.partition("-")[0], hyper, at, reference) * torch.sigmoid(-at)

    found = []
    for until in (10, 100, 1000):
        while time < until:
            step = min(0.01 + 0.02 * time, 2.0, until - time)
            ahead = speed(log_odds)
            log_odds = log_odds + step * (ahead + speed(log_odds + step * ahead)) / 2
            time = until if until - time - step < 1e-12 else time + step
        found.append(logsigmoid(log_odds).item())
    digits = 0.06 if name in ("one", "tnpo-0.1") else 0.006
    assert found == pytest.approx(expected, abs=0.35 if name == "one" else digits)


def test_scores_weigh_the_family_too() -> None:
    batch = TokenBatch(torch.tensor([0, 1]), torch.tensor([True, False]), ref_log_odds=torch.zeros(2))
    loss = weighted(weights.npo)
    log_odds = torch.tensor([-1.0, -2.0])
    scored = loss(log_odds, replace(batch, score=torch.tensor([0.5, -3.0])))
    torch.testing.assert_close(scored, loss(log_odds, batch) * torch.tensor([0.5, 3.0]))
