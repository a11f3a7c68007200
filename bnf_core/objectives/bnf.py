"""Bidirectional negative feedback: the paper's objective, from one log-odds per token.

l, l_ref: log-odds of the target token under policy and reference, in nats. s: +1 in a preferred response, -1 in a
dispreferred one. `bnf` and `bnf_binary` are losses of a token, and as objectives (log_odds, batch) -> (responses,) their
mean over each response (`registry.objective`); the batch needs `ref_log_odds`. Their constraint, per token, is `bnf_weight`,
or, one-sided, 1 in preferred responses (`bnf_constraint`).
l may be +inf, where nothing but the target is possible; NaN stays NaN. All raise ValueError for a wrong shape, dtype or
device, or a batch without `ref_log_odds`.

Example:
  Two tokens preferred, one dispreferred, policy = reference:

  >>> import torch
  >>> from bnf_core import TokenBatch
  >>> log_odds = torch.zeros(3, requires_grad=True)
  >>> batch = TokenBatch(torch.tensor([0, 0, 1]), torch.tensor([True, False]), ref_log_odds=torch.zeros(3))
  >>> loss = bnf(log_odds, batch)
  >>> loss
  tensor([ 0.6931, -0.6931], grad_fn=<DivBackward0>)
  >>> loss.sum().backward()
  >>> log_odds.grad
  tensor([-0.2500, -0.2500,  0.5000])
"""

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from bnf_core._checks import at_least_float32, check_floating, check_same_device
from bnf_core.objectives.registry import objective

__all__ = ["Side", "bnf", "bnf_binary", "bnf_constraint", "bnf_one_sided", "bnf_target", "bnf_weight", "check_side", "of_side"]

Side = Literal["both", "dispreferred"]


