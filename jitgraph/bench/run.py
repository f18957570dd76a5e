"""One benchmark run from options to tables: prepare, gate, ceiling, then each case, every one in a fresh process.

This process measures nothing and imports no torch: it starts workers, keeps the folder's record, and writes the tables.
Whatever ends the run, the tables of what was measured are written.
"""

from __future__ import annotations

import shutil
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console

from jitgraph.bench import jobs
from jitgraph.bench.earlier import put_aside
from jitgraph.bench.environment import differences
from jitgraph.bench.jobs import Job
from jitgraph.bench.plan import CASES, LINEARS, Options, Plan
from jitgraph.bench.process import Outcome, run_process
from jitgraph.bench.prompts import digests
from jitgraph.bench.records import prepare_folder, raw_path, read_blocks, read_json, write_json
from jitgraph.bench.report import write_report
from jitgraph.bench.run_cases import EXIT_BROKEN, EXIT_OK, CaseRuns, Launch, LaunchTogether
from jitgraph.bench.show import Board, show_study
from jitgraph.bench.study import load_study
from jitgraph.bench.tables import write_tables
from jitgraph.bench.turns import run_in_turns
from jitgraph.bench.watch import WATCH, watching
from jitgraph.errors import ConfigError, JitgraphError, OutputError

EXIT_INTERRUPTED = 130
WEIGHTS_SHARE = 1.1
"""What an engine holds by its matrices' bytes: the embedding besides."""
BESIDE_WEIGHTS_GIB = 3.0
"""Its KV cache, workspace, graphs, and the context of CUDA."""


def run_benchmark(
    options: Options,
    console: Console,
    launch: Launch = run_process,
    launch_together: LaunchTogether = run_in_turns,
) -> int:
    """Runs the cases and returns the exit code: 0, 1 where a case failed or its gate did, 130 where it was interrupted.

    Raises:
        OutputError: the output folder cannot be written, or holds another study; nothing has run then.
        JitgraphError: model, device or options that cannot work; no case has run then.
    """
    folder = Path(options.output)
    was_there = folder.exists()
    prepare_folder(folder)
    for case, python in options.pythons.items():
        if shutil.which(python) is None:
            raise ConfigError(f"--python {case}={python}: there is no such program; name the environment's python")
    with _terminate_as_interrupt(), Board(console, jobs=len(options.cases) + 3) as board:
        run = Run(options, folder, board, launch, launch_together)
        try:
            run.prepare()
        except KeyboardInterrupt:
            return EXIT_INTERRUPTED
        except JitgraphError:
            forget_refused_run(folder, was_there)
            raise
        try:
            code = run.everything()
        except OutputError as error:
            board.note(f"Stopped: {error}")
            code = EXIT_BROKEN
        except Exception:  # a defect of ours must not cost what was measured
            write_tables(load_study(folder), folder)
            raise
    study = load_study(folder)
    files = write_tables(study, folder)
    show_study(console, study)
    files += write_report(study, folder)
    if code == EXIT_OK and not any(row.key.case in options.cases for row in study.rows):
        code = EXIT_BROKEN  # asked for figures, got none
    console.print(f"Written to {folder}: {_names(files, folder)}", highlight=False, markup=False)
    return code


def forget_refused_run(folder: Path, was_there: bool) -> None:
    """Removes what a run that was refused before it began has written: its log, and the folders if they were made."""
    raw_path(folder, "prepare.log").unlink(missing_ok=True)
    if not was_there:
        with suppress(OSError):  # something else is in them by now
            raw_path(folder, "").rmdir()
            folder.rmdir()


def _names(files: Sequence[Path], folder: Path) -> str:
    """The files, those of a folder inside as one."""
    below = sorted({file.parent.name for file in files if file.parent != folder})
    return ", ".join([*(file.name for file in files if file.parent == folder), *(f"{name}/" for name in below)])


def recompute(folder: Path, console: Console, target: Path | None = None) -> None:
    """Computes the tables and the report of a folder again from its raw samples, and shows the tables. The page goes to
    ``target``, else into the folder.

    Raises:
        OutputError: the folder holds no run, or cannot be written.
    """
    study = load_study(folder)
    write_tables(study, folder)
    show_study(console, study)
    page = write_report(study, folder, target)[-1]
    console.print(f"Report: {page}", highlight=False, markup=False)


