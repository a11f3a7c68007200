"""Rows of preference data as they stand in a file, a folder or on the hub; what cannot be read is one sentence."""

import dataclasses
import re
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import datasets

from bnf_train.data.files import RawRow, is_data_file, read_file, rows_of_table
from bnf_train.data.values import shown
from bnf_train.errors import WHY_NOT_STREAMED, UsageError, one_line, telling
from bnf_train.hub import load_hub_dataset

__all__ = ["SPLITS", "RawRow", "has_splits", "other_splits", "parse_source", "read_rows", "shown"]

# the first of these that there is
SPLITS = {
    "train": ("train", "train_prefs"),
    "test": ("test", "test_prefs", "validation", "valid", "val", "dev", "eval", "evaluation"),
}
Splits = dict[str | None, Callable[[], list[RawRow]]]  # how the rows of each are read; of a table without splits, None


def read_rows(source: str, split: str = "train") -> list[RawRow]:
    """Rows of a table that has no splits, of the split that the source names (`source=split`), or of one in SPLITS[split].

    [] where there are splits and none of them holds rows to test on.

    Raises:
      UsageError: the source cannot be read, has not that split, or has no row.
    """
    source, named = parse_source(source)
    splits = _splits(source)
    name = named if named or None in splits else _first(splits, split)
    if name is None and None not in splits and split != "train":
        return []
    if name not in splits:
        wanted, there = named or " or ".join(SPLITS[split]), [str(other) for other in splits if other is not None]
        or_else = f"{', '.join(there)}: {source}={there[-1]} is the rows of that one" if there else "a table without splits"
        raise UsageError(f"{source}: expected a split named {wanted}, got {or_else}.")
    rows = splits[name]()
    if not rows:
        raise UsageError(f"{source}: expected JSON objects, or rows of a table, got no row.")
    return rows


def parse_source(source: str) -> tuple[str, str | None]:
    """The source and the split that `=split` at its end names, or `:split` one of SPLITS; a file may have = in its name.

    >>> parse_source("org/name:configuration=validation"), parse_source("org/name:test"), parse_source("rows.jsonl")
    (('org/name:configuration', 'validation'), ('org/name', 'test'), ('rows.jsonl', None))
    """
    if Path(source).exists():
        return source, None
    known = "|".join(name for names in SPLITS.values() for name in names)
    match = re.fullmatch(r"(.+)=(\w+)", source) or re.fullmatch(rf"(.+):({known})", source)
    return (match[1], match[2]) if match else (source, None)


def parse_share(source: str) -> tuple[str, float]:
    """The source and the share of its rows that `=0.3` at its end asks for, 1 where it does not.

    >>> parse_share("rows.jsonl=0.3"), parse_share("org/name:train=0.05"), parse_share("rows.jsonl")
    (('rows.jsonl', 0.3), ('org/name:train', 0.05), ('rows.jsonl', 1.0))
    """
    match = re.fullmatch(r"(.+)=(0?\.\d+|1\.0*)", source)
    return (match[1], float(match[2])) if match and not Path(source).exists() else (source, 1.0)


def has_splits(source: str) -> bool:
    """Whether `source` may bring held-out rows of its own."""
    source, named = parse_source(source)
    return named is None and not Path(source).is_file() and not (Path(source) / "state.json").is_file()


def other_splits(source: str) -> list[str]:
    """Names of the splits that are neither trained nor tested on; none where the source names the split that it means."""
    if not has_splits(source):
        return []
    splits = _splits(source)
    used = [_first(splits, split) for split in SPLITS]
    return [name for name in splits if name is not None and name not in used]


def _first(splits: Splits, split: str) -> str | None:
    return next((name for name in SPLITS[split] if name in splits), None)


def _splits(source: str) -> Splits:
    path = Path(source)
    if path.is_file():
        return {None: partial(read_file, path)}
    if path.is_dir():
        return _splits_of_folder(path)
    if path.exists():
        raise UsageError(f"{path}: a stream instead of a file, but {WHY_NOT_STREAMED}; write it to a file first.")
    if "://" in source:
        raise UsageError(f"--dataset {source}: expected a file or a hub dataset's name, got an address: download it first.")
    if is_data_file(path):
        raise UsageError(f"{path}: no such file.")
    folder, _, configuration = source.rpartition(":")
    if folder and Path(folder).is_dir():
        return _splits_of_folder(Path(folder), configuration)
    return _splits_of_datasets(load_hub_dataset(source), source)


def _splits_of_folder(path: Path, configuration: str | None = None) -> Splits:
    """Of what `save_to_disk` wrote (a Dataset or a DatasetDict), or of a folder of data files as on the hub."""
    try:
        if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
            return _splits_of_datasets(datasets.load_from_disk(str(path)), str(path))
        inside = str(path.resolve())  # "json" alone would be a format
        with tempfile.TemporaryDirectory() as cache:  # nothing is read yet, only a lock is left there
            config = datasets.load_dataset_builder(inside, configuration, cache_dir=cache).config
        if _are_ours(config):
            return {str(name): partial(_read_files, files, path, config) for name, files in config.data_files.items()}
        return _splits_of_datasets(datasets.load_dataset(inside, configuration), str(path))
    except Exception as error:  # the library raises a dozen unrelated types
        why = one_line(telling(error))
        raise UsageError(f"{path}: could not be read as a folder of the datasets library ({why}).") from error


def _are_ours(config: Any) -> bool:
    """Whether our readers read these files as the datasets library would: no format of its own, no option of its README."""
    files = [Path(file) for files in (config.data_files or {}).values() for file in files]
    free = {"name", "version", "data_dir", "data_files", "description", "features", "sep"}
    options = [field for field in dataclasses.fields(config) if field.name not in free]
    default = type(config)()
    return all(is_data_file(file) and file.is_file() for file in files) and all(
        getattr(config, field.name) == getattr(default, field.name) for field in options
    )


def _read_files(files: list[str], folder: Path, config: Any) -> list[RawRow]:
    rows: list[RawRow] = []
    for file in map(Path, files):
        name = folder / file.relative_to(folder.resolve()) if file.is_relative_to(folder.resolve()) else file
        rows += read_file(file, str(name), getattr(config, "sep", None))
    return rows


def _splits_of_datasets(data: Any, source: str) -> Splits:
    if isinstance(data, datasets.DatasetDict):
        return {name: partial(_rows_of_dataset, table, source) for name, table in data.items()}
    return {None: partial(_rows_of_dataset, data, source)}


def _rows_of_dataset(data: datasets.Dataset, source: str) -> list[RawRow]:
    try:
        data.data.validate(full=True)  # before rows are picked from it: see rows_of_table
        return rows_of_table(data.with_format("arrow")[:], source)
    except UsageError:
        raise
    except Exception as error:  # a damaged Arrow file shows itself only here
        raise UsageError(f"{source}: could not be read ({one_line(telling(error))}).") from error
