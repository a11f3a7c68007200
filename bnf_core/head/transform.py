"""From products to logits, once for every implementation: z = cap(scale * (h . w + b)).

A tile holds the ratio of a logit to its unit, which is what its exponential and its slope are made of:

    without a cap   ratio = h . w + b,                         unit = scale,    dz/d(h . w) = scale
    with a cap      ratio = tanh(scale / softcap (h . w + b)),  unit = softcap,  dz/d(h . w) = scale (1 - ratio^2)

An infinite logit stays infinite under a cap: a token that is ruled out (-inf) stays ruled out, and bad input (+inf) bad.
"""

import contextlib
import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["HeadOptions", "autocast_dtype", "binary_entropy", "without_autocast"]


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """What autocast rounds operands to where it is on; None where it is off, or the device (meta) has none."""
    if not torch.amp.is_autocast_available(device_type) or not torch.is_autocast_enabled(device_type):
        return None
    return torch.get_autocast_dtype(device_type)


def without_autocast(device_type: str) -> contextlib.AbstractContextManager[Any]:
    """The head rounds its operands itself."""
    available = torch.amp.is_autocast_available(device_type)
    return torch.autocast(device_type, enabled=False) if available else contextlib.nullcontext()


@dataclass(frozen=True)
class HeadOptions:
    """How the logits come from hidden states, and in which dtypes."""

    softcap: float | None
    logit_scale: float
    compute: torch.dtype  # operands are rounded to this
    chunk_size: int | None = None
    exact: bool = True  # False: logits may be rounded to `compute` on their way

    @property
    def accumulate(self) -> torch.dtype:
        """Products are summed in this."""
        return torch.float64 if self.compute == torch.float64 else torch.float32

    @property
    def unit(self) -> float:
        return self.logit_scale if self.softcap is None else self.softcap

    @property
    def per_ratio(self) -> float:
        """Powers of two: e^z = 2^(per_ratio * ratio)."""
        return self.unit / math.log(2)

    @property
    def to_ratio(self) -> float:
        """What h . w is multiplied by under a cap, before tanh."""
        return 1.0 if self.softcap is None else self.logit_scale / self.softcap

    def ratio_(self, products: Tensor, bias: Tensor | None) -> Tensor:
        """z / unit in place of h . w."""
        if bias is not None:
            products.add_(bias)
        if self.softcap is None:
            return products
        products.mul_(self.to_ratio)
        infinite = products.isinf()
        finite = products.tanh()
        return torch.where(infinite, products, finite, out=products)

    def relative_slope(self, z: Tensor) -> Tensor:
        """dz/d(h . w) / scale: 1, and under a cap 1 - ratio^2."""
        return torch.ones_like(z) if self.softcap is None else 1 - (z / self.softcap).square()

    def logits(self, products: Tensor, bias: Tensor | None) -> Tensor:
        """z, by autograd: what the naive version does."""
        z = (products if bias is None else products + bias) * self.logit_scale
        if self.softcap is None:
            return z
        infinite = z.isinf()  # 0 in their place, for the gradient of the branch not taken
        return torch.where(infinite, z, self.softcap * torch.tanh(z.masked_fill(infinite, 0) / self.softcap))


def binary_entropy(log_odds: Tensor) -> Tensor:
    """-p log p - (1 - p) log(1 - p) at p = sigmoid(log_odds), in nats; 0 at +-inf."""
    p_log_p = log_odds.sigmoid() * F.logsigmoid(log_odds)
    other = (-log_odds).sigmoid() * F.logsigmoid(-log_odds)
    return -(p_log_p.masked_fill(log_odds.isneginf(), 0) + other.masked_fill(log_odds.isposinf(), 0))
