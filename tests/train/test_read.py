"""Files, folders and splits to rows: the same rows whatever the format, and one sentence where there are none."""

import bz2
import csv
import doctest
import gzip
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pyarrow.feather
import pyarrow.parquet
import pytest

from bnf_train.data import has_splits, read, read_rows, values
from bnf_train.data.read import other_splits, parse_source
from bnf_train.data.values import label_or_value, list_or_text, messages_or_text
from bnf_train.errors import UsageError

USER, WELL, BADLY = (
    {"content": content, "role": role}
    for role, content in (("user", 'it\'s a "]"\n} {'), ("assistant", "é"), ("assistant", ""))
)
TEXT = [{"prompt": "a", "completion": "b", "id": "1"}, {"prompt": 'c\n"d", e', "completion": "None", "id": "007"}]
CHAT = [{"chosen": [USER, WELL], "rejected": [USER, BADLY], "id": "1"}] * 2


@pytest.fixture(autouse=True)
def _cache_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.mark.parametrize("module", [read, values])
def test_doctests(module: Any) -> None:
    assert doctest.testmod(module).failed == 0


# --- formats ---------------------------------------------------------------------------------------------------------


def cells(rows: list[dict[str, Any]], write: Callable[[Any], str] = json.dumps) -> list[dict[str, str]]:
    """Rows of a table of text."""
    return [{name: write(value) if isinstance(value, list) else value for name, value in row.items()} for row in rows]


def write_csv(rows: list[dict[str, Any]], path: Path, **options: Any) -> None:
    with path.open("w", newline="", encoding=options.pop("encoding", "utf-8")) as file:
        table = csv.DictWriter(file, list(rows[0]), **options)
        table.writeheader()
        table.writerows(cells(rows))


def json_lines(rows: list[dict[str, Any]], end: str = "\n") -> str:
    return "".join(json.dumps(row) + end for row in rows)


def write_stream(rows: list[dict[str, Any]], path: Path) -> None:
    table = pyarrow.Table.from_pylist(rows)
    with pyarrow.ipc.new_stream(path, table.schema) as stream:
        stream.write_table(table)


WRITERS: dict[str, Callable[[list[dict[str, Any]], Path], Any]] = {
    "rows.jsonl": lambda rows, path: path.write_text("\n" + json_lines(rows, "\r\n")),
    "bom.ndjson": lambda rows, path: path.write_text(json_lines(rows), encoding="utf-8-sig"),
    "lines.json": lambda rows, path: path.write_text(json_lines(rows)),
    "one-line.json": lambda rows, path: path.write_text(json_lines(rows, " ")),
    "list.json": lambda rows, path: path.write_text(json.dumps(rows, indent=1), encoding="utf-8-sig"),
    "list.jsonl": lambda rows, path: path.write_text(json.dumps(rows)),
    "objects.jsonl": lambda rows, path: path.write_text("\n".join(json.dumps(row, indent=2) for row in rows)),
    "data.json": lambda rows, path: path.write_text(json.dumps({"data": rows})),
    "rows.json": lambda rows, path: path.write_text(json.dumps({"rows": rows}, indent=4)),
    "no-suffix": lambda rows, path: path.write_text(json_lines(rows)),
    "ROWS.PARQUET": lambda rows, path: pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path),
    "rows.feather": lambda rows, path: pyarrow.feather.write_feather(pyarrow.Table.from_pylist(rows), str(path)),
    "stream.arrow": write_stream,
    "rows.csv": write_csv,
    "bom.csv": lambda rows, path: write_csv(rows, path, encoding="utf-8-sig"),
    "rows.tsv": lambda rows, path: write_csv(rows, path, delimiter="\t"),
}


@pytest.mark.parametrize("rows", [TEXT, CHAT], ids=["text", "messages"])
@pytest.mark.parametrize("name", WRITERS)
def test_the_same_rows_whatever_the_format(name: str, rows: list[dict[str, Any]], tmp_path: Path) -> None:
    path = tmp_path / name
    WRITERS[name](rows, path)
    assert read_rows(str(path)) == (cells(rows) if name.endswith("sv") else rows)
    content, compressed = (
        path.read_bytes(),
        {".gz": gzip.compress, ".bz2": bz2.compress, ".ZST": pyarrow.Codec("zstd").compress},
    )
    for suffix, compress in compressed.items():
        packed = path.with_name(name + suffix)
        packed.write_bytes(bytes(compress(content)))
        if path.suffix:  # else the compression's is the only one
            assert read_rows(str(packed)) == read_rows(str(path))


