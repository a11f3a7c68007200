"""What metrics are made of: numbers per response, and what they are averaged over. `bnf_train.training.metrics` names them.

A quantity is a function of a micro-batch. Its values are summed over the tokens of each response, so that what is kept of a
response is a few numbers. A `Fraction` is a numerator and a denominator, both sums over responses.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from bnf_core import TokenBatch, bnf_weight, sequence_logps


@dataclass(frozen=True)
class Scored:
    """A micro-batch after its forward pass, without gradient.

    Attributes:
      log_odds: (tokens,) of the policy, in nats.
      batch: which response each token belongs to, with the reference's log-odds and the policy's entropy.
      losses: one loss per response; one per pair if `pairwise`.
      in_pair: (responses,) bool, whether the response's row has a second response.
      pairwise: whether the objective has one loss per pair.
    """

    log_odds: Tensor
    batch: TokenBatch
    losses: Tensor
    in_pair: Tensor
    pairwise: bool = False

    @property
    def ref_log_odds(self) -> Tensor:
        assert self.batch.ref_log_odds is not None
        return self.batch.ref_log_odds

    @property
    def rows_of_losses(self) -> Tensor:
        """The response that each loss is counted on: a pair's loss on its preferred side."""
        return self.batch.pairs()[0] if self.pairwise else torch.arange(len(self.losses), device=self.losses.device)


Quantity = Callable[[Scored], Tensor]


# --- quantities: (responses,), sums over the tokens of each response; only `log_ratio` is (tokens,) ----------------------


def responses(scored: Scored) -> Tensor:
    """1 for each response."""
    return torch.ones_like(scored.batch.preferred, dtype=scored.losses.dtype)


def tokens(scored: Scored) -> Tensor:
    """|y|, the number of response tokens."""
    return scored.batch.lengths


def paired(scored: Scored) -> Tensor:
    """1 for a response of a pair, else 0."""
    return scored.in_pair


def losses(scored: Scored) -> Tensor:
    """The number of losses counted on the response: 1; with one loss per pair 1 on its preferred side, 0 on the other."""
    return torch.zeros_like(responses(scored)).index_fill(0, scored.rows_of_losses, 1)


def loss(scored: Scored) -> Tensor:
    """The objective's loss. Nats for BNF."""
    return torch.zeros_like(responses(scored)).index_copy(0, scored.rows_of_losses, scored.losses)


def logp(scored: Scored) -> Tensor:
    """log pi(y | x) = sum_t log sigmoid(l_t), nats."""
    return sequence_logps(scored.log_odds, scored.batch)


def logp_shift(scored: Scored) -> Tensor:
    """log pi(y | x) - log pi_ref(y | x), nats: how far training moved the response. Times beta it is the reward."""
    return logp(scored) - sequence_logps(scored.ref_log_odds, scored.batch)


def weight(scored: Scored) -> Tensor:
    """sum_t w_t, w = min(1, odds(pi) / odds(pi_ref)): the share of its gradient that BNF leaves a token."""
    return scored.batch.sum(bnf_weight(scored.log_odds, scored.ref_log_odds))


def clipped(scored: Scored) -> Tensor:
    """Number of tokens whose odds are above the reference's: there the min in w (eq. 6) is at work."""
    return scored.batch.sum((scored.log_odds > scored.ref_log_odds).to(scored.log_odds.dtype))


def fallen(scored: Scored) -> Tensor:
    """Number of tokens whose likelihood is below the reference's; a tie is no fall. See `bnf_core.analysis.displacement`."""
    return scored.batch.sum((scored.log_odds < scored.ref_log_odds).to(scored.log_odds.dtype))


def entropy(scored: Scored) -> Tensor:
    """sum_t H(pi(. | x, y_<t)), nats."""
    assert scored.batch.entropy is not None
    return scored.batch.sum(scored.batch.entropy)


def log_ratio(scored: Scored) -> Tensor:
    """(tokens,) log pi_t - log pi_ref_t, nats."""
    return F.logsigmoid(scored.log_odds) - F.logsigmoid(scored.ref_log_odds)


