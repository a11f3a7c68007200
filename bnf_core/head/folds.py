"""A tile of logits becomes exponentials and sums over them: eager, or fused into one loop by torch.compile.

The third fold is Triton's (`triton.py`). One signature: see `Fold.run`.
"""

import functools
import logging
import math
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bnf_core.head.transform import HeadOptions, binary_entropy

__all__ = ["COMPILED", "EAGER", "FirstThatCompiles", "Fold", "Rows", "Tile", "put_targets"]

logger = logging.getLogger(__name__)
ROOM = 2.0**60  # sums of exponentials from 1 / ROOM to ROOM have lost nothing to overflow or underflow


@dataclass
class Rows:
    """Some tokens, from hidden states to sums over the vocabulary; vectors are (tokens,)."""

    at: slice  # which
    h: Tensor  # (tokens, dim) as the gradients' products take it
    h_logits: Tensor  # as the logits' product does
    labels: Tensor
    target_rows: Tensor | None  # (tokens, dim) of the weight
    minus_log2_base: Tensor
    z_target: Tensor
    sumexp: Tensor  # over the others, of 2^(log2 z - log2 base)
    sum_log2: Tensor  # of the same times its logarithm
    by_hidden: Tensor | None  # (tokens, dim): exponentials @ weight

    def part(self, at: slice) -> "Rows":
        return Rows(at, *(None if x is None else x[at] for x in list(vars(self).values())[1:]))  # type: ignore[arg-type]


class Tile(NamedTuple):
    """What becomes of h . w; each (tokens, block)."""

    raw: Tensor  # h . w on entry, overwritten
    others: Tensor | None  # exponentials of all but the targets, under a cap times its slope; may be the memory of raw
    log2: Tensor | None = None  # room for the eager fold
    exponentials: Tensor | None = None


def statistics(rows: Rows) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """From sums over the vocabulary: log-odds, entropy of the whole distribution, logsumexp of the others; and whether a
    base was too far from that to trust the sums (0-dimensional). A sum of 0, where nothing but the target is possible,
    becomes 1: it is divided by.
    """
    unsound = ~((rows.sumexp > 1 / ROOM) & (rows.sumexp < ROOM)).all()
    lse = rows.minus_log2_base * -math.log(2) + rows.sumexp.log()
    log_odds = rows.z_target - lse
    rows.sumexp.masked_fill_(rows.sumexp == 0, 1)
    of_others = (rows.sumexp.log() - rows.sum_log2 / rows.sumexp * math.log(2)).clamp(min=0)
    return log_odds, binary_entropy(log_odds) + (-log_odds).sigmoid() * of_others, lse, unsound


class Fold(NamedTuple):
    """run(tile, rows, bias, start, options, sums, with_mean) fills tile.others, and adds to the rows' sums.

    bias: (block,) or None; start: the first token id of the block. If `sums`, the logit of a target in the block goes to
    rows.z_target and is left out of the exponentials' sum (no cancellation), which is added to rows.sumexp, and if
    `with_mean` that of themselves times their log2 to rows.sum_log2, both before the slope. Otherwise the base is the
    logsumexp of the others, so that a target's exponential, with the slope, is -(dz/d(h . w)) / scale: the rest of dl.
    """

    run: Callable[..., None]
    statistics: Callable[[Rows], tuple[Tensor, Tensor, Tensor, Tensor]] = statistics
    scratch: bool = False  # wants tile.log2 and tile.exponentials
    gpu: bool = False  # takes tiles as they lie on a GPU, rows contiguous, and the mean is free


def take_targets(raw: Tensor, rows: Rows, bias: Tensor | None, start: int, options: HeadOptions) -> None:
    """Moves the targets' logits out of a tile of products."""
    at, inside = _places(raw, rows.labels, start)
    products = raw.gather(1, at).squeeze(1)
    raw.scatter_(1, at, products.masked_fill(inside, -torch.inf).unsqueeze(1))
    ratio = options.ratio_(products.to(rows.z_target.dtype, copy=True), None if bias is None else bias[at.squeeze(1)])
    rows.z_target.copy_(torch.where(inside, ratio * options.unit, rows.z_target))


def put_targets(others: Tensor, labels: Tensor, start: int, values: Tensor, whole: bool = False) -> None:
    """Writes `values` (tokens,) to the targets' places in a block of the vocabulary, or in the `whole` of it."""
    if whole:
        others.scatter_(1, labels.unsqueeze(1), values.to(others.dtype).unsqueeze(1))
        return
    at, inside = _places(others, labels, start)
    others.scatter_(1, at, torch.where(inside, values.to(others.dtype), others.gather(1, at).squeeze(1)).unsqueeze(1))


def _places(tile: Tensor, labels: Tensor, start: int) -> tuple[Tensor, Tensor]:
    """(tokens, 1) column of each target, and (tokens,) whether it is in the tile; some other column where it is not."""
    local = labels - start
    return local.clamp(0, tile.shape[1] - 1).unsqueeze(1), (local >= 0) & (local < tile.shape[1])


def _eager(tile: Tile, rows: Rows, bias: Tensor | None, start: int, options: HeadOptions, sums: bool, with_mean: bool) -> None:
    take_targets(tile.raw, rows, bias, start, options)
    _exponentials(tile, rows, bias, options, sums, with_mean)
    _finish_targets(tile, rows, start, options, sums)


