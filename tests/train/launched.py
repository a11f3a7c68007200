"""Runs of `python -m bnf_train` in processes that are forked ready: one, or several that find each other as a launcher's do.

An import takes longer than a run, so every process is forked from one that has imported everything (`preloaded.py`).
"""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any, NamedTuple

import yaml

HANGS = 600  # seconds: a guard against waiting forever, no measure of anything
CONFIGS = Path(__file__).parents[2] / "bnf_train" / "configs"


class Ended(NamedTuple):
    """How a run's first process ended: exit code (minus the signal that killed it), what it printed, what it had counted.

    `codes` are those of all its processes.
    """

    code: int
    printed: str
    counted: int
    codes: tuple[int, ...]


def run(
    flags: list[str], log: Path, environment: dict[str, str], what: str, at: int, number: int, group: bool, output: str
) -> None:
    """In a child: `python -m bnf_train`, which sends a signal at the at-th event: "file", "file in FOLDER", "micro-batch".

    To itself, or with `group` to its whole process group, as a launcher or a scheduler does.
    """
    assert "preloaded" in sys.modules
    os.setsid()
    os.environ |= environment
    import runs_on_cpu

    from bnf_train import __main__, report
    from bnf_train.training import trainer

    if environment.get("ACCELERATE_USE_FSDP"):
        runs_on_cpu.choose_fsdp()
    report.write = write_log
    counted = 0

    def count(kind: str) -> None:
        nonlocal counted
        if kind == what:
            counted += 1
            if counted == at:
                if group:  # by another process: what its parent sends, a data worker obeys
                    kill = ["kill", f"-{int(number)}", "--", f"-{os.getpid()}"]
                    subprocess.run(kill, check=True, start_new_session=True)
                else:
                    os.kill(os.getpid(), number)

    def audit(event: str, args: tuple[Any, ...]) -> None:
        written = event in ("os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree") or (
            event == "open" and isinstance(args[1], str) and args[1] != "r"
        )
        flush = event == "open" and args[1] is None  # by os.open, before fsync
        if (written or flush) and output in str(args[0]):
            count("file")
            for part in Path(str(args[0])).parts:
                count(f"file in {part}")

    step = trainer.BNFTrainer.training_step

    def training_step(self: Any, *args: Any, **kwargs: Any) -> Any:
        count("micro-batch")
        return step(self, *args, **kwargs)

    trainer.BNFTrainer.training_step = training_step  # type: ignore[method-assign]
    sys.addaudithook(audit)
    with log.open("w") as file, redirect_stdout(file), redirect_stderr(file):
        code = __main__.main(flags)
        file.write(f"\ncounted {counted}\n")
    sys.exit(code)


def write_log(output: Path, config: Any, history: list[dict[str, Any]], held_out: dict[str, float], *rest: Any) -> None:
    """In place of a report, which takes longer than a run: what was logged."""
    (output / "metrics.json").write_text(json.dumps({"log": history, "held_out": held_out}))


class Launcher:
    """Trains into a folder: launcher(output, what, at, number, **other flags); see `__call__`."""

    def __init__(self, forks: ForkServerContext, flags: dict[str, str], folder: Path) -> None:
        self.forks, self.folder = forks, folder
        self.flags = {"--reference_cache": str(folder / "cache")} | flags

    def __call__(
        self,
        output: Path,
        what: str = "",
        at: int = 0,
        number: int = signal.SIGKILL,
        *,
        seconds: float | None = None,
        processes: int = 1,
        fsdp: bool = False,
        group: bool = False,
        where: int = 0,
        **flags: str,
    ) -> Ended:
        """One run; `where` is the process that sends the signal, and `seconds` ends all of them after that time.

        As under a launcher, the others are killed once one has died of a signal or an error.
        """
        arguments = self.flags | {"--output_dir": str(output)} | {f"--{name}": value for name, value in flags.items()}
        listed = [part for pair in arguments.items() for part in pair]
        logs = [self.folder / f"log-{random.getrandbits(32)}" for _ in range(processes)]
        environments = [environment(rank, processes, fsdp) for rank in range(processes)]
        for env in environments:
            env |= {"MASTER_PORT": environments[0].get("MASTER_PORT", "")} if processes > 1 else {}
        events = [(what, at) if rank == where else ("", 0) for rank in range(processes)]
        children = [
            self.forks.Process(target=run, args=(listed, log, env, *event, number, group, str(output)))
            for log, env, event in zip(logs, environments, events, strict=True)
        ]
        for child in children:
            child.start()
        until = time.monotonic() + (HANGS if seconds is None else seconds)
        while any(child.is_alive() for child in children) and time.monotonic() < until:
            children[0].join(0.02)
            if any(child.exitcode not in (None, 0, 128 + signal.SIGTERM, 128 + signal.SIGINT) for child in children):
                time.sleep(0.5 if number != signal.SIGKILL else 0)
                break
        for child in children:
            child.kill()  # where it has not ended
            child.join()
        printed = [log.read_text() if log.exists() else "" for log in logs]
        count = printed[0].rpartition("\ncounted ")[2].strip()
        codes = tuple(child.exitcode for child in children)
        return Ended(codes[0], "\n".join(printed), int(count) if count.isdecimal() else -1, codes)


def environment(rank: int, processes: int, fsdp: bool) -> dict[str, str]:
    """What a launcher tells a process."""
    if processes == 1 and not fsdp:
        return {}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    named = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
    told = {name: str(value) for name, value in named.items()} | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    if fsdp:
        config = yaml.safe_load((CONFIGS / "fsdp2.yaml").read_text())["fsdp_config"]
        told["ACCELERATE_USE_FSDP"] = "true"
        told |= {name.upper(): value if isinstance(value, str) else str(value).lower() for name, value in config.items()}
    return told


Run = Callable[..., Ended]
