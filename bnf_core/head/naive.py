"""The log-odds head with all logits in memory: the one to read, and the oracle of the others."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Integer
from torch import Tensor

from bnf_core._checks import IGNORE, check_floating, check_labels, check_same_device, holds_numbers
from bnf_core.head.closure import TokenLoss, value_and_slope
from bnf_core.head.transform import HeadOptions, binary_entropy

__all__ = ["log_odds_naive", "token_log_odds", "token_loss_naive"]


def token_log_odds(
    logits: Float[Tensor, "*batch vocab"], labels: Integer[Tensor, "*batch"]
) -> tuple[Float[Tensor, "*batch"], Float[Tensor, "*batch"]]:
    """Log-odds of the target token, and the entropy, from full logits.

    l = log pi_y - log(1 - pi_y) = z_y - logsumexp_{j != y} z_j,     H = -sum_j pi_j log pi_j,

    in nats. The target is masked out before the sum, so that l keeps every digit however close pi_y is to 1.

    Args:
      logits: any floating dtype, summed in float32 or better; -inf rules a token out.
      labels: token ids aligned with the logits, -100 where there is no response token.

    Returns:
      (log_odds, entropy): float64 for float64 logits, else float32; 0 where the label is -100. log_odds is
      differentiable (dl/dz_y = 1, dl/dz_j = -q_j), the entropy is a constant. Where every other token is ruled
      out, l = +inf and its gradient to the others is 0. NaN and +inf logits give NaN: the values are not searched.

    Raises:
      ValueError: wrong shape, dtype or device, a label outside the vocabulary.

    Example:
      >>> import torch
      >>> log_odds, entropy = token_log_odds(torch.tensor([[2.0, 1.0, 1.0]]), torch.tensor([0]))
      >>> log_odds  # 2 - log(2e)
      tensor([0.3069])
    """
    check_floating("logits", logits)
    if logits.dim() < 1 or logits.shape[-1] < 1:
        raise ValueError(f"logits: expected shape (..., vocab) with at least one token, got {tuple(logits.shape)}.")
    labels = check_labels(labels, tuple(logits.shape[:-1]), logits.shape[-1])
    check_same_device(logits=logits, labels=labels)
    z = logits if logits.dtype == torch.float64 else logits.float()
    ignored = labels == IGNORE
    target = labels.masked_fill(ignored, 0).unsqueeze(-1)

    others = z.scatter(-1, target, -torch.inf)
    row_max = others.detach().amax(-1, keepdim=True)
    row_max = row_max.masked_fill(row_max.isneginf(), 0)  # nothing but the target is possible
    sumexp = (others - row_max).exp().sum(-1, keepdim=True)
    lse = row_max + torch.where(
        sumexp == 0, -torch.inf, torch.where(sumexp == 0, 1, sumexp).log()
    )  # no 0 * inf in the gradient
    log_odds = (z.gather(-1, target) - lse).squeeze(-1)

    with torch.no_grad():  # H = H of (target or not) + (1 - pi_y) H(q)
        q = (others - lse.masked_fill(lse.isneginf(), 0)).exp()
        entropy_others = -torch.xlogy(q, q).sum(-1)
        entropy = binary_entropy(log_odds) + (-log_odds).sigmoid() * entropy_others
    return log_odds.masked_fill(ignored, 0), entropy.masked_fill(ignored, 0)


def log_odds_naive(
    hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, options: HeadOptions
) -> tuple[Tensor, Tensor]:
    """As `linear_log_odds`, by autograd through (tokens, vocab) logits."""
    acc_dtype = options.accumulate
    products = F.linear(hidden.to(options.compute).to(acc_dtype), weight.to(options.compute).to(acc_dtype))
    return token_log_odds(options.logits(products, None if bias is None else bias.to(acc_dtype)), labels)


def token_loss_naive(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    options: HeadOptions,
    token_loss: TokenLoss,
    per_token: tuple[Tensor, ...],
) -> tuple[Tensor, Tensor, Tensor]:
    """As `linear_token_loss`, by autograd. Labels hold token ids only."""
    log_odds, entropy = log_odds_naive(hidden, weight, labels, bias, options)
    if holds_numbers(log_odds):
        value_and_slope(token_loss, log_odds.detach(), per_token, log_odds.requires_grad)  # its checks
    return token_loss(log_odds, *per_token).sum(), log_odds.detach(), entropy
