"""What goes wrong while cases run: killed, hung, disk full, cut short. What was measured stays and is marked, the run
goes on, and ``--resume`` measures the rest. Cases are real worker processes before servers that misbehave."""

from __future__ import annotations

import io
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from bench_fakes import FakeCase, FakeLauncher, fast_and_slow
from peer_fakes import completions_server, piece, usage
from rich.console import Console

from jitgraph.bench import jobs, run_cases
from jitgraph.bench.instruments import _children
from jitgraph.bench.jobs import Job
from jitgraph.bench.plan import Options
from jitgraph.bench.process import Outcome, run_process
from jitgraph.bench.run import recompute, run_benchmark
from jitgraph.bench.study import load_study
from jitgraph.errors import ConfigError, OutputError

SERVERS = ("tensorrt-llm", "vllm", "openai")


@pytest.fixture(autouse=True)
def without_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """They take longer than everything else here, and have tests of their own."""
    monkeypatch.setattr("jitgraph.bench.report.missing_reason", lambda: "none in these tests")


class RealCases(FakeLauncher):
    """Cases are real processes; all else is the fake's."""

    def __call__(self, job: Job, python: str | None, log: Path, on_progress: Callable[[int, int], None]) -> Outcome:
        if job.kind != "case":
            return super().__call__(job, python, log, on_progress)
        self.kinds.append(job.case)
        return run_process(job, python, log, on_progress)


class Misbehaving:
    """A server's answers: good ones, but for what happens at a request of this number."""

    def __init__(self, at: int = 0, then: Callable[[], None] = lambda: None) -> None:
        self.at, self.then, self.served = at, then, 0

    def __call__(self, fields: dict[str, Any]) -> tuple[int, Any]:
        self.served += 1
        if self.served == self.at:
            self.then()
        ids = range(7, 7 + fields["max_tokens"])
        return 200, [*(piece("a", [one]) for one in ids), usage(len(fields["prompt"]), len(ids)), b"[DONE]"]


def kill_worker() -> None:
    """SIGKILL to whatever this process has started last."""
    os.kill(max(_children(os.getpid())), signal.SIGKILL)


def run(folder: Path, launcher: FakeLauncher, **settings: Any) -> tuple[int, str]:
    console = Console(record=True, width=200, file=io.StringIO())
    given = {"prompt_lengths": (10, 100), "ttft_iterations": 3, "p99_iterations": 4, "pacing": "sustained"}
    options = Options(output=str(folder), **{**given, **settings})
    return run_benchmark(options, console, launcher), console.export_text()


