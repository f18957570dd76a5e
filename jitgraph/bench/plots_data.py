"""What each plot of a report shows, as plain numbers from a study. Pure; draws nothing, needs no plotting library."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from jitgraph.bench.plan import ABLATION, ALL_CASES, DECODE_TOKENS, INTERACTIVE, LINEARS, PROTOCOLS, WARMUP
from jitgraph.bench.records import Event
from jitgraph.bench.study import Row, Study
from jitgraph.bench.table_text import title

CHARTED = tuple(case for case in ALL_CASES if case not in ABLATION)
"""Cases of the main charts; the further ones of the ablation have charts of their own."""


@dataclass(frozen=True)
class Curve:
    """One case over prompt lengths; times in milliseconds."""

    case: str
    title: str
    lengths: tuple[int, ...]
    values: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    """Mean plus and minus a standard deviation, or the bootstrap interval of the P99."""


@dataclass(frozen=True)
class LatencyChart:
    """TTFT or its P99 against the prompt length, under one pacing."""

    protocol: str
    pacing: str
    curves: tuple[Curve, ...]
    ceiling: tuple[tuple[int, float], ...]
    """(tokens, ms): what no kernel on this machine can beat; empty where no ceiling was measured."""
    products: tuple[tuple[int, float], ...]
    """(tokens, ms): the model's matrix products alone."""


@dataclass(frozen=True)
class Trace:
    """One case's samples of one row."""

    case: str
    title: str
    values: tuple[float, ...]
    events: tuple[Event, ...]


@dataclass(frozen=True)
class SampleChart:
    """Samples of one condition, a trace for each case: for distributions and time lines."""

    metric: str
    pacing: str
    prompt_tokens: int
    traces: tuple[Trace, ...]
    ceiling_ms: float | None

    @property
    def gaps_per_request(self) -> int:
        """Samples of a time line that belong to one request."""
        return DECODE_TOKENS - 1

    def counts(self) -> dict[str, int]:
        """Events by name, over all traces."""
        found: dict[str, int] = {}
        for event in (event for trace in self.traces for event in trace.events):
            found[event.name] = found.get(event.name, 0) + 1
        return found


@dataclass(frozen=True)
class StartUp:
    """One case's way to ready."""

    case: str
    title: str
    ready_s: float
    phases: tuple[tuple[str, float], ...]
    """(name, seconds) in order; the first one is what the case's own phases leave of the whole."""


REST = "process, imports, all else"
UNDIVIDED = "not divided"
SHORT = "short ones"
SMALLEST_SHARE = 0.02
"""Of the longest bar: a shorter phase cannot be seen."""


def latency_chart(study: Study, protocol: str, pacing: str) -> LatencyChart:
    """TTFT (``ttft``: means) or its P99 (``p99``) over prompt lengths."""
    found = study.select(protocol, "ttft_ms", pacing)
    curves = []
    for case in CHARTED:
        rows = [found[where] for where in sorted(found) if where[0] == case]
        if rows:
            points = [_point(row, protocol) for row in rows]
            values, low, high = (tuple(point[i] for point in points) for i in range(3))
            lengths = tuple(row.key.prompt_tokens for row in rows)
            curves.append(Curve(case, title(study, case), lengths, values, low, high))
    charted = [row for (case, _), row in found.items() if case in CHARTED]
    ceiling = {row.key.prompt_tokens: row.ceiling_ms for row in charted if row.ceiling_ms is not None}
    charted_lengths = {row.key.prompt_tokens for row in charted}
    products = {
        n: row.summary.mean
        for (case, n), row in study.select("ttft", "ttft_ms", pacing).items()
        if case == LINEARS and n in charted_lengths
    }
    return LatencyChart(
        protocol, pacing, tuple(curves), tuple(sorted(ceiling.items())), tuple(sorted(products.items()))
    )


