"""A fake case and a fake launcher for the benchmark's tests: known times, no model, no processes."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jitgraph.bench import jobs
from jitgraph.bench.cases.common import CaseUnavailable, Decoded, FirstToken
from jitgraph.bench.gate import Reference, references_from_json, references_to_json
from jitgraph.bench.jobs import Job
from jitgraph.bench.plan import LINEARS, Options, Plan
from jitgraph.bench.process import Outcome
from jitgraph.bench.prompts import make_prompts
from jitgraph.bench.protocol import GateFailed, Meter, TimeUp
from jitgraph.bench.records import BlockKey, RawWriter

MODEL = {"name": "fake", "weights": "random", "seed": 0, "dtype": "float32", "weight_bytes": 2_000_000_000}
MODEL |= {"kv_bytes_per_token": 1_000_000, "flops_per_token": 10_000_000_000, "flops_once": 0}
RATES = {"read_tb_s": 2.0, "copy_tb_s": 1.5, "gemm_tflops": 100.0}


class FakeCase:
    """Answers token 7; its times are ``base`` plus a thousandth per request."""

    def __init__(self, base: float, token_id: int = 7, stop_after: int | None = None) -> None:
        self.base, self.token_id, self.stop_after, self.requests = base, token_id, stop_after, 0

    def load(self, plan: Plan) -> None:
        pass

    def first_token(self, token_ids: list[int]) -> FirstToken:
        if self.requests == self.stop_after:
            raise KeyboardInterrupt
        self.requests += 1
        value = self.base + self.requests / 1000
        return FirstToken(self.token_id, value, value / 2)

    def decode(self, token_ids: list[int], tokens: int) -> Decoded:
        return Decoded(self.base, (self.base / 10,) * (tokens - 1))

    def paths(self) -> dict[str, dict[str, int]]:
        return {"prefill": {"exact": self.requests, "padded": 0, "eager": 0}, "decode": {"exact": 0}}

    def counters(self) -> dict[str, int]:
        return {}

    def peak_memory_bytes(self) -> int:
        return 3 * 2**30

    def describe(self) -> dict[str, Any]:
        return {"engine": "fake", "emulated": True}

    def attribution(self, token_ids: list[int]) -> dict[str, float]:
        return {"launches_per_step": self.base, "host_us_per_step": self.base / 100}

    def close(self) -> None:
        pass


class FakeLauncher:
    """Stands in for ``process.run_process``: the same jobs, answered in this process."""

    def __init__(self, cases: dict[str, FakeCase | CaseUnavailable], gate: Outcome | None = None) -> None:
        self.cases, self.gate, self.kinds = cases, gate, list[str]()
        self.device_name = "Fake GPU"
        self.again: dict[str, FakeCase] = {}
        """Cases whose later processes are others."""

    def __call__(self, job: Job, python: str | None, log: Path, on_progress: Callable[[int, int], None]) -> Outcome:
        self.kinds.append(f"{job.case} start" if job.kind == "start" else job.case or job.kind)
        return getattr(self, job.kind if job.kind != "gate" else "answer_gate")(Job.from_json(job.to_json()))

    def prepare(self, job: Job) -> Outcome:
        options = Options.from_json(job.options)
        plan = options.plan("cpu")
        environment = {"device_name": self.device_name, "torch": "2.13"}
        prompts = make_prompts(range(1000), plan.prompt_lengths)
        model = MODEL | {"seed": plan.seed}
        value = {"environment": environment, "plan": plan.to_json(), "model": model, "prompts": prompts}
        return Outcome(jobs.COMPLETE, "", value)

    def answer_gate(self, job: Job) -> Outcome:
        references = {length: Reference(7, 1.0, 0.1) for length in job.prompts}
        return self.gate or Outcome(jobs.COMPLETE, "", references_to_json(references))

    def ceiling(self, job: Job) -> Outcome:
        writer = RawWriter(Path(job.folder), LINEARS)
        for pacing in job.the_plan.pacings:
            for tokens in (1, *job.the_plan.prompt_lengths):
                writer.sample(BlockKey(LINEARS, "ttft", "ttft_ms", pacing, tokens), 0, 12.0, time.time())
        writer.close()
        return Outcome(jobs.COMPLETE, "", {"by_pacing": dict.fromkeys(job.the_plan.pacings, RATES)})

    def start(self, job: Job) -> Outcome:
        assert job.empty_caches and Path(job.empty_caches).is_dir()
        warm = self.kinds.count(f"{job.case} start") > 1
        return Outcome(jobs.COMPLETE, "", {"ready_s": 1.0 if warm else 9.0, "first_token_s": 2.0 if warm else 10.0})

    def case(self, job: Job) -> Outcome:
        subject = self.cases[job.case]
        if isinstance(subject, CaseUnavailable):
            return Outcome(subject.status, str(subject))
        if job.restart:
            subject = self.again.get(job.case, subject)
        writer = RawWriter(Path(job.folder), job.case, job.restart)
        measured = frozenset(job.measured)
        meter = Meter(job.case, subject, job.the_plan, job.prompts, writer, lambda done: None, job.deadline_s, measured)
        meter.sleep = lambda seconds: None
        facts = {**subject.describe(), "ungated": job.reference is None, "attribution": subject.attribution([1])}
        facts |= {"plan": job.the_plan.to_json()}
        try:
            meter.cold(1.5, None if job.reference is None else references_from_json(job.reference))
            meter.timed()
            return Outcome(jobs.COMPLETE, "", None, facts)
        except GateFailed as error:
            return Outcome(jobs.GATE_FAILED, str(error), None, facts)
        except TimeUp as error:
            return Outcome(jobs.TIME_LIMIT, str(error), None, facts)
        except KeyboardInterrupt:
            return Outcome(jobs.INTERRUPTED, "interrupted; rows measured before are kept", None, facts)
        finally:
            writer.close()


def fast_and_slow() -> FakeLauncher:
    """Every case runs, but TensorRT-LLM is not installed; the hybrid is the fastest."""
    bases = {"baseline": 20.0, "cuda-graph": 9.0, "jit": 12.0, "hybrid": 5.0}
    cases: dict[str, FakeCase | CaseUnavailable] = {name: FakeCase(base) for name, base in bases.items()}
    cases |= {"jit-all": FakeCase(15.0), "split": FakeCase(7.0)}
    cases["tensorrt-llm"] = CaseUnavailable("not installed", "not installed: run the script")
    return FakeLauncher(cases)
