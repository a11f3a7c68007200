"""Pairwise objectives: one loss per pair, from the sequence log-likelihoods of its two sides.

Notation: r_w = log pi(y_w) - log pi_ref(y_w) and r_l likewise, sums over response tokens; m_w, m_l mean
log-likelihoods per token. Each objective's constraint (eq. 3, table 2) is in `bnf_core.constraints`.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from bnf_core._checks import check_number, check_positive, wide
from bnf_core.batch import TokenBatch, pair_logps
from bnf_core.objectives.bnf import bnf

__all__ = ["bnf_contrastive", "dpo", "dpop", "ipo", "log1mexp", "orpo", "r_dpo", "simpo", "slic_hf"]


def slic_hf(
    log_odds: Float[Tensor, " tokens"], batch: TokenBatch, *, delta: float = 1.0, lambda_: float = 0.1
) -> Float[Tensor, " pairs"]:
    """SLiC-HF: a hinge on the likelihood gap, and a likelihood term (table 2), in nats.

    max(0, delta - log pi(y_w) + log pi(y_l)) - lambda log pi(y_w).

    At the kink the subgradient is 0.

    Args:
      log_odds: l of each response token under the policy. Differentiable.
      batch: needs `pair`.
      delta: margin of the hinge, in nats.
      lambda_: weight of the likelihood of y_w, not negative.

    Returns:
      The loss of each pair; the objective is their mean.

    Raises:
      ValueError: wrong shape, dtype or device, responses that are not in pairs, a hyper-parameter out of range.

    Example:
      >>> import torch
      >>> batch = TokenBatch(
      ...     torch.tensor([0, 0, 1]), torch.tensor([True, False]), torch.tensor([0, 0]), ref_log_odds=torch.zeros(3)
      ... )
      >>> slic_hf(torch.tensor([1.0, 0.0, -1.0]), batch)
      tensor([0.7938])

    References:
      Zhao et al. 2023, SLiC-HF: sequence likelihood calibration with human feedback.
    """
    delta, lambda_ = check_number("delta", delta), check_positive("lambda_", lambda_, zero=True)
    pairs = pair_logps(log_odds, batch)
    return F.relu(delta - pairs.chosen + pairs.rejected) - lambda_ * pairs.chosen


def dpo(log_odds: Float[Tensor, " tokens"], batch: TokenBatch, *, beta: float = 0.1) -> Float[Tensor, " pairs"]:
    """DPO: direct preference optimization (table 2).

    -log sigmoid(beta (r_w - r_l)).

    Args:
      log_odds: l of each response token under the policy. Differentiable.
      batch: needs `pair` and `ref_log_odds`.
      beta: strength of the implicit reward, positive.

    Returns:
      The loss of each pair; the objective is their mean.

    Raises:
      ValueError: wrong shape, dtype or device, responses that are not in pairs, a hyper-parameter out of range.

    Example:
      >>> import torch
      >>> batch = TokenBatch(
      ...     torch.tensor([0, 0, 1]), torch.tensor([True, False]), torch.tensor([0, 0]), ref_log_odds=torch.zeros(3)
      ... )
      >>> dpo(torch.tensor([1.0, 0.0, -1.0]), batch)
      tensor([0.6444])

    References:
      Rafailov et al. 2023, Direct preference optimization.
    """
    beta = check_positive("beta", beta)
    r_w, r_l = pair_logps(log_odds, batch).log_ratios
    return -F.logsigmoid(beta * (r_w - r_l))


def ipo(log_odds: Float[Tensor, " tokens"], batch: TokenBatch, *, tau: float = 0.1) -> Float[Tensor, " pairs"]:
    """IPO: identity preference optimization (table 2).

    (r_w - r_l - 1 / (2 tau))^2.

    Args:
      log_odds: l of each response token under the policy. Differentiable.
      batch: needs `pair` and `ref_log_odds`.
      tau: regularisation, positive; the margin aimed at is 1 / (2 tau) nats.

    Returns:
      The loss of each pair; the objective is their mean.

    Raises:
      ValueError: wrong shape, dtype or device, responses that are not in pairs, a hyper-parameter out of range.

    Example:
      >>> import torch
      >>> batch = TokenBatch(
      ...     torch.tensor([0, 0, 1]), torch.tensor([True, False]), torch.tensor([0, 0]), ref_log_odds=torch.zeros(3)
      ... )
      >>> ipo(torch.tensor([1.0, 0.0, -1.0]), batch)
      tensor([16.])

    References:
      Azar et al. 2023, A general theoretical paradigm to understand learning from human preferences.
    """
    tau = check_positive("tau", tau)
    r_w, r_l = pair_logps(log_odds, batch).log_ratios
    return (r_w - r_l - 1 / (2 * tau)).square()


def simpo(
    log_odds: Float[Tensor, " tokens"], batch: TokenBatch, *, beta: float = 2.0, gamma: float = 1.0
) -> Float[Tensor, " pairs"]:
    """SimPO: simple preference optimization (table 2), without a reference.

    -log sigmoid(beta m_w - beta m_l - gamma).

    Args:
      log_odds: l of each response token under the policy. Differentiable.
      batch: needs `pair`.
      beta: strength of the implicit reward, positive.
      gamma: target reward margin.

    Returns:
      The loss of each pair; the objective is their mean.

    Raises:
      ValueError: wrong shape, dtype or device, responses that are not in pairs, a hyper-parameter out of range.

    Example:
      >>> import torch
      >>> batch = TokenBatch(
      ...     torch.tensor([0, 0, 1]), torch.tensor([True, False]), torch.tensor([0, 0]), ref_log_odds=torch.zeros(3)
      ... )
      >>> simpo(torch.tensor([1.0, 0.0, -1.0]), batch)
      tensor([0.4304])

    References:
      Meng et al. 2024, SimPO: simple preference optimization with a reference-free reward.
    """
    beta, gamma = check_positive("beta", beta), check_number("gamma", gamma)
    mean_w, mean_l = pair_logps(log_odds, batch).means
    return -F.logsigmoid(beta * (mean_w - mean_l) - gamma)


def r_dpo(
    log_odds: Float[Tensor, " tokens"], batch: TokenBatch, *, beta: float = 0.1, alpha: float = 0.05
) -> Float[Tensor, " pairs"]:
    """R-DPO: DPO with a length penalty.

    -log sigmoid(beta (r_w - r_l) + alpha (|y_w| - |y_l|)).

    Args:
      log_odds: l of each response token under the policy. Differentiable.
      batch: needs `pair` and `ref_log_odds`.
      beta: strength of the implicit reward, positive.
      alpha: weight of the length difference, per token.

    Returns:
      The loss of each pair; the objective is their mean.

    Raises:
      ValueError: wrong shape, dtype or device, responses that are not in pairs, a hyper-parameter out of range.

    Example:
      >>> import torch
      >>> batch = TokenBatch(
      ...     torch.tensor([0, 0, 1]), torch.tensor([True, False]), torch.tensor([0, 0]), ref_log_odds=torch.zeros(3)
      ... )
      >>> r_dpo(torch.tensor([1.0, 0.0, -1.0]), batch)
      tensor([0.6210])

    References:
      Park et al. 2024, Disentangling length from quality in direct preference optimization, eq. 9.
    """
    beta, alpha = check_positive("beta", beta), check_number("alpha", alpha)
    pairs = pair_logps(log_odds, batch)
    r_w, r_l = pairs.log_ratios
    return -F.logsigmoid(beta * (r_w - r_l) + alpha * (pairs.chosen_lengths - pairs.rejected_lengths))


def orpo(log_odds: Float[Tensor, " tokens"], batch: TokenBatch, *, lambda_: float = 0.1) -> Float[Tensor, " pairs"]:
    """ORPO: odds-ratio preference optimization, without a reference, in nats.

    -m_w - lambda log sigmoid(log odds(e^m_w) - log odds(e^m_l)),   log odds(P) = log P - log(1 - P).

    The odds keep their digits where P rounds to 1. A response that is certain, all l = inf, counts as one of very large
    but finite odds, and its gradient is 0.

    Args:
      log_odds: l of each response token under the policy. Differentiable.
      batch: needs `pair`.
      lambda_: weight of the odds ratio, not negative.

    Returns:
      The loss of each pair; the objective is their mean.

    Raises:
      ValueError: wrong shape, dtype or device, responses that are not in pairs, a hyper-parameter out of range.

    Example:
      >>> import torch
      >>> batch = TokenBatch(
      ...     torch.tensor([0, 0, 1]), torch.tensor([True, False]), torch.tensor([0, 0]), ref_log_odds=torch.zeros(3)
      ... )
      >>> orpo(torch.tensor([1.0, 0.0, -1.0]), batch)
      tensor([0.5248])

    References:
      Hong et al. 2024, ORPO: monolithic preference optimization without reference model.
    """
    lambda_ = check_positive("lambda_", lambda_, zero=True)
    chosen, rejected = batch.pairs()
    mean_w, _ = pair_logps(log_odds, batch).means
    odds = _log_odds_of_mean(log_odds, batch)
    return -mean_w - lambda_ * F.logsigmoid(odds[chosen] - odds[rejected])


def dpop(
    log_odds: Float[Tensor, " tokens"], batch: TokenBatch, *, beta: float = 0.3, lambda_: float = 50.0
) -> Float[Tensor, " pairs"]:
    """DPOP: DPO with a penalty where the preferred response loses likelihood.

    -log sigmoid(beta (r_w - r_l) - beta lambda max(0, -r_w)).

    At the kink, r_w = 0, the subgradient of the penalty is 0.

    Args:
      log_odds: l of each response token under the policy. Differentiable.
      batch: needs `pair` and `ref_log_odds`.
      beta: strength of the implicit reward, positive.
      lambda_: weight of the penalty, not negative.

    Returns:
      The loss of each pair; the objective is their mean.

    Raises:
      ValueError: wrong shape, dtype or device, responses that are not in pairs, a hyper-parameter out of range.

    Example:
      >>> import torch
      >>> batch = TokenBatch(
      ...     torch.tensor([0, 0, 1]), torch.tensor([True, False]), torch.tensor([0, 0]), ref_log_odds=torch.zeros(3)
      ... )
      >>> dpop(torch.tensor([1.0, 0.0, -1.0]), batch)
      tensor([0.5544])

    References:
      Pal et al. 2024, Smaug: fixing failure modes of preference optimisation with DPO-positive.
    """
    beta, lambda_ = check_positive("beta", beta), check_positive("lambda_", lambda_, zero=True)
    r_w, r_l = pair_logps(log_odds, batch).log_ratios
    return -F.logsigmoid(beta * (r_w - r_l - lambda_ * F.relu(-r_w)))


def bnf_contrastive(log_odds: Float[Tensor, " tokens"], batch: TokenBatch, *, beta: float = 0.1) -> Float[Tensor, " pairs"]:
    """Experimental: BNF under DPO's constraint, the combination that the paper leaves to future work.

    c * (L_BNF(y_w) + L_BNF(y_l)) / 2,   c = 2 sigmoid(beta (r_l - r_w)), a constant for the gradient.

    Where policy = reference, c = 1 and this is BNF; pairs that are already ranked well count less.

    Args:
      log_odds: l of each response token under the policy. Differentiable.
      batch: needs `pair` and `ref_log_odds`.
      beta: strength of the implicit reward, positive.

    Returns:
      The loss of each pair; the objective is their mean.

    Raises:
      ValueError: wrong shape, dtype or device, responses that are not in pairs, a hyper-parameter out of range.

    Example:
      >>> import torch
      >>> batch = TokenBatch(
      ...     torch.tensor([0, 0, 1]), torch.tensor([True, False]), torch.tensor([0, 0]), ref_log_odds=torch.zeros(3)
      ... )
      >>> bnf_contrastive(torch.tensor([1.0, 0.0, -1.0]), batch)
      tensor([0.0095])

    References:
      Section 7 of the paper; c is C_DPO over its value where policy = reference.
    """
    beta = check_positive("beta", beta)
    r_w, r_l = pair_logps(log_odds.detach(), batch).log_ratios
    chosen, rejected = batch.pairs()
    losses = bnf(log_odds, batch)
    return 2 * torch.sigmoid(beta * (r_l - r_w)) * (losses[chosen] + losses[rejected]) / 2


def _log_odds_of_mean(log_odds: Tensor, batch: TokenBatch) -> Tensor:
    """log odds(P) of each response, P = e^m: one token's l. A response that is certain, all l = inf, counts as very large l.

    Where P rounds to 1, 1 - P is the mean of e^-l over the tokens, summed in logs; then a certain one has gradient 0.
    """
    log_odds = wide(log_odds)
    mean = batch.mean(F.logsigmoid(log_odds))
    limits = torch.finfo(log_odds.dtype)
    close = mean > -(limits.eps**2)  # 1 - P = -m to more digits than there are
    # the double where: what is not chosen must be finite too, or its gradient is 0 * inf
    x = torch.where(close[batch.response], -log_odds.clamp(max=limits.max**0.5), 0)
    top = x.new_full((batch.responses,), -torch.inf).scatter_reduce(0, batch.response.long(), x.detach(), "amax")
    log_mean = top + batch.mean((x - top[batch.response]).exp()).log()
    return mean - torch.where(close, log_mean, log1mexp(torch.where(close, -1, mean)))


def log1mexp(x: Tensor) -> Tensor:
    """log(1 - e^x) for x <= 0, without cancellation; -inf at x = 0, where its gradient is taken as 0."""
    near, far = (x > -0.6931) & (x < 0), x <= -0.6931
    # each form sees only its own x: at another's its gradient would be inf, and 0 * inf is NaN
    value = torch.where(
        near, torch.log(-torch.expm1(torch.where(near, x, -1))), torch.log1p(-torch.exp(torch.where(far, x, -1)))
    )
    return torch.where(x < 0, value, torch.where(x == 0, -torch.inf, torch.nan))