@contextmanager
def _terminate_as_interrupt() -> Iterator[None]:
    """A request to terminate ends the run as Ctrl-C does: with its tables."""

    def raise_interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, raise_interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@dataclass
class Run:
    """The state of one run."""

    options: Options
    folder: Path
    board: Board
    launch: Launch
    launch_together: LaunchTogether
    plan: Plan = field(init=False)
    environment: dict[str, Any] = field(init=False)
    prompts: dict[int, list[int]] = field(init=False)
    deadline_s: float | None = field(init=False)

    def __post_init__(self) -> None:
        minutes = self.options.max_minutes
        self.deadline_s = None if minutes is None else time.time() + 60 * minutes

    # ------------------------------------------------------------------------------------------------------- prepare

    def prepare(self) -> None:
        """Settles device, plan, model and prompts, and makes sure that the folder is of the same study.

        Raises:
            JitgraphError: something that the user must mend.
        """
        self.board.begin("device, model, prompts")
        job = Job("prepare", str(self.folder), options=asdict(self.options))
        outcome = self.launch(job, None, self._log("prepare"), self.board.advance)
        if outcome.status == jobs.INTERRUPTED:
            raise KeyboardInterrupt
        if outcome.status != jobs.COMPLETE:
            raise JitgraphError(outcome.reason)
        found = outcome.value
        self.plan = Plan.from_json(found["plan"])
        self.environment = found["environment"]
        self.prompts = {int(length): ids for length, ids in found["prompts"].items()}
        self._check_room(found["model"])
        self._settle_folder({"model": found["model"], "prompts": digests(self.prompts)})
        self.board.end(self._headline())

    def _settle_folder(self, study: dict[str, Any]) -> None:
        """A run of all cases puts earlier results aside; a run of some joins what is there, if it is the same study."""
        known = read_json(raw_path(self.folder, "study.json"))
        if set(CASES) <= set(self.options.cases) and not self.options.resume:
            put_aside(self.folder, self.board.note)
        elif known is not None:
            other = read_json(self.folder / "environment.json") or {}
            why = differences(other, self.environment) + _study_differences(known, study)
            if why:
                advice = "choose another --output or remove the folder"
                raise OutputError(f"{self.folder} holds another study ({'; '.join(why)}): {advice}")
            study["prompts"] = known["prompts"] | study["prompts"]
        write_json(self.folder / "environment.json", self.environment)
        write_json(raw_path(self.folder, "study.json"), study)

    def _check_room(self, model: Mapping[str, Any]) -> None:
        """Cases that take turns are all in memory at once.

        Raises:
            ConfigError: they do not fit on the GPU together.
        """
        free = self.environment.get("device_free_gib")
        if not self.plan.interleave or free is None:
            return
        each = float(model["weight_bytes"]) / 2**30 * WEIGHTS_SHARE + BESIDE_WEIGHTS_GIB
        own = [case for case in self.options.cases if case not in self.options.urls]
        if each * len(own) > free:
            raise ConfigError(
                f"interleaved, {len(own)} engines need about {each * len(own):.0f} GiB together and the GPU has "
                f"{free:.0f} GiB free: name fewer cases, or leave --interleave out"
            )

    def _forget(self, name: str) -> None:
        for suffix in (".json", ".jsonl"):
            raw_path(self.folder, name + suffix).unlink(missing_ok=True)

    def _headline(self) -> str:
        plan = self.plan
        quick = f", quick: {plan.p99_iterations} iterations for P99" if plan.quick else ""
        return (
            f"{plan.model} ({plan.weights} weights, {plan.dtype}) on {self.environment['device_name']}, "
            f"pacing {' and '.join(plan.pacings)}{quick}"
        )

    # ---------------------------------------------------------------------------------------------------------- jobs

    def everything(self) -> int:
        """Gate, ceiling, cases. Returns the exit code.

        Raises:
            OutputError: the folder takes no more; what was measured is kept.
        """
        with watching(raw_path(self.folder, WATCH), self.environment.get("device_uuid")):
            try:
                reference, refusal = self._gate()
                self._ceiling()
                return CaseRuns(
                    self.options,
                    self.folder,
                    self.plan,
                    self.prompts,
                    self.environment,
                    reference,
                    refusal,
                    self.deadline_s,
                    self.board,
                    self.launch,
                    self.launch_together,
                ).all()
            except KeyboardInterrupt:
                self.board.end("Interrupted: what was measured is kept, and marked.")
                return EXIT_INTERRUPTED

    def _run(self, job: Job, python: str | None = None) -> Outcome:
        job = replace(job, plan=self.plan, prompts=self.prompts)
        return self.launch(job, python, self._log(job.case or job.kind), self.board.advance)

    def _gate(self) -> tuple[Mapping[str, Any] | None, str]:
        """Reference first tokens (or None), and why no case may be timed (or nothing)."""
        self.board.begin("correctness reference")
        if not self.plan.gated:
            self.board.end("Correctness gate: off (--no-gate); every row says ungated.")
            return None, ""
        path = raw_path(self.folder, "gate.json")
        known = read_json(path)
        if known is not None and all(str(length) in known for length in self.prompts):
            self.board.end("Correctness reference: that of the folder.")
            return known, ""
        outcome = self._run(Job("gate", str(self.folder)))
        if outcome.status == jobs.INTERRUPTED:
            raise KeyboardInterrupt
        if outcome.status != jobs.COMPLETE:
            refusal = f"the correctness gate cannot run ({outcome.reason}); --no-gate measures without it"
            self.board.end(f"No times: {refusal}")
            return None, refusal
        write_json(path, (known or {}) | outcome.value)
        certain = sum(one["gap"] > one["error"] for one in outcome.value.values())
        of = f"{certain} of {len(outcome.value)}"
        self.board.end(f"Correctness reference: transformers, certain of its first token at {of} lengths.")
        return outcome.value, ""

    def _ceiling(self) -> None:
        self.board.begin("ceiling")
        if self._ceiling_known():
            self.board.end("Ceiling: that of the folder.")
            return
        self._forget("ceiling")
        self._forget(LINEARS)
        outcome = self._run(Job("ceiling", str(self.folder)))
        emulated = not self.plan.device.startswith("cuda")
        facts = {"status": outcome.status, "reason": outcome.reason, "emulated": emulated}
        write_json(raw_path(self.folder, f"{LINEARS}.json"), facts)
        if outcome.status == jobs.INTERRUPTED:
            raise KeyboardInterrupt
        if outcome.status != jobs.COMPLETE:
            self.board.end(f"Ceiling: {outcome.status}: {outcome.reason}")
            return
        write_json(raw_path(self.folder, "ceiling.json"), outcome.value)
        rates = load_study(self.folder).ceiling
        flags = "".join(f" {flag}." for flag in rates["flags"])
        self.board.end(f"Ceiling: read {rates['read_tb_s']:.3f} TB/s, {rates['gemm_tflops']:.3g} TFLOP/s.{flags}")

    def _ceiling_known(self) -> bool:
        """Whether the folder has the ceilings and the ``linears`` rows that this run's rows need."""
        rates = read_json(raw_path(self.folder, "ceiling.json"))
        samples = raw_path(self.folder, f"{LINEARS}.jsonl")
        if rates is None or not samples.exists():
            return False
        have = {(key.pacing, key.prompt_tokens) for key in read_blocks(samples)}
        return all((p, n) in have for p in self.plan.pacings for n in (1, *self.plan.prompt_lengths))

    def _log(self, name: str) -> Path:
        return raw_path(self.folder, f"{name}.log")


def _study_differences(known: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Why two studies' rows do not belong in one table; empty where they do."""
    a, b = known["model"], new["model"]
    why = [f"{name}: {a.get(name)} and {b.get(name)}" for name in sorted({*a, *b}) if a.get(name) != b.get(name)]
    common = set(known["prompts"]) & set(new["prompts"])
    if any(known["prompts"][length] != new["prompts"][length] for length in common):
        why.append("other prompts")
    return why
