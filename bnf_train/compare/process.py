"""An arm in a process of its own, so that its memory is its own, too, and what fails there is one line of the result."""

import multiprocessing
import os
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from bnf_train.compare.arm import Measures, train_arm
from bnf_train.errors import UsageError, is_out_of_memory, one_line
from bnf_train.processes import end_with_parent

KILLED = "its process was killed, out of memory?"


class Running:
    """A run of `train_arm` that has begun. `ended` is ready for multiprocessing.connection.wait once it is over."""

    def __init__(self, arguments: Sequence[str], measures: Measures, before: bool, share: int, log: Path | None) -> None:
        """
        Args:
          arguments, measures, before: those of `train_arm`.
          share: by how many such runs this machine's cores are shared.
          log: a file for what it prints; None: it prints here.
        """
        context = multiprocessing.get_context("forkserver")  # an arm begins at once, and not with ten seconds of imports
        context.set_forkserver_preload([__name__])
        self.ended, theirs = context.Pipe(duplex=False)
        self.before = before
        self._process = context.Process(target=_train, args=(theirs, arguments, measures, before, share, log))
        self._process.start()
        theirs.close()  # so that the end of the process is the end of the pipe

    def result(self) -> dict[str, Any] | str:
        """What `train_arm` returned, or why it did not, as a sentence; waits for it.

        Raises:
          Exception: what it raised that is no user's fault, and the signal that stopped it.
        """
        try:
            result: dict[str, Any] | Exception = self.ended.recv()
        except EOFError:
            result = UsageError(KILLED)
        self._process.join()
        if not isinstance(result, Exception):
            return result
        if isinstance(result, UsageError):
            return str(result)
        if is_out_of_memory(result):
            return f"out of memory ({one_line(result)})"
        raise result

    def stop(self) -> None:
        self._process.terminate()
        self._process.join()


def _train(pipe: Connection, arguments: Sequence[str], measures: Measures, before: bool, share: int, log: Path | None) -> None:
    if log is not None:
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, 1)
        os.dup2(file, 2)
    end_with_parent()
    torch.set_num_threads(max(1, torch.get_num_threads() // share))
    try:
        pipe.send(train_arm(arguments, measures, before))
    except Exception as error:
        pipe.send(error)
