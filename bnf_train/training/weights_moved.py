"""Whether the optimizer's steps are lost to rounding: measured once, early in a run, on a sample of the weights."""

import logging
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

SAMPLE = 256  # elements of each tensor; measuring them takes less than a millisecond
LOST = 0.5  # warn below this share of moved weights


class WeightsMoved(TrainerCallback):
    """Measures `bnf/weights_moved`, the share of the weights with a gradient that a step changes, and warns if it is low.

    AdamW moves a weight by about the learning rate. In bf16 the numbers next to 0.02 are 1.2e-4 away, so a step of 5e-7 is
    rounded away; in float32 they are 1.9e-9 away. Measured is the first step whose learning rate is at least a tenth of its
    peak: warm-up begins at zero, where nothing can move. `take` gives the number to the trainer's next log: calling
    `trainer.log` in a callback would cancel the log that is due at the same step.
    """

    def __init__(self) -> None:
        self._result: dict[str, float] = {}
        self._before: list[Tensor] | None = None
        self._has_gradient: list[Tensor | None] = []
        self._done = False

    def take(self) -> dict[str, float]:
        """{"bnf/weights_moved": share} once, after it was measured; else {}."""
        result, self._result = self._result, {}
        return result

    def on_step_begin(self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any) -> None:
        if not self._done and _learning_rate(kwargs["optimizer"]) >= args.learning_rate / 10:
            self._before = [_sample(p) for p in _trained(model)]
            self._has_gradient = [None] * len(self._before)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any) -> None:
        if self._before is not None:  # under ZeRO they have no .grad
            self._has_gradient = [None if p.grad is None else _sample(p.grad) != 0 for p in _trained(model)]

    def on_step_end(self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any) -> None:
        if self._before is None:
            return
        if any(hasattr(p, "ds_id") for p in _trained(model)):
            self._has_gradient = [_had_gradient(p) for p in _trained(model)]
        share, self._before, self._done = self._share(_trained(model)), None, True
        if share is None:
            return
        self._result = {"bnf/weights_moved": share}
        if share < LOST:
            kinds = ", ".join(sorted({str(p.dtype).removeprefix("torch.") for p in _trained(model)}))
            logging.getLogger(__name__).warning(
                "Only %.1f %% of the weights changed in a step at learning rate %.2g: the others' steps are smaller than the "
                "spacing of %s numbers and are lost to rounding. Hold the weights in float32 (the default), or use "
                "--optim adamw_torch_8bit --optim_args bf16_stochastic_round=true.",
                100 * share,
                _learning_rate(kwargs["optimizer"]),
                kinds,
            )

    def _share(self, parameters: list[nn.Parameter]) -> float | None:
        """Moved weights / weights with a gradient (all, where that is not known); samples stand for their whole tensors."""
        assert self._before is not None
        moved, total = 0.0, 0.0
        for p, before, counted in zip(parameters, self._before, self._has_gradient, strict=True):
            counted = torch.ones_like(before, dtype=torch.bool) if counted is None else counted
            if len(before):
                elements = _local(p).numel() / len(before)
                moved += elements * ((_sample(p) != before) & counted).sum().item()
                total += elements * counted.sum().item()
        return moved / total if total else None


def _trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def _had_gradient(parameter: Any) -> Tensor | None:
    """ZeRO-3 drops gradients as it takes its step, and a weight that never had one is one whose first moment is 0."""
    from deepspeed.utils import safe_get_local_optimizer_state

    try:
        return _sample(safe_get_local_optimizer_state(parameter, "exp_avg")).to(_local(parameter).device) != 0
    except KeyError:  # an optimizer without moments
        return None


def _local(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process holds: all of it, its shard (FSDP2) or its partition (ZeRO-3)."""
    tensor = getattr(tensor, "ds_tensor", tensor)
    tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return tensor.detach()


def _sample(tensor: Tensor) -> Tensor:
    flat = _local(tensor).reshape(-1)
    return flat[:: max(1, len(flat) // SAMPLE)][:SAMPLE].clone()


def _learning_rate(optimizer: Any) -> float:
    return float(optimizer.param_groups[0]["lr"])
