"""The paper's formulas, straight from the page, in enough digits that nothing cancels: the judge of everything else.

Logits up to +-400 make odds down to 1e-348, which 1 - pi must still see: 420 digits leave more than 60 of them.
"""

from dataclasses import dataclass

import mpmath as mp
import torch
from torch import Tensor

mp.mp.dps = 420
IGNORE = -100


@dataclass
class Position:
    """Everything the paper defines at one response position."""

    pi: list[mp.mpf]
    pi_ref: list[mp.mpf]
    y: int

    @property
    def f(self) -> list[mp.mpf]:  # eq. 6
        f_y = min(self.pi[self.y] / self.pi_ref[self.y], mp.mpf(1))
        rest = 1 - self.pi[self.y]
        return [f_y if j == self.y else ((1 - f_y) / rest * p if rest else mp.mpf(0)) for j, p in enumerate(self.pi)]

    @property
    def cross_entropy(self) -> mp.mpf:  # inner sum of eq. 4, with 0 log 0 = 0
        return -mp.fsum(f * mp.log(p) for f, p in zip(self.f, self.pi, strict=True) if f)

    @property
    def pi_minus_f(self) -> list[mp.mpf]:  # eq. 8
        return [p - f for p, f in zip(self.pi, self.f, strict=True)]

    @property
    def log_odds(self) -> mp.mpf:
        others = mp.fsum(p for j, p in enumerate(self.pi) if j != self.y)
        return mp.log(self.pi[self.y] / others) if others else mp.inf

    @property
    def entropy(self) -> mp.mpf:
        return -mp.fsum(p * mp.log(p) for p in self.pi if p)


def softmax(logits: list[float]) -> list[mp.mpf]:
    top = max(logits)
    weights = [mp.exp(mp.mpf(z) - mp.mpf(top)) if z != float("-inf") else mp.mpf(0) for z in logits]
    total = mp.fsum(weights)
    return [w / total for w in weights]


def position(logits: Tensor, ref_logits: Tensor, y: int) -> Position:
    return Position(softmax(logits.double().tolist()), softmax(ref_logits.double().tolist()), y)


def bnf_loss(logits: Tensor, ref_logits: Tensor, labels: Tensor, preferred: Tensor) -> mp.mpf:  # eq. 4
    total = mp.mpf(0)
    for z, z_ref, y, chosen in zip(logits, ref_logits, labels, preferred.tolist(), strict=True):
        places = [t for t in range(len(y)) if y[t] != IGNORE]
        terms = mp.fsum(position(z[t], z_ref[t], int(y[t])).cross_entropy for t in places)
        total += (1 if chosen else -1) * terms / len(places)
    return total / len(preferred)


def bnf_logit_gradient(logits: Tensor, ref_logits: Tensor, labels: Tensor, preferred: Tensor) -> list[mp.mpf]:
    """Eq. 8 over the number of responses, flattened like the logits."""
    flat: list[mp.mpf] = []
    for z, z_ref, y, chosen in zip(logits, ref_logits, labels, preferred.tolist(), strict=True):
        scale = mp.mpf(1 if chosen else -1) / int((y != IGNORE).sum()) / len(preferred)
        for t in range(len(y)):
            if y[t] == IGNORE:
                flat += [mp.mpf(0)] * z.shape[-1]
            else:
                flat += [scale * g for g in position(z[t], z_ref[t], int(y[t])).pi_minus_f]
    return flat


def orpo(chosen: Tensor, rejected: Tensor, lambda_: float) -> tuple[mp.mpf, list[mp.mpf]]:
    """ORPO's loss of one pair from its tokens' log-odds, and the derivative by each of them, the chosen side's first."""
    with mp.workdps(520):  # 1 - 1 / (1 + e^-1040) has 451 zeros
        miss = [[1 / (1 + mp.exp(mp.mpf(x))) for x in side.tolist()] for side in (chosen, rejected)]
        m_w, m_l = (mp.fsum(mp.log1p(-p) for p in side) / len(side) for side in miss)
        h = m_w - mp.log(-mp.expm1(m_w)) - m_l + mp.log(-mp.expm1(m_l))
        wrong = 1 / (1 + mp.exp(h))
        c_w = (1 + lambda_ * wrong / -mp.expm1(m_w)) / len(chosen)
        c_l = lambda_ * wrong / -mp.expm1(m_l) / len(rejected)
        return -m_w + lambda_ * mp.log1p(mp.exp(-h)), [-c_w * p for p in miss[0]] + [c_l * p for p in miss[1]]


def to_tensor(values: list[mp.mpf], like: Tensor) -> Tensor:
    """Exact values rounded once, to float64."""
    return torch.tensor([float(v) for v in values], dtype=torch.float64).reshape(like.shape)
