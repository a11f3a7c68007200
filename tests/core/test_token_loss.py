"""One pass for token-local losses: the same numbers as autograd through full logits, in three products and no more memory."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from implementations import available
from test_head import OPTIONS, SHAPES, every_implementation, problem
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bnf_core import bnf_weight, linear_bnf_loss, linear_log_odds, linear_token_loss, reference, token_log_odds
from bnf_core.head import IMPLEMENTATIONS
from bnf_core.head.autograd import TOKEN_LOSSES, log_odds_backward_op, log_odds_op, token_loss_op

FAST = available(name for name in IMPLEMENTATIONS if name != "naive")


def focal(log_odds: Tensor, target: Tensor) -> Tensor:
    """A loss that nobody here has derived by hand."""
    return torch.sigmoid(-log_odds).pow(2) * -F.logsigmoid(log_odds) + 0.1 * (log_odds - target).tanh()


LOSSES = {
    "nll": lambda log_odds, target: -F.logsigmoid(log_odds),
    "bnf": lambda log_odds, target: -bnf_weight(log_odds, target.to(log_odds.dtype)) * F.logsigmoid(log_odds),
    "focal": focal,
}


RESULTS = ("loss", "log_odds", "entropy", "dhidden", "dweight", "dbias")


def run(inputs: dict[str, Any], dtype: torch.dtype, loss_name: str, target: Tensor, **keywords: Any) -> list[Tensor]:
    leaves = {k: inputs[k].detach().to(dtype).requires_grad_() for k in ("hidden", "weight", "bias")}
    loss, log_odds, entropy = linear_token_loss(
        leaves["hidden"],
        leaves["weight"],
        inputs["labels"],
        LOSSES[loss_name],
        target,
        bias=leaves["bias"],
        chunk_size=inputs["chunk_size"],
        **keywords,
    )
    assert not log_odds.requires_grad
    assert not entropy.requires_grad
    (3 * loss).backward()  # type: ignore[no-untyped-call]
    return [loss, log_odds, entropy, *(leaf.grad for leaf in leaves.values())]


@pytest.mark.parametrize("implementation", FAST)
@pytest.mark.parametrize("loss_name", LOSSES)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_no_less_exact_than_the_plain_version(
    implementation: str, loss_name: str, options: dict[str, Any], dtype: torch.dtype
) -> None:
    for shape in SHAPES[:3]:
        inputs, target = problem(shape, dtype), torch.randn(shape[0])
        exact = run(inputs, torch.float64, loss_name, target, implementation="naive", **options)
        plain = run(inputs, dtype, loss_name, target, implementation="naive", **options)
        fast = run(inputs, dtype, loss_name, target, implementation=implementation, **options)
        for name, truth, slow, quick in zip(RESULTS, exact, plain, fast, strict=True):
            error, plain_error = (quick.double() - truth).abs().max(), (slow.double() - truth).abs().max()
            # log mass - E[z] cancels: the entropy has the roundings of the logits' size
            units = 32 if name == "entropy" else 16
            assert error <= 1.5 * plain_error + units * torch.finfo(quick.dtype).eps * truth.abs().max(), name


@every_implementation
def test_bnf_loss_is_the_papers(implementation: str) -> None:
    """Eq. 4 on full logits, from two responses of different length."""
    hidden, weight, ref_weight = torch.randn(2, 6, 8), torch.randn(13, 8), torch.randn(13, 8)
    hidden, weight, ref_weight = (x.double() for x in (hidden, weight, ref_weight))
    labels = torch.randint(13, (2, 6))
    labels[0, 4:] = -100
    preferred = torch.tensor([True, False])
    logits = (hidden @ weight.T).requires_grad_()
    expected = reference.bnf_loss(logits, hidden @ ref_weight.T, labels, preferred)
    expected.backward()
    ref_log_odds, _ = token_log_odds(hidden @ ref_weight.T, labels)
    sign = torch.where(preferred, 1.0, -1.0)
    coefficient = (sign / (labels != -100).sum(-1) / 2).unsqueeze(1).expand(2, 6)
    states, head = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    loss, _, _ = linear_bnf_loss(
        states.flatten(0, 1),
        head,
        labels.flatten(),
        ref_log_odds.flatten(),
        coefficient.flatten().double(),
        implementation=implementation,
        chunk_size=5,
    )
    loss.backward()
    assert logits.grad is not None
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(states.grad, logits.grad @ weight)
    torch.testing.assert_close(head.grad, logits.grad.flatten(0, 1).T @ hidden.flatten(0, 1))


@pytest.mark.parametrize("name", TOKEN_LOSSES)
def test_the_slope_of_a_named_loss_is_its_derivative(name: str) -> None:
    """Inside an operator autograd records nothing, so the derivative is written out; certain tokens included."""
    log_odds = torch.cat([torch.randn(50) * 8, torch.tensor([0.0, 30.0, -30.0, 200.0, torch.inf])]).double().requires_grad_()
    per_token = torch.randn(55).double(), torch.randn(55).double()
    loss, slope = TOKEN_LOSSES[name]
    (expected,) = torch.autograd.grad(loss(log_odds, *per_token).sum(), log_odds)
    torch.testing.assert_close(slope(log_odds.detach(), *per_token), expected)


class Watch(TorchDispatchMode):
    """Remembers the largest tensor that any operation made, and counts multiply-adds of matrix products.

    The head is one operator to PyTorch: what is inside is run under the mode, too.
    """

    def __init__(self) -> None:
        super().__init__()
        self.elements = self.multiply_adds = 0
        self.inside = {op._opoverload: op._init_fn for op in (log_odds_op, log_odds_backward_op, token_loss_op)}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in self.inside:
            with self:
                return self.inside[func](*args, **(kwargs or {}))
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_):
            left, right = args[-2:]
            self.multiply_adds += left.shape[0] * left.shape[1] * right.shape[1]
        if not func.is_view:
            for item in result if isinstance(result, (tuple, list)) else [result]:
                if isinstance(item, Tensor) and item.dtype != torch.uint8:  # bytes: how Triton's interpreter reads memory
                    self.elements = max(self.elements, item.numel())
        return result


@pytest.mark.parametrize("implementation", FAST)
@pytest.mark.parametrize(
    ("frozen", "products"), [((), 3), (("weight",), 2), (("hidden",), 2), (("hidden", "weight"), 1)], ids=str
)
def test_products_are_counted(implementation: str, frozen: tuple[str, ...], products: int) -> None:
    tokens, dim, vocab = 12, 8, 96
    hidden, weight = torch.randn(tokens, dim, requires_grad=True), torch.randn(vocab, dim, requires_grad=True)
    for name in frozen:
        {"hidden": hidden, "weight": weight}[name].requires_grad_(False)
    labels = torch.randint(vocab, (tokens,))
    options: dict[str, Any] = {"implementation": implementation, "chunk_size": 4}
    with Watch() as one_pass:
        loss, _, _ = linear_token_loss(hidden, weight, labels, lambda x: -F.logsigmoid(x), **options)
        if loss.requires_grad:
            loss.backward()  # type: ignore[no-untyped-call]
    assert one_pass.multiply_adds == products * tokens * dim * vocab
    with Watch() as recompute:
        log_odds, _ = linear_log_odds(hidden, weight, labels, **options)
        if log_odds.requires_grad:
            log_odds.sum().backward()  # type: ignore[no-untyped-call]
    assert recompute.multiply_adds == (products + (products > 1)) * tokens * dim * vocab


@pytest.mark.parametrize("implementation", FAST)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_logits_are_never_held(implementation: str, options: dict[str, Any]) -> None:
    """No tensor of (tokens, vocab), in either function, forward or backward."""
    tokens, dim, vocab, chunk = 16, 4, 50, 4
    hidden, weight = torch.randn(tokens, dim, requires_grad=True), torch.randn(vocab, dim, requires_grad=True)
    labels = torch.randint(vocab, (tokens,))
    keywords: dict[str, Any] = {"implementation": implementation, "chunk_size": chunk, **options}
    with Watch() as watch:
        linear_token_loss(hidden, weight, labels, lambda x: -F.logsigmoid(x), **keywords)[0].backward()  # type: ignore[no-untyped-call]
        linear_log_odds(hidden, weight, labels, **keywords)[0].sum().backward()  # type: ignore[no-untyped-call]
    assert watch.elements <= max(2 * chunk * vocab, tokens * dim, vocab * dim) < tokens * vocab


@every_implementation
def test_what_stands_beside_the_loss_is_detached(implementation: str) -> None:
    inputs = problem((7, 5, 11, 3))
    arguments = (inputs["hidden"], inputs["weight"], inputs["labels"], LOSSES["nll"], torch.zeros(7))
    loss, *others = linear_token_loss(*arguments, implementation=implementation)
    assert loss.requires_grad
    assert not any(x.requires_grad for x in others)


@every_implementation
def test_gradients_only_where_asked_for(implementation: str) -> None:
    inputs = problem((7, 5, 11, 3))
    inputs["weight"].requires_grad_(False)
    loss, _, _ = linear_token_loss(
        inputs["hidden"], inputs["weight"], inputs["labels"], LOSSES["nll"], torch.zeros(7), implementation=implementation
    )
    loss.backward()  # type: ignore[no-untyped-call]
    assert inputs["weight"].grad is None
    assert inputs["hidden"].grad is not None
    with torch.no_grad():
        assert not linear_token_loss(
            inputs["hidden"], inputs["weight"], inputs["labels"], LOSSES["nll"], torch.zeros(7), implementation=implementation
        )[0].requires_grad


@every_implementation
def test_no_response_tokens_is_a_differentiable_zero(implementation: str) -> None:
    inputs = problem((7, 5, 11, 3))
    for labels in (inputs["labels"][:0], torch.full((7,), -100)):
        hidden = inputs["hidden"][: len(labels)]
        loss, log_odds, _ = linear_token_loss(
            hidden, inputs["weight"], labels, lambda x: -F.logsigmoid(x), implementation=implementation
        )
        assert loss == 0
        assert len(log_odds) == len(labels)
        inputs["weight"].grad = None
        loss.backward()  # type: ignore[no-untyped-call]
        assert torch.equal(inputs["weight"].grad, torch.zeros_like(inputs["weight"]))


def test_gradients_can_be_used_once() -> None:
    inputs = problem((7, 5, 11, 3))
    loss, _, _ = linear_token_loss(inputs["hidden"], inputs["weight"], inputs["labels"], lambda x: -F.logsigmoid(x))
    loss.backward(retain_graph=True)  # type: ignore[no-untyped-call]
    with pytest.raises(RuntimeError, match="used up by an earlier backward"):
        loss.backward()  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("implementation", FAST)
def test_weight_is_one_where_policy_is_reference_however_batched(implementation: str) -> None:
    """In bf16, with chunks and neighbours of other sizes: |w - 1| <= 1e-5."""
    hidden, weight = torch.randn(50, 64).bfloat16(), torch.randn(300, 64).bfloat16()
    labels = torch.randint(300, (50,))
    one, _ = linear_log_odds(hidden, weight, labels, implementation=implementation, chunk_size=7)
    other = torch.cat(
        [
            linear_log_odds(h, weight, y, implementation=implementation)[0]
            for h, y in zip(hidden.split(9), labels.split(9), strict=True)
        ]
    )
    assert (bnf_weight(one, other) - 1).abs().max() <= 1e-5


@pytest.mark.usefixtures("unchecked_shapes")  # the annotation checker is not for torch.compile
@pytest.mark.parametrize("implementation", FAST)
def test_inside_checkpointing_autocast_and_compile(implementation: str) -> None:
    inputs = problem((7, 5, 11, 3), torch.float32)
    body = torch.nn.Linear(5, 5)

    def step(x: Tensor) -> Tensor:
        return linear_token_loss(
            body(x), inputs["weight"], inputs["labels"], lambda log_odds: -F.logsigmoid(log_odds), implementation=implementation
        )[0]

    plain = step(inputs["hidden"])
    (gradient,) = torch.autograd.grad(plain, inputs["hidden"])
    again = torch.utils.checkpoint.checkpoint(step, inputs["hidden"], use_reentrant=False)
    torch.testing.assert_close(torch.autograd.grad(again, inputs["hidden"])[0], gradient)
    compiled = torch.compile(step, backend="eager")(inputs["hidden"])
    torch.testing.assert_close(torch.autograd.grad(compiled, inputs["hidden"])[0], gradient)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = step(inputs["hidden"])
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(rounded, plain, rtol=0.05, atol=0.05)


@pytest.mark.usefixtures("unchecked_shapes")
def test_bad_per_token_input_is_named() -> None:
    inputs = problem((7, 5, 11, 3))
    with pytest.raises(ValueError, match=r"per_token\[0\]: expected a tensor of 7 entries"):
        linear_token_loss(inputs["hidden"], inputs["weight"], inputs["labels"], LOSSES["nll"], torch.zeros(6))


@pytest.mark.parametrize("implementation", FAST)
@pytest.mark.parametrize("softcap", [None, 40.0])
@pytest.mark.parametrize("offset", [-300.0, -30.0, 0.0, 30.0, 300.0])
def test_targets_far_from_the_other_logits(implementation: str, softcap: float | None, offset: float) -> None:
    """However far above or below the others the target's logit is, nothing overflows and no digit is lost."""
    inputs = problem((7, 5, 11, 3), torch.float32)
    with torch.no_grad():
        inputs["hidden"][:, 0], inputs["weight"][:, 0] = 1.0, 0.0
        inputs["labels"][:] = 4
        inputs["weight"][4, 0] = offset
    target, keywords = torch.zeros(7), {"softcap": softcap}
    exact = run(inputs, torch.float64, "nll", target, implementation="naive", **keywords)
    plain = run(inputs, torch.float32, "nll", target, implementation="naive", **keywords)
    fast = run(inputs, torch.float32, "nll", target, implementation=implementation, **keywords)
    for name, truth, slow, quick in zip(RESULTS, exact, plain, fast, strict=True):
        assert not quick.isnan().any(), name
        error, plain_error = (quick.double() - truth).abs().max(), (slow.double() - truth).abs().max()
        size = max(float(truth.abs().max()), 300 if name == "dhidden" else 40)  # of what was summed: weights, logits
        assert error <= 1.5 * plain_error + 16 * torch.finfo(torch.float32).eps * size, name


