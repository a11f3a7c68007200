"""The BNF objective from log-odds against the paper's definitions on full logits."""

import inspect
import math
from typing import Any

import mpmath as mp
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import Responses, responses
from tolerances import assert_close, scale
from torch.nn.functional import logsigmoid

from bnf_core import (
    OBJECTIVES,
    PairLogps,
    TokenBatch,
    bnf,
    bnf_binary,
    bnf_target,
    bnf_weight,
    constraints,
    pair_logps,
    reference,
    sequence_logps,
    token_log_odds,
)

HYPER_BATCH = TokenBatch(
    torch.tensor([0, 1]),
    torch.tensor([True, False]),
    torch.tensor([0, 0]),
    ref_log_odds=torch.tensor([0.5, -0.5]),
    z0=torch.tensor(0.25),
)

log_odds_value = st.floats(-50, 50) | st.sampled_from([-700.0, 0.0, 700.0, float("inf")])


def from_log_odds(case: Responses, logits: torch.Tensor) -> torch.Tensor:
    """The loss of eq. 4 by way of one log-odds and one entropy per token."""
    _, z_ref, y, response = case.flat()
    log_odds, entropy = token_log_odds(logits[case.mask], y)
    ref_log_odds, _ = token_log_odds(z_ref, y)
    batch = TokenBatch(response, case.preferred, ref_log_odds=ref_log_odds, entropy=entropy)
    return bnf(log_odds, batch)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@given(data=st.data())
def test_value_and_gradient_are_the_reference(dtype: torch.dtype, data: st.DataObject) -> None:
    case = data.draw(responses(dtype))
    logits = case.logits.clone().requires_grad_()
    losses = from_log_odds(case, logits)
    losses.mean().backward()
    double = case.logits.double(), case.ref_logits.double(), case.labels, case.preferred
    size = scale(case.logits, case.ref_logits)
    assert_close(losses.mean(), reference.bnf_loss(*double), units=64, size=size, absolute=size)
    assert logits.grad is not None
    assert_close(logits.grad, reference.bnf_logit_gradient(*double), units=64, size=size)


@given(case=responses())
def test_target_is_a_mixture(case: Responses) -> None:
    """T1: f = w onehot(y) + (1 - w) pi."""
    z, z_ref, y, _ = case.flat()
    w = bnf_weight(token_log_odds(z, y)[0], token_log_odds(z_ref, y)[0]).unsqueeze(-1)
    target = reference.dynamic_target(z, z_ref, y)
    mixture = w * reference.one_hot_target(z, y) + (1 - w) * z.softmax(-1)
    for ours in (mixture, reference.mixture_target(z, z_ref, y)):
        assert_close(ours, target, units=32, size=scale(z, z_ref), absolute=1)
    padded = reference.mixture_target(case.logits, case.ref_logits, case.labels)
    assert (padded[~case.mask] == 0).all()


@given(case=responses())
def test_policy_as_reference_is_length_normalised_cross_entropy(case: Responses) -> None:
    z, _, y, response = case.flat()
    log_odds, entropy = token_log_odds(z, y)
    batch = TokenBatch(response, case.preferred, ref_log_odds=log_odds, entropy=entropy)
    assert (bnf_weight(log_odds, log_odds) == 1).all()
    nll = -z.log_softmax(-1).gather(-1, y.unsqueeze(-1)).squeeze(-1)
    assert_close(bnf(log_odds, batch), batch.sign * batch.mean(nll), units=16, size=scale(z), absolute=1)


@given(a=st.lists(log_odds_value, min_size=1), b=log_odds_value)
def test_weight_is_the_clipped_odds_ratio(a: list[float], b: float) -> None:
    log_odds = torch.tensor(a, dtype=torch.float64).sort().values.requires_grad_()
    w = bnf_weight(log_odds, torch.full_like(log_odds, b))
    assert not w.requires_grad
    assert ((w >= 0) & (w <= 1)).all()
    assert (w[log_odds >= b] == 1).all()
    assert (w.diff() >= 0).all()
    below = (log_odds < b) & (log_odds > b - 700)
    torch.testing.assert_close(w[below].log(), (log_odds - b)[below].detach(), rtol=1e-12, atol=1e-12)


