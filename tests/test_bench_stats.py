"""The benchmark's statistics, floors, plan and command-line parsing."""

from __future__ import annotations

import json
import math
import statistics

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jitgraph.bench.floors import Floors, ceilings
from jitgraph.bench.gate import Reference, mismatches, references_from_json, references_to_json
from jitgraph.bench.plan import (
    ABLATION,
    ABLATION_COLUMNS,
    ALL_CASES,
    CASES,
    PEER_COLUMNS,
    Options,
    Plan,
)
from jitgraph.bench.plan_words import parse_cases, parse_lengths, parse_pythons
from jitgraph.bench.prompts import digests, make_prompts
from jitgraph.bench.stats import summarise
from jitgraph.errors import ConfigError

samples = st.lists(st.floats(0.001, 1e4), min_size=1, max_size=40)


@given(samples)
def test_summary_agrees_with_the_standard_library(values: list[float]) -> None:
    summary = summarise(values)
    assert summary.n == len(values)
    assert summary.mean == pytest.approx(statistics.fmean(values))
    assert summary.std == pytest.approx(statistics.stdev(values) if len(values) > 1 else 0.0, abs=1e-6)
    assert (summary.min, summary.max) == (min(values), max(values))
    assert summary.p50 == pytest.approx(statistics.median(values))
    ends = summary.p99_ci
    assert summary.min <= ends[0] <= ends[1] <= summary.max


def test_percentiles_of_known_values() -> None:
    summary = summarise([float(value) for value in range(1, 101)])
    assert (summary.p50, summary.p90) == (50.5, pytest.approx(90.1))
    assert summary.p99 == pytest.approx(99.01)


def test_bootstrap_interval_is_reproducible_and_covers_the_truth() -> None:
    rng = np.random.default_rng(1)
    truth, covered = -math.log(0.01), 0
    for _ in range(100):
        values = list(rng.exponential(size=400))
        low, high = summarise(values).p99_ci
        assert (low, high) == summarise(values).p99_ci
        covered += low <= truth <= high
    assert covered >= 80, "a 95 % interval of a P99 from 400 samples covers it clearly more often than not"


def test_floors_follow_their_formula() -> None:
    floors = Floors(
        weight_bytes=13_214_000_000, kv_bytes_per_token=524_288, flops_per_token=13_000_000_000, flops_once=0
    )
    assert floors.prompt_ms(10, 4.61, 790) == pytest.approx(2.866, abs=0.001)
    assert floors.prompt_ms(500, 4.61, 790) == pytest.approx(500 * 13e9 / 790e12 * 1e3)
    assert floors.decode_ms(1000, 4.61) == pytest.approx((13.214e9 + 0.524288e9) / 4.61e9)


def test_ceilings_are_the_best_that_anything_reached() -> None:
    """The products of the model count as kernels; a rested device can do what a hot one does, not the other way
    round."""
    floors = Floors(weight_bytes=10_000_000_000, kv_bytes_per_token=1, flops_per_token=10_000_000_000, flops_once=0)

    def rates(read: float, gemm: float) -> dict[str, float]:
        return {"read_tb_s": read, "copy_tb_s": 3.0, "gemm_tflops": gemm}

    measured = {"by_pacing": {"interactive": rates(4.2, 600), "sustained": rates(4.5, 650)}}
    found = ceilings(measured, floors, {}, "NVIDIA H200")
    assert found["by_pacing"]["interactive"] == rates(4.5, 650) and found["by_pacing"]["sustained"] == rates(4.5, 650)
    assert found["read_tb_s"] == 4.5 and found["flags"] == []
    # 500 tokens in 6.25 ms are 800 TFLOP/s; one token in 2 ms reads 5 TB/s
    linears = {("interactive", 500): 6.25, ("interactive", 1): 4.0, ("sustained", 1): 2.0}
    found = ceilings(measured, floors, linears, "NVIDIA H200")["by_pacing"]
    assert found["interactive"] == pytest.approx(rates(5.0, 800)) and found["sustained"] == pytest.approx(
        rates(5.0, 650)
    )
    assert ceilings({}, floors, linears, "NVIDIA H200") == {}


def test_an_implausible_read_rate_is_flagged_on_an_h200_alone() -> None:
    floors = Floors(weight_bytes=1, kv_bytes_per_token=1, flops_per_token=1, flops_once=0)

    def flags(device: str, *reads: float) -> list[str]:
        pacings = ("sustained", "interactive")[: len(reads)]
        rates = {p: {"read_tb_s": r, "copy_tb_s": r, "gemm_tflops": 700.0} for p, r in zip(pacings, reads, strict=True)}
        return list(ceilings({"by_pacing": rates}, floors, {}, device)["flags"])

    assert flags("NVIDIA H200", 4.6, 4.1) == [] and flags("NVIDIA A100", 1.5) == []
    (flag,) = flags("NVIDIA H200", 4.1, 4.6)
    assert "4.10 TB/s (sustained)" in flag and "no run of record" in flag


