"""The family: losses that push a response down move along -w grad log pi(y_t), and w is all that they differ in.

    grad L = -s w grad log pi(y_t),   s = +1 in a preferred response, -1 in a dispreferred one.

A weight w is a constant for the gradient. That of a token is a function (log_odds, ref_log_odds), of two vectors over tokens;
where the two labels differ, (log_odds, ref_log_odds, sign), by default that of a dispreferred token. That of a whole response
is a function (log_odds, batch) -> (responses,). `weighted` makes an objective of either; the losses as published, whose
gradients they are, stand in `bnf_core.objectives.family`.

rho = pi / pi_ref of the token, P the product of rho over the response, l the log-odds. All are float64 if an operand is, else
float32, and finite for every l, +inf included: rho, and the odds e^l, count as at most e^80 (e^600 in float64). All raise
ValueError for a wrong shape, dtype or device, or a hyper-parameter out of range.

Example:
  >>> import torch
  >>> log_odds, ref_log_odds = torch.tensor([0.0, -2.0]), torch.zeros(2)
  >>> for w in (one, bnf, odds, prob, tnpo, ppo_clip):
  ...     print([round(x, 4) for x in w(log_odds, ref_log_odds).tolist()])
  [1.0, 1.0]
  [1.0, 0.1353]
  [1.0, 0.1353]
  [0.5, 0.1192]
  [1.0, 0.385]
  [1.0, 0.0]
"""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from bnf_core._checks import at_least_float32, check_floating, check_number, check_positive, check_same_device
from bnf_core.batch import TokenBatch, sequence_log_ratios, sequence_logps
from bnf_core.objectives.bnf import Side, bnf_weight, check_side, of_side
from bnf_core.objectives.likelihood import log_likelihood_constraint
from bnf_core.objectives.registry import Objective, objective

__all__ = [
    "bnf",
    "cispo",
    "dppo_tv",
    "npo",
    "odds",
    "one",
    "ppo_clip",
    "prob",
    "sapo",
    "satimp",
    "sim_npo",
    "tnpo",
    "topr",
    "weighted",
]

Weight = Callable[..., Tensor]
Tokens = Float[Tensor, "..."]
Sign = Float[Tensor, "..."] | float

DISPREFERRED = -1.0


# --- of a token ------------------------------------------------------------------------------------------------------

one = log_likelihood_constraint
bnf = bnf_weight


def odds(log_odds: Tokens, ref_log_odds: Tokens | None = None) -> Tokens:
    """Unlikelihood's: w = pi / (1 - pi) = e^l. BNF's while pi_ref = 1/2; needs no reference.

    Welleck et al. 2020, Neural text generation with unlikelihood training.
    """
    (log_odds,) = _constants(log_odds)
    return log_odds.clamp(max=_most(log_odds)).exp()


def prob(log_odds: Tokens, ref_log_odds: Tokens | None = None, *, beta: float = 1.0) -> Tokens:
    """WGA's: w = pi^beta, in [0, 1]. Needs no reference.

    Wang et al. 2025, Rethinking LLM unlearning objectives (arXiv:2502.19301).
    """
    beta = check_positive("beta", beta)
    (log_odds,) = _constants(log_odds)
    return (beta * F.logsigmoid(log_odds)).exp()


def satimp(log_odds: Tokens, ref_log_odds: Tokens | None = None, *, beta1: float = 5.0, beta2: float = 1.0) -> Tokens:
    """SatImp's: w = pi^beta1 (1 - pi)^beta2, in [0, 1]. Needs no reference.

    Yang et al. 2025, Exploring criteria of loss reweighting to enhance LLM unlearning (arXiv:2505.11953).
    """
    beta1, beta2 = check_positive("beta1", beta1, zero=True), check_positive("beta2", beta2, zero=True)
    (log_odds,) = _constants(log_odds)
    miss = F.logsigmoid(-log_odds) * beta2 if beta2 else torch.zeros_like(log_odds)  # where l is inf, 0 times it is NaN
    return (beta1 * F.logsigmoid(log_odds) + miss).exp()


def tnpo(log_odds: Tokens, ref_log_odds: Tokens, *, beta: float = 1.0) -> Tokens:
    """Token-wise NPO's: w = 2 rho^beta / (1 + rho^beta) = 2 sigmoid(beta log rho), in [0, 2], 1 at the reference.

    Wang et al. 2025, Rethinking LLM unlearning objectives (arXiv:2502.19301).
    """
    beta = check_positive("beta", beta)
    return 2 * torch.sigmoid(beta * log_rho(log_odds, ref_log_odds))


