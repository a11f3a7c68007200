"""Checkpoint folders that are complete or do not count, and the state in them without pickle.

A checkpoint is written inside the folder PARTIAL. When all files are there, MANIFEST lists their sizes and digests, all of
them are flushed to disk, and one rename gives the folder its name. So a folder named checkpoint-N is complete, whenever
the process was killed; the manifest shows damage that was done later.
"""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from bnf_train.config import resumes
from bnf_train.errors import UsageError, is_full_disk

PARTIAL = ".checkpoint-partial"
MANIFEST = "complete.json"
ARGUMENTS = "training_args.json"
# flags that may be others in a resumed run, for they change no weight but by rounding; every other one must be the same
MAY_CHANGE = {
    # where things are, and what they are called: rows and weights are compared by what is in them
    *("model", "ref_model", "dataset", "eval_dataset", "chat_template", "output_dir", "resume_from_checkpoint"),
    *("trust_remote_code", "reference_cache", "no_reference_cache", "show_examples", "datasets", "tracebacks"),
    # how long (said, because the rest of the schedule is another), how much at once, on what
    *("num_train_epochs", "max_steps", "per_device_train_batch_size", "gradient_accumulation_steps", "tokens_per_pass"),
    *("packing", "activation_checkpointing", "activation_checkpointing_kwargs", "gradient_checkpointing"),
    *("gradient_checkpointing_kwargs", "torch_empty_cache_steps", "use_cpu", "full_determinism", "skip_memory_metrics"),
    *("dataloader_num_workers", "dataloader_pin_memory", "dataloader_persistent_workers", "dataloader_prefetch_factor"),
    *("dataloader_multiprocessing_context", "ddp_find_unused_parameters", "ddp_bucket_cap_mb", "ddp_backend", "ddp_timeout"),
    *("ddp_static_graph", "local_rank"),
    # what is logged, evaluated and kept
    *("logging_strategy", "logging_steps", "logging_first_step", "log_on_each_node", "logging_nan_inf_filter", "log_level"),
    *("log_level_replica", "disable_tqdm", "report_to", "run_name", "project", "trackio_space_id", "trackio_bucket_id"),
    *("trackio_static_space_id", "debug", "include_num_input_tokens_seen", "eval_strategy", "eval_steps", "eval_delay"),
    *("per_device_eval_batch_size", "eval_on_start", "eval_accumulation_steps", "save_strategy", "save_steps"),
    *("save_total_limit", "save_only_model", "save_on_each_node", "push_to_hub", "hub_token", "hub_private_repo"),
    *("hub_model_id", "hub_strategy", "hub_always_push", "hub_revision", "restore_callback_states_from_checkpoint"),
    *("load_best_model_at_end", "metric_for_best_model", "greater_is_better"),
    *("check", "check_dataset", "check_rows", "check_samples", "check_temperature", "check_max_new_tokens", "check_steps"),
}
DIGESTS = {  # compared once they are known
    "rows_digest": "the training rows are others than",
    "reference_digest": "the reference's weights are others than",
    "model_digest": "the weights of --model are others than",
}
LONGER = ("num_train_epochs", "max_steps")
STATES = ("optimizer.*", "global_step*")  # what holds the optimizer's state; the second by DeepSpeed
LAST = ("true", "auto", "last")  # values of --resume_from_checkpoint, beside a folder


# --- state: nested dicts, lists, tuples, numbers and tensors -----------------------------------------------------------


def write_state(path: Path, state: Any) -> None:
    """`state` as one safetensors file: its tensors, and the containers around them as JSON in the metadata.

    Raises:
      TypeError: something in it is neither a tensor, an array, a container nor a JSON scalar.
    """
    tensors: dict[str, Tensor] = {}
    containers = json.dumps(_split(state, tensors))
    save_file(tensors, path, metadata={"state": containers})


def read_state(path: Path) -> Any:
    """What `write_state` wrote, bitwise, on the CPU."""
    with safe_open(path, "pt") as file:
        return _join(json.loads(file.metadata()["state"]), file.get_tensor)


