"""What a report is made of: events in the raw record, the numbers behind each plot, estimates, speed-ups, colours."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from bench_report_cases import BASES_MS, PHASES_MS, READY_MS, write_run, write_runtime
from hypothesis import given
from hypothesis import strategies as st

from jitgraph.bench.earlier import put_aside
from jitgraph.bench.plan import ABLATION, ALL_CASES, CASES
from jitgraph.bench.plots_data import (
    REST,
    SHORT,
    UNDIVIDED,
    StartUp,
    common_means_ms,
    folded,
    latency_chart,
    sample_charts,
    start_ups,
)
from jitgraph.bench.plots_draw import CHARACTER_PT, HANDLE_PT, WIDTH_IN, legend_columns
from jitgraph.bench.plots_palette import COLOURS, case_colour, with_variables
from jitgraph.bench.records import BlockFacts, BlockKey, Event, RawWriter, prepare_folder, read_blocks
from jitgraph.bench.report_approaches import JUDGED, approach_lines, no_speedups, speedups, write_approaches
from jitgraph.bench.report_estimates import Estimate, apart
from jitgraph.bench.report_runtime import host_cost, padding_cost
from jitgraph.bench.stats import mean_interval
from jitgraph.bench.study import load_study
from jitgraph.errors import OutputError

# --------------------------------------------------------------------------------------------------------------- record


def test_events_stand_beside_the_samples_of_their_row(tmp_path: Path) -> None:
    prepare_folder(tmp_path)
    writer, key = RawWriter(tmp_path, "hybrid"), BlockKey("hybrid", "p99", "itl_ms", "interactive", 10)
    happened = [Event("capture", 1, 5.0), Event("eviction", 1, 5.5), Event("collection", 2, 6.0)]
    for index, gap in enumerate((4.0, 4.5, 4.2)):
        writer.sample(key, index, gap, 5.0)
    for event in happened:
        writer.event(key, event)
    writer.block(key, BlockFacts({"exact": 3}, 1.0))
    writer.close()
    block = read_blocks(tmp_path / "raw" / "hybrid.jsonl")[key]
    assert block.events == happened and block.values_ms == [4.0, 4.5, 4.2] and block.paths == {"exact": 3}


def test_an_event_of_an_unknown_kind_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "hybrid.jsonl"
    line = vars(BlockKey("hybrid", "p99", "itl_ms", "interactive", 10)) | {"iteration": 0, "timestamp": 0.0}
    path.write_text(json.dumps({"kind": "event", "event": "eclipse", **line}) + "\n\n")
    with pytest.raises(OutputError, match=r"line 1 of .* is no benchmark record"):
        read_blocks(path)


def test_rows_keep_samples_in_order_and_events(tmp_path: Path) -> None:
    event = Event("capture", 7, 1.0)
    study = write_run(tmp_path, events=[event])
    row = study.select("p99", "itl_ms", "interactive")["hybrid", 10]
    assert row.events == (event,) and len(row.values) == row.summary.n == 126
    assert list(row.values) == sorted(row.values), "the fake's samples grow"
    (ready,) = study.select("warmup", "ready_s", "interactive")["hybrid", 0].values
    assert ready == READY_MS / 1e3, "in the metric's unit"


# ---------------------------------------------------------------------------------------------------------------- plots


def test_latency_chart_has_every_case_its_spread_and_the_ceiling(tmp_path: Path) -> None:
    study = write_run(tmp_path)
    chart = latency_chart(study, "ttft", "sustained")
    assert [curve.case for curve in chart.curves] == list(BASES_MS), "what did not run has no curve"
    hybrid = chart.curves[-1]
    rows = [study.select("ttft", "ttft_ms", "sustained")["hybrid", n] for n in (10, 100)]
    assert hybrid.lengths == (10, 100) and hybrid.values == tuple(row.summary.mean for row in rows)
    assert hybrid.high[0] == rows[0].summary.mean + rows[0].summary.std
    assert dict(chart.ceiling) == {row.key.prompt_tokens: row.ceiling_ms for row in rows}
    assert chart.products == ((10, 4.0), (100, 4.0))
    p99 = latency_chart(study, "p99", "interactive").curves[0]
    row = study.select("p99", "ttft_ms", "interactive")["baseline", 10]
    assert (p99.values[0], p99.low[0], p99.high[0]) == (row.summary.p99, *row.summary.p99_ci)


def test_sample_charts_are_of_the_shortest_and_the_longest_prompt(tmp_path: Path) -> None:
    study = write_run(tmp_path, lengths=(10, 50, 100), events=[Event("capture", 3, 0.0), Event("capture", 4, 0.0)])
    charts = sample_charts(study, "itl_ms", "interactive")
    assert [chart.prompt_tokens for chart in charts] == [10, 100]
    assert charts[0].counts() == {"capture": 2} and charts[1].counts() == {}
    (ttft, _) = sample_charts(study, "ttft_ms", "interactive")
    assert {len(trace.values) for trace in ttft.traces} == {100}, "of the protocol with more samples"


def test_phases_add_up_to_the_ready_time(tmp_path: Path) -> None:
    starts = {start.case: start for start in start_ups(write_run(tmp_path))}
    rest = (READY_MS - sum(PHASES_MS.values())) / 1e3
    assert starts["hybrid"].phases == ((REST, rest), ("load", 0.5), ("capture", 0.25))
    assert starts["baseline"].phases == ((UNDIVIDED, READY_MS / 1e3),)
    assert "tensorrt-llm" not in starts


SECONDS = st.floats(0.0, 10.0, allow_nan=False)


@given(st.lists(st.lists(st.tuples(st.sampled_from("abcdef"), SECONDS), unique_by=lambda p: p[0]), max_size=4))
def test_folding_keeps_the_length_of_every_bar(cases: list[list[tuple[str, float]]]) -> None:
    starts = [StartUp("hybrid", "x", sum(s for _, s in phases), tuple(phases)) for phases in cases]
    for start, bar in zip(starts, folded(starts), strict=True):
        assert sum(seconds for _, seconds in bar) == pytest.approx(start.ready_s)
        assert [name for name, _ in bar].count(SHORT) <= 1


def test_means_are_over_lengths_that_all_have(tmp_path: Path) -> None:
    write_run(tmp_path, lengths=(10, 100))
    samples = tmp_path / "raw" / "jit.jsonl"
    lines = [line for line in samples.read_text().splitlines() if '"prompt_tokens": 100' not in line]
    samples.write_text("\n".join(lines) + "\n")
    study = load_study(tmp_path)
    means = common_means_ms(study, "ttft_ms", "interactive", CASES)
    row = study.select("p99", "ttft_ms", "interactive")["hybrid", 10]
    assert means["hybrid"] == row.summary.mean and list(means) == list(BASES_MS)


# -------------------------------------------------------------------------------------------------------------- colours


def luminance(colour: str) -> float:
    """Relative luminance by WCAG 2."""
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", [0, 1])
def test_contrast_suffices_in_both_schemes(scheme: int) -> None:
    grounds = [COLOURS[name][scheme] for name in ("back", "card", "own")]
    for name in ("text", "soft", "accent"):
        assert min(contrast(COLOURS[name][scheme], ground) for ground in grounds) >= 4.5, name
    for case in ALL_CASES:
        assert contrast(COLOURS[case_colour(case)][scheme], COLOURS["card"][scheme]) >= 3, case


def test_a_colour_of_a_drawing_is_one_variable() -> None:
    lights = [light for light, _ in COLOURS.values()]
    assert len(set(lights)) == len(lights), "else a drawing could not be recoloured"
    assert len({case_colour(case) for case in ALL_CASES}) == len(ALL_CASES)
    assert with_variables(f"stroke: {COLOURS['jit'][0]}; fill: {COLOURS['card'][0]}") == (
        "stroke: var(--jit); fill: var(--card)"
    )


# ------------------------------------------------------------------------------------------------- estimates, speed-ups

INTERVAL = st.tuples(SECONDS, SECONDS).map(sorted).map(tuple)


@given(INTERVAL, INTERVAL)
def test_apart_is_symmetric_and_means_no_common_point(one: tuple[float, float], other: tuple[float, float]) -> None:
    a, b = Estimate(one[0], one, False), Estimate(other[0], other, False)
    assert apart(a, b) == apart(b, a) == (max(one[0], other[0]) > min(one[1], other[1]))
    assert not apart(a, Estimate(100.0, None, False)), "one sample proves nothing"


def test_interval_of_a_mean() -> None:
    values = [float(i % 7) for i in range(200)]
    found = mean_interval(values)
    assert found is not None and found[0] < sum(values) / 200 < found[1]
    assert found == mean_interval(values), "the same samples give the same interval"
    deviation = (sum((v - sum(values) / 200) ** 2 for v in values) / 199) ** 0.5 / 200**0.5
    assert found[1] - found[0] == pytest.approx(2 * 1.96 * deviation, rel=0.1), "as the normal approximation says"
    assert mean_interval([5.0]) is None


def test_speedups_count_faster_slower_and_undecided(tmp_path: Path) -> None:
    study = write_run(tmp_path, {"baseline": 12.0, "jit": 5.0, "hybrid": 6.0, "split": 6.0}, spread=0.05)
    found = {(one.case, one.metric): one for one in speedups(study) if one.pacing == "interactive"}
    assert {case for case, _ in found} == {"baseline", "jit", "split"}
    for metric in ("TTFT", "P99 of TTFT", "time between tokens"):
        twice, slower, same = (found[case, metric] for case in ("baseline", "jit", "split"))
        assert twice.ratio == pytest.approx(2.0) and (twice.faster, twice.slower, twice.undecided) == (2, 0, 0)
        assert slower.ratio == pytest.approx(5 / 6) and (slower.faster, slower.slower) == (0, 2)
        assert same.ratio == pytest.approx(1.0) and same.undecided == same.lengths == 2


def test_without_the_hybrid_nothing_is_compared(tmp_path: Path) -> None:
    study = write_run(tmp_path, {"baseline": 12.0, "jit": 5.0})
    assert speedups(study) == [] and no_speedups(study) == "JIT + CUDA graph has no figures: not run."
    assert [file.name for file in write_approaches(study, tmp_path)] == ["approach_summary.csv", "approach_summary.md"]


def test_summary_by_approach(tmp_path: Path) -> None:
    study = write_run(tmp_path)
    lines = dict(zip(CASES, approach_lines(study), strict=True))
    ttft = study.select("ttft", "ttft_ms", "interactive")
    average = (ttft["hybrid", 10].summary.mean + ttft["hybrid", 100].summary.mean) / 2
    assert lines["hybrid"][:2] == ("JIT + CUDA graph", f"{average:.2f}") and lines["hybrid"][4:6] == ("3.00", "1.5")
    assert lines["tensorrt-llm"][1:6] == ("",) * 5 and lines["tensorrt-llm"][-1] == "not installed: run the script"
    write_approaches(study, tmp_path)
    with (tmp_path / "approach_summary.csv").open(encoding="utf-8-sig", newline="") as file:
        written = list(csv.DictReader(file))
    assert [tuple(line.values())[:-1] for line in written] == approach_lines(study)
    assert set(JUDGED) == set(ALL_CASES), "each case has words of its own"


# ----------------------------------------------------------------------------------------------------- cost to the host


def test_host_cost_is_the_cases_own_else_the_runtimes(tmp_path: Path) -> None:
    own = {"attribution": {"host_us_per_step": 20.0, "launches_per_step": 1.0}}
    broken = {"attribution": {}, "attribution_error": "RuntimeError: no profiler"}
    study = write_run(tmp_path, facts={"hybrid": own, "jit": broken})
    alone = host_cost(study, tmp_path)
    assert alone.host_us == {"hybrid": 20.0} and alone.launches == {"hybrid": 1.0}
    assert "jit: RuntimeError: no profiler." in alone.sources
    figures = {"host_us_per_step": 900.0, "launches_per_step": 45.0}
    write_runtime(tmp_path, "host", {"cases": {"cuda-graph": figures, "hybrid": figures, "hybrid-steps": figures}})
    both = host_cost(study, tmp_path)
    assert both.host_us == {"cuda-graph": 900.0, "hybrid": 20.0}, "the run's own figure stands"
    assert both.sources[0].startswith("cuda-graph: from the runtime's own benchmark (raw/runtime-host.json)")


def test_padding_cost(tmp_path: Path) -> None:
    study = write_run(tmp_path)
    assert padding_cost(study, tmp_path) is None
    samples = {"first": {"14": 4.4, "335": 9.0}, "exact": {"14": [4.0, 4.1, 3.9], "335": [10.0, 10.0, 99.0]}}
    write_runtime(tmp_path, "unseen", samples, emulated=True)
    padding = padding_cost(study, tmp_path)
    assert padding is not None and padding.ratios == {14: pytest.approx(1.1), 335: pytest.approx(0.9)}
    assert padding.mean_ratio == pytest.approx(1.0) and padding.emulated and "emulated" in padding.source
    elsewhere = tmp_path / "raw" / "runtime-unseen.json"
    record = json.loads(elsewhere.read_text())
    elsewhere.write_text(json.dumps(record | {"environment": {"device_name": "Other GPU", "torch": "2.13"}}))
    other = padding_cost(study, tmp_path)
    assert other is not None and "differing from this run in device_name: Fake GPU and Other GPU" in other.source
    elsewhere.write_text(json.dumps({"samples": samples}))
    with pytest.raises(OutputError, match=r"runtime-unseen\.json is no record"):
        padding_cost(study, tmp_path)


def test_a_report_is_put_aside_with_its_run(tmp_path: Path) -> None:
    study = write_run(tmp_path)
    (tmp_path / "plots").mkdir()
    (tmp_path / "report.html").touch()
    write_approaches(study, tmp_path)
    put_aside(tmp_path, lambda note: None)
    assert {path.name for path in tmp_path.iterdir()} == {"raw", "earlier-1"}
    moved = {path.name for path in (tmp_path / "earlier-1").iterdir()}
    assert moved >= {"plots", "report.html", "approach_summary.csv", "speedup_table.md"}


@given(st.lists(st.integers(1, 60), min_size=1, max_size=8))
def test_a_legend_is_as_wide_as_its_figure_at_most(lengths: list[int]) -> None:
    labels = ["x" * length for length in lengths]
    columns = legend_columns(labels)
    down = -(-len(labels) // columns)
    widths = [CHARACTER_PT * max(lengths[i : i + down]) + HANDLE_PT for i in range(0, len(labels), down)]
    assert columns == 1 or sum(widths) <= 72 * WIDTH_IN
    assert legend_columns(["JIT", "ceiling", "HF baseline"]) == 3


def test_ablation_cases_have_charts_of_their_own(tmp_path: Path) -> None:
    study = write_run(tmp_path, {**BASES_MS, "jit-all": 15.0, "split": 9.0})
    charted = {curve.case for curve in latency_chart(study, "ttft", "interactive").curves}
    assert charted == set(BASES_MS) and not charted & set(ABLATION)
