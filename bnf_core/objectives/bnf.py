"""Bidirectional negative feedback: the paper's objective, from one log-odds per token."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from bnf_core._checks import check_floating, check_same_device, wide
from bnf_core.batch import TokenBatch

__all__ = ["bnf", "bnf_binary", "bnf_target", "bnf_weight"]


def bnf_weight(log_odds: Float[Tensor, "..."], ref_log_odds: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """BNF weight of each token: the clipped odds ratio, a constant for the gradient.

    w = min(1, odds(pi_y) / odds(pi_ref_y)) = exp(min(0, l - l_ref)).

    It is all that the dynamic target (eq. 6) adds to the log-likelihood: f = w onehot(y) + (1 - w) pi, so that
    BNF's gradient is cross-entropy's times w.

    Args:
      log_odds: l of the target token under the policy, in nats; +inf where nothing else is possible.
      ref_log_odds: l under the reference, same shape.

    Returns:
      w in [0, 1], detached, float64 if an operand is, else float32; 1 where both are the same, infinities included.
      NaN stays NaN.

    Raises:
      ValueError: wrong shape, dtype or device.

    Example:
      >>> import torch
      >>> bnf_weight(torch.tensor([0.0, 1.0, -1.0]), torch.zeros(3))
      tensor([1.0000, 1.0000, 0.3679])
    """
    log_odds, ref_log_odds = _constants(log_odds, ref_log_odds)
    return torch.where(log_odds >= ref_log_odds, 1.0, (log_odds - ref_log_odds).exp())


def bnf_target(log_odds: Float[Tensor, "..."], ref_log_odds: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """The dynamic target's value at the target token, a constant for the gradient (eq. 6).

    f_y = min(pi_y / pi_ref_y, 1) = exp(min(0, log sigmoid(l) - log sigmoid(l_ref))) = w + (1 - w) pi_y.

    With w (`bnf_weight`) it is the whole distribution, without a vector over the vocabulary:
    f_j = (1 - w) pi_j for every other token.

    Args:
      log_odds: l of the target token under the policy, in nats.
      ref_log_odds: l under the reference, same shape.

    Returns:
      f_y in [0, 1], detached, float64 if an operand is, else float32. NaN stays NaN.

    Raises:
      ValueError: wrong shape, dtype or device.

    Example:
      >>> import torch
      >>> bnf_target(torch.tensor([0.0, -2.0]), torch.tensor([-1.0, 0.0]))  # 0.1192 / 0.5
      tensor([1.0000, 0.2384])
    """
    log_odds, ref_log_odds = _constants(log_odds, ref_log_odds)
    return _log_target(log_odds, ref_log_odds).exp()


def bnf(log_odds: Float[Tensor, " tokens"], batch: TokenBatch) -> Float[Tensor, " responses"]:
    """BNF loss of each response (eq. 4 before its mean), in nats.

    s / |y| * sum_t [ w_t NLL_t + (1 - w_t) H_t ],   NLL = -log pi_y = -log sigmoid(l),

    which is -s / |y| sum_t sum_j f_tj log pi_tj for the dynamic target f (eq. 6). H, the policy's entropy, is a
    constant with no gradient: without `batch.entropy` its term is left out of the value.

    Args:
      log_odds: l of each response token under the policy. Differentiable.
      batch: needs `ref_log_odds`.

    Returns:
      The loss of each response; the objective is their mean over the responses of the whole optimizer step.

    Raises:
      ValueError: wrong shape, dtype or device, or a batch without `ref_log_odds`.

    Example:
      >>> import torch
      >>> log_odds = torch.zeros(3, requires_grad=True)
      >>> batch = TokenBatch(torch.tensor([0, 0, 1]), torch.tensor([True, False]), ref_log_odds=torch.zeros(3))
      >>> loss = bnf(log_odds, batch)
      >>> loss
      tensor([ 0.6931, -0.6931], grad_fn=<DivBackward0>)
      >>> loss.sum().backward()
      >>> log_odds.grad
      tensor([-0.2500, -0.2500,  0.5000])
    """
    log_odds, ref_log_odds = _with_reference(log_odds, batch)
    w = bnf_weight(log_odds, ref_log_odds)
    loss = -w * F.logsigmoid(log_odds)
    if batch.entropy is not None:
        loss = loss + (1 - w) * batch.entropy.detach().to(log_odds.dtype)
    return batch.mean(batch.sign[batch.response].to(log_odds.dtype) * loss)


def bnf_binary(log_odds: Float[Tensor, " tokens"], batch: TokenBatch) -> Float[Tensor, " responses"]:
    """BNF as binary cross-entropy on the log-odds: the gradient of `bnf`, with another constant in the value.

    s / |y| * sum_t [ -f_y log sigmoid(l) - (1 - f_y) log sigmoid(-l) ],   f_y = min(pi_y / pi_ref_y, 1),

    which is eq. 4 without (1 - f_y) H(q), the entropy of the policy over the other tokens, whose gradient is zero.

    Args:
      log_odds: l of each response token under the policy. Differentiable.
      batch: needs `ref_log_odds`.

    Returns:
      The loss of each response, in nats; the objective is their mean.

    Raises:
      ValueError: wrong shape, dtype or device, or a batch without `ref_log_odds`.

    Example:
      >>> import torch
      >>> log_odds = torch.zeros(3, requires_grad=True)
      >>> batch = TokenBatch(torch.tensor([0, 0, 1]), torch.tensor([True, False]), ref_log_odds=torch.zeros(3))
      >>> bnf_binary(log_odds, batch).sum().backward()
      >>> log_odds.grad
      tensor([-0.2500, -0.2500,  0.5000])
    """
    log_odds, ref_log_odds = _with_reference(log_odds, batch)
    log_f_y = _log_target(log_odds.detach(), ref_log_odds)
    miss = -torch.expm1(log_f_y)  # 1 - f_y, with every digit
    # where the target is certain, l = inf, the second term is 0 times infinity
    loss = -log_f_y.exp() * F.logsigmoid(log_odds) - torch.where(miss > 0, miss * F.logsigmoid(-log_odds), 0)
    return batch.mean(batch.sign[batch.response].to(log_odds.dtype) * loss)


def _log_target(log_odds: Tensor, ref_log_odds: Tensor) -> Tensor:
    return (F.logsigmoid(log_odds) - F.logsigmoid(ref_log_odds)).clamp(max=0)


def _constants(log_odds: Tensor, ref_log_odds: Tensor) -> tuple[Tensor, Tensor]:
    check_floating("log_odds", log_odds)
    check_floating("ref_log_odds", ref_log_odds, tuple(log_odds.shape))
    check_same_device(log_odds=log_odds, ref_log_odds=ref_log_odds)
    return wide(log_odds.detach()), wide(ref_log_odds.detach())


def _with_reference(log_odds: Tensor, batch: TokenBatch) -> tuple[Tensor, Tensor]:
    """Both in the dtype that the loss is computed in, the reference's a constant."""
    check_floating("log_odds", log_odds, tuple(batch.response.shape))
    if batch.ref_log_odds is None:
        raise ValueError("batch.ref_log_odds: expected the log-odds of the reference for BNF, got None.")
    check_same_device(log_odds=log_odds, ref_log_odds=batch.ref_log_odds)
    log_odds = wide(log_odds)
    return log_odds, batch.ref_log_odds.detach().to(log_odds.dtype)
