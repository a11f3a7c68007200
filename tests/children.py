"""Processes of tests: what compiles or forks runs in a child, and a child that dies is one failing test with its log.

`@pytest.mark.child` runs a test in another pytest, started for the first such test and kept: what it imports, all use.
A native crash there (a compiler's, a fork's after threads have started) leaves pytest itself alone. In pytest's own process
`refuse_in_this_process` lets nobody compile or fork, so that no test forgets. `run` and `together` start fresh interpreters.
"""

import itertools
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple

import pytest
import torch

ROOT = Path(__file__).parent.parent
HANGS = 900  # seconds without a word after which a child is taken for dead: a guard, no measure of anything
LOG = 20_000  # characters of a log that are shown
COMPILES = os.environ.get("TORCHDYNAMO_DISABLE") != "1"  # else torch.compile hands back what it was given: no child needed
FOLDERS = [ROOT, ROOT / "tests", ROOT / "tests" / "core", ROOT / "tests" / "train"]
PYTHONPATH = os.pathsep.join(filter(None, [*map(str, FOLDERS), os.environ.get("PYTHONPATH")]))  # of the programs run here


class Said(NamedTuple):
    """What a program wrote."""

    out: str
    err: str


def run(*arguments: str, code: int = 0, **environment: str) -> Said:
    """`python arguments`; another exit code than `code` fails the test and shows both streams."""
    return together([arguments], code, **environment)[0]


def together(commands: Sequence[Sequence[str]], code: int = 0, **environment: str) -> list[Said]:
    """Several `python arguments` at the same time. The first to fail ends the others."""
    with tempfile.TemporaryDirectory() as folder, _ended(commands, Path(folder), environment) as processes:
        waiting, until = dict(enumerate(processes)), time.monotonic() + HANGS
        while waiting:
            number, process = waiting.popitem()
            try:
                found = process.wait(0.05)
            except subprocess.TimeoutExpired:
                if time.monotonic() > until:
                    pytest.fail(f"process {number} goes on and on\n{_logs(Path(folder))}")
                waiting = {number: process} | waiting  # the next one's turn
                continue
            if found != code:
                pytest.fail(f"exit code {found} of process {number}, not {code}\n{_logs(Path(folder))}")
        streams = ([Path(folder) / f"{number}.{stream}" for stream in Said._fields] for number in range(len(commands)))
        return [Said(*(path.read_text(errors="replace") for path in paths)) for paths in streams]


@contextmanager
def _ended(
    commands: Sequence[Sequence[str]], folder: Path, environment: dict[str, str]
) -> Iterator[list["subprocess.Popen[bytes]"]]:
    processes = []
    try:
        for number, arguments in enumerate(commands):
            with open(folder / f"{number}.out", "wb") as out, open(folder / f"{number}.err", "wb") as err:
                processes.append(
                    subprocess.Popen(
                        [sys.executable, "-X", "faulthandler", *arguments],
                        stdin=subprocess.DEVNULL,
                        stdout=out,
                        stderr=err,
                        env=os.environ | {"PYTHONPATH": PYTHONPATH} | environment,
                        start_new_session=True,
                    )
                )
        yield processes
    finally:
        for process in processes:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # what it has started, too
            process.wait()


def _logs(folder: Path) -> str:
    return "\n".join(f"--- {path.name}\n{path.read_text(errors='replace')[-LOG:]}" for path in sorted(folder.iterdir()))


# --- tests in another pytest -----------------------------------------------------------------------------------------


class Child:
    """Another pytest, of several files: runs the tests it is told to, and reports each in the words of pytest's reports."""

    def __init__(self, paths: Sequence[Path], config: pytest.Config) -> None:
        self._unread = b""
        self._log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  (closed by `end`)
        commands, self._commands = os.pipe()
        self._replies, replies = os.pipe()
        options = ["-s", "-q", "-p", "no:cacheprovider", "--rootdir", str(config.rootpath), "--child", f"{commands},{replies}"]
        options += ["-n0"] if config.pluginmanager.has_plugin("xdist") else []  # no workers
        options += ["--slow"] * config.getoption("--slow", False) + (["-c", str(config.inipath)] if config.inipath else [])
        self._process = subprocess.Popen(
            [sys.executable, "-X", "faulthandler", "-m", "pytest", *options, *map(str, paths)],
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            pass_fds=(commands, replies),
        )
        os.close(commands)
        os.close(replies)

    def run(self, test: str, following: str | None) -> Iterator[dict[str, Any]]:
        """Reports of one test; what does not stay for the following one, of the same file, is torn down."""
        try:
            os.write(self._commands, json.dumps([test, following]).encode() + b"\n")
            while (line := self._line()) != b"null":
                yield json.loads(line)
        except OSError:
            raise ChildDied from None

    def _line(self) -> bytes:
        with selectors.DefaultSelector() as selector:
            selector.register(self._replies, selectors.EVENT_READ)
            while b"\n" not in self._unread:
                data = os.read(self._replies, 1 << 20) if selector.select(HANGS) else b""
                if not data:
                    raise ChildDied
                self._unread += data
        line, self._unread = self._unread.split(b"\n", 1)
        return line

    def end(self) -> int:
        """Its exit code: 0 or 1, or how it died."""
        os.close(self._commands)
        try:
            return self._process.wait(60)
        except subprocess.TimeoutExpired:
            return -1
        finally:
            self._process.kill()
            self._process.wait()
            os.close(self._replies)

    def log(self) -> str:
        """The end of what it printed."""
        self._log.seek(max(0, self._log.seek(0, os.SEEK_END) - LOG))
        return self._log.read().decode(errors="replace")


