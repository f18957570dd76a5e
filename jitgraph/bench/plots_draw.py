"""How each plot is drawn, on a matplotlib figure that the caller made inside ``STYLE``. Imports no plotting library.

Every colour is a light one of ``plots_palette``. A figure is one panel, narrow enough for a phone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from jitgraph.bench.plots_data import LatencyChart, SampleChart, StartUp, folded
from jitgraph.bench.plots_palette import PHASES, case_colour, case_marker, light
from jitgraph.bench.report_approaches import Speedup
from jitgraph.bench.report_runtime import Padding

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH_IN, HEIGHT_IN = 5.4, 4.1
BAR_IN, BAR_FRAME_IN = 0.42, 1.5
"""Height of a bar with its gap, and of what surrounds all bars."""
CHARACTER_PT, HANDLE_PT = 6.6, 34.0
"""Width of a legend's character, rather too much than too little, and of what stands before and after its text."""
LOG_FROM = 20.0
"""Largest value over the lowest tenth from which an axis is logarithmic."""
SPEEDUP_MARKERS = ("o", "s", "^")
EVENT_MARKERS = {"capture": "^", "eviction": "v", "collection": "o"}
STYLE: dict[str, Any] = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 11.5,
    "text.color": light("text"),
    "axes.labelcolor": light("soft"),
    "axes.edgecolor": light("line"),
    "axes.facecolor": light("card"),
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.formatter.useoffset": False,
    "figure.facecolor": light("card"),
    "grid.color": light("line"),
    "grid.linewidth": 0.6,
    "xtick.color": light("line"),
    "ytick.color": light("line"),
    "xtick.labelcolor": light("soft"),
    "ytick.labelcolor": light("soft"),
    "legend.frameon": False,
    "legend.fontsize": 10.5,
    "legend.handlelength": 1.6,
    "legend.columnspacing": 1.2,
    "svg.fonttype": "none",
    "path.simplify": True,
}
"""matplotlib's settings while a figure is made and saved."""


def draw_latency(figure: Figure, chart: LatencyChart) -> None:
    """Lines over prompt lengths, their spread as a band, and the ceiling with what lies beyond it."""
    axes = figure.add_subplot()
    for curve in chart.curves:
        colour, wide = light(case_colour(curve.case)), 2.4 if curve.case == "hybrid" else 1.6
        axes.fill_between(curve.lengths, curve.low, curve.high, color=colour, alpha=0.15, linewidth=0)
        axes.plot(
            curve.lengths,
            curve.values,
            color=colour,
            marker=case_marker(curve.case),
            markersize=5,
            linewidth=wide,
            label=curve.title,
            zorder=4 if curve.case == "hybrid" else 3,
        )
    if chart.products:
        lengths, times = zip(*chart.products, strict=True)
        axes.plot(lengths, times, color=light("soft"), linewidth=1.4, linestyle=":", label="matrix products alone")
    if chart.ceiling:
        lengths, times = zip(*chart.ceiling, strict=True)
        axes.plot(lengths, times, color=light("text"), linewidth=1.2, linestyle="--", label="ceiling")
        axes.fill_between(lengths, 0, times, color=light("text"), alpha=0.06, linewidth=0)
    top = [value for curve in chart.curves for value in curve.values]
    low = [value for _, value in chart.ceiling] or top
    _scale(axes, "y", [*top, *low])
    axes.set_xlim(left=0)
    axes.set_xlabel("prompt length, tokens")
    axes.set_ylabel("TTFT, ms" if chart.protocol == "ttft" else "P99 of TTFT, ms")
    _legend(figure, axes)


