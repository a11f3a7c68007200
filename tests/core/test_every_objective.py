"""What every objective must come with, and what follows from what it says of itself."""

import inspect
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from implementations import available
from strategies import HYPER, PairCase, pair_cases
from torch import Tensor
from torch.nn.functional import logsigmoid

from bnf_core import (
    OBJECTIVES,
    PAIRWISE,
    Objective,
    TokenBatch,
    bnf,
    constraints,
    linear_log_odds,
    linear_token_loss,
    objective,
    objective_spec,
    pair_logps,
)
from bnf_core.head import IMPLEMENTATIONS
from bnf_core.objectives import UNPAIRED

PROOFS = Path(__file__).parents[2] / "proofs"
every_objective = pytest.mark.parametrize("name", sorted(OBJECTIVES))


def keywords(function: Callable[..., object]) -> dict[str, object]:
    return {k: p.default for k, p in inspect.signature(function).parameters.items() if p.kind is p.KEYWORD_ONLY}


@every_objective
def test_it_comes_with_a_constraint_a_proof_and_a_strategy(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(PROOFS), *sys.path])
    import table2_constraints as proofs  # type: ignore[import-not-found]

    spec = objective_spec(OBJECTIVES[name])
    assert spec.constraint is not None, "a constraint, beside the loss"
    assert name in proofs.PROOFS, "a claim in proofs/"
    assert (PROOFS / proofs.PROOFS[name]).is_file()
    assert name in HYPER, "a strategy for its hyper-parameters, in tests/strategies.py"
    assert HYPER[name].keys() == keywords(OBJECTIVES[name]).keys()
    assert keywords(spec.constraint) in ({}, keywords(OBJECTIVES[name])), "one set of hyper-parameters and defaults"
    assert spec.constraint in vars(constraints).values() or spec.per != "pair", "by name in bnf_core.constraints"


def test_a_constraint_is_bound_to_the_hyper_parameters_that_it_takes() -> None:
    @objective(per="token", reference=False, constraint=lambda log_odds, ref_log_odds: torch.ones_like(log_odds))
    def scaled(log_odds: Tensor, sign: Tensor, *, power: float = 1.0) -> Tensor:
        return -sign * power * logsigmoid(log_odds)

    spec = objective_spec(partial(scaled, power=2.0))
    assert spec.constraint is not None
    assert spec.constraint(torch.zeros(2), torch.zeros(2)).tolist() == [1, 1]
    assert HYPER.keys() == OBJECTIVES.keys()


def test_the_tables_hold_each_of_them_once() -> None:
    assert UNPAIRED | PAIRWISE == OBJECTIVES
    assert not UNPAIRED.keys() & PAIRWISE.keys()
    for name, function in OBJECTIVES.items():
        assert function.__name__ == name  # type: ignore[attr-defined]
        assert (objective_spec(function).per == "pair") == (name in PAIRWISE)
    assert {
        name: objective_spec(f).constraint for name, f in PAIRWISE.items() if name != "bnf_contrastive"
    } == constraints.CONSTRAINTS


def constraint_of_tokens(name: str, case: PairCase, hyper: dict[str, float]) -> Tensor:
    """C of each token: -s C grad log pi(y_t) is its share of the gradient of the sum of losses."""
    batch, spec = case.batch, objective_spec(partial(OBJECTIVES[name], **hyper))
    assert spec.constraint is not None
    assert batch.ref_log_odds is not None
    if spec.per == "token":
        sign = batch.sign.double()[batch.response]
        return spec.token_constraint(case.log_odds, batch.ref_log_odds, sign) / batch.lengths[batch.response]
    if spec.weights_tokens:
        return spec.constraint(case.log_odds, batch)
    if spec.per == "response":
        return spec.constraint(case.log_odds, batch)[batch.response]
    of_response = torch.zeros(batch.responses, dtype=torch.float64)
    for rows, c in zip(batch.pairs(), spec.constraint(pair_logps(case.log_odds, batch)), strict=True):
        of_response[rows] = c
    return of_response[batch.response]


