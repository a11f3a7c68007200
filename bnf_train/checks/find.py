"""--check: a built-in by name, or a function of the user's own by module:function or path/to/file.py:function."""

import functools
import inspect
import math
import numbers
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from bnf_train import functions
from bnf_train.checks import builtin
from bnf_train.checks.builtin import COLUMN, CheckFunction
from bnf_train.errors import UsageError, nearest, one_line

NAMED: dict[str, CheckFunction] = {"exact": builtin.exact, "contains": builtin.contains, "number": builtin.number}
BUILT_IN = (*NAMED, "regex=PATTERN", "math_verify")


@dataclass(frozen=True)
class Check:
    """What --check names: says of an answer how right it is, from 0 to 1.

    Attributes:
      name: as the flag has it.
      function: (prompt, answer, row) -> bool, or a share of right.
      column: of the row, which the function needs; None where it does not say.
    """

    name: str
    function: CheckFunction
    column: str | None = None

    def __call__(self, prompt: str, answer: str, row: Mapping[str, Any], where: str) -> float:
        """How right the answer is.

        Args:
          where: the row's name in messages.

        Raises:
          UsageError: the function raises, or says something else than how right it is.
        """
        try:
            value = self.function(prompt, answer, row)
        except Exception as error:  # a user's own may raise anything
            what = f"{type(error).__name__}: {one_line(error, 300)}"
            raise UsageError(f"--check {self.name}: fails on {where} and the answer {_shown(answer)} ({what}).") from error
        if getattr(value, "shape", None) == ():  # a scalar of NumPy or PyTorch
            value = value.item()
        if not isinstance(value, numbers.Real) or not 0 <= (share := float(value)) <= 1 or math.isnan(share):
            got = _shown(value) if isinstance(value, (str, numbers.Real)) else type(value).__name__
            raise UsageError(
                f"--check {self.name}: expected True, False, or a share of right from 0 to 1, got {got} on {where}."
            )
        return share

    def check_row(self, row: Mapping[str, Any], where: str) -> None:
        """Raises UsageError where a row lacks what the check compares an answer with."""
        if self.column is None:
            return
        value = row.get(self.column)
        if value is None or isinstance(value, (dict, list)) or not str(value).strip():
            got = "none" if value is None else "a list or an object" if isinstance(value, (dict, list)) else "an empty one"
            raise UsageError(
                f"{where}: --check {self.name} compares with the column {self.column}, got {got}; add it, or pass rows "
                "that have it as --check_dataset."
            )
        if self.function is builtin.number and builtin.last_number(str(value)) is None:
            raise UsageError(f"{where}: {self.column}: expected a number in it for --check number, got {_shown(str(value))}.")


@functools.cache  # a user's file is run once
def resolve(name: str) -> Check:
    """The check that `--check name` means.

    Raises:
      UsageError: no such check, or it cannot be had.

    Example:
      >>> check = resolve("number")
      >>> check("How many?", "They are 18.", {"answer": "#### 18"}, "rows.jsonl, row 1")
      1.0
    """
    flag = f"--check {name}"
    if name in NAMED:
        return Check(name, NAMED[name], COLUMN)
    if name.startswith("regex=") and len(name) > len("regex="):
        return Check(name, builtin.regex(name.removeprefix("regex="), flag))
    if name == "math_verify":
        return Check(name, builtin.math_verify(flag), COLUMN)
    if functions.parts(name) is None:
        raise UsageError(
            f"{flag}: expected {', '.join(BUILT_IN)}, or a function of your own as module:function or "
            f"path/to/file.py:function{nearest(name, (*NAMED, 'math_verify'))}."
        )
    function = functions.load("check", name)
    _check_signature(flag, function)
    return Check(name, function)


def _check_signature(flag: str, function: Callable[..., Any]) -> None:
    try:
        inspect.signature(function).bind("", "", {})
    except TypeError as error:
        raise UsageError(f"{flag}: expected a function of (prompt, answer, row), got {one_line(error)}.") from error
    except ValueError:  # one that is not written in Python has no signature
        return


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "…'"