def summary(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    return found


def rows(folder: Path, case: str, metric: str = "ttft_ms") -> dict[tuple[str, int], dict[str, Any]]:
    """(protocol, prompt tokens) to row, warm-up left out."""
    found = (row for row in summary(folder)["rows"] if row["case"] == case and row["metric"] == metric)
    return {(row["protocol"], row["prompt_tokens"]): row for row in found if row["protocol"] != "warmup"}


@pytest.fixture
def other() -> Iterator[str]:
    """A server that behaves."""
    with completions_server(Misbehaving()) as (url, _):
        yield url


def test_a_killed_case_keeps_its_rows_and_the_run_goes_on_and_resumes(tmp_path: Path, other: str) -> None:
    folder, launcher = tmp_path / "out", RealCases({})
    # Probe, four warm-up requests, two answers, three and three for TTFT: the twelfth is in the second row.
    with completions_server(Misbehaving(at=12, then=kill_worker)) as (url, _):
        code, shown = run(folder, launcher, cases=("vllm", "openai"), urls={"vllm": url, "openai": other})
    assert code == 1 and "vLLM: its process ended with code -9" in shown
    assert launcher.kinds[-2:] == ["vllm", "openai"] and summary(folder)["cases"]["openai"]["status"] == jobs.COMPLETE
    kept = rows(folder, "vllm")
    assert kept["ttft", 10]["n"] == 3 and ("p99", 100) not in kept
    assert all("failed later" in row["notes"] for row in kept.values())
    before = kept["ttft", 10]["mean"]

    again = RealCases({})
    urls = {"vllm": other, "openai": other}
    code, shown = run(folder, again, cases=("vllm", "openai"), urls=urls, resume=True)
    assert code == 0 and "OpenAI-compatible server: complete already" in shown
    assert [kind for kind in again.kinds if kind in SERVERS] == ["vllm"], "what is complete is not run again"
    whole = rows(folder, "vllm")
    assert {where: row["n"] for where, row in whole.items()} == {
        ("ttft", 10): 3,
        ("ttft", 100): 3,
        ("p99", 10): 4,
        ("p99", 100): 4,
    }
    assert whole["ttft", 10]["mean"] == before, "a row that was whole is the earlier one"
    assert all("resumed" in row["notes"] and "failed later" not in row["notes"] for row in whole.values())


def test_a_case_that_hangs_is_ended_and_the_run_goes_on(tmp_path: Path, other: str) -> None:
    release = threading.Event()
    started = time.monotonic()
    try:
        with completions_server(Misbehaving(at=12, then=release.wait)) as (url, _):
            urls = {"vllm": url, "openai": other}
            code, shown = run(tmp_path, RealCases({}), cases=("vllm", "openai"), urls=urls, case_minutes=4 / 60)
            release.set()
    finally:
        release.set()
    assert time.monotonic() - started < 60
    assert code == 1 and "did not end within 0.0667 minutes and was ended" in shown
    assert summary(tmp_path)["cases"]["vllm"]["status"] == jobs.HUNG
    assert all("hung" in row["notes"] for row in rows(tmp_path, "vllm").values())
    assert summary(tmp_path)["cases"]["openai"]["status"] == jobs.COMPLETE


def test_a_full_disk_stops_the_run_with_its_rows_and_resumes(tmp_path: Path, other: str) -> None:
    """The worker may write some kilobytes to a file and no more, as on a disk with that much room."""
    folder, program = tmp_path / "out", tmp_path / "python"
    program.write_text(f'#!/bin/sh\nulimit -f 96\nexec {sys.executable} "$@"\n')
    program.chmod(0o755)
    launcher, urls = RealCases({}), {"vllm": other, "openai": other}
    code, shown = run(folder, launcher, cases=("vllm", "openai"), urls=urls, pythons={"vllm": str(program)})
    assert code == 1 and "samples cannot be written (File too large): free space" in shown and "--resume" in shown
    assert "openai" not in launcher.kinds, "every further case would find the disk full too"
    assert summary(folder)["cases"]["vllm"]["status"] == jobs.DISK_FULL
    assert rows(folder, "vllm")["ttft", 10]["n"] == 3
    code, _ = run(folder, RealCases({}), cases=("vllm", "openai"), urls=urls, resume=True)
    assert code == 0 and rows(folder, "vllm")["p99", 100]["n"] == 4
    assert summary(folder)["cases"]["openai"]["status"] == jobs.COMPLETE


def test_a_disk_that_takes_no_facts_ends_the_run_in_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = run_cases.write_json

    def full(path: Path, record: dict[str, Any]) -> None:
        if path.name == "jit.json" and record["status"] == jobs.COMPLETE:
            raise OutputError(f"{path} cannot be written (No space left on device): free space")
        real(path, record)

    monkeypatch.setattr(run_cases, "write_json", full)
    launcher = fast_and_slow()
    code, shown = run(tmp_path, launcher)
    assert code == 1 and "Stopped: " in shown and "No space left" in shown
    assert "hybrid" not in launcher.kinds and rows(tmp_path, "cuda-graph") and rows(tmp_path, "jit")


def test_an_interrupted_run_of_all_resumes_where_it_stopped(tmp_path: Path) -> None:
    launcher = fast_and_slow()
    launcher.cases["jit"] = FakeCase(12.0, stop_after=4 + 4)
    assert run(tmp_path, launcher)[0] == 130
    assert rows(tmp_path, "jit")["ttft", 100]["n"] == 1
    second = fast_and_slow()
    code, _ = run(tmp_path, second, resume=True)
    assert code == 0 and second.kinds == ["prepare", "jit", "hybrid", "tensorrt-llm"]
    jit = second.cases["jit"]
    assert isinstance(jit, FakeCase) and jit.requests == 4 + 3 + 2 * 4, "warm-up, one row of TTFT, all of P99"
    assert rows(tmp_path, "jit")["ttft", 100]["n"] == 3, "the row that was cut short was measured anew, whole"
    assert not list(tmp_path.glob("earlier-*"))
    third = fast_and_slow()
    assert run(tmp_path, third, resume=True)[0] == 0 and third.kinds == ["prepare", "tensorrt-llm"]
    assert run(tmp_path / "new", fast_and_slow(), resume=True)[0] == 0, "an empty folder has nothing to resume"


def test_resuming_does_not_mix_studies(tmp_path: Path) -> None:
    run(tmp_path, fast_and_slow())
    with pytest.raises(OutputError, match="holds another study"):
        run(tmp_path, fast_and_slow(), resume=True, seed=1)


def test_more_samples_are_asked_for_when_resuming(tmp_path: Path) -> None:
    run(tmp_path, fast_and_slow(), cases=("hybrid",))
    again = fast_and_slow()
    assert run(tmp_path, again, cases=("hybrid",), resume=True, p99_iterations=6)[0] == 0
    found = rows(tmp_path, "hybrid")
    assert found["p99", 10]["n"] == 6 and found["ttft", 10]["n"] == 3


def test_a_damaged_or_foreign_record_costs_no_other_case(tmp_path: Path) -> None:
    run(tmp_path, fast_and_slow())
    raw = tmp_path / "raw"
    jit, hybrid = raw / "jit.jsonl", raw / "hybrid.jsonl"
    jit.write_text("no record\n" + jit.read_text())
    hybrid.write_text((raw / "baseline.jsonl").read_text() + hybrid.read_text())  # two folders thrown together
    recompute(tmp_path, Console(quiet=True))
    cases = summary(tmp_path)["cases"]
    assert cases["jit"]["status"] == cases["hybrid"]["status"] == jobs.DAMAGED
    assert rows(tmp_path, "baseline") and not rows(tmp_path, "jit") and not rows(tmp_path, "hybrid")
    told = (tmp_path / "final_ttft_table.md").read_text(encoding="utf-8")
    assert "line 1 of" in told and "is no benchmark record: remove the file and run its case again" in told
    assert run(tmp_path, fast_and_slow(), cases=("jit", "hybrid"), resume=True)[0] == 0
    assert rows(tmp_path, "jit") and rows(tmp_path, "hybrid")
    assert {row["case"] for row in summary(tmp_path)["rows"]} >= {"jit", "hybrid", "baseline"}


def test_a_gpu_in_use_by_others_is_told_and_marked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_cases, "others_on", lambda uuid: "2 other processes, 30.5 GiB in use")
    code, shown = run(tmp_path, fast_and_slow(), cases=("hybrid",))
    assert code == 0 and "the GPU is in use by others (2 other processes, 30.5 GiB in use)" in shown
    assert all("GPU in use by others" in row["notes"] for row in rows(tmp_path, "hybrid").values())
    assert "measure again alone" in (tmp_path / "final_ttft_table.md").read_text(encoding="utf-8")
    study = load_study(tmp_path)
    assert study.cases["hybrid"]["shared_gpu"]


