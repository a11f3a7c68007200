"""The log-odds head a tile of logits at a time: some tokens by a block of the vocabulary, on any device.

`token_loss_chunked`: value and gradients in one pass, three matrix products. A tile's exponentials go into dhidden
while they are in the cache, and wait for the token's coefficient, which takes the whole row, for dweight: what is
held is exponentials of one chunk of tokens, in the dtype that the products take.
`log_odds_chunked`: the loss must see the whole sequence first, so backward computes the logits again, four products;
logsumexp is known by then, and nothing larger than a tile is held.

A tile goes from logits to exponentials by exp2, several times faster than exp on a CPU: z = unit * raw,
e^z = 2^(k raw), k = unit / log 2. The base that is subtracted in the exponent need not be the row's maximum, which
would take a pass of its own: any number within 60 powers of two of it does, and the target's logit nearly always is.
Factors of a token multiply its hidden state or its gradient, never its logits.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from bnf_core.head.naive import HeadOptions, binary_entropy
from bnf_core.head.products import bf16_unit, multiplies, on_huge_pages, product, rounding_scratch

__all__ = ["log_odds_chunked", "token_loss_chunked"]

HELD_BYTES = {"cpu": 56 * 2**20, "cuda": 448 * 2**20}  # exponentials of a chunk of tokens, and what bf16 needs beside them
TILE_BYTES = {"cpu": 4 * 2**20, "cuda": 64 * 2**20}  # of logits: on a CPU what its cache can hold
COPY_BYTES = {"cpu": 8 * 2**20, "cuda": 64 * 2**20}  # of weights in another dtype
ROOM = 2.0**60  # sums of exponentials from 1 / ROOM to ROOM have lost nothing to overflow or underflow


class Tile(NamedTuple):
    """Room for what becomes of a tile of logits; (tokens, block) each. Some are the same memory."""

    raw: Tensor
    log2: Tensor
    wide: Tensor  # exponentials in the dtype of sums
    others: Tensor  # the same in the dtype that products take


Fold = Callable[[Tile, Tensor, float, bool, bool], tuple[Tensor, Tensor | None]]


def fold_eager(tile: Tile, minus_log2_base: Tensor, k: float, capped: bool, with_mean: bool) -> tuple[Tensor, Tensor | None]:
    """Logits to exponentials, others = 2^(k raw - log2 base), in place, under a cap times its slope.

    Returns their sums before the slope, and the sums of others * log2 others.
    """
    raw, log2, wide, others = tile
    torch.add(minus_log2_base, raw, alpha=k, out=log2)
    torch.exp2(log2, out=wide)
    mass = wide.sum(1)
    mean = log2.clamp_(min=-1e30).mul_(wide).sum(1) if with_mean else None  # 0 where -inf was
    if capped:
        wide.mul_(raw.clamp_(min=-1).square_().neg_().add_(1))
    if others.dtype != wide.dtype:
        others.copy_(wide)
    return mass, mean


def log_odds_chunked(
    hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, options: HeadOptions, fold: Fold = fold_eager
) -> tuple[Tensor, Tensor]:
    """As `linear_log_odds`, recomputing the logits in backward."""
    log_odds, entropy = _LogOdds.apply(hidden, weight, bias, labels, options, fold)  # type: ignore[no-untyped-call]
    return log_odds, entropy


def token_loss_chunked(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    options: HeadOptions,
    token_loss: Callable[..., Tensor],
    per_token: tuple[Tensor, ...],
    fold: Fold = fold_eager,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `linear_token_loss`, with the gradients computed in forward."""
    loss, log_odds, entropy = _TokenLoss.apply(  # type: ignore[no-untyped-call]
        hidden, weight, bias, labels, options, fold, token_loss, per_token
    )
    return loss, log_odds, entropy


