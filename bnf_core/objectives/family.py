"""Published losses on negative samples, from unlearning and from RL with verifiable rewards, each beside its weight w.

    grad L = -s w grad log pi(y_t)       (`bnf_core.objectives.weights` has every w)

Values are as published; gradients are those of w. Losses of a token are means over the response, as BNF's; those of a response
are sums over it, as published, but SimNPO, which divides by the length. `side`: "dispreferred" leaves preferred responses
their log-likelihood, -log pi with w = 1, which is how unlearning retains; "both" weighs them, too. rho = pi / pi_ref of the
token, P its product over the response. For losses of RL the reference is the policy that the responses were sampled from. All
raise ValueError for a wrong shape, dtype or device, no `ref_log_odds` where w needs it, or a hyper-parameter out of range.
Sources: see the weights.

Example:
  >>> import torch
  >>> batch = TokenBatch(torch.tensor([0, 0, 1]), torch.tensor([True, False]), ref_log_odds=torch.zeros(3))
  >>> for loss in (unlikelihood, wga, tnpo, npo, topr, ppo_clip):
  ...     print(loss.__name__, [round(x, 4) for x in loss(torch.full((3,), -1.0), batch).tolist()])
  unlikelihood [1.3133, 0.3133]
  wga [1.3133, -0.3532]
  tnpo [1.3133, 0.8608]
  npo [2.6265, 13.2524]
  topr [2.6265, -0.7064]
  ppo_clip [-0.5379, 0.8]
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from bnf_core._checks import check_number, check_positive
from bnf_core.batch import TokenBatch, sequence_log_ratios, sequence_logps
from bnf_core.objectives import weights
from bnf_core.objectives.bnf import check_side, of_side
from bnf_core.objectives.registry import objective

__all__ = [
    "cispo",
    "dppo_tv",
    "npo",
    "ppo_clip",
    "sapo",
    "satimp",
    "sim_npo",
    "tnpo",
    "topr",
    "unlikelihood",
    "w_reinforce",
    "wga",
]

Tokens = Float[Tensor, " tokens"]
Responses = Float[Tensor, " responses"]


def _sided(loss: Tensor, log_odds: Tensor, sign: Tensor, side: str) -> Tensor:
    """The loss; with side "dispreferred" the log-likelihood's for what is preferred."""
    return torch.where(sign > 0, -F.logsigmoid(log_odds), loss) if check_side(side) == "dispreferred" else loss


# --- of a token ------------------------------------------------------------------------------------------------------


def unlikelihood_constraint(
    log_odds: Tokens, ref_log_odds: Tokens | None, sign: Tokens, *, side: str = "dispreferred"
) -> Tokens:
    """w = e^l (`weights.odds`)."""
    return of_side(weights.odds(log_odds), sign > 0, side)


@objective(per="token", reference=False, constraint=unlikelihood_constraint, listed=True)
def unlikelihood(log_odds: Tokens, sign: Tokens, *, side: str = "dispreferred") -> Tokens:
    """Unlikelihood: -log(1 - pi) of a dispreferred token, -log pi of a preferred one (side "both": log(1 - pi)).

    The gradient is also CE-U's, the cross-entropy to the policy without y, detached (arXiv:2503.01224). A token that is
    certain, l = inf, counts as one of very large but finite l, and its gradient is 0.
    """
    finite = log_odds.clamp(max=torch.finfo(log_odds.dtype).max ** 0.5)
    return _sided(sign * F.logsigmoid(-finite), log_odds, sign, side)


def wga_constraint(
    log_odds: Tokens, ref_log_odds: Tokens | None, sign: Tokens, *, beta: float = 1.0, side: str = "dispreferred"
) -> Tokens:
    """w = pi^beta (`weights.prob`)."""
    return of_side(weights.prob(log_odds, beta=beta), sign > 0, side)


@objective(per="token", reference=False, constraint=wga_constraint, listed=True)
def wga(log_odds: Tokens, sign: Tokens, *, beta: float = 1.0, side: str = "dispreferred") -> Tokens:
    """WGA, weighted gradient ascent: sg(pi^beta) log pi of a dispreferred token."""
    return -sign * wga_constraint(log_odds, None, sign, beta=beta, side=side) * F.logsigmoid(log_odds)


def satimp_constraint(
    log_odds: Tokens,
    ref_log_odds: Tokens | None,
    sign: Tokens,
    *,
    beta1: float = 5.0,
    beta2: float = 1.0,
    side: str = "dispreferred",
) -> Tokens:
    """w = pi^beta1 (1 - pi)^beta2 (`weights.satimp`)."""
    return of_side(weights.satimp(log_odds, beta1=beta1, beta2=beta2), sign > 0, side)


