"""What stands in a row beside its samples, and what is said of two rows: ties, restarts, events, the machine."""

from __future__ import annotations

import ctypes
import io
import json
import os
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bench_fakes import FakeCase, FakeLauncher, fast_and_slow
from bench_report_cases import write_run
from peer_fakes import completions_server, piece, usage
from rich.console import Console

from jitgraph.bench import jobs
from jitgraph.bench.case_tables import COLUMNS
from jitgraph.bench.cases.common import FirstToken
from jitgraph.bench.earlier import put_aside
from jitgraph.bench.finals import TIE, final_tables, peer_columns
from jitgraph.bench.instruments import Instruments, energy_meter
from jitgraph.bench.jobs import Job
from jitgraph.bench.nvml import Gpu, NvmlError
from jitgraph.bench.plan import Options
from jitgraph.bench.plan_words import parse_cpus
from jitgraph.bench.process import run_process
from jitgraph.bench.protocol import Meter
from jitgraph.bench.records import Event, RawWriter, prepare_folder, raw_path, read_blocks
from jitgraph.bench.report import write_report
from jitgraph.bench.restarts import restart_spread
from jitgraph.bench.run import run_benchmark
from jitgraph.bench.stats import average_interval, mean_interval, overlap, summarise
from jitgraph.bench.study import load_study
from jitgraph.bench.watch import WATCH, others_on, read_watch, watching
from jitgraph.config import empty_cache_environment
from jitgraph.errors import ConfigError

UUID = "GPU-1234"


@pytest.fixture(autouse=True)
def without_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jitgraph.bench.report.missing_reason", lambda: "none in these tests")


def run(folder: Path, launcher: FakeLauncher, **settings: Any) -> dict[str, Any]:
    given = {"prompt_lengths": (10, 100), "ttft_iterations": 3, "p99_iterations": 4, "pacing": "interactive"}
    options = Options(output=str(folder), **{**given, **settings})
    assert run_benchmark(options, Console(file=io.StringIO()), launcher) == 0
    found: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    return found


def row_of(found: Mapping[str, Any], **wanted: Any) -> dict[str, Any]:
    [row] = [one for one in found["rows"] if all(one[name] == value for name, value in wanted.items())]
    return dict(row)


# ---------------------------------------------------------------------------------------------------------- statistics


def test_every_percentile_has_an_interval_that_holds_it() -> None:
    values = [float(value) for value in np.random.default_rng(3).exponential(size=500)]
    s = summarise(values)
    assert s.p50 < s.p90 < s.p95 < s.p99 < s.p999 <= s.max
    for name in ("mean", "p50", "p90", "p95", "p99", "p999"):
        low, high = getattr(s, f"{name}_ci")
        assert low <= getattr(s, name) <= high, name
    assert s.p999 == pytest.approx(np.percentile(values, 99.9)) and s.mean_ci == mean_interval(values)
    assert summarise([2.0]).p999_ci == (2.0, 2.0)


def test_many_samples_are_resampled_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    values = [float(value) for value in np.random.default_rng(4).normal(10, 1, size=300)]
    whole = summarise(values)
    monkeypatch.setattr("jitgraph.bench.stats.CHUNK_VALUES", 7_000)
    parts = summarise(values)
    assert parts.p50_ci == pytest.approx(whole.p50_ci, rel=0.01) and parts.p99 == whole.p99


def test_interval_of_an_average_is_that_of_independent_columns() -> None:
    rng = np.random.default_rng(5)
    columns = [list(rng.normal(10, 1, size=200)) for _ in range(4)]
    found = average_interval(columns, "mean")
    assert found is not None
    deviation = sum(np.var(column, ddof=1) / 200 for column in columns) ** 0.5 / 4
    assert found[1] - found[0] == pytest.approx(2 * 1.96 * deviation, rel=0.15), "not as if they moved together"
    assert average_interval([[1.0], [1.0, 2.0]], "mean") is None
    assert overlap((1.0, 2.0), (2.0, 3.0)) and not overlap((1.0, 2.0), (2.1, 3.0))


