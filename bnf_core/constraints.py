"""The constraint functions: what multiplies each response's log-likelihood gradient (eq. 3, table 2), in closed form.

    grad L = -C_w grad log pi(y_w) + C_l grad log pi(y_l)     per pair, log pi(y) the sum over response tokens.

They are functions of the sequence log-likelihoods alone, so they come from full logits
(`bnf_core.reference.pair_logps`) or, never holding them, from the log-odds head (`bnf_core.pair_logps`):

    C_w, C_l = dpo_constraint(pair_logps(log_odds, batch), beta=0.1)

CONSTRAINTS has those of pairs by the objective's name. BNF and the family have one per token or per response instead:
`bnf_weight` and `bnf_core.weights`. Each stands beside its loss in `bnf_core.objectives`; `objective_spec(loss).constraint` is
the way from one to the other.
"""

from bnf_core.objectives import CONSTRAINTS
from bnf_core.objectives.dpo import (
    bdpo_constraint,
    bnf_contrastive_constraint,
    dpo_constraint,
    dpop_constraint,
    ipo_avg_constraint,
    ipo_constraint,
    r_dpo_constraint,
    rpo_constraint,
)
from bnf_core.objectives.kto import kto_constraint
from bnf_core.objectives.likelihood import log_likelihood_constraint, nll_pll_constraint
from bnf_core.objectives.margin import orpo_constraint, simpo_constraint, slic_hf_constraint

__all__ = [
    "CONSTRAINTS",
    "bdpo_constraint",
    "bnf_contrastive_constraint",
    "dpo_constraint",
    "dpop_constraint",
    "ipo_avg_constraint",
    "ipo_constraint",
    "kto_constraint",
    "log_likelihood_constraint",
    "nll_pll_constraint",
    "orpo_constraint",
    "r_dpo_constraint",
    "rpo_constraint",
    "simpo_constraint",
    "slic_hf_constraint",
]
