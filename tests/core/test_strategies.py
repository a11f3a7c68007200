"""The strategies reach the corners that the properties are about."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, Phase, find, settings
from strategies import PairCase, Responses, pair_cases, responses

from bnf_core import token_log_odds

SETTINGS = settings(
    max_examples=5000,
    phases=[Phase.generate],  # one example is enough, the smallest is not needed
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)


def odds(case: Responses, which: str = "logits") -> torch.Tensor:
    return token_log_odds(getattr(case, which)[case.mask], case.labels[case.mask])[0]


CORNERS: dict[str, Callable[[Responses], bool]] = {
    "one-token vocabulary": lambda c: c.logits.shape[-1] == 1,
    "two-token vocabulary": lambda c: c.logits.shape[-1] == 2,
    "token ruled out": lambda c: bool(c.logits[c.mask].isneginf().any()),
    "nothing else possible": lambda c: bool(odds(c).isposinf().any()) and c.logits.shape[-1] > 1,
    "tie at the target": lambda c: bool((odds(c) == 0).any()),
    "saturated at 1": lambda c: bool((odds(c).sigmoid() == 1).any() and odds(c).isfinite().all()),
    "saturated at 0": lambda c: bool((odds(c) < -100).any()),
    "likelihood underflows": lambda c: bool((odds(c).exp() == 0).any()),
    "one-token response": lambda c: bool((c.mask.sum(-1) == 1).any()),
    "padding": lambda c: bool((~c.mask).any()),
    "hole inside a response": lambda c: any(m == [True, False, True] for row in c.mask.tolist() for m in zip_windows(row)),
    "both labels": lambda c: bool(c.preferred.any() and not c.preferred.all()),
    "all dispreferred": lambda c: len(c.preferred) > 1 and not bool(c.preferred.any()),
    "policy is reference": lambda c: torch.equal(c.logits, c.ref_logits) and c.logits.numel() > 4,
    "policy near reference": lambda c: bool(0 < (odds(c) - odds(c, "ref_logits")).abs().max() < 2e-3),
    "policy far above reference": lambda c: bool((odds(c) - odds(c, "ref_logits") > 200).any()),
    "policy far below reference": lambda c: bool((odds(c) - odds(c, "ref_logits") < -200).any()),
}


def zip_windows(row: list[bool]) -> list[list[bool]]:
    return [row[i : i + 3] for i in range(len(row) - 2)]


@pytest.mark.parametrize("corner", CORNERS.values(), ids=CORNERS)
def test_responses_reach(corner: Callable[[Responses], bool]) -> None:
    assert corner(find(responses(), corner, settings=SETTINGS))


PAIR_CORNERS: dict[str, Callable[[PairCase], bool]] = {
    "several pairs out of order": lambda c: c.batch.pair.tolist() != sorted(c.batch.pair.tolist()),  # type: ignore[union-attr]
    "rejected side first": lambda c: not bool(c.batch.preferred[0]),
    "unequal lengths": lambda c: bool(c.batch.lengths.unique().numel() > 1),
    "hopeless token": lambda c: bool((c.log_odds < -20).any()),
    "certain token": lambda c: bool((c.log_odds > 15).any()),
}


@pytest.mark.parametrize("corner", PAIR_CORNERS.values(), ids=PAIR_CORNERS)
def test_pairs_reach(corner: Callable[[PairCase], bool]) -> None:
    assert corner(find(pair_cases(), corner, settings=SETTINGS))
