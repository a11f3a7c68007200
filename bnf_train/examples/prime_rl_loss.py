"""BNF as a custom loss of prime-rl, by import path (signature of 0.8, 2026-08-21). With this folder on PYTHONPATH:

[trainer.loss]
type = "custom"
import_path = "prime_rl_loss.bnf_loss"

prime-rl hands log-probabilities. The log-odds that they give are off by about 1e-6 / (1 - pi) nats in float32 (two digits of
the weight at pi = 0.9999, none from 0.999999), and are infinite from pi = 0.999 where log pi was computed in bfloat16. A head
that gives log-odds, as `bnf_core.linear_log_odds`, keeps six digits at every pi.
"""

from prime_rl.trainer.rl.loss import LossInputs, LossOutputs

from bnf_core import bnf_weight


def log_odds(logp):
    logp = logp.detach().double().clamp(max=0)  # rounding may have put it above 0
    return logp - (-logp.expm1()).log()


def bnf_loss(inputs: LossInputs, reference: str = "inference_logprobs", mean_length: float | None = None) -> LossOutputs:
    """-A w log pi, summed over the tokens of one sequence; prime-rl divides by the tokens of the step.

    w = min(1, odds(pi) / odds(pi_ref)) is a constant. `reference` is "inference_logprobs", the policy that sampled, or
    "ref_logprobs" of an algorithm that scores with a reference model. `mean_length`, about that of your responses, gives each
    response the same say, as eq. 4 does; without it each token has, as in the losses of prime-rl.
    """
    if (ref_logp := getattr(inputs, reference)) is None:
        raise ValueError(f'{reference}: this algorithm scores with no reference model; use reference = "inference_logprobs".')
    mask, logp = inputs.loss_mask, inputs.trainer_logprobs[inputs.loss_mask]
    weight = bnf_weight(log_odds(logp), log_odds(ref_logp[mask])).to(inputs.advantages.dtype)
    losses = -inputs.advantages[mask] * weight * logp
    if inputs.loss_weights is not None:
        losses = losses * inputs.loss_weights[mask]
    length = mask.sum().clamp(min=1)
    loss = losses.sum() if mean_length is None else mean_length * losses.sum() / length
    return LossOutputs(loss=loss, metrics={"bnf_weight": weight.sum() / length})