@given(case=responses(), seed=st.integers(0, 2**16))
def test_order_of_tokens_and_responses_does_not_matter(case: Responses, seed: int) -> None:
    _, _, y, response = case.flat()
    z = torch.randn(len(y), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    ref = z.roll(1)
    plain = bnf(z, TokenBatch(response, case.preferred, ref_log_odds=ref))
    order = torch.randperm(len(y))
    responses_order = torch.randperm(len(case.preferred))
    renamed = responses_order.argsort()[response]
    shuffled = TokenBatch(renamed[order], case.preferred[responses_order], ref_log_odds=ref[order])
    torch.testing.assert_close(bnf(z[order], shuffled), plain[responses_order], rtol=1e-12, atol=1e-12)


def test_dispreferred_is_the_exact_negative() -> None:
    z, ref = torch.randn(2, 5, dtype=torch.float64)
    response = torch.tensor([0, 0, 1, 1, 1])
    losses = [bnf(z, TokenBatch(response, torch.tensor([s, s]), ref_log_odds=ref)) for s in (True, False)]
    assert torch.equal(losses[0], -losses[1])


BAD_BATCHES = {
    "empty-response": (
        lambda: TokenBatch(torch.tensor([0, 0, 2]), torch.tensor([True, False, True])),
        "at least one token in every response, got none in row 1",
    ),
    "out-of-range": (
        lambda: TokenBatch(torch.tensor([0, 3]), torch.tensor([True])),
        r"indices from 0 to 0, got 3 at position \[1\]",
    ),
    "negative": (
        lambda: TokenBatch(torch.tensor([0, 1, -1, -2]), torch.tensor([True, True])),
        r"indices from 0 to 1, got -1 at position \[2\]",
    ),
    "scalar-preferred": (
        lambda: TokenBatch(torch.tensor([0]), torch.tensor(True)),
        r"preferred: expected a bool tensor of shape \(responses,\), got torch.bool of shape \(\)",
    ),
    "float-response": (
        lambda: TokenBatch(torch.zeros(2), torch.tensor([True])),
        "response: expected an int32 or int64",
    ),
    "int-preferred": (lambda: TokenBatch(torch.tensor([0]), torch.tensor([1])), "preferred: expected a bool tensor"),
    "short-reference": (
        lambda: TokenBatch(torch.tensor([0, 0]), torch.tensor([True]), ref_log_odds=torch.zeros(1)),
        r"ref_log_odds: expected shape \(2,\)",
    ),
    "pair-shape": (
        lambda: TokenBatch(torch.tensor([0]), torch.tensor([True]), pair=torch.tensor([0, 0])),
        r"pair: expected shape \(1,\)",
    ),
    "no-reference": (
        lambda: bnf(torch.zeros(1), TokenBatch(torch.tensor([0]), torch.tensor([True]))),
        "batch.ref_log_odds: expected the log-odds of the reference",
    ),
    "log-odds-shape": (
        lambda: bnf(torch.zeros(2), TokenBatch(torch.tensor([0]), torch.tensor([True]), ref_log_odds=torch.zeros(1))),
        r"log_odds: expected shape \(1,\)",
    ),
}


@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.parametrize(("build", "message"), BAD_BATCHES.values(), ids=BAD_BATCHES)
def test_bad_input_is_named(build: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()  # type: ignore[operator]


def test_the_pair_that_is_none_is_named() -> None:
    response, preferred = torch.arange(6), torch.tensor([True, False, True, False, True, True])
    batch = TokenBatch(response, preferred, pair=torch.tensor([3, 3, 7, 7, 9, 9]))
    with pytest.raises(ValueError, match=r"in each pair, pair 9 has 2 and 0\.$"):
        batch.pairs()


def test_a_message_is_short_however_many_tokens() -> None:
    response = torch.arange(100_000)
    preferred = torch.arange(100_000) % 2 == 0
    response[77_777] = 100_000
    with pytest.raises(ValueError, match=r"got 100000 at position \[77777\]") as caught:
        TokenBatch(response, preferred)
    assert len(str(caught.value)) < 300
    response = torch.arange(100_000)
    with pytest.raises(ValueError, match="pair 0 has 50000 and 50000") as caught:
        TokenBatch(response, preferred, torch.zeros(100_000, dtype=torch.int32)).pairs()
    assert len(str(caught.value)) < 300


def test_batches_compare_as_objects() -> None:
    """Not tensor by tensor, which has no truth value; so they can be keys, and be looked for in a list."""
    one, other = (TokenBatch(torch.tensor([0, 0, 1]), torch.tensor([True, False])) for _ in range(2))
    assert one == one
    assert one != other
    assert one in [other, one]
    assert len({one, other, one}) == 2


def test_a_batch_moves_whole() -> None:
    batch = TokenBatch(torch.tensor([0, 0, 1]), torch.tensor([True, False]), entropy=torch.zeros(3))
    moved = batch.to("meta")
    assert [x.device.type for x in (moved.response, moved.preferred, moved.entropy)] == ["meta"] * 3  # type: ignore[union-attr]
    assert moved.pair is moved.ref_log_odds is None
    assert moved.responses == 2
    assert batch.response.device.type == "cpu"
    same = batch.to(torch.device("cpu"), non_blocking=True)
    assert torch.equal(bnf_loss_of(same), bnf_loss_of(batch))


def bnf_loss_of(batch: TokenBatch) -> torch.Tensor:
    return batch.mean(torch.tensor([1.0, 2.0, 4.0]))


HALVES = [torch.bfloat16, torch.float16]


def long_batch(tokens: int, **tensors: torch.Tensor) -> TokenBatch:
    """Two pairs: one long response beside short ones."""
    lengths = torch.tensor([tokens - 12, 2, 3, 7])
    response = torch.arange(4).repeat_interleave(lengths)
    labels, pair = torch.tensor([True, False, False, True]), torch.tensor([0, 0, 1, 1])
    return TokenBatch(response, labels, pair, z0=torch.tensor(0.5), **tensors)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_sums_over_a_response_are_in_float32(dtype: torch.dtype) -> None:
    """4,000 tokens of -0.8: bf16 stops counting at -912, fp16 at its range."""
    values = torch.full((4000,), -0.8, dtype=dtype)
    batch = TokenBatch(torch.zeros(4000, dtype=torch.long), torch.tensor([True]))
    for ours, plain in (
        (batch.sum(values), values.double().sum()),
        (batch.mean(values), values.double().mean()),
        (sequence_logps(values, batch), logsigmoid(values.double()).sum()),
    ):
        assert ours.dtype == torch.float32
        assert ours.item() == pytest.approx(plain.item(), rel=1e-4)
    assert batch.sum(values.double()).dtype == torch.float64
    assert batch.sum(torch.full_like(values, -60000)).isfinite().all()


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("tokens", [20, 4000])
def test_half_precision_log_odds_give_what_they_give_in_float64(name: str, dtype: torch.dtype, tokens: int) -> None:
    """Value in float32, gradient in the log-odds' own dtype: off by its rounding, however long the response."""
    log_odds, ref_log_odds, entropy = 3 * torch.randn(tokens), 3 * torch.randn(tokens), torch.rand(tokens)
    log_odds[:3], ref_log_odds[:2] = torch.tensor([9.0, 12.0, -14.0]), torch.tensor([9.5, 9.0])  # log pi rounds to 0 in halves
    ours = log_odds.to(dtype).requires_grad_()
    exact = ours.detach().double().requires_grad_()
    ref_log_odds, entropy = ref_log_odds.double(), entropy.to(dtype)
    loss = OBJECTIVES[name](ours, long_batch(tokens, ref_log_odds=ref_log_odds.float(), entropy=entropy))
    expected = OBJECTIVES[name](exact, long_batch(tokens, ref_log_odds=ref_log_odds, entropy=entropy.double()))
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), expected, rtol=2e-4, atol=1e-6)  # float32's, of sums of 4,000
    loss.sum().backward()
    expected.sum().backward()
    assert ours.grad is not None
    assert exact.grad is not None
    assert ours.grad.dtype == dtype
    rounding = torch.finfo(dtype)
    error = (ours.grad.double() - exact.grad).abs()
    assert (error <= 2 * rounding.eps * exact.grad.abs() + rounding.smallest_normal * rounding.eps + 1e-9).all()


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_weights_and_targets_of_half_precision(dtype: torch.dtype) -> None:
    log_odds, ref = torch.tensor([[3.0, 0.3, -20.0], [3.4, 0.7, -19.3]]).to(dtype)
    for function in (bnf_weight, bnf_target):
        ours = function(log_odds, ref)
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours.double(), function(log_odds.double(), ref.double()), rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_constraints_of_half_precision(dtype: torch.dtype) -> None:
    values = torch.tensor([[-400.0, -3.0], [-401.0, -9.0], [-399.0, -4.0], [-402.0, -4.0], [401.0, 3.0], [399.0, 4.0]]).to(
        dtype
    )
    for name, constraint in constraints.CONSTRAINTS.items():
        for ours, exact in zip(constraint(PairLogps(*values)), constraint(PairLogps(*values.double())), strict=True):
            assert ours.dtype == torch.float32, name
            torch.testing.assert_close(ours.double(), exact, rtol=1e-4, atol=1e-7)
    ratio, preferred = values[0] / 100, torch.tensor([True, False])
    ours = constraints.kto_constraint(ratio, preferred, beta=0.7, lambda_d=1.3, lambda_u=0.3, z0=0.2)
    exact = constraints.kto_constraint(ratio.double(), preferred, beta=0.7, lambda_d=1.3, lambda_u=0.3, z0=0.2)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours.double(), exact, rtol=1e-4, atol=0)


