"""Damaged files: each is read for what it says, or refused in one sentence that names it; never another exception."""

import bz2
import gzip
import json
import random
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.feather
import pyarrow.parquet
import pytest
from transformers import PreTrainedTokenizerFast

from bnf_train.data import Row, Rules, read_rows, tokenize
from bnf_train.errors import UsageError

pytestmark = pytest.mark.child  # native readers get damaged bytes

USER = {"role": "user", "content": "hé 你好"}
WELL, BADLY = ({"role": "assistant", "content": text} for text in ("well\n", "badly"))
SINGLES = [{"prompt": f"hé {i}, 你好", "completion": 'He said "well",\nand left', "label": i % 2 == 0} for i in range(4)]
PAIRS = [{"prompt": "hé", "chosen": "well", "rejected": "badly"}] * 2
CHATS = [{"prompt": "hé 你好", "chosen": [USER, WELL], "rejected": [USER, BADLY]}] * 3


def json_lines(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def json_list(rows: list[dict[str, Any]]) -> bytes:
    return json.dumps(rows, indent=1).encode()


def csv_table(rows: list[dict[str, Any]], delimiter: str = ",") -> bytes:
    def cell(value: Any) -> str:
        return '"' + (json.dumps(value) if isinstance(value, list) else str(value)).replace('"', '""') + '"'

    return "".join(
        delimiter.join(map(cell, line)) + "\r\n" for line in (list(rows[0]), *(row.values() for row in rows))
    ).encode()


def parquet(rows: list[dict[str, Any]]) -> bytes:
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), sink)
    return bytes(sink.getvalue())


def feather(rows: list[dict[str, Any]]) -> bytes:
    sink = pyarrow.BufferOutputStream()
    pyarrow.feather.write_feather(pyarrow.Table.from_pylist(rows), sink)
    return bytes(sink.getvalue())


def stream(rows: list[dict[str, Any]]) -> bytes:
    table, sink = pyarrow.Table.from_pylist(rows), pyarrow.BufferOutputStream()
    with pyarrow.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return bytes(sink.getvalue())


WRITERS = {"jsonl": json_lines, "json": json_list, "csv": csv_table, "parquet": parquet}
MORE_WRITERS: dict[str, Callable[[list[dict[str, Any]]], bytes]] = {
    **WRITERS,
    "tsv": lambda rows: csv_table(rows, "\t"),
    "feather": feather,
    "arrow": stream,
    "jsonl.gz": lambda rows: gzip.compress(json_lines(rows)),
    "csv.zst": lambda rows: bytes(pyarrow.Codec("zstd").compress(csv_table(rows))),
    "parquet.bz2": lambda rows: bz2.compress(parquet(rows)),
}
STRANGE: list[Any] = [
    *(None, True, 0, -1, 2**70, 1e308, float("nan"), "", " ", "\x00", "\ud800", "\u2028", "x" * 5000, "<|im_end|>", "[{"),
    *([], {}, [[]], [{}], [None], [USER, None], [USER | {"content": None}], [USER | {"content": ["a"]}], [USER | {"role": 1}]),
    *([WELL], [USER], [USER, USER], [WELL, WELL], [USER, WELL, USER], USER, [USER | {"tool_calls": [1]}]),
]


def truncated(data: bytes, draw: random.Random) -> bytes:
    return data[: draw.randrange(len(data))]


def bytes_flipped(data: bytes, draw: random.Random) -> bytes:
    damaged = bytearray(data)
    for _ in range(draw.choice((1, 3, 30))):
        damaged[draw.randrange(len(damaged))] ^= 1 << draw.randrange(8)
    return bytes(damaged)


def bytes_inserted(data: bytes, draw: random.Random) -> bytes:
    at = draw.randrange(len(data))
    return data[:at] + draw.choice((b"\x00", b"\xff\xfe", b'"', b"\n", b",", b"}", b"\x80" * 9)) + data[at:]


def part_removed(data: bytes, draw: random.Random) -> bytes:
    start, end = sorted((draw.randrange(len(data)), draw.randrange(len(data))))
    return data[:start] + data[end:]


