"""``jitgraph serve`` as a child process: its address, its engine, its memory, and proof that nothing is left of it."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

from jitgraph.errors import JitgraphError

ROOT = Path(__file__).resolve().parents[2]
START_S = 600.0
END_S = 60.0


class Broken(JitgraphError):
    """The service did something that it must not."""


def is_there(pid: int) -> bool:
    """Whether a process runs; one that has ended and was not reaped does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except (FileNotFoundError, ProcessLookupError):
        return False


def rss_mib(pid: int) -> float:
    """Memory that a process has in use; 0 where it is gone."""
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0.0
    found = re.search(r"VmRSS:\s+(\d+) kB", text)
    return int(found.group(1)) / 1024 if found else 0.0


def wait_for(what: Callable[[], Any], limit_s: float, otherwise: str) -> Any:
    """The first true value of ``what``.

    Raises:
        Broken: it did not come within the limit.
    """
    deadline = time.monotonic() + limit_s
    while not (found := what()):
        if time.monotonic() > deadline:
            raise Broken(otherwise)
        time.sleep(0.005)
    return found


class Served:
    """A running server with a runtime folder of its own. Use it with ``with``: it is stopped at the end, in good order,
    unless something failed or it is gone already."""

    def __init__(self, model: str, *options: str) -> None:
        self._home = tempfile.TemporaryDirectory(prefix="jg-")
        self.folder = Path(self._home.name)
        command = [sys.executable, "-m", "jitgraph", "serve", model, "--port", "0", *options]
        self.process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, "XDG_RUNTIME_DIR": str(self.folder)},
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
        )
        self.pid = self.process.pid
        self.lines: list[str] = []
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line)

    @property
    def text(self) -> str:
        """All that it has printed."""
        return "".join(self.lines)

    def url(self) -> str:
        """Its address, once it is ready.

        Raises:
            Broken: it ended instead.
        """
        return str(wait_for(self._ready_url, START_S, "the server was not ready in time"))

    def _ready_url(self) -> str | None:
        if self.process.poll() is not None:
            raise Broken(f"the server ended with {self.process.returncode}: {self.text[-2000:]}")
        found = re.search(r"ready at (http://\S+) after", self.text)
        return found.group(1) if found else None

    @property
    def engine_pids(self) -> list[int]:
        """The engine processes that were ready, the present one last."""
        return [int(pid) for pid in re.findall(r"ready in .* \(process (\d+)\)", self.text)]

    @property
    def socket_path(self) -> Path:
        """Where its engine listens."""
        return next(self.folder.glob("jitgraph-*/s/engine-0.sock"))

    def kill_engine(self, number: signal.Signals = signal.SIGKILL) -> int:
        """Sends a signal to the engine process; its id."""
        pid = self.engine_pids[-1]
        os.kill(pid, number)
        return pid

    def leftovers(self) -> list[str]:
        """What is left of it: processes and files."""
        left = [f"engine process {pid}" for pid in self.engine_pids if is_there(pid)]
        return left + [str(path.relative_to(self.folder)) for path in self.folder.rglob("*")]

    def end(self) -> list[str]:
        """Ends it with one SIGTERM; what was wrong with that."""
        self.process.send_signal(signal.SIGTERM)
        try:
            code = self.process.wait(END_S)
        except subprocess.TimeoutExpired:
            return ["it did not end after SIGTERM"]
        faults = [] if code == 0 else [f"it ended with {code} after SIGTERM"]
        return faults + [f"left over: {one}" for one in self.leftovers()]

    def __enter__(self) -> Served:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        faults = self.end() if kind is None and self.process.poll() is None else []
        if kind is not None:
            print(self.text[-4000:], file=sys.stderr)
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        if self.process.stderr is not None:
            self.process.stderr.close()
        self._home.cleanup()
        if faults:
            raise Broken("; ".join(faults))


def as_json(line: str) -> Any:
    """The content of a ``data:`` line of a stream; None for other lines and the last one."""
    if not line.startswith("data: ") or line == "data: [DONE]":
        return None
    return json.loads(line.removeprefix("data: "))
