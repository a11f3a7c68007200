"""The trainer: transformers.Trainer with an objective of bnf_core on the log-odds head. From batch to loss, in order:

collator -> model (backbone, head) -> log-odds per token -> objective -> loss per response -> / responses of the step

An objective per token goes through the head in one pass (`linear_token_loss`): what a token counts is known before its
logits are.
"""

import math
import time
from collections import defaultdict
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import EvalPrediction, ProgressCallback

from bnf_core import Objective, TokenBatch, bnf_weight, objective_spec
from bnf_train.data import Row, model_inputs, passes
from bnf_train.errors import UsageError
from bnf_train.training import distributed as scale_out
from bnf_train.training.resume import EnduringTrainer
from bnf_train.training.weights_moved import WeightsMoved

LABELS = ("preferred", "dispreferred")
SIDES = {"preferred": "chosen", "dispreferred": "rejected"}  # what metrics of other trainers call them
QUANTILES = (0.1, 0.5, 0.9)
# mean |w - 1| before the first step; more than noise between two passes means that policy and reference differ
MOST_NOISE = 1e-2
# bf16 and fp16 round: other batches alone make up to 0.009 (SmolLM2-135M, 16 long rows), another padding 0.015
MOST_NOISE_IN_HALF, MOST_NOISE_IN_PADDED_HALF = 2e-2, 5e-2
# per-response sums that evaluation gathers
SUMS = ("responses", "losses", "loss", "paired", "tokens", "logp", "ref_logp", "weight", "clipped", "entropy")