@objective(per="token", reference=False, constraint=satimp_constraint, listed=True)
def satimp(log_odds: Tokens, sign: Tokens, *, beta1: float = 5.0, beta2: float = 1.0, side: str = "dispreferred") -> Tokens:
    """SatImp, saturation times importance: sg(pi^beta1 (1 - pi)^beta2) log pi of a dispreferred token."""
    w = satimp_constraint(log_odds, None, sign, beta1=beta1, beta2=beta2, side=side)
    return -sign * w * F.logsigmoid(log_odds)


def tnpo_constraint(
    log_odds: Tokens, ref_log_odds: Tokens, sign: Tokens, *, beta: float = 1.0, side: str = "dispreferred"
) -> Tokens:
    """w = 2 rho^beta / (1 + rho^beta) (`weights.tnpo`)."""
    return of_side(weights.tnpo(log_odds, ref_log_odds, beta=beta), sign > 0, side)


@objective(per="token", constraint=tnpo_constraint, listed=True)
def tnpo(log_odds: Tokens, sign: Tokens, ref_log_odds: Tokens, *, beta: float = 1.0, side: str = "dispreferred") -> Tokens:
    """Token-wise NPO: (2 / beta) log(1 + rho^beta) of a dispreferred token (side "both": minus that of a preferred one)."""
    log_rho = F.logsigmoid(log_odds) - F.logsigmoid(ref_log_odds)
    return _sided(-sign * 2 / check_positive("beta", beta) * F.softplus(beta * log_rho), log_odds, sign, side)


def ppo_clip_constraint(
    log_odds: Tokens, ref_log_odds: Tokens, sign: Tokens, *, epsilon: float = 0.2, side: str = "both"
) -> Tokens:
    """w = rho 1[s (rho - 1) <= epsilon] (`weights.ppo_clip`)."""
    return of_side(weights.ppo_clip(log_odds, ref_log_odds, sign, epsilon=epsilon), sign > 0, side)


@objective(per="token", constraint=ppo_clip_constraint, listed=True)
def ppo_clip(log_odds: Tokens, sign: Tokens, ref_log_odds: Tokens, *, epsilon: float = 0.2, side: str = "both") -> Tokens:
    """PPO's and GRPO's clipped surrogate: -min(s rho, s clip(rho, 1 - epsilon, 1 + epsilon))."""
    epsilon, rho = check_positive("epsilon", epsilon), _ratio(log_odds, ref_log_odds)
    return _sided(-torch.minimum(sign * rho, sign * rho.clamp(1 - epsilon, 1 + epsilon)), log_odds, sign, side)


def cispo_constraint(
    log_odds: Tokens,
    ref_log_odds: Tokens,
    sign: Tokens,
    *,
    epsilon_low: float = 0.2,
    epsilon_high: float = 0.2,
    side: str = "both",
) -> Tokens:
    """w = clip(rho, 1 - epsilon_low, 1 + epsilon_high) (`weights.cispo`)."""
    w = weights.cispo(log_odds, ref_log_odds, epsilon_low=epsilon_low, epsilon_high=epsilon_high)
    return of_side(w, sign > 0, side)


@objective(per="token", constraint=cispo_constraint, listed=True)
def cispo(
    log_odds: Tokens,
    sign: Tokens,
    ref_log_odds: Tokens,
    *,
    epsilon_low: float = 0.2,
    epsilon_high: float = 0.2,
    side: str = "both",
) -> Tokens:
    """CISPO: -s sg(clip(rho, 1 - epsilon_low, 1 + epsilon_high)) log pi."""
    w = cispo_constraint(log_odds, ref_log_odds, sign, epsilon_low=epsilon_low, epsilon_high=epsilon_high, side=side)
    return -sign * w * F.logsigmoid(log_odds)


def sapo_constraint(
    log_odds: Tokens, ref_log_odds: Tokens, sign: Tokens, *, tau_pos: float = 1.0, tau_neg: float = 1.05, side: str = "both"
) -> Tokens:
    """w = 4 sigmoid(x) (1 - sigmoid(x)) rho,   x = tau (rho - 1),   tau by the label (`weights.sapo`)."""
    pos, neg = (weights.sapo(log_odds, ref_log_odds, tau=tau) for tau in (tau_pos, tau_neg))
    return of_side(torch.where(sign > 0, pos, neg), sign > 0, side)


@objective(per="token", constraint=sapo_constraint, listed=True)
def sapo(
    log_odds: Tokens, sign: Tokens, ref_log_odds: Tokens, *, tau_pos: float = 1.0, tau_neg: float = 1.05, side: str = "both"
) -> Tokens:
    """SAPO: -s (4 / tau) sigmoid(tau (rho - 1)),   tau by the label."""
    pos, neg = check_positive("tau_pos", tau_pos), check_positive("tau_neg", tau_neg)
    tau = torch.where(sign > 0, log_odds.new_tensor(pos), neg)
    # through its logarithm, because sigmoid's own backward, y (1 - y), cancels at y = 1
    gate = F.logsigmoid(tau * (_ratio(log_odds, ref_log_odds) - 1)).exp()
    return _sided(-sign * 4 / tau * gate, log_odds, sign, side)