@pytest.mark.parametrize("apart", [1.0, 1e-3, 1e-6])
@pytest.mark.parametrize("ref", [5.0, 20.0, 30.0])
def test_binary_keeps_the_digits_of_a_small_miss(ref: float, apart: float) -> None:
    """1 - f_y far below 1's rounding is most of the gradient of a token that is nearly certain: -w (1 - pi_y)."""
    log_odds = torch.tensor([ref - apart], dtype=torch.float64, requires_grad=True)
    batch = TokenBatch(torch.tensor([0]), torch.tensor([True]), ref_log_odds=torch.tensor([ref], dtype=torch.float64))
    loss = bnf_binary(log_odds, batch)
    loss.sum().backward()
    assert log_odds.grad is not None
    w = bnf_weight(log_odds, torch.full_like(log_odds, ref))
    torch.testing.assert_close(log_odds.grad, -w * torch.sigmoid(-log_odds.detach()), rtol=1e-12, atol=0)
    with mp.workdps(60):
        pi, pi_ref = (1 / (1 + mp.exp(-mp.mpf(x))) for x in (log_odds.item(), ref))
        exact = -(pi / pi_ref) * mp.log(pi) - (1 - pi / pi_ref) * mp.log1p(-pi)
    assert loss.item() == pytest.approx(float(exact), rel=1e-9)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_certain_tokens_beside_others(name: str) -> None:
    """l = inf at policy, reference, or both: a finite loss, a finite gradient, and none to what is certain."""
    inf = torch.inf
    log_odds = torch.tensor([inf, 1.0, inf, -3.0, inf, 2.0], requires_grad=True)
    ref = torch.tensor([inf, inf, 2.0, -2.0, 0.0, 2.0])
    batch = TokenBatch(
        torch.tensor([0, 0, 0, 1, 1, 1]),
        torch.tensor([True, False]),
        torch.tensor([0, 0]),
        ref_log_odds=ref,
        entropy=torch.zeros(6),
        z0=torch.tensor(0.5),
    )
    loss = OBJECTIVES[name](log_odds, batch)
    loss.sum().backward()
    assert loss.isfinite().all()
    assert log_odds.grad is not None
    assert log_odds.grad.isfinite().all()
    assert (log_odds.grad[[0, 2, 4]] == 0).all()


