"""The log-odds head a chunk of tokens at a time: never more than (vocab, chunk) logits, on any device.

`token_loss_chunked` has the gradient of each chunk while its logits are there: three matrix products in all.
`log_odds_chunked` must wait for the whole sequence, and recomputes them in backward: four.

Logits stand transposed, (vocab, chunk) = weight @ hidden.T, which the products like better on a CPU and which makes a
block of the vocabulary contiguous. Everything after the product happens in place, with exp2, which is several times
faster than exp there: z = unit * raw, e^z = 2^(k raw), k = unit / log 2. Factors of a token multiply its hidden state
or its gradient, never its logits.
"""

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from bnf_core.head.naive import HeadOptions, binary_entropy

__all__ = ["log_odds_chunked", "token_loss_chunked"]

CHUNK_BYTES = 52 * 2**20  # of logits (and what else is of their size) held at a time
BLOCK_BYTES = 4 * 2**20  # of weights held in the dtype that products are summed in


def log_odds_chunked(
    hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, options: HeadOptions
) -> tuple[Tensor, Tensor]:
    """As `linear_log_odds`, recomputing the logits in backward."""
    log_odds, entropy = _LogOdds.apply(hidden, weight, bias, labels, options)  # type: ignore[no-untyped-call]
    return log_odds, entropy


