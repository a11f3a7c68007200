"""The Hugging Face hub: whether it answers, and data sets from it."""

import functools
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub

from bnf_train.errors import UsageError, one_line, telling


def load_hub_dataset(name: str) -> Any:
    """All splits of a hub dataset, given as name or name:configuration; from the cache where the hub does not answer."""
    if Path(name).exists() or name.count("/") > 1 or name.startswith((".", "~", "/")):
        raise UsageError(
            f"--dataset {name}: no such file; expected a .jsonl, .json, .parquet, .arrow, .csv or .tsv file, "
            "or a hub dataset's name."
        )
    repository, _, configuration = name.partition(":")
    try:
        if not reachable() and not _is_cached(repository):  # datasets would try for half a minute before it looks there
            raise ConnectionError("the hub cannot be reached")
        return datasets.load_dataset(repository, configuration or None)
    except Exception as error:  # the library raises a dozen unrelated types here
        raise UsageError(
            f"{name}: the dataset could not be fetched from the Hugging Face hub ({why_not_fetched(error)}); "
            "pass --dataset with a local .jsonl file instead."
        ) from error


def _is_cached(repository: str) -> bool:
    """Folders are named as the repository, with / and capitals written in underscores."""

    def plain(text: str) -> str:
        return text.replace("/", "").replace("_", "").lower()

    folders = Path(datasets.config.HF_DATASETS_CACHE).glob("*/")
    return any(plain(folder.name) == plain(repository) for folder in folders)


def why_not_fetched(error: BaseException) -> str:
    """The end of a sentence about something that the hub did not give."""
    if not reachable():
        return "the hub cannot be reached and nothing is cached"
    return one_line(telling(error), 300)


@functools.cache
def reachable() -> bool:
    """Whether the hub answers within seconds, asked once; what loads from it takes `local_files_only=not reachable()`."""
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        return False
    try:
        huggingface_hub.get_session().head(huggingface_hub.constants.ENDPOINT, timeout=5)
    except Exception:  # whatever the HTTP library raises
        return False
    return True