def test_parts_that_were_compressed_apart_are_one_file(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(b"".join(gzip.compress(json_lines([row]).encode()) for row in TEXT))
    assert read_rows(str(path)) == TEXT


def test_json_lines_may_hold_any_character(write_rows: Callable[..., Path]) -> None:
    row = {"prompt": "a\u2028b\x85c", "completion": "d", "label": True}  # what str.splitlines would cut in two
    assert read_rows(str(write_rows([row]))) == [row]


def test_every_column_stays(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(",prompt,,x\n0,NA,007,\n\n")
    assert read_rows(str(tmp_path / "a.csv")) == [{"column 1": "0", "prompt": "NA", "column 3": "007", "x": ""}]
    (tmp_path / "a.jsonl").write_text('{"prompt": "a", "x": {"y": [1]}}\n{"data": [{"a": 1}]}')
    assert read_rows(str(tmp_path / "a.jsonl")) == [{"prompt": "a", "x": {"y": [1]}}, {"data": [{"a": 1}]}]
    (tmp_path / "b.json").write_text('{"data": [{"a": 1}], "prompt": "p"}')  # a row that has a column named data
    assert read_rows(str(tmp_path / "b.json")) == [{"data": [{"a": 1}], "prompt": "p"}]


def test_maps_are_objects(tmp_path: Path) -> None:
    kind = pyarrow.map_(pyarrow.string(), pyarrow.list_(pyarrow.map_(pyarrow.string(), pyarrow.int64())))
    rows = [{"x": {"a": [{"b": 1}, {}]}}, {"x": None}, {"x": {}}]
    pairs = [None if row["x"] is None else [(k, [list(m.items()) for m in v]) for k, v in row["x"].items()] for row in rows]
    pyarrow.parquet.write_table(pyarrow.table({"x": pyarrow.array(pairs, kind)}), tmp_path / "a.parquet")
    assert read_rows(str(tmp_path / "a.parquet")) == rows


def test_columns_of_json_are_decoded_alike(tmp_path: Path) -> None:
    """The datasets library keeps values of several types as JSON."""
    rows = [{"x": [{"content": "a"}, {"content": ["b"]}], "y": 1}, {"x": [{"content": None}], "y": "z"}, {"x": None, "y": None}]
    columns = {name: [row[name] for row in rows] for name in ("x", "y")}
    data = datasets.Dataset.from_dict(columns, on_mixed_types="use_json")
    expected = data.with_format(None)[:]
    data.to_parquet(tmp_path / "a.parquet")
    data.save_to_disk(tmp_path / "saved")
    for source in ("a.parquet", "saved"):
        found = read_rows(str(tmp_path / source))
        assert {name: [row[name] for row in found] for name in columns} == expected


# --- text that stands for something ----------------------------------------------------------------------------------


def as_numpy(messages: list[Any]) -> np.ndarray[Any, Any]:
    array = np.empty(len(messages), dtype=object)
    array[:] = messages
    return array


NOTATIONS: dict[str, Callable[[list[Any]], str]] = {
    "json": json.dumps,
    "pretty-json": lambda messages: json.dumps(messages, indent=2),
    "python": repr,
    "numpy": lambda messages: str(as_numpy(messages)),
    "numpy-repr": lambda messages: repr(as_numpy(messages)),
}


@pytest.mark.parametrize("write", NOTATIONS.values(), ids=NOTATIONS)
def test_messages_in_every_notation(write: Callable[[list[Any]], str]) -> None:
    chat = [USER, WELL, {"role": "assistant", "content": "'\"\\ {nan} array([ True  False], dtype=object)\t", "x": None}]
    share = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "[{'from': 1}]"}]
    calls = [USER, {"role": "assistant", "tool_calls": [{"name": "f", "arguments": {"a": [1, True]}}]}]
    for messages in (chat, share, calls, chat[:1]):
        assert messages_or_text(write(messages)) == messages
        assert messages_or_text(messages) is messages


