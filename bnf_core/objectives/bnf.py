"""Bidirectional negative feedback: the paper's objective, from one log-odds per token.

l, l_ref: log-odds of the target token under policy and reference, in nats. s: +1 in a preferred response, -1 in a
dispreferred one. `bnf` and `bnf_binary` are losses of a token, and as objectives (log_odds, batch) -> (responses,) their
mean over each response (`registry.objective`); the batch needs `ref_log_odds`. Their constraint, per token, is `bnf_weight`.
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

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from bnf_core._checks import at_least_float32, check_floating, check_same_device
from bnf_core.objectives.registry import objective

__all__ = ["bnf", "bnf_binary", "bnf_target", "bnf_weight"]


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


def _entropy_term(log_odds: Tensor, sign: Tensor, ref_log_odds: Tensor, entropy: Tensor) -> Tensor:
    return sign * (1 - bnf_weight(log_odds, ref_log_odds)) * entropy


@objective(per="token", constraint=bnf_weight, constant=_entropy_term, listed=True)
def bnf(
    log_odds: Float[Tensor, " tokens"], sign: Float[Tensor, " tokens"], ref_log_odds: Float[Tensor, " tokens"]
) -> Float[Tensor, " tokens"]:
    """BNF loss of each response (eq. 4 before its mean over responses), in nats.

    s / |y| * sum_t [ w_t NLL_t + (1 - w_t) H_t ],   NLL = -log pi_y = -log sigmoid(l),

    which is -s / |y| sum_t sum_j f_tj log pi_tj for the dynamic target f (eq. 6). H, the policy's entropy, is a
    constant with no gradient: without `batch.entropy` its term is left out of the value.

    Example:
      >>> import torch
      >>> from bnf_core import TokenBatch
      >>> batch = TokenBatch(torch.tensor([0, 0, 1]), torch.tensor([True, False]), ref_log_odds=torch.zeros(3))
      >>> bnf(torch.tensor([1.0, 0.0, -1.0]), batch)
      tensor([ 0.5032, -0.4831])
    """
    return -sign * bnf_weight(log_odds, ref_log_odds) * F.logsigmoid(log_odds)


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