@every_objective
@given(data=st.data())
def test_its_gradient_is_its_constraint(name: str, data: st.DataObject) -> None:
    """grad log sigmoid(l) = sigmoid(-l)."""
    case = data.draw(pair_cases())
    hyper = {key: data.draw(strategy, label=key) for key, strategy in HYPER.get(name, {}).items()}
    log_odds = case.log_odds.clone().requires_grad_()
    OBJECTIVES[name](log_odds, case.batch, **hyper).sum().backward()
    sign = case.batch.sign.double()[case.batch.response]
    expected = -sign * constraint_of_tokens(name, case, hyper) * torch.sigmoid(-case.log_odds)
    rtol, atol = (1e-6, 1e-12) if name == "bnf_binary" else (1e-8, 1e-300)  # pi - f_y cancels
    torch.testing.assert_close(log_odds.grad, expected, rtol=rtol, atol=atol)


BATCH = TokenBatch(
    torch.tensor([0, 2, 0, 1, 2, 2, 3]),
    torch.tensor([True, False, False, True]),
    torch.tensor([0, 0, 1, 1]),
    ref_log_odds=torch.linspace(-2, 2, 7, dtype=torch.float64),
    z0=torch.tensor(0.5),
)


@every_objective
def test_it_needs_a_reference_where_it_says_so(name: str) -> None:
    without = replace(BATCH, ref_log_odds=None)
    log_odds = torch.randn(7, dtype=torch.float64)
    if objective_spec(OBJECTIVES[name]).reference:
        with pytest.raises(ValueError, match=r"^batch\.ref_log_odds: expected the log-odds of the reference"):
            OBJECTIVES[name](log_odds, without)
    else:
        assert torch.equal(OBJECTIVES[name](log_odds, without), OBJECTIVES[name](log_odds, BATCH))


# --- in one pass through the head ------------------------------------------------------------------------------------


@objective(per="token")
def one_sided(log_odds: Tensor, sign: Tensor, ref_log_odds: Tensor, *, power: float = 1.0) -> Tensor:
    """Not linear in s, with a hyper-parameter."""
    w = (log_odds.detach() - ref_log_odds).clamp(max=0).exp() ** power
    return -sign * torch.where(sign > 0, 1, w) * logsigmoid(log_odds)


@objective(per="token", reference=False)
def right_or_wrong(log_odds: Tensor, sign: Tensor) -> Tensor:
    return -logsigmoid(sign * log_odds)


LOCAL: dict[str, Objective] = {n: f for n, f in OBJECTIVES.items() if objective_spec(f).per == "token"}
OWN = {"one_sided": partial(one_sided, power=0.5), "right_or_wrong": right_or_wrong}


def test_these_are_token_local() -> None:
    assert LOCAL.keys() >= {"bnf", "bnf_binary", "log_likelihood"}
    assert all(objective_spec(f).per == "token" for f in OWN.values())
    assert not OWN.keys() & OBJECTIVES.keys()  # a user's own is in no table


# the loss of a token is no part of the kernels: a few of them see every implementation, all see two
MORE = {"bnf", "bnf_binary", *OWN}


@pytest.mark.parametrize("implementation", available(IMPLEMENTATIONS))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", [*LOCAL, *OWN])
def test_one_pass_is_two(name: str, dtype: torch.dtype, implementation: str) -> None:
    """Value, but for constants, and gradients: of the loss per token in the head, and of the objective on its log-odds."""
    if implementation not in ("naive", "chunked") and name not in MORE:
        return
    function = (LOCAL | OWN)[name]
    spec = objective_spec(function)
    hidden, weight = torch.randn(7, 6).to(dtype), torch.randn(11, 6).to(dtype)
    labels = torch.randint(11, (7,))
    options = {"bias": torch.randn(11).to(dtype), "softcap": 20.0, "logit_scale": 0.7, "implementation": implementation}
    batch, scale, found = BATCH.to(hidden.device), 1 / 3, []
    for one_pass in (True, False):
        leaves = [x.clone().requires_grad_() for x in (hidden, weight)]
        if one_pass:
            loss, log_odds, _ = linear_token_loss(
                *leaves, labels, spec.weighted_token_loss, *spec.per_token(batch, scale), chunk_size=3, **options
            )
        else:
            log_odds, _ = linear_log_odds(*leaves, labels, chunk_size=3, **options)
            loss = function(log_odds, batch).sum() * scale
        (2 * loss).backward()
        found.append([loss.detach(), log_odds.detach(), *(x.grad for x in leaves)])
    tolerance = {"rtol": 1e-10, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-5}
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two, **tolerance)


