"""Objectives: pure functions (log_odds, batch) -> loss per response. They see no vocabulary and no model."""

from collections.abc import Callable

from torch import Tensor

from bnf_core.batch import TokenBatch
from bnf_core.objectives.bnf import bnf, bnf_weight

__all__ = ["OBJECTIVES", "Objective", "bnf", "bnf_weight"]

Objective = Callable[[Tensor, TokenBatch], Tensor]

OBJECTIVES: dict[str, Objective] = {"bnf": bnf}
