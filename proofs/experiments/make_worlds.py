"""Make the small worlds of the experiments: a model, its checked samples and questions for each seed, and rows made of them.

    pip install reasoning-gym                           # the extra "demo"
    python proofs/experiments/make_worlds.py            # seeds 1 to 5, into runs/worlds/SEED; five to ten minutes each

`bnf_train.demo.make_world` draws each world anew: pretraining data, weights, questions, samples. Beside its
preferences.jsonl (every sample of the model, right ones preferred) come, all of the same samples but for the last two:

    right.jsonl          the right ones
    wrong.jsonl          the wrong ones
    pairs.jsonl          a right and a wrong one to a prompt, each sample used once
    chosen.jsonl         their right ones, as single rows
    half_of_pairs.jsonl  half of them: as many responses as all of them have where one of each is left out
    foreign.jsonl        each wrong one replaced by a wrong one of another world's model to the same prompt
    unrelated.jsonl      each wrong one replaced by the right answer to another prompt of the same task
"""

import argparse
import json
import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from bnf_train.demo.make_world import sample, write

Row = dict[str, Any]


def read(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def pairs_of(rows: list[Row]) -> list[Row]:
    """Right and wrong samples to one prompt, as many pairs as have both; a sample is in one pair at most."""
    right: dict[str, list[str]] = {}
    wrong: dict[str, list[str]] = {}
    for row in rows:
        (right if row["label"] else wrong).setdefault(row["prompt"], []).append(row["completion"])
    return [
        {"prompt": prompt, "chosen": chosen, "rejected": rejected}
        for prompt, chosen_texts in right.items()
        for chosen, rejected in zip(chosen_texts, wrong.get(prompt, []), strict=False)
    ]


def foreign(rows: list[Row], model: Path, device: str) -> list[Row]:
    """Wrong samples replaced by wrong ones of another model; one that this model has none for stays out."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    other = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).to(device)
    right = {row["prompt"]: row["completion"] for row in rows if row["label"]}
    prompts = [prompt for prompt in dict.fromkeys(row["prompt"] for row in rows) if prompt in right]
    torch.manual_seed(0)
    answers = dict(zip(prompts, sample(other, tokenizer, prompts, 8), strict=True))
    left = {p: [text for text in texts if text is not None and text != right[p]] for p, texts in answers.items()}
    replaced = []
    for row in rows:
        if row["label"]:
            replaced.append(row)
        elif left.get(row["prompt"]):
            replaced.append(row | {"completion": left[row["prompt"]].pop()})
    return replaced


def unrelated(rows: list[Row], rng: random.Random) -> list[Row]:
    """Wrong samples replaced by the right answer to another prompt of the same task."""
    right = {row["prompt"]: row["completion"] for row in rows if row["label"]}
    by_task: dict[str, list[str]] = {}
    for prompt, text in right.items():
        by_task.setdefault(_task(prompt), []).append(text)
    replaced = []
    for row in rows:
        others = [text for text in by_task.get(_task(row["prompt"]), []) if text != right.get(row["prompt"])]
        if row["label"] or others:
            replaced.append(row if row["label"] else row | {"completion": rng.choice(others)})
    return replaced


def _task(prompt: str) -> str:
    return prompt.split(":")[0]


def derive(worlds: Path, seed: int, other: int, device: str) -> None:
    folder, rng = worlds / str(seed), random.Random(seed)
    rows = read(folder / "preferences.jsonl")
    pairs = pairs_of(rows)
    rng.shuffle(pairs)
    made = {
        "right": [row for row in rows if row["label"]],
        "wrong": [row for row in rows if not row["label"]],
        "pairs": pairs,
        "chosen": [{"prompt": pair["prompt"], "completion": pair["chosen"], "label": True} for pair in pairs],
        "half_of_pairs": pairs[: len(pairs) // 2],
        "foreign": foreign(rows, worlds / str(other) / "model", device),
        "unrelated": unrelated(rows, rng),  # the last one
    }
    for name, content in made.items():
        write(folder / f"{name}.jsonl", content)
    print(f"world {seed}: " + ", ".join(f"{len(content):,} {name}" for name, content in made.items()), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/worlds"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--jobs", type=int, default=1, help="worlds made at a time")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    args, more = parser.parse_known_args()  # the others are make_world's
    if len(set(args.seeds)) < 2:
        parser.error("--seeds: expected at least two, each of which answers the questions of the next one")

    def make(seed: int) -> None:
        folder = args.output / str(seed)
        if (folder / "check.jsonl").exists():  # what is written last
            print(f"{folder}: there already, and kept as it is")
        else:
            folder.mkdir(parents=True, exist_ok=True)
            command = [sys.executable, "-m", "bnf_train.demo.make_world", f"--seed={seed}"]
            subprocess.run([*command, f"--output={folder}", f"--device={args.device}", *more], check=True)

    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(make, args.seeds))
    for k, seed in enumerate(args.seeds):
        if not (args.output / str(seed) / "unrelated.jsonl").exists():  # what is written last
            derive(args.output, seed, other=args.seeds[k - 1], device=args.device)


if __name__ == "__main__":
    main()
