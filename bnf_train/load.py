"""Models, tokenizers and data sets from local folders or the Hugging Face hub; what cannot be had is one sentence."""

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from bnf_train.errors import UsageError

T = TypeVar("T")


def load_tokenizer(name: str, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder or hub name; padding falls back to the end-of-sequence token."""
    tokenizer: PreTrainedTokenizerBase = _from_model(
        name, lambda: AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
    )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # masks come from positions, so which token pads does not matter
    return tokenizer


def context_length(name: str, trust_remote_code: bool = False) -> int | None:
    """The longest sequence that a model was made for, in tokens; None where its configuration does not say."""
    config = _from_model(name, lambda: AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code))
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def load_model(name: str, trust_remote_code: bool = False) -> PreTrainedModel:
    """A causal language model with float32 weights, from safetensors only.

    Whatever dtype they are stored in, weights are held in float32: at the paper's learning rates a step is smaller
    than the spacing of bf16 numbers, and weights held in bf16 do not move.
    """
    return _from_model(
        name,
        lambda: AutoModelForCausalLM.from_pretrained(
            name, dtype=torch.float32, use_safetensors=True, trust_remote_code=trust_remote_code
        ),
    )


def load_hub_dataset(name: str) -> Any:
    """All splits of a hub dataset."""
    if Path(name).exists() or name.count("/") > 1 or name.startswith((".", "~")):
        raise UsageError(f"--dataset {name}: expected a .jsonl, .json, .parquet or .csv file, or a hub dataset's name.")
    _offline_if_unreachable()
    import datasets  # slow to import, and not needed for local JSON

    try:
        return datasets.load_dataset(name)
    except Exception as error:  # the library raises a dozen unrelated types here
        raise UsageError(
            f"{name}: the dataset could not be fetched from the Hugging Face hub ({_reason(error)}); "
            "pass --dataset with a local .jsonl file instead."
        ) from error


def load_file(format: str, path: Path) -> Any:
    """Rows of a local file that `datasets` reads (parquet, csv)."""
    import datasets

    try:
        return datasets.load_dataset(format, data_files=str(path), split="train")
    except Exception as error:
        raise UsageError(f"{path}: could not be read as {format} ({_reason(error)}).") from error


def _from_model(name: str, load: Callable[[], T]) -> T:
    local = Path(name).exists()
    if local and not (Path(name) / "config.json").is_file():
        raise UsageError(f"--model {name}: expected a model folder with a config.json, found none.")
    if not local and (name.count("/") > 1 or name.startswith((".", "~"))):
        raise UsageError(f"--model {name}: no such folder.")
    if not local:
        _offline_if_unreachable()
    try:
        return load()
    except (OSError, ValueError, KeyError, ImportError) as error:
        if local:
            raise UsageError(f"--model {name}: could not be loaded ({_reason(error)}).") from error
        raise UsageError(
            f"{name}: the model could not be fetched from the Hugging Face hub ({_reason(error)}); "
            "pass --model with a local model folder (and --dataset with a local .jsonl file) instead."
        ) from error


def _reason(error: BaseException) -> str:
    if not _offline_if_unreachable():
        return "the hub cannot be reached and nothing is cached"
    return " ".join(str(error).split())[:300].rstrip(".")


@functools.cache
def _offline_if_unreachable() -> bool:
    """Whether the hub answers within seconds; where not, the libraries are told to look in their caches only."""
    import huggingface_hub

    if huggingface_hub.constants.HF_HUB_OFFLINE:
        return False
    try:
        huggingface_hub.get_session().head(huggingface_hub.constants.ENDPOINT, timeout=5)
    except Exception:  # whatever the HTTP library of the day raises
        os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"
        huggingface_hub.constants.HF_HUB_OFFLINE = True
        return False
    return True
