"""What goes wrong in fused heads elsewhere, and may not here: modes of autograd, threads, narrow dtypes, bad input, tracing."""

import contextlib
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from children import run
from implementations import available
from test_head import every_implementation, problem
from test_token_loss import LOSSES, Watch
from torch import Tensor

from bnf_core import linear_bnf_loss, linear_log_odds, linear_token_loss, token_log_odds
from bnf_core.head import IMPLEMENTATIONS
from bnf_core.head.products import exact_unit

FAST = available(name for name in IMPLEMENTATIONS if name != "naive")
fast = pytest.mark.parametrize("implementation", FAST)


def nll(log_odds: Tensor) -> Tensor:
    return -F.logsigmoid(log_odds)


# --- no gradient wanted ---------------------------------------------------------------------------------------------


@fast
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_one_product_and_no_dweight(implementation: str, mode: Any) -> None:
    """A Parameter requires a gradient under no_grad, too."""
    tokens, dim, vocab = 12, 40, 96
    hidden, weight = torch.randn(tokens, dim), torch.nn.Parameter(torch.randn(vocab, dim))
    labels = torch.randint(vocab, (tokens,))
    expected, _ = linear_log_odds(hidden, weight, labels, implementation="naive")
    for call in (linear_log_odds, lambda *a, **k: linear_token_loss(*a, nll, **k)[1:]):
        with mode(), Watch() as watch:
            log_odds, _ = call(hidden, weight, labels, implementation=implementation, chunk_size=4)
        torch.testing.assert_close(log_odds, expected.detach())
        assert watch.multiply_adds == tokens * dim * vocab
        assert watch.elements <= 4 * vocab < vocab * dim


@fast
def test_forward_alone_holds_no_more_than_a_tile(implementation: str) -> None:
    """Where nobody asks for a gradient there is no place for exponentials, nor a copy of the weight under autocast."""
    tokens, dim, vocab = 4, 300, 100_000
    hidden, weight = torch.randn(tokens, dim), torch.randn(vocab, dim)
    with torch.autocast("cpu", torch.bfloat16), Watch() as watch:
        linear_log_odds(hidden, weight, torch.randint(vocab, (tokens,)), implementation=implementation)
    assert watch.elements < weight.numel()


# --- threads --------------------------------------------------------------------------------------------------------


def test_the_cpus_setting_is_restored_whatever_happens() -> None:
    matmul = torch.backends.mkldnn.matmul
    before = matmul.fp32_precision
    with contextlib.suppress(KeyError), exact_unit(torch.bfloat16, "cpu"):
        assert matmul.fp32_precision == "bf16"
        raise KeyError
    assert matmul.fp32_precision == before


def test_the_cpus_setting_is_restored_when_its_last_user_leaves() -> None:
    """Two threads that interleave: the second to enter is the last to leave, and restores what the first found."""
    matmul = torch.backends.mkldnn.matmul
    before = matmul.fp32_precision
    first, second = exact_unit(torch.bfloat16, "cpu"), exact_unit(torch.bfloat16, "cpu")
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert matmul.fp32_precision == "bf16"
    second.__exit__(None, None, None)
    assert matmul.fp32_precision == before


def test_calls_in_threads_leave_the_setting_as_it_was() -> None:
    before = torch.backends.mkldnn.matmul.fp32_precision
    hidden, weight, labels = torch.randn(5, 8).bfloat16(), torch.randn(30, 8).bfloat16(), torch.randint(30, (5,))
    expected, _ = linear_log_odds(hidden, weight, labels)
    wrong = []

    def work() -> None:
        for _ in range(20):
            found, _ = linear_log_odds(hidden, weight, labels, implementation="chunked")
            wrong.extend([] if torch.allclose(found, expected) else [found])

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert torch.backends.mkldnn.matmul.fp32_precision == before


# --- fp16 -----------------------------------------------------------------------------------------------------------