class _LogOdds(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, options: HeadOptions, fold: Fold
    ) -> tuple[Tensor, Tensor]:
        head = _Head(hidden, weight, bias, labels, options, fold)
        log_odds, entropy, lse = (hidden.new_empty(len(hidden), dtype=options.accumulate) for _ in range(3))
        for chunk in head.chunks(held=False):
            rows = _Rows(head, chunk)
            log_odds[chunk], entropy[chunk], lse[chunk] = rows.log_odds, rows.entropy, rows.lse
        ctx.save_for_backward(hidden, weight, bias, labels, lse)
        ctx.options, ctx.fold = options, fold
        ctx.mark_non_differentiable(entropy)
        return log_odds, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_log_odds: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, labels, lse = ctx.saved_tensors
        head = _Head(hidden, weight, bias, labels, ctx.options, ctx.fold, ctx.needs_input_grad[:3])
        for chunk in head.chunks(held=False):
            _Rows(head, chunk, lse[chunk], grad_log_odds[chunk])
        return (*head.gradients(), None, None, None)


class _TokenLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        options: HeadOptions,
        fold: Fold,
        token_loss: Callable[..., Tensor],
        per_token: tuple[Tensor, ...],
    ) -> tuple[Tensor, Tensor, Tensor]:
        wanted = ctx.needs_input_grad[:3]
        head = _Head(hidden, weight, bias, labels, options, fold, wanted)
        log_odds, entropy = (hidden.new_empty(len(hidden), dtype=options.accumulate) for _ in range(2))
        loss = hidden.new_zeros((), dtype=options.accumulate)
        for chunk in head.chunks(held=wanted[1] or wanted[2]):
            rows = _Rows(head, chunk)
            log_odds[chunk], entropy[chunk] = rows.log_odds, rows.entropy
            with torch.enable_grad():
                leaf = rows.log_odds.detach().requires_grad_()
                value = token_loss(leaf, *(x[chunk] for x in per_token)).sum()
                coefficient = torch.autograd.grad(value, leaf)[0] if any(wanted) else None
            loss += value.detach()
            if coefficient is not None:
                rows.add_gradients(coefficient)
        ctx.gradients = head.gradients()
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
        return (*gradients, None, None, None, None, None)


