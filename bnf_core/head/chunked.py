"""The log-odds head a tile of logits at a time: some tokens by a block of the vocabulary, on any device.

`one_pass`: value and gradients together, three matrix products. A tile's exponentials go into dhidden while they are in
the cache, and wait for the token's coefficient, which takes the whole row, for dweight.
`log_odds_forward`, `log_odds_backward`: the loss must see the whole sequence first, so backward computes the logits
again, four products; the logsumexp is known by then, so it takes one block of the vocabulary after the other, for all
tokens, and writes each row of dweight once.

What becomes of a tile is a fold (`folds.py`, `triton.py`); the sizes of the pieces are in `layout.py`. Exponentials are
powers of two, e^z = 2^(per_ratio * ratio). The base that is subtracted in the exponent need not be the row's maximum,
which would take a pass of its own: any number within 60 powers of two of it does, and the target's logit nearly always
is. Factors of a token multiply its hidden state or its gradient, never its logits.
"""

import math
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from bnf_core.head.closure import NamedLoss, TokenLoss, value_and_slope
from bnf_core.head.folds import Fold, Rows, Tile, put_targets
from bnf_core.head.layout import Layout, layout
from bnf_core.head.products import exact_unit, on_huge_pages, product, rounding_scratch
from bnf_core.head.transform import HeadOptions

__all__ = ["log_odds_backward", "log_odds_forward", "one_pass"]

Wanted = tuple[bool, bool, bool]  # gradients of hidden, weight, bias
Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]