@fast
@pytest.mark.parametrize("small", [1 / (200 * 128), 1e-7])
def test_fp16_gradients_wait_in_float32_for_the_loss_scale(implementation: str, small: float) -> None:
    """As a scaler works: a small loss times a large scale. Rounded before the scale, most of the gradient is gone."""
    inputs = problem((7, 5, 11, 3), torch.float16)
    scale = 2.0**10 / small

    def gradients(name: str, dtype: torch.dtype) -> list[Tensor]:
        leaves = [inputs[k].detach().to(dtype).requires_grad_() for k in ("hidden", "weight", "bias")]
        loss, _, _ = linear_token_loss(
            leaves[0], leaves[1], inputs["labels"], lambda x: -small * F.logsigmoid(x), bias=leaves[2], implementation=name
        )
        (loss * scale).backward()
        return [leaf.grad for leaf in leaves if leaf.grad is not None]

    for exact, ours in zip(gradients("naive", torch.float64), gradients(implementation, torch.float16), strict=True):
        assert ours.dtype == torch.float16
        assert (ours.double() - exact).norm() <= 2**-11 * exact.norm()


# --- bad input ------------------------------------------------------------------------------------------------------


@every_implementation
@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda x: x.mean(), r"expected one loss for each of 6 tokens, got torch.float64 of shape \(\)"),
        (lambda x: x.unsqueeze(1).expand(-1, 2), r"expected one loss for each of 6 tokens.* shape \(6, 2\)"),
        (lambda x: 1.0, "expected one loss for each of 6 tokens, got float 1.0"),
    ],
)
def test_a_token_loss_gives_one_number_a_token(implementation: str, loss: Any, message: str) -> None:
    inputs = problem((7, 5, 11, 3))
    with pytest.raises(ValueError, match=message):
        linear_token_loss(inputs["hidden"], inputs["weight"], inputs["labels"], loss, implementation=implementation)


@every_implementation
def test_a_parameter_inside_a_token_loss_is_refused(implementation: str) -> None:
    """It would get no gradient from what is computed in forward; the same word everywhere, and under no_grad it is none."""
    inputs, temperature = problem((7, 5, 11, 3)), torch.nn.Parameter(torch.tensor(2.0, dtype=torch.float64))
    arguments = inputs["hidden"], inputs["weight"], inputs["labels"]
    with pytest.raises(ValueError, match=r"expected constants beside the log-odds, got torch.float64 of shape \(\) on cpu"):
        linear_token_loss(*arguments, lambda x: nll(x * temperature), implementation=implementation)
    with torch.no_grad():
        linear_token_loss(*arguments, lambda x: nll(x * temperature), implementation=implementation)
    linear_token_loss(*arguments, lambda x: nll(x * temperature.detach()), implementation=implementation)[0].backward()


@every_implementation
def test_a_constant_token_loss_has_no_gradient(implementation: str) -> None:
    inputs = problem((7, 5, 11, 3))
    loss, _, _ = linear_token_loss(
        inputs["hidden"],
        inputs["weight"],
        inputs["labels"],
        lambda x: torch.ones_like(x.detach()),
        implementation=implementation,
    )
    assert loss == 6
    if implementation != "naive":
        loss.backward()
        assert not inputs["weight"].grad.any()


@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.parametrize("name", ["coefficient", "ref_log_odds"])
@pytest.mark.parametrize("shape", [(7, 1), (7, 7), (1,), ()])
def test_bnf_takes_one_number_a_token(name: str, shape: tuple[int, ...]) -> None:
    """What would broadcast is refused."""
    inputs = problem((7, 5, 11, 3))
    values = {"ref_log_odds": torch.zeros(7), "coefficient": torch.ones(7)} | {name: torch.ones(shape)}
    with pytest.raises(ValueError, match=rf"{name}: expected shape \(7,\)"):
        linear_bnf_loss(inputs["hidden"], inputs["weight"], inputs["labels"], **values)


