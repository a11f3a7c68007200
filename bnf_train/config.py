"""What a run is made of: every flag of transformers.TrainingArguments, the project's own, and the paper's presets."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn, cast

import torch
from transformers import HfArgumentParser, TrainingArguments

from bnf_core import OBJECTIVES
from bnf_train import demo
from bnf_train.errors import UsageError

# Section 4 of the paper: the preference set and the learning rate of each base model. What all three share
# (batch of 128 rows, 4096 tokens, AdamW, cosine with 10 % warm-up, one epoch) are BNFConfig's defaults.
PRESETS: dict[str, dict[str, Any]] = {
    "mistralai/Mistral-7B-Instruct-v0.2": {
        "dataset": "princeton-nlp/mistral-instruct-ultrafeedback",
        "learning_rate": 5e-7,
    },
    "meta-llama/Meta-Llama-3-8B-Instruct": {
        "dataset": "princeton-nlp/llama3-ultrafeedback-armorm",
        "learning_rate": 6e-7,
    },
    "google/gemma-2-9b-it": {
        "dataset": "princeton-nlp/gemma2-ultrafeedback-armorm",
        "learning_rate": 8e-7,
    },
    str(demo.MODEL): {
        "dataset": str(demo.PREFERENCES),
        "learning_rate": 2e-4,
        "batch_size": 32,
        "per_device_train_batch_size": 16,
        "per_device_eval_batch_size": 16,
        "num_train_epochs": 3,
        "max_length": 512,
        "eval_strategy": "steps",
        "eval_steps": 6,
        "save_strategy": "no",
    },
}


@dataclass
class BNFConfig(TrainingArguments):
    """TrainingArguments with the project's own flags, and the paper's set-up as defaults."""

    model: str = field(
        default=str(demo.MODEL),
        metadata={"help": "Model folder or hub name. A model of the paper brings its preset: dataset, learning rate."},
    )
    dataset: str | None = field(
        default=None,
        metadata={
            "help": "Preference data: a .jsonl, .json, .parquet or .csv file, or the name of a hub dataset. Rows are "
            "(prompt, chosen, rejected) or (prompt, completion, label), plain text or chat messages."
        },
    )
    eval_dataset: str | None = field(
        default=None,
        metadata={"help": "Held-out rows, as --dataset. Default: the test split of a hub dataset, else --eval_size."},
    )
    eval_size: float = field(
        default=0.1,
        metadata={
            "help": "Without held-out rows of their own: the share (below 1) or number of training rows kept back, "
            "whole prompts at a time. 0 keeps none."
        },
    )
    max_length: int = field(default=4096, metadata={"help": "Longest prompt and response together, in tokens."})
    objective: str = field(default="bnf", metadata={"help": "What to minimise.", "choices": sorted(OBJECTIVES)})
    batch_size: int | None = field(
        default=None,
        metadata={
            "help": "Rows per optimizer step over all devices (a pair is one row); sets gradient_accumulation_steps. "
            "Default: 128 as in the paper."
        },
    )
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code that comes with a hub model."})

    # TrainingArguments' own, with other defaults
    output_dir: str | None = field(
        default=None, metadata={"help": "Where the model goes. Default: a new folder runs/MODEL-OBJECTIVE."}
    )
    bf16: bool = field(  # `bool | None` would make the parser ask for a value
        default=cast(bool, None),
        metadata={"help": "bf16 autocast over float32 weights. Default: where the device multiplies bf16 in hardware."},
    )
    learning_rate: float = field(default=5e-7, metadata={"help": "Peak learning rate of AdamW."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Learning-rate schedule."})
    warmup_steps: float = field(default=0.1, metadata={"help": "Warm-up steps, or below 1 their share of all steps."})
    num_train_epochs: float = field(default=1.0, metadata={"help": "Passes over the rows."})
    per_device_train_batch_size: int = field(default=1, metadata={"help": "Rows per forward pass (a pair is one)."})
    gradient_accumulation_steps: int | None = field(
        default=None, metadata={"help": "Forward passes per optimizer step. Default: what --batch_size needs."}
    )
    logging_steps: float = field(default=1, metadata={"help": "Optimizer steps from one logged loss to the next."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "Not used: rows are tokenised here."})

    def __post_init__(self) -> None:
        if self.dataset is None:
            known = ", ".join(name for name in PRESETS if name != str(demo.MODEL))
            raise UsageError(f"--dataset is missing: only the models of the paper bring their own ({known}).")
        if self.max_length < 2:
            raise UsageError(f"--max_length: expected at least 2 tokens, got {self.max_length}.")
        if self.eval_size < 0:
            raise UsageError(f"--eval_size: expected a share below 1, a number of rows, or 0, got {self.eval_size}.")
        accelerated = torch.cuda.is_available() or torch.backends.mps.is_available()
        self.use_cpu: bool = self.use_cpu or not accelerated
        self.bf16 = _bf16_in_hardware(self.use_cpu) and not self.fp16 if self.bf16 is None else self.bf16
        if self.output_dir is None:
            self.output_dir = str(_new_folder(Path("runs") / f"{_short_name(self.model)}-{self.objective}"))
        accumulate = self.gradient_accumulation_steps
        self.gradient_accumulation_steps = 1 if accumulate is None else accumulate
        super().__post_init__()
        if self.n_gpu > 1:
            # one process drives one device; torch.nn.DataParallel would split flat token vectors anywhere
            self._n_gpu = 1
        self._set_accumulation(accumulate)

    def _set_accumulation(self, accumulate: int | None) -> None:
        rows = self.per_device_train_batch_size * self.world_size
        if accumulate is None:
            if self.batch_size is None:
                self.batch_size = max(128, rows) // rows * rows
            self.gradient_accumulation_steps = self.batch_size // rows
        if self.batch_size is None:
            self.batch_size = rows * self.gradient_accumulation_steps
        if self.batch_size != rows * self.gradient_accumulation_steps:
            raise UsageError(
                f"--batch_size {self.batch_size}: expected a multiple of the {rows} rows of one forward pass "
                f"({self.per_device_train_batch_size} on each of {self.world_size} devices)"
                + ("." if accumulate is None else f" times --gradient_accumulation_steps {accumulate}: leave one out.")
            )


class _Parser(HfArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (python -m bnf_train --help lists every flag).")


def parse(arguments: Sequence[str]) -> BNFConfig:
    """Flags to a config. What a flag says goes before the model's preset, and that before the defaults."""
    parser = _Parser(BNFConfig, prog="python -m bnf_train", description=_DESCRIPTION, allow_abbrev=False)
    unset = object()
    blank = argparse.Namespace(**dict.fromkeys(vars(parser.parse_args([])), unset))
    given = {k: v for k, v in vars(parser.parse_args(list(arguments), namespace=blank)).items() if v is not unset}
    model = given.get("model", str(demo.MODEL))
    preset = dict(PRESETS.get(model, {}))
    if {"gradient_accumulation_steps", "per_device_train_batch_size"} & given.keys():
        preset.pop("batch_size", None)  # belongs with the preset's own
    if "model" not in given and "dataset" in given:  # the demo model on somebody's data: as long as it can
        preset.pop("max_length")
    try:
        return BNFConfig(**{"model": model} | preset | given)
    except (ValueError, TypeError) as error:  # TrainingArguments' own checks
        raise UsageError(str(error)) from error


_DESCRIPTION = (
    "Align a language model on responses labelled preferred or dispreferred with the BNF loss. "
    "Without arguments: a tiny embedded model on embedded data, about a minute on a laptop."
)


def _bf16_in_hardware(use_cpu: bool) -> bool:
    if not use_cpu:
        return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    return bool(torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported())


def _short_name(model: str) -> str:
    return "demo" if model == str(demo.MODEL) else Path(model.rstrip("/")).name


def _new_folder(path: Path) -> Path:
    """`path`, or the first of path-2, path-3, … that does not exist: a default never writes over a run."""
    candidate, number = path, 2
    while candidate.exists():
        candidate, number = path.with_name(f"{path.name}-{number}"), number + 1
    return candidate
