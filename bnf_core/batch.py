"""Which response each token belongs to, which responses are a pair, and their sequence log-likelihoods."""

from copy import copy
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from bnf_core._checks import at_least_float32, check_floating, check_same_device, describe, first_position

__all__ = [
    "PairConstraint",
    "PairLogps",
    "TokenBatch",
    "checked_pairs",
    "pair_logps",
    "sequence_log_ratios",
    "sequence_logps",
]


@dataclass(frozen=True, eq=False)
class TokenBatch:
    """The response tokens of some responses, as flat vectors: no padding, no prompt, no vocabulary.

    Two batches are equal only if they are one object: their tensors are not compared.

    Args:
      response: (tokens,) index of the response that each token belongs to, from 0 to responses - 1, in any order.
      preferred: (responses,) bool, the label of each response.
      pair: (responses,) id of the pair that each response is a side of, -1 where it has none; None: no pairs.
      ref_log_odds: (tokens,) log-odds of each token under the reference model, in nats; None where none is needed.
      entropy: (tokens,) entropy of the policy at each token, in nats, a constant; None: losses leave the term out.
      score: (responses,) what each response counts in place of +1 or -1, its sign that of its label; None: +1 or -1. Not for
        objectives of pairs.
      weight: (tokens,) what each token counts, finite and not negative; None: 1. Sums over a response are sum_t weight_t x_t,
        means that over its number of tokens |y|, whatever they weigh. So 0 is a token left out, but for the length.
      z0: () KTO's reference point, the estimate of KL(policy, reference) in nats, a constant; None where none is needed.

    Raises:
      ValueError: wrong shape, dtype or device, or a response without a token that counts (named by its row).

    Example:
      A preferred response of two tokens and a dispreferred one of one token:

      >>> import torch
      >>> batch = TokenBatch(torch.tensor([0, 0, 1]), torch.tensor([True, False]))
      >>> batch.lengths, batch.sum(torch.tensor([1.0, 2.0, 4.0])), batch.mean(torch.tensor([1.0, 2.0, 4.0]))
      (tensor([2, 1]), tensor([3., 4.]), tensor([1.5000, 4.0000]))
    """

    response: Int[Tensor, " tokens"]
    preferred: Bool[Tensor, " responses"]
    pair: Int[Tensor, " responses"] | None = None
    ref_log_odds: Float[Tensor, " tokens"] | None = None
    entropy: Float[Tensor, " tokens"] | None = None
    score: Float[Tensor, " responses"] | None = None
    weight: Float[Tensor, " tokens"] | None = None
    z0: Float[Tensor, ""] | None = None

    def __post_init__(self) -> None:
        for name in ("response", "pair"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, Tensor) or value.dtype not in (torch.int32, torch.int64)):
                raise ValueError(f"{name}: expected an int32 or int64 tensor, got {describe(value)}.")
        if self.response.dim() != 1:
            raise ValueError(f"response: expected shape (tokens,), got {describe(self.response)}.")
        preferred: object = self.preferred
        if not isinstance(preferred, Tensor) or preferred.dtype != torch.bool or preferred.dim() != 1:
            raise ValueError(f"preferred: expected a bool tensor of shape (responses,), got {describe(preferred)}.")
        responses = len(preferred)
        if self.pair is not None and tuple(self.pair.shape) != (responses,):
            raise ValueError(f"pair: expected shape {(responses,)}, one per response, got {describe(self.pair)}.")
        for name in ("ref_log_odds", "entropy", "weight"):
            if (value := getattr(self, name)) is not None:
                check_floating(name, value, tuple(self.response.shape))
        if self.z0 is not None:
            check_floating("z0", self.z0, ())
        if self.score is not None:
            check_floating("score", self.score, (responses,))
            if (wrong := ~self.score.isfinite() | ((self.score > 0) != preferred) & (self.score != 0)).any():
                (at,) = first_position(wrong)
                got = f"{float(self.score[at])} in row {at}"
                raise ValueError(f"score: expected finite numbers with the sign of the label, got {got}.")
        check_same_device(**vars(self))
        if (bad := (self.response < 0) | (self.response >= responses)).any():
            (at,) = first_position(bad)
            raise ValueError(
                f"response: expected indices from 0 to {responses - 1}, got {int(self.response[at])} at position [{at}]."
            )
        if (empty := (self.lengths == 0).nonzero()).numel():
            raise ValueError(f"response: expected at least one token in every response, got none in row {int(empty[0])}.")
        if self.weight is not None:
            self._check_weight(self.weight)

    def _check_weight(self, weight: Float[Tensor, " tokens"]) -> None:
        if (wrong := ~(weight.isfinite() & (weight >= 0))).any():
            (at,) = first_position(wrong)
            raise ValueError(f"weight: expected finite numbers from 0, got {float(weight[at])} at position [{at}].")
        if (empty := (self.response[weight > 0].bincount(minlength=self.responses) == 0).nonzero()).numel():
            raise ValueError(f"weight: expected a token above 0 in every response, got none in row {int(empty[0])}.")

    def weighted(self, losses: Float[Tensor, " responses"]) -> Float[Tensor, " responses"]:
        """|score| * the loss of each response.

        Example:
          >>> import torch
          >>> batch = TokenBatch(torch.tensor([0, 1]), torch.tensor([True, False]), score=torch.tensor([0.5, -2.0]))
          >>> batch.weighted(torch.ones(2))
          tensor([0.5000, 2.0000])
        """
        return losses if self.score is None else losses * self.score.abs().to(losses.dtype)

    @property
    def responses(self) -> int:
        return self.preferred.shape[0]

    @property
    def lengths(self) -> Int[Tensor, " responses"]:
        """|y|: number of tokens of each response."""
        return self.response.bincount(minlength=self.responses)

    @property
    def sign(self) -> Float[Tensor, " responses"]:
        """s: +1 for a preferred response, -1 for a dispreferred one."""
        return torch.where(self.preferred, 1.0, -1.0)

    def sum(self, values: Float[Tensor, " tokens"]) -> Float[Tensor, " responses"]:
        """sum_t weight_t x_t over the tokens of each response, in float32 at least.

        Example:
          >>> import torch
          >>> batch = TokenBatch(torch.tensor([0, 0]), torch.tensor([True]), weight=torch.tensor([0.5, 1.0]))
          >>> batch.sum(torch.tensor([2.0, 4.0])), batch.mean(torch.tensor([2.0, 4.0]))
          (tensor([5.]), tensor([2.5000]))
        """
        values = at_least_float32(values)
        if self.weight is not None:  # a token of weight 0 may have an infinite value
            values = (values * self.weight.to(values.dtype)).masked_fill(self.weight == 0, 0)
        return values.new_zeros(self.responses).index_add(0, self.response, values)

    def mean(self, values: Float[Tensor, " tokens"]) -> Float[Tensor, " responses"]:
        """sum_t weight_t x_t / |y| over the tokens of each response, in float32 at least."""
        return self.sum(values) / self.lengths

    def to(self, device: torch.device | str | int, *, non_blocking: bool = False) -> "TokenBatch":
        """The same batch on another device.

        Args:
          device: as for `Tensor.to`.
          non_blocking: do not wait for the copy, where it comes from pinned memory.

        Example:
          >>> import torch
          >>> TokenBatch(torch.tensor([0, 0, 1]), torch.tensor([True, False])).to("cpu").lengths
          tensor([2, 1])
        """
        moved = copy(self)  # without the checks, which would wait for the copy: what was sound stays so
        for name, value in vars(self).items():
            if value is not None:
                vars(moved)[name] = value.to(device, non_blocking=non_blocking)
        return moved

    def pairs(self) -> tuple[Int[Tensor, " pairs"], Int[Tensor, " pairs"]]:
        """Rows of the preferred and of the dispreferred side of each pair, in order of the pair's id.

        Raises:
          ValueError: no pairs, a response without a pair, or a pair that is not one of each label.

        Example:
          >>> import torch
          >>> TokenBatch(torch.arange(4), torch.tensor([False, True, True, False]), pair=torch.tensor([7, 7, 3, 3])).pairs()
          (tensor([2, 1]), tensor([3, 0]))
        """
        if self.pair is None:
            raise ValueError("batch.pair: expected the pair of each response for a pairwise objective, got None.")
        if (self.pair < 0).any():
            row = int((self.pair < 0).nonzero()[0])
            raise ValueError(f"batch.pair: expected every response in a pair for a pairwise objective, row {row} has none.")
        sides = []
        for side in (self.preferred, ~self.preferred):
            rows = side.nonzero().squeeze(-1)
            sides.append(rows[self.pair[rows].argsort()])
        chosen, rejected = (self.pair[rows] for rows in sides)
        if not torch.equal(chosen, rejected) or (chosen.diff() == 0).any():
            ids, member = self.pair.unique(return_inverse=True)  # type: ignore[no-untyped-call]
            counts = torch.stack([member[side].bincount(minlength=len(ids)) for side in (self.preferred, ~self.preferred)])
            (at,) = first_position((counts != 1).any(0))
            raise ValueError(
                "batch.pair: expected one preferred and one dispreferred response in each pair, "
                f"pair {int(ids[at])} has {int(counts[0, at])} and {int(counts[1, at])}."
            )
        return sides[0], sides[1]