def test_an_interval_reaches_as_far_as_processes_lie_apart() -> None:
    """Ten samples of a process tell less about the next process than ten processes would."""
    rng = np.random.default_rng(6)
    levels = rng.normal(10, 1, size=8)
    values = [float(level + noise) for level in levels for noise in rng.normal(0, 0.01, size=25)]
    processes = [index for index in range(8) for _ in range(25)]
    pooled, nested = summarise(values), summarise(values, processes)
    assert nested.mean == pooled.mean and nested.p99 == pooled.p99, "figures are of the pooled samples"
    expected = 2 * 1.96 * float(np.std(levels, ddof=1)) / 8**0.5
    assert nested.mean_ci[1] - nested.mean_ci[0] == pytest.approx(expected, rel=0.25)
    assert pooled.mean_ci[1] - pooled.mean_ci[0] < expected / 3
    assert summarise(values, [0] * len(values)) == pooled, "one process is no other case than none named"
    uneven = summarise([1.0, 2.0, 3.0, 9.0], [0, 0, 0, 4])
    assert uneven.mean_ci[0] >= 1.0 and uneven.mean_ci[1] == 9.0
    assert average_interval([values], "mean", [processes]) == pytest.approx(nested.mean_ci)


# ---------------------------------------------------------------------------------------------------------------- ties


def test_nobody_wins_where_intervals_overlap(tmp_path: Path) -> None:
    study = write_run(tmp_path, {"baseline": 12.0, "jit": 6.003, "hybrid": 6.0}, spread=0.05)
    for protocol in ("ttft", "p99"):
        for table in final_tables(study, protocol):
            assert {line[-1] for line in table.lines} == {TIE}, "the averages' intervals overlap as well"
    apart = write_run(tmp_path, {"baseline": 12.0, "jit": 6.5, "hybrid": 6.0}, spread=0.01)
    assert {line[-1] for line in final_tables(apart, "p99")[0].lines} == {"JIT + CUDA graph"}
    write_report(study, tmp_path)
    assert f">{TIE}<" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_a_single_sample_beats_nobody(tmp_path: Path) -> None:
    found = run(tmp_path, fast_and_slow(), ttft_iterations=1)
    assert row_of(found, case="jit", protocol="ttft", metric="ttft_ms", prompt_tokens=10)["n"] == 1
    table = (tmp_path / "final_ttft_table.md").read_text(encoding="utf-8")
    assert f"| {TIE} |" in table and "**JIT" not in table.split("\n\n")[1]


def test_peers_have_tables_of_their_own(tmp_path: Path) -> None:
    launcher = fast_and_slow()
    launcher.cases |= {"hf-compile": FakeCase(8.0), "vllm": FakeCase(4.0)}
    run(tmp_path, launcher, cases=("baseline", "hybrid", "hf-compile", "vllm"))
    study = load_study(tmp_path)
    assert peer_columns(study) == ("baseline", "hf-compile", "vllm", "hybrid")
    shown = (tmp_path / "peers_ttft_table.md").read_text(encoding="utf-8")
    assert "| **vLLM (emulated)** |" in shown and "HF compiled" in shown
    assert "vLLM" not in (tmp_path / "final_ttft_table.md").read_text(encoding="utf-8"), "five columns stay five"
    assert (tmp_path / "peer_vllm_p99.csv").exists()


# ------------------------------------------------------------------------------------------------------- whole answers


def test_whole_answers_have_rows(tmp_path: Path) -> None:
    found = run(tmp_path, fast_and_slow(), cases=("hybrid",), p99_iterations=40)
    whole = row_of(found, case="hybrid", protocol="p99", metric="e2e_ms", prompt_tokens=10)
    each = row_of(found, case="hybrid", protocol="p99", metric="tpot_ms", prompt_tokens=10)
    assert whole["n"] == each["n"] == 2 and each["mean"] == pytest.approx(0.5)
    assert whole["mean"] == pytest.approx(5.0 + 63 * 0.5)
    gap = row_of(found, case="hybrid", protocol="p99", metric="itl_ms", prompt_tokens=10)
    assert each["ceiling_ms"] == gap["ceiling_ms"]
    first = row_of(found, case="hybrid", protocol="p99", metric="ttft_ms", prompt_tokens=10)
    assert whole["ceiling_ms"] == pytest.approx(first["ceiling_ms"] + 63 * gap["ceiling_ms"])
    head = (tmp_path / "case4_jit_cuda_p99.csv").read_text(encoding="utf-8-sig").splitlines()[0].split(",")
    assert tuple(head) == COLUMNS and {"p95", "p999_ci_high", "energy_j_per_token", "host_memory_gib"} <= {*head}


# ------------------------------------------------------------------------------------------------------------ restarts


