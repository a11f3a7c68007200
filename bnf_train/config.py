"""What a run is made of: every flag of transformers.TrainingArguments, the project's own, and the paper's presets."""

import importlib.util
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import huggingface_hub
import torch
from transformers import SchedulerType, TrainingArguments

from bnf_core import OBJECTIVES
from bnf_train import demo
from bnf_train.errors import WHY_NOT_STREAMED, UsageError

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

# Optimizers that keep what a bf16 weight rounds away: the argument that makes them, and the package they come from.
FOR_BF16_WEIGHTS = {
    "adamw_torch_8bit": ("bf16_stochastic_round", "torchao"),
    "adamw_torch_4bit": ("bf16_stochastic_round", "torchao"),
    "adamw_anyprecision": ("use_kahan_summation", "torchdistx"),
    "stable_adamw": ("kahan_sum", "optimi"),
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
            "help": "Preference data: a .jsonl, .json, .parquet or .csv file, a folder that the datasets library saved, or a "
            "hub dataset's name or name:configuration. Rows are (prompt, chosen, rejected) or (prompt, completion, label), "
            "plain text or chat messages; the prompt may stand in the messages of chosen and rejected instead."
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
    too_long: str = field(
        default="cut",
        metadata={
            "help": "Rows longer than --max_length: cut the response's end (and drop rows whose prompt leaves no room), "
            "drop them, or stop.",
            "choices": ["cut", "drop", "error"],
        },
    )
    empty: str = field(
        default="error", metadata={"help": "Rows with an empty response: drop them, or stop.", "choices": ["drop", "error"]}
    )
    no_boundary: str = field(
        default="drop",
        metadata={
            "help": "Rows whose prompt is no prefix of prompt and response, so that the response has no certain beginning: "
            "drop them, or stop.",
            "choices": ["drop", "error"],
        },
    )
    duplicates: str = field(
        default="keep",
        metadata={"help": "Exact duplicates of a row before: keep, drop, or stop.", "choices": ["keep", "drop", "error"]},
    )
    pairing_ratio: float = field(
        default=1.0,
        metadata={
            "help": "Share of training pairs that stay whole; of the others one side, drawn at random, is removed "
            "(table 6 of the paper)."
        },
    )
    show_examples: int = field(default=2, metadata={"help": "Training rows printed at the start, with what the loss sees."})
    streaming: bool = field(default=False, metadata={"help": "Refused: all rows must be at hand before training."})
    objective: str = field(
        default="bnf",
        metadata={
            "help": f"What to minimise: {', '.join(sorted(OBJECTIVES))}, or a function of your own as "
            "module:function or path/to/file.py:function. Its hyper-parameters are flags (below)."
        },
    )
    hyperparameters: dict[str, Any] = field(default_factory=dict, init=False)  # of the objective, from flags of their own
    rows_digest: str = field(default="", init=False)  # of the training rows, once they are read
    batch_size: int | None = field(
        default=None,
        metadata={
            "help": "Rows per optimizer step over all devices (a pair is one row); sets gradient_accumulation_steps. "
            "Default: 128 as in the paper."
        },
    )
    packing: bool = field(
        default=True,
        metadata={"help": "Responses of a batch stand one behind the other, without padding and without seeing each other."},
    )
    tokens_per_pass: int | None = field(
        default=None,
        metadata={
            "help": "A packed batch with more tokens is computed in several passes, which changes its memory and not its "
            "gradient; one process only. Default: 640 on a CPU, else 0, which is no limit."
        },
    )
    ref_model: str | None = field(
        default=None, metadata={"help": "Another reference, as --model. Default: --model as it is before training."}
    )
    reference_cache: str | None = field(
        default=None,
        metadata={
            "help": "Folder that keeps the reference's log-odds for the next run on the same weights and rows, 4 bytes a "
            "response token. Default: bnf_train in the cache folder of Hugging Face (HF_HOME)."
        },
    )
    no_reference_cache: bool = field(
        default=False, metadata={"help": "Compute the reference's log-odds anew and keep nothing."}
    )
    use_peft: bool = field(default=False, metadata={"help": "Train a LoRA adapter; the frozen base is the reference."})
    lora_r: int = field(default=16, metadata={"help": "Rank of the adapter."})
    lora_alpha: float = field(default=32, metadata={"help": "The adapter is scaled by lora_alpha / lora_r."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout on what enters the adapter."})
    lora_target_modules: list[str] | None = field(
        default=None, metadata={"help": "Names of the layers with an adapter. Default: every linear layer but the head."}
    )
    lora_modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Names of modules trained whole beside the adapter, as lm_head. Default: none."}
    )
    load_in_4bit: bool = field(
        default=False, metadata={"help": "QLoRA: the base in 4 bits (bitsandbytes, a CUDA GPU, --use_peft)."}
    )
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code that comes with a hub model."})
    dtype: str = field(
        default="float32",
        metadata={
            "help": "What weights are held in. bfloat16 needs an --optim that loses no update to rounding: "
            + ", ".join(FOR_BF16_WEIGHTS),
            "choices": ["float32", "bfloat16"],
        },
    )
    debug: str = field(
        default="",
        metadata={
            "help": "Show the traceback of an error; or one of transformers' debug options.",
            "nargs": "?",
            "const": "error",
        },
    )

    # TrainingArguments' own, with other defaults
    output_dir: str | None = field(
        default=None, metadata={"help": "Where the model goes. Default: a new folder runs/MODEL-OBJECTIVE."}
    )
    bf16: bool = field(  # `bool | None` would make the parser ask for a value
        default=cast(bool, None),
        metadata={"help": "bf16 autocast over float32 weights. Default: where the device multiplies bf16 in hardware."},
    )
    learning_rate: float = field(default=5e-7, metadata={"help": "Peak learning rate of AdamW."})
    lr_scheduler_type: str = field(
        default="cosine", metadata={"help": "Learning-rate schedule.", "choices": [kind.value for kind in SchedulerType]}
    )
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
        if self.lora_r < 1:
            raise UsageError(f"--lora_r: expected a rank of at least 1, got {self.lora_r}.")
        if not 0 <= self.lora_dropout < 1:
            raise UsageError(f"--lora_dropout: expected a share from 0 to below 1, got {self.lora_dropout}.")
        if self.streaming:
            raise UsageError(f"--streaming: not possible, because {WHY_NOT_STREAMED}; leave it out: rows are read from disk.")
        if not 0 <= self.pairing_ratio <= 1:
            raise UsageError(f"--pairing_ratio: expected a share from 0 to 1, got {self.pairing_ratio}.")
        if self.show_examples < 0:
            raise UsageError(f"--show_examples: expected a number of rows, or 0, got {self.show_examples}.")
        if self.eval_size < 0:
            raise UsageError(f"--eval_size: expected a share below 1, a number of rows, or 0, got {self.eval_size}.")
        for name in ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps", "batch_size"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise UsageError(f"--{name}: expected at least 1, got {value}.")
        if not self.learning_rate >= 0:
            raise UsageError(f"--learning_rate: expected a number that is not negative, got {self.learning_rate}.")
        if self.dtype == "bfloat16":
            self.optim_args: str | None = _optim_args_for_bf16_weights(str(self.optim), vars(self)["optim_args"])
        self.tracebacks: bool = "error" in self.debug.split()
        self.debug = " ".join(word for word in self.debug.split() if word != "error")
        accelerated = torch.cuda.is_available() or torch.backends.mps.is_available()
        self.use_cpu: bool = self.use_cpu or not accelerated
        if self.tokens_per_pass is None:
            self.tokens_per_pass = 640 if self.use_cpu else 0
        if self.tokens_per_pass < 0:
            raise UsageError(f"--tokens_per_pass: expected a number of tokens, or 0, got {self.tokens_per_pass}.")
        self.bf16 = bf16_in_hardware(self.use_cpu) and not self.fp16 if self.bf16 is None else self.bf16
        cache = self.reference_cache or Path(huggingface_hub.constants.HF_HOME) / "bnf_train"
        self.reference_cache = str(Path(cache).expanduser())
        if self.output_dir is None and resumes(self.resume_from_checkpoint):
            raise UsageError("--resume_from_checkpoint: pass the --output_dir of the run to go on with, too.")
        if self.output_dir is None:
            self.output_dir = str(_new_folder(Path("runs") / f"{_short_name(self.model)}-{self.objective.rpartition(':')[2]}"))
        accumulate = self.gradient_accumulation_steps
        self.gradient_accumulation_steps = 1 if accumulate is None else accumulate
        super().__post_init__()
        # layers are compiled one by one in `run`; the trainer's compiled model would leave out the log-odds head's forward
        self.compile_backend, self.torch_compile_backend = vars(self)["torch_compile_backend"], None
        if self.n_gpu > 1:
            # one process drives one device; torch.nn.DataParallel would split flat token vectors anywhere
            self._n_gpu = 1
        self._set_accumulation(accumulate)

    def to_dict(self) -> dict[str, Any]:
        """As TrainingArguments', with the objective's hyper-parameters under the names of their flags."""
        return {**super().to_dict(), **self.hyperparameters}

    def to_json_string(self) -> str:
        """Beside each checkpoint: what `checkpoint.check_same_run` compares, too."""
        own = {"rows_digest": self.rows_digest, "hyperparameters": self.hyperparameters}
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
    return bool(torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported())


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