@every_implementation
def test_what_stands_at_ignored_tokens_is_ignored(implementation: str) -> None:
    inputs = problem((7, 5, 11, 3))
    ref, coefficient = torch.zeros(7, dtype=torch.float64), torch.ones(7, dtype=torch.float64)
    arguments = inputs["hidden"], inputs["weight"], inputs["labels"]
    expected, _, _ = linear_bnf_loss(*arguments, ref, coefficient, implementation=implementation)
    ref[1], coefficient[1] = torch.nan, torch.inf  # the label there is -100
    loss, _, _ = linear_bnf_loss(*arguments, ref, coefficient, implementation=implementation)
    assert loss == expected
    loss.backward()
    assert all(inputs[name].grad.isfinite().all() for name in ("hidden", "weight"))


@every_implementation
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32], ids=str)
def test_labels_of_narrow_integers(implementation: str, dtype: torch.dtype) -> None:
    """-100 is 156 in uint8, and a vocabulary of 256 is 0 in int8."""
    hidden, weight = torch.randn(3, 4, dtype=torch.float64), torch.randn(256, 4, dtype=torch.float64)
    labels = torch.tensor([10, 100, 156 if dtype == torch.uint8 else -100])
    expected = linear_log_odds(hidden, weight, labels, implementation="naive")
    found = linear_log_odds(hidden, weight, labels.to(dtype), implementation=implementation)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert (found[0][2] == 0) == (dtype != torch.uint8)
    logits = hidden @ weight.T
    torch.testing.assert_close(token_log_odds(logits, labels.to(dtype))[0], expected[0])


@every_implementation
@pytest.mark.parametrize("options", [{}, {"softcap": 3.0}], ids=["plain", "softcap"])
def test_infinite_states_are_not_finite_under_a_cap(implementation: str, options: dict[str, Any]) -> None:
    """tanh of infinity is 1: what is bad must not become a number."""
    inputs = problem((7, 5, 11, 3))
    with torch.no_grad():
        inputs["hidden"][2, 0] = torch.inf
    log_odds, _ = linear_log_odds(**inputs, implementation=implementation, **options)
    assert not log_odds[2].isfinite()
    assert log_odds[[0, 3, 4, 5, 6]].isfinite().all()


@every_implementation
@pytest.mark.parametrize("one_pass", [False, True])
def test_a_masked_token_stays_masked_under_a_cap(implementation: str, one_pass: bool) -> None:
    inputs = problem((5, 4, 6, 2))
    inputs["labels"] = torch.tensor([0, 4, 2, 0, 1])
    with torch.no_grad():
        inputs["bias"][3] = -torch.inf
    kept = [0, 1, 2, 4, 5]
    smaller = {"weight": inputs["weight"][kept], "bias": inputs["bias"][kept], "labels": torch.tensor([0, 3, 2, 0, 1])}
    expected, _ = linear_log_odds(inputs["hidden"], **smaller, softcap=3.0, implementation="naive")
    if one_pass:
        arguments = inputs["hidden"], inputs["weight"], inputs["labels"], nll
        loss, found, _ = linear_token_loss(*arguments, bias=inputs["bias"], softcap=3.0, implementation=implementation)
    else:
        found, _ = linear_log_odds(**inputs, softcap=3.0, implementation=implementation)
        loss = nll(found).sum()
    torch.testing.assert_close(found, expected.detach() if one_pass else expected)
    loss.backward()
    for name in ("hidden", "weight", "bias"):
        assert inputs[name].grad.isfinite().all()
    assert not inputs["weight"].grad[3].any()


# --- float64, and digits --------------------------------------------------------------------------------------------


@every_implementation
def test_float64_stays_float64_under_autocast(implementation: str) -> None:
    inputs = problem((7, 5, 11, 3))
    arguments = inputs["hidden"], inputs["weight"], inputs["labels"]
    expected, _ = linear_log_odds(*arguments, implementation=implementation)
    with torch.autocast("cpu", torch.bfloat16):
        found, _ = linear_log_odds(*arguments, implementation=implementation)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, expected)


