"""Near-identical math pairs: a right solution, and the same with one digit of its result changed (figure 2 of the paper).

    python proofs/experiments/make_math_pairs.py gsm8k_train.jsonl

reads GSM8K's rows (question, answer) and writes data/math_pairs.jsonl beside this script. The two sides of a pair differ
in one character, for tokenizers that spell numbers digit by digit in one token, so that what pushes the wrong side down
pushes almost all of the right side down, too.
"""

import json
import random
import re
import sys
from pathlib import Path

ROWS, MOST_CHARACTERS = 300, 360  # short ones, so that a CPU can train on them
OUTPUT = Path(__file__).parent / "data" / "math_pairs.jsonl"


def changed(answer: str, draw: random.Random) -> str | None:
    """The answer with one digit of its last number replaced by another; None where there is no number."""
    numbers = list(re.finditer(r"\d+", answer))
    if not numbers:
        return None
    last = numbers[-1]
    place = draw.randrange(last.start(), last.end())
    first_digit = place == last.start() and last.end() - last.start() > 1
    others = [d for d in "0123456789"[1 if first_digit else 0 :] if d != answer[place]]  # no number begins with 0
    return answer[:place] + draw.choice(others) + answer[place + 1 :]


def main(source: str) -> None:
    draw, pairs = random.Random(0), []
    for line in Path(source).read_text(encoding="utf-8").rstrip("\n").split("\n"):
        row = json.loads(line)
        wrong = changed(row["answer"], draw)
        if wrong is not None and len(row["question"]) + len(row["answer"]) <= MOST_CHARACTERS:
            pairs.append({"prompt": row["question"], "chosen": row["answer"], "rejected": wrong})
    OUTPUT.write_text("".join(json.dumps(pair) + "\n" for pair in pairs[:ROWS]), encoding="utf-8")
    print(f"{min(len(pairs), ROWS)} pairs in {OUTPUT}")


if __name__ == "__main__":
    main(sys.argv[1])