def draw_distribution(figure: Figure, chart: SampleChart) -> None:
    """Share of samples that are at most so long."""
    axes = figure.add_subplot()
    for trace in chart.traces:
        ordered = sorted(trace.values)
        shares = [(i + 1) / len(ordered) for i in range(len(ordered))]
        wide = 2.4 if trace.case == "hybrid" else 1.6
        axes.step(
            [ordered[0], *ordered],
            [0.0, *shares],
            where="post",
            color=light(case_colour(trace.case)),
            linewidth=wide,
            label=trace.title,
        )
    if chart.ceiling_ms is not None:
        axes.axvline(chart.ceiling_ms, color=light("text"), linewidth=1.2, linestyle="--", label="ceiling")
    values = [value for trace in chart.traces for value in trace.values]
    _scale(axes, "x", [*values, *([] if chart.ceiling_ms is None else [chart.ceiling_ms])])
    axes.set_ylim(0, 1.02)
    axes.set_xlabel("TTFT, ms" if chart.metric == "ttft_ms" else "time between tokens, ms")
    axes.set_ylabel("share of samples")
    _legend(figure, axes)


def draw_time_line(figure: Figure, chart: SampleChart) -> None:
    """Each gap between tokens in the order in which it came; requests apart; events beneath."""
    axes = figure.add_subplot()
    each = chart.gaps_per_request
    longest = max(len(trace.values) for trace in chart.traces)
    values = [value for trace in chart.traces for value in trace.values]
    for trace in chart.traces:
        xs: list[float] = []
        ys: list[float] = []
        for index, value in enumerate(trace.values):
            if index and index % each == 0:  # nobody waited between two requests: no line joins them
                xs.append(index - 0.5)
                ys.append(float("nan"))
            xs.append(index)
            ys.append(value)
        axes.plot(xs, ys, color=light(case_colour(trace.case)), linewidth=1.0, label=trace.title)
    for start in range(each, longest, each):
        axes.axvline(start - 0.5, color=light("line"), linewidth=1.0)
    if chart.ceiling_ms is not None:
        values.append(chart.ceiling_ms)
        axes.axhline(chart.ceiling_ms, color=light("text"), linewidth=1.2, linestyle="--", label="ceiling")
    _scale(axes, "y", values)
    _draw_events(axes, chart)
    axes.set_xlim(0, longest)
    axes.set_xlabel(f"token gap, {each} to a request")
    axes.set_ylabel("time between tokens, ms")
    axes.grid(axis="x", visible=False)
    _legend(figure, axes)


def _draw_events(axes: Axes, chart: SampleChart) -> None:
    """Marks along the lower edge, in the case's colour, one shape for each kind of event."""
    across = axes.get_xaxis_transform()
    seen: set[str] = set()
    for place, trace in enumerate(chart.traces):
        for event in trace.events:
            label = "" if event.name in seen else event.name
            seen.add(event.name)
            axes.plot(
                [event.iteration],
                [0.03 + 0.04 * place],
                transform=across,
                marker=EVENT_MARKERS[event.name],
                markersize=6,
                linestyle="none",
                color=light(case_colour(trace.case)),
                label=label or "_",
                clip_on=False,
                zorder=5,
            )


def draw_start_up(figure: Figure, starts: Sequence[StartUp]) -> None:
    """One bar a case, its phases one after the other, the whole written at its end."""
    axes = figure.add_subplot()
    bars = folded(starts)
    names = list(dict.fromkeys(name for phases in bars for name, _ in phases))
    colours = {name: light(PHASES[i % len(PHASES)]) for i, name in enumerate(names)}
    for place, (start, phases) in enumerate(zip(starts, bars, strict=True)):
        left = 0.0
        for name, seconds in phases:
            axes.barh(place, seconds, left=left, height=0.62, color=colours[name])
            left += seconds
        _beside(axes, left, place, f"{start.ready_s:.1f} s")
    for name in names:
        axes.barh([0], [0], color=colours[name], label=name)
    _bars(axes, [start.title for start in starts])
    axes.set_xlim(0, 1.18 * max(start.ready_s for start in starts))
    axes.set_xlabel("seconds from the start of the process")
    _legend(figure, axes)


