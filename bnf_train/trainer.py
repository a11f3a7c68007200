"""The trainer: transformers.Trainer with an objective of bnf_core on the log-odds head. From batch to loss, in order:

collator -> model (backbone, head) -> log-odds per token -> objective -> loss per response -> / responses of the step
"""

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import EvalPrediction, ProgressCallback, Trainer

from bnf_core import PAIRWISE, Objective, TokenBatch, bnf_weight
from bnf_train.collate import model_inputs

LABELS = ("preferred", "dispreferred")
# per-response sums that evaluation gathers
SUMS = ("responses", "losses", "loss", "tokens", "logp", "ref_logp", "weight", "clipped")


class BNFTrainer(Trainer):
    """Minimises the mean of `objective` over the responses (pairs) of each optimizer step, whatever the micro-batches.

    Args:
      objective: (log_odds, TokenBatch) -> loss per response, or per pair for those of `bnf_core.PAIRWISE`.
      Everything else: as transformers.Trainer. Data sets hold `bnf_train.data.Row`s, the model has the log-odds head.
    """

    def __init__(self, *args: Any, objective: Objective, **kwargs: Any) -> None:
        super().__init__(*args, compute_metrics=held_out_metrics, **kwargs)
        self.objective = objective
        self.pairwise = objective in PAIRWISE.values()
        # compute_loss divides by the responses of the whole step; the second line says so to older transformers (5.17)
        self.loss_is_scaled_for_ga = True
        self.model_accepts_loss_kwargs = True
        self._weights: dict[str, list[Tensor]] = defaultdict(list)
        if self.pop_callback(ProgressCallback) is not None:  # not with --disable_tqdm
            self.add_callback(_ProgressBar)

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Tensor:
        """Losses in the whole optimizer step, one per response or pair: every micro-batch, every process."""
        responses = sum(len(batch["preferred"]) for batch in batch_samples)
        losses = torch.tensor(responses // 2 if self.pairwise else responses, device=device)
        return self.accelerator.reduce(losses, "sum")

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Mapping[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Any:
        log_odds, entropy = model(**model_inputs(inputs))
        batch = TokenBatch(
            inputs["response"],
            inputs["preferred"],
            pair=_pairs(inputs["row"]),
            ref_log_odds=inputs["ref_log_odds"],
            entropy=entropy,
        )
        losses = self.objective(log_odds, batch)
        sums = self._sums(log_odds.detach(), batch, losses.detach())
        if model.training:
            self._record_weights(sums, inputs["preferred"])
        count = len(losses) if num_items_in_batch is None else num_items_in_batch
        # gradients are averaged over processes, and the mean is over the losses of all of them
        loss = losses.sum() / count * (self.accelerator.num_processes if model.training else 1)
        return (loss, sums) if return_outputs else loss

    def _record_weights(self, sums: Tensor, preferred: Tensor) -> None:
        for name, rows in zip(LABELS, (preferred, ~preferred), strict=True):
            self._weights[name].append(sums[rows][:, [SUMS.index(k) for k in ("tokens", "weight", "clipped")]].sum(0))

    def _sums(self, log_odds: Tensor, batch: TokenBatch, losses: Tensor) -> Tensor:
        """(responses, SUMS): what evaluation and logging report, summed over each response's tokens."""
        assert batch.ref_log_odds is not None
        per_token = {
            "tokens": torch.ones_like(log_odds),
            "logp": F.logsigmoid(log_odds),
            "ref_logp": F.logsigmoid(batch.ref_log_odds),
            "weight": bnf_weight(log_odds, batch.ref_log_odds),
            "clipped": (log_odds > batch.ref_log_odds).to(log_odds.dtype),  # the min of eq. 6 is at work
        }
        rows = batch.pairs()[0] if self.pairwise else torch.arange(len(losses), device=losses.device)
        columns = {k: batch.sum(v) for k, v in per_token.items()}
        zeros = losses.new_zeros(batch.responses)
        columns["responses"] = zeros + 1
        columns["losses"] = zeros.index_fill(0, rows, 1)  # a pair's loss stands with its preferred side
        columns["loss"] = zeros.index_copy(0, rows, losses)
        return torch.stack([columns[name] for name in SUMS], dim=1)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Adds bnf/weight_mean and bnf/weight_clipped per label: means over the tokens since the last log."""
        if "loss" in logs:
            for name, sums in self._weights.items():
                tokens, weight, clipped = self.accelerator.reduce(torch.stack(sums).sum(0), "sum").tolist()
                if tokens:
                    logs[f"bnf/weight_mean/{name}"] = weight / tokens
                    logs[f"bnf/weight_clipped/{name}"] = clipped / tokens
            self._weights.clear()
        super().log(logs, *args, **kwargs)

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[None, Tensor, Tensor]:
        """Per-response sums as "predictions", one line a row of the data, so that gathering keeps rows apart."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            _, sums = self.compute_loss(model, inputs, return_outputs=True)
        row = inputs["row"]
        side = torch.cat([row.new_zeros(1), (row[1:] == row[:-1]).long()])  # second response of its row
        table = sums.new_zeros(int(row[-1]) + 1, 2, len(LABELS), len(SUMS))
        table[row, side, (~inputs["preferred"]).long()] = sums
        return None, table, row.new_zeros(len(table))


def held_out_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """Means over held-out tokens, per label, from the table of `BNFTrainer.prediction_step`."""
    table = torch.as_tensor(prediction.predictions).double().sum((0, 1))  # (label, sum)
    metrics = {"loss": _ratio(*table[:, [SUMS.index("loss"), SUMS.index("losses")]].sum(0))}
    for label, values in zip(LABELS, table, strict=True):
        sums = dict(zip(SUMS, values, strict=True))
        if sums["responses"]:
            metrics |= {
                f"responses/{label}": int(sums["responses"]),
                f"tokens/{label}": int(sums["tokens"]),
                f"logp_per_token/{label}": _ratio(sums["logp"], sums["tokens"]),
                f"logp_shift_per_token/{label}": _ratio(sums["logp"] - sums["ref_logp"], sums["tokens"]),
                f"bnf/weight_mean/{label}": _ratio(sums["weight"], sums["tokens"]),
                f"bnf/weight_clipped/{label}": _ratio(sums["clipped"], sums["tokens"]),
            }
    return metrics


def _pairs(row: Tensor) -> Tensor:
    """Pair id of each response: its row, where the row has two."""
    return torch.where(row.bincount()[row] == 2, row, -1)


def _ratio(numerator: Tensor, denominator: Tensor) -> float:
    return (numerator / denominator).item()


class _ProgressBar(ProgressCallback):
    """The loss beside the bar, instead of a printed line for every log."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if self.training_bar is not None and logs and "loss" in logs:
            self.training_bar.set_postfix(loss=f"{float(logs['loss']):.4f}")