def ppo_clip(log_odds: Tokens, ref_log_odds: Tokens, sign: Sign = DISPREFERRED, *, epsilon: float = 0.2) -> Tokens:
    """PPO's and GRPO's: w = rho 1[s (rho - 1) <= epsilon]: 0 once the ratio has moved far enough the way it should.

    The reference is the policy that the responses were sampled from. Schulman et al. 2017, Proximal policy optimization.
    """
    epsilon = check_positive("epsilon", epsilon)
    rho = ratio(log_odds, ref_log_odds)
    return torch.where(_moved(sign, rho, 1 + epsilon, 1 - epsilon), 0, rho)


def cispo(log_odds: Tokens, ref_log_odds: Tokens, *, epsilon_low: float = 0.2, epsilon_high: float = 0.2) -> Tokens:
    """CISPO's: w = clip(rho, 1 - epsilon_low, 1 + epsilon_high). epsilon_low from 1: no lower bound.

    MiniMax 2025, MiniMax-M1 (arXiv:2506.13585).
    """
    low, high = check_positive("epsilon_low", epsilon_low, zero=True), check_positive("epsilon_high", epsilon_high, zero=True)
    return ratio(log_odds, ref_log_odds).clamp(1 - low, 1 + high)


def sapo(log_odds: Tokens, ref_log_odds: Tokens, *, tau: float = 1.0) -> Tokens:
    """SAPO's: w = 4 sigmoid(x) (1 - sigmoid(x)) rho,   x = tau (rho - 1): a soft gate, 1 at the reference.

    Gao et al. 2025, Soft adaptive policy optimization (arXiv:2511.20347).
    """
    tau = check_positive("tau", tau)
    rho = ratio(log_odds, ref_log_odds)
    x = tau * (rho - 1)
    return 4 * torch.sigmoid(x) * torch.sigmoid(-x) * rho


def dppo_tv(
    log_odds: Tokens, ref_log_odds: Tokens, sign: Sign = DISPREFERRED, *, delta: float = 0.2, most: float = 10.0
) -> Tokens:
    """DPPO's, by total variation: w = min(rho, most) 1[s (pi - pi_ref) <= delta].

    The reference is the policy that the responses were sampled from. arXiv:2602.04879.
    """
    delta, most = check_positive("delta", delta), check_positive("most", most)
    log_odds, ref_log_odds = _constants(log_odds, ref_log_odds)
    moved = _moved(sign, torch.sigmoid(log_odds) - torch.sigmoid(ref_log_odds), delta, -delta)
    return torch.where(moved, 0, ratio(log_odds, ref_log_odds).clamp(max=most))


# --- of a response ---------------------------------------------------------------------------------------------------


def npo(log_odds: Float[Tensor, " tokens"], batch: TokenBatch, *, beta: float = 0.1) -> Float[Tensor, " responses"]:
    """NPO's: w = 2 P^beta / (1 + P^beta) = 2 sigmoid(beta log P), in [0, 2], 1 at the reference.

    Zhang et al. 2024, Negative preference optimization: from catastrophic collapse to effective unlearning (arXiv:2404.05868).
    """
    return 2 * torch.sigmoid(check_positive("beta", beta) * sequence_log_ratios(log_odds, batch).detach())


def sim_npo(
    log_odds: Float[Tensor, " tokens"], batch: TokenBatch, *, beta: float = 4.5, gamma: float = 0.0
) -> Float[Tensor, " responses"]:
    """SimNPO's: w = (2 / |y|) sigmoid(beta m + gamma),   m = log pi(y) / |y|. Needs no reference.

    Fan et al. 2024, Simplicity prevails: rethinking negative preference optimization for LLM unlearning (arXiv:2410.07163).
    """
    beta, gamma = check_positive("beta", beta), check_number("gamma", gamma)
    logp = sequence_logps(log_odds.detach(), batch)
    return 2 * torch.sigmoid(beta * logp / batch.lengths + gamma) / batch.lengths


def topr(log_odds: Float[Tensor, " tokens"], batch: TokenBatch) -> Float[Tensor, " responses"]:
    """TOPR's: w = min(1, P).

    Le Roux et al. 2025, Tapered off-policy REINFORCE (arXiv:2503.14286).
    """
    return sequence_log_ratios(log_odds, batch).detach().clamp(max=0).exp()


# --- objectives from them --------------------------------------------------------------------------------------------


