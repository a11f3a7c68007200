"""The bidirectional negative feedback (BNF) loss: definitions, fast paths, objectives.

The paper, readable    reference: eqs. 4, 5, 6, 8, 9, and T1, on full logits
The log-odds head      linear_log_odds (never holds the logits), token_log_odds (from logits)
In one pass            linear_bnf_loss, linear_token_loss (any loss of a token's log-odds)
What that will hold    head_workspace (bytes, from shapes alone)
What a device can      multiplies (a dtype faster than its float32 copies)
The batch              TokenBatch; sequence_logps, pair_logps
BNF                    bnf, bnf_one_sided, bnf_binary (T2), bnf_weight, bnf_target
The family             weights: what a gradient is multiplied by, of BNF and of a dozen others; weighted: an objective from any
Every objective        OBJECTIVES by name (PAIRWISE: those with one loss per pair)
One of your own        objective (a decorator that says what it is), objective_spec (what it said)
Every constraint       constraints: C_w, C_l of each objective in closed form
What training moved    analysis: shifts of log-likelihoods and logits, Gini, percentile bins (figures 3, 4), displacement
"""

from bnf_core import analysis, constraints, reference
from bnf_core.batch import PairLogps, TokenBatch, pair_logps, sequence_logps
from bnf_core.fused import linear_bnf_loss
from bnf_core.head import head_workspace, linear_log_odds, linear_token_loss, multiplies, token_log_odds
from bnf_core.objectives import (
    OBJECTIVES,
    PAIRWISE,
    Objective,
    ObjectiveSpec,
    bnf,
    bnf_binary,
    bnf_one_sided,
    bnf_target,
    bnf_weight,
    objective,
    objective_spec,
    weighted,
    weights,
)

__version__ = "0.1.0"

__all__ = [
    "OBJECTIVES",
    "PAIRWISE",
    "Objective",
    "ObjectiveSpec",
    "PairLogps",
    "TokenBatch",
    "analysis",
    "bnf",
    "bnf_binary",
    "bnf_one_sided",
    "bnf_target",
    "bnf_weight",
    "constraints",
    "head_workspace",
    "linear_bnf_loss",
    "linear_log_odds",
    "linear_token_loss",
    "multiplies",
    "objective",
    "objective_spec",
    "pair_logps",
    "reference",
    "sequence_logps",
    "token_log_odds",
    "weighted",
    "weights",
]
