"""Pairwise objectives of a likelihood margin, without a reference, in nats.

log pi(y) is a sum over response tokens, m = log pi(y) / |y| its mean. Each is (log_odds, batch) -> (pairs,), differentiable
in log_odds, for a batch with `pair`, and stands below its constraint (eq. 3, table 2), PairLogps -> (C_w, C_l), (pairs,)
each, of the same hyper-parameters:

    grad L = -C_w grad log pi(y_w) + C_l grad log pi(y_l).

No single C fits the losses that are normalised by length. All raise ValueError for a wrong shape, dtype or device, responses
that are not in pairs, or a hyper-parameter out of range.

Example:
  >>> import torch
  >>> log_odds = torch.tensor([1.0, 0.0, -1.0])
  >>> batch = TokenBatch(torch.tensor([0, 0, 1]), torch.tensor([True, False]), pair=torch.tensor([0, 0]))
  >>> slic_hf(log_odds, batch), simpo(log_odds, batch), orpo(log_odds, batch)
  (tensor([0.7938]), tensor([0.4304]), tensor([0.5248]))
  >>> simpo_constraint(pair_logps(log_odds, batch), beta=2.0, gamma=1.0)
  (tensor([0.3498]), tensor([0.6995]))
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from bnf_core._checks import at_least_float32, check_number, check_positive
from bnf_core.batch import PairConstraint, PairLogps, TokenBatch, checked_pairs, pair_logps
from bnf_core.objectives.registry import objective

__all__ = ["log1mexp", "orpo", "orpo_constraint", "simpo", "simpo_constraint", "slic_hf", "slic_hf_constraint"]


def slic_hf_constraint(pairs: PairLogps, *, delta: float = 1.0, lambda_: float = 0.1) -> PairConstraint:
    """C_w = 1[gap < delta] + lambda,   C_l = 1[gap < delta],   gap = log pi(y_w) - log pi(y_l).

    Table 2 leaves out lambda, the likelihood term's.
    """
    pairs = checked_pairs(pairs)
    delta, lambda_ = check_number("delta", delta), check_positive("lambda_", lambda_, zero=True)
    hinge = (delta - pairs.chosen + pairs.rejected > 0).to(pairs.chosen.dtype)
    return hinge + lambda_, hinge


@objective(per="pair", reference=False, constraint=slic_hf_constraint, listed=True)
def slic_hf(
    log_odds: Float[Tensor, " tokens"], batch: TokenBatch, *, delta: float = 1.0, lambda_: float = 0.1
) -> Float[Tensor, " pairs"]:
    """SLiC-HF (table 2): max(0, delta - log pi(y_w) + log pi(y_l)) - lambda log pi(y_w).

    delta is the margin of the hinge, in nats, at whose kink the subgradient is 0; lambda, not negative, weighs the likelihood.
    Zhao et al. 2023, SLiC-HF: sequence likelihood calibration with human feedback.
    """
    delta, lambda_ = check_number("delta", delta), check_positive("lambda_", lambda_, zero=True)
    pairs = pair_logps(log_odds, batch)
    return F.relu(delta - pairs.chosen + pairs.rejected) - lambda_ * pairs.chosen


def simpo_constraint(pairs: PairLogps, *, beta: float = 2.0, gamma: float = 1.0) -> PairConstraint:
    """C_w = beta / |y_w| sigmoid(gamma + beta m_l - beta m_w),   C_l = beta / |y_l| sigmoid(same).

    Table 2, with the factors that it leaves out.
    """
    pairs = checked_pairs(pairs)
    beta, gamma = check_positive("beta", beta), check_number("gamma", gamma)
    mean_w, mean_l = pairs.means
    c = beta * torch.sigmoid(gamma + beta * (mean_l - mean_w))
    return c / pairs.chosen_lengths, c / pairs.rejected_lengths


@objective(per="pair", reference=False, constraint=simpo_constraint, listed=True)
def simpo(
    log_odds: Float[Tensor, " tokens"], batch: TokenBatch, *, beta: float = 2.0, gamma: float = 1.0
) -> Float[Tensor, " pairs"]:
    """SimPO, simple preference optimization (table 2): -log sigmoid(beta m_w - beta m_l - gamma).

    beta, positive, is the strength of the implicit reward, gamma the target reward margin.
    Meng et al. 2024, SimPO: simple preference optimization with a reference-free reward.
    """
    beta, gamma = check_positive("beta", beta), check_number("gamma", gamma)
    mean_w, mean_l = pair_logps(log_odds, batch).means
    return -F.logsigmoid(beta * (mean_w - mean_l) - gamma)


def orpo_constraint(pairs: PairLogps, *, lambda_: float = 0.1) -> PairConstraint:
    """C_w = (1 + lambda sigmoid(-h) / (1 - P_w)) / |y_w|,   C_l = lambda sigmoid(-h) / (1 - P_l) / |y_l|.

    h = log odds(P_w) - log odds(P_l),   P = e^m, the geometric mean likelihood per token. Finite where a P rounds to 1: it
    counts as the last number before 1 that m can tell from it.
    """
    pairs = checked_pairs(pairs)
    lambda_ = check_positive("lambda_", lambda_, zero=True)
    # a likelihood that rounds to 1 counts as the last number before it: C would be infinite, grad log pi is 0
    mean_w, mean_l = (mean.clamp(max=-torch.finfo(mean.dtype).tiny) for mean in pairs.means)
    # sigmoid(-h) / (1 - P) in logs; with D = P_w (1 - P_l) + P_l (1 - P_w):  P_l / D  and  P_l (1 - P_w) / ((1 - P_l) D)
    miss_w, miss_l = torch.log(-torch.expm1(mean_w)), torch.log(-torch.expm1(mean_l))
    log_d = torch.logaddexp(mean_w + miss_l, mean_l + miss_w)
    c_w = 1 + lambda_ * (mean_l - log_d).exp()
    c_l = lambda_ * (mean_l + miss_w - miss_l - log_d).exp()
    return c_w / pairs.chosen_lengths, c_l / pairs.rejected_lengths


@objective(per="pair", reference=False, constraint=orpo_constraint, listed=True)
def orpo(log_odds: Float[Tensor, " tokens"], batch: TokenBatch, *, lambda_: float = 0.1) -> Float[Tensor, " pairs"]:
    """ORPO, odds-ratio preference optimization: -m_w - lambda log sigmoid(log odds(e^m_w) - log odds(e^m_l)).

    log odds(P) = log P - log(1 - P), which keeps its digits where P rounds to 1; lambda, not negative, weighs the odds ratio.
    A response that is certain, all l = inf, counts as one of very large but finite odds, and its gradient is 0.
    Hong et al. 2024, ORPO: monolithic preference optimization without reference model.
    """
    lambda_ = check_positive("lambda_", lambda_, zero=True)
    chosen, rejected = batch.pairs()
    mean_w, _ = pair_logps(log_odds, batch).means
    odds = _log_odds_of_mean(log_odds, batch)
    return -mean_w - lambda_ * F.logsigmoid(odds[chosen] - odds[rejected])


def _log_odds_of_mean(log_odds: Tensor, batch: TokenBatch) -> Tensor:
    """log odds(P) of each response, P = e^m: one token's l. A response that is certain, all l = inf, counts as very large l.

    Where P rounds to 1, 1 - P is the mean of e^-l over the tokens, summed in logs; then a certain one has gradient 0.
    """
    log_odds = at_least_float32(log_odds)
    mean = batch.mean(F.logsigmoid(log_odds))
    limits = torch.finfo(log_odds.dtype)
    close = mean > -(limits.eps**2)  # 1 - P = -m to more digits than there are
    # the double where: what is not chosen must be finite too, or its gradient is 0 * inf
    x = torch.where(close[batch.response], -log_odds.clamp(max=limits.max**0.5), 0)
    largest = x.new_full((batch.responses,), -torch.inf).scatter_reduce(0, batch.response.long(), x.detach(), "amax")
    log_mean = largest + batch.mean((x - largest[batch.response]).exp()).log()
    return mean - torch.where(close, log_mean, log1mexp(torch.where(close, -1, mean)))


def log1mexp(x: Tensor) -> Tensor:
    """log(1 - e^x) for x <= 0, without cancellation; -inf at x = 0, where its gradient is taken as 0."""
    near, far = (x > -0.6931) & (x < 0), x <= -0.6931
    # each form sees only its own x: at another's its gradient would be inf, and 0 * inf is NaN
    value = torch.where(
        near, torch.log(-torch.expm1(torch.where(near, x, -1))), torch.log1p(-torch.exp(torch.where(far, x, -1)))
    )
    return torch.where(x < 0, value, torch.where(x == 0, -torch.inf, torch.nan))
