"""What training moved: log-likelihood and logit shifts of responses, how unevenly tokens share them (figures 3 and 4),
and what likelihood displacement leaves behind: the share of tokens that fell, the probability of the argmax token.

Vectors are flat over response tokens. `response` (tokens,) says which response each token belongs to, as in `TokenBatch`.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Integer
from torch import Tensor

from bnf_core._checks import (
    IGNORE,
    at_least_float32,
    check_floating,
    check_head,
    check_labels,
    check_positive,
    check_same_device,
    describe,
    first_position,
)

__all__ = [
    "argmax_mass",
    "bin_shares",
    "displacement",
    "gini",
    "log_likelihood_shift",
    "logit_shift",
    "percentile_edges",
    "target_logits",
    "token_log_likelihood_shift",
    "token_logit_shift",
]

TILE = 2**22  # logits that `argmax_mass` holds at a time
BLOCK = 2**13  # rows of the weight among them


def target_logits(
    hidden: Float[Tensor, "tokens dim"],
    weight: Float[Tensor, "vocab dim"],
    labels: Integer[Tensor, " tokens"],
    *,
    bias: Float[Tensor, " vocab"] | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> Float[Tensor, " tokens"]:
    """Logit of the target token alone, from rows of the head's weight.

    z_y = cap(logit_scale * (hidden . weight_y + bias_y)),     cap(x) = softcap * tanh(x / softcap),

    which are 2 * tokens * dim operations and no product with the vocabulary. Logits, unlike log-odds, depend on more than
    the distribution: a constant added to all logits of a position changes z_y and nothing else.

    Args:
      hidden: last hidden states of response tokens only. Differentiable.
      weight: the language-model head's weight. Differentiable.
      labels: the token that each hidden state predicts; -100 for none.
      bias, softcap, logit_scale: as for `linear_log_odds`.

    Returns:
      float64 if an operand is, else float32, summed in that dtype from operands in their own (under autocast: rounded to
      autocast's, which leaves float64 alone); 0 where the label is -100. Infinite logits and NaN stay what they are.

    Raises:
      ValueError: wrong shape, dtype or device, or a label outside the vocabulary.

    Example:
      >>> import torch
      >>> hidden, weight = torch.tensor([[1.0, 2.0]]), torch.tensor([[0.0, 1.0], [3.0, 0.5]])
      >>> target_logits(hidden, weight, torch.tensor([1]))
      tensor([4.])
    """
    operand, softcap, logit_scale = _checked_head(hidden, weight, bias, softcap, logit_scale)
    labels = check_labels(labels, (hidden.shape[0],), weight.shape[0])
    check_same_device(hidden=hidden, labels=labels)
    kept = (labels != IGNORE).nonzero().squeeze(-1)
    rows = labels[kept]
    with torch.autocast(hidden.device.type, enabled=False):
        z = (
            at_least_float32(hidden.index_select(0, kept).to(operand))
            * at_least_float32(weight.index_select(0, rows).to(operand))
        ).sum(-1)
        z = _logits(z, None if bias is None else bias.index_select(0, rows), softcap, logit_scale)
    return z.new_zeros(len(labels)).index_copy(0, kept, z)


def argmax_mass(
    hidden: Float[Tensor, "tokens dim"],
    weight: Float[Tensor, "vocab dim"],
    *,
    bias: Float[Tensor, " vocab"] | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    chunk_size: int | None = None,
) -> Float[Tensor, " tokens"]:
    """Probability of the most likely token at each position: where mass goes that is pushed off unlikely tokens.

    max_j pi_j = 1 / sum_j exp(z_j - max_k z_k),     z as in `target_logits`,

    by one product with the vocabulary, a tile of logits at a time: the maximum and the sum run along.

    Args:
      hidden: last hidden states of response tokens only.
      weight: the language-model head's weight.
      bias, softcap, logit_scale: as for `linear_log_odds`.
      chunk_size: tokens whose logits are held at a time, for 8,192 tokens of the vocabulary; None: so many that a tile has
        4 million logits.

    Returns:
      From 1 / vocab to 1, a constant for gradients; float64 if an operand is, else float32, in the roundings of
      `target_logits`. Tokens that tie for the maximum are counted once: two that share all mass give 0.5. A logit of -inf
      is a token of no mass. NaN where a logit is NaN or +inf, or all are -inf.

    Raises:
      ValueError: wrong shape, dtype or device, or no token in a chunk.

    Source: Ren and Sutherland, Learning Dynamics of LLM Finetuning (arXiv:2407.10490), "squeezing".

    Example:
      >>> import torch
      >>> hidden, weight = torch.tensor([[1.0, 0.0]]), torch.tensor([[2.0, 0.0], [1.0, 5.0], [1.0, -5.0]])
      >>> argmax_mass(hidden, weight)  # logits (2, 1, 1): 1 / (1 + 2 / e)
      tensor([0.5761])
    """
    operand, softcap, logit_scale = _checked_head(hidden, weight, bias, softcap, logit_scale)
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size: expected at least 1 token, got {chunk_size}.")
    hidden, weight, bias = hidden.detach(), weight.detach(), None if bias is None else bias.detach()
    accumulate = torch.promote_types(operand, torch.float32)
    row_max = torch.full((len(hidden),), -torch.inf, dtype=accumulate, device=hidden.device)
    sumexp = torch.zeros_like(row_max)
    size = chunk_size or max(1, TILE // min(len(weight), BLOCK))
    with torch.autocast(hidden.device.type, enabled=False):
        for start in range(0, len(weight), BLOCK):
            block = slice(start, start + BLOCK)
            rows = weight[block].to(operand).to(accumulate)
            for chunk in (slice(first, first + size) for first in range(0, len(hidden), size)):
                products = hidden[chunk].to(operand).to(accumulate) @ rows.T
                z = _logits(products, None if bias is None else bias[block], softcap, logit_scale)
                top = torch.maximum(row_max[chunk], z.amax(1))
                base = top.masked_fill(top.isneginf(), 0).unsqueeze(1)  # -inf - -inf would be no number
                sumexp[chunk] = sumexp[chunk] * (row_max[chunk] - base.squeeze(1)).exp() + (z - base).exp().sum(1)
                row_max[chunk] = top
    return torch.where(row_max.isneginf(), torch.nan, 1 / sumexp)


def token_log_likelihood_shift(
    log_odds: Float[Tensor, " tokens"], ref_log_odds: Float[Tensor, " tokens"]
) -> Float[Tensor, " tokens"]:
    """How far the policy moved the log-likelihood of each token from the reference's (figure 4).

    log pi_y - log pi_ref,y = log sigmoid(l) - log sigmoid(l_ref), in nats.

    Args:
      log_odds, ref_log_odds: of each token under policy and reference, in nats; +inf where nothing else is possible.

    Returns:
      float64 if an operand is, else float32.

    Raises:
      ValueError: wrong shape, dtype or device, NaN or -inf (named by its position).

    Example:
      >>> import torch
      >>> token_log_likelihood_shift(torch.tensor([0.0, 1.0]), torch.tensor([-1.0986123, 1.0]))  # 0.5 from 0.25
      tensor([0.6931, 0.0000])
    """
    log_odds, ref_log_odds = _checked("log_odds", log_odds, ref_log_odds, certain=True)
    return F.logsigmoid(log_odds) - F.logsigmoid(ref_log_odds)


def token_logit_shift(logits: Float[Tensor, " tokens"], ref_logits: Float[Tensor, " tokens"]) -> Float[Tensor, " tokens"]:
    """Absolute distance of each token's logit from the reference's: |z_y - z_ref,y|, >= 0.

    Args:
      logits, ref_logits: z_y of each token under policy and reference, from `target_logits`.

    Returns:
      float64 if an operand is, else float32.

    Raises:
      ValueError: wrong shape, dtype or device, NaN or infinite logits (named by their position).

    Example:
      >>> import torch
      >>> token_logit_shift(torch.tensor([2.0, -1.0]), torch.tensor([3.5, -1.0]))
      tensor([1.5000, 0.0000])
    """
    logits, ref_logits = _checked("logits", logits, ref_logits)
    return (logits - ref_logits).abs()


def log_likelihood_shift(
    log_odds: Float[Tensor, " tokens"],
    ref_log_odds: Float[Tensor, " tokens"],
    response: Int[Tensor, " tokens"],
    *,
    normalized: bool = False,
) -> Float[Tensor, " responses"]:
    """Log-likelihood shift of each response (figure 3a), or per token of it (figure 3d).

    sum_t (log pi_t - log pi_ref,t), in nats;     normalized: the same over |y|, in nats per token.

    Args:
      log_odds, ref_log_odds: of each token under policy and reference, in nats.
      response: index of the response that each token belongs to, from 0 to responses - 1, in any order.
      normalized: divide by the length of the response.

    Raises:
      ValueError: as `token_log_likelihood_shift`, or a response without a token (named by its row).

    Example:
      >>> import torch
      >>> half, quarter = torch.zeros(3), torch.full((3,), -1.0986123)
      >>> log_likelihood_shift(half, quarter, torch.tensor([0, 0, 1]))
      tensor([1.3863, 0.6931])
    """
    return _per_response(token_log_likelihood_shift(log_odds, ref_log_odds), response, normalized)


def logit_shift(
    logits: Float[Tensor, " tokens"],
    ref_logits: Float[Tensor, " tokens"],
    response: Int[Tensor, " tokens"],
    *,
    normalized: bool = False,
) -> Float[Tensor, " responses"]:
    """Absolute logit shift of each response (figure 3b), or per token of it (figure 3e).

    sum_t |z_t,y - z_ref,t,y|;     normalized: the same over |y|.

    Args:
      logits, ref_logits: z_y of each token under policy and reference, from `target_logits`.
      response: index of the response that each token belongs to, from 0 to responses - 1, in any order.
      normalized: divide by the length of the response.

    Raises:
      ValueError: as `token_logit_shift`, or a response without a token (named by its row).

    Example:
      >>> import torch
      >>> logit_shift(torch.tensor([2.0, -1.0]), torch.tensor([3.5, -1.5]), torch.tensor([0, 0]), normalized=True)
      tensor([1.])
    """
    return _per_response(token_logit_shift(logits, ref_logits), response, normalized)


def displacement(
    log_odds: Float[Tensor, " tokens"],
    ref_log_odds: Float[Tensor, " tokens"],
    response: Int[Tensor, " tokens"],
) -> Float[Tensor, " responses"]:
    """Share of each response's tokens whose likelihood fell: 0 where none did, 1 where all did.

    (1 / |y|) #{t : log pi_t < log pi_ref,t} = (1 / |y|) #{t : l_t < l_ref,t},

    as log sigmoid ascends. A tie is no fall. A fall of any size counts, so two passes over one model that round differently
    are told apart too: hold a share against one of an untrained policy before reading much into it.

    Args:
      log_odds, ref_log_odds: of each token under policy and reference, in nats; +inf where nothing else is possible.
      response: index of the response that each token belongs to, from 0 to responses - 1, in any order; zeros for one share
        of all tokens.

    Returns:
      float64 if an operand is, else float32.

    Raises:
      ValueError: as `log_likelihood_shift`.

    Source: Razin et al., Unintentional Unalignment: Likelihood Displacement in DPO (arXiv:2410.08847).

    Example:
      >>> import torch
      >>> log_odds, ref_log_odds = torch.tensor([0.0, 1.0, 2.0]), torch.tensor([1.0, 1.0, 1.0])
      >>> displacement(log_odds, ref_log_odds, torch.tensor([0, 0, 1]))
      tensor([0.5000, 0.0000])
    """
    log_odds, ref_log_odds = _checked("log_odds", log_odds, ref_log_odds, certain=True)
    both = torch.promote_types(log_odds.dtype, ref_log_odds.dtype)
    return _per_response((log_odds < ref_log_odds).to(both), response, True)


def gini(values: Float[Tensor, " tokens"], response: Int[Tensor, " tokens"]) -> Float[Tensor, " responses"]:
    """Gini coefficient of each response's token values: how few tokens hold most of their sum (figure 3f: logit shifts).

    G = sum_i sum_j |x_i - x_j| / (2 n sum_i x_i) = sum_i (2 i - n - 1) x_(i) / (n sum_i x_i),   x_(1) <= ... <= x_(n).

    0 where all are equal, (n - 1) / n where one token holds everything; 0 by definition where all are 0 (nothing moved)
    and for a response of one token. It depends on n: compare responses of like length.

    Args:
      values: >= 0 and finite, one per token, as from `token_logit_shift`.
      response: index of the response that each token belongs to, from 0 to responses - 1, in any order.

    Returns:
      In [0, 1), float64 for float64 values, else float32.

    Raises:
      ValueError: wrong shape, dtype or device, a negative or infinite value or NaN (named by its position), or a response
        without a token (named by its row).

    Source: Gini, Variabilita e mutabilita, 1912.

    Example:
      >>> import torch
      >>> gini(torch.tensor([2.0, 2.0, 0.0, 0.0, 0.0, 5.0]), torch.tensor([0, 0, 1, 1, 1, 1]))
      tensor([0.0000, 0.7500])
    """
    check_floating("values", values)
    if values.dim() != 1:
        raise ValueError(f"values: expected shape (tokens,), got {describe(values)}.")
    bad = ~((values >= 0) & values.isfinite())
    if bad.any():
        at = first_position(bad)
        raise ValueError(f"values: expected finite numbers of at least 0, got {values[at].item()} at position {list(at)}.")
    lengths = _lengths(values, response)
    response, x = response.long(), at_least_float32(values)
    # in units of the largest: equal values are exactly 1, and no sum overflows
    largest = x.new_zeros(len(lengths)).scatter_reduce(0, response, x, "amax")
    x = x / torch.where(largest > 0, largest, 1)[response]
    order = x.argsort()
    order = order[response[order].argsort(stable=True)]  # response by response, ascending in each
    first = lengths.cumsum(0) - lengths
    rank = torch.arange(1, len(x) + 1, device=x.device) - first.repeat_interleave(lengths)
    n, total = lengths.to(x.dtype), x.new_zeros(len(lengths)).index_add(0, response, x)
    weighted = (2 * rank - lengths.repeat_interleave(lengths) - 1) * x[order]
    difference = x.new_zeros(len(lengths)).index_add(0, response[order], weighted)
    return difference.clamp(min=0) / (n * torch.where(total > 0, total, 1))  # rounding may leave a little below 0


def percentile_edges(values: Float[Tensor, " tokens"], bins: int = 10) -> Float[Tensor, " edges"]:
    """Inner edges of bins that each hold the same share of `values`: the deciles for ten bins (figure 4).

    edge_k = the k / bins quantile, k = 1 .. bins - 1, interpolated linearly between neighbours (NumPy's default).

    Args:
      values: token shifts of the method that the others are held against.
      bins: how many, at least 1.

    Returns:
      (bins - 1,), ascending; float64 for float64 values, else float32.

    Raises:
      ValueError: no values, a wrong shape or dtype, NaN or infinite values, or no bin.

    Example:
      >>> import torch
      >>> percentile_edges(torch.arange(11.0), bins=5)
      tensor([2., 4., 6., 8.])
    """
    _check_vector("values", values)
    if not isinstance(bins, int) or isinstance(bins, bool) or bins < 1:
        raise ValueError(f"bins: expected a whole number of at least 1, got {bins!r}.")
    ordered = at_least_float32(values).sort().values
    place = torch.arange(1, bins, device=values.device, dtype=torch.float64) * (len(ordered) - 1) / bins
    below = place.floor().long()
    above = (below + 1).clamp(max=len(ordered) - 1)
    return ordered[below].lerp(ordered[above], (place - below).to(ordered.dtype))


def bin_shares(values: Float[Tensor, " tokens"], edges: Float[Tensor, " edges"]) -> Float[Tensor, " bins"]:
    """Share of `values` in each of the bins between `edges` (figure 4); the first and the last bin are open to the outside.

    A value on an edge counts half in either bin; on k edges that coincide, 1 / (k + 1) in each of the bins that meet
    there. So the values that the edges came from fill every bin alike (to within a token), even where they are all equal.

    Args:
      values: token shifts of any method.
      edges: from `percentile_edges`, ascending.

    Returns:
      (edges + 1,), sums to 1; float64 for float64 values, else float32.

    Raises:
      ValueError: no values, a wrong shape, dtype or device, NaN or infinite values, or edges that descend.

    Example:
      >>> import torch
      >>> bin_shares(torch.tensor([-3.0, 0.0, 0.5, 9.0]), torch.tensor([0.0, 1.0]))
      tensor([0.3750, 0.3750, 0.2500])
    """
    _check_vector("values", values)
    check_floating("edges", edges)
    if edges.dim() != 1:
        raise ValueError(f"edges: expected shape (edges,), got {describe(edges)}.")
    if (bad := edges.isnan()).any():
        raise ValueError(f"edges: expected numbers, got nan at position {list(first_position(bad))}.")
    if (bad := edges.diff() < 0).any():
        (at,) = first_position(bad)
        raise ValueError(
            f"edges: expected them ascending, got {edges[at + 1].item()} after {edges[at].item()} at position [{at + 1}]."
        )
    check_same_device(values=values, edges=edges)
    both = torch.promote_types(at_least_float32(values).dtype, edges.dtype)
    x, e = values.to(both), edges.to(both)
    first, last = torch.searchsorted(e, x), torch.searchsorted(e, x, right=True)  # equal but on an edge
    share = 1 / (last - first + 1).to(torch.float64)
    starts = share.new_zeros(len(e) + 2).index_add(0, first, share).index_add(0, last + 1, -share)
    return (starts.cumsum(0)[:-1] / len(x)).to(at_least_float32(values).dtype)


# --- shared ----------------------------------------------------------------------------------------------------------


def _checked_head(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None, logit_scale: float
) -> tuple[torch.dtype, float | None, float]:
    """The dtype that operands are rounded to, and the checked softcap and scale."""
    check_head(hidden, weight)
    if bias is not None:
        check_floating("bias", bias, (weight.shape[0],))
    check_same_device(hidden=hidden, weight=weight, bias=bias)
    softcap = None if softcap is None else check_positive("softcap", softcap)
    device, operand = hidden.device.type, torch.promote_types(hidden.dtype, weight.dtype)
    if torch.is_autocast_enabled(device) and operand != torch.float64:
        operand = torch.get_autocast_dtype(device)
    return operand, softcap, check_positive("logit_scale", logit_scale)


def _logits(products: Tensor, bias: Tensor | None, softcap: float | None, logit_scale: float) -> Tensor:
    """z of h . w."""
    z = (products if bias is None else products + bias.to(products.dtype)) * logit_scale
    if softcap is None:
        return z
    return torch.where(z.isinf(), z, softcap * torch.tanh(z / softcap))  # tanh(inf) would be a sound logit


def _checked(name: str, values: Tensor, ref_values: Tensor, certain: bool = False) -> tuple[Tensor, Tensor]:
    """Policy's and reference's values of the same tokens, in float32 or better; finite, or +inf if `certain` admits it."""
    check_floating(name, values)
    if values.dim() != 1:
        raise ValueError(f"{name}: expected shape (tokens,), got {describe(values)}.")
    check_floating(f"ref_{name}", ref_values, tuple(values.shape))
    check_same_device(**{name: values, f"ref_{name}": ref_values})
    for called, value in ((name, values), (f"ref_{name}", ref_values)):
        _check_finite(called, value, certain)
    return at_least_float32(values), at_least_float32(ref_values)


def _check_finite(name: str, values: Tensor, certain: bool = False) -> None:
    bad = values.isnan() | values.isneginf() if certain else ~values.isfinite()
    if bad.any():
        at = first_position(bad)
        raise ValueError(f"{name}: expected finite numbers, got {values[at].item()} at position {list(at)}.")


def _check_vector(name: str, values: Tensor) -> None:
    check_floating(name, values)
    if values.dim() != 1 or not len(values):
        raise ValueError(f"{name}: expected shape (tokens,) with at least one token, got {describe(values)}.")
    _check_finite(name, values)


def _lengths(values: Tensor, response: Tensor) -> Tensor:
    """|y| of each response."""
    if not isinstance(response, Tensor) or response.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"response: expected an int32 or int64 tensor, got {describe(response)}.")
    if response.dim() != 1 or response.shape != values.shape:
        raise ValueError(f"response: expected shape {tuple(values.shape)}, one per token, got {describe(response)}.")
    check_same_device(values=values, response=response)
    if (bad := response < 0).any():
        at = first_position(bad)
        raise ValueError(f"response: expected indices from 0, got {response[at].item()} at position {list(at)}.")
    lengths = response.clamp(max=len(response)).bincount()  # an index beyond the tokens leaves a row empty as well
    if (empty := (lengths == 0).nonzero()).numel():
        raise ValueError(f"response: expected at least one token in every response, got none in row {int(empty[0])}.")
    return lengths


def _per_response(values: Tensor, response: Tensor, normalized: bool) -> Tensor:
    lengths = _lengths(values, response)
    total = values.new_zeros(len(lengths)).index_add(0, response, values)
    return total / lengths if normalized else total
