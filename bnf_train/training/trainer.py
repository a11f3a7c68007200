"""The trainer: transformers.Trainer with an objective of bnf_core on the log-odds head. From batch to loss, in order:

collator -> model (backbone, head) -> log-odds per token -> objective -> loss per response -> / responses of the step

An optimizer step has micro-batches (--gradient_accumulation_steps); one of them is `training_step`, in passes that fit
memory; a pass is `compute_loss`. What is logged is a row each in `bnf_train.training.metrics`.

An objective per token goes through the head in one pass (`linear_token_loss`): what a token counts is known before its
logits are.
"""

import inspect
import math
import time
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import RandomSampler, Sampler
from transformers import ProgressCallback, Trainer

from bnf_core import Objective, TokenBatch, bnf_weight, objective_spec, sequence_logps
from bnf_core import objective as described
from bnf_train.data import Row, by_prompt, logical_tokens, model_inputs, passes
from bnf_train.errors import UsageError
from bnf_train.model.head import router_loss_coefficient
from bnf_train.training import distributed, metrics
from bnf_train.training.displacement import DisplacementAlarm
from bnf_train.training.quantities import Responses, Scored, joined, measure
from bnf_train.training.resume import ResumeMixin, rng_state, set_rng_state
from bnf_train.training.weights_moved import WeightsMoved

# mean |w - 1| before the first step; more than noise between two passes means that policy and reference differ
MOST_NOISE = 1e-2
# bf16 and fp16 round: other batches alone make up to 0.009 (SmolLM2-135M, 16 long rows), another padding 0.015
MOST_NOISE_IN_HALF, MOST_NOISE_IN_PADDED_HALF = 2e-2, 5e-2

RANDOM = (
    "its architecture draws random numbers or computes otherwise in training mode, which no configuration switches off; "
    "look for dropout, jitter or routers in its code."
)