class BNFTrainer(EnduringTrainer):
    """Minimises the mean of `objective` over the responses (pairs) of each optimizer step, whatever the micro-batches.

    Args:
      objective: (log_odds, TokenBatch) -> loss per response, or per pair.
      pairwise: whether it has one loss per pair; None: as it says itself (`bnf_core.objective_spec`).
      starts_at_reference: the policy is the reference before the first step, so that w = 1: checked on the first batch.
      Everything else: as transformers.Trainer. Data sets hold `bnf_train.data.Row`s, the model has the log-odds head.
    """

    train_dataset: Any
    reference_seconds = 0.0  # what the reference's log-odds took, before there was a trainer

    def __init__(
        self,
        *args: Any,
        objective: Objective,
        pairwise: bool | None = None,
        starts_at_reference: bool = False,
        **kwargs: Any,
    ) -> None:
        self.beta = float(getattr(objective, "keywords", {}).get("beta", 1))
        super().__init__(*args, compute_metrics=partial(held_out_metrics, beta=self.beta), **kwargs)
        scale_out.keep_float32(self.accelerator)
        if self.args.ddp_find_unused_parameters is None:
            scale_out.wait_for_every_gradient(self.accelerator, self.model)
        self._weights_moved = WeightsMoved()
        self.add_callback(self._weights_moved)
        self.objective, self.spec = objective, objective_spec(objective)
        self.pairwise = self.spec.per == "pair" if pairwise is None else pairwise
        self.one_pass = self.spec.per == "token"
        self.starts_at_reference = starts_at_reference
        # compute_loss divides by the responses of the whole step; the second line says so to older transformers (5.17)
        self.loss_is_scaled_for_ga = True
        self.model_accepts_loss_kwargs = True
        self._sums_since_log: list[Tensor] = []
        self._labels_since_log: list[Tensor] = []
        self._ratios: dict[str, list[Tensor]] = defaultdict(list)
        self._tokens_since_log, self._logged_at = 0, time.perf_counter()
        self._noise_at_start: float | None = None
        if self.pop_callback(ProgressCallback) is not None:  # not with --disable_tqdm
            self.add_callback(_ProgressBar)
        if self.train_dataset is not None and self.accelerator.num_processes > 1:
            # accelerate would fill up the last batches with rows from the beginning, which would count twice
            rows: list[Row] = list(self.train_dataset)
            missing = -len(rows) % (self.args.per_device_train_batch_size * self.accelerator.num_processes)
            self.train_dataset = rows + [Row("", [])] * missing

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Tensor:
        """Losses in the whole optimizer step, one per response or pair: every micro-batch, every process."""
        responses = sum(len(batch["preferred"]) for batch in batch_samples)
        losses = torch.tensor(responses // 2 if self.pairwise else responses, device=device)
        return self.accelerator.reduce(losses, "sum")

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """One micro-batch, in passes of at most --tokens_per_pass tokens: the same gradient, activations of fewer tokens.

        In one process only: processes would have to agree on how many passes there are. Not under DeepSpeed, which takes
        its optimizer step in the backward pass.
        """
        alone = self.accelerator.num_processes == 1 and not self.is_deepspeed_enabled
        most = self.args.tokens_per_pass if alone else math.inf
        parts = passes(inputs, most or math.inf, whole_rows=not self.one_pass)
        if len(parts) > 1 and num_items_in_batch is None:
            num_items_in_batch = torch.tensor(self._losses_in(inputs), device=self.args.device)
        losses = [super(BNFTrainer, self).training_step(model, part, num_items_in_batch) for part in parts]
        return torch.stack(losses).sum()

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Mapping[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Any:
        count = num_items_in_batch if num_items_in_batch is not None else self._losses_in(inputs)
        # gradients are averaged over processes, and the mean is over the losses of all of them
        scale = (self.accelerator.num_processes if model.training else 1) / count
        # a row whose other side is in another pass is no pair here; only rows of a loss per token are cut, which asks for none
        pair = None if self.one_pass else torch.where(inputs["paired"], inputs["row"], -1)
        batch = TokenBatch(inputs["response"], inputs["preferred"], pair=pair, ref_log_odds=inputs["ref_log_odds"])
        if self.one_pass:
            token_loss, per_token = self.spec.weighted_token_loss, self.spec.per_token(batch, scale)
            loss, log_odds, entropy = model(**model_inputs(inputs), token_loss=token_loss, per_token=per_token)
            batch = replace(batch, entropy=entropy)
            with torch.no_grad():
                losses = self.objective(log_odds, batch)
            loss = loss + (losses.sum() * scale - loss.detach())  # terms that have no gradient, such as BNF's entropy
        else:
            log_odds, entropy = model(**model_inputs(inputs))
            batch = replace(batch, entropy=entropy)
            losses = self.objective(log_odds, batch)
            loss = losses.sum() * scale
        sums = self._sums(log_odds.detach(), batch, losses.detach(), inputs["paired"])
        if model.training:
            padded = "attention_mask" in inputs
            tokens = inputs["attention_mask"].sum() if padded else inputs["input_ids"].numel()
            self._record(log_odds.detach(), batch, sums, int(tokens), padded)
        return (loss, sums) if return_outputs else loss

    def _losses_in(self, inputs: Mapping[str, Tensor]) -> int:
        return len(inputs["preferred"]) // 2 if self.pairwise else len(inputs["preferred"])

    @torch.no_grad()
    def _record(self, log_odds: Tensor, batch: TokenBatch, sums: Tensor, tokens: int, padded: bool) -> None:
        """What the next log reports; before the first step, whether policy and reference are one."""
        assert batch.ref_log_odds is not None
        if self.starts_at_reference:
            self.starts_at_reference = False
            self._check_start(log_odds, batch.ref_log_odds, padded)
        self._sums_since_log.append(sums)
        self._labels_since_log.append(batch.preferred)
        self._tokens_since_log += tokens
        ratio = F.logsigmoid(log_odds) - F.logsigmoid(batch.ref_log_odds)
        preferred = batch.preferred[batch.response]
        self._ratios["preferred"].append(ratio[preferred])
        self._ratios["dispreferred"].append(ratio[~preferred])

    def _check_start(self, log_odds: Tensor, ref_log_odds: Tensor, padded: bool) -> None:
        """On the first micro-batch of each process, with dropout as in training."""
        noise = (bnf_weight(log_odds, ref_log_odds.to(log_odds.dtype)) - 1).abs()
        total, tokens = self.accelerator.reduce(torch.stack([noise.sum(), noise.new_tensor(len(noise))]), "sum").tolist()
        mean = total / max(tokens, 1)
        self._noise_at_start = mean
        half = self.args.bf16 or self.args.fp16 or self.model.dtype.itemsize < 4
        most = (MOST_NOISE_IN_PADDED_HALF if padded else MOST_NOISE_IN_HALF) if half else MOST_NOISE
        if mean > most:  # NaN is for the check of the loss, which names the rows
            raise UsageError(
                f"before the first step the mean |w - 1| is {mean:.2g}, more than the {most:g} that noise explains: "
                "policy and reference are not the same model in the same mode; look for dropout in the model's configuration, "
                "a reference cache of other weights, or another attention implementation or dtype."
            )

    def _sums(self, log_odds: Tensor, batch: TokenBatch, losses: Tensor, paired: Tensor) -> Tensor:
        """(responses, SUMS): what evaluation and logging report, summed over each response's tokens."""
        assert batch.ref_log_odds is not None
        assert batch.entropy is not None
        per_token = {
            "tokens": torch.ones_like(log_odds),
            "logp": F.logsigmoid(log_odds),
            "ref_logp": F.logsigmoid(batch.ref_log_odds),
            "weight": bnf_weight(log_odds, batch.ref_log_odds),
            "clipped": (log_odds > batch.ref_log_odds).to(log_odds.dtype),  # the min of eq. 6 is at work
            "entropy": batch.entropy,
        }
        rows = batch.pairs()[0] if self.pairwise else torch.arange(len(losses), device=losses.device)
        columns = {k: batch.sum(v) for k, v in per_token.items()}
        zeros = losses.new_zeros(batch.responses)
        columns["responses"] = zeros + 1
        columns["paired"] = paired.to(zeros.dtype)
        columns["losses"] = zeros.index_fill(0, rows, 1)  # a pair's loss stands with its preferred side
        columns["loss"] = zeros.index_copy(0, rows, losses)
        return torch.stack([columns[name] for name in SUMS], dim=1)

    def autocast_smart_context_manager(self, cache_enabled: bool | None = True) -> AbstractContextManager[Any]:
        return scale_out.autocast(self.accelerator)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        super()._save(output_dir, state_dict and scale_out.without_tied(self.model, state_dict))

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Adds what happened since the last log, over all processes: see `_training_metrics`."""
        if "loss" in logs and self._sums_since_log:
            logs |= self._training_metrics() | self._weights_moved.take()
        super().log(logs, *args, **kwargs)

    def _training_metrics(self) -> dict[str, float]:
        """Per label means over tokens (bnf/*) and over responses (rewards/*, logps/*), quantiles, tokens per second.

        rewards are log pi - log pi_ref of a response, times beta where the objective has one. Quantiles of
        pi / pi_ref over tokens are means over processes.
        """
        sums, preferred = torch.cat(self._sums_since_log), torch.cat(self._labels_since_log)
        beta = self.beta
        table = torch.stack([sums[preferred].sum(0), sums[~preferred].sum(0)])
        quantiles = torch.stack([_quantiles(torch.cat(self._ratios[label])) for label in LABELS])
        margins = self._margins(sums, preferred)
        now = time.perf_counter()
        speed = torch.tensor([self._tokens_since_log / (now - self._logged_at)], device=sums.device)
        table, speed, margins = (self.accelerator.reduce(x, "sum") for x in (table, speed, margins))
        known = self.accelerator.reduce(quantiles.isfinite().to(sums.dtype), "sum")
        quantiles = self.accelerator.reduce(quantiles.nan_to_num(0), "sum") / known
        metrics = {"tokens_per_second": speed.item()}
        for label, values, ratios in zip(LABELS, table, quantiles, strict=True):
            total = dict(zip(SUMS, values, strict=True))
            if total["responses"]:
                metrics |= {
                    f"bnf/weight_mean/{label}": _ratio(total["weight"], total["tokens"]),
                    f"bnf/weight_clipped/{label}": _ratio(total["clipped"], total["tokens"]),
                    f"rewards/{SIDES[label]}": beta * _ratio(total["logp"] - total["ref_logp"], total["responses"]),
                    f"logps/{SIDES[label]}": _ratio(total["logp"], total["responses"]),
                }
                metrics |= {f"bnf/ratio_q{round(100 * q)}/{label}": r.item() for q, r in zip(QUANTILES, ratios, strict=True)}
        pairs, margin, right = margins.tolist()
        if pairs:
            metrics |= {"rewards/margins": beta * margin / pairs, "rewards/accuracies": right / pairs}
        if self._noise_at_start is not None:
            metrics["bnf/start_weight_error"] = self._noise_at_start
        self._noise_at_start = None
        self._sums_since_log, self._labels_since_log, self._ratios = [], [], defaultdict(list)
        self._tokens_since_log, self._logged_at = 0, now
        return metrics

    def _margins(self, sums: Tensor, preferred: Tensor) -> Tensor:
        """(pairs, sum of reward margins, pairs with a positive one); the sides of a pair stand one behind the other."""
        shift = sums[:, SUMS.index("logp")] - sums[:, SUMS.index("ref_logp")]
        paired = sums[:, SUMS.index("paired")] > 0
        chosen, rejected = shift[paired & preferred], shift[paired & ~preferred]
        margin = chosen - rejected
        return torch.stack([margin.new_tensor(len(margin)), margin.sum(), (margin > 0).to(margin.dtype).sum()])

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


def held_out_metrics(prediction: EvalPrediction, beta: float = 1.0) -> dict[str, float]:
    """Held-out means from the table of `BNFTrainer.prediction_step`: per label over tokens and responses; over pairs.

    rewards are as in training: beta (log pi - log pi_ref). ranked_right asks for log pi alone: the preferred response has
    the larger mean log-likelihood a token. Log-likelihoods and entropy are in nats.
    """
    table = torch.as_tensor(prediction.predictions).double().sum(1)  # (row, label, sum)
    totals = table.sum(0)
    metrics = {"loss": _ratio(*totals[:, [SUMS.index("loss"), SUMS.index("losses")]].sum(0))}
    for label, values in zip(LABELS, totals, strict=True):
        sums = dict(zip(SUMS, values, strict=True))
        if sums["responses"]:
            metrics |= {
                f"responses/{label}": int(sums["responses"]),
                f"tokens/{label}": int(sums["tokens"]),
                f"logp_per_token/{label}": _ratio(sums["logp"], sums["tokens"]),
                f"logp_shift_per_token/{label}": _ratio(sums["logp"] - sums["ref_logp"], sums["tokens"]),
                f"logp_shift/{label}": _ratio(sums["logp"] - sums["ref_logp"], sums["responses"]),
                f"entropy/{label}": _ratio(sums["entropy"], sums["tokens"]),
                f"bnf/weight_mean/{label}": _ratio(sums["weight"], sums["tokens"]),
                f"bnf/weight_clipped/{label}": _ratio(sums["clipped"], sums["tokens"]),
                f"rewards/{SIDES[label]}": beta * _ratio(sums["logp"] - sums["ref_logp"], sums["responses"]),
            }
    pairs = table[(table[..., SUMS.index("paired")] == 1).all(1)]  # (pair, label, sum)
    if len(pairs):
        logp, ref_logp, tokens = (pairs[..., SUMS.index(name)] for name in ("logp", "ref_logp", "tokens"))
        margins = beta * ((logp - ref_logp)[:, 0] - (logp - ref_logp)[:, 1])
        metrics |= {
            "rewards/margins": margins.mean().item(),
            "rewards/accuracies": (margins > 0).double().mean().item(),
            "ranked_right": (logp / tokens).diff(dim=1).lt(0).double().mean().item(),
        }
    return metrics


def _quantiles(log_ratios: Tensor) -> Tensor:
    """Of pi / pi_ref over tokens; NaN where there are none. Of at most 2^20 tokens, evenly spread: torch takes no more."""
    some = log_ratios[:: -(-len(log_ratios) // 2**20) or 1]
    wanted = torch.tensor(QUANTILES, dtype=log_ratios.dtype, device=log_ratios.device)
    return some.quantile(wanted).exp() if len(some) else torch.full_like(wanted, torch.nan)


def _ratio(numerator: Tensor, denominator: Tensor) -> float:
    return (numerator / denominator).item()


class _ProgressBar(ProgressCallback):
    """The loss beside the bar, instead of a printed line for every log."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if self.training_bar is not None and logs and "loss" in logs:
            speed = f"{logs.get('tokens_per_second', 0):.0f}"
            self.training_bar.set_postfix({"loss": f"{float(logs['loss']):.4f}", "tokens/s": speed})
