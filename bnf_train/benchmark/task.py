"""What every method of the benchmark trains on, and the figures that it returns."""

import json
import resource
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bnf_train.data import read_rows, tokenize

GIB = 2**30


@dataclass(frozen=True)
class Task:
    """What every method trains on."""

    model: str
    rows: str  # a JSONL file of pairs, or of single rows
    max_length: int
    flags: tuple[str, ...] = ()  # of bnf_train

    def read(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in Path(self.rows).read_text().splitlines()]

    def responses(self) -> list[tuple[str, str, bool]]:
        """(prompt, response, label) of all."""
        found = []
        for row in self.read():
            sides = [("chosen", True), ("rejected", False)] if "chosen" in row else [("completion", row["label"])]
            found += [(row["prompt"], row[side], label) for side, label in sides]
        return found


def figures(tokens: int, seconds: float, before: float = 0.0) -> dict[str, float]:
    if torch.cuda.is_available():
        peak = float(torch.cuda.max_memory_allocated())
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0
    speed = {"tokens_per_second": tokens / seconds, "with_reference": tokens / (seconds + before)}
    return {"tokens": tokens, **speed, "peak_gib": peak / GIB}


def this_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def tokens_of(task: Task, tokenizer: Any) -> int:
    """Of all prompts and responses, as bnf_train cuts them: to their end-of-turn tokens, no longer than max_length."""
    rows, _ = tokenize(read_rows(task.rows, "train"), tokenizer, task.max_length, task.rows)
    return sum(len(response.input_ids) for row in rows for response in row.responses)
