"""Objectives: pure functions (log_odds, batch) -> loss per response or pair. They see no vocabulary and no model.

Losses are float64 for float64 log-odds, else float32, whatever narrower dtype those come in; gradients are in theirs.
"""

from collections.abc import Callable

from torch import Tensor

from bnf_core.objectives.bnf import bnf, bnf_binary, bnf_target, bnf_weight
from bnf_core.objectives.likelihood import log_likelihood, nll_pll
from bnf_core.objectives.pairwise import bnf_contrastive, dpo, dpop, ipo, orpo, r_dpo, simpo, slic_hf
from bnf_core.objectives.unpaired import kto

__all__ = ["OBJECTIVES", "PAIRWISE", "UNPAIRED", "Objective", "bnf", "bnf_binary", "bnf_target", "bnf_weight"]

Objective = Callable[..., Tensor]  # (log_odds, batch, *, hyper-parameters) -> (responses,) or (pairs,)

# one loss per response
UNPAIRED: dict[str, Objective] = {"bnf": bnf, "bnf_binary": bnf_binary, "kto": kto, "log_likelihood": log_likelihood}
# one loss per pair
PAIRWISE: dict[str, Objective] = {
    "bnf_contrastive": bnf_contrastive,
    "dpo": dpo,
    "dpop": dpop,
    "ipo": ipo,
    "nll_pll": nll_pll,
    "orpo": orpo,
    "r_dpo": r_dpo,
    "simpo": simpo,
    "slic_hf": slic_hf,
}
OBJECTIVES: dict[str, Objective] = UNPAIRED | PAIRWISE