def test_restarts_are_pooled_and_their_spread_is_told(tmp_path: Path) -> None:
    launcher = fast_and_slow()
    launcher.again["hybrid"] = FakeCase(8.0)
    found = run(tmp_path, launcher, cases=("hybrid",), restarts=3)
    assert launcher.kinds == ["prepare", "gate", "ceiling", "hybrid", "hybrid", "hybrid"]
    lines = [json.loads(line) for line in raw_path(tmp_path, "hybrid.jsonl").read_text().splitlines()]
    assert {line["restart"] for line in lines} == {0, 1, 2}, "raw samples keep their process's number"
    row = row_of(found, case="hybrid", protocol="ttft", metric="ttft_ms", prompt_tokens=10)
    assert row["n"] == 9 and row["restarts"]["n"] == 3
    means = row["restarts"]["means"]
    assert means[0] == pytest.approx(5.0, abs=0.1) and means[1] == pytest.approx(8.0, abs=0.1)
    [ready] = [one for one in load_study(tmp_path).rows if one.key.metric == "ready_s"]
    assert ready.summary.n == 3
    spread = restart_spread(ready)
    assert spread is not None and spread.std == 0.0
    table = (tmp_path / "restart_table.md").read_text(encoding="utf-8")
    assert "| JIT + CUDA graph (emulated) | ttft | ttft_ms | interactive | 10 | 3 |" in table
    assert "lie apart" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_one_process_has_no_spread(tmp_path: Path) -> None:
    found = run(tmp_path, fast_and_slow(), cases=("hybrid",))
    assert row_of(found, case="hybrid", protocol="ttft", metric="ttft_ms", prompt_tokens=10)["restarts"] == {"n": 1}
    assert not (tmp_path / "restart_table.md").exists()


def test_start_times_are_taken_cold_and_warm(tmp_path: Path) -> None:
    launcher = fast_and_slow()
    found = run(tmp_path, launcher, cases=("hybrid",), start_times=True)
    assert launcher.kinds[-3:] == ["hybrid", "hybrid start", "hybrid start"]
    values = {name: row_of(found, case="hybrid", metric=name)["mean"] for name in ("ready_cold_s", "ready_warm_s")}
    assert values == {"ready_cold_s": 9.0, "ready_warm_s": 1.0}
    assert row_of(found, case="hybrid", metric="first_token_cold_s")["mean"] == 10.0
    assert "as that left it (warm)" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_starts_are_timed_after_turns_as_well(tmp_path: Path) -> None:
    launcher = fast_and_slow()

    def together(tasks: Any, on_progress: Any) -> dict[str, Any]:
        return {task.job.case: launcher(task.job, None, task.log, lambda done, total: None) for task in tasks}

    settings = {"prompt_lengths": (10,), "ttft_iterations": 2, "p99_iterations": 0, "interleave": "request"}
    options = Options(output=str(tmp_path), cases=("jit", "hybrid"), start_times=True, **settings)  # type: ignore[arg-type]
    assert run_benchmark(options, Console(file=io.StringIO()), launcher, together) == 0
    assert launcher.kinds[3:] == ["jit", "hybrid", "jit start", "jit start", "hybrid start", "hybrid start"]
    found = json.loads((tmp_path / "summary.json").read_text())
    assert row_of(found, case="jit", metric="ready_warm_s")["mean"] == 1.0


def test_what_was_watched_alone_is_no_study(tmp_path: Path) -> None:
    """A run that measured nothing is not put aside for the readings of its GPU."""
    prepare_folder(tmp_path)
    raw_path(tmp_path, WATCH).write_text("{}\n")
    put_aside(tmp_path, lambda note: None)
    assert not list(tmp_path.glob("earlier-*")) and not raw_path(tmp_path, WATCH).exists()


def test_a_cold_start_has_caches_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JITGRAPH_CACHE", "/somewhere")
    monkeypatch.setenv("SOMETHING", "kept")
    found = empty_cache_environment("/empty")
    assert found["SOMETHING"] == "kept"
    assert all(found[name].startswith("/empty/") for name in ("JITGRAPH_CACHE", "TRITON_CACHE_DIR"))


# -------------------------------------------------------------------------------------------------------------- events


class Eventful(FakeCase):
    """Captures a graph in its 12th request for a first token, and evicts two in its 14th."""

    def first_token(self, token_ids: list[int]) -> FirstToken:
        return super().first_token(token_ids)

    def counters(self) -> dict[str, int]:
        return {"capture": int(self.requests >= 12), "eviction": 2 * int(self.requests >= 14)}