def _finish_targets(tile: Tile, rows: Rows, start: int, options: HeadOptions, sums: bool) -> None:
    if not sums and tile.others is not None:
        put_targets(tile.others, rows.labels, start, -options.relative_slope(rows.z_target))


def _exponentials(tile: Tile, rows: Rows, bias: Tensor | None, options: HeadOptions, sums: bool, with_mean: bool) -> None:
    raw, others = options.ratio_(tile.raw, bias), tile.others
    exponentials, log2 = tile.exponentials, tile.log2  # as few places as can be
    if others is not None and others.dtype == rows.sumexp.dtype:
        exponentials = others
    elif exponentials is None:
        exponentials = torch.empty_like(raw, dtype=rows.sumexp.dtype)
    if options.softcap is None and not with_mean:
        log2 = exponentials
    elif log2 is None:
        log2 = torch.empty_like(exponentials)
    torch.add(rows.minus_log2_base.unsqueeze(1), raw, alpha=options.per_ratio, out=log2)
    torch.exp2(log2, out=exponentials)
    if sums:
        rows.sumexp.add_(exponentials.sum(1))
    if with_mean:
        rows.sum_log2.add_(log2.clamp_(min=-1e30).mul_(exponentials).sum(1))  # 0 where -inf was
    if others is None:
        return
    if options.softcap is not None:
        exponentials.mul_(raw.clamp_(min=-1).square_().neg_().add_(1))
    if others is not exponentials:
        others.copy_(exponentials)


def _fused(
    raw: Tensor,
    minus_log2_base: Tensor,
    bias: Tensor | None,
    others: Tensor | None,
    per_ratio: float,
    to_ratio: float,
    capped: bool,
    sums: bool,
    with_mean: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """As `_exponentials`, written for a compiler: one loop over raw, which may be `others`."""
    x = raw.to(minus_log2_base.dtype)
    if bias is not None:
        x = x + bias
    if capped:
        x = x * to_ratio
        x = torch.where(x.isinf(), x, x.tanh())
    log2 = torch.add(minus_log2_base.unsqueeze(1), x, alpha=per_ratio)
    exponentials = torch.exp2(log2)
    sumexp = exponentials.sum(1) if sums else None
    mean = (log2.clamp(min=-1e30) * exponentials).sum(1) if with_mean else None
    if others is not None:
        others.copy_(exponentials * (1 - x.clamp(min=-1).square()) if capped else exponentials)
    return sumexp, mean


def compilers_error(error: BaseException) -> bool:
    """Whether a compiler is missing or failed: PyTorch's or Triton's. Anything else, out of memory too, is the caller's."""
    if isinstance(error, ImportError):
        return (error.name or "").startswith("triton")
    if isinstance(error, torch.OutOfMemoryError) or str(error).startswith("Triton Error [CUDA]"):
        return False
    if any(cls.__module__.startswith(("torch._dynamo", "torch._inductor", "triton")) for cls in type(error).__mro__):
        return True
    frames = traceback.walk_tb(error.__traceback__)  # Triton raises a plain RuntimeError where it finds no C compiler
    modules = (frame.f_globals.get("__name__", "") for frame, _ in frames)
    return any(name.startswith(("triton.compiler", "triton.runtime.build")) for name in modules)


class FirstThatCompiles:
    """The first of some functions; once its compiler has failed, the next from then on, after a line in the log.

    A function is compiled before it runs, so what it would write to is still whole.
    """

    def __init__(self, *functions: Callable[..., Any]) -> None:
        self.functions = list(functions)

    def __call__(self, *arguments: Any) -> Any:
        while True:
            try:
                return self.functions[0](*arguments)
            except Exception as error:
                if len(self.functions) == 1 or not compilers_error(error):
                    raise
                name, first = type(error).__name__, (str(error).splitlines() or [""])[0]
                failed = self.functions.pop(0).__name__.strip("_")
                left = self.functions[0].__name__.strip("_")
                logger.warning("the head's kernel does not compile here: %s in place of %s (%s: %s)", left, failed, name, first)


@functools.cache
def _compiler() -> Callable[..., tuple[Tensor | None, Tensor | None]]:
    return torch.compile(_fused, dynamic=True)


def _compiled_exponentials(
    tile: Tile, rows: Rows, bias: Tensor | None, options: HeadOptions, sums: bool, with_mean: bool
) -> None:
    capped = options.softcap is not None
    numbers = options.per_ratio, options.to_ratio, capped, sums, with_mean
    sumexp, mean = _compiler()(tile.raw, rows.minus_log2_base, bias, tile.others, *numbers)
    if sumexp is not None:
        rows.sumexp.add_(sumexp)
    if mean is not None:
        rows.sum_log2.add_(mean)


_compiled_or_eager = FirstThatCompiles(_compiled_exponentials, _exponentials)


def compiled(
    tile: Tile, rows: Rows, bias: Tensor | None, start: int, options: HeadOptions, sums: bool, with_mean: bool
) -> None:
    take_targets(tile.raw, rows, bias, start, options)
    _compiled_or_eager(tile, rows, bias, options, sums, with_mean)
    _finish_targets(tile, rows, start, options, sums)


EAGER = Fold(_eager, scratch=True)
COMPILED = Fold(compiled)
