"""KTO: single responses against a reference point.

r = log pi(y) - log pi_ref(y), sums over response tokens, in nats. beta, positive, is the strength of the implicit reward;
lambda_d and lambda_u, not negative, weigh preferred and dispreferred responses. z0, in nats, is the reference point, a
constant for the gradient: an estimate of KL(policy, reference), usually the mean of r over mismatched prompts and responses;
negative estimates count as 0. Both raise ValueError for a wrong shape, dtype or device, no `ref_log_odds`, or a
hyper-parameter out of range. Ethayarajh et al. 2024, KTO: model alignment as prospect theoretic optimization, eq. 8.

Example:
  >>> import torch
  >>> batch = TokenBatch(torch.tensor([0, 0, 1]), torch.tensor([True, False]), ref_log_odds=torch.zeros(3))
  >>> kto(torch.zeros(3), batch)
  tensor([0.5000, 0.5000])
  >>> kto_constraint(torch.zeros(2), batch.preferred)
  tensor([0.0250, 0.0250])
"""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from bnf_core._checks import at_least_float32, check_bool, check_floating, check_positive, check_reference_point
from bnf_core.batch import TokenBatch, sequence_logps
from bnf_core.objectives.registry import objective

__all__ = ["kto", "kto_constraint"]


def kto_constraint(
    log_ratio: Float[Tensor, " responses"],
    preferred: Bool[Tensor, " responses"],
    *,
    beta: float = 0.1,
    lambda_d: float = 1.0,
    lambda_u: float = 1.0,
    z0: float | Float[Tensor, ""] = 0.0,
) -> Float[Tensor, " responses"]:
    """C_w of a preferred response, C_l of a dispreferred one, from its r and its label.

    C = lambda beta sigmoid(x) sigmoid(-x),   x = beta (r - z0),   lambda = lambda_d or lambda_u by the label.
    """
    check_floating("log_ratio", log_ratio)
    check_bool("preferred", preferred, tuple(log_ratio.shape))
    beta, z0 = check_positive("beta", beta), check_reference_point(z0)
    lambda_d, lambda_u = check_positive("lambda_d", lambda_d, zero=True), check_positive("lambda_u", lambda_u, zero=True)
    x = beta * (at_least_float32(log_ratio) - max(z0, 0.0))
    weight = torch.where(preferred, x.new_tensor(lambda_d), x.new_tensor(lambda_u))
    return beta * weight * torch.sigmoid(x) * torch.sigmoid(-x)


@objective(per="response", constraint=kto_constraint, listed=True)
def kto(
    log_odds: Float[Tensor, " tokens"],
    batch: TokenBatch,
    *,
    beta: float = 0.1,
    lambda_d: float = 1.0,
    lambda_u: float = 1.0,
    z0: float | Float[Tensor, ""] = 0.0,
) -> Float[Tensor, " responses"]:
    """KTO, Kahneman-Tversky optimization: a saturating gain or loss of each response.

    lambda_d (1 - sigmoid(beta (r - z0))) if preferred,   lambda_u (1 - sigmoid(beta (z0 - r))) if dispreferred.
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
