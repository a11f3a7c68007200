"""The log-odds head a chunk of tokens at a time: never more than (chunk, vocab) logits, on any device.

Forward keeps logsumexp over the others, one number a token; backward recomputes each chunk's logits from it:
four matrix products in all.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from bnf_core._checks import IGNORE
from bnf_core.head.naive import binary_entropy

__all__ = ["linear_log_odds_chunked"]

CHUNK_BYTES = 32 * 2**20  # of logits held at a time


def linear_log_odds_chunked(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    logit_scale: float,
    compute_dtype: torch.dtype,
    chunk_size: int | None,
) -> tuple[Tensor, Tensor]:
    """As `linear_log_odds`, with `chunk_size` tokens' logits in memory (None: 32 MiB of them)."""
    accumulate = torch.float64 if compute_dtype == torch.float64 else torch.float32
    if chunk_size is None:
        chunk_size = max(1, CHUNK_BYTES // (weight.shape[0] * accumulate.itemsize))
    log_odds, entropy = _ChunkedLogOdds.apply(  # type: ignore[no-untyped-call]
        hidden, weight, bias, labels, softcap, logit_scale, compute_dtype, accumulate, chunk_size
    )
    return log_odds, entropy


class _ChunkedLogOdds(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        softcap: float | None,
        logit_scale: float,
        compute_dtype: torch.dtype,
        accumulate: torch.dtype,
        chunk_size: int,
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(hidden, weight, bias, labels)
        ctx.options = softcap, logit_scale, compute_dtype, accumulate, chunk_size
        tokens = hidden.shape[0]
        log_odds, entropy = (torch.zeros(tokens, dtype=accumulate, device=hidden.device) for _ in range(2))
        ctx.lse = torch.zeros_like(log_odds)
        operand = _rounded(weight, compute_dtype, accumulate)
        for chunk in _chunks(tokens, chunk_size):
            h = _rounded(hidden[chunk], compute_dtype, accumulate)
            logits = _logits(h, operand, bias, softcap, logit_scale)
            log_odds[chunk], entropy[chunk], ctx.lse[chunk] = _row_statistics(logits, labels[chunk])
        ignored = labels == IGNORE
        log_odds.masked_fill_(ignored, 0)
        entropy.masked_fill_(ignored, 0)
        ctx.mark_non_differentiable(entropy)
        return log_odds, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_log_odds: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, labels = ctx.saved_tensors
        softcap, logit_scale, compute_dtype, accumulate, chunk_size = ctx.options
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        operand = _rounded(weight, compute_dtype, accumulate)
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_weight = torch.zeros_like(operand) if needs_weight else None
        grad_bias = torch.zeros(weight.shape[0], dtype=accumulate, device=weight.device) if needs_bias else None
        # a token without a gradient must not contribute NaN where its q is undefined
        grad_log_odds = grad_log_odds.masked_fill(labels == IGNORE, 0)
        for chunk in _chunks(hidden.shape[0], chunk_size):
            h = _rounded(hidden[chunk], compute_dtype, accumulate)
            logits = _logits(h, operand, bias, softcap, logit_scale)
            slope = None if softcap is None else logit_scale * (1 - (logits / softcap).square_())
            target = labels[chunk].long().masked_fill(labels[chunk] == IGNORE, 0).unsqueeze(-1)
            lse = ctx.lse[chunk].unsqueeze(-1)
            # dl/dz_y = 1, dl/dz_j = -q_j = -exp(z_j - lse)
            grad = logits.sub_(lse.masked_fill(lse.isneginf(), 0)).exp_().neg_().scatter_(-1, target, 1)
            grad.mul_(grad_log_odds[chunk].unsqueeze(-1)).mul_(logit_scale if slope is None else slope)
            if grad_hidden is not None:
                grad_hidden[chunk] = (grad @ operand).to(hidden.dtype)
            if grad_weight is not None:
                grad_weight.addmm_(grad.T, h)
            if grad_bias is not None:
                grad_bias += grad.sum(0)
        return (
            grad_hidden,
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_bias is None else grad_bias.to(bias.dtype),
            *(None,) * 6,
        )


def _logits(h: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None, logit_scale: float) -> Tensor:
    logits = h @ weight.T if bias is None else torch.addmm(bias.to(h.dtype), h, weight.T)
    if logit_scale != 1:
        logits.mul_(logit_scale)
    return logits if softcap is None else logits.div_(softcap).tanh_().mul_(softcap)


def _row_statistics(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Log-odds, entropy and logsumexp over the others of each row; the logits are overwritten."""
    target = labels.long().masked_fill(labels == IGNORE, 0).unsqueeze(-1)
    z_target = logits.gather(-1, target).squeeze(-1)
    others = logits.scatter_(-1, target, -torch.inf)
    top = others.amax(-1, keepdim=True)
    top.masked_fill_(top.isneginf(), 0)
    e = others.sub_(top).exp_()
    mass = e.sum(-1)
    log_mass = mass.log()  # -inf where nothing but the target is possible
    lse = top.squeeze(-1) + log_mass
    log_odds = z_target - lse
    e_log_e = torch.xlogy(e, e).sum(-1)  # H(q) = log mass - sum e log e / mass
    entropy_others = torch.where(mass == 0, 0, log_mass - e_log_e / mass)
    entropy = binary_entropy(log_odds) + (-log_odds).sigmoid() * entropy_others
    return log_odds, entropy, lse


def _rounded(x: Tensor, compute_dtype: torch.dtype, accumulate: torch.dtype) -> Tensor:
    """x rounded to the dtype it is computed in, held in the dtype that products are summed in."""
    return x.to(compute_dtype).to(accumulate)


def _chunks(tokens: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, tokens)) for start in range(0, tokens, size)]
