"""Models and tokenizers from local folders or the Hugging Face hub; what cannot be had is one sentence."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

from bnf_train.errors import UsageError, is_out_of_memory, one_line
from bnf_train.hub import reachable, why_not_fetched

T = TypeVar("T")


def load_tokenizer(name: str, trust_remote_code: bool = False, flag: str = "--model") -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder or hub name; padding falls back to the end-of-sequence token."""
    tokenizer: PreTrainedTokenizerBase = from_model(
        name, AutoTokenizer.from_pretrained, flag, "its tokenizer could", trust_remote_code=trust_remote_code
    )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # masks come from positions, so which token pads does not matter
    return tokenizer


def context_length(name: str, trust_remote_code: bool = False, flag: str = "--model") -> int | None:
    """The longest sequence that a model was made for, in tokens; None where its configuration does not say."""
    config = from_model(name, AutoConfig.from_pretrained, flag, trust_remote_code=trust_remote_code)
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def load_model(
    name: str,
    trust_remote_code: bool = False,
    dtype: torch.dtype = torch.float32,
    quantization: Any = None,
    flag: str = "--model",
) -> PreTrainedModel:
    """A causal language model with float32 weights, from safetensors only.

    Whatever dtype they are stored in, weights are held in float32 unless asked otherwise: at the paper's learning rates a
    step is smaller than the spacing of bf16 numbers, and weights held in bf16 do not move.

    Raises:
      UsageError: no model there, or one whose weights are pickled, damaged, incomplete, NaN or infinite.
    """
    if not sys.stderr.isatty():
        disable_progress_bar()  # of shards being read; a log file wants none
    model, info = from_model(
        name,
        _load_causal_lm,
        flag,
        dtype=dtype,
        use_safetensors=True,
        trust_remote_code=trust_remote_code,
        quantization_config=quantization,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # said below
    )
    for key, stored, expected in sorted(info["mismatched_keys"]):
        raise UsageError(
            f"{flag} {name}: config.json and weights do not belong together: {key} has the shape {tuple(stored)} "
            f"in the weights and {tuple(expected)} by config.json."
        )
    if missing := sorted(info["missing_keys"]):
        raise UsageError(
            f"{flag} {name}: its weights lack {len(missing)} of the tensors of {type(model).__name__}, {missing[0]} "
            "among them; they would be random numbers."
        )
    for key, tensor in model.named_parameters():
        # the sum is finite where all is: one pass, no memory; quantised weights are integers
        if not tensor.is_meta and tensor.is_floating_point() and not tensor.sum().isfinite() and not tensor.isfinite().all():
            raise UsageError(f"{flag} {name}: the tensor {key} holds NaN or infinity; the weights are damaged.")
    return model


def _load_causal_lm(name: str, local_files_only: bool, **options: Any) -> Any:
    """transformers looks for an adapter's configuration, too, and passes local_files_only to that in another place."""
    own = {"local_files_only": local_files_only}
    return AutoModelForCausalLM.from_pretrained(name, adapter_kwargs=dict(own), **own, **options)


def from_model(name: str, load: Callable[..., T], flag: str = "--model", could: str = "could", **options: Any) -> T:
    """load(name, **options) for the model folder or hub name that stands at `flag`; from the cache where the hub is away.

    Raises:
      UsageError: it cannot be had; one sentence that names the flag and says what to do.
    """
    local = Path(name).exists()
    if local and (Path(name) / "adapter_config.json").is_file():
        raise UsageError(
            f"{flag} {name}: it is an adapter, not a whole model; merge it into its base model once, with "
            "peft.AutoPeftModelForCausalLM.from_pretrained(adapter).merge_and_unload().save_pretrained(folder), save the "
            f"tokenizer beside it, and pass {flag} folder."
        )
    if local and not (Path(name) / "config.json").is_file():
        raise UsageError(f"{flag} {name}: expected a model folder with a config.json, found none.")
    if not local and (name.count("/") > 1 or name.startswith((".", "~"))):
        raise UsageError(f"{flag} {name}: no such folder.")
    try:
        return load(name, local_files_only=not local and not reachable(), **options)
    except Exception as error:  # the libraries raise a dozen unrelated types at a damaged file
        if is_out_of_memory(error):
            raise
        if "trust_remote_code=True" in str(error):
            raise UsageError(
                f"{flag} {name}: it comes with Python code of its own; read it, and pass --trust_remote_code to run it."
            ) from error
        if local and (damaged := _damaged_weights(Path(name))):
            raise UsageError(
                f"{flag} {name}: {damaged.name} is damaged or incomplete ({one_line(error, 300)}); copy or download it again."
            ) from error
        if local and _only_pickled(Path(name)):
            raise UsageError(
                f"{flag} {name}: expected weights in .safetensors files, found pickled ones only, which are not opened "
                "because they can run code; convert them once with save_pretrained of transformers, where you trust them."
            ) from error
        if local:
            raise UsageError(f"{flag} {name}: {could} not be loaded ({one_line(error, 300)}).") from error
        raise UsageError(
            f"{flag} {name}: the model could not be fetched from the Hugging Face hub ({why_not_fetched(error)}); "
            f"pass {flag} with a local model folder (and --dataset with a local .jsonl file) instead."
        ) from error


def _damaged_weights(folder: Path) -> Path | None:
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, "pt"):
                pass
        except (SafetensorError, OSError):
            return path
    return None


def _only_pickled(folder: Path) -> bool:
    return not any(folder.glob("*.safetensors")) and any(folder.glob("*.bin"))
