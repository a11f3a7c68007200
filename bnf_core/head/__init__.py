"""The log-odds head: hidden states in, one log-odds per token out. It never sees a preference."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from bnf_core._checks import check_floating, check_labels, check_same_device
from bnf_core.head.chunked import linear_log_odds_chunked
from bnf_core.head.naive import linear_log_odds_naive, token_log_odds

__all__ = ["IMPLEMENTATIONS", "linear_log_odds", "token_log_odds"]

IMPLEMENTATIONS = {"naive": linear_log_odds_naive, "chunked": linear_log_odds_chunked}


def linear_log_odds(
    hidden: Float[Tensor, "tokens dim"],
    weight: Float[Tensor, "vocab dim"],
    labels: Int[Tensor, " tokens"],
    *,
    bias: Float[Tensor, " vocab"] | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    implementation: str = "auto",
    chunk_size: int | None = None,
) -> tuple[Float[Tensor, " tokens"], Float[Tensor, " tokens"]]:
    """Log-odds of the target token, and the entropy, straight from hidden states.

    z = cap(logit_scale * (hidden @ weight.T + bias)),   cap(x) = softcap * tanh(x / softcap),
    l = z_y - logsumexp_{j != y} z_j,                    H = -sum_j pi_j log pi_j,

    in nats, without ever holding (tokens, vocab) logits. All that the objectives need of the policy.

    Args:
      hidden: last hidden states of response tokens only. Differentiable.
      weight: the language-model head's weight. Differentiable.
      labels: the token that each hidden state predicts; -100 for none.
      bias: the head's bias. Differentiable.
      softcap: final logit soft-capping (Gemma-2: 30.0); None for none.
      logit_scale: factor on the logits (Cohere's logit_scale, 1 / Granite's logits_scaling).
      implementation: "naive" (all logits, autograd), "chunked", or "auto": the fastest there is for the device.
      chunk_size: tokens whose logits are held at a time; None lets the implementation choose.

    Returns:
      (log_odds, entropy), each (tokens,): float64 if the operands are, else float32, summed in that dtype from
      operands in their own (under autocast: rounded to autocast's). log_odds is differentiable in hidden, weight
      and bias; the entropy is a constant; both are 0 where the label is -100. NaN and infinite logits come out as
      NaN or infinite, never as a finite number.

    Raises:
      ValueError: wrong shape, dtype or device, a label outside the vocabulary, an unknown implementation.

    Example:
      >>> import torch
      >>> hidden, weight = torch.tensor([[1.0, 0.0]]), torch.tensor([[2.0, 0.0], [1.0, 5.0], [1.0, -5.0]])
      >>> log_odds, entropy = linear_log_odds(hidden, weight, torch.tensor([0]))
      >>> log_odds  # logits (2, 1, 1): 2 - log(2e)
      tensor([0.3069])
    """
    check_floating("hidden", hidden)
    check_floating("weight", weight)
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1] or weight.shape[0] < 1:
        raise ValueError(
            "hidden and weight: expected shapes (tokens, dim) and (vocab, dim), "
            f"got {tuple(hidden.shape)} and {tuple(weight.shape)}."
        )
    check_labels(labels, (hidden.shape[0],), weight.shape[0])
    if bias is not None:
        check_floating("bias", bias, (weight.shape[0],))
    check_same_device(hidden=hidden, weight=weight, labels=labels, bias=bias)
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap: expected a positive number or None, got {softcap}.")
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size: expected at least 1 token, got {chunk_size}.")
    name = "chunked" if implementation == "auto" else implementation
    if name not in IMPLEMENTATIONS:
        raise ValueError(f"implementation: expected one of {', '.join(['auto', *IMPLEMENTATIONS])}, got {implementation!r}.")

    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        compute_dtype = torch.get_autocast_dtype(device)
    else:
        compute_dtype = torch.promote_types(hidden.dtype, weight.dtype)
    with torch.autocast(device, enabled=False):
        return IMPLEMENTATIONS[name](hidden, weight, labels, bias, softcap, logit_scale, compute_dtype, chunk_size)
