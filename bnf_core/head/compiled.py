"""The chunked head with what happens to a tile of logits fused into one loop by torch.compile.

Same tiles, same products: only `fold` differs. Where there is no compiler the eager one does the work, after a line
in the log.
"""

import functools
import logging

import torch
from torch import Tensor

from bnf_core.head.chunked import Tile, fold_eager, log_odds_chunked, token_loss_chunked

__all__ = ["log_odds_compiled", "token_loss_compiled"]

logger = logging.getLogger(__name__)
_broken: list[str] = []  # why the compiler failed, once it has


def _fold(
    raw: Tensor, minus_log2_base: Tensor, k: float, capped: bool, with_mean: bool, others: Tensor
) -> tuple[Tensor, Tensor | None]:
    """As `fold_eager`, written for a compiler: one loop over raw, which may be `others`."""
    log2 = torch.add(minus_log2_base, raw, alpha=k)
    wide = torch.exp2(log2)
    mass = wide.sum(1)
    mean = (log2.clamp(min=-1e30) * wide).sum(1) if with_mean else None
    others.copy_(wide * (1 - raw.clamp(min=-1).square()) if capped else wide)
    return mass, mean


@functools.cache
def _compiled():  # type: ignore[no-untyped-def]
    return torch.compile(_fold, dynamic=True)


def fold_compiled(tile: Tile, minus_log2_base: Tensor, k: float, capped: bool, with_mean: bool) -> tuple[Tensor, Tensor | None]:
    if not _broken:
        try:
            result: tuple[Tensor, Tensor | None] = _compiled()(tile.raw, minus_log2_base, k, capped, with_mean, tile.others)
        except Exception as error:  # no compiler, or one that fails: the library raises many unrelated types
            _broken.append(f"{type(error).__name__}: {str(error).splitlines()[0]}")
            logger.warning("torch.compile does not work here, so the head's element-wise part runs eagerly (%s)", _broken[0])
        else:
            return result
    return fold_eager(tile, minus_log2_base, k, capped, with_mean)


log_odds_compiled = functools.partial(log_odds_chunked, fold=fold_compiled)
token_loss_compiled = functools.partial(token_loss_chunked, fold=fold_compiled)
