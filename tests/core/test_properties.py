"""What the paper promises of the loss, as properties: feedback in both directions, three gradients that agree, invariances."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from implementations import available
from strategies import Responses, long_responses, probabilities, responses
from tolerances import assert_close, scale
from torch import Tensor

from bnf_core import TokenBatch, bnf, bnf_binary, linear_log_odds, reference, token_log_odds
from bnf_core.head import IMPLEMENTATIONS
from bnf_core.objectives import OBJECTIVES


def arguments(case: Responses) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return case.logits, case.ref_logits, case.labels, case.preferred


def batch_of(case: Responses, *, entropy: Tensor | None = None) -> TokenBatch:
    _, z_ref, y, response = case.flat()
    return TokenBatch(response, case.preferred, ref_log_odds=token_log_odds(z_ref, y)[0], entropy=entropy)


# --- the gradient, three ways ---------------------------------------------------------------------------------------


@given(case=responses(max_positions=2, max_vocab=4))
def test_gradient_three_ways(case: Responses) -> None:
    """Autograd, eq. 8, and finite differences of the loss with the target held where the stop-gradient holds it."""
    logits = case.logits.clamp(-30, 30).requires_grad_()
    case = Responses(logits, case.ref_logits.clamp(-30, 30), case.labels, case.preferred)
    reference.bnf_loss(*arguments(case)).backward()
    closed = reference.bnf_logit_gradient(*arguments(case))
    assert logits.grad is not None
    assert_close(logits.grad, closed, units=64, size=scale(logits), absolute=1)

    target = reference.dynamic_target(logits, case.ref_logits, case.labels)
    lengths = case.mask.sum(-1, keepdim=True)
    sign = torch.where(case.preferred, 1.0, -1.0).double().unsqueeze(-1)

    def loss(z: Tensor) -> Tensor:
        cross_entropy = -(target * z.log_softmax(-1)).sum(-1)
        return (sign / lengths * cross_entropy).sum() / len(case.preferred)

    step = 1e-4
    for index in torch.cartesian_prod(*(torch.arange(n) for n in logits.shape)):
        moved = torch.zeros_like(logits)
        moved[tuple(index)] = step
        slope = (loss(logits.detach() + moved) - loss(logits.detach() - moved)) / (2 * step)
        assert slope.item() == pytest.approx(closed[tuple(index)].item(), abs=2e-8)


@given(case=responses())
def test_gradient_is_cross_entropys_times_w(case: Responses) -> None:
    """T1's consequence, and T2's: `bnf`, `bnf_binary` and w times the log-likelihood have one gradient."""
    gradients = []
    for name in ("bnf", "bnf_binary", "log_likelihood"):
        z = case.logits.clone().requires_grad_()
        OBJECTIVES[name](token_log_odds(z[case.mask], case.labels[case.mask])[0], batch_of(case)).sum().backward()
        assert z.grad is not None
        gradients.append(z.grad)
    from bnf_core import bnf_weight

    w = torch.zeros_like(case.labels, dtype=torch.float64)
    batch = batch_of(case)
    assert batch.ref_log_odds is not None
    w[case.mask] = bnf_weight(token_log_odds(case.logits[case.mask], case.labels[case.mask])[0], batch.ref_log_odds)
    size = scale(case.logits, case.ref_logits)
    assert_close(gradients[0], w.unsqueeze(-1) * gradients[2], units=32, size=size)
    assert_close(gradients[1], gradients[0], units=32, size=size, absolute=1)  # pi - f_y cancels


# --- bidirectional feedback ----------------------------------------------------------------------------------------


@given(p_ref=st.floats(0.01, 0.99), likelihoods=st.lists(probabilities(interior=True), min_size=2, unique=True))
def test_feedback_is_bidirectional(p_ref: float, likelihoods: list[float]) -> None:
    """Rising below the reference, falling above it, nowhere greater than at it; NLL's only falls."""
    p = torch.tensor(sorted(likelihoods), dtype=torch.float64)
    log_odds = torch.logit(p).requires_grad_()
    tokens = torch.arange(len(p))
    ref = torch.logit(torch.tensor(p_ref, dtype=torch.float64)).expand(len(p))
    bnf(log_odds, TokenBatch(tokens, torch.ones(len(p), dtype=torch.bool), ref_log_odds=ref)).sum().backward()
    assert log_odds.grad is not None
    feedback = log_odds.grad.abs()  # dl/dz_y = 1
    below, above = feedback[p < p_ref], feedback[p >= p_ref]
    assert (below.diff() >= 0).all()
    assert (above.diff() <= 0).all()
    peak = 1 - p_ref
    assert (feedback <= peak * (1 + 1e-12)).all()
    torch.testing.assert_close(reference.bnf_feedback(p, p_ref), feedback, rtol=1e-9, atol=1e-15)
    assert reference.bnf_feedback(p_ref, p_ref).item() == pytest.approx(peak)


