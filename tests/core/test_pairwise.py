"""Every objective against its closed-form constraint, and the properties that all of them share."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import mpmath as mp
import oracle
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from implementations import available
from strategies import HYPER, PairCase, pair_cases
from tolerances import assert_close, scale
from torch import Tensor

from bnf_core import (
    OBJECTIVES,
    PAIRWISE,
    PairLogps,
    TokenBatch,
    bnf_weight,
    constraints,
    linear_log_odds,
    objective_spec,
    pair_logps,
    reference,
    sequence_logps,
    token_log_odds,
)
from bnf_core.head import IMPLEMENTATIONS
from bnf_core.objectives.margin import log1mexp

every_constraint = pytest.mark.parametrize("name", constraints.CONSTRAINTS)


def draw_hyper(data: st.DataObject, name: str) -> dict[str, float]:
    return {key: data.draw(strategy, label=key) for key, strategy in HYPER[name].items()}


def leaf_gradients(loss: Callable[[Tensor, TokenBatch], Tensor], case: PairCase) -> tuple[Tensor, Tensor]:
    log_odds = case.log_odds.clone().requires_grad_()
    value = loss(log_odds, case.batch)
    value.sum().backward()
    assert log_odds.grad is not None
    return value.detach(), log_odds.grad


@every_constraint
@given(data=st.data())
def test_autograds_coefficient_is_the_constraint(name: str, data: st.DataObject) -> None:
    """Eq. 3: grad L = -C_w grad log pi(y_w) + C_l grad log pi(y_l), with grad log sigmoid(l) = sigmoid(-l) per token."""
    case, hyper = data.draw(pair_cases()), draw_hyper(data, name)
    _, gradient = leaf_gradients(lambda x, batch: OBJECTIVES[name](x, batch, **hyper), case)
    c_w, c_l = constraints.CONSTRAINTS[name](pair_logps(case.log_odds, case.batch), **hyper)
    chosen, rejected = case.batch.pairs()
    coefficient = torch.zeros(case.batch.responses, dtype=torch.float64)
    coefficient[chosen], coefficient[rejected] = -c_w, c_l
    expected = coefficient[case.batch.response] * torch.sigmoid(-case.log_odds)
    torch.testing.assert_close(gradient, expected, rtol=1e-8, atol=1e-300)


@given(case=pair_cases(), beta=st.floats(0.01, 5), z0=st.floats(-3, 10), weights=st.tuples(st.floats(0, 2), st.floats(0, 2)))
def test_ktos_coefficient_is_its_constraint(case: PairCase, beta: float, z0: float, weights: tuple[float, float]) -> None:
    hyper = {"beta": beta, "lambda_d": weights[0], "lambda_u": weights[1], "z0": z0}
    _, gradient = leaf_gradients(lambda x, batch: OBJECTIVES["kto_fixed"](x, batch, **hyper), case)
    batch = case.batch
    assert batch.ref_log_odds is not None
    ratio = sequence_logps(case.log_odds, batch) - sequence_logps(batch.ref_log_odds, batch)
    c = constraints.kto_constraint(ratio, batch.preferred, **hyper)
    expected = (-batch.sign.double() * c)[batch.response] * torch.sigmoid(-case.log_odds)
    torch.testing.assert_close(gradient, expected, rtol=1e-8, atol=1e-300)


@every_constraint
@given(data=st.data())
def test_constraints_are_not_negative_and_push_the_right_way(name: str, data: st.DataObject) -> None:
    """All but IPO's, whose square pulls back once the margin is reached."""
    case, hyper = data.draw(pair_cases()), draw_hyper(data, name)
    c_w, c_l = constraints.CONSTRAINTS[name](pair_logps(case.log_odds, case.batch), **hyper)
    if name == "ipo_avg":
        assert torch.equal(c_w > 0, c_l > 0)
    elif name == "ipo":
        pairs = pair_logps(case.log_odds, case.batch)
        r_w, r_l = pairs.log_ratios
        assert torch.equal(c_w > 0, r_w - r_l < 1 / (2 * hyper["tau"])) or (c_w.abs() < 1e-9).any()
    else:
        assert (c_w >= 0).all()
        assert (c_l >= 0).all()


def swap(case: PairCase) -> TokenBatch:
    return replace(case.batch, preferred=~case.batch.preferred)


