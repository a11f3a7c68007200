"""What the commands share: how flags are read, a sentence or a traceback, and that nothing is written over."""

import argparse
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from bnf_train.errors import Interrupted, UsageError, is_out_of_memory, nearest, one_line


@dataclass
class Failure:
    """How a failure is to be shown; a command says more here as it learns more."""

    debug: bool  # the traceback, too
    out_of_memory: Callable[[], str] | None = None  # what to do about it
    stopped: str = ""  # in place of what a stopped run says of itself

    def sentence(self, error: Exception) -> str:
        """What a user reads of `error`; nothing where it is none of theirs."""
        if self.out_of_memory is not None and is_out_of_memory(error):
            return f"out of memory ({one_line(error)}); {self.out_of_memory()}"
        return str(error) if isinstance(error, UsageError) else ""


def run(command: Callable[[list[str], Failure], None], arguments: Sequence[str] | None = None) -> int:
    """`command` on its flags; the exit code: 0, 2 after a sentence, 128 and its number after a signal."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    failure = Failure(debug=without_debug(given) != given)
    try:
        command(given, failure)
    except KeyboardInterrupt:
        print(failure.stopped or "Stopped.", file=sys.stderr)
        return 130
    except Interrupted as stop:
        print(failure.stopped or stop, file=sys.stderr)
        return stop.code
    except Exception as error:
        sentence = failure.sentence(error)
        if not sentence:
            raise
        if failure.debug:
            traceback.print_exc()
        print(f"error: {sentence}", file=sys.stderr)
        return 2
    return 0


def without_debug(arguments: Sequence[str]) -> list[str]:
    """Without --debug that has no value: with one it is transformers' flag."""
    ends = [*arguments[1:], "--"]
    return [argument for argument, after in zip(arguments, ends, strict=False) if argument != "--debug" or after[:1] != "-"]


class Parser(argparse.ArgumentParser):
    """What it refuses is one sentence that names the flag and, where one is close, what was meant. Dashes are underscores."""

    help_flag = "--help"  # lists every flag

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.allow_abbrev = False

    def read(self, arguments: Sequence[str], namespace: argparse.Namespace | None = None) -> argparse.Namespace:
        """As `parse_args`; the flag that does not exist is named."""
        known, unknown = self.read_known(arguments, namespace)
        for argument in unknown:
            name = argument.split("=")[0]
            if not name.startswith("--"):
                self.error(f"{argument}: expected a flag, which begins with --")
            self.error(f"{name}: no such flag{nearest(name, self._option_string_actions)}")
        return known

    def read_known(
        self, arguments: Sequence[str], namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """As `parse_known_args`: what is left is for another parser."""
        return self.parse_known_args([underscored(argument) for argument in arguments], namespace)

    def error(self, message: str) -> NoReturn:
        if match := re.match(r"argument (--\w+)[^:]*: (?:invalid (\w+) value: (.*))?(.*)", message):
            flag, kind, value, other = match.groups()
            choices = next((a.choices for a in self._actions if flag in a.option_strings), None)
            wrong = re.match(r"invalid choice: '([^']*)'", other)
            close = nearest(wrong[1], map(str, choices)) if wrong and choices else ""
            message = f"{flag}: expected {kind}, got {value}" if kind else f"{flag}: {other}{close}"
        raise UsageError(f"{message} ({self.prog} {self.help_flag} lists every flag).")


def underscored(argument: str) -> str:
    """--a-flag=a-value as --a_flag=a-value."""
    name, equals, value = argument.partition("=")
    return "--" + name[2:].replace("-", "_") + equals + value if name.startswith("--") else argument


def check_new_folder(path: Path, otherwise: str = "; remove it or pass another") -> None:
    """Raises UsageError where --output_dir is in use: nothing is ever written over."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UsageError(f"--output_dir {path}: expected a new or empty folder{otherwise}.")
