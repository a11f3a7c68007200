"""The bidirectional negative feedback (BNF) loss: definitions, fast paths, objectives.

reference          the paper on full logits, readable (eqs. 4, 5, 6, 8, 9)
token_log_odds     log-odds and entropy from full logits
linear_log_odds    the same from hidden states, never holding the logits
bnf_weight, bnf    the token weight, and the objective
TokenBatch         what an objective knows of the responses
OBJECTIVES         every objective by name
"""

from bnf_core import reference
from bnf_core.batch import TokenBatch
from bnf_core.head import linear_log_odds, token_log_odds
from bnf_core.objectives import OBJECTIVES, Objective, bnf, bnf_weight

__version__ = "0.1.0"

__all__ = [
    "OBJECTIVES",
    "Objective",
    "TokenBatch",
    "bnf",
    "bnf_weight",
    "linear_log_odds",
    "reference",
    "token_log_odds",
]
