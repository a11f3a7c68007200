"""Objectives for single responses other than BNF: one loss per response."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from bnf_core._checks import check_positive, check_reference_point
from bnf_core.batch import TokenBatch, sequence_logps

__all__ = ["kto"]


def kto(
    log_odds: Float[Tensor, " tokens"],
    batch: TokenBatch,
    *,
    beta: float = 0.1,
    lambda_d: float = 1.0,
    lambda_u: float = 1.0,
    z0: float | Float[Tensor, ""] = 0.0,
) -> Float[Tensor, " responses"]:
    """KTO: Kahneman-Tversky optimization, a saturating gain or loss of each response.

    lambda_d (1 - sigmoid(beta (r - z0))) if preferred,   lambda_u (1 - sigmoid(beta (z0 - r))) if dispreferred,

    with r = log pi(y) - log pi_ref(y) and z0 >= 0, a constant for the gradient.

    Args:
      log_odds: l of each response token under the policy. Differentiable.
      batch: needs `ref_log_odds`.
      beta: strength of the implicit reward, positive.
      lambda_d: weight of preferred responses, not negative.
      lambda_u: weight of dispreferred responses, not negative.
      z0: the reference point, in nats: an estimate of KL(policy, reference), usually the mean of r over mismatched
        prompts and responses. Negative estimates count as 0.

    Returns:
      The loss of each response; the objective is their mean.

    Raises:
      ValueError: wrong shape, dtype or device, no `ref_log_odds`, a hyper-parameter out of range.

    Example:
      >>> import torch
      >>> batch = TokenBatch(torch.tensor([0, 0, 1]), torch.tensor([True, False]), ref_log_odds=torch.zeros(3))
      >>> kto(torch.zeros(3), batch)
      tensor([0.5000, 0.5000])

    References:
      Ethayarajh et al. 2024, KTO: model alignment as prospect theoretic optimization, eq. 8.
    """
    beta, z0 = check_positive("beta", beta), check_reference_point(z0)
    lambda_d, lambda_u = check_positive("lambda_d", lambda_d, zero=True), check_positive("lambda_u", lambda_u, zero=True)
    if batch.ref_log_odds is None:
        raise ValueError("batch.ref_log_odds: expected the log-odds of the reference for KTO, got None.")
    logps = sequence_logps(log_odds, batch)
    r = logps - sequence_logps(batch.ref_log_odds.detach().to(logps.dtype), batch)
    x = beta * (r - max(z0, 0.0))
    # 1 - sigmoid(x) = sigmoid(-x); through its logarithm, because sigmoid's own backward, y (1 - y), cancels at y = 1
    return torch.where(batch.preferred, lambda_d * F.logsigmoid(-x).exp(), lambda_u * F.logsigmoid(x).exp())