def bnf_weight(log_odds: Float[Tensor, "..."], ref_log_odds: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """BNF weight of each token: the clipped odds ratio, a constant for the gradient.

    w = min(1, odds(pi_y) / odds(pi_ref_y)) = exp(min(0, l - l_ref)), in [0, 1].

    It is all that the dynamic target (eq. 6) adds to the log-likelihood: f = w onehot(y) + (1 - w) pi, so that
    BNF's gradient is cross-entropy's times w. Float64 if an operand is, else float32; 1 where both are the same, infinities
    included.

    Example:
      >>> import torch
      >>> bnf_weight(torch.tensor([0.0, 1.0, -1.0]), torch.zeros(3))
      tensor([1.0000, 1.0000, 0.3679])
    """
    log_odds, ref_log_odds = _constants(log_odds, ref_log_odds)
    return torch.where(log_odds >= ref_log_odds, 1.0, (log_odds - ref_log_odds).exp())


def bnf_target(log_odds: Float[Tensor, "..."], ref_log_odds: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """The dynamic target's value at the target token (eq. 6), a constant for the gradient.

    f_y = min(pi_y / pi_ref_y, 1) = exp(min(0, log sigmoid(l) - log sigmoid(l_ref))) = w + (1 - w) pi_y, in [0, 1].

    With w (`bnf_weight`) it is the whole distribution, without a vector over the vocabulary:
    f_j = (1 - w) pi_j for every other token. Float64 if an operand is, else float32.

    Example:
      >>> import torch
      >>> bnf_target(torch.tensor([0.0, -2.0]), torch.tensor([-1.0, 0.0]))  # 0.1192 / 0.5
      tensor([1.0000, 0.2384])
    """
    return _log_target(*_constants(log_odds, ref_log_odds)).exp()


def bnf_constraint(
    log_odds: Float[Tensor, "..."], ref_log_odds: Float[Tensor, "..."], sign: Float[Tensor, "..."], *, side: str = "both"
) -> Float[Tensor, "..."]:
    """w (`bnf_weight`); with side "dispreferred" 1 where s is +1.

    Example:
      >>> import torch
      >>> sign = torch.tensor([1.0, -1.0])
      >>> bnf_constraint(torch.full((2,), -1.0), torch.zeros(2), sign, side="dispreferred")
      tensor([1.0000, 0.3679])
    """
    return of_side(bnf_weight(log_odds, ref_log_odds), sign > 0, side)


def of_side(w: Tensor, preferred: Tensor, side: str) -> Tensor:
    """w; with side "dispreferred" 1 for what is preferred: its log-likelihood, which no w holds back."""
    return torch.where(preferred, 1, w) if check_side(side) == "dispreferred" else w


def check_side(side: object) -> str:
    """Returns it.

    Raises:
      ValueError: neither "both" nor "dispreferred".
    """
    if side not in get_args(Side):
        raise ValueError(f"side: expected one of {', '.join(get_args(Side))}, got {side!r}.")
    return str(side)


def _entropy_term(log_odds: Tensor, sign: Tensor, ref_log_odds: Tensor, entropy: Tensor, *, side: str = "both") -> Tensor:
    return sign * (1 - bnf_constraint(log_odds, ref_log_odds, sign, side=side)) * entropy


@objective(per="token", constraint=bnf_constraint, constant=_entropy_term, listed=True)
def bnf(
    log_odds: Float[Tensor, " tokens"],
    sign: Float[Tensor, " tokens"],
    ref_log_odds: Float[Tensor, " tokens"],
    *,
    side: str = "both",
) -> Float[Tensor, " tokens"]:
    """BNF loss of each response (eq. 4 before its mean over responses), in nats.

    s / |y| * sum_t [ w_t NLL_t + (1 - w_t) H_t ],   NLL = -log pi_y = -log sigmoid(l),

    which is -s / |y| sum_t sum_j f_tj log pi_tj for the dynamic target f (eq. 6). H, the policy's entropy, is a
    constant with no gradient: without `batch.entropy` its term is left out of the value. side "dispreferred" is
    `bnf_one_sided`.

    Example:
      >>> import torch
      >>> from bnf_core import TokenBatch
      >>> batch = TokenBatch(torch.tensor([0, 0, 1]), torch.tensor([True, False]), ref_log_odds=torch.zeros(3))
      >>> bnf(torch.tensor([1.0, 0.0, -1.0]), batch)
      tensor([ 0.5032, -0.4831])
    """
    return -sign * bnf_constraint(log_odds, ref_log_odds, sign, side=side) * F.logsigmoid(log_odds)


def _one_sided_constraint(log_odds: Tensor, ref_log_odds: Tensor, sign: Tensor) -> Tensor:
    return bnf_constraint(log_odds, ref_log_odds, sign, side="dispreferred")


def _one_sided_entropy_term(log_odds: Tensor, sign: Tensor, ref_log_odds: Tensor, entropy: Tensor) -> Tensor:
    return _entropy_term(log_odds, sign, ref_log_odds, entropy, side="dispreferred")


@objective(per="token", constraint=_one_sided_constraint, constant=_one_sided_entropy_term, listed=True)
def bnf_one_sided(
    log_odds: Float[Tensor, " tokens"], sign: Float[Tensor, " tokens"], ref_log_odds: Float[Tensor, " tokens"]
) -> Float[Tensor, " tokens"]:
    """One-sided BNF: `bnf` on dispreferred responses, the log-likelihood (w = 1) on preferred ones.

    A preferred token that has fallen below its reference is pulled back with full force, where BNF's pull fades.

    Example:
      >>> import torch
      >>> from bnf_core import TokenBatch
      >>> batch = TokenBatch(torch.tensor([0, 1]), torch.tensor([True, False]), ref_log_odds=torch.zeros(2))
      >>> bnf(torch.full((2,), -1.0), batch), bnf_one_sided(torch.full((2,), -1.0), batch)
      (tensor([ 0.4831, -0.4831]), tensor([ 1.3133, -0.4831]))
    """
    return -sign * _one_sided_constraint(log_odds, ref_log_odds, sign) * F.logsigmoid(log_odds)


@objective(per="token", constraint=bnf_weight, listed=True)
def bnf_binary(
    log_odds: Float[Tensor, " tokens"], sign: Float[Tensor, " tokens"], ref_log_odds: Float[Tensor, " tokens"]
) -> Float[Tensor, " tokens"]:
    """BNF as binary cross-entropy on the log-odds, in nats: the gradient of `bnf`, with another constant in the value.

    s / |y| * sum_t [ -f_y log sigmoid(l) - (1 - f_y) log sigmoid(-l) ],   f_y = min(pi_y / pi_ref_y, 1),

    which is eq. 4 without (1 - f_y) H(q), the entropy of the policy over the other tokens, whose gradient is zero.

    Example:
      >>> import torch
      >>> from bnf_core import TokenBatch
      >>> batch = TokenBatch(torch.tensor([0, 0, 1]), torch.tensor([True, False]), ref_log_odds=torch.zeros(3))
      >>> bnf_binary(torch.tensor([1.0, 0.0, -1.0]), batch)
      tensor([ 0.5032, -0.8511])
    """
    log_f_y = _log_target(log_odds.detach(), ref_log_odds)
    miss = -torch.expm1(log_f_y)  # 1 - f_y, with every digit
    # where the target is certain, l = inf, the second term is 0 times infinity
    return sign * (-log_f_y.exp() * F.logsigmoid(log_odds) - torch.where(miss > 0, miss * F.logsigmoid(-log_odds), 0))


def _log_target(log_odds: Tensor, ref_log_odds: Tensor) -> Tensor:
    return (F.logsigmoid(log_odds) - F.logsigmoid(ref_log_odds)).clamp(max=0)


def _constants(log_odds: Tensor, ref_log_odds: Tensor) -> tuple[Tensor, Tensor]:
    check_floating("log_odds", log_odds)
    check_floating("ref_log_odds", ref_log_odds, tuple(log_odds.shape))
    check_same_device(log_odds=log_odds, ref_log_odds=ref_log_odds)
    return at_least_float32(log_odds.detach()), at_least_float32(ref_log_odds.detach())