DAMAGES: tuple[Callable[[bytes, random.Random], bytes], ...] = (truncated, bytes_flipped, bytes_inserted, part_removed)
DEEP = b"[" * 100_000
BY_HAND: dict[str, bytes] = {
    "empty.jsonl": b"",
    "empty.json": b"",
    "empty.csv": b"",
    "empty.parquet": b"",
    "blank.jsonl": b"\n \n\r\n",
    "bom.jsonl": b"\xef\xbb\xbf",
    "nul.jsonl": bytes(1000),
    "nul.csv": bytes(1000),
    "nul.json": bytes(1000),
    "nul.parquet": bytes(1000),
    "deep.jsonl": b'{"prompt": ' + DEEP,
    "deep.json": DEEP,
    "deep-closed.json": b"[" * 900 + b"]" * 900,
    "deep-row.jsonl": b'{"completion": "a", "label": 1, "prompt": ' + b"[" * 900 + b"]" * 900 + b"}",
    "deep.csv": b"prompt,completion,label\n[{" + DEEP + b",b,1\n",
    "deep-object.jsonl": b'{"a": ' * 50_000,
    "digits.jsonl": b'{"prompt": "a", "completion": "b", "label": ' + b"1" * 5000 + b"}",
    "digits.json": b"1" * 10_000,
    "large.jsonl": b'{"prompt": "a", "completion": "b", "label": ' + b"1" * 4000 + b"}",
    "float.jsonl": b'{"prompt": "a", "completion": "b", "label": 1e999}',
    "nan.jsonl": b'{"prompt": "a", "completion": "b", "label": NaN}',
    "utf16.jsonl": json_lines(SINGLES).decode().encode("utf-16"),
    "utf16.csv": csv_table(SINGLES).decode().encode("utf-16"),
    "utf32.json": json_list(CHATS).decode().encode("utf-32"),
    "latin1.jsonl": '{"prompt": "é"}'.encode("latin-1"),
    "cr.jsonl": json_lines(SINGLES).replace(b"\n", b"\r"),
    "gzip.jsonl": bytes.fromhex("1f8b08000000000000034bcc4d05000d6ee9a2"),
    "csv.parquet": csv_table(SINGLES),
    "parquet.csv": parquet(SINGLES),
    "parquet.jsonl": parquet(SINGLES),
    "list.jsonl": json_list(PAIRS).replace(b"\n", b""),
    "lines.json": json_lines(PAIRS),
    "one.json": json.dumps(PAIRS[0]).encode(),
    "keys.json": b'{"data": []}',
    "twice.jsonl": json_lines(PAIRS[:1]).strip() * 2,
    "surrogates.jsonl": b'{"\\udfff": 1, "prompt": "\\ud83d", "completion": "\\udc00", "label": true}',
    "unnamed.csv": b",,\n1,2,3\n",
    "quote.csv": b'prompt,completion,label\n"a,b,1\n',
    "wide.csv": b"prompt,completion,label\n" + b"a," * 5000 + b"\n",
    "long.csv": b"prompt,completion,label\n" + b"a" * 200_000 + b",b,1\n",
    "no-suffix": json_lines(SINGLES),
    "text.txt": b"Once upon a time\nthere was no JSON\n",
}


def strange_rows(draw: random.Random) -> list[dict[str, Any]]:
    """Good rows, one value of which is not what it should be."""
    rows = [dict(row) for row in draw.choice((SINGLES, PAIRS, CHATS))]
    row = draw.choice(rows)
    row[draw.choice((*row, "completion", "extra"))] = draw.choice(STRANGE)
    return rows


def damaged_files() -> Iterator[tuple[str, bytes]]:
    yield from BY_HAND.items()
    draw = random.Random(0)
    for suffix, write in WRITERS.items():
        for number in range(40):
            damage = draw.choice(DAMAGES)
            rows = draw.choice((SINGLES, PAIRS, CHATS))
            yield f"{damage.__name__}-{number}.{suffix}", damage(write(rows), draw)
    for number in range(80):
        rows = strange_rows(draw)
        yield f"strange-{number}.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode()
    for number in range(80):
        try:
            yield f"strange-{number}.parquet", parquet(strange_rows(draw))
        except (pyarrow.ArrowException, OverflowError, UnicodeEncodeError):
            continue  # a table has one type a column


