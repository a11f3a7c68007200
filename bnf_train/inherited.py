"""Flags of transformers.TrainingArguments that a run here cannot keep the promise of: refused by name, before anything is read.

Every other one of its flags does what its help says, or has nothing to do here (tests/train/test_inherited_flags.py has all
of them, each in exactly one list).
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from transformers.trainer_pt_utils import AcceleratorConfig

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


def check_accelerator(config: AcceleratorConfig) -> None:
    """Raises UsageError for a value of --accelerator_config that would deal rows out, or count them, in another way."""
    for key, possible in ACCELERATOR.items():
        if (value := getattr(config, key)) not in possible:
            raise UsageError(
                f"--accelerator_config: {key} {value} would give processes other rows, or count them in another way; "
                "leave that key out."
            )
