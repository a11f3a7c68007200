"""The constraint functions: what multiplies each response's log-likelihood gradient (eq. 3, table 2), in closed form.

    grad L = -C_w grad log pi(y_w) + C_l grad log pi(y_l)     per pair, log pi(y) the sum over response tokens.

They are functions of the sequence log-likelihoods alone, so they come from full logits
(`bnf_core.reference.pair_logps`) or, never holding them, from the log-odds head (`bnf_core.pair_logps`):

    C_w, C_l = dpo_constraint(pair_logps(log_odds, batch), beta=0.1)

BNF has a constraint per token instead: `bnf_weight`.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from bnf_core._checks import check_bool, check_floating, check_number, check_positive, check_reference_point, wide
from bnf_core.batch import PairLogps

__all__ = [
    "CONSTRAINTS",
    "dpo_constraint",
    "dpop_constraint",
    "ipo_constraint",
    "kto_constraint",
    "nll_pll_constraint",
    "orpo_constraint",
    "r_dpo_constraint",
    "simpo_constraint",
    "slic_hf_constraint",
]

Constraint = tuple[Float[Tensor, " pairs"], Float[Tensor, " pairs"]]


def nll_pll_constraint(pairs: PairLogps) -> Constraint:
    """NLL+PLL's constraint: none (eq. 1).

    C_w = C_l = 1.

    Args:
      pairs: sequence log-likelihoods and lengths of the two sides, from either path.

    Returns:
      (C_w, C_l), each (pairs,).

    Raises:
      ValueError: not a PairLogps.

    Example:
      >>> import torch
      >>> one = torch.ones(1)
      >>> pairs = PairLogps(-2 * one, -3 * one, -2.5 * one, -2.5 * one, 2 * one, 4 * one)
      >>> nll_pll_constraint(pairs)
      (tensor([1.]), tensor([1.]))

    References:
      Eq. 1 of the paper.
    """
    pairs = _checked(pairs)
    return torch.ones_like(pairs.chosen), torch.ones_like(pairs.rejected)


def slic_hf_constraint(pairs: PairLogps, *, delta: float = 1.0, lambda_: float = 0.1) -> Constraint:
    """SLiC-HF's constraint (table 2, which leaves out the likelihood term).

    C_w = 1[gap < delta] + lambda,   C_l = 1[gap < delta],   gap = log pi(y_w) - log pi(y_l).

    At the kink, gap = delta, the subgradient is 0.

    Args:
      pairs: sequence log-likelihoods and lengths of the two sides, from either path.
      delta: margin of the hinge, in nats.
      lambda_: weight of the likelihood of y_w, not negative.

    Returns:
      (C_w, C_l), each (pairs,).

    Raises:
      ValueError: a hyper-parameter out of range.

    Example:
      >>> import torch
      >>> one = torch.ones(1)
      >>> pairs = PairLogps(-2 * one, -3 * one, -2.5 * one, -2.5 * one, 2 * one, 4 * one)
      >>> slic_hf_constraint(pairs)
      (tensor([0.1000]), tensor([0.]))

    References:
      Zhao et al. 2023.
    """
    pairs = _checked(pairs)
    delta, lambda_ = check_number("delta", delta), check_positive("lambda_", lambda_, zero=True)
    hinge = (delta - pairs.chosen + pairs.rejected > 0).to(pairs.chosen.dtype)
    return hinge + lambda_, hinge


def dpo_constraint(pairs: PairLogps, *, beta: float = 0.1) -> Constraint:
    """DPO's constraint (table 2).

    C_w = C_l = beta sigmoid(beta (r_l - r_w)).

    Args:
      pairs: sequence log-likelihoods and lengths of the two sides, from either path.
      beta: strength of the implicit reward, positive.

    Returns:
      (C_w, C_l), each (pairs,).

    Raises:
      ValueError: a hyper-parameter out of range, or no reference.

    Example:
      >>> import torch
      >>> one = torch.ones(1)
      >>> pairs = PairLogps(-2 * one, -3 * one, -2.5 * one, -2.5 * one, 2 * one, 4 * one)
      >>> dpo_constraint(pairs)
      (tensor([0.0475]), tensor([0.0475]))

    References:
      Rafailov et al. 2023.
    """
    pairs = _checked(pairs)
    beta = check_positive("beta", beta)
    r_w, r_l = pairs.log_ratios
    c = beta * torch.sigmoid(beta * (r_l - r_w))
    return c, c


def ipo_constraint(pairs: PairLogps, *, tau: float = 0.1) -> Constraint:
    """IPO's constraint (table 2).

    C_w = C_l = 2 (1 / (2 tau) + r_l - r_w).

    Args:
      pairs: sequence log-likelihoods and lengths of the two sides, from either path.
      tau: regularisation, positive.

    Returns:
      (C_w, C_l), each (pairs,).

    Raises:
      ValueError: a hyper-parameter out of range, or no reference.

    Example:
      >>> import torch
      >>> one = torch.ones(1)
      >>> pairs = PairLogps(-2 * one, -3 * one, -2.5 * one, -2.5 * one, 2 * one, 4 * one)
      >>> ipo_constraint(pairs)
      (tensor([8.]), tensor([8.]))

    References:
      Azar et al. 2023.
    """
    pairs = _checked(pairs)
    tau = check_positive("tau", tau)
    r_w, r_l = pairs.log_ratios
    c = 2 * (1 / (2 * tau) + r_l - r_w)
    return c, c


def simpo_constraint(pairs: PairLogps, *, beta: float = 2.0, gamma: float = 1.0) -> Constraint:
    """SimPO's constraint (table 2, with the factors that it leaves out).

    C_w = beta / |y_w| sigmoid(gamma + beta m_l - beta m_w),   C_l = beta / |y_l| sigmoid(same).

    m is the mean log-likelihood per token. No single C fits a length-normalised objective.

    Args:
      pairs: sequence log-likelihoods and lengths of the two sides, from either path.
      beta: strength of the implicit reward, positive.
      gamma: target reward margin.

    Returns:
      (C_w, C_l), each (pairs,).

    Raises:
      ValueError: a hyper-parameter out of range.

    Example:
      >>> import torch
      >>> one = torch.ones(1)
      >>> pairs = PairLogps(-2 * one, -3 * one, -2.5 * one, -2.5 * one, 2 * one, 4 * one)
      >>> simpo_constraint(pairs)
      (tensor([0.8176]), tensor([0.4088]))

    References:
      Meng et al. 2024.
    """
    pairs = _checked(pairs)
    beta, gamma = check_positive("beta", beta), check_number("gamma", gamma)
    mean_w, mean_l = pairs.means
    c = beta * torch.sigmoid(gamma + beta * (mean_l - mean_w))
    return c / pairs.chosen_lengths, c / pairs.rejected_lengths


def r_dpo_constraint(pairs: PairLogps, *, beta: float = 0.1, alpha: float = 0.05) -> Constraint:
    """R-DPO's constraint.

    C_w = C_l = beta sigmoid(-(beta (r_w - r_l) + alpha (|y_w| - |y_l|))).

    Args:
      pairs: sequence log-likelihoods and lengths of the two sides, from either path.
      beta: strength of the implicit reward, positive.
      alpha: weight of the length difference, per token.

    Returns:
      (C_w, C_l), each (pairs,).

    Raises:
      ValueError: a hyper-parameter out of range, or no reference.

    Example:
      >>> import torch
      >>> one = torch.ones(1)
      >>> pairs = PairLogps(-2 * one, -3 * one, -2.5 * one, -2.5 * one, 2 * one, 4 * one)
      >>> r_dpo_constraint(pairs)
      (tensor([0.0500]), tensor([0.0500]))

    References:
      Park et al. 2024, eq. 9.
    """
    pairs = _checked(pairs)
    beta, alpha = check_positive("beta", beta), check_number("alpha", alpha)
    r_w, r_l = pairs.log_ratios
    c = beta * torch.sigmoid(-(beta * (r_w - r_l) + alpha * (pairs.chosen_lengths - pairs.rejected_lengths)))
    return c, c


def orpo_constraint(pairs: PairLogps, *, lambda_: float = 0.1) -> Constraint:
    """ORPO's constraint.

    C_w = (1 + lambda sigmoid(-h) / (1 - P_w)) / |y_w|,   C_l = lambda sigmoid(-h) / (1 - P_l) / |y_l|,
    h = log odds(P_w) - log odds(P_l),   P = e^m, the geometric mean likelihood per token.

    Finite where a P rounds to 1: it counts as the last number before 1 that m can tell from it.

    Args:
      pairs: sequence log-likelihoods and lengths of the two sides, from either path.
      lambda_: weight of the odds ratio, not negative.

    Returns:
      (C_w, C_l), each (pairs,).

    Raises:
      ValueError: a hyper-parameter out of range.

    Example:
      >>> import torch
      >>> one = torch.ones(1)
      >>> pairs = PairLogps(-2 * one, -3 * one, -2.5 * one, -2.5 * one, 2 * one, 4 * one)
      >>> orpo_constraint(pairs)
      (tensor([0.5479]), tensor([0.0287]))

    References:
      Hong et al. 2024.
    """
    pairs = _checked(pairs)
    lambda_ = check_positive("lambda_", lambda_, zero=True)
    # a likelihood that rounds to 1 counts as the last number before it: C would be infinite, grad log pi is 0
    mean_w, mean_l = (mean.clamp(max=-torch.finfo(mean.dtype).tiny) for mean in pairs.means)
    # sigmoid(-h) / (1 - P) in logs; with D = P_w (1 - P_l) + P_l (1 - P_w):  P_l / D  and  P_l (1 - P_w) / ((1 - P_l) D)
    miss_w, miss_l = torch.log(-torch.expm1(mean_w)), torch.log(-torch.expm1(mean_l))
    log_d = torch.logaddexp(mean_w + miss_l, mean_l + miss_w)
    c_w = 1 + lambda_ * (mean_l - log_d).exp()
    c_l = lambda_ * (mean_l + miss_w - miss_l - log_d).exp()
    return c_w / pairs.chosen_lengths, c_l / pairs.rejected_lengths


def dpop_constraint(pairs: PairLogps, *, beta: float = 0.3, lambda_: float = 50.0) -> Constraint:
    """DPOP's constraint.

    C_l = beta sigmoid(-h),   C_w = C_l (1 + lambda 1[r_w < 0]),   h = beta (r_w - r_l - lambda max(0, -r_w)).

    At the kink, r_w = 0, the subgradient of the penalty is 0.

    Args:
      pairs: sequence log-likelihoods and lengths of the two sides, from either path.
      beta: strength of the implicit reward, positive.
      lambda_: weight of the penalty, not negative.

    Returns:
      (C_w, C_l), each (pairs,).

    Raises:
      ValueError: a hyper-parameter out of range, or no reference.

    Example:
      >>> import torch
      >>> one = torch.ones(1)
      >>> pairs = PairLogps(-2 * one, -3 * one, -2.5 * one, -2.5 * one, 2 * one, 4 * one)
      >>> dpop_constraint(pairs)
      (tensor([0.1277]), tensor([0.1277]))

    References:
      Pal et al. 2024.
    """
    pairs = _checked(pairs)
    beta, lambda_ = check_positive("beta", beta), check_positive("lambda_", lambda_, zero=True)
    r_w, r_l = pairs.log_ratios
    c = beta * torch.sigmoid(-beta * (r_w - r_l - lambda_ * torch.relu(-r_w)))
    return c * (1 + lambda_ * (r_w < 0).to(c.dtype)), c


def kto_constraint(
    log_ratio: Float[Tensor, " responses"],
    preferred: Bool[Tensor, " responses"],
    *,
    beta: float = 0.1,
    lambda_d: float = 1.0,
    lambda_u: float = 1.0,
    z0: float | Float[Tensor, ""] = 0.0,
) -> Float[Tensor, " responses"]:
    """KTO's constraint, one per response: C_w where it is preferred, C_l where it is not.

    C = lambda beta sigmoid(x) sigmoid(-x),   x = beta (r - z0),   lambda = lambda_d or lambda_u by the label.

    Args:
      log_ratio: r = log pi(y) - log pi_ref(y) of each response, in nats.
      preferred: the label of each response.
      beta: strength of the implicit reward, positive.
      lambda_d, lambda_u: weights of preferred and of dispreferred responses, not negative.
      z0: the reference point, in nats; negative values count as 0.

    Returns:
      C, (responses,).

    Raises:
      ValueError: wrong shape or dtype, a hyper-parameter out of range.

    Example:
      >>> import torch
      >>> kto_constraint(torch.zeros(2), torch.tensor([True, False]))
      tensor([0.0250, 0.0250])

    References:
      Ethayarajh et al. 2024, eq. 8.
    """
    check_floating("log_ratio", log_ratio)
    check_bool("preferred", preferred, tuple(log_ratio.shape))
    beta, z0 = check_positive("beta", beta), check_reference_point(z0)
    lambda_d, lambda_u = check_positive("lambda_d", lambda_d, zero=True), check_positive("lambda_u", lambda_u, zero=True)
    x = beta * (wide(log_ratio) - max(z0, 0.0))
    weight = torch.where(preferred, x.new_tensor(lambda_d), x.new_tensor(lambda_u))
    return beta * weight * torch.sigmoid(x) * torch.sigmoid(-x)


def _checked(pairs: PairLogps) -> PairLogps:
    """In float32 at least, after the checks."""
    if not isinstance(pairs, PairLogps):
        raise ValueError(f"pairs: expected a PairLogps (see bnf_core.pair_logps), got {type(pairs).__name__}.")
    for name, value in pairs._asdict().items():
        if value is not None:
            check_floating(f"pairs.{name}", value, tuple(pairs.chosen.shape))
    return PairLogps._make(None if value is None else wide(value) for value in pairs)


# by the name of the objective, for pairs
CONSTRAINTS = {
    "nll_pll": nll_pll_constraint,
    "slic_hf": slic_hf_constraint,
    "dpo": dpo_constraint,
    "ipo": ipo_constraint,
    "simpo": simpo_constraint,
    "r_dpo": r_dpo_constraint,
    "orpo": orpo_constraint,
    "dpop": dpop_constraint,
}
