"""What a run is made of: every flag of transformers.TrainingArguments, the project's own, and the paper's presets."""

import datetime
import importlib.util
import json
from dataclasses import MISSING, dataclass, field
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
from transformers import SchedulerType, TrainingArguments

from bnf_core import multiplies
from bnf_train import demo, inherited
from bnf_train.errors import WHY_NOT_STREAMED, UsageError
from bnf_train.options import FOR_BF16_WEIGHTS, Checks, Data, LoRA, Model, Objective, Output, Rows, Training

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
        "learning_rate": 1e-4,
        "batch_size": 32,
        "per_device_train_batch_size": 32,
        "per_device_eval_batch_size": 64,
        "max_length": 128,
        "eval_strategy": "steps",
        "eval_steps": 38,
        "save_strategy": "no",
        "check": "exact",
        "check_dataset": str(demo.CHECK),
        "check_rows": 400,
        "check_max_new_tokens": 40,
    },
}


_THEIRS = TrainingArguments.__dataclass_fields__


@dataclass
class BNFConfig(Output, Checks, LoRA, Training, Objective, Model, Rows, Data, TrainingArguments):
    """TrainingArguments with the project's own flags (`options`), and the paper's set-up as defaults."""

    lr_scheduler_type: SchedulerType | str = field(default="cosine", metadata=_THEIRS["lr_scheduler_type"].metadata)
    warmup_steps: float = field(default=0.1, metadata=_THEIRS["warmup_steps"].metadata)
    logging_steps: float = field(default=1, metadata=_THEIRS["logging_steps"].metadata)
    remove_unused_columns: bool = field(default=False, metadata={"help": "Not used: rows are tokenised here."})
    streaming: bool = field(default=False, metadata={"help": "Refused: all rows must be at hand before training."})

    # no flags
    hyperparameters: dict[str, Any] = field(default_factory=dict, init=False)  # of the objective, from flags of their own
    datasets: list[str] = field(default_factory=list, init=False)  # --dataset, which may name several
    rows_digest: str = field(default="", init=False)  # of the training rows, once they are read
    reference_digest: str = field(default="", init=False)  # of the reference's weights, once they are loaded
    model_digest: str = field(default="", init=False)  # of the weights that training began with
    tracebacks: bool = field(default=False, init=False)  # --debug

    def __post_init__(self) -> None:
        self._check()
        self.datasets = self.datasets or [str(self.dataset)]
        if self.dtype == "bfloat16":
            self.optim_args: str | None = _optim_args_for_bf16_weights(str(self.optim), vars(self)["optim_args"])
        accelerated = torch.cuda.is_available() or torch.backends.mps.is_available()
        self.use_cpu: bool = self.use_cpu or not accelerated
        if self.tokens_per_pass is None:
            self.tokens_per_pass = 640 if self.use_cpu else 0
        if self.bf16 is None:
            self.bf16 = bf16_in_hardware(self.use_cpu) and not self.fp16
        cache = self.reference_cache or Path(huggingface_hub.constants.HF_HOME) / "bnf_train"
        self.reference_cache = str(Path(cache).expanduser())
        self.template_date = self.template_date or datetime.date.today().isoformat()
        if self.output_dir is None:
            self.output_dir = str(_new_folder(Path("runs") / f"{_short_name(self.model)}-{self.objective.rpartition(':')[2]}"))
        accumulate = self.gradient_accumulation_steps
        self.gradient_accumulation_steps = 1 if accumulate is None else accumulate
        super().__post_init__()
        inherited.check_together(self)
        self._set_accumulation(accumulate)

    def template_options(self) -> dict[str, Any]:
        """What `data.Options` takes; see `template_options`."""
        return template_options(self)

    def _check(self) -> None:
        """Raises UsageError for what transformers does not check."""
        defaults = {name: _THEIRS[name].default for name in inherited.REFUSED if _THEIRS[name].default is not MISSING}
        inherited.check_values(self)
        inherited.check({name: value for name, value in vars(self).items() if value != defaults.get(name, [])})
        if self.dataset is None:
            known = ", ".join(name for name in PRESETS if name != str(demo.MODEL))
            raise UsageError(f"--dataset is missing: only the models of the paper bring their own ({known}).")
        if self.streaming:
            raise UsageError(f"--streaming: not possible, because {WHY_NOT_STREAMED}; leave it out: rows are read from disk.")
        self.template_options()
        for name, good, expected in (
            ("max_length", self.max_length >= 2, "at least 2 tokens"),
            ("lora_r", self.lora_r >= 1, "a rank of at least 1"),
            ("lora_dropout", 0 <= self.lora_dropout < 1, "a share from 0 to below 1"),
            ("pairing_ratio", 0 <= self.pairing_ratio <= 1, "a share from 0 to 1"),
            ("show_examples", self.show_examples >= 0, "a number of rows, or 0"),
            ("eval_size", self.eval_size >= 0, "a share below 1, a number of rows, or 0"),
            ("learning_rate", self.learning_rate >= 0, "a number that is not negative"),
            ("check_samples", self.check_samples >= 0, "a number of samples, or 0"),
            ("check_temperature", self.check_temperature > 0, "more than 0 (--check_samples 0 is greedy answers alone)"),
            ("check_rows", self.check_rows >= 1, "at least 1"),
            ("check_max_new_tokens", self.check_max_new_tokens >= 1, "at least 1"),
            ("check_steps", self.check_steps is None or self.check_steps >= 1, "a number of optimizer steps of at least 1"),
            ("tokens_per_pass", (self.tokens_per_pass or 0) >= 0, "a number of tokens, or 0"),
        ):
            if not good:
                raise UsageError(f"--{name}: expected {expected}, got {getattr(self, name)}.")
        for name in ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps", "batch_size"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise UsageError(f"--{name}: expected at least 1, got {value}.")
        if self.output_dir is None and resumes(self.resume_from_checkpoint):
            raise UsageError("--resume_from_checkpoint: pass the --output_dir of the run to go on with, too.")

    @property
    def n_gpu(self) -> int:
        """One process drives one device: torch.nn.DataParallel would split flat token vectors anywhere."""
        return min(1, int(super().n_gpu))

    def to_dict(self) -> dict[str, Any]:
        """As TrainingArguments', with the objective's hyper-parameters under the names of their flags."""
        return {**super().to_dict(), **self.hyperparameters}

    def to_json_string(self) -> str:
        """Beside each checkpoint: what a resumed run is compared with (`bnf_train.training.checkpoint`)."""
        own = {name: getattr(self, name) for name in ("rows_digest", "reference_digest", "model_digest", "hyperparameters")}
        return json.dumps(json.loads(super().to_json_string()) | own, indent=2)

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


