"""Bad input to bnf_core.reference: a ValueError that says what was expected and names the first bad position."""

from typing import Any

import pytest
import torch

from bnf_core import reference

INF, NAN = float("inf"), float("nan")


def arguments(**changed: Any) -> dict[str, Any]:
    good = {
        "logits": torch.zeros(2, 3, 4),
        "ref_logits": torch.zeros(2, 3, 4),
        "labels": torch.tensor([[0, 1, -100], [2, -100, 3]]),
        "preferred": torch.tensor([True, False]),
    }
    return good | changed


def logits_with(value: float, *position: int) -> torch.Tensor:
    logits = torch.zeros(2, 3, 4)
    logits[position] = value
    return logits


BAD = {
    "nan": ({"logits": logits_with(NAN, 1, 2, 0)}, r"^logits: .* got nan at position \[1, 2, 0\]"),
    "ref-nan": ({"ref_logits": logits_with(NAN, 0, 1, 3)}, r"^ref_logits: .* got nan at position \[0, 1, 3\]"),
    "inf": ({"logits": logits_with(INF, 0, 0, 0)}, r"got inf at position \[0, 0, 0\]"),
    "target-ruled-out": ({"logits": logits_with(-INF, 1, 0, 2)}, r"target token, got -inf at position \[1, 0\]"),
    "vocab": ({"labels": torch.full((2, 3), 4)}, "from 0 to 3"),
    "label-int8": (
        {"labels": torch.tensor([[0, 1, -100], [2, -99, 3]], dtype=torch.int8)},
        r"^labels: .* got -99 at position \[1, 1\]",
    ),
    "label-uint8": (
        {"labels": torch.tensor([[0, 1, 2], [2, 156, 3]], dtype=torch.uint8)},
        r"^labels: .* got 156 at position \[1, 1\]",
    ),
    "label-uint64": (
        {"labels": torch.tensor([[0, 1, 2], [2, 3, 2**64 - 100]], dtype=torch.uint64)},
        r"^labels: .* got 18446744073709551516 at position \[1, 2\]",
    ),
    "empty-response": ({"labels": torch.tensor([[0, 1, -100], [-100] * 3])}, "got none in row 1"),
    "shape": ({"ref_logits": torch.zeros(2, 3, 5)}, r"ref_logits: expected shape \(2, 3, 4\)"),
    "two-dimensional": ({"logits": torch.zeros(3, 4)}, r"expected shape \(sequences, positions, vocab\)"),
    "preferred-int": ({"preferred": torch.tensor([1, 0])}, "preferred: expected a bool tensor"),
    "integer-logits": ({"logits": torch.zeros(2, 3, 4, dtype=torch.long)}, "logits: expected a floating-point tensor"),
    "not-a-tensor": ({"logits": [[0.0]]}, "logits: expected a floating-point tensor, got list"),
    "device": ({"ref_logits": torch.zeros(2, 3, 4, device="meta")}, "on one device"),
}


@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.parametrize("function", [reference.bnf_loss, reference.bnf_logit_gradient], ids=lambda f: f.__name__)
@pytest.mark.parametrize(("changed", "message"), BAD.values(), ids=BAD)
def test_bad_input_is_named(function: Any, changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        function(**arguments(**changed))


def test_what_stands_where_there_is_no_response_token_does_not_matter() -> None:
    """Padding may hold anything, NaN included: it is not part of any response."""
    expected = reference.bnf_loss(**arguments())
    logits = logits_with(NAN, 0, 2, 1).requires_grad_()
    loss = reference.bnf_loss(**arguments(logits=logits))
    loss.backward()
    assert loss == expected
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.parametrize("bad", [-0.1, 1.1, NAN])
def test_feedback_curves_take_probabilities_only(bad: float) -> None:
    for call in (lambda: reference.nll_feedback(bad), lambda: reference.bnf_feedback(0.5, torch.tensor([bad]))):
        with pytest.raises(ValueError, match="expected probabilities from 0 to 1"):
            call()


@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: reference.sequence_logps([[0.0]], torch.zeros(1, 1)), "logits: expected a floating-point tensor, got list"),
        (
            lambda: reference.pair_logps(torch.zeros(2, 1, 3), [0.0], torch.zeros(2, 1).long()),
            "ref_logits: expected a floating",
        ),
        (
            lambda: reference.pair_logps(torch.zeros(2, 1, 4), logits_with(NAN, 1, 0, 2)[:, :1], torch.zeros(2, 1).long()),
            r"ref_logits: .* got nan at position \[1, 0, 2\]",
        ),
        (lambda: reference.bnf_feedback(0.5, torch.tensor([1])), "p_ref: expected a floating-point tensor, got torch.int64"),
        (lambda: reference.nll_feedback("0.5"), "p: expected a number or a floating-point tensor, got str '0.5'"),
    ],
)
def test_bad_input_of_the_others_is_named(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.usefixtures("unchecked_shapes")
def test_a_message_is_short_however_long_the_input() -> None:
    with pytest.raises(ValueError, match="logits: expected a floating-point tensor, got list") as caught:
        reference.bnf_loss(**arguments(logits=[0.0] * 100_000))
    assert len(str(caught.value)) < 300
