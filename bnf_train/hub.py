"""The Hugging Face hub: data sets from it, and what to do where it does not answer."""

import functools
import os
from pathlib import Path
from typing import Any

from bnf_train.errors import UsageError, one_line, telling


def load_hub_dataset(name: str) -> Any:
    """All splits of a hub dataset, given as name or name:configuration."""
    if Path(name).exists() or name.count("/") > 1 or name.startswith((".", "~", "/")):
        raise UsageError(
            f"--dataset {name}: no such file; expected a .jsonl, .json, .parquet, .arrow, .csv or .tsv file, "
            "or a hub dataset's name."
        )
    offline_if_unreachable()
    import datasets  # slow to import, and not needed for local JSON

    repository, _, configuration = name.partition(":")
    try:
        return datasets.load_dataset(repository, configuration or None)
    except Exception as error:  # the library raises a dozen unrelated types here
        raise UsageError(
            f"{name}: the dataset could not be fetched from the Hugging Face hub ({why_not_fetched(error)}); "
            "pass --dataset with a local .jsonl file instead."
        ) from error


def why_not_fetched(error: BaseException) -> str:
    """The end of a sentence about something that the hub did not give."""
    if not offline_if_unreachable():
        return "the hub cannot be reached and nothing is cached"
    return one_line(telling(error), 300)


@functools.cache
def offline_if_unreachable() -> bool:
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
