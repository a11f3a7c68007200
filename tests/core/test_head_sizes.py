"""The head where sizes matter: several blocks and chunks, odd widths, sums of many small parts, and CPUs of every kind."""

import sys
from typing import Any

import pytest
import torch
from implementations import available
from test_token_loss import focal
from torch import Tensor

from bnf_core import linear_log_odds, linear_token_loss
from bnf_core.head import IMPLEMENTATIONS

fast = pytest.mark.parametrize("implementation", available(name for name in IMPLEMENTATIONS if name != "naive"))


def everything(
    implementation: str, leaves: list[Tensor], labels: Tensor, one_pass: bool, frozen: tuple[int, ...] = (), **options: Any
) -> list[Tensor | None]:
    """Log-odds, entropy, and the gradients in hidden, weight and bias of a sum in which every token counts differently."""
    leaves = [x.detach().requires_grad_(i not in frozen) for i, x in enumerate(leaves)]
    hidden, weight, bias = leaves
    factor = torch.linspace(-1, 2, len(labels), dtype=torch.float64)
    if one_pass:
        loss, log_odds, entropy = linear_token_loss(
            hidden,
            weight,
            labels,
            lambda x, f: f * focal(x, f),
            factor.to(torch.promote_types(hidden.dtype, torch.float32)),
            bias=bias,
            implementation=implementation,
            **options,
        )
    else:
        log_odds, entropy = linear_log_odds(hidden, weight, labels, bias=bias, implementation=implementation, **options)
        f = factor.to(log_odds.dtype)
        loss = (f * focal(log_odds, f)).sum()
    loss.backward()
    return [log_odds.detach(), entropy, *(x.grad for x in leaves)]


def no_worse_than_plain(implementation: str, leaves: list[Tensor], labels: Tensor, one_pass: bool, **options: Any) -> None:
    exact = everything("naive", [x.double() for x in leaves], labels, one_pass, **{**options, "chunk_size": None})
    plain = everything("naive", leaves, labels, one_pass, **{**options, "chunk_size": None})
    fast_ones = everything(implementation, leaves, labels, one_pass, **options)
    for i, (truth, slow, quick) in enumerate(zip(exact, plain, fast_ones, strict=True)):
        assert truth is not None
        assert slow is not None
        assert quick is not None
        error, plain_error = (quick.double() - truth).abs().max(), (slow.double() - truth).abs().max()
        size = max(float(truth.abs().max()), 10.0 if i < 2 else 0.0)  # log-odds and entropy: of the logits
        assert error <= 1.5 * plain_error + 64 * torch.finfo(quick.dtype).eps * size, i