@pytest.mark.parametrize(
    ("name", "margin"),
    [
        ("dpo", lambda loss: torch.log(torch.expm1(loss))),  # L = log(1 + e^-h)
        ("nll_pll", lambda loss: loss),
        ("r_dpo", lambda loss: torch.log(torch.expm1(loss))),
        ("ipo", None),
    ],
)
@given(case=pair_cases())
def test_swapping_the_sides_negates_the_margin(name: str, margin: Callable[[Tensor], Tensor] | None, case: PairCase) -> None:
    ours, theirs = OBJECTIVES[name](case.log_odds, case.batch), OBJECTIVES[name](case.log_odds, swap(case))
    if margin is None:  # (h - 5)^2 and (-h - 5)^2: their difference is -20 h
        pairs = pair_logps(case.log_odds, case.batch)
        r_w, r_l = pairs.log_ratios
        torch.testing.assert_close(ours - theirs, -20 * (r_w - r_l), rtol=1e-9, atol=1e-9)
    else:
        normal = (ours > 1e-8) & (theirs > 1e-8) if name != "nll_pll" else torch.ones_like(ours, dtype=torch.bool)
        torch.testing.assert_close(margin(ours)[normal], -margin(theirs)[normal], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", PAIRWISE)
@given(case=pair_cases(), seed=st.integers(0, 2**16))
def test_order_does_not_matter(name: str, case: PairCase, seed: int) -> None:
    """Permuting tokens, responses and the ids of pairs permutes the losses and nothing else."""
    generator = torch.Generator().manual_seed(seed)
    batch = case.batch
    assert batch.pair is not None
    assert batch.ref_log_odds is not None
    losses = PAIRWISE[name](case.log_odds, batch)
    tokens = torch.randperm(len(case.log_odds), generator=generator)
    responses = torch.randperm(batch.responses, generator=generator)
    shuffled = TokenBatch(
        responses.argsort()[batch.response][tokens],
        batch.preferred[responses],
        pair=-batch.pair[responses] + 10,
        ref_log_odds=batch.ref_log_odds[tokens],
    )
    torch.testing.assert_close(PAIRWISE[name](case.log_odds[tokens], shuffled), losses.flip(0), rtol=1e-9, atol=1e-9)


DETACHED = ("wga", "satimp", "cispo", "dppo_tv", "topr")  # as published: a factor that is no function of the policy


@pytest.mark.parametrize("name", OBJECTIVES)
def test_gradcheck(name: str) -> None:
    torch.manual_seed(1)
    response = torch.tensor([0, 0, 0, 1, 2, 2, 3, 3])
    batch = TokenBatch(
        response,
        torch.tensor([True, False, False, True]),
        torch.tensor([0, 0, 1, 1]),
        ref_log_odds=torch.randn(8, dtype=torch.float64),
        z0=torch.tensor(0.3, dtype=torch.float64),
    )
    log_odds = torch.randn(8, dtype=torch.float64, requires_grad=True)
    if name.startswith("bnf") or name in DETACHED:  # a constant of the gradient: hold it where autograd holds it
        _, gradient = leaf_gradients(OBJECTIVES[name], PairCase(log_odds.detach(), batch))
        epsilon = 1e-6
        for t in range(8):
            moved = [
                _with_fixed_target(
                    name, log_odds.detach(), batch, log_odds.detach() + step * torch.eye(8, dtype=torch.float64)[t]
                )
                for step in (epsilon, -epsilon)
            ]
            assert ((moved[0] - moved[1]) / (2 * epsilon)).item() == pytest.approx(gradient[t].item(), rel=1e-6, abs=1e-9)
    else:
        assert torch.autograd.gradcheck(lambda x: OBJECTIVES[name](x, batch), (log_odds,))


def _with_fixed_target(name: str, at: Tensor, batch: TokenBatch, log_odds: Tensor) -> Tensor:
    """Sum of the losses at `log_odds` with the weights that they have at `at`: finite differences of a stop-gradient."""
    assert batch.ref_log_odds is not None
    spec = objective_spec(OBJECTIVES[name])
    if spec.per == "response":
        assert spec.constraint is not None
        return (-batch.sign.double() * spec.constraint(at, batch) * sequence_logps(log_odds, batch)).sum()
    w = bnf_weight(at, batch.ref_log_odds)
    if spec.per == "token":
        w = spec.token_constraint(at, batch.ref_log_odds, batch.sign.double()[batch.response])
    losses = -batch.sign.double() * batch.mean(w * torch.nn.functional.logsigmoid(log_odds))
    if name == "bnf_contrastive":
        r_w, r_l = pair_logps(at, batch).log_ratios
        chosen, rejected = batch.pairs()
        return (torch.sigmoid(0.1 * (r_l - r_w)) * (losses[chosen] + losses[rejected])).sum()
    if name == "bnf_binary":  # BCE's target is f_y, not w: f_y = w + (1 - w) pi_y
        f_y = w + (1 - w) * torch.sigmoid(at)
        bce = torch.nn.functional.binary_cross_entropy_with_logits(log_odds, f_y, reduction="none")
        return (batch.sign.double() * batch.mean(bce)).sum()
    return losses.sum()


@pytest.mark.parametrize("implementation", available(IMPLEMENTATIONS))
@every_constraint
def test_constraints_from_full_logits_and_from_the_head(name: str, implementation: str) -> None:
    """The readable path and the one that never holds (tokens, vocab): same values, same gradients to the hidden states."""
    torch.manual_seed(2)
    sequences, positions, dim, vocab = 6, 5, 4, 9
    labels = torch.randint(vocab, (sequences, positions))
    labels[torch.rand(sequences, positions) < 0.3] = -100
    labels[:, 0] = 1
    weight, ref_weight = torch.randn(2, vocab, dim, dtype=torch.float64)
    preferred = torch.tensor([True] * 3 + [False] * 3)

    hidden = torch.randn(sequences, positions, dim, dtype=torch.float64, requires_grad=True)
    pairs = PairLogps(*reference.pair_logps(hidden @ weight.T, hidden.detach() @ ref_weight.T, labels))
    readable = constraints.CONSTRAINTS[name](pairs)

    same = hidden.detach().clone().requires_grad_()
    mask = labels != -100
    options: dict[str, Any] = {"implementation": implementation, "chunk_size": 4}
    log_odds, _ = linear_log_odds(same[mask], weight, labels[mask], **options)
    ref_log_odds, _ = linear_log_odds(same[mask].detach(), ref_weight, labels[mask], **options)
    response = torch.arange(sequences).unsqueeze(1).expand_as(labels)[mask]
    batch = TokenBatch(response, preferred, torch.tensor([0, 1, 2, 0, 1, 2]), ref_log_odds=ref_log_odds)
    efficient = constraints.CONSTRAINTS[name](pair_logps(log_odds, batch))

    for ours, theirs in zip(efficient, readable, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    if readable[0].requires_grad:
        sum(c.sum() for c in readable).backward()  # type: ignore[union-attr]
        sum(c.sum() for c in efficient).backward()  # type: ignore[union-attr]
        torch.testing.assert_close(same.grad, hidden.grad, rtol=1e-8, atol=1e-12)


def test_dpo_through_the_head_is_dpo_on_full_logits() -> None:
    torch.manual_seed(3)
    logits, ref_logits = torch.randn(2, 4, 6, 7, dtype=torch.float64)
    labels = torch.randint(7, (4, 6))
    pairs = PairLogps(*reference.pair_logps(logits, ref_logits, labels))
    r_w, r_l = pairs.log_ratios
    expected = -torch.nn.functional.logsigmoid(0.1 * (r_w - r_l))
    response = torch.arange(4).repeat_interleave(6)
    ref, _ = token_log_odds(ref_logits.flatten(0, 1), labels.flatten())
    batch = TokenBatch(response, torch.tensor([True, True, False, False]), torch.tensor([0, 1, 0, 1]), ref_log_odds=ref)
    actual = OBJECTIVES["dpo"](token_log_odds(logits.flatten(0, 1), labels.flatten())[0], batch)
    torch.testing.assert_close(actual, expected)


def test_kinks_take_the_subgradient_zero() -> None:
    batch = TokenBatch(torch.tensor([0, 1]), torch.tensor([True, False]), torch.tensor([0, 0]), ref_log_odds=torch.zeros(2))
    for name, hyper in (("slic_hf", {"delta": 0.0, "lambda_": 0.0}), ("dpop", {"beta": 1.0, "lambda_": 7.0})):
        case = PairCase(torch.zeros(2), batch)
        _, gradient = leaf_gradients(lambda x, b, n=name, h=hyper: OBJECTIVES[n](x, b, **h), case)  # type: ignore[misc]
        c_w, c_l = constraints.CONSTRAINTS[name](pair_logps(case.log_odds, batch), **hyper)
        torch.testing.assert_close(gradient, torch.stack([-c_w[0], c_l[0]]) * 0.5)
    assert c_w == c_l == 0.5  # DPOP at r_w = 0: the penalty does not act


def test_contrastive_bnf_is_bnf_where_policy_is_reference() -> None:
    log_odds = torch.randn(4, dtype=torch.float64)
    batch = TokenBatch(
        torch.tensor([0, 1, 2, 3]), torch.tensor([True, False, True, False]), torch.tensor([0, 0, 1, 1]), ref_log_odds=log_odds
    )
    plain, ours = OBJECTIVES["bnf"](log_odds, batch), OBJECTIVES["bnf_contrastive"](log_odds, batch)
    torch.testing.assert_close(ours.mean(), plain.mean())


SINGLE = TokenBatch(torch.tensor([0, 1]), torch.tensor([True, False]), ref_log_odds=torch.zeros(2), z0=torch.tensor(0.5))
PAIRED = replace(SINGLE, pair=torch.tensor([0, 0]))
BAD = {
    "unpaired": (lambda: OBJECTIVES["dpo"](torch.zeros(2), SINGLE), "batch.pair: expected the pair of each response"),
    "one-unpaired": (
        lambda: OBJECTIVES["ipo"](torch.zeros(2), replace(SINGLE, pair=torch.tensor([0, -1]))),
        "every response in a pair .* row 1 has none",
    ),
    "two-preferred": (
        lambda: OBJECTIVES["simpo"](torch.zeros(2), replace(PAIRED, preferred=torch.tensor([True, True]))),
        "one preferred and one dispreferred response in each pair",
    ),
    "pair-of-four": (
        lambda: TokenBatch(torch.arange(4), torch.tensor([True, False, True, False]), torch.zeros(4, dtype=torch.long)).pairs(),
        "one preferred and one dispreferred response in each pair",
    ),
    "no-reference": (lambda: OBJECTIVES["dpo"](torch.zeros(2), replace(PAIRED, ref_log_odds=None)), "batch.ref_log_odds"),
    "kto-no-reference": (lambda: OBJECTIVES["kto"](torch.zeros(2), replace(SINGLE, ref_log_odds=None)), "batch.ref_log_odds"),
    "kto-no-z0": (
        lambda: OBJECTIVES["kto"](torch.zeros(2), replace(SINGLE, z0=None)),
        "batch.z0: expected KTO's reference point",
    ),
    "side": (
        lambda: OBJECTIVES["bnf"](torch.zeros(2), SINGLE, side="left"),
        "side: expected one of both, dispreferred, got 'left'",
    ),
    "share": (
        lambda: OBJECTIVES["bdpo"](torch.zeros(2), PAIRED, lambda_=1.5),
        "lambda_: expected a number above 0 and at most 1",
    ),
    "npo-no-reference": (lambda: OBJECTIVES["npo"](torch.zeros(2), replace(SINGLE, ref_log_odds=None)), "batch.ref_log_odds"),
    "beta": (lambda: OBJECTIVES["dpo"](torch.zeros(2), PAIRED, beta=0), "beta: expected a positive number, got 0"),
    "nan": (lambda: OBJECTIVES["simpo"](torch.zeros(2), PAIRED, beta=float("nan")), "beta: expected a finite positive number"),
    "tau": (lambda: OBJECTIVES["ipo"](torch.zeros(2), PAIRED, tau=-1.0), "tau: expected a positive number"),
    "lambda": (lambda: OBJECTIVES["orpo"](torch.zeros(2), PAIRED, lambda_=-1.0), "lambda_: expected a non-negative number"),
    "log-odds": (lambda: OBJECTIVES["nll_pll"](torch.zeros(3), PAIRED), r"log_odds: expected shape \(2,\)"),
    "constraint-input": (lambda: constraints.dpo_constraint((1, 2)), "pairs: expected a PairLogps"),  # type: ignore[arg-type]
    "kto-constraint": (
        lambda: constraints.kto_constraint(torch.zeros(2), torch.tensor([1, 0])),
        "preferred: expected a bool tensor",
    ),
}


@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.parametrize(("call", "message"), BAD.values(), ids=BAD)
def test_bad_input_is_named(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("name", OBJECTIVES)
def test_certain_tokens_give_no_nan(name: str) -> None:
    """Where nothing but the target is possible, l = inf and log pi = 0: a legal limit, for either side or both."""
    labels, zeros = torch.tensor([True, False]), torch.zeros(2)
    batch = TokenBatch(torch.tensor([0, 1]), labels, torch.tensor([0, 0]), ref_log_odds=zeros, z0=zeros[0])
    for values in ([torch.inf, 0.0], [0.0, torch.inf], [torch.inf, torch.inf]):
        log_odds = torch.tensor(values, requires_grad=True)
        loss = OBJECTIVES[name](log_odds, batch)
        loss.sum().backward()
        assert loss.isfinite().all()
        assert log_odds.grad is not None
        assert log_odds.grad.isfinite().all(), values
        assert (log_odds.grad[log_odds.isposinf()] == 0).all()  # nothing moves what is certain


# --- ORPO, whose odds are infinite where a likelihood rounds to 1 ---------------------------------------------------


def pair_of(chosen: list[float], rejected: list[float], dtype: torch.dtype) -> PairCase:
    log_odds = torch.tensor(chosen + rejected, dtype=dtype)
    response = torch.tensor([0] * len(chosen) + [1] * len(rejected))
    return PairCase(log_odds, TokenBatch(response, torch.tensor([True, False]), torch.tensor([0, 0])))


CERTAIN = [-30.0, 17.4, 20.0, 33.0, 104.0, 1000.0]
SIDES = [(chosen, rejected) for chosen in CERTAIN for rejected in CERTAIN]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("apart", [[0.0], [0.0, 2.5], [0.0, 0.0, 40.0]], ids=["1-token", "2-tokens", "3-tokens"])
def test_orpo_however_certain_the_responses(dtype: torch.dtype, apart: list[float]) -> None:
    """Value and gradient against 520 digits: one token's log odds(P) is its l, and stays l where P rounds to 1."""
    for chosen, rejected in SIDES:
        case = pair_of([chosen + d for d in apart], [rejected + d for d in apart], dtype)
        loss, gradient = leaf_gradients(lambda x, batch: OBJECTIVES["orpo"](x, batch, lambda_=0.6), case)
        exact_loss, exact_gradient = oracle.orpo(*case.log_odds.tensor_split(2), lambda_=0.6)
        size = scale(case.log_odds)
        assert_close(loss, oracle.to_tensor([exact_loss], loss), units=16, size=size, absolute=1)
        assert_close(gradient, oracle.to_tensor(exact_gradient, gradient), units=16, size=size)


@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 80.0), (torch.float64, 700.0)], ids=str)
def test_orpos_constraint_however_certain_the_responses(dtype: torch.dtype, most: float) -> None:
    """Autograd's coefficient wherever grad log pi is a number of the dtype; finite where log pi itself rounds to 0."""
    for chosen, rejected in [
        *SIDES,
        (most, most),
        (most, 0.0),
        (0.0, most),
        (torch.inf, 0.0),
        (0.0, torch.inf),
        (torch.inf,) * 2,
    ]:
        case = pair_of([chosen], [rejected], dtype)
        pairs = pair_logps(case.log_odds.requires_grad_(), case.batch)
        c_w, c_l = constraints.CONSTRAINTS["orpo"](pairs, lambda_=0.6)
        (slope,) = torch.autograd.grad((c_w + c_l).sum(), case.log_odds)
        assert torch.stack([c_w, c_l]).isfinite().all(), (chosen, rejected)
        assert not slope.isnan().any(), (chosen, rejected)
        if max(chosen, rejected) <= most:
            _, gradient = leaf_gradients(
                lambda x, batch: OBJECTIVES["orpo"](x, batch, lambda_=0.6), replace(case, log_odds=case.log_odds.detach())
            )
            expected = torch.cat([-c_w, c_l]).detach() * torch.sigmoid(-case.log_odds.detach())
            assert_close(gradient, expected, units=64, size=scale(case.log_odds.detach()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_log1mexp_keeps_every_digit(dtype: torch.dtype) -> None:
    """log(1 - e^x) and its derivative -1 / (e^-x - 1), on either side of -log 2, where the two forms of it meet."""
    sizes = [1e-30, 1e-12, 1e-7, 1e-3, 0.1, 0.5, 0.693, 0.6932, 0.8, 2.0, 20.0, 60.0]
    x = torch.tensor([-size for size in sizes], dtype=dtype, requires_grad=True)
    log1mexp(x).sum().backward()
    value, slope = zip(*((mp.log(-mp.expm1(v)), -1 / mp.expm1(-v)) for v in map(mp.mpf, x.tolist())), strict=True)
    assert_close(log1mexp(x), oracle.to_tensor(list(value), x), units=4)
    assert x.grad is not None
    assert_close(x.grad, oracle.to_tensor(list(slope), x), units=4)


def test_log1mexp_at_its_ends() -> None:
    x = torch.tensor([0.0, -torch.inf, 0.1, torch.nan], requires_grad=True)
    value = log1mexp(x)
    value[:2].sum().backward()
    assert value[:2].tolist() == [-torch.inf, 0]
    assert value[2:].isnan().all()
    assert x.grad is not None
    assert x.grad.tolist() == [0, 0, 0, 0]