def weighted(w: Weight, side: Side = "both", **hyper: Any) -> Objective:
    """An objective with the gradient -s w grad log pi(y_t), from any weight.

    s / |y| * sum_t w_t NLL_t of a weight of tokens, one pass through the head;   s w NLL(y) of one of responses.

    Args:
      w: a weight of this module, or one's own: (log_odds, ref_log_odds[, sign]) -> (tokens,), or (log_odds, batch) ->
        (responses,). It is taken as a constant.
      side: "dispreferred" leaves preferred responses their log-likelihood, w = 1.
      hyper: hyper-parameters of w, bound.

    Returns:
      A function (log_odds, batch) -> loss per response, as all of `bnf_core.OBJECTIVES`.

    Raises:
      ValueError: another side, or a hyper-parameter that w does not have.

    Example:
      >>> import torch
      >>> batch = TokenBatch(torch.tensor([0, 0, 1]), torch.tensor([True, False]), ref_log_odds=torch.zeros(3))
      >>> log_odds = torch.full((3,), -1.0)
      >>> weighted(bnf)(log_odds, batch), weighted(bnf, side="dispreferred")(log_odds, batch)
      (tensor([ 0.4831, -0.4831]), tensor([ 1.3133, -0.4831]))
    """
    check_side(side)
    takes = inspect.signature(w).parameters
    if unknown := [name for name in hyper if name not in takes]:
        raise ValueError(f"{unknown[0]}: expected a hyper-parameter of {_name(w)}, which has {_hyper(w) or 'none'}.")
    w, name = partial(w, **hyper), _name(w)
    if "batch" in takes:

        def constraint(log_odds: Tensor, batch: TokenBatch) -> Tensor:
            return of_side(w(log_odds, batch), batch.preferred, side)

        def losses(log_odds: Tensor, batch: TokenBatch) -> Tensor:
            return -batch.sign * constraint(log_odds, batch).detach() * sequence_logps(log_odds, batch)

        losses.__name__ = losses.__qualname__ = f"weighted_{name}"
        return objective(per="response", constraint=constraint)(losses)

    def of_token(log_odds: Tensor, ref_log_odds: Tensor, sign: Tensor) -> Tensor:
        with_sign = (log_odds, ref_log_odds, sign) if "sign" in takes else (log_odds, ref_log_odds)
        return of_side(w(*with_sign), sign > 0, side)

    def token_loss(log_odds: Tensor, sign: Tensor, ref_log_odds: Tensor) -> Tensor:
        return -sign * of_token(log_odds, ref_log_odds, sign).detach() * F.logsigmoid(log_odds)

    def without_reference(log_odds: Tensor, sign: Tensor) -> Tensor:
        return token_loss(log_odds, sign, log_odds)

    reference = takes["ref_log_odds"].default is inspect.Parameter.empty if "ref_log_odds" in takes else True
    loss = token_loss if reference else without_reference
    loss.__name__ = loss.__qualname__ = f"weighted_{name}"
    return objective(per="token", reference=reference, constraint=of_token)(loss)


def _moved(sign: Sign, x: Tensor, up: float, down: float) -> Tensor:
    """Where x is past `up` in a preferred token, past `down` in a dispreferred one."""
    return torch.where(torch.as_tensor(sign, device=x.device) > 0, x > up, x < down)


def ratio(log_odds: Tensor, ref_log_odds: Tensor) -> Tensor:
    """rho = pi / pi_ref, a constant; at most e^80 (e^600 in float64)."""
    x = log_rho(log_odds, ref_log_odds)
    return x.clamp(max=_most(x)).exp()


def log_rho(log_odds: Tensor, ref_log_odds: Tensor) -> Tensor:
    """log pi - log pi_ref, a constant."""
    log_odds, ref_log_odds = _constants(log_odds, ref_log_odds)
    return F.logsigmoid(log_odds) - F.logsigmoid(ref_log_odds)


def _most(values: Tensor) -> float:
    return 600.0 if values.dtype == torch.float64 else 80.0


def _constants(*log_odds: Tensor) -> list[Tensor]:
    for name, values in zip(("log_odds", "ref_log_odds"), log_odds, strict=False):
        check_floating(name, values, tuple(log_odds[0].shape))
    check_same_device(**dict(zip(("log_odds", "ref_log_odds"), log_odds, strict=False)))
    dtype = at_least_float32(log_odds[0]).dtype
    for values in log_odds:
        dtype = torch.promote_types(dtype, values.dtype)
    return [values.detach().to(dtype) for values in log_odds]


def _name(w: Weight) -> str:
    return w.func.__name__ if isinstance(w, partial) else getattr(w, "__name__", type(w).__name__)


def _hyper(w: Weight) -> str:
    return ", ".join(k for k, p in inspect.signature(w).parameters.items() if p.kind is p.KEYWORD_ONLY)
