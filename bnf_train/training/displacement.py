"""The alarm of a run that makes preferred responses less likely: likelihood displacement, while there is time to stop.

It is a function of the log history, which a checkpoint holds, so that a resumed run goes on counting.

Source: Razin et al., Unintentional Unalignment: Likelihood Displacement in Direct Preference Optimization (arXiv:2410.08847).
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import TrainerCallback

from bnf_train.training.metrics import EVAL

IN_A_ROW = 3  # evaluations that fell
SHIFT, TOKENS = (f"{EVAL}{name}/preferred" for name in ("logp_shift_per_token", "tokens"))


@dataclass(frozen=True)
class Alarm:
    """The last IN_A_ROW evaluations: mean shift of held-out preferred tokens from the reference, in nats, and their steps."""

    steps: list[int]
    shifts: list[float]

    def sentence(self, objective: str = "") -> str:
        """The numbers, what they mean, and what to do."""
        hold_back = ", or take an objective that holds back, --objective bnf"
        if objective.startswith("bnf"):
            hold_back = ", or leave preferred responses their likelihood, --side dispreferred" * (objective == "bnf")
        return (
            f"Held-out preferred responses became less likely at {IN_A_ROW} evaluations in a row: "
            f"{', '.join(f'{shift:+.4f}' for shift in self.shifts)} nats per token from the reference at steps "
            f"{', '.join(map(str, self.steps))}. Training takes likelihood from the responses that it is to favour (likelihood "
            f"displacement). Lower --learning_rate, train fewer epochs{hold_back}."
        )


def alarms(history: Sequence[Mapping[str, Any]], started_at_reference: bool) -> list[Alarm]:
    """One where the shift of preferred tokens fell at IN_A_ROW evaluations and is below 0; the next one after it was 0 again.

    Args:
      history: the trainer's log history. Evaluations of other rows than the last one's do not count.
      started_at_reference: the first evaluation is held against the reference's own 0.
    """
    evaluations = [log for log in history if SHIFT in log]
    same_rows = [log for log in evaluations if log.get(TOKENS) == evaluations[-1].get(TOKENS)]
    shifts = {int(log["step"]): float(log[SHIFT]) for log in same_rows}  # a step that a resumed run evaluates again is one
    found: list[Alarm] = []
    falls, before, told = 0, 0.0 if started_at_reference else None, False
    for place, shift in enumerate(shifts.values(), start=1):
        falls = falls + 1 if before is not None and shift < before else 0
        told, before = told and shift < 0, shift
        if falls >= IN_A_ROW and shift < 0 and not told:
            first = place - IN_A_ROW
            found.append(Alarm(list(shifts)[first:place], list(shifts.values())[first:place]))
            told = True
    return found


class DisplacementAlarm(TrainerCallback):
    """Says so when an evaluation raises an alarm, once, on the first process."""

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        before, now = (alarms(history, starts(args)) for history in (state.log_history[:-1], state.log_history))
        known = [alarm.steps[-1] for alarm in before]  # a step that a resumed run evaluates again is no news
        for alarm in now:
            if alarm.steps[-1] == state.global_step and state.global_step not in known:
                logging.getLogger(__name__).warning("%s", alarm.sentence(str(getattr(args, "objective", ""))))


def starts(args: Any) -> bool:
    """Whether the policy of such a run is its reference before the first step."""
    return not getattr(args, "ref_model", "unknown")