def outcome(path: Path, tokenizer: PreTrainedTokenizerFast) -> list[Row] | str:
    """Rows, or the sentence that refuses them."""
    try:
        return tokenize(read_rows(str(path)), tokenizer, 200, str(path), Rules(empty="drop", no_boundary="error"))[0]
    except UsageError as error:
        return str(error)


def check(result: list[Row] | str, path: Path) -> None:
    if isinstance(result, str):
        assert str(path) in result
        assert result.endswith(".")
        assert result.isprintable(), "one line, and nothing that a terminal obeys"
        assert len(result) < 600 + len(str(path))
    else:
        assert result
        for response in (response for row in result for response in row.responses):
            assert 0 < response.prompt_length < len(response.input_ids) <= 200
            assert type(response.preferred) is bool


def test_damaged_files_are_refused_in_one_sentence_or_read(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    read = refused = 0
    for name, content in damaged_files():
        path = tmp_path / name
        path.write_bytes(content)
        try:
            result = outcome(path, tokenizer)
            check(result, path)
        except Exception as error:
            raise AssertionError(f"{name}: {content[:200]!r}") from error
        read, refused = read + isinstance(result, list), refused + isinstance(result, str)
    assert read >= 50, "the damage is so great that no file gets as far as the tokenizer"
    assert refused >= 150


@pytest.mark.parametrize("suffix", MORE_WRITERS)
def test_three_hundred_damaged_files_are_refused_in_one_sentence_or_read(suffix: str, tmp_path: Path) -> None:
    draw = random.Random(suffix)
    for number in range(300):
        path = tmp_path / f"{number}.{suffix}"
        damage = draw.choice(DAMAGES)
        path.write_bytes(damage(MORE_WRITERS[suffix](draw.choice((SINGLES, PAIRS, CHATS))), draw))
        try:
            rows = read_rows(str(path))
        except UsageError as error:
            check(str(error), path)
        except Exception as error:
            raise AssertionError(f"{path.name}, {damage.__name__}") from error
        else:
            assert rows
            assert all(type(row) is dict for row in rows)


@pytest.mark.parametrize("suffix", [*WRITERS, "folder"])
def test_a_folder_in_place_of_a_file(suffix: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    path = tmp_path / f"rows.{suffix}"
    path.mkdir()
    result = outcome(path, tokenizer)
    assert isinstance(result, str)
    check(result, path)


def test_damaged_folders_of_the_datasets_library(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    import datasets

    draw = random.Random(0)
    for number in range(30):
        folder = tmp_path / f"saved-{number}"
        datasets.Dataset.from_list(draw.choice((SINGLES, PAIRS, CHATS))).save_to_disk(folder)
        file = draw.choice(sorted(folder.iterdir()))
        if number % 5:
            file.write_bytes(draw.choice(DAMAGES)(file.read_bytes(), draw))
        else:
            file.unlink()
        try:
            check(outcome(folder, tokenizer), folder)
        except Exception as error:
            raise AssertionError(f"{folder.name}: {file.name}") from error


def test_offsets_that_leave_their_buffer_are_refused_and_not_followed(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """Texts lie one behind the other, and where each begins is a number in the file."""
    import datasets

    datasets.Dataset.from_list(SINGLES).save_to_disk(tmp_path / "saved")
    (file,) = (tmp_path / "saved").glob("*.arrow")
    begins = [sum(len(row["prompt"].encode()) for row in SINGLES[:i]) for i in range(len(SINGLES))]
    good, bad = (struct.pack(f"<{len(at)}i", *at) for at in (begins, [*begins[:-1], 2**31 - 1]))
    assert file.read_bytes().count(good) == 1
    file.write_bytes(file.read_bytes().replace(good, bad))
    result = outcome(tmp_path / "saved", tokenizer)
    assert isinstance(result, str)
    assert "could not be read" in result
    check(result, tmp_path / "saved")