def dppo_tv_constraint(
    log_odds: Tokens, ref_log_odds: Tokens, sign: Tokens, *, delta: float = 0.2, most: float = 10.0, side: str = "both"
) -> Tokens:
    """w = min(rho, most) 1[s (pi - pi_ref) <= delta] (`weights.dppo_tv`)."""
    return of_side(weights.dppo_tv(log_odds, ref_log_odds, sign, delta=delta, most=most), sign > 0, side)


@objective(per="token", constraint=dppo_tv_constraint, listed=True)
def dppo_tv(
    log_odds: Tokens, sign: Tokens, ref_log_odds: Tokens, *, delta: float = 0.2, most: float = 10.0, side: str = "both"
) -> Tokens:
    """DPPO by total variation: -s sg(min(rho, most)) log pi, 0 where pi has moved by more than delta as it should."""
    w = dppo_tv_constraint(log_odds, ref_log_odds, sign, delta=delta, most=most, side=side)
    return -sign * w * F.logsigmoid(log_odds)


def w_reinforce_constraint(log_odds: Tokens, ref_log_odds: Tokens | None, sign: Tokens, *, lambda_: float = 0.1) -> Tokens:
    """w = lambda in a preferred response, 1 in a dispreferred one."""
    return torch.where(sign > 0, log_odds.new_tensor(check_positive("lambda_", lambda_, zero=True)), 1)


@objective(per="token", reference=False, constraint=w_reinforce_constraint, listed=True)
def w_reinforce(log_odds: Tokens, sign: Tokens, *, lambda_: float = 0.1) -> Tokens:
    """Weighted REINFORCE: lambda NLL of a preferred token, -NLL of a dispreferred one; lambda = 0: negatives only (NSR).

    Zhu et al. 2025, The surprising effectiveness of negative reinforcement in LLM reasoning (arXiv:2506.01347).
    """
    return -sign * w_reinforce_constraint(log_odds, None, sign, lambda_=lambda_) * F.logsigmoid(log_odds)


# --- of a response ---------------------------------------------------------------------------------------------------


def npo_constraint(log_odds: Tokens, batch: TokenBatch, *, beta: float = 0.1) -> Responses:
    """w = 2 P^beta / (1 + P^beta) (`weights.npo`); 1 for a preferred one."""
    return torch.where(batch.preferred, 1, weights.npo(log_odds, batch, beta=beta))


@objective(per="response", constraint=npo_constraint, listed=True)
def npo(log_odds: Tokens, batch: TokenBatch, *, beta: float = 0.1) -> Responses:
    """NPO, negative preference optimization: -(2 / beta) log sigmoid(-beta log P); of a preferred response -log pi(y)."""
    beta = check_positive("beta", beta)
    loss = 2 / beta * F.softplus(beta * sequence_log_ratios(log_odds, batch))
    return torch.where(batch.preferred, -sequence_logps(log_odds, batch), loss)


def sim_npo_constraint(log_odds: Tokens, batch: TokenBatch, *, beta: float = 4.5, gamma: float = 0.0) -> Responses:
    """w = (2 / |y|) sigmoid(beta m + gamma) (`weights.sim_npo`); 1 / |y| for a preferred one."""
    w = weights.sim_npo(log_odds, batch, beta=beta, gamma=gamma)
    return torch.where(batch.preferred, 1 / batch.lengths.to(w.dtype), w)


@objective(per="response", reference=False, constraint=sim_npo_constraint, listed=True)
def sim_npo(log_odds: Tokens, batch: TokenBatch, *, beta: float = 4.5, gamma: float = 0.0) -> Responses:
    """SimNPO: -(2 / beta) log sigmoid(-beta m - gamma),   m = log pi(y) / |y|; of a preferred response -m."""
    beta, gamma = check_positive("beta", beta), check_number("gamma", gamma)
    mean = sequence_logps(log_odds, batch) / batch.lengths
    return torch.where(batch.preferred, -mean, 2 / beta * F.softplus(beta * mean + gamma))


def topr_constraint(log_odds: Tokens, batch: TokenBatch) -> Responses:
    """w = min(1, P) (`weights.topr`); 1 for a preferred one."""
    return torch.where(batch.preferred, 1, weights.topr(log_odds, batch))


@objective(per="response", constraint=topr_constraint, listed=True)
def topr(log_odds: Tokens, batch: TokenBatch) -> Responses:
    """TOPR, tapered off-policy REINFORCE: sg(min(1, P)) log pi(y); of a preferred response -log pi(y)."""
    return -batch.sign * topr_constraint(log_odds, batch) * sequence_logps(log_odds, batch)


def _ratio(log_odds: Tensor, ref_log_odds: Tensor) -> Tensor:
    """rho, with the gradient rho grad log pi where it counts as its greatest number, too."""
    log_rho = F.logsigmoid(log_odds) - F.logsigmoid(ref_log_odds)
    return weights.ratio(log_odds, ref_log_odds) * (1 + log_rho - log_rho.detach())
