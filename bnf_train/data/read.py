"""Rows of preference data as they stand in a file, a saved folder or on the hub; what cannot be read is one sentence."""

import csv
import io
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import datasets
import pyarrow.parquet

from bnf_train.errors import WHY_NOT_STREAMED, UsageError, one_line
from bnf_train.hub import load_hub_dataset

RawRow = dict[str, Any]
COLUMNS = ("prompt", "chosen", "rejected", "completion", "label")
SHAPES = "(prompt, chosen, rejected) or (prompt, completion, label)"
SPLITS = {"train": ("train", "train_prefs"), "test": ("test", "test_prefs", "validation")}
CSV_LABELS = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}


def read_rows(source: str, split: str = "train") -> list[RawRow]:
    """Rows of a file or a saved Dataset (which have no splits), or of a split; [] where there is no test split.

    Raises:
      UsageError: the source cannot be read, or has not the columns of either shape.
    """
    path = Path(source)
    if path.is_dir():
        return _rows_of_datasets(_load_folder(path), source, split)
    if path.is_file():
        read = {".parquet": _read_parquet, ".csv": _read_csv, ".json": _read_json}.get(path.suffix.lower(), _read_json_lines)
        rows = read(path)
        if not rows:
            raise UsageError(f"{path}: expected JSON objects, or rows of a table, with the columns {SHAPES}, got no row.")
        return rows
    if path.exists():
        raise UsageError(f"{path}: a stream instead of a file, but {WHY_NOT_STREAMED}; write it to a file first.")
    if "://" in source:
        raise UsageError(f"--dataset {source}: expected a file or a hub dataset's name, got an address: download it first.")
    if path.suffix.lower() in (".jsonl", ".json", ".parquet", ".csv"):
        raise UsageError(f"{path}: no such file.")
    return _rows_of_datasets(load_hub_dataset(source), source, split)


def has_splits(source: str) -> bool:
    """Whether `source` may bring held-out rows of its own."""
    path = Path(source)
    return not path.is_file() and not (path / "state.json").is_file()


# --- files -----------------------------------------------------------------------------------------------------------


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UsageError(f"{path}: could not be read ({error.strerror or 'unknown reason'}).") from error


def _text(path: Path) -> str:
    data = _bytes(path)
    try:
        return data.decode("utf-8-sig")  # some editors write a byte-order mark
    except UnicodeDecodeError as error:
        line, byte = error.object.count(b"\n", 0, error.start) + 1, error.object[error.start]
        raise UsageError(f"{path}, line {line}: expected UTF-8, got the byte 0x{byte:02x}; save the file as UTF-8.") from error


def _parsed(text: str, what: str, path: Path, first_line: int = 1) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        raise UsageError(f"{path}, line {line}: expected {what}, got {error.msg} (column {error.colno}).") from error
    except RecursionError as error:
        raise UsageError(f"{path}, line {first_line}: expected {what}, got one nested too deeply.") from error
    except ValueError as error:  # Python refuses integers of thousands of digits
        raise UsageError(f"{path}, line {first_line}: expected {what}, got a number that is too long.") from error


def _read_json_lines(path: Path) -> list[RawRow]:
    rows = []
    for number, line in enumerate(_text(path).split("\n"), 1):  # not splitlines: U+2028 may stand inside a string
        if line.strip():
            row = _parsed(line, "a JSON object", path, number)
            if not isinstance(row, dict):
                what = "a list (a file of one list is called .json)" if isinstance(row, list) else shown(row)
                raise UsageError(f"{path}, line {number}: expected JSON objects, one a line, got {what}.")
            rows.append(row)
    return rows


def _read_json(path: Path) -> list[RawRow]:
    text = _text(path)
    lines = [line for line in text.split("\n") if line.strip()]
    if len(lines) > 1 and lines[0].startswith("{") and lines[0].rstrip().endswith("}"):
        return _read_json_lines(path)  # JSON Lines under the name .json, as many are
    rows = _parsed(text, "a JSON list of rows", path) if lines else []
    if isinstance(rows, dict):
        rows = [rows]
    if not isinstance(rows, list):
        raise UsageError(f"{path}: expected a JSON list of rows, got {shown(rows)}.")
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise UsageError(f"{path}, row {number}: expected JSON objects with the columns {SHAPES}, got {shown(row)}.")
    return rows


