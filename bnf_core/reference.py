"""The paper's definitions on full logits: to be read, and to be the oracle of the fast paths.

Everything here holds (positions, vocab) tensors. It imports nothing else that computes anything, so that
agreement with the rest of the library means something. Only the arithmetic differs from the printed
formulas, never the value: a probability and its complement come from the log-odds

    l = log pi_y - log(1 - pi_y) = z_y - logsumexp_{j != y} z_j,

    pi_y = sigmoid(l),   1 - pi_y = sigmoid(-l),   q_j = pi_j / (1 - pi_y) = softmax of the other logits,

so that neither loses its digits where the other rounds to 1.
"""

from functools import reduce

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Integer
from torch import Tensor

from bnf_core._checks import (
    IGNORE,
    NUMBER,
    check_bool,
    check_floating,
    check_labels,
    check_logits,
    check_probability,
    check_same_device,
    describe,
)

__all__ = [
    "bnf_feedback",
    "bnf_logit_gradient",
    "bnf_loss",
    "dynamic_target",
    "mixture_target",
    "nll_feedback",
    "one_hot_target",
    "pair_logps",
    "sequence_logps",
]


def one_hot_target(logits: Float[Tensor, "*batch vocab"], labels: Integer[Tensor, "*batch"]) -> Float[Tensor, "*batch vocab"]:
    """Log-likelihood target distribution (eq. 5).

    f_LL(y, j) = 1 where j = y, else 0.

    Args:
      logits: policy logits, any floating dtype; they give the shape and the dtype.
      labels: token ids aligned with the logits, -100 where there is no response token.

    Returns:
      f, in the dtype of the logits (float32 for half precision); rows of zeros where the label is -100.

    Raises:
      ValueError: wrong shape, dtype or device, a label outside the vocabulary.

    Example:
      >>> import torch
      >>> one_hot_target(torch.zeros(2, 3), torch.tensor([1, -100]))
      tensor([[0., 1., 0.],
              [0., 0., 0.]])
    """
    labels = _check(labels, logits=logits)
    target = torch.zeros_like(logits, dtype=_accumulate(logits))
    return target.scatter(-1, _index(labels), (labels != IGNORE).to(target.dtype).unsqueeze(-1))


def dynamic_target(
    logits: Float[Tensor, "*batch vocab"],
    ref_logits: Float[Tensor, "*batch vocab"],
    labels: Integer[Tensor, "*batch"],
) -> Float[Tensor, "*batch vocab"]:
    """Dynamic target distribution, DTD (eq. 6), a constant for the gradient.

    f_y = min(pi_y / pi_ref_y, 1);   f_j = (1 - f_y) / (1 - pi_y) * pi_j   for j != y.

    Args:
      logits: policy logits. -inf rules a token out and is legal except at the target.
      ref_logits: reference logits, same shape.
      labels: token ids aligned with the logits, -100 where there is no response token.

    Returns:
      f >= 0 with sum 1, float64 for float64 logits, else float32; rows of zeros where the label is -100.

    Raises:
      ValueError: wrong shape, dtype or device; a label outside the vocabulary; NaN, +inf, or -inf at a target.

    Example:
      Policy (0.2, 0.4, 0.4), reference 0.5 at the target: f_y = 0.4, the rest in the policy's proportions.

      >>> import torch
      >>> policy, reference = torch.tensor([[0.2, 0.4, 0.4]]), torch.tensor([[0.5, 0.3, 0.2]])
      >>> dynamic_target(policy.log(), reference.log(), torch.tensor([0]))
      tensor([[0.4000, 0.3000, 0.3000]])
    """
    labels = _check(labels, logits=logits, ref_logits=ref_logits)
    rows, z, z_ref, y = _response_rows(logits.detach(), ref_logits.detach(), labels)
    target = torch.zeros_like(logits, dtype=z.dtype, requires_grad=False)
    target[rows] = _dynamic_target(z, z_ref, y)
    return target


