"""Runs the cases of a benchmark run, one after the other or in turns, and keeps each one's record.

The command's own process: it measures nothing and imports no torch. Each process of a case adds to its samples; what
was measured before something went wrong is kept and marked, and a later run into the folder may measure the rest.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from jitgraph.bench import jobs
from jitgraph.bench.earlier import CaseRecord
from jitgraph.bench.jobs import Job
from jitgraph.bench.plan import INTERACTIVE, TITLES, WARMUP, Options, Plan
from jitgraph.bench.process import Outcome
from jitgraph.bench.records import BlockFacts, BlockKey, RawWriter, raw_path, read_json, write_json
from jitgraph.bench.resume import expected_rows, keep_whole_rows
from jitgraph.bench.show import Board
from jitgraph.bench.turns import OnCaseProgress, Task
from jitgraph.bench.watch import others_on
from jitgraph.errors import OutputError

Launch = Callable[[Job, "str | None", Path, Callable[[int, int], None]], Outcome]
LaunchTogether = Callable[[Sequence[Task], OnCaseProgress], Mapping[str, Outcome]]
EXIT_OK, EXIT_BROKEN = 0, 1


@dataclass
class Underway:
    """One case while it is run."""

    case: str
    record: CaseRecord
    measured: dict[int, frozenset[BlockKey]] = field(default_factory=dict)
    """For each process that an earlier run had, the rows that need not be measured again."""
    outcome: Outcome = field(default_factory=Outcome)
    shared_gpu: str = ""
    complete: bool = False
    """Whether an earlier run has all of it."""
    over: bool = False
    """Whether no further process of it is started."""


@dataclass
class CaseRuns:
    """All cases of one run."""

    options: Options
    folder: Path
    plan: Plan
    prompts: Mapping[int, list[int]]
    environment: Mapping[str, Any]
    reference: Mapping[str, Any] | None
    """First tokens for the gate; None runs cases ungated."""
    refusal: str
    """Why no case may be timed; empty where they may."""
    deadline_s: float | None
    board: Board
    launch: Launch
    launch_together: LaunchTogether

    def all(self) -> int:
        """Runs the cases; returns the exit code.

        Raises:
            KeyboardInterrupt: the run is to end; what was measured is recorded.
            OutputError: the folder takes no more.
        """
        if self.plan.interleave and not self._refused():
            return self._together(self.options.cases)
        return max([EXIT_OK, *(self._alone(case) for case in self.options.cases)])

    def _refused(self) -> Outcome | None:
        """The outcome of a case that is not even begun."""
        if self.refusal:
            return Outcome(jobs.NO_GATE, self.refusal)
        if self.deadline_s is not None and time.time() > self.deadline_s:
            return Outcome(jobs.TIME_LIMIT, "not run: the time limit was reached before it")
        return None

    # ------------------------------------------------------------------------------------------------------ one by one

    def _alone(self, case: str) -> int:
        self.board.begin(TITLES[case])
        if refused := self._refused():
            one = Underway(case, CaseRecord(self.folder, case), outcome=refused)
            stands = not one.record.samples.exists()
            return self._recorded(one, stands)
        one = self._begun(case)
        if one.complete:
            self.board.end(self._kept(one))
            return EXIT_OK
        stands = True
        try:
            for restart in range(self.plan.restarts):
                if not self._skips(one, restart):
                    job = self._job(one, restart)
                    log = raw_path(self.folder, f"{case}.log")
                    self._took(one, restart, self.launch(job, self.options.pythons.get(case), log, self.board.advance))
            self._start_times(one)
        except KeyboardInterrupt:
            one.outcome = Outcome(jobs.INTERRUPTED, "interrupted before its process could be started")
        finally:
            stands = one.record.settle(one.outcome.status)
        return self._recorded(one, stands)

    def _begun(self, case: str) -> Underway:
        """The case's record is ready to be added to. Where the run resumes and nothing is missing, it is over."""
        one = Underway(case, CaseRecord(self.folder, case))
        if self.options.resume and one.record.samples.exists():
            ended_well = one.record.complete
            one.measured = keep_whole_rows(one.record.samples, self.plan)
            wanted = expected_rows(case, self.plan)
            rows_are_there = all(wanted <= one.measured.get(k, frozenset()) for k in range(self.plan.restarts))
            one.complete = one.over = ended_well and rows_are_there
        else:
            one.record.begin()
        if not one.over:
            if case not in self.options.urls:
                one.shared_gpu = others_on(self.environment.get("device_uuid"))
            if one.shared_gpu:
                self.board.note(f"{TITLES[case]}: the GPU is in use by others ({one.shared_gpu}); its rows say so.")
            known = (read_json(one.record.facts) or {}) if one.measured else {}
            write_json(one.record.facts, {**known, "status": jobs.RUNNING, "shared_gpu": one.shared_gpu})
        return one

    def _skips(self, one: Underway, restart: int) -> bool:
        """Whether a process of the case is not started: the case is over, or an earlier run has all of it. The last one
        always is, since it tells how the case went."""
        last = restart == self.plan.restarts - 1
        there = expected_rows(one.case, self.plan) <= one.measured.get(restart, frozenset())
        return one.over or (there and not last)

    @staticmethod
    def _kept(one: Underway) -> str:
        return f"{TITLES[one.case]}: complete already; the folder's rows are kept"

    def _job(self, one: Underway, restart: int) -> Job:
        several = self.plan.restarts > 1 or bool(one.measured)
        return Job(
            "case",
            str(self.folder),
            self.plan,
            one.case,
            self.prompts,
            self.reference,
            deadline_s=self.deadline_s,
            limit_s=60 * self.options.case_minutes,
            url=self.options.urls.get(one.case, ""),
            restart=restart if several else None,
            measured=tuple(one.measured.get(restart, ())),
            takes_turns=bool(self.plan.interleave),
            device_uuid=self.environment.get("device_uuid"),
        )

    def _took(self, one: Underway, restart: int, outcome: Outcome) -> None:
        """A process of the case has ended."""
        before = one.outcome.facts
        one.outcome = outcome
        one.outcome.facts = {**before, **outcome.facts}
        if outcome.status != jobs.COMPLETE:
            one.over = True
            if restart:
                one.outcome.reason = f"process {restart + 1} of {self.plan.restarts}: {outcome.reason}"

    def _recorded(self, one: Underway, stands: bool) -> int:
        """Writes how the case went and shows it. Returns its part of the exit code.

        Raises:
            KeyboardInterrupt: the run is to end; the case is recorded.
            OutputError: the disk is full; as much as possible is recorded.
        """
        outcome = one.outcome
        if stands:
            last = outcome.value if isinstance(outcome.value, dict) else {}
            told = {**outcome.facts, **last, "status": outcome.status, "reason": outcome.reason}
            told |= {"shared_gpu": one.shared_gpu} if one.shared_gpu else {}
            write_json(one.record.facts, told | ({"resumed": True} if one.measured else {}))
        if outcome.status == jobs.INTERRUPTED:
            raise KeyboardInterrupt
        kept = "" if stands else "; the folder's rows of an earlier run are kept"
        self.board.end(f"{TITLES[one.case]}: {outcome.reason or outcome.status}{kept}")
        if outcome.status == jobs.DISK_FULL:
            raise OutputError(f"{TITLES[one.case]}: {outcome.reason}")
        return EXIT_BROKEN if outcome.status in jobs.BROKEN else EXIT_OK

    # -------------------------------------------------------------------------------------------------------- in turns

    def _together(self, cases: Sequence[str]) -> int:
        self.board.begin(f"{len(cases)} cases in turns, {self.plan.interleave} by {self.plan.interleave}")
        every = [self._begun(case) for case in cases]
        done: dict[str, tuple[int, int]] = {}

        def progress(case: str, so_far: int, total: int) -> None:
            done[case] = so_far, total
            self.board.advance(sum(one for one, _ in done.values()), sum(of for _, of in done.values()))

        stopped = False
        try:
            for restart in range(self.plan.restarts):
                going = [one for one in every if not self._skips(one, restart)]
                tasks = [
                    Task(
                        self._job(one, restart),
                        self.options.pythons.get(one.case),
                        raw_path(self.folder, f"{one.case}.log"),
                    )
                    for one in going
                ]
                outcomes = self.launch_together(tasks, progress) if tasks else {}
                for one in going:
                    self._took(one, restart, outcomes[one.case])
                stopped = any(one.outcome.status == jobs.INTERRUPTED for one in going)
            for one in every:
                if not stopped and not one.complete:
                    self._start_times(one)
        except KeyboardInterrupt:
            stopped = True
            for one in every:
                one.outcome = Outcome(jobs.INTERRUPTED, "interrupted before its process could be started")
        codes, errors = [EXIT_OK], list[OutputError]()
        for one in every:
            if one.complete:
                self.board.note(self._kept(one))
                continue
            try:
                codes.append(self._recorded(one, one.record.settle(one.outcome.status)))
            except KeyboardInterrupt:
                stopped = True
            except OutputError as error:
                errors.append(error)
        if stopped:
            raise KeyboardInterrupt
        if errors:
            raise errors[0]
        return max(codes)

    # -------------------------------------------------------------------------------------------------------- the start

    def _start_times(self, one: Underway) -> None:
        """Ready time with every cache of compiled code empty, and again with what that left in them."""
        wanted = self.options.start_times and one.case not in self.options.urls
        if not wanted or one.outcome.status != jobs.COMPLETE:
            return
        with tempfile.TemporaryDirectory(prefix="jitgraph-caches-") as caches:
            for name in ("cold", "warm"):
                job = replace(
                    self._job(one, 0), kind="start", empty_caches=caches, takes_turns=False, started_s=time.time()
                )
                log = raw_path(self.folder, f"{one.case}-{name}.log")
                outcome = self.launch(job, self.options.pythons.get(one.case), log, self.board.advance)
                if outcome.status == jobs.INTERRUPTED:
                    raise KeyboardInterrupt
                if outcome.status != jobs.COMPLETE:
                    self.board.note(f"{TITLES[one.case]}: its {name} start was not measured: {outcome.reason}")
                    return
                self._write_start(one.case, name, outcome.value)

    def _write_start(self, case: str, name: str, value: Mapping[str, float]) -> None:
        writer = RawWriter(self.folder, case, 0)
        try:
            for what in ("ready", "first_token"):
                key = BlockKey(case, WARMUP, f"{what}_{name}_s", INTERACTIVE, 0)
                writer.sample(key, 0, value[f"{what}_s"] * 1e3, time.time())
                writer.block(key, BlockFacts())
        finally:
            writer.close()
