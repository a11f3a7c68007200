"""The exceptions that a user sees as a sentence instead of a traceback."""

import difflib
import errno
import signal
from collections.abc import Iterable

# why rows cannot come as a stream: the end of several sentences
WHY_NOT_STREAMED = (
    "every response is scored once by the reference before training, and rows are shuffled over the whole set, "
    "so all rows must be at hand"
)


class UsageError(Exception):
    """Bad input: the message is one sentence that names the file, row, column or flag and says what to do."""


class Interrupted(Exception):
    """A signal stopped the run after it saved what it had: the message says how to go on, `code` is the exit code."""

    def __init__(self, number: int, how_to_go_on: str) -> None:
        name = signal.Signals(number).name
        super().__init__(f"{name}: {how_to_go_on}")
        self.code = 128 + number
        self.number, self.how_to_go_on = number, how_to_go_on

    def __reduce__(self) -> tuple[type["Interrupted"], tuple[int, str]]:
        """Between processes: exceptions are built again from what they were built from, and that is not their message."""
        return type(self), (self.number, self.how_to_go_on)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the device or the machine had no memory left: torch.OutOfMemoryError, or what torch's CPU allocator raises."""
    words = ("out of memory", "can't allocate memory", "not enough memory")
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and any(word in str(error) for word in words))


def is_full_disk(error: BaseException) -> bool:
    """Whether the disk had no room left. Python has an errno, safetensors only a number in its message; torch.save and json
    chain the first error."""
    seen: BaseException | None = error
    while seen is not None:
        text = str(seen)
        if getattr(seen, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or any(
            sign in text for sign in ("No space left", f"code: {errno.ENOSPC},", f"code: {errno.EDQUOT},", "os error 28")
        ):
            return True
        seen = seen.__cause__ or seen.__context__
    return False


def telling(error: BaseException) -> BaseException:
    """The outermost cause of an error that says what happened: libraries wrap them in "an error occurred"."""
    seen: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in seen:
        if (words := str(cause).strip()) and not words.lower().startswith("an error occurred"):
            return cause
        seen.append(cause)
        cause = cause.__cause__ or cause.__context__
    return seen[-1]


def one_line(error: BaseException, most: int = 200) -> str:
    """What a library says of its failure, on one line without the stop at its end; its kind where it says nothing."""
    words = " ".join(str(error).split())[:most].rstrip(".") or type(error).__name__
    return words if words.isprintable() else ascii(words)[1:-1]


def nearest(name: str, known: Iterable[str]) -> str:
    """ "; the nearest is …" where a known name is close, else nothing."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; the nearest is {close[0]}" if close else ""
