"""Every log-odds head against 60-digit arithmetic and against the plain version's own error."""

from typing import Any

import oracle
import pytest
import torch
from hypothesis import given
from implementations import available
from strategies import Responses, responses
from tolerances import assert_close, scale

from bnf_core import linear_log_odds, token_log_odds
from bnf_core.head import IMPLEMENTATIONS

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "softcap": {"softcap": 3.0},
    "scale": {"logit_scale": 0.3},
    "softcap-scale": {"softcap": 2.0, "logit_scale": 1.7},
}
# (tokens, dim, vocab, chunk): never a multiple of one another
SHAPES = [(7, 5, 11, 3), (1, 3, 2, 4), (13, 8, 50, 5), (4, 2, 1, 3)]
every_implementation = pytest.mark.parametrize("implementation", available(IMPLEMENTATIONS))


def problem(shape: tuple[int, int, int, int], dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    tokens, dim, vocab, chunk = shape
    labels = torch.randint(vocab, (tokens,))
    if tokens > 2:
        labels[1] = -100
    return {
        "hidden": torch.randn(tokens, dim, dtype=torch.float64).to(dtype).requires_grad_(),
        "weight": torch.randn(vocab, dim, dtype=torch.float64).to(dtype).requires_grad_(),
        "bias": torch.randn(vocab, dtype=torch.float64).to(dtype).requires_grad_(),
        "labels": labels,
        "chunk_size": chunk,
    }


@given(case=responses())
def test_token_log_odds_is_exact(case: Responses) -> None:
    z, _, y, _ = case.flat()
    z.requires_grad_()
    log_odds, entropy = token_log_odds(z, y)
    at = [oracle.position(row, row, int(label)) for row, label in zip(z, y, strict=True)]
    size = scale(z)
    assert_close(log_odds, oracle.to_tensor([p.log_odds for p in at], y), units=8, size=size, absolute=1)
    assert_close(entropy, oracle.to_tensor([p.entropy for p in at], y), units=16, size=size, absolute=1)
    torch.where(log_odds.isfinite(), log_odds, 0).sum().backward()
    assert z.grad is not None
    for p, gradient, label in zip(at, z.grad, y, strict=True):
        others = 1 - p.pi[int(label)]
        if others:  # dl/dz_y = 1, dl/dz_j = -q_j
            exact = [1 if j == label else -pi / others for j, pi in enumerate(p.pi)]
            assert_close(gradient, oracle.to_tensor(exact, gradient), units=16, size=size)
        else:
            assert torch.equal(gradient, torch.zeros_like(gradient))


@every_implementation
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "N{}-d{}-V{}-C{}".format(*s))
def test_gradcheck(implementation: str, options: dict[str, Any], shape: tuple[int, int, int, int]) -> None:
    inputs = problem(shape)
    fixed = {"labels": inputs["labels"], "chunk_size": inputs["chunk_size"], "implementation": implementation}
    if shape[2] == 1:  # l = inf and no gradient at all
        log_odds, entropy = linear_log_odds(inputs["hidden"], inputs["weight"], **fixed, **options)
        kept = inputs["labels"] != -100
        assert log_odds[kept].isposinf().all()
        assert (entropy == 0).all()
        torch.nn.functional.logsigmoid(log_odds).sum().backward()
        assert torch.equal(inputs["weight"].grad, torch.zeros_like(inputs["weight"]))
        return

    def head(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return linear_log_odds(hidden, weight, bias=bias, **fixed, **options)[0]

    # along random directions (fast mode), or for each number by itself: hundreds of calls
    every_number = shape == SHAPES[0] and implementation in ("naive", "chunked")
    assert torch.autograd.gradcheck(head, (inputs["hidden"], inputs["weight"], inputs["bias"]), fast_mode=not every_number)


@every_implementation
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES[:3], ids=lambda s: "N{}-d{}-V{}-C{}".format(*s))
def test_no_less_exact_than_the_plain_version(
    implementation: str, options: dict[str, Any], dtype: torch.dtype, shape: tuple[int, int, int, int]
) -> None:
    """Errors against float64 on the same rounded operands: at most the plain version's own, plus a rounding."""
    inputs = problem(shape, dtype)
    coefficient = torch.randn(shape[0], dtype=torch.float64)

    def run(name: str, as_dtype: torch.dtype) -> list[torch.Tensor]:
        leaves = {k: inputs[k].detach().to(as_dtype).requires_grad_() for k in ("hidden", "weight", "bias")}
        log_odds, entropy = linear_log_odds(
            **leaves, labels=inputs["labels"], chunk_size=inputs["chunk_size"], implementation=name, **options
        )
        (log_odds * coefficient.to(log_odds.dtype)).sum().backward()
        return [log_odds, entropy, *(leaf.grad for leaf in leaves.values() if leaf.grad is not None)]

    exact, plain, fast = run("naive", torch.float64), run("naive", dtype), run(implementation, dtype)
    assert fast[0].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    for i, (truth, slow, quick) in enumerate(zip(exact, plain, fast, strict=True)):
        error, plain_error = (quick.double() - truth).abs().max(), (slow.double() - truth).abs().max()
        units = 32 if i == 1 else 16  # the entropy is a difference of numbers of the logits' size
        assert error <= 1.5 * plain_error + units * torch.finfo(quick.dtype).eps * truth.abs().max()