def _point(row: Row, protocol: str) -> tuple[float, float, float]:
    s = row.summary
    return (s.mean, s.mean - s.std, s.mean + s.std) if protocol == "ttft" else (s.p99, *s.p99_ci)


def richest_rows(study: Study, metric: str, pacing: str, cases: Sequence[str]) -> dict[tuple[str, int], Row]:
    """(case, prompt tokens) to the row with the most samples, whatever its protocol."""
    found: dict[tuple[str, int], Row] = {}
    for protocol in PROTOCOLS:
        for where, row in study.select(protocol, metric, pacing).items():
            if where[0] in cases and (where not in found or row.summary.n > found[where].summary.n):
                found[where] = row
    return found


def common_means_ms(study: Study, metric: str, pacing: str, cases: Sequence[str]) -> dict[str, float]:
    """Case to its mean, over the prompt lengths at which each of ``cases`` that was measured at all has samples."""
    rows = richest_rows(study, metric, pacing, cases)
    measured = [case for case in cases if any(one == case for one, _ in rows)]
    lengths = [n for n in sorted({n for _, n in rows}) if all((case, n) in rows for case in measured)]
    if not lengths:
        return {}
    return {case: sum(rows[case, n].summary.mean for n in lengths) / len(lengths) for case in measured}


def sample_charts(study: Study, metric: str, pacing: str) -> list[SampleChart]:
    """One chart for the shortest and one for the longest prompt that was measured."""
    rows = richest_rows(study, metric, pacing, CHARTED)
    lengths = sorted({n for _, n in rows})
    charts = []
    for n in sorted({*lengths[:1], *lengths[-1:]}):
        here = [rows[case, n] for case in CHARTED if (case, n) in rows]
        traces = tuple(Trace(row.key.case, title(study, row.key.case), row.values, row.events) for row in here)
        ceiling = next((row.ceiling_ms for row in here if row.ceiling_ms is not None), None)
        charts.append(SampleChart(metric, pacing, n, traces, ceiling))
    return charts


def start_ups(study: Study) -> list[StartUp]:
    """Every case whose ready time is known."""
    found = study.select(WARMUP, "ready_s", INTERACTIVE)
    starts = []
    for case in ALL_CASES:
        if row := found.get((case, 0)):
            told = study.cases.get(case, {}).get("ready_ms") or {}
            phases = [(str(name), float(ms) / 1e3) for name, ms in told.items()]
            rest = max(0.0, row.summary.mean - sum(seconds for _, seconds in phases))
            whole = ((REST if phases else UNDIVIDED, rest), *phases)
            starts.append(StartUp(case, title(study, case), row.summary.mean, whole))
    return starts


def folded(starts: Sequence[StartUp]) -> list[tuple[tuple[str, float], ...]]:
    """Each case's phases for a drawing: what is nowhere long enough to be seen is one, at the end."""
    visible = SMALLEST_SHARE * max((start.ready_s for start in starts), default=0.0)
    seen = {name for start in starts for name, seconds in start.phases if seconds >= visible}
    bars = []
    for start in starts:
        small = sum(seconds for name, seconds in start.phases if name not in seen)
        shown = tuple(phase for phase in start.phases if phase[0] in seen)
        bars.append((*shown, (SHORT, small)) if small else shown)
    return bars


def peak_memory_gib(study: Study) -> dict[str, float]:
    """Case to the most memory that any of its rows saw."""
    found: dict[str, float] = {}
    for row in study.rows:
        if row.key.case in ALL_CASES and row.peak_memory_gib is not None:
            found[row.key.case] = max(row.peak_memory_gib, found.get(row.key.case, 0.0))
    return {case: found[case] for case in ALL_CASES if case in found}


def span(values: Iterable[float]) -> str:
    """The least and the greatest of some milliseconds, in words."""
    all_of_them = list(values)
    low, high = min(all_of_them), max(all_of_them)
    return f"{low:.2f} ms" if f"{low:.2f}" == f"{high:.2f}" else f"{low:.2f} to {high:.2f} ms"
