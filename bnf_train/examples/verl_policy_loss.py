"""BNF as a policy loss of verl, by `register_policy_loss` (signature of verl 0.9.1). With this folder on PYTHONPATH:

python -m verl.trainer.main_ppo ... actor_rollout_ref.model.external_lib=verl_policy_loss \
  actor_rollout_ref.actor.policy_loss.loss_mode=bnf actor_rollout_ref.actor.loss_agg_mode=seq-mean-token-mean

The reference is the policy of `old_log_prob`, the only one that verl hands to a policy loss: in the first update on a batch
every weight is 1. `algorithm.rollout_correction.bypass_mode=true` puts another loss in this one's place.

verl hands log-probabilities. The log-odds that they give are off by about 1e-6 / (1 - pi) nats in float32 (two digits of the
weight at pi = 0.9999, none from 0.999999), and are infinite from pi = 0.999 where log pi was computed in bfloat16. A head
that gives log-odds, as `bnf_core.linear_log_odds`, keeps six digits at every pi.
"""

from verl.trainer.ppo.core_algos import agg_loss, register_policy_loss

from bnf_core import bnf_weight


def log_odds(logp):
    logp = logp.detach().double().clamp(max=0)  # rounding may have put it above 0
    return logp - (-logp.expm1()).log()


@register_policy_loss("bnf")
def bnf_policy_loss(
    old_log_prob, log_prob, advantages, response_mask, loss_agg_mode="token-mean", config=None, rollout_is_weights=None
):
    """-A w log pi of each token, w = min(1, odds(pi) / odds(pi_old)) a constant; all (responses, tokens).

    "seq-mean-token-mean" is the mean of eq. 4, over the tokens of each response and then over responses.
    """
    weight = bnf_weight(log_odds(log_prob), log_odds(old_log_prob)).to(advantages.dtype)
    losses = -advantages * weight * log_prob
    if rollout_is_weights is not None:
        losses = losses * rollout_is_weights
    loss = agg_loss(losses, response_mask, loss_agg_mode, **(config.global_batch_info if config is not None else {}))
    mean_weight = (weight * response_mask).sum() / response_mask.sum().clamp(min=1)
    return loss, {"actor/bnf_weight": mean_weight.item()}