def token_loss_chunked(
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
        head = _Head(weight, bias, options)
        log_odds, entropy, lse = (hidden.new_empty(len(hidden), dtype=options.accumulate) for _ in range(3))
        with _exact_products(head):
            for chunk, (buffer, scratch) in _chunks(head, len(hidden), buffers=2):
                rows = _exponentials(head, head.rounded(hidden[chunk]), labels[chunk], buffer, scratch)
                log_odds[chunk], entropy[chunk], lse[chunk] = rows.log_odds, rows.entropy(rows.mean_log2()), rows.lse
        ctx.save_for_backward(hidden, weight, bias, labels, lse)
        ctx.options = options
        ctx.mark_non_differentiable(entropy)
        return log_odds, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_log_odds: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, labels, lse = ctx.saved_tensors
        head = _Head(weight, bias, ctx.options)
        gradients = _Gradients(head, hidden, *ctx.needs_input_grad[:3])
        with _exact_products(head):
            for chunk, (buffer, scratch) in _chunks(head, len(hidden), buffers=2 if head.softcap else 1):
                h = head.rounded(hidden[chunk])
                rows = _exponentials(head, h, labels[chunk], buffer, scratch, lse=lse[chunk])
                gradients.add(chunk, h, labels[chunk], rows, grad_log_odds[chunk])
        return (*gradients.result(), None, None)


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
        head = _Head(weight, bias, options)
        wanted = ctx.needs_input_grad[:3]
        gradients = _Gradients(head, hidden, *wanted)
        log_odds, entropy = (hidden.new_empty(len(hidden), dtype=options.accumulate) for _ in range(2))
        loss = hidden.new_zeros((), dtype=options.accumulate)
        # E_q[z] is a by-product of dhidden where logits are linear; elsewhere it takes a second buffer
        by_product = wanted[0] and head.softcap is None
        with _exact_products(head):
            for chunk, (buffer, scratch) in _chunks(head, len(hidden), buffers=1 if by_product else 2):
                h = head.rounded(hidden[chunk])
                rows = _exponentials(head, h, labels[chunk], buffer, scratch)
                mean_log2 = None if by_product else rows.mean_log2()
                with torch.enable_grad():
                    leaf = rows.log_odds.requires_grad_()
                    value = token_loss(leaf, *(x[chunk] for x in per_token)).sum()
                    coefficient = torch.autograd.grad(value, leaf)[0] if any(wanted) else leaf
                loss += value
                by_hidden = gradients.add(chunk, h, labels[chunk], rows, coefficient)
                if mean_log2 is None:
                    assert by_hidden is not None
                    mean_log2 = rows.mean_log2_from(h, by_hidden)
                log_odds[chunk], entropy[chunk] = rows.log_odds, rows.entropy(mean_log2)
        ctx.gradients = gradients.result()
        ctx.mark_non_differentiable(log_odds, entropy)
        return loss, log_odds, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("linear_token_loss: its gradients were used up by an earlier backward; call it again.")
        gradients, ctx.gradients = ctx.gradients, None
        if grad_loss.device.type != "cpu" or grad_loss != 1:  # on a CPU the comparison is free
            gradients = tuple(None if g is None else g.mul_(grad_loss) for g in gradients)
        return (*gradients, None, None, None, None)


class _Head:
    """The head's parameters, and its products, block by block where the weight must first be rounded or widened."""

    def __init__(self, weight: Tensor, bias: Tensor | None, options: HeadOptions) -> None:
        self.weight, self.options, self.softcap = weight, options, options.softcap
        self.bias = None if bias is None else bias.to(options.accumulate)
        self.bias_dtype = options.accumulate if bias is None else bias.dtype
        self.vocab = len(weight)
        # float32 operands that the CPU's bf16 unit rounds as it multiplies: exact where they hold bf16 numbers
        self.bf16_unit = (
            options.compute == torch.bfloat16 and weight.device.type == "cpu" and bool(torch.cpu._is_amx_tile_supported())
        )
        self.unit = options.logit_scale if options.softcap is None else options.softcap  # z = unit * raw
        self.k = self.unit / math.log(2)

    def rounded(self, x: Tensor) -> Tensor:
        """x rounded to the dtype it is computed in, held in the dtype that products are summed in."""
        return x.to(self.options.compute).to(self.options.accumulate)

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """Rows of the weight, ready for a product."""
        rounded = self.weight.dtype == self.options.compute or self.bf16_unit
        if rounded and self.weight.dtype == self.options.accumulate:
            yield slice(0, self.vocab), self.weight
            return
        size = max(1, BLOCK_BYTES // (self.weight.shape[1] * self.options.accumulate.itemsize))
        for start in range(0, self.vocab, size):
            rows = slice(start, min(start + size, self.vocab))
            yield rows, self.rounded(self.weight[rows])

    def raw(self, h: Tensor, out: Tensor) -> Tensor:
        """(vocab, chunk) logits before their unit: weight @ h.T + bias, under a cap tanh of their ratio to it."""
        for rows, weight in self.blocks():
            torch.mm(weight, h.T, out=out[rows])
        if self.bias is not None:
            out.add_(self.bias.unsqueeze(1))
        if self.softcap is not None:
            out.mul_(self.options.logit_scale / self.softcap).tanh_()
        return out


class _Rows(NamedTuple):
    """What a chunk of tokens came to; vectors are (chunk,)."""

    head: _Head
    others: Tensor  # (vocab, chunk): e^(z_j - base), or q_j where lse was given; 0 at the target
    raw: Tensor | None  # (vocab, chunk), where a second buffer holds it: log2 of others, or under a cap raw logits
    mass: Tensor  # sum of `others`, 1 where there are none
    z_target: Tensor
    lse: Tensor  # logsumexp of the others
    log2_base: Tensor  # base / log 2

    @property
    def log_odds(self) -> Tensor:
        return self.z_target - self.lse

    def mean_log2(self) -> Tensor:
        """E_q[log2 of e^(z - base)], by passes over both buffers; without a cap `raw` is used up."""
        assert self.raw is not None
        logs = self.raw if self.head.softcap is None else torch.add(-self.log2_base, self.raw, alpha=self.head.k)
        return logs.clamp_(min=-1e30).mul_(self.others).sum(0) / self.mass  # 0 where -inf was

    def mean_log2_from(self, h: Tensor, by_hidden: Tensor) -> Tensor:
        """The same from E_q[raw] = h . E_q[w] + E_q[b], where raw logits are linear; by_hidden = sum_j others_j w_j."""
        mean = (h * by_hidden).sum(1)
        if self.head.bias is not None:
            finite = self.head.bias.masked_fill(self.head.bias.isneginf(), 0)  # ruled out: others is 0 there
            mean = mean + finite @ self.others
        return mean / self.mass * self.head.k - self.log2_base

    def entropy(self, mean_log2: Tensor) -> Tensor:
        """H(pi) = H(target or not) + (1 - pi_y) H(q),   H(q) = log mass - E_q[log others], 0 where there are none."""
        of_others = (self.mass.log() - mean_log2 * math.log(2)).clamp(min=0)
        missing = (-self.log_odds).sigmoid()  # 1 - pi_y
        return binary_entropy(self.log_odds) + missing * of_others


def _exponentials(
    head: _Head, h: Tensor, labels: Tensor, buffer: Tensor, scratch: Tensor | None, lse: Tensor | None = None
) -> _Rows:
    """Logits of a chunk, and the exponentials of all but the target's; from lse, if given, they come out as q."""
    raw = head.raw(h, buffer)
    columns = torch.arange(len(h), device=h.device)
    z_target = head.unit * raw[labels, columns]
    raw[labels, columns] = -torch.inf
    if lse is None:
        top = raw.amax(0) * head.unit
        base = top.masked_fill(top.isneginf(), 0)  # nothing but the target is possible
    else:
        base = lse.masked_fill(lse.isneginf(), 0)
    log2_base = base / math.log(2)
    if scratch is None:
        others = torch.add(-log2_base, raw, alpha=head.k, out=raw).exp2_()
        kept = None
    elif head.softcap is None:
        kept = torch.add(-log2_base, raw, alpha=head.k, out=raw)
        others = torch.exp2(kept, out=scratch)
    else:
        kept = raw
        others = torch.add(-log2_base, raw, alpha=head.k, out=scratch).exp2_()
    mass = others.sum(0) if lse is None else torch.ones_like(z_target)
    if lse is None:
        lse = base + mass.log()
    return _Rows(head, others, kept, mass.masked_fill(mass == 0, 1), z_target, lse, log2_base)


class _Gradients:
    """dhidden, dweight and dbias, where wanted, summed over chunks in the dtype that products are summed in."""

    def __init__(self, head: _Head, hidden: Tensor, for_hidden: bool, for_weight: bool, for_bias: bool) -> None:
        wide = head.options.accumulate
        self.head = head
        self.hidden = torch.empty_like(hidden) if for_hidden else None
        self.weight = torch.empty_like(head.weight, dtype=wide) if for_weight else None
        self.untouched = True  # the first chunk overwrites: filling dweight with zeros first would be one more pass
        self.bias = hidden.new_zeros(head.vocab, dtype=wide) if for_bias else None

    def add(self, chunk: slice, h: Tensor, labels: Tensor, rows: _Rows, coefficient: Tensor) -> Tensor | None:
        """Adds coefficient * dl, dl/dz_y = 1 and dl/dz_j = -q_j; returns sum_j others_j w_j if dhidden is wanted."""
        head, others = self.head, rows.others
        coefficient = coefficient * head.options.logit_scale
        at_target = coefficient
        if head.softcap is not None:  # dz/draw = logit_scale * (1 - tanh^2)
            assert rows.raw is not None
            at_target = coefficient * (1 - (rows.z_target / head.softcap).square())
            slope = rows.raw.square_().neg_().add_(1)
            slope[labels, torch.arange(len(h), device=h.device)] = 0  # -inf was there
            others = slope.mul_(others)
        at_others = -coefficient / rows.mass
        by_hidden = None
        if self.hidden is not None:
            by_hidden = torch.empty_like(h)
            for block, weight in head.blocks():
                by_hidden.addmm_(others[block].T, weight, beta=0 if block.start == 0 else 1)
            target = head.rounded(head.weight.index_select(0, labels))
            self.hidden[chunk] = target.mul_(at_target.unsqueeze(1)).addcmul_(by_hidden, at_others.unsqueeze(1))
        if self.weight is not None:
            self.weight.addmm_(others, h * at_others.unsqueeze(1), beta=0 if self.untouched else 1)
            self.untouched = False
            self.weight.index_add_(0, labels, h * at_target.unsqueeze(1))
        if self.bias is not None:
            self.bias += others @ at_others
            self.bias.index_add_(0, labels, at_target)
        return by_hidden

    def result(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        if self.weight is not None and self.untouched:  # no tokens at all
            self.weight.zero_()
        weight = None if self.weight is None else self.weight.to(self.head.weight.dtype)
        bias = None if self.bias is None else self.bias.to(self.head.bias_dtype)
        return self.hidden, weight, bias


def _chunks(head: _Head, tokens: int, buffers: int) -> Iterator[tuple[slice, tuple[Tensor, Tensor | None]]]:
    """Slices of the tokens with (vocab, chunk) buffers to work in: allocated once, because touching new pages is slow."""
    wide = head.options.accumulate
    held = buffers + (head.softcap is not None)  # the entropy under a cap takes one more for a moment
    size = head.options.chunk_size or max(1, CHUNK_BYTES // (head.vocab * wide.itemsize * held))
    if head.options.chunk_size is None and size > 64:
        size -= size % 64  # products of odd sizes are slower
    size = min(size, max(tokens, 1))
    space = torch.empty(buffers, head.vocab * size, dtype=wide, device=head.weight.device)
    for start in range(0, tokens, size):
        chunk = slice(start, min(start + size, tokens))
        views = [s[: head.vocab * (chunk.stop - start)].view(head.vocab, chunk.stop - start) for s in space]
        yield chunk, (views[0], views[1] if buffers == 2 else None)


def _exact_products(head: "_Head") -> contextlib.AbstractContextManager[None]:
    return bf16_products() if head.bf16_unit else contextlib.nullcontext()


@contextlib.contextmanager
def bf16_products() -> Iterator[None]:
    """float32 operands that hold bf16 numbers, multiplied exactly by the CPU's bf16 unit (restored afterwards)."""
    matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before
