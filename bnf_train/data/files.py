"""One data file to rows, whatever its format; what cannot be read is one sentence that names the file and the line."""

import csv
import io
import json
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from bnf_train.data.values import shown
from bnf_train.errors import UsageError, one_line

RawRow = dict[str, Any]
COMPRESSIONS = {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd"}
JSON_SPACE = " \t\r\n"
UNFINISHED = ("[", "{", ",")  # how a line of a pretty-printed document ends, and a row of JSON Lines does not
decode_json = json.JSONDecoder().raw_decode


def read_file(path: Path, name: str | None = None, delimiter: str | None = None) -> list[RawRow]:
    """All rows with all columns; the cells of a CSV file stay text, so that an answer such as "None" or "007" stays one.

    Args:
      name: of the file in messages.
      delimiter: between the cells of a CSV file, where that is not what its name says.

    Raises:
      UsageError: it cannot be read.
    """
    read = FORMATS.get(_suffix(path), _read_json)
    if delimiter is not None:
        read = partial(_read_csv, delimiter=delimiter)
    return read(_bytes(path, name or str(path)), name or str(path))


def is_data_file(path: Path) -> bool:
    """By its name."""
    return _suffix(path) in FORMATS


def _suffix(path: Path) -> str:
    """The format's, in front of the compression's."""
    return Path(path.stem if path.suffix.lower() in COMPRESSIONS else path.name).suffix.lower()


def _bytes(path: Path, name: str) -> bytes:
    compression = COMPRESSIONS.get(path.suffix.lower())
    try:
        if compression is None:
            return path.read_bytes()
        with pyarrow.input_stream(str(path), compression=compression) as stream:
            data: bytes = stream.read()
            return data
    except (OSError, pyarrow.ArrowException) as error:
        reason = getattr(error, "strerror", None) or one_line(error)
        raise UsageError(f"{name}: could not be read ({reason}).") from error


def _text(data: bytes, name: str, first_line: int = 1) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        line, byte = first_line + data.count(b"\n", 0, error.start), data[error.start]
        raise UsageError(f"{name}, line {line}: expected UTF-8, got the byte 0x{byte:02x}; save the file as UTF-8.") from error


def _without_mark(data: bytes) -> bytes:
    return data.removeprefix(b"\xef\xbb\xbf")  # some editors write a byte-order mark


# --- JSON ------------------------------------------------------------------------------------------------------------


def _read_json(data: bytes, name: str) -> list[RawRow]:
    """Objects one after the other, on lines of their own or not, or one list of them."""
    data = _without_mark(data)
    try:
        rows = _lines(data, name)
    except UsageError as error:
        try:
            rows = _document(_text(data, name), name)
        except UsageError as of_document:
            first = data.lstrip().split(b"\n", 1)[0].rstrip().decode(errors="replace")
            raise (of_document if first.startswith("[") or first.endswith(UNFINISHED) else error) from None
    if len(rows) == 1:  # {"data": [...]}
        inside = [value for key, value in rows[0].items() if key in ("data", "rows")]
        if len(inside) == 1 and len(rows[0]) == 1 and isinstance(inside[0], list):
            return _objects(inside[0], name)
    return rows


def _lines(data: bytes, name: str) -> list[RawRow]:
    rows = []
    for number, line in enumerate(io.BytesIO(data), 1):  # not str.splitlines: U+2028 may stand inside a string
        if not (line := line.rstrip()):
            continue
        try:
            row = json.loads(line.decode())
        except UnicodeDecodeError:
            _text(line, name, number)
            raise
        except (ValueError, RecursionError) as error:
            raise _no_json(error, name, number) from error
        if not isinstance(row, dict):
            raise UsageError(f"{name}, line {number}: expected JSON objects, one a line, got {shown(row)}.")
        rows.append(row)
    return rows


def _document(text: str, name: str) -> list[RawRow]:
    values = list(_values(text, name))
    if len(values) == 1 and isinstance(values[0][0], list):
        return _objects(values[0][0], name)
    for value, start in values:
        if not isinstance(value, dict):
            line = text.count("\n", 0, start) + 1
            raise UsageError(f"{name}, line {line}: expected JSON objects, or one list of them, got {shown(value)}.")
    return [value for value, _ in values]


def _values(text: str, name: str) -> Iterator[tuple[Any, int]]:
    """JSON values one after the other, and where each begins."""
    at = _after_space(text, 0)
    while at < len(text):
        start = at
        try:
            value, at = decode_json(text, start)
        except (ValueError, RecursionError) as error:
            raise _no_json(error, name, text.count("\n", 0, getattr(error, "pos", start)) + 1) from error
        yield value, start
        at = _after_space(text, at)


def _after_space(text: str, at: int) -> int:
    while at < len(text) and text[at] in JSON_SPACE:
        at += 1
    return at


def _objects(values: list[Any], name: str) -> list[RawRow]:
    for number, value in enumerate(values, 1):
        if not isinstance(value, dict):
            raise UsageError(f"{name}, row {number}: expected JSON objects, got {shown(value)}.")
    return values


def _no_json(error: Exception, name: str, line: int) -> UsageError:
    if isinstance(error, json.JSONDecodeError):
        got = f"{error.msg} (column {error.colno})"
    elif isinstance(error, RecursionError):
        got = "one nested too deeply"
    else:  # Python refuses integers of thousands of digits
        got = "a number that is too long"
    return UsageError(f"{name}, line {line}: expected a JSON object, got {got}.")


# --- CSV -------------------------------------------------------------------------------------------------------------


def _read_csv(data: bytes, name: str, delimiter: str = ",") -> list[RawRow]:
    csv.field_size_limit(2**31 - 1)
    data = _without_mark(data)
    reader = csv.reader(io.TextIOWrapper(io.BytesIO(data), encoding="utf-8", newline=""), delimiter=delimiter, strict=True)
    rows: list[RawRow] = []
    line = 1
    try:
        header = _header(next(reader, []), name, delimiter)
        line = reader.line_num + 1
        for cells in reader:
            if len(cells) == len(header):
                rows.append(dict(zip(header, cells, strict=False)))
            elif cells:
                raise UsageError(
                    f"{name}, line {line}: expected {len(header)} cells as in the header, got {len(cells)}; "
                    f"a cell with {_word(delimiter)}, quotes or line breaks belongs in double quotes."
                )
            line = reader.line_num + 1
    except csv.Error as error:
        raise UsageError(f"{name}, line {line}: expected CSV, quotes inside quotes doubled, got {one_line(error)}.") from error
    except UnicodeDecodeError:
        _text(data, name)
        raise
    return rows


def _header(cells: list[str], name: str, delimiter: str) -> list[str]:
    if len(cells) == 1 and (others := [d for d in ",;\t|" if d != delimiter and d in cells[0]]):
        raise UsageError(
            f"{name}, line 1: expected columns with {_word(delimiter)} between them, "
            f"got {_word(others[0])} in {shown(cells[0])}."
        )
    names = [cell if cell.strip() else f"column {number}" for number, cell in enumerate(cells, 1)]
    _check_once(names, f"{name}, line 1")
    return names


def _word(delimiter: str) -> str:
    return {",": "commas", ";": "semicolons", "\t": "tabs"}.get(delimiter, shown(delimiter))


def _check_once(names: list[str], where: str) -> None:
    if repeated := [column for column, times in Counter(names).items() if times > 1]:
        raise UsageError(f"{where}: expected each column once, got {shown(repeated[0])[1:-1]} more than once.")


# --- Arrow -----------------------------------------------------------------------------------------------------------


def _read_parquet(data: bytes, name: str) -> list[RawRow]:
    return _read_table(lambda: pyarrow.parquet.ParquetFile(pyarrow.BufferReader(data)).read(), name, "Parquet")


def _read_arrow(data: bytes, name: str) -> list[RawRow]:
    is_file = data.startswith(b"ARROW1")
    open_data = pyarrow.ipc.open_file if is_file else pyarrow.ipc.open_stream
    return _read_table(lambda: open_data(pyarrow.BufferReader(data)).read_all(), name, "Arrow")


def _read_table(read: Callable[[], pyarrow.Table], name: str, what: str) -> list[RawRow]:
    try:
        return rows_of_table(read(), name)
    except UsageError:
        raise
    except Exception as error:  # pyarrow raises a dozen unrelated types on damaged files
        raise UsageError(f"{name}: could not be read as {what} ({one_line(error)}).") from error


def rows_of_table(table: pyarrow.Table, name: str) -> list[RawRow]:
    """As the JSON of the table would say."""
    _check_once(table.column_names, name)
    table.validate(full=True)  # an offset beyond its buffer would be followed, which ends the process
    rows: list[RawRow] = table.to_pylist()
    for field in table.schema:
        if (decode := _decoder(field.type)) is not None:
            for row in rows:
                row[field.name] = decode(row[field.name])
    return rows


def _decoder(kind: pyarrow.DataType) -> Callable[[Any], Any] | None:
    """What makes of a column's values what JSON would have; None where they are that already.

    Maps come as pairs, and a column of JSON (which the datasets library makes of values of several types) as text.
    """
    if isinstance(kind, pyarrow.JsonType):
        return lambda value: None if value is None else json.loads(value)
    if isinstance(kind, pyarrow.MapType):
        of_item = _decoder(kind.item_type) or (lambda item: item)
        return lambda value: None if value is None else {key: of_item(item) for key, item in value}
    if isinstance(kind, pyarrow.StructType):
        inside = {field.name: decode for field in kind if (decode := _decoder(field.type)) is not None}
        if inside:
            return lambda value: value and value | {key: decode(value[key]) for key, decode in inside.items()}
    elif isinstance(kind, (pyarrow.ListType, pyarrow.LargeListType, pyarrow.FixedSizeListType)):
        of_one = _decoder(kind.value_type)
        if of_one is not None:
            return lambda value: value and [of_one(one) for one in value]
    return None


FORMATS: dict[str, Callable[[bytes, str], list[RawRow]]] = {
    ".json": _read_json,
    ".jsonl": _read_json,
    ".ndjson": _read_json,
    ".csv": _read_csv,
    ".tsv": partial(_read_csv, delimiter="\t"),
    ".parquet": _read_parquet,
    ".arrow": _read_arrow,
    ".feather": _read_arrow,
}
