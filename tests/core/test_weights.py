"""What each token counts: `TokenBatch.weight`, for every objective."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor

from bnf_core import OBJECTIVES, TokenBatch, objective_spec, pair_logps, sequence_logps

RESPONSE = torch.tensor([0, 0, 0, 1, 1, 2, 3, 3])
every_objective = pytest.mark.parametrize("name", sorted(OBJECTIVES))


def case(weight: Tensor | None = None) -> tuple[Tensor, TokenBatch]:
    draw = torch.Generator().manual_seed(0)
    log_odds, ref = torch.randn(2, len(RESPONSE), dtype=torch.float64, generator=draw)
    labels, entropy = torch.tensor([True, False, True, False]), torch.rand(len(RESPONSE), dtype=torch.float64, generator=draw)
    pair = torch.tensor([0, 0, 1, 1])
    z0 = torch.tensor(0.5, dtype=torch.float64)
    batch = TokenBatch(RESPONSE, labels, pair, ref_log_odds=ref, entropy=entropy, weight=weight, z0=z0)
    return log_odds.requires_grad_(), batch


def loss_and_gradient(name: str, log_odds: Tensor, batch: TokenBatch) -> tuple[Tensor, Tensor]:
    losses = OBJECTIVES[name](log_odds, batch)
    (gradient,) = torch.autograd.grad(losses.sum(), log_odds)
    return losses.detach(), gradient


@every_objective
def test_a_weight_of_1_is_none(name: str) -> None:
    expected = loss_and_gradient(name, *case())
    for one, other in zip(loss_and_gradient(name, *case(torch.ones(len(RESPONSE)))), expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("infinite", [False, True])
def test_a_weight_of_0_is_a_token_left_out_but_for_the_length(infinite: bool) -> None:
    weight = torch.tensor([1.0, 0, 1, 1, 0, 1, 1, 1])
    log_odds, batch = case(weight)
    if infinite:
        log_odds = log_odds.detach().masked_fill(weight == 0, -torch.inf).requires_grad_()
    kept = weight > 0
    few = replace(
        batch, response=RESPONSE[kept], ref_log_odds=batch.ref_log_odds[kept], entropy=batch.entropy[kept], weight=None
    )
    torch.testing.assert_close(sequence_logps(log_odds, batch), sequence_logps(log_odds[kept], few))
    assert torch.equal(batch.lengths, RESPONSE.bincount())
    torch.testing.assert_close(batch.mean(log_odds) * batch.lengths, few.mean(log_odds[kept]) * few.lengths)
    for name in ("bnf", "bnf_binary", "log_likelihood"):
        losses, gradient = loss_and_gradient(name, log_odds, batch)
        expected, of_kept = loss_and_gradient(name, log_odds[kept], few)
        torch.testing.assert_close(losses * batch.lengths, expected * few.lengths)
        torch.testing.assert_close(gradient[kept], of_kept * (few.lengths / batch.lengths)[few.response])
        assert not gradient[~kept].any()
    for name in ("dpo", "nll_pll", "slic_hf", "kto"):  # of sums, in which no length is
        one, other = loss_and_gradient(name, log_odds, batch), loss_and_gradient(name, log_odds[kept], few)
        torch.testing.assert_close(one[0], other[0])
        torch.testing.assert_close(one[1][kept], other[1])


@pytest.mark.parametrize("name", ["bnf", "bnf_binary", "log_likelihood", "nll_pll"])
def test_losses_are_linear_in_the_weights(name: str) -> None:
    first, second = torch.rand(2, len(RESPONSE), dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    parts = [loss_and_gradient(name, *case(weight)) for weight in (first, second, first + 3 * second)]
    for one, other, together in zip(*parts, strict=True):
        torch.testing.assert_close(together, one + 3 * other)


@pytest.mark.parametrize("name", [name for name in sorted(OBJECTIVES) if objective_spec(OBJECTIVES[name]).per == "pair"])
def test_a_pairs_constraint_is_times_the_weight(name: str) -> None:
    weight = torch.tensor([1.0, 0.5, 2, 1, 0.25, 3, 1, 0])
    log_odds, batch = case(weight)
    constraint = objective_spec(OBJECTIVES[name]).constraint
    assert constraint is not None
    _, gradient = loss_and_gradient(name, log_odds, batch)
    with torch.no_grad():
        if name == "bnf_contrastive":
            of_token = constraint(log_odds, batch)
        else:
            chosen, rejected = batch.pairs()
            of_response = torch.zeros(batch.responses, dtype=torch.float64)
            of_response[chosen], of_response[rejected] = constraint(pair_logps(log_odds, batch))
            of_token = of_response[batch.response] * weight
        expected = -batch.sign[batch.response] * of_token * torch.sigmoid(-log_odds)
    torch.testing.assert_close(gradient, expected)


def test_one_pass_through_the_head_counts_the_same() -> None:
    log_odds, batch = case(torch.tensor([1.0, 0.5, 2, 1, 0, 3, 1, 1]))
    spec = objective_spec(partial(OBJECTIVES["bnf_binary"]))
    values = spec.weighted_token_loss(log_odds, *spec.per_token(batch, 0.25))
    torch.testing.assert_close(values.sum(), OBJECTIVES["bnf_binary"](log_odds, batch).sum() / 4)


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (torch.tensor([1.0, -1, 1, 1, 1, 1, 1, 1]), r"weight: expected finite numbers from 0, got -1.0 at position \[1\]"),
        (torch.tensor([1.0, torch.inf, 1, 1, 1, 1, 1, 1]), "expected finite numbers from 0, got inf"),
        (torch.tensor([1.0, 1, 1, 0, 0, 1, 1, 1]), "expected a token above 0 in every response, got none in row 1"),
    ],
)
def test_what_is_no_weight_is_refused(weight: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        case(weight)
