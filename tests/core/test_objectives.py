"""The BNF objective from log-odds against the paper's definitions on full logits."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import Responses, responses
from tolerances import assert_close, scale

from bnf_core import TokenBatch, bnf, bnf_weight, reference, token_log_odds

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
    "out-of-range": (lambda: TokenBatch(torch.tensor([0, 3]), torch.tensor([True])), "indices from 0 to 0"),
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