def _split(value: Any, tensors: dict[str, Tensor]) -> Any:
    name = str(len(tensors))
    if type(value) in (Tensor, torch.nn.Parameter):
        tensors[name] = value.detach().contiguous()
        return {"tensor": name}
    if isinstance(value, np.ndarray):
        tensors[name] = torch.from_numpy(value).contiguous()
        return {"array": name}
    if isinstance(value, dict):
        return {"dict": [[_split(k, tensors), _split(v, tensors)] for k, v in value.items()]}
    if isinstance(value, tuple):
        return {"tuple": [_split(v, tensors) for v in value]}
    if isinstance(value, list):
        return [_split(v, tensors) for v in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"expected tensors, containers and numbers, got {type(value).__name__}")


def _join(node: Any, tensor: Callable[[str], Tensor]) -> Any:
    if isinstance(node, list):
        return [_join(v, tensor) for v in node]
    if not isinstance(node, dict):
        return node
    ((kind, value),) = node.items()
    if kind == "dict":
        return {_join(k, tensor): _join(v, tensor) for k, v in value}
    if kind == "tuple":
        return tuple(_join(v, tensor) for v in value)
    return tensor(value) if kind == "tensor" else tensor(value).numpy()


# --- folders -----------------------------------------------------------------------------------------------------------


