"""The log-odds head for CUDA: cuBLAS products a chunk of tokens at a time, Triton for everything between them.

One kernel folds a row of float32 logits into its log-odds, logsumexp and entropy in one reading; another turns the
row into its gradient, rounded to the operands' dtype for the products that follow, which sum in float32. The kernels
also run under Triton's interpreter (TRITON_INTERPRET=1), which is how they are tested without a GPU.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from bnf_core.head.naive import HeadOptions, binary_entropy
from bnf_core.head.products import product

__all__ = ["log_odds_triton", "token_loss_triton"]

CHUNK_BYTES = 384 * 2**20  # of logits and their gradient held at a time
BLOCK = 4096  # vocabulary entries that a program reads at once


def log_odds_triton(
    hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, options: HeadOptions
) -> tuple[Tensor, Tensor]:
    """As `linear_log_odds`, recomputing the logits in backward."""
    log_odds, entropy = _LogOdds.apply(hidden, weight, bias, labels, options)  # type: ignore[no-untyped-call]
    return log_odds, entropy


def token_loss_triton(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    options: HeadOptions,
    token_loss: Callable[..., Tensor],
    per_token: tuple[Tensor, ...],
) -> tuple[Tensor, Tensor, Tensor]:
    """As `linear_token_loss`, with the gradients computed in forward."""
    loss, log_odds, entropy = _TokenLoss.apply(  # type: ignore[no-untyped-call]
        hidden, weight, bias, labels, options, token_loss, per_token
    )
    return loss, log_odds, entropy


class _LogOdds(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, options: HeadOptions
    ) -> tuple[Tensor, Tensor]:
        work = _Work(hidden, weight, bias, labels, options, (False, False, False))
        log_odds, entropy, lse = (hidden.new_empty(len(hidden), dtype=options.accumulate) for _ in range(3))
        for chunk in work.chunks():
            log_odds[chunk], entropy[chunk], lse[chunk] = work.statistics(chunk)
        ctx.save_for_backward(hidden, weight, bias, labels, lse)
        ctx.options = options
        ctx.mark_non_differentiable(entropy)
        return log_odds, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_log_odds: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, labels, lse = ctx.saved_tensors
        work = _Work(hidden, weight, bias, labels, ctx.options, ctx.needs_input_grad[:3])
        coefficient = grad_log_odds.contiguous()  # the gradient of a sum is one number, expanded
        for chunk in work.chunks():
            work.logits(chunk)
            work.add_gradients(chunk, lse[chunk], coefficient[chunk])
        return (*work.gradients(), None, None)


class _TokenLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        options: HeadOptions,
        token_loss: Callable[..., Tensor],
        per_token: tuple[Tensor, ...],
    ) -> tuple[Tensor, Tensor, Tensor]:
        wanted = ctx.needs_input_grad[:3]
        work = _Work(hidden, weight, bias, labels, options, wanted)
        log_odds, entropy = (hidden.new_empty(len(hidden), dtype=options.accumulate) for _ in range(2))
        loss = hidden.new_zeros((), dtype=options.accumulate)
        for chunk in work.chunks():
            log_odds[chunk], entropy[chunk], lse = work.statistics(chunk)
            with torch.enable_grad():
                leaf = log_odds[chunk].detach().requires_grad_()
                value = token_loss(leaf, *(x[chunk] for x in per_token)).sum()
                coefficient = torch.autograd.grad(value, leaf)[0].contiguous() if any(wanted) else leaf
            loss += value
            work.add_gradients(chunk, lse, coefficient)
        ctx.gradients = work.gradients()
        ctx.mark_non_differentiable(log_odds, entropy)
        return loss, log_odds, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("linear_token_loss: its gradients were used up by an earlier backward; call it again.")
        gradients, ctx.gradients = ctx.gradients, None
        return (*(None if g is None else g.mul_(grad_loss) for g in gradients), None, None, None, None)


class _Work:
    """Operands, buffers and gradients of one call."""

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        options: HeadOptions,
        wanted: tuple[bool, bool, bool],
    ) -> None:
        self.options, self.labels, self.wide = options, labels, options.accumulate
        self.dtypes = hidden.dtype, weight.dtype, None if bias is None else bias.dtype
        self.hidden, self.weight = hidden.to(options.compute), weight.to(options.compute)
        self.bias = None if bias is None else bias.to(self.wide)
        self.vocab = len(weight)
        self.grad_hidden = torch.empty_like(hidden) if wanted[0] else None
        self.grad_weight = torch.zeros_like(weight, dtype=self.wide) if wanted[1] else None
        self.grad_bias = hidden.new_zeros(self.vocab, dtype=self.wide) if wanted[2] else None
        per_token = self.vocab * (self.wide.itemsize + (options.compute.itemsize if any(wanted) else 0))
        size = options.chunk_size or max(1, CHUNK_BYTES // per_token)
        self.size = min(size - size % 128 if size > 128 else size, max(1, len(hidden)))
        space: dict[str, Any] = {"device": hidden.device}
        self.space = torch.empty(self.size, self.vocab, dtype=self.wide, **space)
        # where operands are as wide as the logits, the gradient takes the logits' place
        same = options.compute == self.wide
        self.rounded = self.space if same else torch.empty(self.size, self.vocab, dtype=options.compute, **space)

    def chunks(self) -> Iterator[slice]:
        return (slice(i, min(i + self.size, len(self.hidden))) for i in range(0, len(self.hidden), self.size))

    def logits(self, chunk: slice) -> Tensor:
        """(chunk, vocab) products summed and kept in float32, bias added; scale and cap are the kernels'."""
        out = self.space[: chunk.stop - chunk.start]
        product(self.hidden[chunk], self.weight.T, out)
        return out if self.bias is None else out.add_(self.bias)

    def statistics(self, chunk: slice) -> tuple[Tensor, Tensor, Tensor]:
        """Log-odds, entropy of the whole distribution, and logsumexp of the others, for each token of the chunk."""
        logits = self.logits(chunk)
        z_target, lse, mean = (logits.new_empty(len(logits)) for _ in range(3))
        _statistics_kernel[(len(logits),)](
            logits, self.labels[chunk], z_target, lse, mean, self.vocab, *self._transform(), BLOCK=self._block()
        )
        log_odds = z_target - lse
        of_others = torch.where(lse.isneginf(), 0, (lse - mean).clamp(min=0))  # H(q) = lse - E_q[z]
        return log_odds, binary_entropy(log_odds) + (-log_odds).sigmoid() * of_others, lse

    def add_gradients(self, chunk: slice, lse: Tensor, coefficient: Tensor) -> None:
        """Adds coefficient * dl from the chunk's logits, which are overwritten: dl/dz_y = 1, dl/dz_j = -q_j."""
        if self.grad_hidden is None and self.grad_weight is None and self.grad_bias is None:
            return
        tokens = chunk.stop - chunk.start
        rounded = self.rounded[:tokens]
        grid = (tokens, triton.cdiv(self.vocab, self._block()))
        _gradient_kernel[grid](
            self.space, rounded, self.labels[chunk], lse, coefficient, self.vocab, *self._transform(), BLOCK=self._block()
        )
        if self.grad_hidden is not None:
            out = torch.empty(tokens, self.hidden.shape[1], dtype=self.wide, device=self.hidden.device)
            self.grad_hidden[chunk] = product(rounded, self.weight, out)
        if self.grad_weight is not None:
            product(rounded.T, self.hidden[chunk], self.grad_weight, beta=1)
        if self.grad_bias is not None:
            self.grad_bias += rounded.sum(0, dtype=self.wide)

    def gradients(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        weight = None if self.grad_weight is None else self.grad_weight.to(self.dtypes[1])
        bias = None if self.grad_bias is None else self.grad_bias.to(self.dtypes[2])
        return self.grad_hidden, weight, bias

    def _transform(self) -> tuple[float, float, bool]:
        cap = self.options.softcap
        return self.options.logit_scale, 1.0 if cap is None else cap, cap is not None

    def _block(self) -> int:
        return int(min(BLOCK, triton.next_power_of_2(self.vocab)))


@triton.jit  # type: ignore[untyped-decorator]
def _capped(x, scale, cap, HAS_CAP: tl.constexpr):  # type: ignore[no-untyped-def]
    """z = cap(scale * x), and z / cap."""
    z = x * scale
    t = z
    if HAS_CAP:
        t = 1 - 2 / (tl.exp(2 * z / cap) + 1)  # tanh
        z = cap * t
    return z, t


@triton.jit  # type: ignore[untyped-decorator]
def _statistics_kernel(  # type: ignore[no-untyped-def]
    logits, labels, z_target, lse, mean, VOCAB: tl.constexpr, scale, cap, HAS_CAP: tl.constexpr, BLOCK: tl.constexpr
):
    """One row: logit of the target, logsumexp of the others, and E_q[z], with a running maximum."""
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(labels + row)
    x_target = tl.load(logits + row * VOCAB + target)
    z, _ = _capped(x_target, scale, cap, HAS_CAP)
    tl.store(z_target + row, z)
    top = x_target * 0 - float("inf")
    mass = x_target * 0
    weighted = x_target * 0
    for start in range(0, VOCAB, BLOCK):
        j = start + tl.arange(0, BLOCK)
        x = tl.load(logits + row * VOCAB + j, mask=j < VOCAB, other=0.0)
        z, _ = _capped(x, scale, cap, HAS_CAP)
        z = tl.where((j < VOCAB) & (j != target), z, -float("inf"))
        higher = tl.maximum(top, tl.max(z, 0))
        base = tl.where(higher == -float("inf"), 0.0, higher)
        e = tl.exp(z - base)
        shrink = tl.exp(top - base)
        mass = mass * shrink + tl.sum(e, 0)
        weighted = weighted * shrink + tl.sum(tl.where(z == -float("inf"), 0.0, e * z), 0)
        top = higher
    base = tl.where(top == -float("inf"), 0.0, top)
    tl.store(lse + row, base + tl.log(mass))
    tl.store(mean + row, weighted / mass)


@triton.jit  # type: ignore[untyped-decorator]
def _gradient_kernel(  # type: ignore[no-untyped-def]
    logits, gradient, labels, lse, coefficient, VOCAB: tl.constexpr, scale, cap, HAS_CAP: tl.constexpr, BLOCK: tl.constexpr
):
    """One block of one row: coefficient * dl/dx, rounded to the dtype of `gradient` (which may be `logits`)."""
    row = tl.program_id(0).to(tl.int64)
    j = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(logits + row * VOCAB + j, mask=j < VOCAB, other=0.0)
    z, t = _capped(x, scale, cap, HAS_CAP)
    base = tl.load(lse + row)
    q = tl.where(base == -float("inf"), 0.0, tl.exp(z - base))
    direction = tl.where(j == tl.load(labels + row), 1.0, -q)
    value = tl.load(coefficient + row) * direction * scale
    if HAS_CAP:
        value = value * (1 - t * t)
    tl.store(gradient + row * VOCAB + j, value.to(gradient.dtype.element_ty), mask=j < VOCAB)
