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
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jitgraph
from jitgraph.bench import jobs
from jitgraph.bench.jobs import Job

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


def run_process(job: Job, python: str | None, log: Path, on_progress: Callable[[int, int], None]) -> Outcome:
    """Runs a job in a fresh interpreter (this one's, or ``python``) and returns how it ended."""
    read_fd, write_fd = os.pipe()
    outcome = Outcome()
    with log.open("wb") as output:
        try:
            process = subprocess.Popen(
                [python or sys.executable, "-c", _ENTRY, str(write_fd)],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                pass_fds=(write_fd,),
                start_new_session=True,
            )
        except OSError as error:
            os.close(read_fd)
            return Outcome(reason=f"{python or sys.executable} cannot be started ({error.strerror})")
        finally:
            os.close(write_fd)
        try:
            _hand_over(process, job)
            _listen(read_fd, process, outcome, on_progress)
            process.wait()
        except KeyboardInterrupt:
            _stop(process)
            _listen(read_fd, process, outcome, on_progress)
            outcome.status = jobs.INTERRUPTED
            outcome.reason = "interrupted; rows measured before are kept"
        finally:
            os.close(read_fd)
            with suppress(ProcessLookupError):  # its children too, or they would keep the device's memory
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if outcome.status == jobs.FAILED and not outcome.reason:
        outcome.reason = f"its process ended with code {process.returncode}{_last_words(log)}"
    return outcome


def _hand_over(process: subprocess.Popen[bytes], job: Job) -> None:
    assert process.stdin is not None
    try:
        with process.stdin as stdin:
            stdin.write(job.to_json().encode())
    except BrokenPipeError:
        pass  # it died early: its exit code and log tell why


def _listen(
    read_fd: int, process: subprocess.Popen[bytes], outcome: Outcome, on_progress: Callable[[int, int], None]
) -> None:
    """Reads events up to the outcome, or until the process is gone: a child of its own may hold the pipe open."""
    rest = b""
    while True:
        gone = process.poll() is not None
        if not select.select([read_fd], [], [], 0.0 if gone else POLL_S)[0]:
            if gone:
                return
            continue
        block = os.read(read_fd, 65536)
        if not block:
            return
        *lines, rest = (rest + block).split(b"\n")
        for line in lines:
            event = json.loads(line)
            if event["event"] == "progress":
                on_progress(event["done"], event["total"])
            elif event["event"] == "facts":
                outcome.facts |= event["facts"]
            else:
                outcome.status, outcome.reason, outcome.value = event["status"], event["reason"], event["value"]
                return


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Asks the worker to stop, and ends it where it does not."""
    process.send_signal(signal.SIGINT)
    try:
        process.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()


def _last_words(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return f" ({lines[-1][:200]}; all of it in {log})" if lines else ""
