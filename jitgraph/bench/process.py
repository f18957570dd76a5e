"""Starts a worker process for a job and listens to it. The only user of ``subprocess`` in the benchmark.

The worker gets a session of its own, so that Ctrl-C at the terminal reaches this process alone; it is then asked to
stop, and its last lines are awaited. Its output goes to a log beside the raw samples.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import jitgraph
from jitgraph.bench import jobs
from jitgraph.bench.jobs import Job
from jitgraph.config import empty_cache_environment

STOP_TIMEOUT_S = 20.0
POLL_S = 0.5
_ROOT = str(Path(jitgraph.__file__).resolve().parents[1])
_ENTRY = f"import sys; sys.path.insert(0, {_ROOT!r}); from jitgraph.bench.worker import main; sys.exit(main())"
"""Another case's interpreter need not have this package installed: it is told where it lies."""


@dataclass
class Outcome:
    """How a job ended."""

    status: str = jobs.FAILED
    reason: str = ""
    value: Any = None
    facts: dict[str, Any] = field(default_factory=dict)


OnProgress = Callable[[int, int], None]


def run_process(job: Job, python: str | None, log: Path, on_progress: OnProgress) -> Outcome:
    """Runs a job in a fresh interpreter (this one's, or ``python``) and returns how it ended."""
    with log.open("wb") as output:
        try:
            worker = Worker(job, python, output)
        except OSError as error:
            return Outcome(reason=f"{python or sys.executable} cannot be started ({error.strerror})")
        try:
            worker.hand_over()
            worker.listen(on_progress)
        except KeyboardInterrupt:
            worker.interrupt(on_progress)
        finally:
            worker.end()
    return worker.told(log)


class Worker:
    """One worker process and the pipe of its events."""

    def __init__(self, job: Job, python: str | None, output: BinaryIO) -> None:
        """Starts it; it waits for its job.

        Raises:
            OSError: the interpreter cannot be started.
        """
        self.job = job
        self.outcome = Outcome()
        self.over = False
        """Whether it has told its outcome, or is gone."""
        self.waiting = False
        """Whether it waits for its turn."""
        self._rest = b""
        self.pipe, write_fd = os.pipe()
        environment = empty_cache_environment(job.empty_caches) if job.empty_caches else None
        try:
            self.process = subprocess.Popen(
                [python or sys.executable, "-c", _ENTRY, str(write_fd)],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                pass_fds=(write_fd,),
                start_new_session=True,
                env=environment,
            )
        except OSError:
            os.close(self.pipe)
            raise
        finally:
            os.close(write_fd)

    def hand_over(self) -> None:
        """Gives it its job. A job that takes turns keeps its stdin."""
        stdin = self.process.stdin
        assert stdin is not None
        with suppress(BrokenPipeError):  # it died early: its exit code and log tell why
            stdin.write(self.job.to_json().encode() + b"\n")
            stdin.flush() if self.job.takes_turns else stdin.close()

    def go(self) -> None:
        """Its turn has come."""
        stdin = self.process.stdin
        assert stdin is not None
        self.waiting = False
        with suppress(BrokenPipeError):
            stdin.write(b"go\n")
            stdin.flush()

    def listen(self, on_progress: OnProgress) -> None:
        """Reads events up to the outcome, or until the process is gone or has taken longer than it may."""
        limit = self.job.limit_s
        deadline = None if limit is None else time.monotonic() + limit
        while not self.over:
            self.pump(on_progress, POLL_S)
            if deadline is not None and not self.over and time.monotonic() > deadline:
                self.hang()

    def pump(self, on_progress: OnProgress, wait_s: float) -> None:
        """Takes in what it says within ``wait_s``. A child of its own may hold the pipe open after it is gone."""
        gone = self.process.poll() is not None
        if not select.select([self.pipe], [], [], 0.0 if gone else wait_s)[0]:
            self.over = self.over or gone
            return
        block = os.read(self.pipe, 65536)
        if not block:
            self.over = True
            return
        *lines, self._rest = (self._rest + block).split(b"\n")
        for line in lines:
            self._take(json.loads(line), on_progress)

    def _take(self, event: dict[str, Any], on_progress: OnProgress) -> None:
        if event["event"] == "progress":
            on_progress(event["done"], event["total"])
        elif event["event"] == "facts":
            self.outcome.facts |= event["facts"]
        elif event["event"] == "turn":
            self.waiting = True
        else:
            told = self.outcome
            told.status, told.reason, told.value = event["status"], event["reason"], event["value"]
            self.over = True

    def hang(self) -> None:
        """It has not ended in its time: it is ended, and its outcome says so."""
        minutes = (self.job.limit_s or 0.0) / 60
        self.outcome.status = jobs.HUNG
        self.outcome.reason = (
            f"it did not end within {minutes:.3g} minutes and was ended; rows measured before are kept "
            "(--case-minutes gives it more, --resume measures what is missing)"
        )
        self.over = True

    def interrupt(self, on_progress: OnProgress) -> None:
        """Asks the process to stop, hears it out, and ends it where it does not."""
        self.process.send_signal(signal.SIGINT)
        try:
            self.process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
        while not self.over:
            self.pump(on_progress, 0.0)
        self.outcome.status = jobs.INTERRUPTED
        self.outcome.reason = "interrupted; rows measured before are kept"

    def end(self) -> None:
        """Whatever of it is left goes, its children too, or they would keep the device's memory."""
        if self.outcome.status != jobs.HUNG and self.over:
            with suppress(subprocess.TimeoutExpired):  # it has told its outcome and is about to end
                self.process.wait(STOP_TIMEOUT_S)
        self.kill()
        os.close(self.pipe)
        stdin = self.process.stdin
        if stdin is not None:
            with suppress(BrokenPipeError):
                stdin.close()

    def kill(self) -> None:
        """At once, its children too."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def told(self, log: Path) -> Outcome:
        """How it ended; where it did not say, by its exit code and last words."""
        if self.outcome.status == jobs.FAILED and not self.outcome.reason:
            how = f"its process ended with code {self.process.returncode}"
            self.outcome.reason = how + _last_words(log)
        return self.outcome


def _last_words(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return f" ({lines[-1][:200]}; all of it in {log})" if lines else ""