class BNFTrainer(ResumeMixin, Trainer):
    """Minimises the mean of `objective` over the responses (pairs) of each optimizer step, whatever the micro-batches.

    Args:
      objective: (log_odds, TokenBatch) -> loss per response, or per pair.
      pairwise: whether it has one loss per pair; None: as it says itself (`bnf_core.objective_spec`).
      starts_at_reference: the policy is the reference before the first step, so that w = 1: checked on the first batch.
        That the policy is one function in training and evaluation mode is checked there in any case.
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
        self.beta = beta_of(objective)
        super().__init__(*args, compute_metrics=partial(metrics.held_out_values, beta=self.beta), **kwargs)
        state = self.accelerator.state
        distributed.check(state.parallelism_config, getattr(state, "fsdp_plugin", None))
        distributed.keep_float32(self.accelerator)
        if self.args.ddp_find_unused_parameters is None:
            distributed.wait_for_every_gradient(self.accelerator, self.model)
        self._weights_moved = WeightsMoved()
        self.add_callback(self._weights_moved)
        self.add_callback(DisplacementAlarm())
        self.spec = objective_spec(objective)
        self.pairwise = self.spec.per == "pair" if pairwise is None else pairwise
        # one that no decorator has described is weighted by the rows' scores, too
        self.objective = objective if self.spec.described or self.pairwise else described(per="response")(objective)
        self.one_pass = self.spec.per == "token"
        self.starts_at_reference, self._same_in_both_modes = starts_at_reference, False
        self.router_loss = router_loss_coefficient(self.model)
        # compute_loss divides by the responses of the whole step; the second line says so to older transformers (5.17)
        self.loss_is_scaled_for_ga = True
        self.model_accepts_loss_kwargs = True
        self._since_log: list[Responses] = []
        self._router_losses: list[Tensor] = []
        self._tokens_since_log, self._positions_since_log, self._logged_at = 0, 0, time.perf_counter()
        self._noise_at_start: float | None = None
        self._z0: Tensor | None = None  # of the optimizer step that is computed
        self._held_out_z0: Tensor | None = None  # of the evaluation that is computed
        if self.pop_callback(ProgressCallback) is not None:  # not with --disable_tqdm
            self.add_callback(_ProgressBar)
        self._empty_rows = 0
        if self.train_dataset is not None and self.accelerator.num_processes > 1:
            # accelerate would fill up the last batches with rows from the beginning, which would count twice
            rows: list[Row] = list(self.train_dataset)
            self._empty_rows = -len(rows) % (self.args.per_device_train_batch_size * self.accelerator.num_processes)
            self.train_dataset = rows + [Row("", [])] * self._empty_rows

    # --- from batch to loss ---------------------------------------------------------------------------------------------

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Tensor:
        """Losses in the whole optimizer step, one per response or pair: every micro-batch, every process."""
        responses = sum(len(batch["preferred"]) for batch in batch_samples)
        losses = torch.tensor(responses // 2 if self.pairwise else responses, device=device)
        if self.spec.reference_point:
            self._z0 = self._reference_point(self.model_wrapped, batch_samples)
        return self.accelerator.reduce(losses, "sum")

    def evaluate(self, eval_dataset: Any = None, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Transformers' own; where the objective needs one, the reference point is that of all rows, whatever the batches."""
        if self.spec.reference_point:
            rows = list(self.eval_dataset if eval_dataset is None else eval_dataset)
            size, place, processes = (
                self.args.per_device_eval_batch_size, self.accelerator.process_index, self.accelerator.num_processes
            )  # fmt: skip
            mine = (rows + [Row("", [])] * (-len(rows) % (size * processes)))[place::processes]
            batches = (self.data_collator(mine[first : first + size]) for first in range(0, len(mine), size))
            self._held_out_z0 = self._reference_point(self.model_wrapped, batches)
        metrics: dict[str, float] = super().evaluate(eval_dataset, *args, **kwargs)
        return metrics

    def _reference_point(self, model: nn.Module, batches: Iterable[Any]) -> Tensor:
        """z0 of these micro-batches of all processes: mean of log pi - log pi_ref over mismatched responses, at least 0.

        In nats, a constant for the gradient. A process whose micro-batch is empty computes it all the same: others wait for it.
        """
        total, training = torch.zeros(2, device=self.args.device), model.training
        model.eval()
        with torch.no_grad(), self.compute_loss_context_manager():
            for batch in batches:
                inputs = self._prepare_inputs(batch.get("mismatched", batch))
                log_odds = model(**model_inputs(inputs))[0].float()
                of = TokenBatch(inputs["response"], inputs["preferred"])
                ratios = sequence_logps(log_odds, of) - sequence_logps(inputs["ref_log_odds"], of)
                total += torch.stack([ratios.sum(), ratios.new_tensor(len(ratios))])
        model.train(training)
        distributed.reshard(model)
        summed, count = self.accelerator.reduce(total, "sum")
        return (summed / count.clamp(min=1)).clamp(min=0)

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
        if model.training and not self._same_in_both_modes:
            self._same_in_both_modes = True
            if not self.starts_at_reference:  # else the step itself is compared with the reference, in evaluation mode
                self._check_modes(model, inputs)
        count = num_items_in_batch if num_items_in_batch is not None else self._losses_in(inputs)
        # gradients are averaged over processes, and the mean is over the losses of all of them
        scale = (self.accelerator.num_processes if model.training else 1) / count
        # a row whose other side is in another pass is no pair here; only rows of a loss per token are cut, which asks for none
        pair = None if self.one_pass else torch.where(inputs["paired"], inputs["row"], -1)
        z0 = self._z0 if model.training else self._held_out_z0
        if self.spec.reference_point and z0 is None:  # a batch for itself
            z0 = self._reference_point(model, [inputs])
        batch = TokenBatch(
            inputs["response"], inputs["preferred"], pair=pair, ref_log_odds=inputs["ref_log_odds"], score=inputs["score"],
            weight=inputs.get("weight"), z0=z0,
        )  # fmt: skip
        if self.one_pass:
            token_loss, per_token = self.spec.weighted_token_loss, self.spec.per_token(batch, scale)
            token = {"token_loss": token_loss, "per_token": per_token}
            loss, log_odds, entropy, *router = model(**model_inputs(inputs), **token, router_loss=self.router_loss > 0)
            batch = replace(batch, entropy=entropy)
            with torch.no_grad():
                losses = self.objective(log_odds, batch)
            loss = loss + (losses.sum() * scale - loss.detach())  # terms that have no gradient, such as BNF's entropy
        else:
            log_odds, entropy, *router = model(**model_inputs(inputs), router_loss=self.router_loss > 0)
            batch = replace(batch, entropy=entropy)
            losses = self.objective(log_odds, batch)
            loss = losses.sum() * scale
        if router and model.training:  # of one micro-batch: it counts as large a part of the step as its losses are
            loss = loss + self.router_loss * router[0].to(loss.device) * self._losses_in(inputs) * scale
            self._router_losses.append(router[0].detach())
        if batch.weight is not None:  # metrics are of all tokens alike
            batch = replace(batch, weight=None)
        scored = Scored(log_odds.detach(), batch, losses.detach(), inputs["paired"], self.pairwise)
        responses = measure(scored, *metrics.quantities())
        if model.training:
            self._record(scored, responses, inputs)
        return (loss, responses) if return_outputs else loss

    def _losses_in(self, inputs: Mapping[str, Tensor]) -> int:
        return len(inputs["preferred"]) // 2 if self.pairwise else len(inputs["preferred"])

    # --- metrics (bnf_train.training.metrics) ---------------------------------------------------------------------------

    def _record(self, scored: Scored, responses: Responses, inputs: Mapping[str, Tensor]) -> None:
        """What the next log reports; before the first step, whether policy and reference are one."""
        padded = "attention_mask" in inputs
        if self.starts_at_reference:
            self.starts_at_reference = False
            self._check_start(scored.log_odds, scored.ref_log_odds, padded)
        self._since_log.append(responses)
        self._tokens_since_log += logical_tokens(inputs)
        self._positions_since_log += inputs["input_ids"].numel()

    def _check_start(self, log_odds: Tensor, ref_log_odds: Tensor, padded: bool) -> None:
        """On the first micro-batch of each process, with dropout as in training."""
        mean, most = self._noise(log_odds, ref_log_odds, padded)
        self._noise_at_start = mean
        if mean > most:  # NaN is for the check of the loss, which names the rows
            raise UsageError(
                f"before the first step the mean |w - 1| is {mean:.2g}, more than the {most:g} that noise explains: "
                "policy and reference are not the same model in the same mode; look for random numbers in its code, a cache of "
                "another reference, or another attention implementation or dtype."
            )

    def _check_modes(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> None:
        """On the first micro-batch: what is trained is the function that is evaluated, scored and saved.

        Not for adapters that go on, whose own dropout (--lora_dropout) is meant; a new one is 0 whatever it drops.
        """
        if self.state.global_step > 0 and getattr(self.args, "lora_dropout", 0):
            return
        random = rng_state()
        with torch.no_grad(), self.compute_loss_context_manager():
            evaluated, trained = (model.train(mode)(**model_inputs(inputs))[0] for mode in (False, True))
        set_rng_state(random)
        mean, most = self._noise(trained, evaluated, "attention_mask" in inputs)
        if mean > most:
            raise UsageError(
                f"before the first step policy and policy in evaluation mode differ (mean |w - 1| is {mean:.2g}, more than the "
                f"{most:g} that noise explains): {RANDOM}"
            )

    def _noise(self, log_odds: Tensor, ref_log_odds: Tensor, padded: bool) -> tuple[float, float]:
        """mean |w - 1| over the first micro-batch of all processes, and the most that rounding explains."""
        noise = (bnf_weight(log_odds, ref_log_odds.to(log_odds.dtype)) - 1).abs()
        total, tokens = self.accelerator.reduce(torch.stack([noise.sum(), noise.new_tensor(len(noise))]), "sum").tolist()
        half = self.args.bf16 or self.args.fp16 or self.model.dtype.itemsize < 4
        most = (MOST_NOISE_IN_PADDED_HALF if padded else MOST_NOISE_IN_HALF) if half else MOST_NOISE
        return total / max(tokens, 1), most

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Adds the metrics of what was trained on since the last log, over all processes."""
        if "loss" in logs and self._since_log:
            logs |= self._training_metrics() | self._weights_moved.take()
        super().log(logs, *args, **kwargs)

    def _training_metrics(self) -> dict[str, float]:
        """METRICS of the training log, and what only the trainer knows: speed, and the weights before the first step."""
        add_up = partial(self.accelerator.reduce, reduction="sum")
        now = time.perf_counter()
        counts = torch.tensor([self._tokens_since_log, self._positions_since_log], device=self.args.device)
        speeds = add_up(counts / (now - self._logged_at)).tolist()
        logs = dict(zip(("tokens_per_second", "positions_per_second"), speeds, strict=True))
        since_log = distributed.with_all_tokens(joined(self._since_log), self.accelerator)
        logs |= metrics.values(since_log, beta=self.beta, reduce=add_up)
        if self._noise_at_start is not None:
            logs["bnf/start_weight_error"] = self._noise_at_start
        self._noise_at_start = None
        if self._z0 is not None:
            logs["kl"] = self._z0.item()
        if self._router_losses:
            logs["router_loss"] = add_up(torch.stack(self._router_losses).mean()).item() / self.accelerator.num_processes
            self._router_losses = []
        self._since_log, self._tokens_since_log, self._positions_since_log, self._logged_at = [], 0, 0, now
        return logs

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[None, Tensor, Tensor]:
        """A table with one line per row of the data as "predictions": `metrics.held_out_values` makes metrics of it."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            _, responses = self.compute_loss(model, inputs, return_outputs=True)
        table = metrics.by_row(responses, inputs["row"])
        return None, table, inputs["row"].new_zeros(len(table))

    # --- several processes (bnf_train.training.distributed) -------------------------------------------------------------

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Sampler[int] | None:
        sampler: Sampler[int] | None = super()._get_train_sampler(*args, **kwargs)
        if not isinstance(sampler, RandomSampler):
            return sampler
        rows = len(self.train_dataset) - self._empty_rows
        # by the flag alone: where a model cannot share, the order is that of where it can
        shares = getattr(self.args, "share_prompts", False)
        groups = by_prompt(self.train_dataset[:rows]) if shares else [[place] for place in range(rows)]
        if len(groups) == rows and not self._empty_rows:
            return sampler
        return distributed.GroupedRows(groups, range(rows, rows + self._empty_rows), self.args.data_seed)

    def _build_accelerator_args(self, **kwargs: Any) -> dict[str, Any]:
        """--torch_compile is `distributed.compile_layers`: a model compiled whole would leave out the head's forward."""
        args = super()._build_accelerator_args(**kwargs)
        args.pop("dynamo_plugin", None)
        return args

    def autocast_smart_context_manager(self, cache_enabled: bool | None = True) -> AbstractContextManager[Any]:
        return distributed.autocast(self.accelerator)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        super()._save(output_dir, state_dict and distributed.without_tied(self.model, state_dict))


def beta_of(objective: Objective) -> float:
    """The beta that rewards are logged with: bound by functools.partial, else the default of a keyword-only `beta`, else 1."""
    if "beta" in (bound := getattr(objective, "keywords", {})):
        return float(bound["beta"])
    try:
        parameter = inspect.signature(objective).parameters.get("beta")
    except (TypeError, ValueError):  # a callable without a signature
        return 1.0
    if parameter is None or parameter.kind is not parameter.KEYWORD_ONLY or not isinstance(parameter.default, (int, float)):
        return 1.0
    return float(parameter.default)


class _ProgressBar(ProgressCallback):
    """The loss beside the bar, instead of a printed line for every log."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if self.training_bar is not None and logs and "loss" in logs:
            speed = f"{logs.get('tokens_per_second', 0):.0f}"
            self.training_bar.set_postfix({"loss": f"{float(logs['loss']):.4f}", "tokens/s": speed})
