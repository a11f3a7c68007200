"""bnf_core.reference against 60-digit arithmetic, against autograd, and at the corners."""

import oracle
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import Responses, probabilities, responses
from tolerances import assert_close, scale

from bnf_core import reference

REAL_DTYPES = [torch.float64, torch.float32]


def exact_target(case: Responses) -> torch.Tensor:
    rows = []
    for z, z_ref, y in zip(case.logits.flatten(0, 1), case.ref_logits.flatten(0, 1), case.labels.flatten(), strict=True):
        rows += [0.0] * len(z) if y == oracle.IGNORE else oracle.position(z, z_ref, int(y)).f
    return oracle.to_tensor(rows, case.logits)


@pytest.mark.parametrize("dtype", [*REAL_DTYPES, torch.bfloat16, torch.float16], ids=str)
@given(data=st.data())
def test_dynamic_target_is_equation_6(dtype: torch.dtype, data: st.DataObject) -> None:
    case = data.draw(responses(dtype))
    f = reference.dynamic_target(case.logits, case.ref_logits, case.labels)
    assert f.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert not f.requires_grad
    assert_close(f, exact_target(case), units=16, size=scale(case.logits, case.ref_logits), absolute=1)


@given(case=responses())
def test_dynamic_target_is_a_distribution(case: Responses) -> None:
    f = reference.dynamic_target(case.logits, case.ref_logits, case.labels)
    assert (f >= 0).all()
    assert_close(f.sum(-1), case.mask.double(), units=8)


@given(case=responses())
def test_one_hot_target_is_equation_5(case: Responses) -> None:
    f = reference.one_hot_target(case.logits, case.labels)
    assert torch.equal(f.sum(-1), case.mask.double())
    assert (f.argmax(-1) == case.labels)[case.mask].all()


@pytest.mark.parametrize("dtype", REAL_DTYPES, ids=str)
@given(data=st.data())
def test_loss_is_equation_4(dtype: torch.dtype, data: st.DataObject) -> None:
    case = data.draw(responses(dtype))
    loss = reference.bnf_loss(case.logits, case.ref_logits, case.labels, case.preferred)
    exact = oracle.bnf_loss(case.logits, case.ref_logits, case.labels, case.preferred)
    size = scale(case.logits, case.ref_logits)
    # f's own rounding is weighed by log pi, which is as large as the logits; signs may cancel between responses
    assert_close(loss, oracle.to_tensor([exact], loss), units=32, size=size, absolute=size)


@pytest.mark.parametrize("dtype", REAL_DTYPES, ids=str)
@given(data=st.data())
def test_gradient_is_equation_8(dtype: torch.dtype, data: st.DataObject) -> None:
    case = data.draw(responses(dtype))
    arguments = case.logits, case.ref_logits, case.labels, case.preferred
    exact = oracle.to_tensor(oracle.bnf_logit_gradient(*arguments), case.logits)
    size = scale(case.logits, case.ref_logits)
    closed = reference.bnf_logit_gradient(*arguments)
    assert_close(closed, exact, units=32, size=size)  # every digit, however small the gradient
    logits = case.logits.clone().requires_grad_()
    reference.bnf_loss(logits, *arguments[1:]).backward()
    assert logits.grad is not None
    assert_close(logits.grad, exact, units=32, size=size, absolute=1)


@given(p=probabilities(), p_ref=probabilities(interior=True))
def test_feedback_curve_is_equation_9(p: float, p_ref: float) -> None:
    expected = p * (1 - p_ref) / p_ref if p < p_ref else 1 - p
    actual = reference.bnf_feedback(torch.tensor(p, dtype=torch.float64), p_ref)
    assert actual.item() == pytest.approx(expected, rel=1e-14, abs=0)
    assert reference.nll_feedback(p).item() == 1 - p


@given(p=probabilities(interior=True), p_ref=probabilities(interior=True))
def test_feedback_curve_is_the_gradient_of_the_loss(p: float, p_ref: float) -> None:
    def two_tokens(likelihood: float) -> torch.Tensor:
        x = torch.tensor(likelihood, dtype=torch.float64)
        return torch.stack([torch.log(x), torch.log1p(-x)]).reshape(1, 1, 2)

    gradient = reference.bnf_logit_gradient(
        two_tokens(p), two_tokens(p_ref), torch.tensor([[0]]), torch.tensor([True])
    ).squeeze()
    feedback = reference.bnf_feedback(p, p_ref)
    assert gradient[0].abs().item() == pytest.approx(feedback.item(), rel=1e-9)
    assert gradient[1].item() == pytest.approx(feedback.item(), rel=1e-9)  # A.4: the others sum to the target's


@given(case=responses())
def test_zero_feedback_is_never_nan_at_v_1(case: Responses) -> None:
    logits, labels = case.logits[..., :1].clamp(min=-50).requires_grad_(), case.labels.clamp(max=0)
    loss = reference.bnf_loss(logits, case.ref_logits[..., :1].clamp(min=-50), labels, case.preferred)
    loss.backward()
    assert loss == 0
    assert logits.grad is not None
    assert torch.equal(logits.grad, torch.zeros_like(logits))


INTEGERS = [torch.int8, torch.uint8, torch.int16, torch.uint16, torch.int32, torch.uint32, torch.int64, torch.uint64]


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_labels_of_any_integer_dtype(dtype: torch.dtype) -> None:
    """-100 is compared as a number: no unsigned token is one, and no vocabulary is too large for the labels' dtype."""
    top = min(torch.iinfo(dtype).max, 299)
    labels = torch.tensor([[10, top, min(156, top)], [7, 0, 100]])  # 156 is -100 in eight bits
    if dtype.is_signed:
        labels[1, 1] = -100
    logits, ref_logits = torch.randn(2, 2, 3, 300, dtype=torch.float64)
    preferred = torch.tensor([True, False])
    for function, arguments in (
        (reference.bnf_loss, (logits, ref_logits, labels, preferred)),
        (reference.bnf_logit_gradient, (logits, ref_logits, labels, preferred)),
        (reference.one_hot_target, (logits, labels)),
        (reference.dynamic_target, (logits, ref_logits, labels)),
        (reference.mixture_target, (logits, ref_logits, labels)),
        (reference.sequence_logps, (logits, labels)),
        (reference.pair_logps, (logits, ref_logits, labels)),
    ):
        narrow = tuple(x.to(dtype) if x is labels else x for x in arguments)
        torch.testing.assert_close(function(*narrow), function(*arguments), rtol=0, atol=0)  # type: ignore[operator]


def test_feedback_is_computed_in_float32_at_least() -> None:
    """Half precision in, float32 out; a tensor in double precision, or a number beside one, keeps its digits."""
    p = torch.tensor([0.1, 0.7], dtype=torch.bfloat16)
    feedback = reference.bnf_feedback(p, 0.3)
    assert feedback.dtype == torch.float32
    torch.testing.assert_close(feedback.double(), reference.bnf_feedback(p.double(), 0.3))
    assert reference.bnf_feedback(0.1, torch.tensor(0.3, dtype=torch.float16)).dtype == torch.float32
    exact = reference.bnf_feedback(torch.tensor(0.1).double(), 0.3)
    assert reference.bnf_feedback(torch.tensor(0.1), torch.tensor(0.3).double()).dtype == exact.dtype