# --- the decorator ---------------------------------------------------------------------------------------------------


def test_hyper_parameters_that_are_bound_go_everywhere() -> None:
    log_odds, sign, ref = torch.randn(3, 7, dtype=torch.float64)
    bound = objective_spec(partial(partial(one_sided, power=3.0), power=2.0))
    assert bound.token_loss is not None
    token_loss = objective_spec(one_sided).token_loss
    assert token_loss is not None
    assert torch.equal(bound.token_loss(log_odds, sign, ref), token_loss(log_odds, sign, ref, power=2.0))
    dpo = objective_spec(partial(OBJECTIVES["dpo"], beta=2.0))
    assert dpo.constraint is not None
    pairs = pair_logps(log_odds, BATCH)
    assert torch.equal(dpo.constraint(pairs)[0], constraints.dpo_constraint(pairs, beta=2.0)[0])


def test_a_function_that_says_nothing() -> None:
    def plain(log_odds: Tensor, batch: TokenBatch) -> Tensor:
        return bnf(log_odds, batch)

    assert objective_spec(plain).per == "response"
    assert objective_spec(plain).reference
    plain.pairwise = True  # type: ignore[attr-defined]
    assert objective_spec(plain).per == "pair"
    assert objective_spec(partial(plain)).per == "pair"


def test_its_signature_is_that_of_an_objective() -> None:
    assert list(inspect.signature(one_sided).parameters) == ["log_odds", "batch", "power"]
    assert keywords(one_sided) == {"power": 1.0}
    assert one_sided.__doc__ == "Not linear in s, with a hyper-parameter."
    described = objective(per="pair")(lambda log_odds, batch: log_odds)
    assert objective_spec(described).per == "pair"


@pytest.mark.usefixtures("unchecked_shapes")
def test_what_is_wrong_is_named() -> None:
    with pytest.raises(ValueError, match="per: expected one of token, response, pair, got 'pairs'"):
        objective(per="pairs")  # type: ignore[call-overload]
    total = objective(per="token")(lambda log_odds, sign, ref_log_odds: log_odds.sum())
    with pytest.raises(ValueError, match=r"<lambda>: expected one loss for each of 7 tokens, got torch.float32 of shape \(\)"):
        total(torch.zeros(7), BATCH)


# --- scores ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(UNPAIRED))
@given(case=pair_cases(), size=st.floats(0, 50), data=st.data())
def test_a_loss_is_linear_in_the_score(name: str, case: PairCase, size: float, data: st.DataObject) -> None:
    """Twice the score is twice the loss and gradient, 0 contributes nothing, +1 and -1 are the labels."""
    hyper = {key: data.draw(values, key) for key, values in HYPER.get(name, {}).items()}
    batch, log_odds = case.batch, case.log_odds.detach().requires_grad_()

    def losses(score: Tensor | None) -> Tensor:
        return OBJECTIVES[name](log_odds, replace(batch, score=score), **hyper)

    plain = losses(None)
    sign = batch.sign.double()
    assert torch.equal(losses(sign), plain)
    torch.testing.assert_close(losses(size * sign), size * plain)
    assert (losses(0 * sign) == 0).all()
    (gradient,) = torch.autograd.grad(losses(size * sign).sum(), log_odds)
    torch.testing.assert_close(gradient, size * torch.autograd.grad(plain.sum(), log_odds)[0])


def test_a_score_is_a_finite_number_with_the_labels_sign() -> None:
    response, preferred = torch.tensor([0, 1]), torch.tensor([True, False])
    TokenBatch(response, preferred, score=torch.tensor([0.5, 0.0]))
    for wrong in ([float("nan"), -1.0], [1.0, 2.0], [float("inf"), -1.0]):
        with pytest.raises(ValueError, match="score: expected finite numbers with the sign of the label"):
            TokenBatch(response, preferred, score=torch.tensor(wrong))
