"""Worker processes for real: the jobs, the pipe, stopping one, and the whole benchmark on the tiny model."""

from __future__ import annotations

import csv
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from jitgraph.bench import jobs
from jitgraph.bench.cases.tensorrt_llm import HOW_TO_INSTALL
from jitgraph.bench.floors import Floors
from jitgraph.bench.hf_model import load_hf_model
from jitgraph.bench.jobs import Job
from jitgraph.bench.model_facts import model_facts
from jitgraph.bench.plan import Options, Plan
from jitgraph.bench.process import run_process
from jitgraph.bench.protocol import still_collector
from jitgraph.model.loader import find_model
from jitgraph.model.random_weights import random_state_dict

ROOT = Path(__file__).resolve().parents[1]


def tiny_plan() -> Plan:
    settings = {"model": "tiny", "weights": "random", "prompt_lengths": (3, 8), "p99_iterations": 2}
    return Options(**settings).plan("cpu")  # type: ignore[arg-type]


def test_missing_tensorrt_llm_is_said_with_the_remedy(tmp_path: Path) -> None:
    (tmp_path / "raw").mkdir()
    job = Job("case", str(tmp_path), tiny_plan(), case="tensorrt-llm", prompts={3: [1, 2, 3]})
    outcome = run_process(job, None, tmp_path / "log", lambda done, total: None)
    assert (outcome.status, outcome.reason) == ("not installed", HOW_TO_INSTALL)
    assert (ROOT / "scripts" / "make_venv_tensorrt_llm.sh").exists()


def test_a_mistake_of_the_user_comes_back_as_its_sentence(tmp_path: Path) -> None:
    job = Job("prepare", str(tmp_path), options={"model": "no-such-model", "prompt_lengths": [10]})
    outcome = run_process(job, None, tmp_path / "log", lambda done, total: None)
    assert outcome.status == jobs.FAILED and "'no-such-model' is no existing folder" in outcome.reason


def test_a_process_that_dies_is_reported_with_its_last_words(tmp_path: Path) -> None:
    program = tmp_path / "python"
    program.write_text("#!/bin/sh\necho out of memory\nexit 9\n")
    program.chmod(0o755)
    outcome = run_process(Job("gate", str(tmp_path)), str(program), tmp_path / "log", lambda done, total: None)
    assert outcome.status == jobs.FAILED
    assert "ended with code 9 (out of memory" in outcome.reason


def test_a_child_that_holds_the_pipe_neither_hangs_the_run_nor_survives_it(tmp_path: Path) -> None:
    program, marker = tmp_path / "python", tmp_path / "child.pid"
    program.write_text(f"#!/bin/sh\nsleep 120 &\necho $! > {marker}\nexit 3\n")
    program.chmod(0o755)
    started = time.monotonic()
    outcome = run_process(Job("gate", str(tmp_path)), str(program), tmp_path / "log", lambda done, total: None)
    assert outcome.status == jobs.FAILED and "ended with code 3" in outcome.reason
    assert time.monotonic() - started < 60
    child = Path(f"/proc/{marker.read_text().strip()}/stat")
    for _ in range(100):
        if not child.exists() or child.read_text().split()[2] == "Z":
            return
        time.sleep(0.05)
    raise AssertionError("the child of a dead worker lives on")


def test_a_program_that_cannot_be_started_is_one_sentence(tmp_path: Path) -> None:
    program = tmp_path / "python"
    program.write_text("no program at all")
    program.chmod(0o755)
    outcome = run_process(Job("gate", str(tmp_path)), str(program), tmp_path / "log", lambda done, total: None)
    assert outcome.status == jobs.FAILED and "cannot be started" in outcome.reason


def test_interrupting_the_command_stops_its_worker(tmp_path: Path) -> None:
    marker = tmp_path / "worker.pid"
    program = tmp_path / "python"
    program.write_text(f"#!/bin/sh\necho $$ > {marker}\nexec sleep 60\n")
    program.chmod(0o755)

    def interrupt() -> None:
        while not marker.exists() or not marker.read_text().strip():
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt).start()
    outcome = run_process(Job("gate", str(tmp_path)), str(program), tmp_path / "log", lambda done, total: None)
    assert outcome.status == jobs.INTERRUPTED
    with pytest.raises(ProcessLookupError):
        os.kill(int(marker.read_text()), 0)


def test_collection_is_held_still_and_comes_back() -> None:
    import gc

    with still_collector():
        assert not gc.isenabled() and gc.get_freeze_count() > 0
    assert gc.isenabled() and gc.get_freeze_count() == 0


def test_the_baseline_has_the_weights_of_the_engine() -> None:
    plan = tiny_plan()
    model = load_hf_model(plan)
    spec = find_model("tiny", weights="random").spec
    expected = random_state_dict(spec, 0, torch.device("cpu"), torch.float32)
    state = model.state_dict()
    assert set(state) == set(expected) and all(torch.equal(state[name], expected[name]) for name in state)
    rope = model.model.rotary_emb.inv_freq
    assert rope == pytest.approx(torch.tensor([10000 ** (-2 * i / spec.head_dim) for i in range(spec.head_dim // 2)]))


def test_model_facts_give_the_floors() -> None:
    plan, spec = tiny_plan(), find_model("tiny", weights="random").spec
    floors = Floors.from_model(model_facts(plan, spec))
    assert floors.weight_bytes == 4 * spec.linear_parameters()
    for tokens in (1, 7, 500):
        assert tokens * floors.flops_per_token + floors.flops_once == spec.prefill_flops(tokens)


@pytest.mark.timeout(600)
def test_the_whole_benchmark_on_the_tiny_model(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "jitgraph", "bench", "all", "--model", "tiny", "--weights", "random"]
    counts = ["--prompt-lengths", "5,16", "--ttft-iterations", "2", "--p99-iterations", "3", "--dtype", "float32"]
    where = ["--output", str(tmp_path), "--device", "cpu"]
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}  # the tests may share the cores with others
    done = subprocess.run(
        [*command, *counts, *where], cwd=ROOT, env=one_thread, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "summary.json").read_text())
    status = {name: facts["status"] for name, facts in found["cases"].items()}
    assert status.pop("tensorrt-llm") in ("not installed", "no CUDA device")
    assert set(status.values()) == {jobs.COMPLETE} and set(status) == {
        "baseline",
        "cuda-graph",
        "jit",
        "hybrid",
        "linears",
    }
    rows = [row for row in found["rows"] if row["metric"] == "ttft_ms" and row["protocol"] == "p99"]
    assert len(rows) == 4 * 2 and all(row["n"] == 3 and row["mean"] > 0 and row["ratio"] > 0 for row in rows)
    assert all(math.isfinite(row["peak_memory_gib"]) for row in rows)
    paths = {row["case"]: row["paths"] for row in rows if row["prompt_tokens"] == 5}
    assert paths["hybrid"] == paths["cuda-graph"] == {"exact": 3, "padded": 0, "eager": 0}
    assert paths["jit"] == {"exact": 0, "padded": 0, "eager": 3} and not any(paths["baseline"].values())
    emulated = {row["case"] for row in found["rows"] if row["emulated"]}
    assert emulated >= {"cuda-graph", "hybrid", "linears"} and "baseline" not in emulated
    with (tmp_path / "final_ttft_table.csv").open(encoding="utf-8-sig", newline="") as file:
        assert [line["Prompt tokens"] for line in csv.DictReader(file)] == ["5", "16", "AVERAGE"]
    again = subprocess.run(
        [sys.executable, "-m", "jitgraph", "report", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert again.returncode == 0 and "AVERAGE" in again.stdout
