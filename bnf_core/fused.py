"""The BNF loss straight from hidden states: the drop-in replacement for a fused cross-entropy."""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Integer
from torch import Tensor

from bnf_core._checks import IGNORE, check_floating
from bnf_core.head import TOKEN_LOSSES, NamedLoss, linear_token_loss
from bnf_core.objectives import bnf_weight

__all__ = ["BNF_LOSS", "linear_bnf_loss"]


def linear_bnf_loss(
    hidden: Float[Tensor, "tokens dim"],
    weight: Float[Tensor, "vocab dim"],
    labels: Integer[Tensor, " tokens"],
    ref_log_odds: Float[Tensor, " tokens"],
    coefficient: Float[Tensor, " tokens"],
    *,
    bias: Float[Tensor, " vocab"] | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    implementation: str = "auto",
    chunk_size: int | None = None,
    exact: bool = True,
) -> tuple[Float[Tensor, ""], Float[Tensor, " tokens"], Float[Tensor, " tokens"]]:
    """BNF loss (eq. 4) from hidden states, value and gradients in one pass of three matrix products.

    L = sum_t coefficient_t (w_t NLL_t + (1 - w_t) H_t),     coefficient = s / (|y| * responses),

    which is `bnf_core.reference.bnf_loss` without ever holding (tokens, vocab) logits.

    Args:
      hidden: last hidden states of response tokens only. Differentiable.
      weight: the language-model head's weight. Differentiable.
      labels: the token that each hidden state predicts; -100 for none.
      ref_log_odds: log-odds of that token under the reference, in nats, from `linear_log_odds` on it.
      coefficient: what each token counts: label / (length of its response * responses of the optimizer step).
      bias, softcap, logit_scale, implementation, chunk_size, exact: as for `linear_log_odds`.

    Returns:
      (loss, log_odds, entropy): a differentiable scalar in nats, and two detached vectors (tokens,).

    Raises:
      ValueError: as `linear_token_loss`.

    Example:
      Policy = reference, one preferred response of one token, four tokens alike: log 4 nats.

      >>> import torch
      >>> hidden, weight = torch.zeros(1, 2), torch.zeros(4, 2)
      >>> ref_log_odds = torch.tensor([-1.0986])  # log(1/3)
      >>> loss, _, _ = linear_bnf_loss(hidden, weight, torch.tensor([2]), ref_log_odds, torch.ones(1))
      >>> loss
      tensor(1.3863)
    """
    for name, value in (("ref_log_odds", ref_log_odds), ("coefficient", coefficient)):
        check_floating(name, value, (hidden.shape[0],))
    options: dict[str, Any] = {"bias": bias, "softcap": softcap, "logit_scale": logit_scale}
    options |= {"implementation": implementation, "chunk_size": chunk_size, "exact": exact}
    loss, log_odds, entropy = linear_token_loss(hidden, weight, labels, weighted_nll, ref_log_odds, coefficient, **options)
    w = bnf_weight(log_odds, ref_log_odds.to(log_odds.dtype))
    constant = (1 - w) * entropy * coefficient.detach()  # (1 - w) H has no gradient
    return loss + constant.masked_fill(labels.long() == IGNORE, 0).sum(), log_odds, entropy


def weighted_nll(log_odds: Tensor, ref_log_odds: Tensor, coefficient: Tensor) -> Tensor:
    """coefficient * w * NLL of each token: what has a gradient in the BNF loss."""
    return -coefficient * bnf_weight(log_odds, ref_log_odds.to(log_odds.dtype)) * F.logsigmoid(log_odds)


def weighted_nll_slope(log_odds: Tensor, ref_log_odds: Tensor, coefficient: Tensor) -> Tensor:
    """Its derivative in the log-odds, w a constant: -coefficient * w * (1 - pi_y)."""
    return -coefficient * bnf_weight(log_odds, ref_log_odds.to(log_odds.dtype)) * torch.sigmoid(-log_odds)


BNF_LOSS = TOKEN_LOSSES["bnf"] = NamedLoss(weighted_nll, weighted_nll_slope)