def mixture_target(
    logits: Float[Tensor, "*batch vocab"],
    ref_logits: Float[Tensor, "*batch vocab"],
    labels: Integer[Tensor, "*batch"],
) -> Float[Tensor, "*batch vocab"]:
    """Dynamic target distribution in mixture form (theorem T1), a constant for the gradient.

    f = w onehot(y) + (1 - w) pi,   w = min(1, odds(pi_y) / odds(pi_ref_y)) = exp(min(0, l - l_ref)).

    The same distribution as `dynamic_target`: soft bootstrapping with the clipped odds ratio as the label's weight.

    Args:
      logits, ref_logits, labels: as for `dynamic_target`.

    Returns:
      f, float64 for float64 logits, else float32; rows of zeros where the label is -100.

    Raises:
      ValueError: as `dynamic_target`.

    Example:
      Odds 1/4 against 1: w = 0.25.

      >>> import torch
      >>> policy, reference = torch.tensor([[0.2, 0.4, 0.4]]), torch.tensor([[0.5, 0.3, 0.2]])
      >>> mixture_target(policy.log(), reference.log(), torch.tensor([0]))
      tensor([[0.4000, 0.3000, 0.3000]])

    References:
      Reed et al. 2015, Training deep neural networks on noisy labels with bootstrapping.
    """
    labels = _check(labels, logits=logits, ref_logits=ref_logits)
    rows, z, z_ref, y = _response_rows(logits.detach(), ref_logits.detach(), labels)
    log_odds, _ = _split_target(z, y)
    ref_log_odds, _ = _split_target(z_ref, y)
    w = torch.where(log_odds >= ref_log_odds, 1, (log_odds - ref_log_odds).exp()).unsqueeze(-1)
    one_hot = F.one_hot(y, z.shape[-1]).to(z.dtype)
    target = torch.zeros_like(logits, dtype=z.dtype, requires_grad=False)
    target[rows] = w * one_hot + (1 - w) * z.softmax(-1)
    return target


def bnf_loss(
    logits: Float[Tensor, "sequences positions vocab"],
    ref_logits: Float[Tensor, "sequences positions vocab"],
    labels: Integer[Tensor, "sequences positions"],
    preferred: Bool[Tensor, " sequences"],
) -> Float[Tensor, ""]:
    """BNF loss (eq. 4), in nats: cross-entropy to the dynamic target, length-normalised, mean over responses.

    L = -mean over responses of  s / |y| * sum_t sum_j f_tj log pi_tj,   s = +1 if preferred else -1.

    One sequence is one response; |y| is the number of its labels that are not -100.

    Args:
      logits: policy logits, already aligned: those at position t predict labels[:, t]. Differentiable.
      ref_logits: reference logits, same shape; a constant.
      labels: token ids, -100 where there is no response token (prompt, padding).
      preferred: the label of each response.

    Returns:
      A scalar, float64 for float64 logits, else float32.

    Raises:
      ValueError: as `dynamic_target`, or a response without a token.

    Example:
      Policy = reference: one preferred response with two tokens of likelihood 1/4 costs log 4 nats.

      >>> import torch
      >>> z = torch.zeros(1, 2, 4)
      >>> bnf_loss(z, z, torch.tensor([[3, 0]]), torch.tensor([True]))
      tensor(1.3863)
    """
    labels, lengths, sign = _check_responses(logits, ref_logits, labels, preferred)
    rows, z, z_ref, y = _response_rows(logits, ref_logits.detach(), labels)
    f = _dynamic_target(z.detach(), z_ref, y)
    log_pi = _log_probabilities(z, y)
    terms = torch.where(f > 0, f * log_pi, 0)  # 0 log 0 = 0
    coefficient = (sign / lengths / len(preferred))[rows[0]]
    return -(coefficient * terms.sum(-1)).sum()