@fast
@pytest.mark.parametrize("one_pass", [False, True])
@pytest.mark.parametrize("softcap", [None, 4.0])
@pytest.mark.parametrize("vocab", [1025, 70_001])
def test_blocks(implementation: str, one_pass: bool, softcap: float | None, vocab: int) -> None:
    """Targets far apart, at the first and last entries of blocks; a last block of one entry."""
    if implementation == "triton" and not torch.cuda.is_available():
        vocab = min(vocab, 5 * 1024 + 1)  # blocks of 1,024; an interpreter is slow
    labels = torch.tensor([0, 1023, 1024, vocab - 1, vocab // 2])
    leaves = [torch.randn(5, 3), torch.randn(vocab, 3), torch.randn(vocab)]
    no_worse_than_plain(implementation, leaves, labels, one_pass, softcap=softcap, logit_scale=0.7)


@fast
@pytest.mark.parametrize("one_pass", [False, True])
@pytest.mark.parametrize("chunk_size", [None, 3])
def test_sums_of_many_small_parts(implementation: str, one_pass: bool, chunk_size: int | None) -> None:
    """dweight and dbias of bf16 operands add up in float32: many tokens of one label, a chunk at a time."""
    tokens = 50 if implementation == "triton" and not torch.cuda.is_available() else 1000  # an interpreter is slow
    hidden, weight, bias = (x.bfloat16() for x in (torch.randn(tokens, 4).abs(), torch.randn(6, 4), torch.randn(6)))
    labels = torch.full((tokens,), 2)
    labels[:3] = torch.tensor([0, 5, 1])
    exact = everything("naive", [x.double() for x in (hidden, weight, bias)], labels, one_pass)
    found = everything(implementation, [hidden, weight, bias], labels, one_pass, chunk_size=chunk_size)
    for truth, ours in zip(exact[3:], found[3:], strict=True):
        assert truth is not None
        assert ours is not None
        assert (ours.double() - truth).norm() <= 2**-7 * truth.norm()


@fast
@pytest.mark.parametrize("one_pass", [False, True])
@pytest.mark.parametrize("frozen", [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2)], ids=str)
def test_every_gradient_without_the_others(implementation: str, one_pass: bool, frozen: tuple[int, ...]) -> None:
    leaves = [torch.randn(7, 4).double(), torch.randn(50, 4).double(), torch.randn(50).double()]
    labels = torch.randint(50, (7,))
    expected = everything("naive", leaves, labels, one_pass, frozen)
    found = everything(implementation, leaves, labels, one_pass, frozen, chunk_size=3)
    for truth, ours in zip(expected, found, strict=True):
        assert (truth is None) == (ours is None)
        if truth is not None and ours is not None:
            torch.testing.assert_close(ours, truth)


@fast
def test_dhidden_is_of_the_rounded_weight_under_autocast(implementation: str) -> None:
    """Two tokens: the other one's share of the gradient is 1, so that dhidden is a difference of two rows, exactly."""
    if implementation == "triton" and not torch.cuda.is_available():
        pytest.skip("Triton's interpreter cuts numbers to bf16 instead of rounding them")
    hidden, weight = torch.randn(3, 8).requires_grad_(), torch.randn(2, 8)
    with torch.autocast(hidden.device.type, torch.bfloat16):
        linear_log_odds(hidden, weight, torch.zeros(3, dtype=torch.long), implementation=implementation)[0].sum().backward()
    rows = weight.bfloat16().float()
    torch.testing.assert_close(hidden.grad, (rows[0] - rows[1]).expand(3, 8), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("unit", [False, True], ids=["no-bf16-unit", "bf16-unit"])
@pytest.mark.parametrize("exact", [False, True], ids=["rounded", "exact"])
@pytest.mark.parametrize("under_autocast", [False, True], ids=["bf16-weight", "float32-weight"])
@pytest.mark.parametrize("one_pass", [False, True])
def test_bf16_on_cpus_of_both_kinds(
    monkeypatch: pytest.MonkeyPatch, unit: bool, exact: bool, under_autocast: bool, one_pass: bool
) -> None:
    """With a unit for bf16 products and without: the paths that another machine than this would take."""
    dtypes = (torch.float32, torch.float64, torch.bfloat16) if unit else (torch.float32, torch.float64)
    monkeypatch.setattr(
        sys.modules["bnf_core.head.layout"], "multiplies", lambda dtype, device: device != "cpu" or dtype in dtypes
    )
    dtype = torch.float32 if under_autocast else torch.bfloat16
    leaves = [x.bfloat16().to(dtype) for x in (torch.randn(40, 16), torch.randn(300, 16), torch.randn(300))]
    labels = torch.randint(300, (40,))
    truth = everything("naive", [x.double() for x in leaves], labels, one_pass)
    for chunk_size in (None, 7):
        with torch.autocast("cpu", torch.bfloat16, enabled=under_autocast):
            found = everything("chunked", leaves, labels, one_pass, chunk_size=chunk_size, exact=exact)
        for i, (expected, ours) in enumerate(zip(truth, found, strict=True)):
            assert expected is not None
            assert ours is not None
            limit = 2**-18 if i < 2 and exact else 2**-6 if i < 2 or exact else 2**-4
            size = expected.abs().max() if i >= 2 else 20
            assert (ours.double() - expected).abs().max() <= limit * size, i
