"""The files of the rounds: each is whole, or is not there.

OUTPUT/begun.json              what was asked for; questions.jsonl: the prompts that are only asked
OUTPUT/start/right.json        right answers of the model before the first round; checks.jsonl: every answer
OUTPUT/round-1/prompts.jsonl   the round's prompts
               rows.jsonl      sampled and labelled; answers.jsonl: every answer to a prompt, with how right it is
               model/          what bnf_train leaves: the trained model, report.html, metrics.json, and checkpoints on the way
               trained.json    the end of training
               right.json      right answers of the trained model: the round is complete
OUTPUT/rounds.json, rounds.md, rounds.png, report.html
"""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


class Folder:
    """Of one round, by its number from 1; 0 is the start, which has a model and right answers alone."""

    def __init__(self, output: Path, number: int) -> None:
        self.number = number
        self.path = output / (f"round-{number}" if number else "start")
        self.prompts, self.rows, self.answers = (self.path / f"{name}.jsonl" for name in ("prompts", "rows", "answers"))
        self.trained, self.right = self.path / "trained.json", self.path / "right.json"
        self.checks, self.model, self.reference = self.path / "checks.jsonl", self.path / "model", self.path / "reference"


def write_json(path: Path, value: Any) -> None:
    """All of it or nothing; the folder is made."""
    replace(path, (json.dumps(value, indent=1, ensure_ascii=False, default=str) + "\n").encode())


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """As `write_json`, a line a row."""
    replace(path, "".join(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows).encode())


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def replace(path: Path, content: bytes) -> None:
    """The content at `path`, on the disk before it has the name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.tmp")
    with partial.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
