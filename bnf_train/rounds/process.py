"""A stage in a process of its own, and never two of them in one folder."""

import fcntl
import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bnf_train.errors import UsageError, is_out_of_memory, one_line
from bnf_train.processes import end_with_parent

LOCK, STAGE_LOCK = ".lock", ".stage-lock"  # of the command; of the stage at work, which may outlive a command that was killed


def run_stage(name: str, folder: Path, stage: Callable[..., None], *arguments: Any) -> None:
    """`stage(*arguments)` in a new process, whose memory goes with it.

    Raises:
      UsageError: what the stage raises, behind the stage's name; or its process was killed.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as process:
        try:
            process.submit(_stage, folder, stage, arguments).result()
        except BrokenProcessPool:
            raise UsageError(f"{name}: its process was killed, out of memory? The same command goes on from there.") from None
        except UsageError as error:
            raise UsageError(f"{name}: {error}") from error
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            raise UsageError(
                f"{name}: out of memory ({one_line(error)}); lower --per_device_train_batch_size, or for answers "
                "--per_device_eval_batch_size."
            ) from error


def _stage(folder: Path, stage: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    end_with_parent()
    with _held(folder / STAGE_LOCK):
        stage(*arguments)


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Within, no other command works in the folder, and no stage that a killed one has left.

    Raises:
      UsageError: another command is at work there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with _held(folder / LOCK, f"--output_dir {folder}: another python -m bnf_train.rounds is at work there; wait for its end."):
        with _held(folder / STAGE_LOCK):  # it ends by itself
            pass
        yield


@contextmanager
def _held(path: Path, taken: str = "") -> Iterator[None]:
    """Holds a lock, which ends with the process; waits for it, or, with a sentence for that, refuses."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (fcntl.LOCK_NB if taken else 0))
        except BlockingIOError:
            raise UsageError(taken) from None
        yield
