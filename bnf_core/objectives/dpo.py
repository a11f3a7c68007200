"""DPO and what is made of it: pairwise objectives of the log-ratios to a reference, in nats.

r_w = log pi(y_w) - log pi_ref(y_w), sums over response tokens, and r_l likewise. Each is (log_odds, batch) -> (pairs,),
differentiable in log_odds, for a batch with `pair` and `ref_log_odds`, and stands below its constraint (eq. 3, table 2),
PairLogps -> (C_w, C_l), (pairs,) each, of the same hyper-parameters:

    grad L = -C_w grad log pi(y_w) + C_l grad log pi(y_l).

beta, positive, is the strength of the implicit reward. All raise ValueError for a wrong shape, dtype or device, responses
that are not in pairs, no reference, or a hyper-parameter out of range.

Example:
  >>> import torch
  >>> log_odds, pair = torch.tensor([1.0, 0.0, -1.0]), torch.tensor([0, 0])
  >>> batch = TokenBatch(torch.tensor([0, 0, 1]), torch.tensor([True, False]), pair, ref_log_odds=torch.zeros(3))
  >>> [round(loss(log_odds, batch).item(), 4) for loss in (dpo, ipo, ipo_avg, r_dpo, dpop, rpo, bdpo, bnf_contrastive)]
  [0.6444, 16.0, 17.5556, 0.621, 0.5544, 1.1476, 0.6615, 0.0095]
  >>> dpo_constraint(pair_logps(log_odds, batch), beta=0.1)
  (tensor([0.0475]), tensor([0.0475]))
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from bnf_core._checks import check_number, check_positive
from bnf_core.batch import PairConstraint, PairLogps, TokenBatch, checked_pairs, pair_logps
from bnf_core.objectives.bnf import bnf, bnf_weight
from bnf_core.objectives.registry import objective

__all__ = [
    "bdpo",
    "bdpo_constraint",
    "bnf_contrastive",
    "bnf_contrastive_constraint",
    "dpo",
    "dpo_constraint",
    "dpop",
    "dpop_constraint",
    "ipo",
    "ipo_avg",
    "ipo_avg_constraint",
    "ipo_constraint",
    "r_dpo",
    "r_dpo_constraint",
    "rpo",
    "rpo_constraint",
]


def dpo_constraint(pairs: PairLogps, *, beta: float = 0.1) -> PairConstraint:
    """C_w = C_l = beta sigmoid(beta (r_l - r_w)) (table 2)."""
    beta = check_positive("beta", beta)
    r_w, r_l = checked_pairs(pairs).log_ratios
    c = beta * torch.sigmoid(beta * (r_l - r_w))
    return c, c


@objective(per="pair", constraint=dpo_constraint, listed=True)
def dpo(log_odds: Float[Tensor, " tokens"], batch: TokenBatch, *, beta: float = 0.1) -> Float[Tensor, " pairs"]:
    """DPO, direct preference optimization (table 2): -log sigmoid(beta (r_w - r_l)).

    Rafailov et al. 2023, Direct preference optimization.
    """
    beta = check_positive("beta", beta)
    r_w, r_l = pair_logps(log_odds, batch).log_ratios
    return -F.logsigmoid(beta * (r_w - r_l))


def ipo_constraint(pairs: PairLogps, *, tau: float = 0.1) -> PairConstraint:
    """C_w = C_l = 2 (1 / (2 tau) + r_l - r_w) (table 2)."""
    tau = check_positive("tau", tau)
    r_w, r_l = checked_pairs(pairs).log_ratios
    c = 2 * (1 / (2 * tau) + r_l - r_w)
    return c, c


@objective(per="pair", constraint=ipo_constraint, listed=True)
def ipo(log_odds: Float[Tensor, " tokens"], batch: TokenBatch, *, tau: float = 0.1) -> Float[Tensor, " pairs"]:
    """IPO, identity preference optimization (table 2): (r_w - r_l - 1 / (2 tau))^2.

    tau, positive, is the regularisation: the margin aimed at is 1 / (2 tau) nats a response.
    Azar et al. 2023, A general theoretical paradigm to understand learning from human preferences.
    """
    tau = check_positive("tau", tau)
    r_w, r_l = pair_logps(log_odds, batch).log_ratios
    return (r_w - r_l - 1 / (2 * tau)).square()


def ipo_avg_constraint(pairs: PairLogps, *, tau: float = 0.1) -> PairConstraint:
    """C_w = c / |y_w|,   C_l = c / |y_l|,   c = 2 (1 / (2 tau) + r_l / |y_l| - r_w / |y_w|)."""
    pairs, tau = checked_pairs(pairs), check_positive("tau", tau)
    r_w, r_l = pairs.log_ratios
    c = 2 * (1 / (2 * tau) + r_l / pairs.rejected_lengths - r_w / pairs.chosen_lengths)
    return c / pairs.chosen_lengths, c / pairs.rejected_lengths


@objective(per="pair", constraint=ipo_avg_constraint, listed=True)
def ipo_avg(log_odds: Float[Tensor, " tokens"], batch: TokenBatch, *, tau: float = 0.1) -> Float[Tensor, " pairs"]:
    """IPO of averages: (r_w / |y_w| - r_l / |y_l| - 1 / (2 tau))^2, which is what TRL calls IPO.

    The margin aimed at, 1 / (2 tau), is in nats per token; `ipo` is the paper's formula, of sums.
    """
    tau = check_positive("tau", tau)
    pairs = pair_logps(log_odds, batch)
    r_w, r_l = pairs.log_ratios
    return (r_w / pairs.chosen_lengths - r_l / pairs.rejected_lengths - 1 / (2 * tau)).square()


def r_dpo_constraint(pairs: PairLogps, *, beta: float = 0.1, alpha: float = 0.05) -> PairConstraint:
    """C_w = C_l = beta sigmoid(-(beta (r_w - r_l) + alpha (|y_w| - |y_l|)))."""
    pairs = checked_pairs(pairs)
    beta, alpha = check_positive("beta", beta), check_number("alpha", alpha)
    r_w, r_l = pairs.log_ratios
    c = beta * torch.sigmoid(-(beta * (r_w - r_l) + alpha * (pairs.chosen_lengths - pairs.rejected_lengths)))
    return c, c


@objective(per="pair", constraint=r_dpo_constraint, listed=True)
def r_dpo(
    log_odds: Float[Tensor, " tokens"], batch: TokenBatch, *, beta: float = 0.1, alpha: float = 0.05
) -> Float[Tensor, " pairs"]:
    """R-DPO, DPO with a length penalty: -log sigmoid(beta (r_w - r_l) + alpha (|y_w| - |y_l|)).

    alpha is the weight of the length difference, per token.
    Park et al. 2024, Disentangling length from quality in direct preference optimization, eq. 9.
    """
    beta, alpha = check_positive("beta", beta), check_number("alpha", alpha)
    pairs = pair_logps(log_odds, batch)
    r_w, r_l = pairs.log_ratios
    return -F.logsigmoid(beta * (r_w - r_l) + alpha * (pairs.chosen_lengths - pairs.rejected_lengths))


def dpop_constraint(pairs: PairLogps, *, beta: float = 0.3, lambda_: float = 50.0) -> PairConstraint:
    """C_l = beta sigmoid(-h),   C_w = C_l (1 + lambda 1[r_w < 0]),   h = beta (r_w - r_l - lambda max(0, -r_w))."""
    beta, lambda_ = check_positive("beta", beta), check_positive("lambda_", lambda_, zero=True)
    r_w, r_l = checked_pairs(pairs).log_ratios
    c = beta * torch.sigmoid(-beta * (r_w - r_l - lambda_ * torch.relu(-r_w)))
    return c * (1 + lambda_ * (r_w < 0).to(c.dtype)), c


@objective(per="pair", constraint=dpop_constraint, listed=True)
def dpop(
    log_odds: Float[Tensor, " tokens"], batch: TokenBatch, *, beta: float = 0.3, lambda_: float = 50.0
) -> Float[Tensor, " pairs"]:
    """DPOP, DPO with a penalty where the preferred response loses likelihood.

    -log sigmoid(beta (r_w - r_l) - beta lambda max(0, -r_w)).

    lambda, not negative, is the weight of the penalty. At its kink, r_w = 0, its subgradient is 0.
    Pal et al. 2024, Smaug: fixing failure modes of preference optimisation with DPO-positive.
    """
    beta, lambda_ = check_positive("beta", beta), check_positive("lambda_", lambda_, zero=True)
    r_w, r_l = pair_logps(log_odds, batch).log_ratios
    return -F.logsigmoid(beta * (r_w - r_l - lambda_ * F.relu(-r_w)))


def rpo_constraint(pairs: PairLogps, *, beta: float = 0.1, alpha: float = 1.0) -> PairConstraint:
    """C_l = beta sigmoid(beta (r_l - r_w)),   C_w = C_l + alpha / |y_w|."""
    pairs = checked_pairs(pairs)
    beta, alpha = check_positive("beta", beta), check_positive("alpha", alpha, zero=True)
    r_w, r_l = pairs.log_ratios
    c = beta * torch.sigmoid(beta * (r_l - r_w))
    return c + alpha / pairs.chosen_lengths, c


@objective(per="pair", constraint=rpo_constraint, listed=True)
def rpo(
    log_odds: Float[Tensor, " tokens"], batch: TokenBatch, *, beta: float = 0.1, alpha: float = 1.0
) -> Float[Tensor, " pairs"]:
    """RPO, DPO with the preferred response's likelihood beside it: -log sigmoid(beta (r_w - r_l)) - alpha log pi(y_w) / |y_w|.

    alpha, not negative, weighs the likelihood, per token.
    Pang et al. 2024, Iterative reasoning preference optimization.
    """
    beta, alpha = check_positive("beta", beta), check_positive("alpha", alpha, zero=True)
    pairs = pair_logps(log_odds, batch)
    r_w, r_l = pairs.log_ratios
    return -F.logsigmoid(beta * (r_w - r_l)) - alpha * pairs.means[0]


def bdpo_constraint(pairs: PairLogps, *, beta: float = 0.1, lambda_: float = 0.5) -> PairConstraint:
    """C_w = beta sigmoid(beta (r - r_w)),   C_l = C_w lambda P / (lambda P + 1 - lambda),   P = e^r_l, r as in `bdpo`."""
    beta, lambda_ = check_positive("beta", beta), _share("lambda_", lambda_)
    r_w, r_l = checked_pairs(pairs).log_ratios
    c = beta * torch.sigmoid(beta * (_mixed(r_l, lambda_) - r_w))
    return c, c * torch.sigmoid(r_l + math.log(lambda_) - math.log1p(-lambda_)) if lambda_ < 1 else c


@objective(per="pair", constraint=bdpo_constraint, listed=True)
def bdpo(
    log_odds: Float[Tensor, " tokens"], batch: TokenBatch, *, beta: float = 0.1, lambda_: float = 0.5
) -> Float[Tensor, " pairs"]:
    """BDPO, bounded DPO: the dispreferred side is held against a mixture of policy and reference.

    -log sigmoid(beta (r_w - r)),   r = log(lambda pi(y_l) + (1 - lambda) pi_ref(y_l)) - log pi_ref(y_l).

    lambda, in (0, 1], is the policy's share; 1 is DPO. As pi(y_l) falls, r stops at log(1 - lambda), and its gradient with it.
    Cho et al. 2025, Rethinking DPO: the role of rejected responses in preference misalignment (arXiv:2506.12725).
    """
    beta, lambda_ = check_positive("beta", beta), _share("lambda_", lambda_)
    r_w, r_l = pair_logps(log_odds, batch).log_ratios
    return -F.logsigmoid(beta * (r_w - _mixed(r_l, lambda_)))


def _mixed(r: Tensor, lambda_: float) -> Tensor:
    """log(lambda e^r + 1 - lambda)."""
    return torch.logaddexp(r + math.log(lambda_), r.new_tensor(math.log1p(-lambda_))) if lambda_ < 1 else r


def _share(name: str, value: object) -> float:
    share = check_positive(name, value)
    if share > 1:
        raise ValueError(f"{name}: expected a number above 0 and at most 1, got {share!r}.")
    return share


def bnf_contrastive_constraint(
    log_odds: Float[Tensor, " tokens"], batch: TokenBatch, *, beta: float = 0.1
) -> Float[Tensor, " tokens"]:
    """Of each token: C = c w / (2 |y|), with the pair's c as in `bnf_contrastive` and the token's w (`bnf_weight`).

    Times batch.weight, where the batch has it.
    """
    c, rows = _contrast(log_odds, batch, beta), torch.cat(batch.pairs())
    assert batch.ref_log_odds is not None
    of_response = c.new_zeros(batch.responses).index_copy(0, rows, c.repeat(2)) / (2 * batch.lengths)
    constraint = of_response[batch.response] * bnf_weight(log_odds, batch.ref_log_odds)
    return constraint if batch.weight is None else constraint * batch.weight.to(constraint.dtype)


@objective(per="pair", constraint=bnf_contrastive_constraint, weights_tokens=True, listed=True)
def bnf_contrastive(log_odds: Float[Tensor, " tokens"], batch: TokenBatch, *, beta: float = 0.1) -> Float[Tensor, " pairs"]:
    """Experimental: BNF under DPO's constraint, the combination that the paper leaves to future work (section 7).

    c * (L_BNF(y_w) + L_BNF(y_l)) / 2,   c = 2 sigmoid(beta (r_l - r_w)), a constant for the gradient:

    C_DPO over its value where policy = reference. There c = 1 and this is BNF; pairs that are already ranked well count less.
    """
    c = _contrast(log_odds, batch, beta)
    chosen, rejected = batch.pairs()
    losses = bnf(log_odds, batch)
    return c * (losses[chosen] + losses[rejected]) / 2


def _contrast(log_odds: Tensor, batch: TokenBatch, beta: float) -> Tensor:
    beta = check_positive("beta", beta)
    r_w, r_l = pair_logps(log_odds.detach(), batch).log_ratios
    return 2 * torch.sigmoid(beta * (r_l - r_w))
