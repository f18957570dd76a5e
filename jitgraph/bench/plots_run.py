"""The plots of one run: which there are, and what each shows in words. Pure; drawn by ``plots``."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from statistics import median

from jitgraph.bench.plan import ABLATION_COLUMNS, ALL_CASES, PROTOCOLS
from jitgraph.bench.plots import Plot
from jitgraph.bench.plots_data import (
    LatencyChart,
    SampleChart,
    common_means_ms,
    latency_chart,
    peak_memory_gib,
    sample_charts,
    span,
    start_ups,
)
from jitgraph.bench.plots_draw import (
    BAR_FRAME_IN,
    BAR_IN,
    draw_bars,
    draw_distribution,
    draw_dots,
    draw_latency,
    draw_padding,
    draw_speedups,
    draw_start_up,
    draw_time_line,
    short,
)
from jitgraph.bench.report_approaches import HYBRID, speedups
from jitgraph.bench.report_runtime import HostCost, Padding
from jitgraph.bench.study import Study
from jitgraph.bench.table_text import pacings_of, title


def run_plots(study: Study, host: HostCost, padding: Padding | None) -> list[Plot]:
    """The plots that a study has the samples for, in the report's order."""
    pacings, titles = pacings_of(study), {case: title(study, case) for case in ALL_CASES}
    charts = [latency_chart(study, protocol, pacing) for protocol in PROTOCOLS for pacing in pacings]
    plots = [_latency(chart) for chart in charts if chart.curves]
    for metric, name in (("ttft_ms", "ttft"), ("itl_ms", "itl")):
        plots += [_distribution(chart, f"cdf_{name}") for chart in sample_charts(study, metric, pacings[0])]
    plots += [_time_line(chart) for chart in sample_charts(study, "itl_ms", pacings[0])]
    plots += _start_plots(study, titles) + _speedup_plots(study, titles) + _ablation_plots(study, titles, host)
    return [*plots, _padding(padding)] if padding else plots


def _latency(chart: LatencyChart) -> Plot:
    what = "TTFT" if chart.protocol == "ttft" else "P99 of TTFT"
    spread = "a standard deviation to either side" if chart.protocol == "ttft" else "the 95 % bootstrap interval"
    ceiling = (
        "Dashed: the ceiling, which no kernel on this machine can beat."
        if chart.ceiling
        else "No ceiling was measured in this run."
    )
    dotted = " Dotted: the model's matrix products alone." if chart.products else ""
    curves = "; ".join(f"{curve.title} {span(curve.values)}" for curve in chart.curves)
    return Plot(
        f"{chart.protocol}_{chart.pacing}",
        chart.protocol,
        f"{what} against prompt length, {chart.pacing} pacing. Band: {spread}. {ceiling}{dotted}",
        f"Line chart of {what} against prompt length, {chart.pacing} pacing: {curves}.",
        partial(draw_latency, chart=chart),
    )


def _distribution(chart: SampleChart, name: str) -> Plot:
    what = "TTFT" if chart.metric == "ttft_ms" else "Time between tokens"
    medians = "; ".join(f"{trace.title} {median(trace.values):.2f} ms" for trace in chart.traces)
    where = f"after {chart.prompt_tokens} prompt tokens, {chart.pacing} pacing"
    counts = sorted({len(trace.values) for trace in chart.traces})
    samples = f"{counts[0]} a case" if len(counts) == 1 else f"{counts[0]} to {counts[-1]} a case"
    return Plot(
        f"{name}_{chart.prompt_tokens}",
        "cdf",
        f"{what} {where}: the share of samples that took at most so long ({samples}).",
        f"Cumulative distributions of {what.lower() if what != 'TTFT' else what} {where}; medians: {medians}.",
        partial(draw_distribution, chart=chart),
    )


def _time_line(chart: SampleChart) -> Plot:
    counts = chart.counts()
    events = (
        f"Marks at the lower edge: {', '.join(f'{n} of kind {name}' for name, n in sorted(counts.items()))}."
        if counts
        else "The record notes no captures, evictions or collections beside these samples, so none are marked."
    )
    where = f"after {chart.prompt_tokens} prompt tokens, {chart.pacing} pacing"
    spans = "; ".join(f"{trace.title} {span(trace.values)}" for trace in chart.traces)
    return Plot(
        f"itl_timeline_{chart.prompt_tokens}",
        "itl",
        f"Every gap between tokens {where}, in order; vertical lines part requests. {events}",
        f"Time line of gaps between tokens {where}: {spans}. {events}",
        partial(draw_time_line, chart=chart),
    )