class PairLogps(NamedTuple):
    """Log-likelihoods of the two sides of each pair, log pi(y) = sum_t log pi_t, in nats, and their lengths |y|.

    Example:
      >>> import torch
      >>> one = torch.ones(1)
      >>> PairLogps(-2 * one, -3 * one, -2.5 * one, -2.5 * one, 2 * one, 4 * one).log_ratios
      (tensor([0.5000]), tensor([-0.5000]))
    """

    chosen: Float[Tensor, " pairs"]
    rejected: Float[Tensor, " pairs"]
    ref_chosen: Float[Tensor, " pairs"] | None
    ref_rejected: Float[Tensor, " pairs"] | None
    chosen_lengths: Float[Tensor, " pairs"]
    rejected_lengths: Float[Tensor, " pairs"]

    @property
    def log_ratios(self) -> tuple[Float[Tensor, " pairs"], Float[Tensor, " pairs"]]:
        """r_w and r_l: log pi(y) - log pi_ref(y) of each side."""
        if self.ref_chosen is None or self.ref_rejected is None:
            raise ValueError("batch.ref_log_odds: expected the log-odds of the reference for this objective, got None.")
        return self.chosen - self.ref_chosen, self.rejected - self.ref_rejected

    @property
    def means(self) -> tuple[Float[Tensor, " pairs"], Float[Tensor, " pairs"]]:
        """Mean log-likelihood per token of each side."""
        return self.chosen / self.chosen_lengths, self.rejected / self.rejected_lengths