def draw_bars(
    figure: Figure,
    titles: Mapping[str, str],
    values: Mapping[str, float],
    label: str,
    *,
    mark: tuple[float, str] | None = None,
) -> None:
    """One bar a case in its colour, its value written at the end. ``mark``: a line across, and its name."""
    axes = figure.add_subplot()
    for place, (case, value) in enumerate(values.items()):
        axes.barh(place, value, height=0.62, color=light(case_colour(case)))
        _beside(axes, value, place, f"{value:.2f}")
    _bars(axes, [titles[case] for case in values])
    axes.set_xlim(0, 1.18 * max(values.values()))
    axes.set_xlabel(label)
    if mark is not None:
        axes.axvline(mark[0], color=light("text"), linewidth=1.2, linestyle="--", label=mark[1])
        _legend(figure, axes)


def draw_dots(figure: Figure, titles: Mapping[str, str], values: Mapping[str, float], label: str) -> None:
    """One dot a case, its value beside it, for values that differ by orders of magnitude. No bars: on a logarithmic
    scale their length means nothing."""
    axes = figure.add_subplot()
    for place, (case, value) in enumerate(values.items()):
        axes.axhline(place, color=light("line"), linewidth=0.6, zorder=1)
        axes.plot([value], [place], marker=case_marker(case), markersize=9, color=light(case_colour(case)))
        _beside(axes, value, place, short(value), points=9)
    _bars(axes, [titles[case] for case in values])
    axes.set_ylim(len(values) - 0.5, -0.5)
    if min(values.values()) > 0:
        axes.set_xscale("log")
        axes.set_xlim(min(values.values()) / 2, max(values.values()) * 8)
        _plain(axes, "x")
    axes.set_xlabel(label)


def _beside(axes: Axes, value: float, place: float, text: str, *, points: float = 5, size: float = 10.5) -> None:
    """Writes a value to the right of where it ends."""
    behind = {"facecolor": light("card"), "edgecolor": "none", "pad": 0.8}  # a line across does not cross it out
    axes.annotate(
        text, (value, place), (points, 0), textcoords="offset points", va="center", fontsize=size, bbox=behind
    )