@pytest.mark.parametrize("implementation", FAST)
def test_a_hopeless_target_beside_others_far_apart(implementation: str) -> None:
    """Logits from -200 to 200 and a target at -300: exponentials are of the largest, or they would overflow."""
    hidden, weight = torch.ones(2, 1), torch.linspace(-200, 200, 50).unsqueeze(1)
    weight[7] = -300
    found, entropy = linear_log_odds(hidden, weight, torch.tensor([7, 7]), implementation=implementation)
    exact, exact_entropy = linear_log_odds(hidden.double(), weight.double(), torch.tensor([7, 7]), implementation="naive")
    torch.testing.assert_close(found, exact.to(found.dtype), rtol=1e-6, atol=0)
    torch.testing.assert_close(entropy, exact_entropy.to(entropy.dtype), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("implementation", FAST)
def test_rounded_logits_are_near_and_gradients_as_good(implementation: str) -> None:
    """exact=False: log-odds within bf16's rounding of the logits (exact ones are 1,000 times closer)."""
    hidden, weight, labels = torch.randn(50, 64).bfloat16(), torch.randn(300, 64).bfloat16(), torch.randint(300, (50,))
    exact, _ = linear_log_odds(hidden.double(), weight.double(), labels, implementation="naive")
    size = (hidden.double() @ weight.double().T).abs().max()
    rounded, _ = linear_log_odds(hidden, weight, labels, implementation=implementation, exact=False)
    assert (rounded - exact).abs().max() <= 2**-8 * size
    kept, _ = linear_log_odds(hidden, weight, labels, implementation=implementation)
    assert (kept - exact).abs().max() <= 2**-18 * size


@pytest.mark.parametrize("implementation", FAST)
def test_a_large_head_in_one_pass_and_in_two(implementation: str) -> None:
    """Several chunks and blocks of the sizes that the implementation chooses itself, every option combined, bf16."""
    if implementation == "triton" and not torch.cuda.is_available():
        pytest.skip("a large head takes minutes under Triton's interpreter")
    tokens, dim, vocab = 333, 129, 70_001
    hidden, weight = torch.randn(tokens, dim).bfloat16(), (torch.randn(vocab, dim) / 6).bfloat16()
    bias, labels = torch.randn(vocab).bfloat16(), torch.randint(vocab, (tokens,))
    labels[::7] = -100
    ref, coefficient = torch.randn(tokens) - 11, torch.randn(tokens) / tokens
    options: dict[str, Any] = {"softcap": 5.0, "logit_scale": 0.7}

    def gradients(name: str, dtype: torch.dtype) -> list[Tensor]:
        leaves = [x.to(dtype).requires_grad_() for x in (hidden, weight, bias)]
        loss, log_odds, entropy = linear_bnf_loss(
            leaves[0], leaves[1], labels, ref.to(dtype), coefficient.to(dtype), bias=leaves[2], implementation=name, **options
        )
        loss.backward()  # type: ignore[no-untyped-call]
        return [loss.detach(), log_odds, entropy, *(leaf.grad for leaf in leaves if leaf.grad is not None)]

    exact, plain, fast = (
        gradients("naive", torch.float64),
        gradients("naive", torch.bfloat16),
        gradients(implementation, torch.bfloat16),
    )
    for name, truth, slow, quick in zip(RESULTS, exact, plain, fast, strict=True):
        error, plain_error = (quick.double() - truth).abs().max(), (slow.double() - truth).abs().max()
        units = 64 if name == "entropy" else 16
        assert error <= 1.5 * plain_error + units * torch.finfo(quick.dtype).eps * truth.abs().max(), name