def push_down(name: str, likelihood: float) -> float:
    """Size of the gradient on a dispreferred one-token response of that likelihood, from a reference at 1/2."""
    log_odds = torch.logit(torch.tensor([0.0, likelihood], dtype=torch.float64), eps=1e-300).requires_grad_()
    with torch.no_grad():
        log_odds[0] = 0.0
    ref = torch.zeros(2, dtype=torch.float64)
    batch = TokenBatch(torch.tensor([0, 1]), torch.tensor([True, False]), torch.tensor([0, 0]), ref_log_odds=ref)
    OBJECTIVES[name](log_odds, batch).sum().backward()
    assert log_odds.grad is not None
    return log_odds.grad[1].abs().item()


@given(exponent=st.floats(-200, -3))
def test_pushing_down_fades_under_bnf_and_grows_under_likelihood(exponent: float) -> None:
    likelihood = 10.0**exponent
    assert push_down("bnf", likelihood) <= likelihood * (1 + 1e-9)
    assert push_down("nll_pll", likelihood) >= 0.99
    assert push_down("nll_pll", likelihood) >= push_down("nll_pll", 2 * likelihood)


# --- invariances -----------------------------------------------------------------------------------------------------


@given(case=responses(), shift=st.floats(-100, 100), ref_shift=st.floats(-100, 100))
def test_adding_a_constant_to_the_logits_changes_nothing(case: Responses, shift: float, ref_shift: float) -> None:
    moved = Responses(case.logits + shift, case.ref_logits + ref_shift, case.labels, case.preferred)
    size = scale(moved.logits, moved.ref_logits, case.logits, case.ref_logits)
    for function in (reference.bnf_loss, reference.bnf_logit_gradient):
        assert_close(function(*arguments(moved)), function(*arguments(case)), units=64, size=size, absolute=size)


@given(case=responses(), seed=st.integers(0, 2**16))
def test_permuting_the_vocabulary_permutes_the_gradient(case: Responses, seed: int) -> None:
    order = torch.randperm(case.logits.shape[-1], generator=torch.Generator().manual_seed(seed))
    labels = torch.where(case.mask, order.argsort()[case.labels.clamp(min=0)], case.labels)
    permuted = Responses(case.logits[..., order], case.ref_logits[..., order], labels, case.preferred)
    size = scale(case.logits, case.ref_logits)
    ours, theirs = reference.bnf_logit_gradient(*arguments(permuted)), reference.bnf_logit_gradient(*arguments(case))
    assert_close(ours, theirs[..., order], units=32, size=size)
    losses = [reference.bnf_loss(*arguments(c)) for c in (permuted, case)]
    assert_close(*losses, units=32, size=size, absolute=size)


@given(case=responses(), left=st.integers(0, 3), right=st.integers(0, 3), order=st.integers(0, 2**16))
def test_padding_and_packing_are_one(case: Responses, left: int, right: int, order: int) -> None:
    """More padding on either side, and no padding at all in any order of tokens, give one loss for each response."""
    pad = torch.nn.functional.pad
    padded = Responses(
        pad(case.logits, (0, 0, left, right)),
        pad(case.ref_logits, (0, 0, left, right)),
        pad(case.labels, (left, right), value=-100),
        case.preferred,
    )
    size = scale(case.logits, case.ref_logits)
    expected = reference.bnf_loss(*arguments(case))
    assert_close(reference.bnf_loss(*arguments(padded)), expected, units=8, size=size, absolute=size)
    z, z_ref, y, response = case.flat()
    shuffle = torch.randperm(len(y), generator=torch.Generator().manual_seed(order))
    log_odds, entropy = token_log_odds(z[shuffle], y[shuffle])
    packed = TokenBatch(
        response[shuffle], case.preferred, ref_log_odds=token_log_odds(z_ref[shuffle], y[shuffle])[0], entropy=entropy
    )
    assert_close(bnf(log_odds, packed).mean(), expected, units=64, size=size, absolute=size)