def _read_csv(path: Path) -> list[RawRow]:
    """Every cell is text, so that an answer such as "None" or "007" stays one.

    Labels are true, false, 1, 0; a cell that is a JSON list is taken for chat messages.
    """
    csv.field_size_limit(2**31 - 1)
    reader = csv.reader(io.StringIO(_text(path), newline=""), strict=True)
    rows: list[RawRow] = []
    line = 1
    try:
        header = next(reader, [])
        _check_columns(header, str(path))
        if repeated := [name for name in COLUMNS if header.count(name) > 1]:
            raise UsageError(f"{path}, line 1: expected each column once, got {repeated[0]} more than once.")
        while True:
            line = reader.line_num + 1
            cells = next(reader, None)
            if cells is None:
                return rows
            if not cells:
                continue
            if len(cells) != len(header):
                raise UsageError(
                    f"{path}, line {line}: expected {len(header)} cells as in the header, got {len(cells)}; "
                    "a cell with commas, quotes or line breaks belongs in double quotes."
                )
            rows.append({name: _cell(name, cell) for name, cell in zip(header, cells, strict=True) if name in COLUMNS})
    except csv.Error as error:
        raise UsageError(f"{path}, line {line}: expected CSV, quotes inside quotes doubled, got {one_line(error)}.") from error


def _cell(column: str, text: str) -> Any:
    if column == "label":
        return CSV_LABELS.get(text.strip().lower(), text or None)
    if text.startswith("[{"):
        try:
            return json.loads(text)
        except (ValueError, RecursionError):
            return text
    return text


def _read_parquet(path: Path) -> list[RawRow]:
    _bytes(path)
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            _check_columns(names, str(path))
            table = file.read([name for name in names if name in COLUMNS])
        table.validate(full=True)  # as in _rows_of_datasets
        rows: list[RawRow] = table.to_pylist()
    except UsageError:
        raise
    except Exception as error:  # pyarrow raises a dozen unrelated types on damaged files
        raise UsageError(f"{path}: could not be read as Parquet ({one_line(error)}).") from error
    return rows


def _check_columns(names: Iterable[str], source: str) -> None:
    names = list(names)
    if not ({"chosen", "rejected"} <= set(names) or {"completion", "label"} <= set(names)):
        got = ", ".join(shown(name).strip("'") for name in names[:10]) + (", …" if len(names) > 10 else "")
        raise UsageError(f"{source}: expected the columns {SHAPES}, got {got or 'none'}.")


# --- datasets --------------------------------------------------------------------------------------------------------


def _load_folder(path: Path) -> Any:
    """What `save_to_disk` wrote (a Dataset or a DatasetDict), or a folder of data files as on the hub."""
    saved = (path / "state.json").is_file() or (path / "dataset_dict.json").is_file()
    try:
        return datasets.load_from_disk(str(path)) if saved else datasets.load_dataset(str(path))
    except Exception as error:  # as in load_hub_dataset
        raise UsageError(f"{path}: could not be read as a folder of the datasets library ({one_line(error)}).") from error


def _rows_of_datasets(data: Any, source: str, split: str) -> list[RawRow]:
    if isinstance(data, datasets.DatasetDict):
        name = next((name for name in SPLITS[split] if name in data), None)
        if name is None and split == "train":
            raise UsageError(f"{source}: expected a split named {' or '.join(SPLITS[split])}, got {', '.join(data)}.")
        if name is None:
            return []
        data = data[name]
    if not isinstance(data, datasets.Dataset):
        raise UsageError(f"{source}: a stream instead of a table, but {WHY_NOT_STREAMED}; load it without streaming.")
    _check_columns(data.column_names, source)
    names = [name for name in data.column_names if name in COLUMNS]
    try:
        data = data.select_columns(names).with_format(None)
        data.data.validate(full=True)  # an offset beyond its buffer would be followed, which ends the process
        columns = data[:]
    except Exception as error:  # a damaged Arrow file shows itself only here
        raise UsageError(f"{source}: could not be read ({one_line(error)}).") from error
    if not len(data):
        raise UsageError(f"{source}: expected rows with the columns {SHAPES}, got none.")
    return [dict(zip(names, values, strict=True)) for values in zip(*(columns[name] for name in names), strict=True)]


def shown(value: Any) -> str:
    """The beginning of a value, on one line and whatever it is, for messages."""
    if isinstance(value, str):
        return ascii(value[:60]) if not value.isprintable() else repr(value[:60])
    if value is None or isinstance(value, (bool, float)):
        return "null" if value is None else repr(value).lower()
    if isinstance(value, int):
        return str(value) if abs(value) < 10**20 else "a very long number"
    return "an object" if isinstance(value, dict) else "a list" if isinstance(value, list) else type(value).__name__