PairConstraint = tuple[Float[Tensor, " pairs"], Float[Tensor, " pairs"]]  # C_w, C_l (eq. 3)


def checked_pairs(pairs: PairLogps) -> PairLogps:
    """In float32 at least, after the checks: what a constraint takes.

    Raises:
      ValueError: not a PairLogps of floating-point tensors of one shape.
    """
    if not isinstance(pairs, PairLogps):
        raise ValueError(f"pairs: expected a PairLogps (see bnf_core.pair_logps), got {type(pairs).__name__}.")
    for name, value in pairs._asdict().items():
        if value is not None:
            check_floating(f"pairs.{name}", value, tuple(pairs.chosen.shape))
    return PairLogps._make(None if value is None else at_least_float32(value) for value in pairs)


def sequence_logps(log_odds: Float[Tensor, " tokens"], batch: TokenBatch) -> Float[Tensor, " responses"]:
    """Log-likelihood of each response, log pi(y) = sum_t log sigmoid(l_t), in nats; each term times batch.weight, if any.

    Args:
      log_odds: l of each response token. Differentiable.
      batch: which response each token belongs to.

    Returns:
      One number per response, float64 for float64 log-odds, else float32.

    Raises:
      ValueError: log_odds is not a floating-point tensor of the batch's tokens.

    Example:
      >>> import torch
      >>> sequence_logps(torch.zeros(3), TokenBatch(torch.tensor([0, 0, 1]), torch.tensor([True, False])))
      tensor([-1.3863, -0.6931])
    """
    check_floating("log_odds", log_odds, tuple(batch.response.shape))
    check_same_device(log_odds=log_odds, response=batch.response)
    return batch.sum(F.logsigmoid(at_least_float32(log_odds)))


def sequence_log_ratios(log_odds: Float[Tensor, " tokens"], batch: TokenBatch) -> Float[Tensor, " responses"]:
    """log P = log pi(y) - log pi_ref(y) of each response (`sequence_logps`), in nats.

    Args:
      log_odds: l of each response token under the policy. Differentiable.
      batch: needs `ref_log_odds`, a constant.

    Raises:
      ValueError: as `sequence_logps`, or no `ref_log_odds`.

    Example:
      >>> import torch
      >>> batch = TokenBatch(torch.tensor([0, 0]), torch.tensor([True]), ref_log_odds=torch.full((2,), -1.0986123))
      >>> sequence_log_ratios(torch.zeros(2), batch)  # (0.5 / 0.25)^2
      tensor([1.3863])
    """
    if batch.ref_log_odds is None:
        raise ValueError("batch.ref_log_odds: expected the log-odds of the reference for this objective, got None.")
    logps = sequence_logps(log_odds, batch)
    return logps - sequence_logps(batch.ref_log_odds.detach().to(logps.dtype), batch)


def pair_logps(log_odds: Float[Tensor, " tokens"], batch: TokenBatch) -> PairLogps:
    """What pairwise objectives and their constraints need of each pair: sequence log-likelihoods and lengths.

    The same numbers from full logits: `bnf_core.reference.pair_logps`.

    Args:
      log_odds: l of each response token under the policy. Differentiable.
      batch: needs `pair`; `ref_log_odds` fills in the reference's side.

    Returns:
      Float64 for float64 log-odds, else float32.

    Raises:
      ValueError: wrong shape, dtype or device, or responses that are not in pairs of one label each.

    Example:
      >>> import torch
      >>> batch = TokenBatch(torch.tensor([0, 0, 1]), torch.tensor([True, False]), pair=torch.tensor([0, 0]))
      >>> pair_logps(torch.zeros(3), batch).means
      (tensor([-0.6931]), tensor([-0.6931]))
    """
    chosen, rejected = batch.pairs()
    logps = sequence_logps(log_odds, batch)
    lengths = batch.lengths.to(logps.dtype)
    ref = None if batch.ref_log_odds is None else sequence_logps(batch.ref_log_odds.detach().to(logps.dtype), batch)
    return PairLogps(
        logps[chosen],
        logps[rejected],
        None if ref is None else ref[chosen],
        None if ref is None else ref[rejected],
        lengths[chosen],
        lengths[rejected],
    )
