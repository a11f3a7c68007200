"""A stage in a process of its own, and never two of them in one folder."""

import fcntl
import multiprocessing
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from bnf_train.errors import Interrupted, UsageError, is_full_disk, is_out_of_memory, one_line
from bnf_train.processes import end_with_parent

GOES_ON = "the same command goes on from there."
FULL_DISK = "the disk is full; make room, and the same command goes on."
LOCK, STAGE_LOCK = ".lock", ".stage-lock"  # of the command; of the stage at work, which may outlive a command that was killed


def run_stage(name: str, folder: Path, stage: Callable[..., None], *arguments: Any) -> None:
    """`stage(*arguments)` in a new process, whose memory goes with it.

    SIGTERM is passed on to that process: training saves a checkpoint first, the other stages end at once.

    Raises:
      UsageError: what the stage raises, behind the stage's name; or its process was killed.
      Interrupted: SIGTERM came; the stage has ended.
    """
    context, terminated = multiprocessing.get_context("spawn"), _Terminated()
    with ProcessPoolExecutor(1, mp_context=context) as process, _on_sigterm(terminated):
        try:
            running = process.submit(_stage, folder, stage, arguments)
            terminated.pass_on()  # one that came before the process was there
            running.result()
        except BrokenProcessPool:
            if terminated.received:
                raise Interrupted(signal.SIGTERM, GOES_ON) from None
            raise UsageError(f"{name}: its process was killed, out of memory? T{GOES_ON[1:]}") from None
        except UsageError as error:
            raise UsageError(f"{name}: {error}") from error
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            raise UsageError(
                f"{name}: out of memory ({one_line(error)}); lower --per_device_train_batch_size, or for answers "
                f"--per_device_eval_batch_size: {GOES_ON}"
            ) from error
    if terminated.received:
        raise Interrupted(signal.SIGTERM, GOES_ON)


class _Terminated:
    """Takes SIGTERM, and passes it on to the stage's process."""

    def __init__(self) -> None:
        self.received = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self.received = True
        self.pass_on()

    def pass_on(self) -> None:
        """Does nothing where no SIGTERM has come."""
        if self.received:
            for child in multiprocessing.active_children():
                child.terminate()


def _stage(folder: Path, stage: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    end_with_parent()
    with _held(folder / STAGE_LOCK):
        try:
            stage(*arguments)
        except Exception as error:
            if is_full_disk(error):  # whose own sentence may name flags that have no place here
                raise UsageError(FULL_DISK) from error
            raise


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Within, no other command works in the folder, and no stage that a killed one has left.

    Raises:
      UsageError: another command is at work there, or the disk is full.
      Interrupted: SIGTERM came between two stages.
    """
    try:
        with _on_sigterm(_stop):
            yield from _alone(folder)
    except OSError as error:
        if not is_full_disk(error):
            raise
        raise UsageError(f"--output_dir {folder}: {FULL_DISK}") from error


def _alone(folder: Path) -> Iterator[None]:
    folder.mkdir(parents=True, exist_ok=True)
    with _held(folder / LOCK, f"--output_dir {folder}: another python -m bnf_train.rounds is at work there; wait for its end."):
        with _held(folder / STAGE_LOCK):  # it ends by itself
            pass
        yield


def _stop(number: int, frame: FrameType | None) -> NoReturn:
    raise Interrupted(number, GOES_ON)


@contextmanager
def _on_sigterm(answer: Callable[[int, FrameType | None], object]) -> Iterator[None]:
    """Within, SIGTERM calls `answer`."""
    if threading.current_thread() is not threading.main_thread():  # which alone may say so
        yield
        return
    before = signal.signal(signal.SIGTERM, answer)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _held(path: Path, taken: str = "") -> Iterator[None]:
    """Holds a lock, which ends with the process; waits for it, or, with a sentence for that, refuses."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (fcntl.LOCK_NB if taken else 0))
        except BlockingIOError:
            raise UsageError(taken) from None
        yield