def bnf_logit_gradient(
    logits: Float[Tensor, "sequences positions vocab"],
    ref_logits: Float[Tensor, "sequences positions vocab"],
    labels: Integer[Tensor, "sequences positions"],
    preferred: Bool[Tensor, " sequences"],
) -> Float[Tensor, "sequences positions vocab"]:
    """Closed-form gradient of `bnf_loss` with respect to the policy's logits (eq. 8).

    dL/dz_k = s / |y| * (pi_k - f_k), over the number of responses (eq. 4 is their mean).

    pi - f is evaluated without its cancellation: -(f_y - pi_y) at the target, where f_y - pi_y is the feedback
    of eq. 9, and (f_y - pi_y) q_k at every other token (appendix A.4: the others sum to the target's).

    Args:
      logits, ref_logits, labels, preferred: as for `bnf_loss`.

    Returns:
      The gradient, zero where the label is -100; float64 for float64 logits, else float32.

    Raises:
      ValueError: as `bnf_loss`.

    Example:
      >>> import torch
      >>> z = torch.zeros(1, 1, 4)
      >>> bnf_logit_gradient(z, z, torch.tensor([[3]]), torch.tensor([False]))
      tensor([[[-0.2500, -0.2500, -0.2500,  0.7500]]])
    """
    labels, lengths, sign = _check_responses(logits, ref_logits, labels, preferred)
    rows, z, z_ref, y = _response_rows(logits.detach(), ref_logits.detach(), labels)
    log_odds, q = _split_target(z, y)
    ref_log_odds, _ = _split_target(z_ref, y)
    below = log_odds < ref_log_odds
    # eq. 9: pi_y (1 - pi_ref) / pi_ref = pi_y / odds(pi_ref) below the reference, 1 - pi_y from it on
    exponent = torch.where(below, F.logsigmoid(log_odds) - ref_log_odds, F.logsigmoid(-log_odds))
    feedback = exponent.exp().unsqueeze(-1)
    pi_minus_f = (feedback * q).scatter(-1, y.unsqueeze(-1), -feedback)
    gradient = torch.zeros_like(logits, dtype=z.dtype, requires_grad=False)
    gradient[rows] = (sign / lengths / len(preferred))[rows[0]].unsqueeze(-1) * pi_minus_f
    return gradient


def bnf_feedback(p: Float[Tensor, "..."] | float, p_ref: Float[Tensor, "..."] | float) -> Float[Tensor, "..."]:
    """Feedback curve of the BNF loss: |dL/dz_y| * |y| against the likelihood (eq. 9, figure 1).

    p (1 - p_ref) / p_ref   where p < p_ref,     1 - p   where p >= p_ref.

    It rises linearly from 0, is greatest at p = p_ref, and falls linearly to 0 at p = 1.

    Args:
      p: likelihood pi_y of the target token under the policy, from 0 to 1.
      p_ref: its likelihood under the reference, from 0 to 1, broadcast with p.

    Returns:
      The feedback, dimensionless, in [0, 1].

    Raises:
      ValueError: a value outside [0, 1], or NaN.

    Example:
      >>> import torch
      >>> bnf_feedback(torch.tensor([0.0, 0.1, 0.2, 0.6, 1.0]), 0.2)
      tensor([0.0000, 0.4000, 0.8000, 0.4000, 0.0000])
    """
    p, p_ref = _probabilities(p=p, p_ref=p_ref)
    below = p < p_ref
    return torch.where(below, p * (1 - p_ref) / torch.where(below, p_ref, 1), 1 - p)


def nll_feedback(p: Float[Tensor, "..."] | float) -> Float[Tensor, "..."]:
    """Feedback curve of the negative log-likelihood: |dL/dz_y| against the likelihood (appendix A.1).

    1 - p everywhere: greatest at p = 0, which is what makes pushing a likelihood down unstable.

    Args:
      p: likelihood of the target token, from 0 to 1.

    Returns:
      The feedback, dimensionless, in [0, 1].

    Raises:
      ValueError: a value outside [0, 1], or NaN.

    Example:
      >>> import torch
      >>> nll_feedback(torch.tensor([0.0, 0.25, 1.0]))
      tensor([1.0000, 0.7500, 0.0000])
    """
    (p,) = _probabilities(p=p)
    return 1 - p


