"""What was answered to a prompt, and the file that holds it until all prompts have their answers."""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from bnf_train.errors import UsageError


@dataclass(frozen=True)
class Answers:
    """All answers to one prompt.

    Attributes:
      texts: of each, without the end of turn.
      cut: whether it was cut at --max_new_tokens.
      tokens: of all of them together; None where a server does not say.
      values: how right each is, 0 to 1, or its reward; None: not labelled.
    """

    texts: list[str]
    cut: list[bool]
    tokens: int | None
    values: list[float] | None = None


class Partial:
    """A file of answers, a line a prompt, behind a line that says what was asked; whole lines survive a kill.

    Args:
      arguments: all that answers depend on, by flag.

    Raises:
      UsageError: the file is of other arguments, is damaged, or cannot be written.

    Attributes:
      found: answers by the place of their prompt.
    """

    def __init__(self, path: Path, arguments: Mapping[str, Any]) -> None:
        self.path, self.found = path, dict[int, Answers]()
        self.resumed = 0
        try:
            whole = self._whole()
            if whole:
                self._read(whole, arguments)
            self.resumed = len(self.found)
            self._file = path.open("a", encoding="utf-8")
            if not whole:
                self._write({"arguments": dict(arguments)})
        except OSError as error:
            raise UsageError(f"--output: {path}: {(error.strerror or str(error)).lower()}.") from error

    def add(self, place: int, answers: Answers) -> None:
        """Keeps the answers to the prompt at this place."""
        self.found[place] = answers
        try:
            self._write({"place": place} | asdict(answers))
        except OSError as error:
            raise UsageError(f"--output: {self.path}: {(error.strerror or str(error)).lower()}.") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._file.close()

    def _whole(self) -> list[bytes]:
        """The lines that are there; one that a kill left unfinished is cut off."""
        if not self.path.exists():
            return []
        content = self.path.read_bytes()
        end = content.rfind(b"\n") + 1
        if end < len(content):
            os.truncate(self.path, end)
        return content[:end].splitlines()

    def _read(self, lines: list[bytes], arguments: Mapping[str, Any]) -> None:
        try:
            before = json.loads(lines[0])["arguments"]
            rows = [json.loads(line) for line in lines[1:]]
            self.found = {row.pop("place"): Answers(**row) for row in rows}
        except (ValueError, TypeError, KeyError) as error:
            raise UsageError(f"{self.path}: is damaged, or no file of answers; remove it to begin anew.") from error
        for name, now in arguments.items():
            if before.get(name) != now:
                raise UsageError(self._differs(name, before.get(name), now))

    def _differs(self, name: str, before: Any, now: Any) -> str:
        if name == "rows":
            return (
                f"--prompts: has other rows than when {self.path} was begun; restore them, or remove that file to begin anew."
            )
        return (
            f"--{name} {_shown(now)}: {self.path} was begun with {_shown(before)}; pass that to go on, or remove the file to "
            "begin anew."
        )

    def _write(self, row: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(row, ensure_ascii=False) + "\n")
        self._file.flush()


def _shown(value: Any) -> str:
    return "none" if value is None else str(value)