# --- the measured responses ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Responses:
    """What is kept of the responses of one or more micro-batches. The two responses of a pair are neighbours.

    Attributes:
      summed: the quantities whose sums are kept.
      sums: (responses, summed).
      preferred: (responses,) bool.
      per_token: the quantities of which every token's value is kept.
      token_values: (tokens, per_token).
      token_preferred: (tokens,) bool.
    """

    summed: Sequence[Quantity]
    sums: Tensor
    preferred: Tensor
    per_token: Sequence[Quantity]
    token_values: Tensor
    token_preferred: Tensor

    def __getitem__(self, quantity: Quantity) -> Tensor:
        return self.sums[:, self.summed.index(quantity)]

    def of(self, preferred: bool) -> "Responses":
        """Those of one label."""
        of_label, tokens_of_label = self.preferred == preferred, self.token_preferred == preferred
        return replace(
            self,
            sums=self.sums[of_label],
            preferred=self.preferred[of_label],
            token_values=self.token_values[tokens_of_label],
            token_preferred=self.token_preferred[tokens_of_label],
        )

    def sides(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """`values` (one per response) of the preferred and of the dispreferred side of each pair."""
        in_pair = self[paired] > 0
        return values[in_pair & self.preferred], values[in_pair & ~self.preferred]


@torch.no_grad()
def measure(scored: Scored, summed: Sequence[Quantity], per_token: Sequence[Quantity]) -> Responses:
    """These quantities of a micro-batch."""
    preferred = scored.batch.preferred
    return Responses(
        summed,
        torch.stack([quantity(scored).to(scored.losses.dtype) for quantity in summed], dim=1),
        preferred,
        per_token,
        torch.stack([quantity(scored) for quantity in per_token], dim=1),
        preferred[scored.batch.response],
    )


def joined(parts: Sequence[Responses]) -> Responses:
    """The responses of consecutive micro-batches."""
    return replace(
        parts[0],
        sums=torch.cat([part.sums for part in parts]),
        preferred=torch.cat([part.preferred for part in parts]),
        token_values=torch.cat([part.token_values for part in parts]),
        token_preferred=torch.cat([part.token_preferred for part in parts]),
    )


# --- what a quantity is averaged over ------------------------------------------------------------------------------------


Fraction = tuple[Tensor, Tensor]  # numerator and denominator
Over = Callable[[Responses, Quantity], Fraction]


def per_token(of: Responses, quantity: Quantity) -> Fraction:
    """Mean over tokens."""
    return of[quantity].sum(), of[tokens].sum()


def per_response(of: Responses, quantity: Quantity) -> Fraction:
    """Mean over responses."""
    return of[quantity].sum(), of[responses].sum()


def per_loss(of: Responses, quantity: Quantity) -> Fraction:
    """Mean over losses: over responses, or over pairs where the objective has one loss per pair."""
    return of[quantity].sum(), of[losses].sum()


def per_pair(of: Responses, quantity: Quantity) -> Fraction:
    """Mean over pairs of (preferred - dispreferred)."""
    chosen, rejected = of.sides(of[quantity])
    return (chosen - rejected).sum(), _count(chosen)


def pairs_won(of: Responses, quantity: Quantity) -> Fraction:
    """Share of the pairs in which the preferred response has more."""
    chosen, rejected = of.sides(of[quantity])
    return _count(chosen[chosen > rejected]), _count(chosen)


def pairs_won_per_token(of: Responses, quantity: Quantity) -> Fraction:
    """Share of the pairs in which the preferred response has more per token."""
    chosen, rejected = of.sides(of[quantity] / of[tokens])
    return _count(chosen[chosen > rejected]), _count(chosen)


def total(of: Responses, quantity: Quantity) -> Fraction:
    """The sum itself, a whole number. The denominator only says whether there are responses."""
    return of[quantity].sum(), of[responses].sum()


@dataclass(frozen=True)
class ExpQuantile:
    """exp of the quantile over tokens at `share`. Over several processes it is added up as the mean of theirs, so each is
    to hold the tokens of all."""

    share: float

    def __call__(self, of: Responses, quantity: Quantity) -> Fraction:
        values = of.token_values[:, of.per_token.index(quantity)]
        values = values[:: -(-len(values) // 2**20) or 1]  # evenly spread: torch.quantile does not take many more
        value = values.quantile(self.share).exp() if len(values) else values.new_tensor(torch.nan)
        return value.nan_to_num(0, 0, 0), value.isfinite().to(value.dtype)


def _count(values: Tensor) -> Tensor:
    return values.new_tensor(len(values))
