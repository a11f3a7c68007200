"""TOFU's rows: what is memorised, what is forgotten, what must stay; and the order in which unlearning sees them."""

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bnf_train.data import read_rows
from bnf_train.errors import UsageError

Row = dict[str, Any]  # question, answer; to be evaluated also perturbed_answer, and paraphrased_answer where there is one

EMBEDDED = Path(__file__).parent / "data"
PER_AUTHOR = 20  # rows of an author, one behind the other
FORGOTTEN = 2  # authors of the embedded rows
RETAINED = {"forget10": "retain90", "forget05": "retain95", "forget01": "retain99"}


@dataclass(frozen=True)
class Tofu:
    """Who is to be forgotten, and what must stay.

    Attributes:
      forget: rows of the authors to be forgotten, with what evaluation needs.
      retain: rows of the other authors.
      utility: the sets that must not suffer, by name, with what evaluation needs.

    Raises:
      UsageError: a question is in both.
    """

    forget: list[Row]
    retain: list[Row]
    utility: dict[str, list[Row]]

    def __post_init__(self) -> None:
        both = {row["question"] for row in self.forget} & {row["question"] for row in self.retain}
        if both:
            raise UsageError(f"--data: {len(both)} questions are to be forgotten and retained, {min(both)!r} among them.")


def embedded(authors: int = 20) -> Tofu:
    """The last `authors` of TOFU's forget10, of which the last two are to be forgotten (its forget01).

    Raises:
      UsageError: so few authors that none is retained, or more than there are.

    Example:
      >>> tofu = embedded()
      >>> len(tofu.forget), len(tofu.retain), {name: len(rows) for name, rows in tofu.utility.items()}
      (40, 360, {'retain': 360, 'real_authors': 100, 'world_facts': 117})
    """
    rows = read_rows(str(EMBEDDED / "forget10_perturbed.jsonl.gz"))
    most = len(rows) // PER_AUTHOR
    if not FORGOTTEN < authors <= most:
        raise UsageError(f"--authors {authors}: expected {FORGOTTEN + 1} to {most}, of whom {FORGOTTEN} are forgotten.")
    rows = rows[-authors * PER_AUTHOR :]
    forget, retain = rows[-FORGOTTEN * PER_AUTHOR :], rows[: -FORGOTTEN * PER_AUTHOR]
    names = ("real_authors", "world_facts")
    return Tofu(forget, retain, {"retain": retain} | {n: read_rows(str(EMBEDDED / f"{n}_perturbed.jsonl.gz")) for n in names})


def complete(source: str, forget: str = "forget10") -> Tofu:
    """All of TOFU, as its authors split it.

    Args:
      source: a folder with the files of locuslab/TOFU, or that name on the hub.
      forget: forget10, forget05 or forget01; the other rows of the 4,000 are retained.

    Raises:
      UsageError: a file is missing.
    """

    def rows(name: str) -> list[Row]:
        return read_rows(str(Path(source) / f"{name}.json") if Path(source).is_dir() else f"{source}:{name}")

    utility = {name: rows(f"{name}_perturbed") for name in ("retain", "real_authors", "world_facts")}
    return Tofu(rows(f"{forget}_perturbed"), rows(RETAINED[forget]), utility)


def evenly(rows: Sequence[Row], most: int | None) -> list[Row]:
    """At most so many of the rows, spread evenly over them; None: all.

    >>> evenly([{"n": n} for n in range(7)], 3)
    [{'n': 0}, {'n': 2}, {'n': 4}]
    """
    count = len(rows) if most is None else min(most, len(rows))
    return [rows[i * len(rows) // count] for i in range(count)]


def to_learn(rows: Sequence[Row]) -> list[Row]:
    """Rows of bnf_train, all of them preferred."""
    return [_labelled(row, True) for row in rows]


def to_unlearn(tofu: Tofu, seed: int, epochs: float, each: int, forget_only: bool = False) -> list[Row]:
    """Rows of bnf_train for unlearning, in the order of training: in each step `each` rows to forget, then as many to retain.

    Both are drawn without replacement until all have been seen, then anew. The same seed has the same rows to forget in the
    same steps, with and without those to retain.

    Args:
      epochs: passes over the rows to forget.
      forget_only: no rows to retain.
    """
    forget = _stream(tofu.forget, random.Random(f"{seed} forget"))
    retain = _stream(tofu.retain, random.Random(f"{seed} retain"))
    rows: list[Row] = []
    for _ in range(steps(tofu, epochs, each)):
        rows += [_labelled(next(forget), False) for _ in range(each)]
        rows += [] if forget_only else [_labelled(next(retain), True) for _ in range(each)]
    return rows


def steps(tofu: Tofu, epochs: float, each: int) -> int:
    """Optimizer steps of so many passes over the rows to forget."""
    return max(1, -int(-epochs * len(tofu.forget) // each))


def write(path: Path, rows: Sequence[Row]) -> Path:
    """JSON Lines; a file that says the same is left alone, because others may be reading it."""
    text = "".join(json.dumps(row) + "\n" for row in rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8")
    return path


def _labelled(row: Row, label: bool) -> Row:
    return {"prompt": row["question"], "completion": row["answer"], "label": label}


def _stream(rows: Sequence[Row], draw: random.Random) -> Iterator[Row]:
    while True:
        yield from draw.sample(rows, len(rows))