@pytest.mark.parametrize("pacing", ["interactive", "sustained"])
def test_events_stand_beside_the_sample_they_fell_into(tmp_path: Path, pacing: str) -> None:
    prepare_folder(tmp_path)
    settings = {"prompt_lengths": (10, 100), "ttft_iterations": 5, "p99_iterations": 0, "pacing": pacing}
    plan = Options(**settings).plan("cpu")  # type: ignore[arg-type]
    writer = RawWriter(tmp_path, "hybrid")
    meter = Meter("hybrid", Eventful(5.0), plan, {10: [1], 100: [2]}, writer, lambda done: None)
    meter.sleep = lambda seconds: None
    meter.cold(1.0, None)
    meter.timed()
    writer.close()
    blocks = {key.prompt_tokens: block for key, block in read_blocks(raw_path(tmp_path, "hybrid.jsonl")).items()
              if key.protocol == "ttft" and key.metric == "ttft_ms"}  # fmt: skip
    assert blocks[10].events == []  # requests 5 to 9, after four of warm-up
    found = [(event.name, event.iteration) for event in blocks[100].events]
    at = (2, 4) if pacing == "interactive" else (4, 4)
    assert found == [("capture", at[0]), ("eviction", at[1]), ("eviction", at[1])]
    assert all(isinstance(event, Event) and event.time_s > 0 for event in blocks[100].events)


def test_collections_of_this_process_are_counted() -> None:
    import gc

    instruments = Instruments(dict)
    before = instruments.counts()["collection"]
    instruments.watch()
    instruments.watch()
    gc.collect()
    assert instruments.counts()["collection"] == before + 1, "watched once"
    gc.callbacks.remove(instruments._collected)


# -------------------------------------------------------------------------------------------------- energy, memory, GPU


def test_energy_is_told_by_token(tmp_path: Path) -> None:
    prepare_folder(tmp_path)
    settings = {"prompt_lengths": (10,), "ttft_iterations": 5, "p99_iterations": 0, "pacing": "sustained"}
    plan = Options(**settings).plan("cpu")  # type: ignore[arg-type]
    writer, case = RawWriter(tmp_path, "hybrid"), FakeCase(5.0)
    meter = Meter("hybrid", case, plan, {10: [1]}, writer, lambda done: None, energy_j=lambda: 30.0 * case.requests)
    meter.cold(1.0, None)
    meter.timed()
    writer.close()
    blocks = {(key.protocol, key.metric): b for key, b in read_blocks(raw_path(tmp_path, "hybrid.jsonl")).items()}
    ttft = blocks["ttft", "ttft_ms"]
    assert (ttft.energy_j, ttft.tokens) == (150.0, 5)
    assert blocks["ttft", "itl_ms"].tokens == 64 and blocks["warmup", "ttft_ms"].energy_j is None
    assert ttft.host_memory_gib is not None and 0.01 < ttft.host_memory_gib < 64


class FakeGpu:
    """A driver's library with one card whose counters move."""

    def __init__(self, processes: int = 0, used_gib: float = 0.5, refused: tuple[str, ...] = ()) -> None:
        self.processes, self.used_gib, self.refused, self.looks = processes, used_gib, refused, 0

    def __getattr__(self, name: str) -> Any:
        def call(*args: Any) -> int:
            return 3 if name in self.refused else self.answer(name, args)

        return call

    def answer(self, name: str, args: tuple[Any, ...]) -> int:
        numbers = {
            "nvmlDeviceGetClockInfo": 1335,
            "nvmlDeviceGetPowerUsage": 650_000 + 1000 * self.looks,
            "nvmlDeviceGetTemperature": 60 + self.looks,
            "nvmlDeviceGetCurrentClocksThrottleReasons": 0x4,
            "nvmlDeviceGetTotalEnergyConsumption": 5_000 * self.looks,
        }
        if name in numbers:
            self.looks += name == "nvmlDeviceGetCurrentClocksThrottleReasons"
            args[-1]._obj.value = numbers[name]
        elif name == "nvmlDeviceGetHandleByUUID":
            if args[0].value != UUID.encode():
                return 6
            assert isinstance(args[1]._obj, ctypes.c_void_p)
        elif name == "nvmlDeviceGetMemoryInfo":
            args[1]._obj.total, args[1]._obj.used = 141 * 2**30, int(self.used_gib * 2**30)
        elif name == "nvmlDeviceGetComputeRunningProcesses_v3":
            args[1]._obj.value = self.processes
            return 7 if self.processes else 0
        else:
            assert name in ("nvmlInit_v2", "nvmlShutdown"), name
        return 0