def log_odds_forward(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, options: HeadOptions, fold: Fold
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-odds, entropy, and the logsumexp of the others, for each token."""
    head = _Head(hidden, weight, bias, labels, options, fold, (False, False, False))
    parts = [head.statistics(chunk)[:3] for chunk in head.chunks()]
    nothing = hidden.new_zeros(1, dtype=options.accumulate)
    log_odds, entropy, lse = (_joined([part[i] for part in parts], nothing) for i in range(3))
    return log_odds, entropy, lse


def log_odds_backward(
    coefficient: Tensor,
    lse: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    options: HeadOptions,
    fold: Fold,
    wanted: Wanted,
) -> Gradients:
    """Gradients of sum_t coefficient_t l_t, from logits computed again."""
    head = _Head(hidden, weight, bias, labels, options, fold, wanted, recompute=True)
    rows = head.rows(head.group, lse)
    head.scale(rows, coefficient)
    for block, weight_logits, weight_rows in head.blocks():
        for chunk in head.chunks():
            head.step(rows.part(chunk), block, weight_logits, weight_rows)
        head.add_to_weight(block)
        head.add_to_bias(block)
    head.finish_hidden(rows)
    return head.gradients()


def one_pass(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    options: HeadOptions,
    fold: Fold,
    wanted: Wanted,
    token_loss: TokenLoss | NamedLoss,
    per_token: tuple[Tensor, ...],
) -> tuple[Tensor, Tensor, Tensor, Gradients]:
    """Sum of token_loss, log-odds, entropy, and the gradients of the sum."""
    head = _Head(hidden, weight, bias, labels, options, fold, wanted)
    losses, log_odds, entropy = [], [], []
    for group in head.groups():
        head.group = group
        for chunk in head.chunks():
            ell, entropy_of_chunk, _, rows = head.statistics(chunk)
            loss, slope = value_and_slope(token_loss, ell, tuple(values[chunk] for values in per_token), any(wanted))
            losses.append(loss)
            log_odds.append(ell)
            entropy.append(entropy_of_chunk)
            if slope is not None:
                head.scale(rows, slope)
                head.finish_hidden(rows)
        for block in head.weight_blocks():
            head.put_targets(block)
            head.add_to_weight(block)
        for block in head.vocabulary():
            head.add_to_bias(block)
    nothing = hidden.new_zeros(1, dtype=options.accumulate)
    total = sum(losses[1:], start=losses[0]) if losses else nothing.sum()
    return total, _joined(log_odds, nothing), _joined(entropy, nothing), head.gradients()


class _Head:
    """Operands, places to work in, and the gradients that were asked for."""

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        options: HeadOptions,
        fold: Fold,
        wanted: Wanted,
        *,
        recompute: bool = False,
    ) -> None:
        self.hidden, self.weight, self.labels, self.options, self.fold = hidden, weight, labels, options, fold
        self.layout = size = layout(
            len(hidden),
            weight.shape[1],
            len(weight),
            options,
            hidden_dtype=hidden.dtype,
            weight_dtype=weight.dtype,
            on_gpu=fold.gpu or hidden.device.type != "cpu",
            wanted=wanted,
            recompute=recompute,
        )
        self.acc_dtype, self.operand = size.acc_dtype, size.operand
        self.bias = None if bias is None else bias.to(self.acc_dtype)
        self.unit = partial(exact_unit, options.compute, hidden.device.type)
        in_gradients = options.compute if options.compute == torch.float16 else self.acc_dtype  # fp16 numbers in float32
        self.gradient_unit = partial(exact_unit, in_gradients, hidden.device.type)
        # E_q[z] = h . E_q[w] is a by-product of dhidden, where that is summed without rounding
        unrounded = bias is None and options.softcap is None and self.operand == self.acc_dtype
        self.mean_from_hidden = wanted[0] and unrounded and not fold.gpu
        self._allocate(size)
        self.grad_hidden = torch.empty_like(hidden, dtype=size.grad_dtypes[0]) if wanted[0] else None
        self.grad_weight = on_huge_pages(torch.empty_like(weight, dtype=size.grad_dtypes[1])) if wanted[1] else None
        self.sum_weight = self.grad_weight
        if size.sums_weight:
            self.sum_weight = on_huge_pages(torch.empty_like(weight, dtype=self.acc_dtype))
        self.grad_bias = hidden.new_zeros(size.vocab, dtype=self.acc_dtype) if wanted[2] else None
        # the tokens whose exponentials are held, what multiplies those, and those of their targets
        self.group = slice(0, size.tokens)
        self.at_others, self.at_target = hidden.new_empty(2, size.tokens, dtype=self.acc_dtype)

    def _allocate(self, size: Layout) -> None:
        """Places to work in, once: touching new pages is slow."""
        device, tile = self.hidden.device, size.chunk * size.block

        def space(entries: int, dtype: torch.dtype) -> Tensor:
            return torch.empty(entries, dtype=dtype, device=device)

        tokens, width = size.held
        self.held = on_huge_pages(space(tokens * width, self.operand)) if tokens * width else None
        in_place = self.operand == size.raw and self.options.softcap is None and not size.on_gpu
        self.raw = None if in_place and self.held is not None else space(tile, size.raw)
        self.narrow = None
        if self.held is None and size.wanted[0]:
            self.narrow = self.raw if in_place else space(tile, self.operand)
        scratch = self.fold.scratch and not self.mean_from_hidden  # where the mean is, everything is done in place
        self.scratch = [space(tile, self.acc_dtype) for _ in range(2)] if scratch else []
        self.copies = {dtype: space(size.block * size.dim, dtype) for dtype in size.copies}
        rounds = not size.on_gpu and self.operand != self.acc_dtype
        self.rounding = rounding_scratch(size.dim, self.operand, device) if rounds else None
        scaled = (size.tokens if size.recompute else size.group) * size.wanted[1]
        self.scaled = torch.empty(scaled, size.dim, dtype=self.operand, device=device)

    def groups(self) -> Iterator[slice]:
        return _slices(slice(0, self.layout.tokens), self.layout.group)

    def chunks(self) -> Iterator[slice]:
        return _slices(self.group, self.layout.chunk)

    def vocabulary(self) -> Iterator[slice]:
        return _slices(slice(0, self.layout.vocab), self.layout.block)

    def weight_blocks(self) -> Iterator[slice]:
        """Of dweight's product: a GPU takes the whole vocabulary at once."""
        return iter([slice(0, self.layout.vocab)]) if self.layout.on_gpu else self.vocabulary()

    def blocks(self) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Rows of the weight as the logits' product takes them, and as the gradients' do."""
        for block in self.vocabulary():
            weight = self._copied(self._copied(self.weight[block], self.options.compute), self.operand)
            yield block, self._copied(self._copied(self.weight[block], self.options.compute), self.layout.for_logits), weight

    def _copied(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        return weight if weight.dtype == dtype else self.copies[dtype][: weight.numel()].view_as(weight).copy_(weight)

    def rounded(self, x: Tensor) -> Tensor:
        """x rounded to the dtype that it is computed in, held in the dtype that products take."""
        return x.to(self.options.compute).to(self.operand)

    def rows(self, at: slice, base: Tensor | None = None) -> Rows:
        """`base` in nats; None: the targets' logits by another route, good enough for one."""
        size, labels, options = self.layout, self.labels[at], self.options
        h, target_rows = self.rounded(self.hidden[at]), None
        if base is None:
            target_rows = self.weight.index_select(0, labels)
            base = options.ratio_(
                (h * target_rows).sum(1, dtype=self.acc_dtype), None if self.bias is None else self.bias[labels]
            )
            minus_log2_base = (base * -options.per_ratio).nan_to_num_(0, 0, 0)
        else:
            minus_log2_base = (base * (-1 / math.log(2))).nan_to_num_(0, 0, 0)
        by_hidden = None
        if self.grad_hidden is not None:
            by_hidden = self.grad_hidden[at]
            if size.sums_hidden:
                by_hidden = torch.empty_like(h, dtype=self.acc_dtype)
        z_target, sumexp, sum_log2 = torch.zeros(3, len(labels), dtype=self.acc_dtype, device=h.device)
        h_logits = self.hidden[at].to(self.options.compute).to(size.for_logits)
        return Rows(at, h, h_logits, labels, target_rows, minus_log2_base, z_target, sumexp, sum_log2, by_hidden)

    def statistics(self, chunk: slice) -> tuple[Tensor, Tensor, Tensor, Rows]:
        """Log-odds, entropy and logsumexp of the others of some tokens; their exponentials are held."""
        rows = self.rows(chunk)
        log_odds, entropy, lse, unsound = self._over_vocabulary(rows)
        if not unsound.is_meta and bool(unsound):
            rows.minus_log2_base = (self._row_max(rows) * -self.options.per_ratio).nan_to_num_(0, 0, 0)
            rows.sumexp.zero_()
            rows.sum_log2.zero_()
            log_odds, entropy, lse, _ = self._over_vocabulary(rows)
        return log_odds, entropy, lse, rows

    def _over_vocabulary(self, rows: Rows) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        for block, weight_logits, weight in self.blocks():
            self.step(rows, block, weight_logits, weight)
        if self.mean_from_hidden:
            assert rows.by_hidden is not None
            products = (rows.h * rows.by_hidden).sum(1)
            rows.sum_log2 = products * self.options.per_ratio + rows.minus_log2_base * rows.sumexp
        return self.fold.statistics(rows)

    def step(self, rows: Rows, block: slice, weight_logits: Tensor, weight: Tensor) -> None:
        """A tile from products to exponentials, and what dhidden needs of them."""
        raw, others = self.tile(rows, block)
        with self.unit():
            product(rows.h_logits, weight_logits.T, raw)
        tile = Tile(raw, others, *(self._view(space, len(rows.h), block) for space in self.scratch))
        recompute = self.layout.recompute
        bias = None if self.bias is None else self.bias[block]
        self.fold.run(tile, rows, bias, block.start, self.options, not recompute, not (recompute or self.mean_from_hidden))
        if rows.by_hidden is not None:
            assert others is not None
            with self.gradient_unit():
                product(others, weight, rows.by_hidden, beta=0 if block.start == 0 else 1, scratch=self.rounding)

    def tile(self, rows: Rows, block: slice) -> tuple[Tensor, Tensor | None]:
        """Where the logits go, and their exponentials: held, or until dhidden's product; None where nobody needs them.

        Both (tokens, block), and the same memory where they can be.
        """
        tokens, others = len(rows.h), None
        if self.held is not None:
            start = self.group.start
            others = self.held_exponentials(block)[rows.at.start - start : rows.at.stop - start]
        elif self.narrow is not None:
            others = self._view(self.narrow, tokens, block)
        if self.raw is None:
            assert others is not None
            return others, others
        return self._view(self.raw, tokens, block), others

    def held_exponentials(self, block: slice) -> Tensor:
        """(group, block)."""
        assert self.held is not None
        tokens = self.group.stop - self.group.start
        if self.layout.recompute:
            return self._view(self.held, tokens, block)
        if self.layout.on_gpu:  # rows over the whole vocabulary
            return self.held.view(self.layout.held)[:tokens, block]
        return self._view(self.held[block.start * tokens :], tokens, block)

    def _view(self, space: Tensor, tokens: int, block: slice) -> Tensor:
        """(tokens, block) of a flat space; tokens are contiguous in float32 on a CPU, which those products like better."""
        width = block.stop - block.start
        flat = space[: tokens * width]
        by_rows = self.layout.on_gpu or self.operand == torch.bfloat16
        return flat.view(tokens, width) if by_rows else flat.view(width, tokens).T

    def _row_max(self, rows: Rows) -> Tensor:
        """The largest ratio of the others, at the price of one more product."""
        row_max = torch.full_like(rows.sumexp, -torch.inf)
        for block, weight, _ in self.blocks():
            raw, _ = self.tile(rows, block)
            with self.unit():
                product(rows.h_logits, weight.T, raw)
            bias = None if self.bias is None else self.bias[block]
            ratio = self.options.ratio_(raw, bias)
            here = rows.labels.unsqueeze(1) == torch.arange(block.start, block.stop, device=raw.device)
            row_max = torch.maximum(row_max, ratio.masked_fill(here, -torch.inf).amax(1).to(self.acc_dtype))
        return row_max

    def scale(self, rows: Rows, coefficient: Tensor) -> None:
        """coefficient * dl, dl/dz_y = 1 and dl/dz_j = -q_j, as a factor of a token's exponentials.

        It goes into the token's hidden state. A target has the exponential that makes its gradient right: when the logits
        are computed again the fold has put it there, here it takes the sum over the row.
        """
        at_others = torch.mul(coefficient, -self.options.logit_scale, out=self.at_others[rows.at])
        if not self.layout.recompute:
            at_others.div_(rows.sumexp)
            at_target = torch.neg(rows.sumexp, out=self.at_target[rows.at])
            if self.options.softcap is not None:
                at_target.mul_(self.options.relative_slope(rows.z_target))
        if len(self.scaled):
            start = rows.at.start - self.group.start
            torch.mul(rows.h, at_others.unsqueeze(1), out=self.scaled[start : start + len(rows.h)])

    def put_targets(self, block: slice) -> None:
        """Into the exponentials that are held, after dhidden's product: their sum was not known before."""
        if self.held is not None and self.group.stop > self.group.start:
            whole = block.stop - block.start == self.layout.vocab
            put_targets(self.held_exponentials(block), self.labels[self.group], block.start, self.at_target[self.group], whole)

    def add_to_weight(self, block: slice) -> None:
        """The exponentials of the group by its scaled hidden states, for a block of dweight."""
        if self.sum_weight is None or self.group.stop == self.group.start:
            return
        into, others = self.sum_weight[block], self.held_exponentials(block).T
        scaled = self.scaled[: others.shape[1]]
        with self.gradient_unit():
            if into.dtype in (self.acc_dtype, self.operand):
                beta = 0 if self.group.start == 0 else 1  # the first overwrites: filling dweight with zeros is one more pass
                product(others, scaled, into, beta=beta, scratch=self.rounding)
            else:  # a bf16 weight where products are float32
                into.copy_(product(others, scaled, torch.empty_like(into, dtype=self.acc_dtype)))

    def add_to_bias(self, block: slice) -> None:
        if self.grad_bias is not None:
            others = self.held_exponentials(block).to(self.acc_dtype)
            self.grad_bias[block] += (others * self.at_others[self.group].unsqueeze(1)).sum(0)

    def finish_hidden(self, rows: Rows) -> None:
        """dhidden of some tokens, from the sums over their exponentials."""
        if self.grad_hidden is None:
            return
        assert rows.by_hidden is not None
        if rows.target_rows is not None:
            rows.by_hidden.addcmul_(self.rounded(rows.target_rows), self.at_target[rows.at].unsqueeze(1))
        rows.by_hidden.mul_(self.at_others[rows.at].unsqueeze(1))
        if self.layout.sums_hidden:
            self.grad_hidden[rows.at] = rows.by_hidden

    def gradients(self) -> Gradients:
        """Of a bias, and of what is in fp16, in float32: a loss scale may be still to come."""
        if self.layout.tokens == 0 and self.sum_weight is not None:
            self.sum_weight.zero_()
        if self.layout.sums_weight:
            assert self.grad_weight is not None
            assert self.sum_weight is not None
            self.grad_weight.copy_(self.sum_weight)
        return self.grad_hidden, self.grad_weight, self.grad_bias


def _joined(parts: list[Tensor], nothing: Tensor) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts or [nothing[:0]])


def _slices(whole: slice, size: int) -> Iterator[slice]:
    return (slice(i, min(i + size, whole.stop)) for i in range(whole.start, whole.stop, max(size, 1)))
