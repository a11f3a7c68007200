"""TokenBatch: which response each token belongs to, and what an objective may know of it."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from bnf_core._checks import check_bool, check_floating, check_same_device, describe

__all__ = ["TokenBatch"]


@dataclass(frozen=True)
class TokenBatch:
    """The response tokens of some responses, as flat vectors: no padding, no prompt, no vocabulary.

    Args:
      response: (tokens,) index of the response that each token belongs to, from 0 to responses - 1, in any order.
      preferred: (responses,) bool, the label of each response.
      pair: (responses,) id of the pair that each response is a side of, -1 where it has none; None: no pairs.
      ref_log_odds: (tokens,) log-odds of each token under the reference model, in nats; None where none is needed.
      entropy: (tokens,) entropy of the policy at each token, in nats, a constant; None: losses leave the term out.

    Raises:
      ValueError: wrong shape, dtype or device, or a response without a token (named by its row).

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

    def __post_init__(self) -> None:
        for name in ("response", "pair"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, Tensor) or value.dtype not in (torch.int32, torch.int64)):
                raise ValueError(f"{name}: expected an int32 or int64 tensor, got {describe(value)}.")
        if self.response.dim() != 1:
            raise ValueError(f"response: expected shape (tokens,), got {describe(self.response)}.")
        responses = self.preferred.shape[0] if isinstance(self.preferred, Tensor) and self.preferred.dim() else 0
        check_bool("preferred", self.preferred, (responses,))
        if self.pair is not None and tuple(self.pair.shape) != (responses,):
            raise ValueError(f"pair: expected shape {(responses,)}, one per response, got {describe(self.pair)}.")
        for name in ("ref_log_odds", "entropy"):
            if (value := getattr(self, name)) is not None:
                check_floating(name, value, tuple(self.response.shape))
        check_same_device(**vars(self))
        if self.response.numel() and not 0 <= int(self.response.min()) <= int(self.response.max()) < responses:
            raise ValueError(f"response: expected indices from 0 to {responses - 1}, got {self.response.tolist()}.")
        if (empty := (self.lengths == 0).nonzero()).numel():
            raise ValueError(f"response: expected at least one token in every response, got none in row {int(empty[0])}.")

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
        """Sum over the tokens of each response."""
        return values.new_zeros(self.responses).index_add(0, self.response, values)

    def mean(self, values: Float[Tensor, " tokens"]) -> Float[Tensor, " responses"]:
        """Mean over the tokens of each response."""
        return self.sum(values) / self.lengths
