"""Right answers around a training run: before it, after it, and in between where --check_steps asks for it.

What was measured before is a file in every checkpoint, so that a resumed run has it too.
"""

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from bnf_train.checks import Asked, log_values
from bnf_train.config import BNFConfig
from bnf_train.model.answers import Measured, Questions, ask
from bnf_train.training import distributed
from bnf_train.training.trainer import BNFTrainer

BEFORE = "right_before.json"


def ask_untrained(model: Any, tokenizer: Any, questions: Questions, config: BNFConfig) -> list[Asked]:
    """The answers of a model that the trainer has not got yet, each process with the whole of it."""
    with distributed.gathered(model):
        return ask(
            model.to(config.device), tokenizer, questions, config.device, autocast(config),
            process=config.process_index, processes=config.world_size, progress=_bar(config, "answers before training"),
        )  # fmt: skip


def ask_trained(trainer: BNFTrainer, questions: Questions, what: str) -> list[Asked]:
    """The answers of the model that is trained; every process of a run calls this."""
    config: Any = trainer.args
    found = ask(
        trainer.model, trainer.processing_class, questions, config.device, autocast(config),
        process=config.process_index, processes=config.world_size,
        sharded=trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled, progress=_bar(config, what),
    )  # fmt: skip
    distributed.reshard(trainer.model)
    return found


def autocast(config: BNFConfig) -> torch.dtype | None:
    """In what a forward pass multiplies; None: in the weights' own dtype."""
    return torch.bfloat16 if config.bf16 else torch.float16 if config.fp16 else None


def _bar(config: BNFConfig, what: str) -> str | None:
    return None if config.disable_tqdm else what


# --- in a checkpoint -------------------------------------------------------------------------------------------------------


def kept(measured: Measured) -> dict[str, str]:
    """The file of a checkpoint that says what was measured before training: its name and its text."""
    if measured.before is None:
        return {}
    state = {"asked": _fingerprint(measured.questions), "before": [asdict(asked) for asked in measured.before]}
    return {BEFORE: json.dumps(state) + "\n"}


def taken_over(checkpoint: Path, questions: Questions) -> list[Asked] | None:
    """What the first part of a resumed run measured before training; None where it asked nothing, or something else."""
    try:
        state = json.loads((checkpoint / BEFORE).read_text())
        if state["asked"] == _fingerprint(questions):
            return [Asked(**asked) for asked in state["before"]]
    except (OSError, ValueError, KeyError, TypeError):  # of another version
        return None
    return None


def _fingerprint(questions: Questions) -> dict[str, Any]:
    content = json.dumps([[p.ids, dict(p.columns)] for p in questions.prompts], sort_keys=True, default=str)
    return questions.settings() | {"digest": hashlib.blake2b(content.encode(), digest_size=16).hexdigest()}


# --- while training --------------------------------------------------------------------------------------------------------


class LogRight(TrainerCallback):
    """Logs what was right before training, and every `every` optimizer steps what is then."""

    def __init__(self, measured: Measured, every: int | None) -> None:
        self.measured, self.every = measured, every
        self.trainer: BNFTrainer | None = None  # there is none yet when callbacks are made

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 0 and self.trainer is not None and self.measured.before is not None:
            self.trainer.log(log_values(self.measured.questions.values(self.measured.before)))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        step = state.global_step
        if self.every is None or step % self.every or step >= state.max_steps or self.trainer is None:
            return  # the last one is measured after training
        found = ask_trained(self.trainer, self.measured.questions, f"answers after step {step}")
        self.measured.during[step] = self.measured.questions.values(found)
        self.trainer.log(log_values(self.measured.during[step]))
