"""The log-likelihood objectives: what BNF is with w = 1 everywhere, and the paper's starting point.

Neither needs a reference. `log_likelihood` is one per token, its mean over each response the objective
(`registry.objective`); `nll_pll` is one per pair, and its batch needs `pair`. Both raise ValueError for a wrong shape,
dtype or device, or, per pair, responses that are not in pairs.

Example:
  >>> import torch
  >>> batch = TokenBatch(torch.tensor([0, 0, 1]), torch.tensor([True, False]), pair=torch.tensor([0, 0]))
  >>> log_likelihood(torch.zeros(3), batch), nll_pll(torch.zeros(3), batch)
  (tensor([ 0.6931, -0.6931]), tensor([0.6931]))
  >>> nll_pll_constraint(pair_logps(torch.zeros(3), batch))
  (tensor([1.]), tensor([1.]))
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from bnf_core._checks import at_least_float32
from bnf_core.batch import PairConstraint, PairLogps, TokenBatch, checked_pairs, pair_logps
from bnf_core.objectives.registry import objective

__all__ = ["log_likelihood", "log_likelihood_constraint", "nll_pll", "nll_pll_constraint"]


def log_likelihood_constraint(log_odds: Float[Tensor, " tokens"], ref_log_odds: object = None) -> Float[Tensor, " tokens"]:
    """1 for every token, however likely: what BNF's weight is where policy = reference."""
    return torch.ones_like(at_least_float32(log_odds))


@objective(per="token", reference=False, constraint=log_likelihood_constraint, listed=True)
def log_likelihood(log_odds: Float[Tensor, " tokens"], sign: Float[Tensor, " tokens"]) -> Float[Tensor, " tokens"]:
    """Signed log-likelihood of each response (eq. 4 with the one-hot target of eq. 5), in nats per token.

    s / |y| * sum_t NLL_t,   NLL = -log pi_y.

    For a preferred response this is length-normalised supervised fine-tuning; for a dispreferred one its gradient
    grows as the likelihood falls.
    """
    return -sign * F.logsigmoid(log_odds)


def nll_pll_constraint(pairs: PairLogps) -> PairConstraint:
    """C_w = C_l = 1: none (eq. 1)."""
    pairs = checked_pairs(pairs)
    return torch.ones_like(pairs.chosen), torch.ones_like(pairs.rejected)


@objective(per="pair", reference=False, constraint=nll_pll_constraint, listed=True)
def nll_pll(log_odds: Float[Tensor, " tokens"], batch: TokenBatch) -> Float[Tensor, " pairs"]:
    """NLL+PLL of each pair (eq. 1): -log pi(y_w) + log pi(y_l), in nats."""
    pairs = pair_logps(log_odds, batch)
    return pairs.rejected - pairs.chosen