# ------------------------------------------------------------------------------------------------------------ in turns


def in_turns(folder: Path, urls: dict[str, str], unit: str, **settings: Any) -> tuple[int, str]:
    return run(folder, RealCases({}), cases=SERVERS, urls=urls, interleave=unit, **settings)


@pytest.mark.parametrize("unit", ["request", "block"])
def test_interleaved_cases_take_turns(tmp_path: Path, unit: str) -> None:
    """Three processes at once, never two at work; the order of requests is that of the turns."""
    order: list[str] = []
    busy = threading.Lock()

    def noting(name: str) -> Callable[[dict[str, Any]], tuple[int, Any]]:
        inner = Misbehaving()

        def answer(fields: dict[str, Any]) -> tuple[int, Any]:
            assert busy.acquire(blocking=False), "two cases at work"
            try:
                order.append(name)
                return inner(fields)
            finally:
                busy.release()

        return answer

    with (
        completions_server(noting("t")) as (one, _),
        completions_server(noting("v")) as (two, _),
        completions_server(noting("o")) as (three, _),
    ):
        code, shown = in_turns(tmp_path, dict(zip(SERVERS, (one, two, three), strict=True)), unit)
    assert code == 0, shown
    per_case = 1 + 4 + 2  # the probe, warm-up, an answer for each decode length
    assert order[: 3 * per_case] == ["t"] * per_case + ["v"] * per_case + ["o"] * per_case
    timed = "".join(order[3 * per_case :])
    if unit == "request":
        assert timed == "tvo" * (len(timed) // 3)
    else:
        blocks = [3, 3, 1, 1, 4, 4, 1, 1]
        assert timed == "".join(one * count for count in blocks for one in "tvo")
    for case in SERVERS:
        assert rows(tmp_path, case)["p99", 100]["n"] == 4
        assert f"interleaved by {unit}" in rows(tmp_path, case)["p99", 100]["notes"]


def test_interleaved_cases_are_restarted_and_resumed(tmp_path: Path) -> None:
    """Every process of every case takes turns with its neighbours; resuming leaves whole processes out."""
    with completions_server(Misbehaving()) as (url, asked):
        urls = dict.fromkeys(SERVERS[1:], url)
        code, _ = run(tmp_path, RealCases({}), cases=SERVERS[1:], urls=urls, interleave="block", restarts=2)
        assert code == 0
        found = rows(tmp_path, "vllm")["p99", 100]
        assert found["n"] == 8 and found["restarts"]["n"] == 2
        before = len(asked)
        again = {"cases": SERVERS[1:], "urls": urls, "interleave": "block", "resume": True}
        assert run(tmp_path, RealCases({}), restarts=2, **again)[0] == 0
        assert len(asked) == before, "nothing was missing"
        assert run(tmp_path, RealCases({}), restarts=3, **again)[0] == 0
    found = rows(tmp_path, "openai")["p99", 100]
    assert found["n"] == 12 and found["restarts"]["n"] == 3 and "resumed" in found["notes"]
    assert len(asked) == before * 3 // 2, "one more process of each, no more"
    assert "Cases took turns (block by block: " in (tmp_path / "peers_ttft_table.md").read_text(encoding="utf-8")


def test_a_case_that_dies_or_hangs_in_its_turn_leaves_the_others_to_go_on(tmp_path: Path, other: str) -> None:
    release = threading.Event()
    pids: list[int] = []

    def kill_first() -> None:
        pids.extend(sorted(_children(os.getpid())))
        os.kill(pids[0], signal.SIGKILL)

    try:
        with (
            completions_server(Misbehaving(at=12, then=kill_first)) as (dying, _),
            completions_server(Misbehaving(at=14, then=release.wait)) as (hanging, _),
        ):
            urls = dict(zip(SERVERS, (dying, hanging, other), strict=True))
            code, _ = in_turns(tmp_path, urls, "request", case_minutes=6 / 60)
            release.set()
    finally:
        release.set()
    status = {case: facts["status"] for case, facts in summary(tmp_path)["cases"].items()}
    assert code == 1
    assert (status["tensorrt-llm"], status["vllm"], status["openai"]) == (jobs.FAILED, jobs.HUNG, jobs.COMPLETE)
    assert rows(tmp_path, "tensorrt-llm")["ttft", 10]["n"] == 3 and rows(tmp_path, "openai")["p99", 100]["n"] == 4


def test_interrupting_turns_keeps_what_every_case_has(tmp_path: Path) -> None:
    main = os.getpid()
    with completions_server(Misbehaving(at=12, then=lambda: os.kill(main, signal.SIGINT))) as (url, _):
        code, shown = in_turns(tmp_path, dict.fromkeys(SERVERS, url), "block")
    assert code == 130 and "Interrupted" in shown
    assert {facts["status"] for case, facts in summary(tmp_path)["cases"].items() if case in SERVERS} == {
        jobs.INTERRUPTED
    }


def test_engines_that_do_not_fit_together_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    launcher = fast_and_slow()
    real = launcher.prepare

    def prepare(job: Job) -> Outcome:
        outcome = real(job)
        outcome.value["environment"]["device_free_gib"] = 12.0
        return outcome

    monkeypatch.setattr(launcher, "prepare", prepare)
    sentence = r"interleaved, 5 engines need about 25 GiB together and the GPU has 12 GiB free: name fewer cases"
    with pytest.raises(ConfigError, match=sentence):
        run(tmp_path / "out", launcher, interleave="request")
    assert launcher.kinds == ["prepare"] and not (tmp_path / "out").exists()
