"""Cases that take turns: each in a process of its own, all of them alive at once, one at work at a time.

The command's process hands the turn round in the cases' order. A turn is the loading of a case with its first requests,
then one request or one row, as the plan says; so what one case saw of the machine's state the others saw as well.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple, TextIO

from jitgraph.bench import jobs
from jitgraph.bench.jobs import Events, Job
from jitgraph.bench.process import POLL_S, Outcome, Worker

OnCaseProgress = Callable[[str, int, int], None]


class Task(NamedTuple):
    """One case of several that take turns."""

    job: Job
    python: str | None
    log: Path


def run_in_turns(tasks: Sequence[Task], on_progress: OnCaseProgress) -> dict[str, Outcome]:
    """Runs the cases together; returns how each ended. A case that fails or hangs leaves the others to go on."""
    outcomes: dict[str, Outcome] = {}
    workers: list[Worker] = []
    with ExitStack() as stack:
        try:
            for task in tasks:
                output = stack.enter_context(task.log.open("wb"))
                try:
                    worker = Worker(task.job, task.python, output)
                except OSError as error:
                    reason = f"{task.python or sys.executable} cannot be started ({error.strerror})"
                    outcomes[task.job.case] = Outcome(reason=reason)
                    continue
                workers.append(worker)
                worker.hand_over()
            _take_turns(workers, on_progress)
        except KeyboardInterrupt:
            for worker in workers:
                worker.interrupt(lambda done, total: None)
        finally:
            for worker in workers:
                worker.end()
    logs = {task.job.case: task.log for task in tasks}
    return outcomes | {worker.job.case: worker.told(logs[worker.job.case]) for worker in workers}


def _take_turns(workers: Sequence[Worker], on_progress: OnCaseProgress) -> None:
    """Round after round, until all are over."""
    held_s = dict.fromkeys((worker.job.case for worker in workers), 0.0)
    while alive := [worker for worker in workers if not worker.over]:
        for worker in alive:
            case = worker.job.case

            def progress(done: int, total: int, case: str = case) -> None:
                on_progress(case, done, total)

            begin = time.monotonic()
            ready = False
            while not worker.over:  # first it comes to where it waits, then it has its turn
                if worker.waiting and not ready:
                    ready = True
                    worker.go()
                elif worker.waiting:
                    break
                worker.pump(progress, POLL_S)
                limit = worker.job.limit_s
                if limit is not None and not worker.over and held_s[case] + time.monotonic() - begin > limit:
                    worker.hang()
            held_s[case] += time.monotonic() - begin
            if worker.outcome.status == jobs.HUNG:
                worker.kill()  # at once: the next turn is not to run beside it


class Turns:
    """The worker's side: waits where the plan has a turn begin."""

    def __init__(self, events: Events, stdin: TextIO, unit: str) -> None:
        self._events = events
        self._stdin = stdin
        self._units = (unit, "load", "end")

    def __call__(self, unit: str) -> None:
        """Returns when the turn has come; at once where a turn does not begin with this.

        Raises:
            KeyboardInterrupt: the command is gone.
        """
        if unit not in self._units:
            return
        self._events.turn()
        if not self._stdin.readline():
            raise KeyboardInterrupt