def test_messages_that_other_libraries_write(tmp_path: Path) -> None:
    data = datasets.Dataset.from_list([{**row, "tools": ["a", "b"], "label": [True, False]} for row in CHAT])
    data.to_csv(tmp_path / "datasets.csv")
    data.to_pandas().to_csv(tmp_path / "pandas.csv")
    pd.DataFrame(CHAT).assign(tools=[["a", "b"]] * 2, label=[[True, False]] * 2).to_csv(tmp_path / "lists.csv")
    for name in ("datasets", "pandas", "lists"):
        for row in read_rows(str(tmp_path / f"{name}.csv")):
            assert {key: messages_or_text(row[key]) for key in CHAT[0]} == CHAT[0]
            assert list_or_text(row["tools"]) == ["a", "b"]
            assert list_or_text(row["label"]) == [True, False]
    nested = "[{'role': 'user', 'content': array([{'a': 'x'}\n {'a': nan}], dtype=object), 'f': np.float64(0.5)}]"
    assert messages_or_text(nested) == [{"role": "user", "content": [{"a": "x"}, {"a": None}], "f": 0.5}]


@pytest.mark.parametrize(
    "text",
    [
        *(
            "",
            "[",
            "[]",
            "[{}]",
            "{'role': 'user', 'content': 'a'}",
            "[{'role': 'user'}]",
            "a [{'role': 'user', 'content': 1}]",
        ),
        *("a [{'role': 'user', 'content': 1}]", "[{'role': 'user', 'content': 'a'}, 3]"),
        *("[{'role': 'user', 'content': 'a'}] b", "[{'role': 'content': 1}]"),
        *("[{'role': open('x'), 'content': 1}]", "[{'role': x, 'content': 1}]", "[{[]: 'role content'}]"),
        *("[{'role': '\\d', 'content': '\ud800'}] \x00", "[{'role': '\\x', 'content': 1}]", "[sic]", "array([{'role content"),
    ],
)
def test_what_is_no_list_of_messages_stays_text(text: str, recwarn: pytest.WarningsRecorder) -> None:
    assert messages_or_text(text) is text
    assert label_or_value(text or "x") == (text or "x")
    assert not recwarn


@pytest.mark.child  # a parser that runs out of stack ends the process
def test_deep_and_long_text_is_read_in_linear_time() -> None:
    head = "[{'role': 'user', 'content': "
    parts = ("[", "{", "(", "-", "1+", "not ", "'\\'", "\\'", "\"'", ", ", "a.", "array(", "[1", '{"a":', "x if y else ", "9")
    for part in parts:
        many = part * 20_000
        for text in (head + many, f"{head}'{many}", f"{head}{many}1}}]", many, f"[{many}", f"{head}{' ' * 20_000}{many}"):
            start = time.process_time()
            assert messages_or_text(text) == text
            assert list_or_text(text) == text
            assert time.process_time() - start < 5
    long = [{"role": "user", "content": "it's\n" * 200_000}]
    assert messages_or_text(str(as_numpy(long))) == long