def test_gate_compares_only_where_the_reference_is_certain() -> None:
    references = {10: Reference(5, 1.0, 0.1), 50: Reference(5, 0.05, 0.1)}
    assert mismatches(references, {10: 5, 50: 6}) == ([], ["10"])
    wrong, _ = mismatches(references, {10: 6, 50: 5})
    assert len(wrong) == 1 and "at 10 tokens the first token is 6, the reference's 5" in wrong[0]
    assert references_from_json(json.loads(json.dumps(references_to_json(references)))) == references


def test_defaults_follow_the_device() -> None:
    gpu, cpu = Options().plan("cuda:0"), Options().plan("cpu")
    assert (gpu.model, gpu.weights, gpu.dtype, gpu.p99_iterations) == ("llama-2-7b", "random", "float16", 100)
    assert gpu.pacings == ("interactive", "sustained") and not gpu.quick
    assert (cpu.model, cpu.weights, cpu.dtype, cpu.p99_iterations) == ("default", "checkpoint", "float32", 20)
    assert cpu.pacings == ("interactive",)
    assert cpu.quick and not Options(quick=False).plan("cpu").quick
    assert Options(model="folder").plan("cpu").weights == "checkpoint"
    assert Options(p99_iterations=7, pacing="both").plan("cpu").p99_iterations == 7


def test_plan_survives_json_and_knows_its_size() -> None:
    plan = Options(prompt_lengths=(10, 500), ttft_iterations=5, p99_iterations=100).plan("cuda:0")
    assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan
    assert plan.requests() == (2 * 2 + 2) + 2 * (2 * 5 + 2 * 1) + 2 * (2 * 100 + 2 * 5)
    assert plan.within(4096).max_model_len == 1024 and plan.within(600).max_model_len == 600
    with pytest.raises(ConfigError, match="take 564 tokens, the model's limit is 512"):
        plan.within(512)


def test_prompts_are_prefixes_with_a_fingerprint() -> None:
    prompts = make_prompts(list(range(100)), (3, 50))
    assert prompts[3] == [0, 1, 2] and prompts[50] == list(range(50))
    other = make_prompts(list(range(1, 101)), (3, 50))
    assert digests(prompts) != digests(other) and set(digests(prompts)) == {"3", "50"}
    with pytest.raises(ConfigError, match="has 100 tokens"):
        make_prompts(list(range(100)), (3, 101))


def test_command_line_words() -> None:
    assert parse_cases([]) == CASES == parse_cases(["all"])
    assert parse_cases(["hybrid", "baseline"]) == ("baseline", "hybrid")
    assert parse_cases(["split", "jit-all"]) == ABLATION
    assert set(parse_cases(["ablation"])) == set(ABLATION_COLUMNS)
    assert set(parse_cases(["peers"])) == set(PEER_COLUMNS)
    assert parse_cases(["all", "ablation", "peers"]) == ALL_CASES
    with pytest.raises(ConfigError, match="unknown case hybird: choose from baseline, cuda-graph"):
        parse_cases(["hybird"])
    assert parse_lengths("100,10, 50") == (10, 50, 100)
    assert parse_pythons(["tensorrt-llm=/x/python"]) == {"tensorrt-llm": "/x/python"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prompt_lengths": ()}, "at least one length"),
        ({"prompt_lengths": (0, 10)}, "from 1 up"),
        ({"ttft_iterations": -1}, "ttft-iterations"),
        ({"ttft_iterations": 0, "p99_iterations": 0}, "nothing to measure"),
        ({"pacing": "fast"}, "pacing must be"),
        ({"weights": "none"}, "weights must be"),
        ({"max_minutes": 0}, "max-minutes"),
        ({"pythons": {"vlm": "python"}}, "unknown case 'vlm'"),
    ],
)
def test_bad_options_say_what_is_wrong(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Options(**settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("text", ["ten", "10;20"])
def test_bad_lengths(text: str) -> None:
    with pytest.raises(ConfigError, match="whole numbers with commas"):
        parse_lengths(text)


def test_bad_python_entry() -> None:
    with pytest.raises(ConfigError, match="wants case=PATH"):
        parse_pythons(["tensorrt-llm"])