def template_options(flags: Any) -> dict[str, Any]:
    """What `data.Options` takes, of the flags of the same names.

    Raises:
      UsageError: --chat_template_kwargs is no JSON object, or --template_date no day.
    """
    kwargs = json_object("chat_template_kwargs", flags.chat_template_kwargs, '{"enable_thinking": false}')
    try:
        datetime.date.fromisoformat(flags.template_date or "2000-01-01")
    except ValueError as error:
        raise UsageError(f"--template_date: expected a day as YYYY-MM-DD, got {flags.template_date}.") from error
    return {"chat_template": flags.chat_template, "chat_template_kwargs": kwargs, "date": flags.template_date}


def json_object(flag: str, text: str | None, example: str) -> dict[str, Any]:
    """The value of a flag that takes a JSON object; nothing where it is not given.

    Raises:
      UsageError: it is no JSON object.
    """
    try:
        value = json.loads(text or "{}")
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise UsageError(f"--{flag} {text}: expected a JSON object, such as {example}.")
    return value


def _optim_args_for_bf16_weights(optim: str, optim_args: str | None) -> str:
    """--optim_args of an optimizer that makes up for bf16's rounding, switched on.

    Raises:
      UsageError: the optimizer does not, or is told not to, or its package is missing.
    """
    if optim not in FOR_BF16_WEIGHTS:
        raise UsageError(
            f"--dtype bfloat16: with --optim {optim} the weights would not move, because AdamW's step at these learning rates "
            f"is a hundred times smaller than the spacing of bf16 numbers; use --optim {' or '.join(FOR_BF16_WEIGHTS)}, "
            "or leave --dtype out: weights are then float32, and --bf16 multiplies in bf16."
        )
    switch, package = FOR_BF16_WEIGHTS[optim]
    if importlib.util.find_spec(package) is None:
        raise UsageError(f"--optim {optim}: needs the package {package}, which is not installed.")
    given = dict(part.partition("=")[::2] for part in (optim_args or "").replace(" ", "").split(",") if part)
    if given.setdefault(switch, "True").lower() not in ("true", "1", "yes"):
        raise UsageError(f"--dtype bfloat16: needs {switch}=True in --optim_args, or most updates are lost to rounding.")
    return ",".join(f"{key}={value}" for key, value in given.items())


def bf16_in_hardware(use_cpu: bool) -> bool:
    if not use_cpu:
        return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    return multiplies(torch.bfloat16, "cpu")


def resumes(argument: str | bool | None) -> bool:
    """Whether --resume_from_checkpoint asks for anything."""
    return str(argument or "").lower() not in ("", "false", "none", "no")


def _short_name(model: str) -> str:
    return "demo" if model == str(demo.MODEL) else Path(model.rstrip("/")).name


def _new_folder(path: Path) -> Path:
    """`path`, or the first of path-2, path-3, … that does not exist: a default never writes over a run."""
    candidate, number = path, 2
    while candidate.exists():
        candidate, number = path.with_name(f"{path.name}-{number}"), number + 1
    return candidate
