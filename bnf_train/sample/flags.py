"""The flags that say how answers are drawn: of `bnf_train.sample`, and of each round of `bnf_train.rounds`."""

import argparse
from typing import Any

from bnf_train.errors import UsageError


def add_drawing(add: Any) -> None:
    """--form, --samples, --temperature, --top_p and --max_new_tokens, by a parser's (or a group's) `add_argument`."""
    add("--form", choices=("singles", "groups", "pairs"), default="singles", help="a row an answer, a row a prompt with all of "
        "its answers, or its best and its worst (default: %(default)s)")  # fmt: skip
    add("--samples", type=int, default=5, metavar="K", help="answers to a prompt (default: %(default)s, the paper's)")
    add("--temperature", type=float, default=0.8, metavar="T", help="of the draws (default: %(default)s, the paper's)")
    add("--top_p", type=float, default=1.0, metavar="P", help="draw from the likeliest tokens of this share (default: 1, all)")
    add("--max_new_tokens", type=int, default=512, metavar="N", help="longest answer (default: %(default)s)")


def check_drawing(flags: argparse.Namespace) -> None:
    """Raises UsageError for what none of them can be.

    Example:
      >>> check_drawing(argparse.Namespace(form="pairs", samples=1, temperature=0.8, top_p=1.0, max_new_tokens=9))
      Traceback (most recent call last):
      bnf_train.errors.UsageError: --form pairs: needs at least 2 answers to a prompt, got --samples 1.
    """
    for name in ("samples", "max_new_tokens"):
        if (value := getattr(flags, name)) < 1:
            raise UsageError(f"--{name}: expected at least 1, got {value}.")
    if not 0 <= flags.temperature < float("inf"):
        raise UsageError(f"--temperature: expected a number of at least 0, got {flags.temperature}.")
    if flags.temperature == 0 and flags.samples > 1:
        raise UsageError(
            f"--temperature 0: {flags.samples} answers to a prompt would be the same; add --samples 1, or raise it."
        )
    if not 0 < flags.top_p <= 1:
        raise UsageError(f"--top_p: expected more than 0 and at most 1, got {flags.top_p}.")
    if flags.form == "pairs" and flags.samples < 2:
        raise UsageError(f"--form pairs: needs at least 2 answers to a prompt, got --samples {flags.samples}.")