@given(case=long_responses())
def test_very_long_beside_one_token_responses(case: Responses) -> None:
    z, _, y, _ = case.flat()
    log_odds, entropy = token_log_odds(z, y)
    losses = bnf(log_odds, batch_of(case, entropy=entropy))
    assert_close(losses.mean(), reference.bnf_loss(*arguments(case)), units=64, size=scale(case.logits), absolute=1)
    for row in (0, 1):  # each response counts once, however long
        only = Responses(*(x[row : row + 1] for x in arguments(case)))
        assert_close(reference.bnf_loss(*arguments(only)), losses[row], units=256, size=scale(case.logits), absolute=1)


@pytest.mark.parametrize("objective", [bnf, bnf_binary], ids=lambda f: f.__name__)
@given(case=responses())
def test_no_nan_anywhere(objective: object, case: Responses) -> None:
    """Legal input, -inf entries and certainty included, gives a finite value and gradient."""
    z = case.logits.clone().requires_grad_()
    log_odds, entropy = token_log_odds(z[case.mask], case.labels[case.mask])
    loss = objective(log_odds, batch_of(case, entropy=entropy))  # type: ignore[operator]
    loss.sum().backward()
    assert loss.isfinite().all()
    assert z.grad is not None
    assert z.grad.isfinite().all()


# --- the same through the head -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", available(IMPLEMENTATIONS))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_target_and_gradient_through_the_head(implementation: str, dtype: torch.dtype) -> None:
    """The dynamic target and its gradient without (tokens, vocab) tensors, against the readable ones on full logits."""
    from bnf_core import bnf_target, bnf_weight

    torch.manual_seed(5)
    hidden = torch.randn(3, 6, 8).to(dtype)
    weight, ref_weight = torch.randn(2, 13, 8).to(dtype)
    labels = torch.randint(13, (3, 6))
    labels[0, :2] = -100
    labels[2, 4:] = -100
    preferred = torch.tensor([True, False, False])
    logits, ref_logits = (hidden.double() @ w.double().T for w in (weight, ref_weight))
    target = reference.dynamic_target(logits, ref_logits, labels)
    logit_gradient = reference.bnf_logit_gradient(logits, ref_logits, labels, preferred)

    states, head = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    mask = labels != -100
    options = {"implementation": implementation, "chunk_size": 5}
    log_odds, entropy = linear_log_odds(states[mask], head, labels[mask], **options)  # type: ignore[arg-type]
    ref_log_odds, _ = linear_log_odds(hidden[mask], ref_weight, labels[mask], **options)  # type: ignore[arg-type]
    response = torch.arange(3).unsqueeze(1).expand_as(labels)[mask]
    loss = bnf(log_odds, TokenBatch(response, preferred, ref_log_odds=ref_log_odds, entropy=entropy)).mean()
    loss.backward()

    eps = max(torch.finfo(log_odds.dtype).eps * 300, 1e-12)
    f_y = target[mask].gather(-1, labels[mask].unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(bnf_target(log_odds, ref_log_odds).double(), f_y, rtol=eps, atol=eps)
    w = bnf_weight(log_odds, ref_log_odds).double().unsqueeze(-1)
    others = ((1 - w) * logits[mask].softmax(-1)).scatter(-1, labels[mask].unsqueeze(-1), f_y.unsqueeze(-1))
    torch.testing.assert_close(others, target[mask], rtol=eps, atol=eps)
    expected = reference.bnf_loss(logits, ref_logits, labels, preferred)
    torch.testing.assert_close(loss.double(), expected, rtol=eps, atol=eps)
    rounding = max(torch.finfo(dtype).eps * 2, eps)
    assert states.grad is not None
    assert head.grad is not None
    torch.testing.assert_close(states.grad.double(), logit_gradient @ weight.double(), rtol=rounding, atol=rounding)
    summed = logit_gradient.flatten(0, 1).T @ hidden.flatten(0, 1).double()
    torch.testing.assert_close(head.grad.double(), summed, rtol=rounding, atol=rounding)