# --- folders and splits ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [TEXT, CHAT], ids=["text", "messages"])
def test_folders_of_the_datasets_library(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    data = datasets.Dataset.from_list(rows)
    one, splits, files = tmp_path / "one", tmp_path / "splits", tmp_path / "files"
    data.select([1, 0]).select([1, 0]).save_to_disk(one)
    datasets.DatasetDict({"train_prefs": data, "test_prefs": data.select([0]), "train_sft": data}).save_to_disk(splits)
    (files / "data").mkdir(parents=True)
    data.to_parquet(files / "data" / "train-00000-of-00001.parquet")
    assert [has_splits(str(folder)) for folder in (one, splits, files)] == [False, True, True]
    assert [other_splits(str(folder)) for folder in (one, splits, files)] == [[], ["train_sft"], []]
    assert all(read_rows(str(folder)) == rows for folder in (one, splits, files))
    assert read_rows(str(splits), "test") == rows[:1]
    assert read_rows(str(files), "test") == []
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="could not be read as a folder of the datasets library"):
        read_rows(str(tmp_path / "empty"))


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.jsonl.gz", "a.csv", "a.tsv", "a.parquet", "a.arrow"])
def test_a_folder_has_the_rows_of_its_files(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "json"  # the library knows a format of this name
    folder.mkdir()
    monkeypatch.chdir(tmp_path)
    write = {"csv": write_csv, "tsv": WRITERS["rows.tsv"], "parquet": WRITERS["ROWS.PARQUET"], "arrow": write_stream}.get(
        name.split(".")[1], lambda rows, path: path.write_text(json.dumps(rows, indent=1))
    )
    for file, rows in ((f"train-1-{name}", TEXT[:1]), (f"train-2-{name}", TEXT[1:]), (f"dev-{name}", TEXT)):
        write(rows, folder / file.removesuffix(".gz"))
        if name.endswith(".gz"):
            (folder / file).write_bytes(gzip.compress((folder / file.removesuffix(".gz")).read_bytes()))
            (folder / file.removesuffix(".gz")).unlink()
    assert read_rows("json") == read_rows("json", "test") == TEXT
    assert other_splits("json") == []
    assert not list(tmp_path.glob("cache/**/*.arrow")), "read by the library"


def test_configurations_of_a_folder(tmp_path: Path) -> None:
    folder = tmp_path / "rows"
    folder.mkdir()
    for name in "abc":
        (folder / f"{name}.csv").write_text(f"prompt;chosen;rejected\n{name};b;c\n")
    (folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: one\n  default: true\n  sep: ';'\n  data_files:\n"
        "  - {split: train, path: a.csv}\n  - {split: held_out, path: [b.csv, c.csv]}\n"
        "- config_name: two\n  data_files: b.csv\n  sep: ';'\n  skiprows: [0]\n  names: [x, y, z]\n---\n"
    )
    row = {"prompt": "a", "chosen": "b", "rejected": "c"}
    assert read_rows(str(folder)) == read_rows(f"{folder}:one") == [row]
    assert other_splits(str(folder)) == ["held_out"]
    assert read_rows(f"{folder}=held_out") == [row | {"prompt": "b"}, row | {"prompt": "c"}]
    assert read_rows(f"{folder}:one=held_out", "test") == [row | {"prompt": "b"}, row | {"prompt": "c"}]
    assert read_rows(f"{folder}:two") == [{"x": "b", "y": "b", "z": "c"}]  # with the options that its README asks for
    with pytest.raises(UsageError, match=r"rows: could not be read as a folder.*three"):
        read_rows(f"{folder}:three")


def test_splits_are_taken_in_a_stated_order(tmp_path: Path) -> None:
    rows = {
        name: datasets.Dataset.from_list([{"prompt": name}]) for name in ("train", "train_prefs", "other", "eval", "dev", "val")
    }
    for left_out, used in ((set(), "val"), ({"val"}, "dev"), ({"val", "dev"}, "eval")):
        folder = tmp_path / used
        datasets.DatasetDict({name: data for name, data in rows.items() if name not in left_out}).save_to_disk(folder)
        assert read_rows(str(folder)) == [{"prompt": "train"}]
        assert read_rows(str(folder), "test") == [{"prompt": used}]
        unused = [name for name in rows if name not in {"train", used} | left_out]
        assert other_splits(str(folder)) == unused
        assert read_rows(f"{folder}=other") == read_rows(f"{folder}=other", "test") == [{"prompt": "other"}]
        assert not has_splits(f"{folder}=other")
        assert other_splits(f"{folder}=other") == []
    datasets.DatasetDict({"dev": rows["dev"]}).save_to_disk(tmp_path / "one")
    with pytest.raises(UsageError, match=r"named train or train_prefs, got dev: .*one=dev is the rows of that"):
        read_rows(str(tmp_path / "one"))
    with pytest.raises(UsageError, match="one: expected a split named x, got dev"):
        read_rows(f"{tmp_path / 'one'}=x")


def test_a_split_is_named_behind_the_source(tmp_path: Path) -> None:
    file = tmp_path / "lr=5"
    file.write_text('{"prompt": "a"}')
    assert parse_source(str(file)) == (str(file), None)
    assert parse_source(f"{file}=dev") == (str(file), "dev")
    assert parse_source("org/name=dev") == ("org/name", "dev")
    assert parse_source("a=b/c.jsonl") == ("a=b/c.jsonl", None)
    assert parse_source("lr=5.jsonl") == ("lr=5.jsonl", None)
    with pytest.raises(UsageError, match="expected a split named dev, got a table without splits"):
        read_rows(f"{file}=dev")


# --- what cannot be read ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.jsonl",
            b'{"prompt": "a"}\n{"prompt": \n{"prompt": "b"}\n',
            r"a.jsonl, line 2: expected a JSON object, got Expecting value \(column 11\)",
        ),
        ("a.jsonl", b'{"prompt": "a\n{"prompt": "b"}\n', "a.jsonl, line 1: expected a JSON object, got Unterminated string"),
        ("a.jsonl", b'{"a": 1}\n\n[1, 2]\n', "a.jsonl, line 3: expected JSON objects, one a line, got a list"),
        ("a.jsonl", b"", "a.jsonl: expected JSON objects.*got no row"),
        ("a.json", b'{"data": []}', "a.json: expected JSON objects.*got no row"),
        ("a.jsonl", b'{"prompt": "a"}\n{"prompt": "\xe9t\xe9"}', "a.jsonl, line 2: expected UTF-8, got the byte 0xe9"),
        ("a.jsonl", "{}".encode("utf-16"), "a.jsonl, line 1: expected UTF-8, got the byte 0xff"),
        ("a.jsonl", b'{"a": ' + b"[" * 100_000, "a.jsonl, line 1: expected a JSON object, got one nested too deeply"),
        (
            "a.jsonl",
            b"{}\n" + b'{"a": ' + b"9" * 5000 + b"}",
            "a.jsonl, line 2: expected a JSON object, got a number that is too",
        ),
        (
            "a.json",
            b'[\n{"prompt": "a"},\n{"b" 1}]',
            r"a.json, line 3: expected a JSON object, got Expecting ':' delimiter",
        ),
        ("a.json", b'{\n "prompt": "a"\n}\n{\n "b" 1\n}', r"a.json, line 5: expected a JSON object, got Expecting ':'"),
        ("a.json", b"3", "a.json, line 1: expected JSON objects, one a line, got 3"),
        ("a.json", b"[{}, null]", "a.json, row 2: expected JSON objects, got null"),
        ("a.json", b"[\n{}\n]\n[]", "a.json, line 1: expected JSON objects, or one list of them, got a list"),
        (
            "a.csv",
            b"prompt;completion;label\na;b;1\n",
            r"a.csv, line 1: expected columns with commas .* got semicolons",
        ),
        ("a.tsv", b"prompt,completion,label\na;b;1\n", "a.tsv, line 1: expected columns with tabs .* got commas in 'prompt,"),
        ("a.csv", b'prompt,completion,label\n"a\nb",c,1\nd,e\n', "a.csv, line 4: expected 3 cells as in the header, got 2"),
        ("a.csv", b'prompt,completion,label\na,"b,1\n', "a.csv, line 2: expected CSV, .* got unexpected end of data"),
        ("a.csv", b"prompt,completion,label\na,b,1\n\xe9,b,1\n", "a.csv, line 3: expected UTF-8, got the byte 0xe9"),
        ("a.csv", b"label,completion,label\n", "a.csv, line 1: expected each column once, got label more than once"),
        ("a.csv", b"prompt,completion,label\n", "a.csv: expected .* got no row"),
        ("a.parquet", b"PAR1", "a.parquet: could not be read as Parquet"),
        ("a.arrow", b"ARROW1", "a.arrow: could not be read as Arrow"),
        ("a.feather", b"", "a.feather: could not be read as Arrow"),
        ("a.jsonl.gz", b"{}", "a.jsonl.gz: could not be read .*incorrect header"),
        ("a.jsonl.gz", gzip.compress(bytes(1000), mtime=0)[:-9], "a.jsonl.gz: could not be read .Truncated"),
        ("a.jsonl.gz", gzip.compress(b"{}\n{", mtime=0), "a.jsonl.gz, line 2: expected a JSON object"),
    ],
)
def test_damaged_files_are_named(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UsageError, match=message):
        read_rows(str(path))
    folder = tmp_path / "folder"
    folder.mkdir()
    path.rename(folder / f"train-{name}")
    if not name.endswith("feather"):  # the library knows it as .arrow only
        with pytest.raises(
            UsageError, match=message.replace("a.", "folder/train-a.", 1) if "no row" not in message else "no row"
        ):
            read_rows(str(folder))


def test_an_error_in_what_the_library_reads_is_the_librarys_own(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text("a,b\n1,2\n1,2,3\n")
    (tmp_path / "README.md").write_text(
        "---\nconfigs:\n- config_name: default\n  data_files: train.csv\n  skiprows: [3]\n---\n"
    )
    with pytest.raises(UsageError, match="Expected 2 fields in line 3, saw 3"):
        read_rows(str(tmp_path))


def test_columns_twice_in_a_table(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.table([["a"], ["b"]], names=["x", "x"]), tmp_path / "a.parquet")
    with pytest.raises(UsageError, match=r"a.parquet: expected each column once, got x more than once"):
        read_rows(str(tmp_path / "a.parquet"))


def test_what_is_no_file_is_named(tmp_path: Path) -> None:
    for name, message in (
        ("none.jsonl", "no such file"),
        ("none.csv.gz", "no such file"),
        ("none", "no such file"),
        ("https://x/y.jsonl", "download it first"),
    ):
        with pytest.raises(UsageError, match=message):
            read_rows(name if "://" in name else str(tmp_path / name))
    with pytest.raises(UsageError, match="a stream instead of a file"):
        read_rows("/dev/null")
