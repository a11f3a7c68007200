"""Flags of transformers.TrainingArguments that a run here cannot keep the promise of: refused by name, before anything is read.

Every other one of its flags does what its help says, or has nothing to do here (tests/train/test_inherited_flags.py has all
of them, each in exactly one list).
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from transformers import TrainingArguments
from transformers.integrations import is_deepspeed_available

from bnf_train.errors import UsageError


class Refused(NamedTuple):
    """Why a flag is refused and what to do; `good`: the values that it may have."""

    why: str
    good: tuple[Any, ...] = ()


_LEAVE_OUT = "; leave it out"
_OFF: tuple[Any, ...] = (False, None, 0, "", [])
REFUSED: dict[str, Refused] = {
    # no effect on what is trained
    "label_smoothing_factor": Refused("smooths the labels of cross-entropy, which no objective here is" + _LEAVE_OUT, _OFF),
    "do_train": Refused("a run trains; python -m bnf_train.analyze only looks at models" + _LEAVE_OUT, (True,)),
    "do_eval": Refused("--eval_strategy says when a run evaluates" + _LEAVE_OUT, _OFF),
    "do_predict": Refused("there is no test set; python -m bnf_train.analyze looks at a trained model" + _LEAVE_OUT, _OFF),
    "label_names": Refused("rows have no column of labels for transformers" + _LEAVE_OUT, _OFF),
    "length_column_name": Refused("rows have no such column" + _LEAVE_OUT, ("length",)),
    "remove_unused_columns": Refused("columns are read by their names" + _LEAVE_OUT, _OFF),
    "average_tokens_across_devices": Refused("the mean is over the responses of all processes" + _LEAVE_OUT, (True,)),
    "use_cache": Refused("keys and values are kept for generation alone" + _LEAVE_OUT, _OFF),
    # another training than asked for, or other weights
    "use_liger_kernel": Refused("the head's loss is fused already, in a forward that Liger's replaces" + _LEAVE_OUT, _OFF),
    "liger_kernel_config": Refused("belongs to --use_liger_kernel, which is refused" + _LEAVE_OUT, _OFF),
    "neftune_noise_alpha": Refused(
        "noise on the policy's embeddings makes it another model than the reference (w would not begin at 1)" + _LEAVE_OUT,
        _OFF,
    ),
    "auto_find_batch_size": Refused("a smaller batch would be another run; --tokens_per_pass takes less memory", _OFF),
    "bf16_full_eval": Refused("rounds the weights, which are saved afterwards; --bf16 evaluates under autocast", _OFF),
    "fp16_full_eval": Refused("rounds the weights, which are saved afterwards; --fp16 evaluates under autocast", _OFF),
    "ignore_data_skip": Refused("a resumed run would see rows twice" + _LEAVE_OUT, _OFF),
    "train_sampling_strategy": Refused("expected random, or sequential for the order of the rows", ("random", "sequential")),
    # metrics are the rows of bnf_train.training.metrics, over all held-out rows
    "prediction_loss_only": Refused("leaves out every metric but the loss" + _LEAVE_OUT, _OFF),
    "batch_eval_metrics": Refused("metrics are of all held-out rows" + _LEAVE_OUT, _OFF),
    "include_for_metrics": Refused("metrics are made of log-odds alone" + _LEAVE_OUT, _OFF),
    "eval_do_concat_batches": Refused("metrics are of all held-out rows" + _LEAVE_OUT, (True,)),
    "eval_use_gather_object": Refused("what is gathered are tensors" + _LEAVE_OUT, _OFF),
    # signals and processes
    "enable_jit_checkpoint": Refused("SIGTERM saves a checkpoint anyway, after the micro-batch at work" + _LEAVE_OUT, _OFF),
    "local_rank": Refused("torchrun and accelerate launch say which process is which" + _LEAVE_OUT, (-1,)),
}
# keys of --accelerator_config, with the values that are possible
ACCELERATOR: dict[str, tuple[Any, ...]] = {
    "split_batches": (False,),
    "dispatch_batches": (None, False),
    "even_batches": (True,),
    "use_seedable_sampler": (True,),
    "gradient_accumulation_kwargs": (None,),
}


def check(given: Mapping[str, Any]) -> None:
    """Raises UsageError for the first flag of REFUSED that `given` has with a value that it may not have."""
    for name, (why, good) in REFUSED.items():
        if name in given and given[name] not in good:
            raise UsageError(f"--{name} {given[name]}: {why}.")


def check_values(config: TrainingArguments) -> None:
    """Raises UsageError for values that transformers takes as they come, and that mean nothing, or another run.

    To be called before it has looked at them.
    """
    for name, good, expected in (
        ("max_grad_norm", config.max_grad_norm >= 0, "a limit, or 0 for none"),  # below 0 the gradient would turn round
        ("weight_decay", config.weight_decay >= 0, "a number that is not negative"),
        ("num_train_epochs", config.num_train_epochs > 0, "more than 0"),
        ("max_steps", config.max_steps == -1 or config.max_steps >= 1, "at least 1, or -1 for as many as the epochs have"),
        ("seed", 0 <= config.seed < 2**32, "a number from 0 to 2^32 - 1"),
        ("data_seed", 0 <= (config.data_seed or 0) < 2**32, "a number from 0 to 2^32 - 1"),
        ("save_steps", config.save_steps > 0, "a number of steps, or a share of them below 1"),
        ("eval_steps", config.eval_steps is None or config.eval_steps > 0, "a number of steps, or a share of them below 1"),
        ("eval_delay", config.eval_delay >= 0, "a number of epochs or steps"),
        ("save_total_limit", config.save_total_limit is None or config.save_total_limit >= 1, "at least 1"),
        (
            "eval_accumulation_steps",
            config.eval_accumulation_steps is None or config.eval_accumulation_steps >= 1,
            "at least 1",
        ),
        ("dataloader_num_workers", config.dataloader_num_workers >= 0, "a number of processes, or 0"),
        ("ddp_timeout", config.ddp_timeout > 0, "a number of seconds"),
    ):
        if not good:
            raise UsageError(f"--{name}: expected {expected}, got {getattr(config, name)}.")
    workers = "--dataloader_num_workers of at least 1", config.dataloader_num_workers > 0
    for name, needs, there in (
        ("dataloader_persistent_workers", *workers),
        ("dataloader_multiprocessing_context", *workers),
        ("fsdp_config", "--fsdp", bool(config.fsdp)),
        ("deepspeed", "the package deepspeed, which is not installed", is_deepspeed_available()),
    ):
        if getattr(config, name) and not there:
            raise UsageError(f"--{name}: needs {needs}; add it, or leave this out.")


def check_together(config: TrainingArguments) -> None:
    """Raises UsageError for what can be told once transformers has looked: the number of processes, --accelerator_config.

    A value of the latter is refused that would deal rows out, or count them, in another way.
    """
    if config.fsdp and config.world_size == 1:
        raise UsageError("--fsdp: there is one process, which has all weights; start several (accelerate launch, torchrun).")
    if config.save_strategy == "best" and (config.metric_for_best_model is None or config.eval_strategy == "no"):
        raise UsageError("--save_strategy best: needs --metric_for_best_model and --eval_strategy steps or epoch.")
    for key, possible in ACCELERATOR.items():
        if (value := getattr(config.accelerator_config, key)) not in possible:
            raise UsageError(
                f"--accelerator_config: {key} {value} would give processes other rows, or count them in another way; "
                "leave that key out."
            )