@fast
def test_the_entropy_keeps_its_digits_at_large_logits(implementation: str) -> None:
    """Logits + 10,000 are another way to write the same distribution."""
    inputs = problem((7, 5, 11, 3), torch.float32)
    bias = torch.full((11,), 1e4)
    arguments = inputs["hidden"].detach(), inputs["weight"].detach(), inputs["labels"]
    shifted, rounded = (arguments[0] @ arguments[1].T + bias), arguments[0].double() @ arguments[1].double().T
    assert (shifted.double() - rounded - 1e4).abs().max() < 1e-2  # what a logit of that size loses
    _, exact = token_log_odds(shifted.double(), inputs["labels"])
    _, found = linear_log_odds(*arguments, bias=bias, implementation=implementation)
    assert (found - exact).abs().max() < 2e-3
    _, plain = linear_log_odds(*arguments, bias=bias, implementation="naive")
    assert (found - exact).abs().max() <= 1.5 * (plain - exact).abs().max() + 1e-5


# --- what is refused, and what torch.compile sees -------------------------------------------------------------------


@fast
@pytest.mark.parametrize("one_pass", [False, True])
def test_double_backward_is_refused(implementation: str, one_pass: bool) -> None:
    """A gradient penalty beside another term would be a constant, silently; the naive version computes it."""
    inputs = problem((7, 5, 11, 3))
    arguments = inputs["hidden"], inputs["weight"], inputs["labels"]

    def penalty(name: str) -> None:
        if one_pass:
            loss = linear_token_loss(*arguments, nll, implementation=name)[0]
        else:
            loss = nll(linear_log_odds(*arguments, implementation=name)[0]).sum()
        (gradient,) = torch.autograd.grad(loss, inputs["hidden"], create_graph=True)
        (loss + gradient.square().sum()).backward()

    penalty("naive")
    with pytest.raises(RuntimeError, match="double backward is not supported; implementation='naive'"):
        penalty(implementation)


@fast
@pytest.mark.parametrize("one_pass", [False, True])
def test_vmap_and_forward_mode_are_refused(implementation: str, one_pass: bool) -> None:
    inputs = {k: v.detach() if isinstance(v, Tensor) else v for k, v in problem((7, 5, 11, 3)).items()}

    def head(hidden: Tensor) -> Tensor:
        arguments = hidden, inputs["weight"], inputs["labels"]
        if one_pass:
            return linear_token_loss(*arguments, nll, implementation=implementation)[0]
        return linear_log_odds(*arguments, implementation=implementation)[0]

    with pytest.raises(RuntimeError, match="vmap is not supported"):
        torch.vmap(head)(torch.randn(2, 7, 5, dtype=torch.float64))
    with pytest.raises(RuntimeError, match="forward-mode differentiation is not supported"):
        torch.func.jvp(head, (inputs["hidden"],), (inputs["hidden"],))


@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.parametrize("frozen", ["", "weight"])
def test_fake_tensors_have_the_shapes_of_real_ones(frozen: str) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    inputs = problem((7, 5, 11, 3), torch.float32)
    names = ("hidden", "weight", "bias")

    def results(values: dict[str, Any]) -> list[Any]:
        leaves = {name: values[name].detach().requires_grad_(name != frozen) for name in names}
        log_odds, entropy = linear_log_odds(**leaves, labels=values["labels"], implementation="chunked")
        more = values["ref"], values["ref"]
        loss, *rest = linear_bnf_loss(leaves["hidden"], leaves["weight"], values["labels"], *more, bias=leaves["bias"])
        (log_odds.sum() + loss).backward()
        found = [log_odds, entropy, loss, *rest, *(leaf.grad for leaf in leaves.values())]
        return [None if x is None else (tuple(x.shape), x.dtype, x.requires_grad) for x in found]

    inputs["ref"] = torch.zeros(7)
    mode = FakeTensorMode()
    fake = {name: mode.from_tensor(value) if isinstance(value, Tensor) else value for name, value in inputs.items()}
    expected = results(inputs)
    with mode:
        assert results(fake) == expected