def seal(written: Path, final: Path) -> None:
    """Makes `written`, a folder with all its files, the checkpoint `final`."""
    (written / MANIFEST).write_text(json.dumps(_digests(written), indent=2) + "\n")
    for path in [*written.rglob("*"), written]:
        _flush(path)
    if final.exists():  # of an earlier run; this one resumed from a checkpoint before it
        shutil.rmtree(final)
    written.rename(final)
    _flush(final.parent)


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint, in a few words; None if it is as it was written."""
    try:
        expected = json.loads((folder / MANIFEST).read_text())
        wrong = next((name for name, size in expected.items() if not _has_size(folder / name, size[0])), None)
        if wrong is None:
            found = _digests(folder)
            wrong = next((name for name in expected if found[name] != expected[name]), None)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        return f"no whole {MANIFEST}" if not isinstance(error, OSError) or error.errno == errno.ENOENT else str(error)
    return None if wrong is None else f"{wrong} is not as it was written"


def to_resume(argument: str | bool | None, output: Path, say: Callable[[str], Any], main_process: bool = True) -> Path | None:
    """The checkpoint to resume from; None if training starts from the beginning.

    Args:
      argument: --resume_from_checkpoint: a checkpoint, or True (auto, last) for the last complete one of `output`.
      say: prints a line for the user.
      main_process: whether this process verifies checkpoints, and renames damaged ones; it must call this before the others.

    Raises:
      UsageError: the named checkpoint is damaged, or `output` has no checkpoint but something else in it.
    """
    if not resumes(argument):
        return None
    if str(argument).lower() not in LAST:
        folder = Path(str(argument))
        if not folder.is_dir():
            raise UsageError(f"--resume_from_checkpoint {folder}: no such folder; pass a checkpoint-N folder, or True.")
        if main_process and (what := damage(folder)):
            raise UsageError(f"--resume_from_checkpoint {folder}: not a complete checkpoint ({what}); True takes the last one.")
        _check_has_optimizer(folder)
        return folder
    if main_process and (output / PARTIAL).exists():
        say(f"{output / PARTIAL}: a checkpoint that was not finished, removed.")
        shutil.rmtree(output / PARTIAL)
    for folder in reversed(checkpoints(output)):
        what = damage(folder) if main_process else None
        if what is None:
            _check_has_optimizer(folder)
            say(f"Going on from {folder}.")
            return folder
        aside = folder.with_name(f"damaged-{folder.name}")
        shutil.rmtree(aside, ignore_errors=True)
        folder.rename(aside)  # not counted by --save_total_limit, not taken again
        say(f"{folder}: incomplete ({what}), so it is skipped, and now named {aside.name}.")
    foreign = [p.name for p in output.iterdir() if not _before_the_first(p)] if output.is_dir() else []
    if foreign:
        raise UsageError(
            f"--output_dir {output}: no complete checkpoint to go on from, and {sorted(foreign)[0]} is there; "
            "pass a new or empty folder."
        )
    say(f"No complete checkpoint in {output}: starting from the beginning.")
    return None


def _check_has_optimizer(folder: Path) -> None:
    if not any(any(folder.glob(pattern)) for pattern in STATES):
        raise UsageError(
            f"--resume_from_checkpoint {folder}: it has the model and no optimizer (--save_only_model), so a run that went on "
            f"from it would be another one; start anew, with --model {folder} if its weights are to be trained on."
        )


def arguments_of(folder: Path) -> dict[str, Any]:
    """The arguments of the run that wrote a checkpoint; none where another trainer did."""
    try:
        arguments: dict[str, Any] = json.loads((folder / ARGUMENTS).read_text())
    except (OSError, ValueError):
        return {}
    return arguments


def check_same_run(folder: Path, arguments: Mapping[str, Any], say: Callable[[str], Any]) -> None:
    """Refuses to resume with another flag than those of MAY_CHANGE: that would be another run.

    Args:
      arguments: what `BNFConfig.to_json_string` writes.
      say: takes a sentence about a run that is to be longer or shorter.

    Raises:
      UsageError: names the flag, with the value that it had when the checkpoint `folder` was written.
    """
    then = arguments_of(folder)
    kept = then.keys() & arguments.keys() - MAY_CHANGE - DIGESTS.keys()
    for name in sorted(kept, key=lambda name: (name != "objective", name)):  # its hyper-parameters are others with it
        before, now = then[name], arguments[name]
        if name == "hyperparameters" and isinstance(before, dict) and isinstance(now, dict):
            name = next((key for key in sorted(before | now) if before.get(key) != now.get(key)), name)
            before, now = before.get(name), now.get(name)
        if before != now:
            raise UsageError(
                f"--resume_from_checkpoint {folder}: --{name} {now} was {before} when it was written, so this would be another "
                "run; pass what it was, or start anew with another --output_dir."
            )
    for name in LONGER:
        if name in then and then[name] != arguments.get(name):
            say(f"--{name} {arguments.get(name)} was {then[name]}: from here on the learning rate goes by the new length.")


def check_same(folder: Path, name: str, digest: str) -> None:
    """Raises UsageError where one of DIGESTS was another when the checkpoint `folder` was written."""
    if arguments_of(folder).get(name, digest) != digest:
        raise UsageError(
            f"--resume_from_checkpoint {folder}: {DIGESTS[name]} when it was written, so this would be another run; "
            "pass what it was, or start anew with another --output_dir."
        )


def checkpoints(output: Path) -> list[Path]:
    """checkpoint-N folders of `output` in the order of N."""
    found = [p for p in output.glob("checkpoint-*") if p.is_dir() and p.name.removeprefix("checkpoint-").isdecimal()]
    return sorted(found, key=lambda p: int(p.name.removeprefix("checkpoint-")))


@contextmanager
def naming_a_full_disk(output: Path) -> Iterator[None]:
    """Turns the many errors of a full disk into one sentence that says which checkpoint is left."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        shutil.rmtree(output / PARTIAL, ignore_errors=True)  # an unfinished checkpoint is useless and takes up space
        if not is_full_disk(error):
            raise
        kept = checkpoints(output)
        last = f"the last complete checkpoint is {kept[-1]}" if kept else "there is no complete checkpoint yet"
        raise UsageError(
            f"--output_dir {output}: the disk is full; {last}; make room (or lower --save_total_limit) "
            "and go on with --resume_from_checkpoint True."
        ) from error


def _before_the_first(path: Path) -> bool:
    """Whether a run may have left this in its output folder before its first checkpoint: hidden files, trackers' logs."""
    return path.name.startswith((".", "damaged-checkpoint-")) or (path.name == "runs" and path.is_dir())


def _digests(folder: Path) -> dict[str, list[Any]]:
    paths = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST)

    def digest(path: Path) -> list[Any]:
        with path.open("rb") as file:
            return [path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()]

    with ThreadPoolExecutor() as pool:  # hashing and reading release the GIL
        return {str(p.relative_to(folder)): d for p, d in zip(paths, pool.map(digest, paths), strict=True)}


def _has_size(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
