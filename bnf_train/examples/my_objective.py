"""An objective of your own in bnf_train; keyword-only parameters are flags:

python -m bnf_train --objective bnf_train/examples/my_objective.py:weighted_bnf --dispreferred_weight 0.5
"""

import torch
from torch import Tensor

from bnf_core import TokenBatch, bnf


def weighted_bnf(log_odds: Tensor, batch: TokenBatch, *, dispreferred_weight: float = 0.5) -> Tensor:
    """BNF's loss of each response, dispreferred ones counting less: for data with many more of them.

    log_odds (tokens,) are the policy's; `batch` says which response each token belongs to, which responses are preferred,
    and has the reference's log-odds. bnf_train takes the mean over the responses of each optimizer step.
    """
    return bnf(log_odds, batch) * torch.where(batch.preferred, 1.0, dispreferred_weight)