def short(value: float) -> str:
    """A figure of any size in three digits or so."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def draw_speedups(figure: Figure, titles: Mapping[str, str], found: Sequence[Speedup]) -> None:
    """How many times as fast the hybrid is as each case: a shape for each metric, its range over lengths as a line."""
    axes = figure.add_subplot()
    cases = list(dict.fromkeys(one.case for one in found))
    metrics = list(dict.fromkeys(one.metric for one in found))
    for one in found:
        place = cases.index(one.case) + 0.22 * (metrics.index(one.metric) - (len(metrics) - 1) / 2)
        colour, marker = light(case_colour(one.case)), SPEEDUP_MARKERS[metrics.index(one.metric)]
        axes.plot([one.low, one.high], [place, place], color=colour, linewidth=1.4, alpha=0.6)
        axes.plot([one.ratio], [place], color=colour, marker=marker, markersize=6.5)
        _beside(axes, max(one.high, one.ratio), place, f"{one.ratio:.2f}", points=6, size=9)
    for marker, metric in zip(SPEEDUP_MARKERS, metrics, strict=False):
        axes.plot([], [], color=light("soft"), marker=marker, linestyle="none", label=metric)
    axes.axvline(1.0, color=light("text"), linewidth=1.2, linestyle="--", label="as fast")
    _bars(axes, [titles[case] for case in cases])
    axes.set_ylim(len(cases) - 0.5, -0.5)
    axes.set_xlim(0, 1.12 * max(one.high for one in found))
    axes.set_xlabel("times as fast")
    _legend(figure, axes)


Ratios = Sequence[tuple[int, float, bool]]
"""(tokens, ratio, whether the two figures are told apart)."""


def draw_ratios(figure: Figure, points: Mapping[str, tuple[str, Ratios]], label: str) -> None:
    """One run over another, by prompt length; hollow where the two are not told apart. ``points``: title to its case
    and ratios."""
    axes = figure.add_subplot()
    for title, (case, found) in points.items():
        colour = light(case_colour(case))
        lengths, ratios, told = zip(*found, strict=True)
        axes.plot(lengths, ratios, color=colour, linewidth=1.4, marker=case_marker(case), markersize=5.5, label=title)
        hollow = [(n, ratio) for n, ratio, sure in zip(lengths, ratios, told, strict=True) if not sure]
        axes.plot(
            [n for n, _ in hollow],
            [ratio for _, ratio in hollow],
            linestyle="none",
            marker=case_marker(case),
            markersize=5.5,
            markerfacecolor=light("card"),
            markeredgecolor=colour,
        )
    axes.axhline(1.0, color=light("text"), linewidth=1.2, linestyle="--", label="the same")
    axes.set_xlim(left=0)
    axes.set_xlabel("prompt length, tokens")
    axes.set_ylabel(label)
    _legend(figure, axes)


def draw_padding(figure: Figure, padding: Padding) -> None:
    """What the first request of a length cost, over the later ones."""
    axes = figure.add_subplot()
    lengths, ratios = zip(*padding.ratios.items(), strict=True)
    colour = light("hybrid")
    axes.plot(lengths, ratios, linestyle="none", marker="D", markersize=5, color=colour, label="padded over exact")
    axes.axhline(padding.mean_ratio, color=colour, linewidth=1.4, label=f"mean {padding.mean_ratio:.3f}")
    axes.axhline(1.0, color=light("text"), linewidth=1.2, linestyle="--", label="no cost")
    axes.set_xlabel("prompt length, tokens")
    axes.set_ylabel("first request over later ones")
    _legend(figure, axes)


def _bars(axes: Axes, names: Sequence[str]) -> None:
    """The frame of horizontal bars, first one on top."""
    axes.set_yticks(range(len(names)), [name.replace(" (", "\n(") for name in names])
    axes.tick_params(axis="y", length=0, labelcolor=light("text"))
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)


def _scale(axes: Axes, which: str, values: Sequence[float]) -> None:
    """Logarithmic where values differ much, else linear from zero. A few small ones are not much."""
    small = sorted(values)[len(values) // 10]
    if min(values) > 0 and max(values) / small > LOG_FROM:
        (axes.set_yscale if which == "y" else axes.set_xscale)("log")
        _plain(axes, which)
    else:
        (axes.set_ylim if which == "y" else axes.set_xlim)(0)


def _plain(axes: Axes, which: str) -> None:
    """Numbers instead of powers of ten on a logarithmic axis, few of them."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis = axes.yaxis if which == "y" else axes.xaxis
    low, high = axis.get_view_interval()
    between = (1.0, 2.0, 5.0) if high / low < 200 else (1.0,)
    axis.set_major_locator(LogLocator(subs=between, numticks=12))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}" if value >= 1 else f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())
    axis.set_minor_locator(LogLocator(subs=()))


def _legend(figure: Figure, axes: Axes) -> None:
    """Above the panel, where it covers nothing."""
    handles, labels = axes.get_legend_handles_labels()
    columns = legend_columns(labels)
    figure.legend(handles, labels, loc="outside upper left", ncols=columns, labelcolor=light("text"))


def legend_columns(labels: Sequence[str]) -> int:
    """As many columns, up to three, as the figure is wide enough for; a legend fills one column after the other."""
    for columns in (3, 2):
        down = -(-len(labels) // columns)
        longest = [max(map(len, labels[i : i + down])) for i in range(0, len(labels), down)]
        if sum(CHARACTER_PT * length + HANDLE_PT for length in longest) <= 72 * WIDTH_IN:
            return columns
    return 1
