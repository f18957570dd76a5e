"""Starts a worker process for a job and listens to it. The only user of ``subprocess`` in the benchmark.

The worker gets a session of its own, so that Ctrl-C at the terminal reaches this process alone; it is then asked to
stop, and its last lines are awaited. Its output goes to a log beside the raw samples.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jitgraph
from jitgraph.bench import jobs
from jitgraph.bench.jobs import Job

STOP_TIMEOUT_S = 20.0
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
        process = subprocess.Popen(
            [python or sys.executable, "-c", _ENTRY, str(write_fd)],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            pass_fds=(write_fd,),
            start_new_session=True,
        )
        os.close(write_fd)
        with os.fdopen(read_fd, encoding="utf-8") as events:
            try:
                _hand_over(process, job)
                _listen(events, outcome, on_progress)
                process.wait()
            except KeyboardInterrupt:
                _stop(process)
                _listen(events, outcome, on_progress)
                outcome.status = jobs.INTERRUPTED
                outcome.reason = "interrupted; rows measured before are kept"
            finally:
                if process.poll() is None:
                    process.kill()
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


def _listen(events: Any, outcome: Outcome, on_progress: Callable[[int, int], None]) -> None:
    """Reads events up to the outcome, or to the end of the pipe where the process died before one."""
    for line in events:
        event = json.loads(line)
        if event["event"] == "progress":
            on_progress(event["done"], event["total"])
        elif event["event"] == "facts":
            outcome.facts |= event["facts"]
        else:
            outcome.status, outcome.reason, outcome.value = event["status"], event["reason"], event["value"]
            return  # grandchildren may hold the pipe open


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
