"""A headless Chromium, driven over the DevTools protocol through a pair of pipes."""

import json
import os
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PROGRAM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
HANGS = 300  # seconds: a guard against waiting forever, no measure of anything
# --remote-debugging-pipe reads file descriptor 3 and writes 4
TO_3_AND_4 = """
import fcntl, os, sys
for number, pipe in zip((3, 4), [fcntl.fcntl(int(x), fcntl.F_DUPFD, 10) for x in sys.argv[1:3]]):
    os.dup2(pipe, number)
os.execv(sys.argv[3], sys.argv[3:])
"""


class Page:
    """One tab; `events` are the names and parameters of all that it reported since `open`."""

    def __init__(self, commands: int, replies: int) -> None:
        self._commands, self._replies, self._buffer, self._number = commands, replies, b"", 0
        self._session: str | None = None
        self.events: list[tuple[str, dict[str, Any]]] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """The result of one command of the protocol."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        while (reply := self._read()).get("id") != self._number:
            pass
        assert "error" not in reply, f"{method}: {reply['error']}"
        result: dict[str, Any] = reply["result"]
        return result

    def open(self, path: Path, width: int, height: int = 780) -> None:
        """Load a local file on a phone's screen of `width` CSS pixels."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=2, mobile=True)
        self.call("Emulation.setTouchEmulationEnabled", enabled=True)
        self.events.clear()
        self.call("Page.navigate", url=path.resolve().as_uri())
        while not any(name == "Page.loadEventFired" for name, _ in self.events):
            self._read()

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression in the page."""
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def wait_for(self, condition: str) -> None:
        """Until a JavaScript expression is true."""
        end = time.monotonic() + HANGS
        while not self.evaluate(condition):
            assert time.monotonic() < end, f"{condition}: not within {HANGS} s"
            time.sleep(0.02)

    def tap(self, x: float, y: float) -> None:
        self.call("Input.dispatchTouchEvent", type="touchStart", touchPoints=[{"x": x, "y": y}])
        self.call("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            assert select.select([self._replies], [], [], HANGS)[0], f"chromium has said nothing for {HANGS} s"
            data = os.read(self._replies, 1 << 20)
            assert data, "chromium ended"
            self._buffer += data
        message, self._buffer = self._buffer.split(b"\0", 1)
        decoded: dict[str, Any] = json.loads(message)
        if "method" in decoded:
            self.events.append((decoded["method"], decoded["params"]))
        return decoded


@contextmanager
def new_page(profile: Path) -> Iterator[Page]:
    """A tab in a Chromium of its own, which ends with the block."""
    from_us, commands = os.pipe()
    replies, to_us = os.pipe()
    flags = ["--headless=new", "--remote-debugging-pipe", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
    quiet = ["--no-first-run", "--disable-extensions", "--disable-background-networking", f"--user-data-dir={profile}"]
    assert PROGRAM is not None
    start = [sys.executable, "-c", TO_3_AND_4, str(from_us), str(to_us)]
    process = subprocess.Popen([*start, PROGRAM, *flags, *quiet], pass_fds=(from_us, to_us), stderr=subprocess.DEVNULL)
    os.close(from_us)
    os.close(to_us)
    try:
        yield Page(commands, replies)
    finally:
        process.terminate()
        try:
            process.wait(HANGS)
        finally:
            process.kill()
        os.close(commands)
        os.close(replies)
