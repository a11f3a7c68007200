"""KTO: single responses against a reference point.

r = log pi(y) - log pi_ref(y), sums over response tokens, in nats. beta, positive, is the strength of the implicit reward;
lambda_d and lambda_u, not negative, weigh preferred and dispreferred responses. z0, in nats, is the reference point, a
constant for the gradient: an estimate of KL(policy, reference), the mean of r over prompts with another prompt's response
(`batch.z0`); a negative estimate counts as 0. `kto_fixed` is KTO with a z0 that does not move. All raise ValueError for a wrong
shape, dtype or device, no `ref_log_odds` or `z0`, or a hyper-parameter out of range. Ethayarajh et al. 2024, KTO: model
alignment as prospect theoretic optimization, eq. 8.

Example:
  >>> import torch
  >>> labels, zeros = torch.tensor([True, False]), torch.zeros(3)
  >>> batch = TokenBatch(torch.tensor([0, 0, 1]), labels, ref_log_odds=zeros, z0=torch.tensor(2.0))
  >>> kto(torch.zeros(3), batch), kto_fixed(torch.zeros(3), batch)
  (tensor([0.5498, 0.4502]), tensor([0.5000, 0.5000]))
  >>> kto_constraint(torch.zeros(2), batch.preferred, z0=2.0)
  tensor([0.0248, 0.0248])
"""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from bnf_core._checks import at_least_float32, check_bool, check_floating, check_positive, check_reference_point
from bnf_core.batch import TokenBatch, sequence_log_ratios
from bnf_core.objectives.registry import objective

__all__ = ["kto", "kto_constraint", "kto_fixed"]


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


def _fixed_constraint(
    log_odds: Float[Tensor, " tokens"],
    batch: TokenBatch,
    *,
    beta: float = 0.1,
    lambda_d: float = 1.0,
    lambda_u: float = 1.0,
    z0: float | Float[Tensor, ""] = 0.0,
) -> Float[Tensor, " responses"]:
    ratio = sequence_log_ratios(log_odds, batch).detach()
    return kto_constraint(ratio, batch.preferred, beta=beta, lambda_d=lambda_d, lambda_u=lambda_u, z0=z0)


@objective(per="response", constraint=_fixed_constraint, listed=True)
def kto_fixed(
    log_odds: Float[Tensor, " tokens"],
    batch: TokenBatch,
    *,
    beta: float = 0.1,
    lambda_d: float = 1.0,
    lambda_u: float = 1.0,
    z0: float | Float[Tensor, ""] = 0.0,
) -> Float[Tensor, " responses"]:
    """KTO with a constant reference point, 0 unless given: without a KL estimate, and half of KTO's forward passes.

    lambda_d (1 - sigmoid(beta (r - z0))) if preferred,   lambda_u (1 - sigmoid(beta (z0 - r))) if dispreferred.
    """
    return _losses(log_odds, batch, beta=beta, lambda_d=lambda_d, lambda_u=lambda_u, z0=z0)


def _losses(
    log_odds: Tensor, batch: TokenBatch, *, beta: float, lambda_d: float, lambda_u: float, z0: float | Tensor
) -> Tensor:
    beta, z0 = check_positive("beta", beta), check_reference_point(z0)
    lambda_d, lambda_u = check_positive("lambda_d", lambda_d, zero=True), check_positive("lambda_u", lambda_u, zero=True)
    x = beta * (sequence_log_ratios(log_odds, batch) - max(z0, 0.0))
    # 1 - sigmoid(x) = sigmoid(-x); through its logarithm, because sigmoid's own backward, y (1 - y), cancels at y = 1
    return torch.where(batch.preferred, lambda_d * F.logsigmoid(-x).exp(), lambda_u * F.logsigmoid(x).exp())


def _constraint(
    log_odds: Float[Tensor, " tokens"],
    batch: TokenBatch,
    *,
    beta: float = 0.1,
    lambda_d: float = 1.0,
    lambda_u: float = 1.0,
) -> Float[Tensor, " responses"]:
    return _fixed_constraint(log_odds, batch, beta=beta, lambda_d=lambda_d, lambda_u=lambda_u, z0=_estimate(batch))


@objective(per="response", constraint=_constraint, reference_point=True, listed=True)
def kto(
    log_odds: Float[Tensor, " tokens"],
    batch: TokenBatch,
    *,
    beta: float = 0.1,
    lambda_d: float = 1.0,
    lambda_u: float = 1.0,
) -> Float[Tensor, " responses"]:
    """KTO, Kahneman-Tversky optimization: `kto_fixed` with z0 = `batch.z0`, the estimate of this step."""
    return _losses(log_odds, batch, beta=beta, lambda_d=lambda_d, lambda_u=lambda_u, z0=_estimate(batch))


def _estimate(batch: TokenBatch) -> Tensor:
    if batch.z0 is None:
        raise ValueError("batch.z0: expected KTO's reference point, the estimated KL, got None; kto_fixed takes a constant.")
    return batch.z0