@every_implementation
def test_autocast_rounds_operands_not_logits(implementation: str) -> None:
    inputs = problem((7, 5, 11, 3), torch.float32)
    arguments = {"labels": inputs["labels"], "implementation": implementation}
    with torch.autocast("cpu", torch.bfloat16):
        log_odds, _ = linear_log_odds(inputs["hidden"], inputs["weight"], **arguments)
    rounded = (inputs[k].detach().bfloat16().double() for k in ("hidden", "weight"))
    exact, _ = linear_log_odds(*rounded, labels=inputs["labels"], implementation="naive")
    assert log_odds.dtype == torch.float32
    assert_close(log_odds, exact, units=16, size=10, absolute=1)
    log_odds.sum().backward()
    assert inputs["weight"].grad.dtype == torch.float32


@every_implementation
@pytest.mark.parametrize("frozen", ["hidden", "weight", "bias"])
def test_gradients_only_where_asked_for(implementation: str, frozen: str) -> None:
    inputs = problem((7, 5, 11, 3))
    inputs[frozen].requires_grad_(False)
    gradients = {}
    for path in ("naive", implementation):
        for name in ("hidden", "weight", "bias"):
            inputs[name].grad = None
        linear_log_odds(**inputs, implementation=path)[0].sum().backward()
        gradients[path] = {name: inputs[name].grad for name in ("hidden", "weight", "bias")}
    for name, ours in gradients[implementation].items():
        assert (ours is None) == (name == frozen)
        torch.testing.assert_close(ours, gradients["naive"][name])


@every_implementation
def test_no_response_tokens_is_a_differentiable_zero(implementation: str) -> None:
    inputs = problem((7, 5, 11, 3))
    log_odds, entropy = linear_log_odds(
        inputs["hidden"][:0], inputs["weight"], inputs["labels"][:0], implementation=implementation
    )
    assert log_odds.shape == entropy.shape == (0,)
    log_odds.sum().backward()
    assert torch.equal(inputs["weight"].grad, torch.zeros_like(inputs["weight"]))


@every_implementation
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_bad_values_never_become_finite(implementation: str, bad: float) -> None:
    inputs = problem((7, 5, 11, 3))
    with torch.no_grad():
        inputs["hidden"][2, 0] = bad
    log_odds, _ = linear_log_odds(**inputs, implementation=implementation)
    assert not log_odds[2].isfinite()
    assert log_odds[[0, 3, 4, 5, 6]].isfinite().all()


@every_implementation
@pytest.mark.parametrize("masked", [0, 3, 5])
def test_a_masked_vocabulary_entry_contributes_nothing(implementation: str, masked: int) -> None:
    inputs = problem((5, 4, 6, 2))
    kept = [j for j in range(6) if j != masked]
    inputs["labels"] = torch.tensor([0, 4, 2, 0, 1])
    with torch.no_grad():
        inputs["bias"][masked] = -torch.inf
    smaller = linear_log_odds(
        inputs["hidden"], inputs["weight"][kept], inputs["labels"], bias=inputs["bias"][kept], implementation="naive"
    )
    inputs["labels"] = torch.tensor(kept)[inputs["labels"]]
    whole = linear_log_odds(**inputs, implementation=implementation)
    for ours, theirs in zip(whole, smaller, strict=True):
        assert_close(ours, theirs, units=16, size=10, absolute=1)
    whole[0].sum().backward()
    assert all(inputs[name].grad.isfinite().all() for name in ("hidden", "weight", "bias"))


BAD = {
    "hidden-1d": ({"hidden": torch.zeros(5)}, r"expected shapes \(tokens, dim\) and \(vocab, dim\), got \(5,\)"),
    "hidden-int": ({"hidden": torch.zeros(7, 5, dtype=torch.long)}, "hidden: expected a floating-point tensor"),
    "dim": ({"weight": torch.zeros(11, 4)}, r"got \(7, 5\) and \(11, 4\)"),
    "labels-float": ({"labels": torch.zeros(7)}, "labels: expected an integer tensor"),
    "labels-length": ({"labels": torch.zeros(6, dtype=torch.long)}, r"labels: expected shape \(7,\)"),
    "labels-range": ({"labels": torch.tensor([0, 1, 2, 11, 0, 0, 0])}, r"from 0 to 10.* got 11 at position \[3\]"),
    "labels-negative": ({"labels": torch.tensor([0, -1, 2, 1, 0, 0, 0])}, r"got -1 at position \[1\]"),
    "bias": ({"bias": torch.zeros(5)}, r"bias: expected shape \(11,\)"),
    "softcap": ({"softcap": 0.0}, "softcap: expected a positive number"),
    "chunk": ({"chunk_size": 0}, "chunk_size: expected at least 1"),
    "implementation": ({"implementation": "quick"}, "implementation: expected one of auto, naive"),
    "device": ({"weight": torch.zeros(11, 5, device="meta")}, "expected all tensors on one device"),
}


@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.parametrize(("changed", "message"), BAD.values(), ids=BAD)
def test_bad_input_is_named(changed: dict[str, Any], message: str) -> None:
    good = {"hidden": torch.zeros(7, 5), "weight": torch.zeros(11, 5), "labels": torch.zeros(7, dtype=torch.long)}
    with pytest.raises(ValueError, match=message):
        linear_log_odds(**good | changed)
