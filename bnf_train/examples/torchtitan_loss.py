"""BNF as a loss of torchtitan's RL trainer, without logits (signature of torchtitan 0.3.0). With this folder on PYTHONPATH,
`from torchtitan_loss import BNFLoss`, and in place of ChunkedLossWrapper.Config(loss_fn=GRPOLoss.Config()):

PolicyTrainer.Config(loss=BNFLoss.Config(), ...)

The policy's log-odds come from hidden states and the head, with six digits at every pi; those of the generator from its
log-probabilities: off by about 1e-6 / (1 - pi) nats in float32, infinite from pi = 0.999 where computed in bfloat16.
"""

from dataclasses import dataclass
from unittest.mock import patch

from torch.distributed.tensor import DTensor
from torchtitan.components.loss import ChunkedLossWrapper

from bnf_core import bnf_weight, linear_bnf_loss


class BNFLoss(ChunkedLossWrapper):  # of these the trainer leaves out the head in forward, and hands it over
    @dataclass(kw_only=True, slots=True)
    class Config(ChunkedLossWrapper.Config):
        pass

    def __call__(self, pred, labels, global_valid_tokens=None, *, generator_logprobs, advantages, loss_mask):
        """pred (..., dim) hidden states, all others (...): A w NLL, summed over the tokens that count, over their number."""
        counts = loss_mask & generator_logprobs.isfinite()
        logp = generator_logprobs[counts].double().clamp(max=0)  # rounding may have put it above 0
        ref_log_odds, tokens = logp - (-logp.expm1()).log(), max(global_valid_tokens or 1, 1)

        def loss_of(hidden):
            head = self.lm_head.weight
            if isinstance(head, DTensor) or len(head) < self.lm_head.out_features:
                raise ValueError("lm_head.weight: BNFLoss needs all of it; use parallelism.tensor_parallel_degree=1.")
            return linear_bnf_loss(hidden[counts], head, labels[counts], ref_log_odds, advantages[counts] / tokens)

        with patch.object(self.lm_head, "forward", loss_of):  # called as the head: FSDP's hooks gather and reduce its weight
            loss, log_odds, entropy = self.lm_head(pred)
        weight = bnf_weight(log_odds, ref_log_odds.to(log_odds.dtype))
        return loss, {"bnf/weight/mean": weight.sum() / tokens, "trainer/entropy/mean": entropy.sum() / tokens}
