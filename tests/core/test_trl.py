"""Losses beside TRL's own code, on the same log-probabilities. TRL is no dependency: without it these are skipped."""

import importlib
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from bnf_core import OBJECTIVES, TokenBatch

pytest.importorskip("trl", reason="TRL is no dependency")
LENGTHS = torch.tensor([5, 3])
MASK = torch.arange(5) < LENGTHS[:, None]
PROMPT = 1


def trainer(name: str, **told: Any) -> tuple[Any, Any]:
    """TRL's trainer class, and what its `_compute_loss` reads of itself: one process, and what is told."""
    module = {"DPO": "dpo_trainer", "KTO": "kto_trainer", "GRPO": "grpo_trainer"}[name]
    kind = getattr(importlib.import_module(f"trl.trainer.{module}"), f"{name}Trainer")
    accelerator = MagicMock(num_processes=1, device=torch.device("cpu"))
    accelerator.gather = accelerator.gather_for_metrics = lambda x: x
    told = {"aux_loss_enabled": False, "_tp_size": 1, "_total_train_tokens": 0, "precompute_ref_logps": True} | told
    return kind, MagicMock(accelerator=accelerator, **told)


def padded(values: Tensor, at: Tensor = MASK) -> Tensor:
    """(tokens,) to (responses, positions), 0 where there is none: log-probabilities as TRL's head gives them."""
    return values.new_zeros(at.shape).masked_scatter(at, values)


def case(seed: int) -> tuple[Tensor, TokenBatch]:
    """A preferred response of five tokens and a dispreferred one of three."""
    draw = torch.Generator().manual_seed(seed)
    log_odds, ref = torch.randn(2, 8, dtype=torch.float64, generator=draw)
    response, labels = torch.arange(2).repeat_interleave(LENGTHS), torch.tensor([True, False])
    return log_odds.requires_grad_(), TokenBatch(response, labels, torch.tensor([0, 0]), ref_log_odds=ref)


def outputs(logps: Tensor) -> Any:
    """What TRL's patched forward returns, with a position for the prompt."""
    return SimpleNamespace(log_probs=logps, entropy=logps, mean_logits=logps, is_top1=logps > -1, log_sum_sq_probs=logps)


def inputs(**more: Tensor) -> dict[str, Tensor]:
    ids = torch.ones(2, 6, dtype=torch.long)
    return {
        "input_ids": ids, "attention_mask": ids, "completion_mask": torch.cat([torch.zeros(2, PROMPT).bool(), MASK], 1).long()
    } | more  # fmt: skip


def of_pairs(log_odds: Tensor, batch: TokenBatch, losses: dict[str, float], beta: float) -> Tensor:
    kind, own = trainer(
        "DPO", beta=beta, loss_types=list(losses), loss_weights=list(losses.values()), ld_alpha=None, use_weighting=False,
        f_divergence_type="reverse_kl", label_smoothing=0.0,
    )  # fmt: skip
    sums = padded(logsigmoid(batch.ref_log_odds)).sum(1)
    given = inputs(ref_chosen_logps=sums[:1], ref_rejected_logps=sums[1:])
    return kind._compute_loss(own, lambda **_: outputs(padded(logsigmoid(log_odds))), given, False)


def of_kto(log_odds: Tensor, batch: TokenBatch, beta: float) -> Tensor:
    """z0 is TRL's own, of sequences whose log-ratios have the mean batch.z0."""
    kind, own = trainer("KTO", beta=beta, calculate_KL=True, loss_type="kto", desirable_weight=1.3, undesirable_weight=0.7)
    assert batch.z0 is not None
    own._compute_kl_logps = lambda model, given: torch.stack([batch.z0 + 3, batch.z0 - 1])
    sums = padded(logsigmoid(batch.ref_log_odds)).sum(1)
    given = inputs(label=batch.preferred, ref_logps=sums, ref_KL_logps=torch.ones(2).double())
    return kind._compute_loss(own, lambda **_: outputs(padded(logsigmoid(log_odds))), given, False)


def of_grpo(log_odds: Tensor, batch: TokenBatch, loss_type: str, **told: float) -> Tensor:
    args = SimpleNamespace(
        delta=None, use_bias_correction_kl=False, sapo_temperature_pos=1.0, sapo_temperature_neg=1.05, steps_per_generation=1
    )
    kind, own = trainer(
        "GRPO", loss_type=loss_type, beta=0.0, top_entropy_quantile=1.0, off_policy_mask_threshold=None, use_vllm=False,
        _entropy_bonus_enabled=False, use_adaptive_entropy=False,
        importance_sampling_level="token", current_gradient_accumulation_steps=1, args=args, **told,
    )  # fmt: skip
    total = torch.zeros((), dtype=torch.float64)
    for row in range(2):  # a mean over each response's own tokens
        length = int(LENGTHS[row])
        of = batch.response == row
        logps = logsigmoid(log_odds[of])[None]
        own._get_per_token_logps_and_entropies = lambda *_, logps=logps, **__: (logps, logps.detach(), None)
        ids = torch.ones(1, length, dtype=torch.long)
        given = {
            "prompt_ids": ids[:, :1], "prompt_mask": ids[:, :1], "completion_ids": ids, "completion_mask": ids,
            "advantages": batch.sign[row : row + 1].double(), "num_items_in_batch": torch.tensor(float(length)),
            "old_per_token_logps": logsigmoid(batch.ref_log_odds[of])[None],
        }  # fmt: skip
        total = total + kind._compute_loss(own, None, given)
    return total


CASES: dict[str, tuple[dict[str, Any], Any, str]] = {
    "dpo": ({"beta": 0.3}, lambda x, batch: of_pairs(x, batch, {"sigmoid": 1.0}, 0.3), "sum"),
    "ipo_avg": ({"tau": 0.3}, lambda x, batch: of_pairs(x, batch, {"ipo": 1.0}, 0.3), "sum"),
    "rpo": ({"beta": 0.3, "alpha": 0.4}, lambda x, batch: of_pairs(x, batch, {"sigmoid": 1.0, "sft": 0.4}, 0.3), "sum"),
    "kto": ({"beta": 0.3, "lambda_d": 1.3, "lambda_u": 0.7}, lambda x, batch: of_kto(x, batch, 0.3), "mean"),
    "ppo_clip": ({"epsilon": 0.2}, lambda x, batch: of_grpo(x, batch, "grpo", epsilon_low=0.2, epsilon_high=0.2), "sum"),
    "cispo": ({"epsilon_low": 1.0, "epsilon_high": 0.5}, lambda x, batch: of_grpo(x, batch, "cispo", epsilon_high=1.5), "sum"),
    "sapo": ({}, lambda x, batch: of_grpo(x, batch, "sapo"), "sum"),
}


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("name", CASES)
def test_it_is_trls(name: str, seed: int) -> None:
    """Value and gradient in the log-odds."""
    hyper, theirs, reduction = CASES[name]
    log_odds, batch = case(seed)
    # KTO's reference point: above 0, and below, where it counts as 0
    object.__setattr__(batch, "z0", torch.tensor([1.5, -2.0][seed % 2], dtype=torch.float64))
    ours = getattr(OBJECTIVES[name](log_odds, batch, **hyper), reduction)()
    peers = theirs(log_odds, batch)
    torch.testing.assert_close(ours, peers.to(ours.dtype), rtol=1e-6, atol=1e-6)
    gradients = [torch.autograd.grad(loss, log_odds)[0] for loss in (ours, peers)]
    torch.testing.assert_close(*gradients, rtol=1e-6, atol=1e-6)
