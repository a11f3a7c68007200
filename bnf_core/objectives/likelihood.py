"""The log-likelihood objectives: what BNF is with w = 1 everywhere, and the paper's starting point."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from bnf_core._checks import check_floating, check_same_device, wide
from bnf_core.batch import TokenBatch, pair_logps

__all__ = ["log_likelihood", "nll_pll"]


def log_likelihood(log_odds: Float[Tensor, " tokens"], batch: TokenBatch) -> Float[Tensor, " responses"]:
    """Signed log-likelihood of each response (eq. 4 with the one-hot target of eq. 5), in nats per token.

    s / |y| * sum_t NLL_t,   NLL = -log pi_y.

    For a preferred response this is length-normalised supervised fine-tuning; for a dispreferred one its gradient
    grows as the likelihood falls.

    Args:
      log_odds: l of each response token under the policy. Differentiable.
      batch: which response each token belongs to.

    Returns:
      The loss of each response; the objective is their mean.

    Raises:
      ValueError: wrong shape, dtype or device.

    Example:
      >>> import torch
      >>> log_likelihood(torch.zeros(3), TokenBatch(torch.tensor([0, 0, 1]), torch.tensor([True, False])))
      tensor([ 0.6931, -0.6931])
    """
    check_floating("log_odds", log_odds, tuple(batch.response.shape))
    check_same_device(log_odds=log_odds, response=batch.response)
    log_odds = wide(log_odds)
    return -batch.sign.to(log_odds.dtype) * batch.mean(F.logsigmoid(log_odds))


def nll_pll(log_odds: Float[Tensor, " tokens"], batch: TokenBatch) -> Float[Tensor, " pairs"]:
    """NLL+PLL of each pair (eq. 1), in nats.

    -log pi(y_w) + log pi(y_l).

    Args:
      log_odds: l of each response token under the policy. Differentiable.
      batch: needs `pair`.

    Returns:
      The loss of each pair; the objective is their mean.

    Raises:
      ValueError: wrong shape, dtype or device, or responses that are not in pairs.

    Example:
      >>> import torch
      >>> batch = TokenBatch(torch.tensor([0, 0, 1]), torch.tensor([True, False]), pair=torch.tensor([0, 0]))
      >>> nll_pll(torch.zeros(3), batch)
      tensor([0.6931])
    """
    pairs = pair_logps(log_odds, batch)
    return pairs.rejected - pairs.chosen