def test_the_gpu_is_watched_and_joined_by_the_clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jitgraph.bench.watch.INTERVAL_S", 0.02)
    run(tmp_path, fast_and_slow(), cases=("hybrid",))
    before = load_study(tmp_path)
    assert all(row.machine.power_w is None for row in before.rows), "nobody looked"
    with watching(raw_path(tmp_path, WATCH), UUID, FakeGpu):
        time.sleep(0.3)
    looks = read_watch(raw_path(tmp_path, WATCH))
    assert len(looks) > 3 and looks[0].reading.held_by == "software power cap"
    samples = raw_path(tmp_path, "hybrid.jsonl")
    lines = [json.loads(line) for line in samples.read_text().splitlines()]
    for line in lines:
        if line.get("protocol") == "p99" and "timestamp" in line:
            line["timestamp"] = looks[0].time_s + 0.1
        elif "timestamp" in line:
            line["timestamp"] = 1.0
    samples.write_text("".join(json.dumps(line) + "\n" for line in lines))
    study = load_study(tmp_path)
    [row] = [
        r for r in study.rows if r.key.protocol == "p99" and r.key.metric == "ttft_ms" and r.key.prompt_tokens == 10
    ]
    assert row.machine.sm_clock_mhz == 1335 and row.machine.held_by == "software power cap"
    assert 650 <= (row.machine.power_w or 0) < 700 and (row.machine.temperature_c or 0) >= 60
    assert row.machine.memory_used_gib == 0.5
    others = [r.machine for r in study.rows if r.key.case == "hybrid" and r.key.protocol == "ttft"]
    assert all(machine.power_w is None for machine in others)
    write_report(study, tmp_path)
    assert "The GPU beside the samples" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_without_a_gpu_nothing_is_watched(tmp_path: Path) -> None:
    def no_driver() -> Any:
        raise NvmlError("no NVIDIA driver here")

    for uuid, load in ((None, FakeGpu), (UUID, no_driver), ("GPU-other", FakeGpu)):
        with watching(tmp_path / WATCH, uuid, load):
            pass
        assert others_on(uuid, load) == "" and energy_meter(uuid, load)() is None
    assert not (tmp_path / WATCH).exists()


def test_energy_and_others_as_the_driver_tells_them() -> None:
    gpu = FakeGpu()
    meter = energy_meter(UUID, lambda: gpu)
    assert meter() == 0.0
    gpu.looks = 3
    assert meter() == 15.0
    assert energy_meter(UUID, lambda: FakeGpu(refused=("nvmlDeviceGetTotalEnergyConsumption",)))() is None
    assert others_on(UUID, FakeGpu) == ""
    busy = others_on(UUID, lambda: FakeGpu(processes=2, used_gib=30.5), patience_s=0.0)
    assert busy == "2 other processes, 30.5 GiB in use"
    hidden = others_on(UUID, lambda: FakeGpu(used_gib=30.5), patience_s=0.0)
    assert hidden == "something else, 30.5 GiB in use", "processes of other containers may be hidden"
    silent = Gpu(UUID, lambda: FakeGpu(refused=("nvmlDeviceGetComputeRunningProcesses_v3",)))
    assert silent.processes() is None


# --------------------------------------------------------------------------------------------------------------- cores


def test_cores_from_words() -> None:
    assert parse_cpus("2-4,8") == (2, 3, 4, 8) and parse_cpus(None) == ()
    for text in ("", "a", "3-", "4-2"):
        with pytest.raises(ConfigError, match="--pin-cpu wants cores"):
            parse_cpus(text)


def test_a_case_is_held_to_its_cores(tmp_path: Path) -> None:
    """The server looks at the worker while that waits for an answer."""
    from jitgraph.bench.instruments import _children

    seen: list[set[int]] = []

    def answer(fields: dict[str, Any]) -> tuple[int, Any]:
        seen.append(os.sched_getaffinity(max(_children(os.getpid()))))
        ids = range(7, 7 + fields["max_tokens"])
        return 200, [*(piece("a", [one]) for one in ids), usage(len(fields["prompt"]), len(ids)), b"[DONE]"]

    core = max(os.sched_getaffinity(0))
    settings = {"prompt_lengths": (3,), "ttft_iterations": 1, "p99_iterations": 0, "pinned_cpus": (core,)}
    plan = Options(**settings).plan("cpu")  # type: ignore[arg-type]
    prepare_folder(tmp_path)
    with completions_server(answer) as (url, _):
        job = Job("case", str(tmp_path), plan, "openai", {3: [1, 2, 3]}, url=url)
        outcome = run_process(job, None, tmp_path / "log", lambda done, total: None)
    assert outcome.status == jobs.COMPLETE, outcome.reason
    assert seen and all(cores == {core} for cores in seen)
    assert outcome.facts["plan"]["pinned_cpus"] == [core]
    nowhere = Job("case", str(tmp_path), replace(plan, pinned_cpus=(1023,)), "openai", {3: [1]}, url="http://x")
    refused = run_process(nowhere, None, tmp_path / "log", lambda done, total: None)
    assert refused.status == jobs.FAILED and "--pin-cpu names no core that this process may use" in refused.reason
