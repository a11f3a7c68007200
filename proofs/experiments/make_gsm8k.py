"""Solutions of GSM8K to train on, the right ones of them, and solutions of other questions to hold out, for gsm8k.yaml.

    python proofs/experiments/make_gsm8k.py [--questions 128] [--held_out 32] [--output_dir runs/gsm8k_solutions]

takes the first questions of data/gsm8k.jsonl.gz, each with its four solutions; 1,027 and 32 are all that there are.
"""

import argparse
import gzip
import json
from itertools import groupby
from pathlib import Path
from typing import Any

SOLUTIONS = Path(__file__).parent / "data" / "gsm8k.jsonl.gz"


def questions(path: Path = SOLUTIONS) -> list[list[dict[str, Any]]]:
    """The solutions of each question."""
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        return [list(rows) for _, rows in groupby(map(json.loads, lines), key=lambda row: row["prompt"])]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=128, help="questions to train on (default: 128)")
    parser.add_argument("--held_out", type=int, default=32, help="questions to hold out (default: 32)")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/gsm8k_solutions"), help="default: runs/gsm8k_solutions")
    options = parser.parse_args()
    found = questions()
    if min(options.questions, options.held_out) < 1 or options.questions + options.held_out > len(found):
        parser.error(f"--questions and --held_out: each 1 or more, and no more than {len(found)} together")
    options.output_dir.mkdir(parents=True, exist_ok=True)
    train = [row for rows in found[: options.questions] for row in rows]
    held_out = [row for rows in found[options.questions :][: options.held_out] for row in rows]
    for name, rows in {"train": train, "right": [row for row in train if row["label"]], "held_out": held_out}.items():
        path = options.output_dir / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        print(f"{path}: {len(rows)} solutions, {sum(row['label'] for row in rows)} of them right")


if __name__ == "__main__":
    main()