class _Head:
    """Operands, tiles to work in, and the gradients that were asked for, summed over chunks in float32 or better."""

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        options: HeadOptions,
        fold: Fold,
        wanted: tuple[bool, bool, bool] = (False, False, False),
    ) -> None:
        self.hidden, self.weight, self.labels, self.options, self.fold = hidden, weight, labels, options, fold
        self.wide, self.softcap, self.vocab = options.accumulate, options.softcap, len(weight)
        self.bias = None if bias is None else bias.to(self.wide)
        self.bias_dtype = self.wide if bias is None else bias.dtype
        # exponentials far from 1 have no place in fp16
        narrow = options.compute != torch.float16 and multiplies(options.compute, hidden.device.type)
        self.operand = options.compute if narrow else self.wide  # what the gradients' products take
        self.unit = options.logit_scale if self.softcap is None else self.softcap
        self.k = self.unit / math.log(2)
        self.grad_hidden = torch.empty_like(hidden) if wanted[0] else None
        self.grad_weight = on_huge_pages(torch.empty_like(weight, dtype=self.wide)) if wanted[1] else None
        self.grad_bias = hidden.new_zeros(self.vocab, dtype=self.wide) if wanted[2] else None
        # E_q[z] = h . E_q[w] is a by-product of dhidden, where that is summed without rounding
        self.mean_from_hidden = wanted[0] and bias is None and self.softcap is None and self.operand == self.wide
        self.untouched = True  # the first chunk overwrites: filling dweight with zeros would be one more pass

    def chunks(self, held: bool) -> Iterator[slice]:
        """Slices of the tokens, and room for one: allocated once, because touching new pages is slow."""
        tokens, dim, device = len(self.hidden), self.weight.shape[1], self.hidden.device
        on_cpu_in_bf16 = device.type == "cpu" and self.operand != self.wide
        of = "cpu" if device.type == "cpu" else "cuda"
        self.rounds_logits = on_cpu_in_bf16 and not self.options.exact
        room, tile = HELD_BYTES[of], TILE_BYTES[of] // self.wide.itemsize
        if self.operand != self.wide:  # tiles in both dtypes, and copies of the weight for exact logits
            # beside the float32 sum of a bf16 weight's gradient tiles are small; beside a float32 weight they count
            room -= (5 if self.weight.dtype == self.wide else 2) * TILE_BYTES[of]
            room -= 0 if self.rounds_logits else COPY_BYTES[of]
        size = self.options.chunk_size
        if size is None:
            most = room // (self.vocab * self.operand.itemsize) if held else math.isqrt(tile)
            size = _even(tokens, max(most, 1))
        size = max(min(size, tokens), 1)
        self.block = min(max(tile // size, 1), self.vocab)
        # what the weight, and the hidden states, become on their way to the logits' product
        self.for_logits = self.operand if of == "cuda" or self.rounds_logits else self.wide
        if {self.weight.dtype} != {self.options.compute, self.operand, self.for_logits}:
            self.block = min(self.block, max(COPY_BYTES[of] // (dim * self.wide.itemsize), 1))
        self.block -= self.block % 64 if self.block > 64 else 0
        dtypes = (self.operand if self.rounds_logits else self.wide, self.wide, self.wide, self.operand)
        self.tiles = [torch.empty(size * self.block, dtype=dtype, device=device) for dtype in dtypes]
        self.copies = {t: torch.empty(0, dtype=t, device=device) for t in (self.options.compute, self.operand, self.for_logits)}
        self.scratch = rounding_scratch(dim, self.operand, device) if on_cpu_in_bf16 else None
        self.held = on_huge_pages(torch.empty(size * self.vocab, dtype=self.operand, device=device)) if held else None
        return (slice(i, min(i + size, tokens)) for i in range(0, tokens, size))

    def blocks(self) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Rows of the weight as the logits' product takes them, and as the gradients' do."""
        for block in self.block_slices():
            weight = self._copied(self._copied(self.weight[block], self.options.compute), self.operand)
            yield block, self._copied(weight, self.for_logits), weight

    def _copied(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        if weight.dtype == dtype:
            return weight
        if not self.copies[dtype].numel():
            self.copies[dtype] = torch.empty(self.block * weight.shape[1], dtype=dtype, device=weight.device)
        return self.copies[dtype][: weight.numel()].view_as(weight).copy_(weight)

    def block_slices(self) -> Iterator[slice]:
        return (slice(i, min(i + self.block, self.vocab)) for i in range(0, self.vocab, self.block))

    def rounded(self, x: Tensor) -> Tensor:
        """x rounded to the dtype that it is computed in, held in the dtype that products take."""
        return x.to(self.options.compute).to(self.operand)

    def tile(self, tokens: int, block: slice) -> Tile:
        raw, log2, wide, others = (self.view(space, tokens, block) for space in self.tiles)
        if self.held is not None:
            others = self.held_exponentials(tokens, block)
        if self.operand == self.wide:  # as few places as can be
            wide = others
            if self.softcap is None:
                raw = others
                log2 = others if self.mean_from_hidden else log2
        return Tile(raw, log2, wide, others)

    def held_exponentials(self, tokens: int, block: slice) -> Tensor:
        assert self.held is not None
        return self.view(self.held[block.start * tokens :], tokens, block)

    def view(self, space: Tensor, tokens: int, block: slice) -> Tensor:
        """(tokens, block) of a flat space; tokens are contiguous in float32, which those products like better."""
        width = block.stop - block.start
        flat = space[: tokens * width]
        return flat.view(tokens, width) if self.operand == torch.bfloat16 else flat.view(width, tokens).T

    def logits(self, h: Tensor, block: slice, weight: Tensor, out: Tensor) -> Tensor:
        """Logits before their unit, h @ weight.T + bias; under a cap tanh of their ratio to it."""
        with bf16_unit(self.options.compute):
            raw = product(h, weight.T, out)
        if self.bias is not None:
            raw.add_(self.bias[block])
        return raw if self.softcap is None else raw.mul_(self.options.logit_scale / self.softcap).tanh_()

    def targets(self, chunk: slice) -> Tensor:
        """Logits of the targets by another route, good enough for a base."""
        labels = self.labels[chunk]
        z = (self.hidden[chunk].to(self.wide) * self.weight.index_select(0, labels).to(self.wide)).sum(1)
        z = (z if self.bias is None else z + self.bias[labels]) * self.options.logit_scale
        return z if self.softcap is None else self.softcap * (z / self.softcap).tanh()

    def gradients(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        if self.grad_weight is not None and self.untouched:  # no tokens at all
            self.grad_weight.zero_()
        weight = self.grad_weight
        if weight is not None and weight.dtype != self.weight.dtype:
            weight = on_huge_pages(torch.empty_like(self.weight)).copy_(weight)
        bias = None if self.grad_bias is None else self.grad_bias.to(self.bias_dtype)
        return self.grad_hidden, weight, bias


class _Rows:
    """A chunk of tokens, from hidden states to log-odds; vectors are (chunk,).

    Where lse, the logsumexp of the others, and the coefficient are known, gradients are added on the way.
    """

    def __init__(self, head: _Head, chunk: slice, lse: Tensor | None = None, coefficient: Tensor | None = None) -> None:
        self.head, self.chunk, self.labels = head, chunk, head.labels[chunk]
        self.h = head.rounded(head.hidden[chunk])
        self.h_logits = self.h.to(head.for_logits)
        self.mass: Tensor
        self.by_hidden: Tensor | None
        self._place_targets()
        if lse is not None:
            self._fold(lse, coefficient)
            return
        self._fold(head.targets(chunk))
        if not bool(((self.mass > 1 / ROOM) & (self.mass < ROOM)).all()):
            self._fold(self._top())
        self.lse = self.base + self.mass.log()
        self.log_odds = self.z_target - self.lse
        self.mass = self.mass.masked_fill(self.mass == 0, 1)  # nothing but the target is possible
        if head.mean_from_hidden:
            assert self.by_hidden is not None
            self.mean_log2 = (self.h * self.by_hidden).sum(1) * head.k - self.base / math.log(2) * self.mass
        of_others = (self.mass.log() - self.mean_log2 / self.mass * math.log(2)).clamp(min=0)
        self.entropy = binary_entropy(self.log_odds) + (-self.log_odds).sigmoid() * of_others

    def _fold(self, base: Tensor, coefficient: Tensor | None = None) -> None:
        """Sums of e^(z_j - base) over the others, and what dhidden needs of them; the exponentials are held."""
        head, tokens = self.head, len(self.h)
        self.base = base.masked_fill(~base.isfinite(), 0)
        minus_log2_base = (self.base / -math.log(2)).unsqueeze(1)
        self.z_target, self.mass, self.mean_log2 = (self.base.new_zeros(tokens) for _ in range(3))
        self.by_hidden = torch.zeros_like(self.h, dtype=head.wide) if head.grad_hidden is not None else None
        if coefficient is not None:
            self.mass.fill_(1)
            self._scale(coefficient)
        capped, with_mean = head.softcap is not None, coefficient is None and not head.mean_from_hidden
        for block, weight_logits, weight in head.blocks():
            tile = head.tile(tokens, block)
            self._mask_targets(head.logits(self.h_logits, block, weight_logits, tile.raw), block)
            mass, mean = head.fold(tile, minus_log2_base, head.k, capped, with_mean)
            if self.by_hidden is not None:
                product(tile.others, weight, self.by_hidden, beta=1, scratch=head.scratch)
            if coefficient is None:
                self.mass += mass
                if mean is not None:
                    self.mean_log2 += mean
            else:
                self._add_to_weight(tile.others, block)
        if coefficient is not None:
            self._finish(coefficient)

    def _place_targets(self) -> None:
        """Which tokens have their target in which block, found once."""
        ordered, self.order = self.labels.sort()
        starts = torch.arange(0, self.head.vocab + self.head.block, self.head.block, device=self.labels.device)
        self.first: list[int] = torch.searchsorted(ordered, starts).tolist()

    def _mask_targets(self, raw: Tensor, block: slice) -> Tensor:
        """Takes the targets' logits out of a tile before the sum over it: no cancellation."""
        number = block.start // self.head.block
        here = self.order[self.first[number] : self.first[number + 1]]
        if len(here):
            at = (here, self.labels[here] - block.start)
            self.z_target[here] = raw[at].to(self.z_target.dtype) * self.head.unit
            raw[at] = -torch.inf
        return raw

    def _top(self) -> Tensor:
        """The largest logit of the others, at the price of one more product."""
        head, top = self.head, torch.full_like(self.base, -torch.inf)
        for block, weight, _ in head.blocks():
            raw = head.logits(self.h_logits, block, weight, head.tile(len(self.h), block).raw)
            top = torch.maximum(top, self._mask_targets(raw, block).amax(1).to(head.wide) * head.unit)
        return top

    def add_gradients(self, coefficient: Tensor) -> None:
        """Adds coefficient * dl, dl/dz_y = 1 and dl/dz_j = -q_j, from the exponentials that are held."""
        head = self.head
        self._scale(coefficient)
        if head.held is not None:
            for block in head.block_slices():
                self._add_to_weight(head.held_exponentials(len(self.h), block), block)
        self._finish(coefficient)

    def _scale(self, coefficient: Tensor) -> None:
        """Factors of a token, folded into its hidden state."""
        self.at_others = -coefficient * self.head.options.logit_scale / self.mass
        self.scaled = (self.h * self.at_others.unsqueeze(1)).to(self.h.dtype)

    def _add_to_weight(self, others: Tensor, block: slice) -> None:
        head = self.head
        if head.grad_weight is not None:
            into, beta = head.grad_weight[block], 0 if head.untouched else 1
            product(others.T, self.scaled, into, beta=beta, scratch=head.scratch)
        if head.grad_bias is not None:
            head.grad_bias[block] += (others.to(head.wide) * self.at_others.unsqueeze(1)).sum(0)

    def _finish(self, coefficient: Tensor) -> None:
        """The target's part, and dhidden."""
        head = self.head
        at_target = coefficient * head.options.logit_scale
        if head.softcap is not None:  # dz/draw = logit_scale * (1 - tanh^2)
            at_target = at_target * (1 - (self.z_target / head.softcap).square())
        if head.grad_hidden is not None:
            assert self.by_hidden is not None
            target = head.rounded(head.weight.index_select(0, self.labels)).to(head.wide)
            by_others = self.by_hidden.mul_(self.at_others.unsqueeze(1))
            head.grad_hidden[self.chunk] = target.mul_(at_target.unsqueeze(1)).add_(by_others)
        if head.grad_weight is not None:
            head.untouched = False
            head.grad_weight.index_add_(0, self.labels, self.h * at_target.unsqueeze(1))
        if head.grad_bias is not None:
            head.grad_bias.index_add_(0, self.labels, at_target)


def _even(tokens: int, most: int) -> int:
    """Size of chunks as even as can be, at most `most` tokens, in multiples of 16: products of odd sizes are slower."""
    most -= most % 16 if most > 16 else 0
    chunks = max(-(-tokens // most), 1)
    return min(-(-tokens // chunks // 16) * 16 or most, most)