def sequence_logps(
    logits: Float[Tensor, "sequences positions vocab"], labels: Integer[Tensor, "sequences positions"]
) -> Float[Tensor, " sequences"]:
    """Log-likelihood of each response, log pi(y) = sum_t log pi_t(y_t), in nats.

    Args:
      logits: already aligned with the labels. Differentiable.
      labels: token ids, -100 where there is no response token.

    Returns:
      One number per response, float64 for float64 logits, else float32.

    Raises:
      ValueError: wrong shape, dtype or device, a bad logit, or a response without a token.

    Example:
      >>> import torch
      >>> sequence_logps(torch.zeros(1, 3, 4), torch.tensor([[-100, 1, 2]]))  # 2 log(1/4)
      tensor([-2.7726])
    """
    labels, _, _ = _check_responses(logits, logits, labels)
    return _sequence_logps(logits, labels)


def _sequence_logps(logits: Tensor, labels: Tensor) -> Tensor:
    rows, z, _, y = _response_rows(logits, logits.detach(), labels)
    logps = _log_probabilities(z, y).gather(-1, y.unsqueeze(-1)).squeeze(-1)
    return logps.new_zeros(len(labels)).index_add(0, rows[0], logps)


def pair_logps(
    logits: Float[Tensor, "sequences positions vocab"],
    ref_logits: Float[Tensor, "sequences positions vocab"],
    labels: Integer[Tensor, "sequences positions"],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What table 2's constraints need of each pair, from full logits: `bnf_core.PairLogps(*pair_logps(...))`.

    The preferred responses are the first half of the sequences, the dispreferred ones the second, in the same order.

    Args:
      logits: policy logits, already aligned with the labels. Differentiable.
      ref_logits: reference logits, a constant.
      labels: token ids, -100 where there is no response token.

    Returns:
      (log pi(y_w), log pi(y_l), log pi_ref(y_w), log pi_ref(y_l), |y_w|, |y_l|), each (pairs,), in nats and tokens.

    Raises:
      ValueError: as `sequence_logps`, or an odd number of sequences.

    Example:
      >>> import torch
      >>> z = torch.zeros(2, 2, 4)
      >>> pair_logps(z, z, torch.tensor([[1, 2], [3, -100]]))[:2]
      (tensor([-2.7726]), tensor([-1.3863]))
    """
    labels, lengths, _ = _check_responses(logits, ref_logits, labels)
    if len(labels) % 2:
        raise ValueError(f"labels: expected preferred and dispreferred halves, got {len(labels)} sequences.")
    policy, ref = _sequence_logps(logits, labels), _sequence_logps(ref_logits.detach(), labels)
    half = len(labels) // 2
    return policy[:half], policy[half:], ref[:half], ref[half:], lengths[:half], lengths[half:]


def _split_target(z: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Log-odds (rows,) of the target and q (rows, V), the distribution over the others; q = 0 where there are none."""
    others = z.scatter(-1, y.unsqueeze(-1), -torch.inf)
    q = torch.nan_to_num(others.softmax(-1), nan=0.0)  # softmax of nothing but -inf
    return z.gather(-1, y.unsqueeze(-1)).squeeze(-1) - _logsumexp(others), q


def _logsumexp(z: Tensor) -> Tensor:
    """logsumexp over the last axis, whose gradient is 0, not NaN, where everything is -inf."""
    empty = z.isneginf().all(-1, keepdim=True)
    return torch.where(empty.squeeze(-1), -torch.inf, torch.where(empty, 0, z).logsumexp(-1))


def _dynamic_target(z: Tensor, z_ref: Tensor, y: Tensor) -> Tensor:
    log_odds, q = _split_target(z, y)
    ref_log_odds, _ = _split_target(z_ref, y)
    log_f_y = (F.logsigmoid(log_odds) - F.logsigmoid(ref_log_odds)).clamp(max=0).unsqueeze(-1)
    return (-torch.expm1(log_f_y) * q).scatter(-1, y.unsqueeze(-1), log_f_y.exp())


def _log_probabilities(z: Tensor, y: Tensor) -> Tensor:
    """log_softmax(z), with every digit of log pi_y where pi_y is close to 1."""
    others = z.scatter(-1, y.unsqueeze(-1), -torch.inf)
    lse = _logsumexp(others)
    log_odds = z.gather(-1, y.unsqueeze(-1)).squeeze(-1) - lse
    finite_lse = torch.where(lse.isneginf(), 0, lse)
    log_pi = others - finite_lse.unsqueeze(-1) + F.logsigmoid(-log_odds).unsqueeze(-1)
    return log_pi.scatter(-1, y.unsqueeze(-1), F.logsigmoid(log_odds).unsqueeze(-1))


def _response_rows(logits: Tensor, ref_logits: Tensor, labels: Tensor) -> tuple[tuple[Tensor, ...], Tensor, Tensor, Tensor]:
    """Where the response tokens are, and policy logits, reference logits and target there, at least in float32."""
    rows = (labels != IGNORE).nonzero(as_tuple=True)
    dtype = _accumulate(logits)
    return rows, logits[rows].to(dtype), ref_logits[rows].to(dtype), labels[rows]


def _accumulate(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def _index(labels: Tensor) -> Tensor:
    return labels.clamp(min=0).unsqueeze(-1)


def _probabilities(**values: object) -> tuple[Tensor, ...]:
    """All in one dtype: the widest of the tensors', float32 at least; float64 where all are numbers."""
    for name, value in values.items():
        if isinstance(value, Tensor):
            check_floating(name, value)
        elif not isinstance(value, NUMBER):
            raise ValueError(f"{name}: expected a number or a floating-point tensor, got {describe(value)}.")
    given = [value for value in values.values() if isinstance(value, Tensor)]
    dtype = reduce(torch.promote_types, (x.dtype for x in given), torch.float32) if given else torch.float64
    device = given[0].device if given else None
    tensors = tuple(torch.as_tensor(value, dtype=dtype, device=device) for value in values.values())
    for name, tensor in zip(values, tensors, strict=True):
        check_probability(name, tensor)
    return tensors


def _check(labels: Tensor, **logits: Tensor) -> Tensor:
    """The labels as int64, after the checks."""
    first = next(iter(logits.values()))
    for name, value in logits.items():
        check_floating(name, value)
        if value.dim() < 1 or value.shape[-1] < 1:
            raise ValueError(f"{name}: expected shape (..., vocab) with at least one token, got {tuple(value.shape)}.")
        check_floating(name, value, tuple(first.shape))
    labels = check_labels(labels, tuple(first.shape[:-1]), first.shape[-1])
    check_same_device(labels=labels, **logits)
    for name, value in logits.items():
        check_logits(name, value, labels)
    return labels


def _check_responses(
    logits: Tensor, ref_logits: Tensor, labels: Tensor, preferred: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The labels as int64, length |y| and sign s of each response (1 where none says), after the checks."""
    check_floating("logits", logits)
    if logits.dim() != 3:
        raise ValueError(f"logits: expected shape (sequences, positions, vocab), got {tuple(logits.shape)}.")
    labels = _check(labels, logits=logits, ref_logits=ref_logits)
    if preferred is None:
        preferred = torch.ones(len(labels), dtype=torch.bool, device=labels.device)
    check_bool("preferred", preferred, (len(labels),))
    check_same_device(logits=logits, preferred=preferred)
    lengths = (labels != IGNORE).sum(-1)
    if len(lengths) == 0:
        raise ValueError("labels: expected at least one response, got none.")
    if (lengths == 0).any():
        row = int((lengths == 0).nonzero()[0])
        raise ValueError(f"labels: expected at least one response token in every row, got none in row {row}.")
    dtype = _accumulate(logits)
    return labels, lengths.to(dtype), torch.where(preferred, 1.0, -1.0).to(dtype)
