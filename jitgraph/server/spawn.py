"""Starts an engine process, keeps what it says, and knows when it has ended. No asyncio; any thread may call it.

Each process has two threads. Its *keeper* starts it, waits for its end and kills what it may leave behind; the
parent-death signal comes when the thread that started a process ends, so that thread must live as long as the process
may. The other passes on what the process prints.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO

from jitgraph.config import engine_environment
from jitgraph.errors import ConfigError
from jitgraph.lines import LineWriter
from jitgraph.server import tether

TAIL_LINES = 40
"""Last lines of a process's output that are kept for error messages."""
_LINE_BYTES = 8192
_LAST_WORDS_S = 1.0
"""How long the keeper waits for the last lines after the end."""


class EngineProcess:
    """A started process, leader of its own session: a terminal's Ctrl-C reaches its parent alone, which decides."""

    def __init__(
        self, command: Sequence[str], say: Callable[[str], None], threads: int | None = None, socket: str = ""
    ) -> None:
        """Starts it; ``say`` gets each line of its output, in a thread of its own, and must not wait: the process would
        wait, too, once its pipe is full. ``threads``: for its work on the CPU, unless the user has said how many; None
        leaves that to PyTorch. ``socket``: the file of the socket that it may leave when it is killed.

        Raises:
            ConfigError: it cannot be started.
        """
        self._command = list(command)
        self._say = say
        self._threads = threads
        self._socket = socket
        self._lines: deque[str] = deque(maxlen=TAIL_LINES)
        self._lock = threading.Lock()
        self._callbacks: list[Callable[[], None]] = []
        self._started, self._ended = threading.Event(), threading.Event()
        self._refusal: OSError | None = None
        self.pid = 0
        self.returncode: int | None = None
        """Exit status as ``subprocess`` has it: minus the signal where one ended it; None while it runs."""
        threading.Thread(target=self._keep, name="jitgraph-engine-keeper", daemon=True).start()
        self._started.wait()
        if self._refusal is not None:
            raise ConfigError(f"an engine process cannot be started: {self._refusal.strerror}")

    # ---------------------------------------------------------------------------------------------- the keeper's thread

    def _keep(self) -> None:
        shim = [sys.executable, "-I", "-S", str(tether.__file__), str(os.getpid())]
        shim.append(f"{tether.SOCKET}={self._socket}")
        try:
            process = subprocess.Popen(
                [*shim, *self._command],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                env=engine_environment(self._threads),
                start_new_session=True,
            )
        except OSError as error:
            self._refusal = error
            self._started.set()
            return
        self.pid = process.pid
        assert process.stdout is not None
        reader = threading.Thread(target=self._listen, args=(process.stdout,), name="jitgraph-engine-output")
        reader.daemon = True
        reader.start()
        self._started.set()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # not reaped yet: its number is still its own
        with self._lock:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)  # what it started itself
            self.returncode = process.wait()
        reader.join(_LAST_WORDS_S)
        self._ended.set()
        with self._lock:
            callbacks, self._callbacks = self._callbacks, []
        for callback in callbacks:
            callback()

    def _listen(self, output: IO[bytes]) -> None:
        with output:
            for line in iter(lambda: output.readline(_LINE_BYTES), b""):
                text = line.decode("utf-8", "replace").rstrip()
                if text:
                    self._lines.append(text)
                    self._say(text)

    # ------------------------------------------------------------------------------------------------------ any thread

    @property
    def alive(self) -> bool:
        """Whether it still runs."""
        return self.returncode is None

    @property
    def tail(self) -> str:
        """Its last lines of output."""
        return "\n".join(self._lines)

    def on_end(self, callback: Callable[[], None]) -> None:
        """Calls it once when the process has ended, in the keeper's thread; at once where it has already."""
        with self._lock:
            if not self._ended.is_set():
                self._callbacks.append(callback)
                return
        callback()

    def wait(self, timeout_s: float | None = None) -> int | None:
        """Waits for the end; the exit status, None where time ran out."""
        self._ended.wait(timeout_s)
        return self.returncode

    def terminate(self) -> None:
        """Asks it to end (SIGTERM)."""
        self._send(signal.SIGTERM)

    def interrupt(self) -> None:
        """Asks it to end at once, whatever still runs there (SIGINT)."""
        self._send(signal.SIGINT)

    def _send(self, number: signal.Signals) -> None:
        with self._lock:
            if self.returncode is None:
                os.kill(self.pid, number)

    def kill(self) -> None:
        """Ends it and all that it started, stopped ones too (SIGKILL)."""
        with self._lock:
            if self.returncode is None:
                os.killpg(self.pid, signal.SIGKILL)

    def end(self, grace_s: float = 2.0) -> int | None:
        """Asks, waits for ``grace_s``, then kills; the exit status."""
        self.terminate()
        if self.wait(grace_s) is None:
            self.kill()
        return self.wait(grace_s + 10.0)


def spawn_engine(
    command: Sequence[str], socket_path: Path, say: Callable[[str], None] | None = None, threads: int | None = None
) -> EngineProcess:
    """Starts ``command --socket PATH``; its output goes line by line to ``say``, by default to standard error.
    ``threads``: see ``EngineProcess``.

    The process ends with this one, however this one ends. It does not see the server's key.

    Raises:
        ConfigError: it cannot be started.
    """
    write = LineWriter() if say is None else None

    def tell(line: str) -> None:
        assert write is not None
        write(f"engine: {line}")

    return EngineProcess([*command, "--socket", str(socket_path)], say or tell, threads, str(socket_path))


def threads_for(cores: int, engines: int) -> int:
    """Threads for the CPU's work of each of several engines that start on one machine. One core is left for the
    process that serves them: where threads are more than cores, a product waits for whichever is not running, and a
    step may take a hundred times as long."""
    return max(1, (cores - 1) // engines)
