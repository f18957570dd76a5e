"""Entry of every process of a benchmark run: one job on stdin, its events to the file descriptor of the only argument.

The main thread does everything. Whatever libraries print goes to this process's log; events have a pipe of their own.
"""

from __future__ import annotations

import errno
import importlib
import os
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from jitgraph.bench import jobs
from jitgraph.bench.cases.common import Case, CaseUnavailable
from jitgraph.bench.gate import compute_references, references_from_json, references_to_json
from jitgraph.bench.instruments import energy_meter
from jitgraph.bench.jobs import Events, Job
from jitgraph.bench.plan import BY_REQUEST, LINEARS, Options
from jitgraph.bench.protocol import GateFailed, Meter, TimeUp
from jitgraph.bench.records import RawWriter, raw_path
from jitgraph.bench.turns import Turns
from jitgraph.errors import ConfigError, JitgraphError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
"""Errors of a disk that takes no more."""


def _no_turns(unit: str) -> None:
    """A case that runs alone never waits."""


def prepare(job: Job, events: Events) -> dict[str, Any]:
    """Device, plan, model and prompts of a run, from what the user asked for."""
    from jitgraph.bench.environment import collect_environment
    from jitgraph.bench.model_facts import model_facts
    from jitgraph.bench.prompts import make_prompts
    from jitgraph.model.device import resolve_device
    from jitgraph.model.loader import find_model
    from jitgraph.text.prose import prose
    from jitgraph.text.tokenizer import Tokenizer, bundled_tokenizer_folder

    options = Options.from_json(job.options)
    device = str(resolve_device(options.device))
    plan = options.plan(device)
    source = find_model(plan.model, weights=plan.weights)
    if source.folder is None:
        plan = replace(plan, weights="random")  # a preset's are, whether or not that was said
    plan = plan.within(source.spec.max_position_embeddings)
    tokenizer = Tokenizer.from_folder(source.folder or bundled_tokenizer_folder())
    return {
        "environment": collect_environment(device),
        "plan": plan.to_json(),
        "model": model_facts(plan, source.spec),
        "prompts": make_prompts(tokenizer.encode(prose()), plan.prompt_lengths),
    }


def gate(job: Job, events: Events) -> dict[str, Any]:
    """Reference first tokens, from transformers."""
    return references_to_json(compute_references(job.the_plan, job.prompts, events.progress))


def ceiling(job: Job, events: Events) -> dict[str, Any]:
    """Rates of the machine; the ``linears`` samples go to the raw record."""
    import torch

    from jitgraph.bench.ceiling import measure_linears, measure_rates
    from jitgraph.model.loader import find_model

    plan = job.the_plan
    if plan.device.startswith("cuda"):
        torch.cuda.set_device(plan.device)  # kernels launch on the current device
    done, total = 0, len(plan.pacings) + len({1, *plan.prompt_lengths})

    def step() -> None:
        nonlocal done
        done += 1
        events.progress(done, total)

    rates = measure_rates(plan, step)
    writer = RawWriter(Path(job.folder), LINEARS)
    try:
        measure_linears(plan, find_model(plan.model, weights=plan.weights).spec, writer, step)
    finally:
        writer.close()
    return rates


def case(job: Job, events: Events) -> dict[str, Any]:
    """One case: load, first requests, gate, rows."""
    plan = job.the_plan
    turn = Turns(events, sys.stdin, plan.interleave) if job.takes_turns else _no_turns
    events.facts({"ungated": job.reference is None, "plan": plan.to_json()})
    begun_s = time.time() - job.started_s
    turn("load")
    loading_s = time.time()
    subject = make_case(job)
    try:
        subject.load(plan)
        ready_s = begun_s + time.time() - loading_s
        about = subject.describe()
        events.facts(about)
        writer = RawWriter(Path(job.folder), job.case, job.restart)
        try:
            meter = make_meter(job, subject, writer, events, turn)
            reference = None if job.reference is None else references_from_json(job.reference)
            checked = meter.cold(None if "transport" in about else ready_s, reference)
            events.facts({"gate_checked": checked})
            meter.timed()
            turn("end")
            described: dict[str, Any] = subject.describe()
            events.facts(attribution(subject, job))
            return described
        except GateFailed:
            with suppress(OSError):
                writer.close()
            raw_path(Path(job.folder), f"{job.case}.jsonl").unlink()  # a case that fails its gate has no times
            raise
        finally:
            writer.close()
    finally:
        subject.close()