# --- hyper-parameters -----------------------------------------------------------------------------------------------

FUNCTIONS = {
    **{name: (objective, (torch.zeros(2), HYPER_BATCH)) for name, objective in OBJECTIVES.items()},
    **{f"{name}_constraint": (c, (pair_logps(torch.zeros(2), HYPER_BATCH),)) for name, c in constraints.CONSTRAINTS.items()},
    "kto_constraint": (constraints.kto_constraint, (torch.zeros(2), HYPER_BATCH.preferred)),
}
HYPER = [
    pytest.param(function, arguments, hyper, id=f"{name}-{hyper}")
    for name, (function, arguments) in FUNCTIONS.items()
    for hyper, parameter in inspect.signature(function).parameters.items()
    if parameter.kind == parameter.KEYWORD_ONLY and hyper != "side"  # which is a word
]


@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.parametrize(("function", "arguments", "hyper"), HYPER)
def test_a_hyper_parameter_is_a_finite_number(function: Any, arguments: tuple[Any, ...], hyper: str) -> None:
    bad = [math.nan, math.inf, -math.inf, True, None, "0.1", torch.ones(1), torch.tensor(math.nan), np.float32(np.nan), [0.1]]
    for value in bad if hyper == "z0" else [*bad, torch.tensor(0.1)]:
        with pytest.raises(ValueError, match=rf"^{hyper}: expected (a finite|a floating|shape)"):
            function(*arguments, **{hyper: value})
    expected = function(*arguments, **{hyper: 0.5})
    for value in (np.float32(0.5), np.float64(0.5), *([torch.tensor(0.5)] if hyper == "z0" else [])):
        torch.testing.assert_close(function(*arguments, **{hyper: value}), expected, rtol=0, atol=0)
    torch.testing.assert_close(
        function(*arguments, **{hyper: np.int64(1)}), function(*arguments, **{hyper: 1.0}), rtol=0, atol=0
    )
    if hyper not in ("alpha", "gamma", "z0") and (hyper, function.__name__[:7]) != ("delta", "slic_hf"):
        with pytest.raises(ValueError, match=f"^{hyper}: expected a (positive|non-negative) number, got -0.5"):
            function(*arguments, **{hyper: -0.5})


def test_every_hyper_parameter_is_seen() -> None:
    assert len(HYPER) == 59