def _start_plots(study: Study, titles: Mapping[str, str]) -> list[Plot]:
    plots = []
    if starts := start_ups(study):
        seconds = "; ".join(f"{start.title} {start.ready_s:.1f} s" for start in starts)
        plots.append(
            Plot(
                "startup",
                "startup",
                "From the start of a case's process to ready, by phase. A case that does not tell its phases is "
                "undivided; phases too short to be seen are together at the end.",
                f"Bars of the time until ready: {seconds}.",
                partial(draw_start_up, starts=starts),
                _bars_in(len(starts), extra=0.5),
            )
        )
    if memory := peak_memory_gib(study):
        weights = float(study.model["weight_bytes"]) / 2**30
        held = "; ".join(f"{titles[case]} {gib:.2f} GiB" for case, gib in memory.items())
        plots.append(
            Plot(
                "memory",
                "startup",
                "Peak memory. Dashed: the weights that a step reads. On CUDA what PyTorch allocated in the case's "
                "process (for TensorRT-LLM, what the device had in use), else the process's largest resident size.",
                f"Bars of peak memory: {held}; weights {weights:.2f} GiB.",
                partial(
                    draw_bars, titles=titles, values=memory, label="peak memory, GiB", mark=(weights, "weights read")
                ),
                _bars_in(len(memory), extra=0.3),
            )
        )
    return plots


def _speedup_plots(study: Study, titles: Mapping[str, str]) -> list[Plot]:
    plots, found = [], speedups(study)
    for pacing in pacings_of(study):
        here = [one for one in found if one.pacing == pacing]
        if here:
            told = "; ".join(f"{titles[one.case]}, {one.metric}: {one.ratio:.2f}" for one in here)
            plots.append(
                Plot(
                    f"speedup_{pacing}",
                    "approaches",
                    f"{titles[HYBRID]}: how many times as fast as each other case, {pacing} pacing. Points: over all "
                    "lengths that both have; lines: from the least to the most at a single one.",
                    f"Dots of how many times as fast {titles[HYBRID]} is, {pacing} pacing: {told}.",
                    partial(draw_speedups, titles=titles, found=here),
                    _bars_in(2 * len({one.case for one in here}), extra=0.4),
                )
            )
    return plots


def _ablation_plots(study: Study, titles: Mapping[str, str], host: HostCost) -> list[Plot]:
    plots, pacing = [], pacings_of(study)[0]
    for metric, name, what in (("ttft_ms", "ttft", "TTFT"), ("itl_ms", "itl", "time between tokens")):
        means = common_means_ms(study, metric, pacing, ABLATION_COLUMNS)
        if len(means) > 1:
            told = "; ".join(f"{titles[case]} {ms:.2f} ms" for case, ms in means.items())
            plots.append(
                Plot(
                    f"ablation_{name}",
                    "ablation",
                    f"Average {what} over the rows with the most samples, {pacing} pacing: graphs alone, kernels "
                    "alone, side by side, and as one, as far as they were run.",
                    f"Bars of average {what}: {told}.",
                    partial(draw_bars, titles=titles, values=means, label=f"{what}, ms"),
                    _bars_in(len(means)),
                )
            )
    costs = (
        ("host_time", host.host_us, "host time per decode step, µs", "What a decode step takes of the host's time"),
        ("launches", host.launches, "launches per decode step", "Kernels and graphs that a decode step launches"),
    )
    for name, values, label, what in costs:
        if values:
            scale = ", on a logarithmic scale" if min(values.values()) > 0 else ""
            told = "; ".join(f"{titles[case]} {short(value)}" for case, value in values.items())
            plots.append(
                Plot(
                    name,
                    "ablation",
                    f"{what}{scale}.",
                    f"Dots of {label}: {told}.",
                    partial(draw_dots, titles=titles, values=values, label=label),
                    _bars_in(len(values)),
                )
            )
    return plots


def _padding(padding: Padding) -> Plot:
    label = "emulated; " if padding.emulated else ""
    return Plot(
        "padding",
        "ablation",
        f"What padding costs the first request of an unseen length ({label}{padding.source}).",
        f"Points: first request over later ones at {len(padding.ratios)} lengths, mean "
        f"{padding.mean_ratio:.3f}, worst {max(padding.ratios.values()):.3f}.",
        partial(draw_padding, padding=padding),
    )


def _bars_in(count: int, extra: float = 0.0) -> float:
    return BAR_FRAME_IN + BAR_IN * count + extra
