"""How many answers are right: per group of prompts, with 95 % intervals over prompts.

To each prompt there is one greedy answer and n sampled ones, and a check says how right each is, 0 to 1. Of a prompt are made:

    greedy    how right the greedy answer is
    sampled   the mean of the sampled ones
    pass@k    how right the best of k samples is, in expectation. Where answers are right (c of n) or wrong, that is the
              unbiased estimator of Chen et al. (2021), 1 - C(n - c, k) / C(n, k)

The value of a group is the mean over its prompts, its interval the percentile bootstrap over them.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

import numpy as np

RESAMPLES = 1000
GREEDY, SAMPLED = "greedy", "sampled"
ALL = "all"  # the group of rows without one
Interval = dict[str, float]  # value, low, high

# 97.5 % quantiles of Student's t with 1, 2, … degrees of freedom
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120,
           2.110, 2.101, 2.093, 2.086)  # fmt: skip


@dataclass(frozen=True)
class Asked:
    """The answers to one prompt: the greedy one, then the samples.

    Attributes:
      right: how right each answer is, 0 to 1.
      tokens: its length, the end-of-turn token counted.
      cut: whether it was cut before one came.
      answers: its text.
    """

    right: list[float]
    tokens: list[int]
    cut: list[bool]
    answers: list[str]


def pass_at_k(right: Sequence[float], k: int) -> float:
    """Expected value of the best of k answers, drawn from these without replacement.

    Raises:
      ValueError: k is not from 1 to the number of answers.

    Example:
      >>> pass_at_k([1, 0, 0, 0], 2)  # 1 - C(3, 2) / C(4, 2)
      0.5
    """
    if not 1 <= k <= len(right):
        raise ValueError(f"k: expected a number from 1 to the {len(right)} answers, got {k}")
    subsets = math.comb(len(right), k)
    # the i-th smallest is the best of C(i, k - 1) subsets of those not larger
    return sum(value * math.comb(i, k - 1) for i, value in enumerate(sorted(right))) / subsets


def bootstrap(values: Sequence[float], seed: int) -> Interval:
    """The mean and its 95 % interval: percentiles of the means of 1,000 resamples.

    >>> bootstrap([1.0, 1.0, 1.0], seed=0)
    {'value': 1.0, 'low': 1.0, 'high': 1.0}
    """
    found = np.asarray(values, dtype=np.float64)
    draws = np.random.default_rng(seed).integers(0, len(found), (RESAMPLES, len(found)))
    low, high = np.percentile(found[draws].mean(axis=1), [2.5, 97.5])
    return {"value": float(found.mean()), "low": float(low), "high": float(high)}


def student(values: Sequence[float]) -> tuple[float, float]:
    """95 % interval of the mean of a few values, such as those of seeds, by Student's t.

    >>> [round(edge, 3) for edge in student([0.7, 0.8, 0.9])]
    [0.552, 1.048]
    """
    degrees = len(values) - 1
    quantile = STUDENT[degrees - 1] if degrees <= len(STUDENT) else 1.96 + 2.5 / degrees  # 3 digits
    reach = quantile * stdev(values) / math.sqrt(len(values))
    return fmean(values) - reach, fmean(values) + reach


def of_prompt(asked: Asked) -> dict[str, float]:
    """What is made of the answers to one prompt."""
    greedy, sampled = asked.right[0], asked.right[1:]
    values = {GREEDY: greedy}
    if sampled:
        values[SAMPLED] = fmean(sampled)
        values |= {f"pass@{k}": pass_at_k(sampled, k) for k in _powers(len(sampled))}
    for name, part in ((GREEDY, slice(0, 1)), (SAMPLED, slice(1, None))):
        if asked.right[part]:
            values[f"{name}_tokens"], values[f"{name}_cut"] = fmean(asked.tokens[part]), fmean(map(float, asked.cut[part]))
    return values


def summary(groups: Sequence[str], asked: Sequence[Asked], seed: int) -> dict[str, dict[str, Any]]:
    """{group: {"prompts", "greedy": {"value", "low", "high"}, "sampled", "pass@1", …}}; groups in alphabetical order.

    Args:
      groups: of each prompt.
      asked: the answers to it.
      seed: of the bootstrap, the same for each number.
    """
    return _summary(groups, [of_prompt(one) for one in asked], seed)


def change(groups: Sequence[str], before: Sequence[Asked], after: Sequence[Asked], seed: int) -> dict[str, dict[str, Any]]:
    """As `summary`, of the differences after - before, prompt by prompt."""
    pairs = [(of_prompt(one), of_prompt(other)) for one, other in zip(before, after, strict=True)]
    return _summary(groups, [{name: then[name] - now[name] for name in now} for now, then in pairs], seed)


def _summary(groups: Sequence[str], values: Sequence[Mapping[str, float]], seed: int) -> dict[str, dict[str, Any]]:
    found = {}
    for group, places in by_group(groups).items():
        names = values[places[0]]
        found[group] = {"prompts": len(places)} | {n: bootstrap([values[i][n] for i in places], seed) for n in names}
    return found


def by_group(groups: Iterable[str]) -> dict[str, list[int]]:
    """Places of each group's prompts; groups in alphabetical order.

    >>> by_group(["b", "a", "b"])
    {'a': [1], 'b': [0, 2]}
    """
    found: dict[str, list[int]] = {}
    for place, group in enumerate(groups):
        found.setdefault(group, []).append(place)
    return dict(sorted(found.items()))


def log_values(found: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """Of a summary, what a log has: right/GROUP/greedy and right/GROUP/sampled."""
    return {
        f"right/{group}/{name}": of[name]["value"] for group, of in found.items() for name in (GREEDY, SAMPLED) if name in of
    }


def _powers(most: int) -> list[int]:
    return [2**i for i in range(most.bit_length())]