def make_case(job: Job) -> Case:
    """The job's case, not loaded yet: a server where there is a URL, else what the case's file makes.

    Raises:
        CaseUnavailable: there can be none.
    """
    if job.url:
        from jitgraph.bench.cases.url import UrlCase

        return UrlCase(job.case, job.url)
    module = importlib.import_module("jitgraph.bench.cases." + job.case.replace("-", "_"))
    made: Case = module.make()
    return made


def make_meter(job: Job, subject: Case, writer: RawWriter, events: Events, turn: Callable[[str], None]) -> Meter:
    """The meter of a loaded case. Where requests of several cases alternate, a row's energy is not its own."""
    plan = job.the_plan
    total = plan.requests()
    shared = job.takes_turns and plan.interleave == BY_REQUEST
    return Meter(
        job.case,
        subject,
        plan,
        job.prompts,
        writer,
        lambda done: events.progress(done, total),
        job.deadline_s,
        frozenset(job.measured),
        turn,
        energy_j=energy_meter(None if shared or job.url else job.device_uuid),
    )


def start(job: Job, events: Events) -> dict[str, Any]:
    """How long a case takes from the start of its process to ready, and to its first token; then it ends."""
    plan = job.the_plan
    subject = make_case(job)
    try:
        subject.load(plan)
        ready_s = time.time() - job.started_s
        length = plan.prompt_lengths[0]
        subject.first_token(job.prompts[length])
        return {"ready_s": ready_s, "first_token_s": time.time() - job.started_s}
    finally:
        subject.close()


def attribution(subject: Case, job: Job) -> dict[str, Any]:
    """What the case's decode steps cost the host, as facts. Whatever goes wrong here costs no row that was timed."""
    plan = job.the_plan
    prompt = job.prompts[plan.prompt_lengths[0]][: plan.max_model_len // 4]  # leaves room for the steps
    try:
        return {"attribution": subject.attribution(prompt)}
    except Exception as error:
        traceback.print_exc()
        return {"attribution": {}, "attribution_error": f"{type(error).__name__}: {error}"}


JOBS = {"prepare": prepare, "gate": gate, "ceiling": ceiling, "case": case, "start": start}


def pin(job: Job) -> None:
    """Holds this process, and whatever it will start, to the plan's cores.

    Raises:
        ConfigError: the machine has none of them.
    """
    cores = job.plan.pinned_cpus if job.plan else ()
    if not cores:
        return
    try:
        os.sched_setaffinity(0, cores)
    except OSError as error:
        have = ", ".join(map(str, sorted(os.sched_getaffinity(0))))
        raise ConfigError(f"--pin-cpu names no core that this process may use ({have})") from error


def run_job(job: Job, events: Events) -> int:
    """Runs a job and tells how it ended; the exit code says the same."""
    try:
        pin(job)  # before anything makes a thread
        events.outcome(jobs.COMPLETE, value=JOBS[job.kind](job, events))
        return 0
    except CaseUnavailable as error:
        events.outcome(error.status, str(error))
    except GateFailed as error:
        events.outcome(jobs.GATE_FAILED, str(error))
    except TimeUp as error:
        events.outcome(jobs.TIME_LIMIT, str(error))
    except KeyboardInterrupt:
        events.outcome(jobs.INTERRUPTED, "interrupted; rows measured before are kept")
    except JitgraphError as error:
        events.outcome(jobs.FAILED, str(error))
    except OSError as error:
        traceback.print_exc()
        if error.errno in FULL:
            sentence = f"its samples cannot be written ({error.strerror}): free space, then run again with --resume"
            events.outcome(jobs.DISK_FULL, sentence)
        else:
            events.outcome(jobs.FAILED, f"{type(error).__name__}: {error}")
    except Exception as error:
        traceback.print_exc()
        first_line = (str(error).splitlines() or ["no message"])[0]
        events.outcome(jobs.FAILED, f"{type(error).__name__}: {first_line}")
    return 1


def main() -> int:
    """Process entry."""
    with os.fdopen(int(sys.argv[1]), "w", encoding="utf-8") as pipe:
        job = Job.from_json(sys.stdin.readline())
        return run_job(job, Events(pipe))
