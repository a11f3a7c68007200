"""Objectives: pure functions (log_odds, batch) -> loss per response or pair. They see no vocabulary and no model.

Losses are float64 for float64 log-odds, else float32, whatever narrower dtype those come in; gradients are in theirs.
Each says what it is (`registry.objective`), and that fills in the tables; importing its file here is all that lists it.
"""

from bnf_core.objectives.bnf import bnf, bnf_binary, bnf_target, bnf_weight
from bnf_core.objectives.dpo import bnf_contrastive, dpo, dpop, ipo, r_dpo
from bnf_core.objectives.kto import kto
from bnf_core.objectives.likelihood import log_likelihood, nll_pll
from bnf_core.objectives.margin import orpo, simpo, slic_hf
from bnf_core.objectives.registry import (
    CONSTRAINTS,
    OBJECTIVES,
    PAIRWISE,
    UNPAIRED,
    Objective,
    ObjectiveSpec,
    objective,
    objective_spec,
)

__all__ = [
    "CONSTRAINTS",
    "OBJECTIVES",
    "PAIRWISE",
    "UNPAIRED",
    "Objective",
    "ObjectiveSpec",
    "bnf",
    "bnf_binary",
    "bnf_contrastive",
    "bnf_target",
    "bnf_weight",
    "dpo",
    "dpop",
    "ipo",
    "kto",
    "log_likelihood",
    "nll_pll",
    "objective",
    "objective_spec",
    "orpo",
    "r_dpo",
    "simpo",
    "slic_hf",
]