@pytest.mark.usefixtures("unchecked_shapes")
def test_a_loss_of_ones_own_wants_numbers() -> None:
    hidden, weight, labels = (
        torch.zeros(7, 5, device="meta"),
        torch.zeros(11, 5, device="meta"),
        torch.zeros(7, device="meta"),
    )
    with pytest.raises(RuntimeError, match="expected tensors that hold numbers, for a loss that is a function of yours"):
        linear_token_loss(hidden, weight, labels.long(), nll)


def test_tracers_take_the_head_whole() -> None:
    """In a process where nothing is checked at every call: torch.compile, torch.export, and torch.library's own checks."""
    said = run(str(Path(__file__).parent / "traced_head.py"))
    assert said.out.split() == ["compiled", "compiled_naive", "exported", "broken_at_a_closure", "library_rules"]


# --- a compiler that is missing, or fails ---------------------------------------------------------------------------


def test_only_a_compilers_failure_falls_back(caplog: pytest.LogCaptureFixture) -> None:
    from bnf_core.head.folds import FirstThatCompiles

    class CompilationError(Exception):
        __module__ = "triton.compiler.errors"

    calls = []

    def broken(error: Exception) -> None:
        calls.append("broken")
        raise error

    def works(_: Exception) -> None:
        calls.append("works")

    for error in (CompilationError("no"), ImportError("no", name="triton")):
        first = FirstThatCompiles(broken, works)
        first(error)
        first(error)
        assert calls == ["broken", "works", "works"]
        calls.clear()
        assert [r.message for r in caplog.records] == [
            f"the head's kernel does not compile here: works in place of broken ({type(error).__name__}: no)"
        ]
        caplog.clear()
    for error in (torch.OutOfMemoryError("full"), ValueError("wrong"), RuntimeError("Triton Error [CUDA]: out of memory")):
        first = FirstThatCompiles(broken, works)
        with pytest.raises(type(error)):
            first(error)
        assert len(first.functions) == 2
        calls.clear()
    assert not caplog.records


def test_the_eager_fold_takes_over_where_the_compiler_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    from bnf_core.head import folds

    class InductorError(RuntimeError):
        __module__ = "torch._inductor.exc"

    def broken(*_: Any) -> Any:
        raise InductorError("no C++ compiler found")

    monkeypatch.setattr(folds, "_compiler", lambda: broken)
    first = folds.FirstThatCompiles(folds._compiled_exponentials, folds._exponentials)
    monkeypatch.setattr(folds, "_compiled_or_eager", first)
    inputs = problem((7, 5, 11, 3))
    arguments = inputs["hidden"], inputs["weight"], inputs["labels"], LOSSES["bnf"], torch.zeros(7)
    expected = linear_token_loss(*arguments, implementation="chunked")
    found = linear_token_loss(*arguments, implementation="compiled")
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert len(first.functions) == 1


@pytest.mark.parametrize("options", [{}, {"softcap": 3.0}, {"logit_scale": 0.3}], ids=["plain", "softcap", "scale"])
def test_tritons_float64_has_all_its_digits(options: dict[str, Any]) -> None:
    """Scale and cap are constants of the kernel, not float32 arguments."""
    pytest.importorskip("triton", reason="triton is not installed (pip install triton)")
    inputs = problem((7, 5, 11, 3))
    found, entropy = linear_log_odds(**inputs, implementation="triton", **options)
    expected, plain = linear_log_odds(**inputs, implementation="naive", **options)
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(entropy, plain, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("implementation", ["naive", "chunked"])
def test_a_label_below_zero_is_named_where_there_is_no_other(implementation: str) -> None:
    with pytest.raises(ValueError, match=r"^labels: .* got -5 at position \[0\]"):
        linear_log_odds(torch.ones(1, 2), torch.ones(4, 2), torch.tensor([-5]), implementation=implementation)
