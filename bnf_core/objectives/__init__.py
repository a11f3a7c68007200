"""Objectives: pure functions (log_odds, batch) -> loss per response or pair. They see no vocabulary and no model.

Losses are float64 for float64 log-odds, else float32, whatever narrower dtype those come in; gradients are in theirs.
Each says what it is (`registry.objective`), and that fills in the tables; importing its file here is all that lists it.
"""

from bnf_core.objectives import weights
from bnf_core.objectives.bnf import bnf, bnf_binary, bnf_constraint, bnf_one_sided, bnf_target, bnf_weight
from bnf_core.objectives.dpo import bdpo, bnf_contrastive, dpo, dpop, ipo, ipo_avg, r_dpo, rpo
from bnf_core.objectives.family import (
    cispo,
    dppo_tv,
    npo,
    ppo_clip,
    sapo,
    satimp,
    sim_npo,
    tnpo,
    topr,
    unlikelihood,
    w_reinforce,
    wga,
)
from bnf_core.objectives.kto import kto, kto_fixed
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
from bnf_core.objectives.weights import weighted

__all__ = [
    "CONSTRAINTS",
    "OBJECTIVES",
    "PAIRWISE",
    "UNPAIRED",
    "Objective",
    "ObjectiveSpec",
    "bdpo",
    "bnf",
    "bnf_binary",
    "bnf_constraint",
    "bnf_contrastive",
    "bnf_one_sided",
    "bnf_target",
    "bnf_weight",
    "cispo",
    "dpo",
    "dpop",
    "dppo_tv",
    "ipo",
    "ipo_avg",
    "kto",
    "kto_fixed",
    "log_likelihood",
    "nll_pll",
    "npo",
    "objective",
    "objective_spec",
    "orpo",
    "ppo_clip",
    "r_dpo",
    "rpo",
    "sapo",
    "satimp",
    "sim_npo",
    "simpo",
    "slic_hf",
    "tnpo",
    "topr",
    "unlikelihood",
    "w_reinforce",
    "weighted",
    "weights",
    "wga",
]