class ChildDied(Exception):
    pass


class Children:
    """In pytest's own process: hands tests marked `child` to a child, and its reports to whoever listens."""

    def __init__(self) -> None:
        self._child: Child | None = None
        self._last: pytest.Item | None = None  # that it ran

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item, nextitem: pytest.Item | None) -> bool | None:
        if not in_child(item):
            return None
        # what the test before left set up for this one, which does not use it here, is not the next one's
        item.session._setupstate.teardown_exact(nextitem)
        tests = [other.nodeid for other in item.session.items if other.path == item.path and in_child(other)]
        following = dict(itertools.pairwise(tests)).get(item.nodeid)
        if self._child is None:
            paths = dict.fromkeys(other.path for other in item.session.items if in_child(other))
            self._child = Child(list(paths), item.config)
        self._last, hook = item, item.ihook
        hook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
        try:
            for data in self._child.run(item.nodeid, following):
                report = item.config.hook.pytest_report_from_serializable(config=item.config, data=data)
                if report.failed:
                    report.sections.append(("the child's log", self._child.log()))
                hook.pytest_runtest_logreport(report=report)
        except ChildDied:
            self._end("call")
        hook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
        return True

    @pytest.hookimpl
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if self._child is not None and self._end("teardown") not in (0, 1):
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def _end(self, when: Literal["call", "teardown"]) -> int:
        """The child's exit code; a death, or an end that is none of pytest's, is a failure of the last test that it ran."""
        child, self._child, item = self._child, None, self._last
        assert child is not None
        assert item is not None
        code = child.end()
        if when == "call" or code not in (0, 1):
            words, keywords = f"The test's process died, exit code {code}.\n\n{child.log()}", dict.fromkeys(item.keywords, 1)
            report = pytest.TestReport(item.nodeid, item.location, keywords, "failed", words, when)  # type: ignore[arg-type]
            item.ihook.pytest_runtest_logreport(report=report)
        return code


def in_child(item: pytest.Item) -> bool:
    """Marked so, and not skipped."""
    skipped = any(True for _ in item.iter_markers("skip")) or any(mark.args[0] is True for mark in item.iter_markers("skipif"))
    return item.get_closest_marker("child") is not None and not skipped


class Serving:
    """In a child."""

    def __init__(self, pipes: str) -> None:
        self._commands, self._replies = map(int, pipes.split(","))

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        tests = {item.nodeid: item for item in session.items}
        self._config = session.config
        with open(self._commands) as commands:
            for line in commands:
                test, following = (tests.get(name) for name in json.loads(line))
                assert test is not None, f"{line}: there is no such test in the child"
                test.ihook.pytest_runtest_protocol(item=test, nextitem=following)
                if following is None and "torch._dynamo" in sys.modules:
                    torch._dynamo.reset()  # for each file: it compiles a function for a limited number of kinds of arguments
                self._say(None)
        return True

    @pytest.hookimpl
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._say(self._config.hook.pytest_report_to_serializable(config=self._config, report=report))

    def _say(self, data: dict[str, Any] | None) -> None:
        left = json.dumps(data).encode() + b"\n"
        while left:
            left = left[os.write(self._replies, left) :]


# --- what makes this a plugin of pytest -------------------------------------------------------------------------------


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--child", metavar="PIPES", help="what children.py starts: serve another pytest, over two pipes")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "child: runs in a process of its own, because it compiles or forks")
    if pipes := config.getoption("--child"):
        config.pluginmanager.register(Serving(pipes))
    else:
        config.pluginmanager.register(Children())
        refuse_in_this_process()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if COMPILES and "compile" in item.name:  # such as tests of that implementation of the head
            item.add_marker(pytest.mark.child)


def refuse_in_this_process() -> None:
    """No torch.compile and no fork here: pytest's own process has threads, and all tests to lose."""

    def refuse(what: str) -> Callable[..., Any]:
        def refused(*_: Any, **__: Any) -> Any:
            pytest.fail(f"{what} in pytest's own process: mark the test with pytest.mark.child (tests/children.py)")

        return refused

    def compile(model: Any = None, **_: Any) -> Any:
        return refuse("a call of what torch.compile returned") if model is not None else compile

    if COMPILES:
        torch.compile = compile  # type: ignore[assignment]
    os.fork = refuse("os.fork")
