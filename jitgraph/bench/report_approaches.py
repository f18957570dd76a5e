"""The summary by approach and the speed-up analysis: what each case amounts to, and the hybrid against each other case.

Figures come from a study. *Complexity* and *best use* are judgements and called so. Pure but for ``write_approaches``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from jitgraph.bench.finals import final_tables
from jitgraph.bench.plan import ALL_CASES, CASES, INTERACTIVE, TITLES, WARMUP
from jitgraph.bench.plots_data import common_means_ms, peak_memory_gib, richest_rows
from jitgraph.bench.records import write_text
from jitgraph.bench.remarks import reason_of
from jitgraph.bench.report_estimates import MEAN, P99, Estimate, apart, estimate
from jitgraph.bench.study import Row, Study
from jitgraph.bench.table_text import BOM, NO_VALUE, conditions, csv_text, markdown_row, pacings_of, title

HYBRID = "hybrid"
JUDGED: Mapping[str, tuple[str, str]] = {
    "baseline": ("low: one call of a library", "any model that transformers runs; what others are checked against"),
    "cuda-graph": ("medium: static buffers, a capture for each size", "plain PyTorch ops where the host is the limit"),
    "jit": ("medium: a kernel for each dynamic op", "sizes that change too often to be captured"),
    "hybrid": ("high: both, and all state of a step on the device", "one to eight streams where each delay counts"),
    "tensorrt-llm": ("high: a library in an environment of its own", "NVIDIA GPUs, many requests at a time"),
    "jit-all": ("high: a kernel for each op", "none: it shows what kernels do without graphs"),
    "hf-compile": ("low: two settings of a library", "decoding with transformers where a long start does not matter"),
    "hf-graphs": ("low: a capture for each length", "none: it shows what the published method reaches today"),
    "vllm": ("medium: a server of its own", "many requests at a time"),
    "openai": ("unknown: somebody else's server", "comparing with whatever is already running"),
    "split": ("high: graphs and kernels in turn", "none: it shows what separate graphs leave undone"),
}
"""Case to complexity and best use."""
APPROACH_HEAD = (
    *("Approach", "TTFT average, ms", "P99 average, ms", "Between tokens, ms", "Peak memory, GiB", "Ready, s"),
    *("Complexity (judged)", "Best use (judged)", "Note"),
)
SPEEDUP_HEAD = ("Pacing", "Against", "Metric", "Times as fast", "At single lengths", "Faster", "Slower", "Undecided")
APPROACH_FILE, SPEEDUP_FILE = "approach_summary", "speedup_table"


@dataclass(frozen=True)
class Speedup:
    """The hybrid against one case, by one metric under one pacing."""

    pacing: str
    case: str
    metric: str
    ratio: float
    """The case's average over the hybrid's, over the lengths that both have."""
    low: float
    high: float
    """The least and the greatest ratio at a single length."""
    faster: int
    slower: int
    """Lengths at which the hybrid is faster, or slower, and the intervals do not overlap."""
    lengths: int

    @property
    def undecided(self) -> int:
        """Lengths at which the intervals overlap."""
        return self.lengths - self.faster - self.slower


def averages(study: Study, protocol: str, pacing: str) -> dict[str, str]:
    """Case to its cell in the final table's last line; empty where it has none."""
    for table in final_tables(study, protocol):
        if table.pacing == pacing:
            return dict(zip(CASES, table.lines[-1][1:-1], strict=True))
    return dict.fromkeys(CASES, "")


def approach_lines(study: Study) -> list[tuple[str, ...]]:
    """A line for each of the five cases, cells as in ``APPROACH_HEAD``; empty where there is no value."""
    pacing = pacings_of(study)[0]
    ttft, p99 = averages(study, "ttft", pacing), averages(study, "p99", pacing)
    gaps, memory = common_means_ms(study, "itl_ms", pacing, ALL_CASES), peak_memory_gib(study)
    ready = study.select(WARMUP, "ready_s", INTERACTIVE)
    lines: list[tuple[str, ...]] = []
    for case in CASES:
        figures = (
            f"{gaps[case]:.2f}" if case in gaps else "",
            f"{memory[case]:.2f}" if case in memory else "",
            f"{ready[case, 0].summary.mean:.1f}" if (case, 0) in ready else "",
        )
        judged = JUDGED.get(case, ("", ""))
        lines.append((title(study, case), ttft[case], p99[case], *figures, *judged, reason_of(study, case)))
    return lines


def approach_caption(study: Study) -> str:
    """What the summary shows."""
    return f"Summary by approach, {conditions(study, pacings_of(study)[0])}"


def speedups(study: Study) -> list[Speedup]:
    """The hybrid against every other case, by TTFT, its P99 and the time between tokens, under each pacing."""
    found = []
    for pacing in pacings_of(study):
        by_metric = (
            ("TTFT", MEAN, study.select("ttft", "ttft_ms", pacing)),
            ("P99 of TTFT", P99, study.select("p99", "ttft_ms", pacing)),
            ("time between tokens", MEAN, richest_rows(study, "itl_ms", pacing, ALL_CASES)),
        )
        for case in (case for case in ALL_CASES if case != HYBRID):
            for metric, statistic, rows in by_metric:
                if pair := _pairs(rows, case, statistic):
                    found.append(_speedup(pacing, case, metric, pair))
    return found


def _pairs(rows: Mapping[tuple[str, int], Row], case: str, statistic: str) -> list[tuple[Estimate, Estimate]]:
    """(the case's, the hybrid's) at each prompt length that both have."""
    lengths = sorted(n for one, n in rows if one == case and (HYBRID, n) in rows)
    return [(estimate(rows[case, n], statistic), estimate(rows[HYBRID, n], statistic)) for n in lengths]


def _speedup(pacing: str, case: str, metric: str, pairs: Sequence[tuple[Estimate, Estimate]]) -> Speedup:
    ratios = [other.value / ours.value for other, ours in pairs]
    decided = [other.value > ours.value for other, ours in pairs if apart(other, ours)]
    whole = sum(other.value for other, _ in pairs) / sum(ours.value for _, ours in pairs)
    faster = sum(decided)
    return Speedup(pacing, case, metric, whole, min(ratios), max(ratios), faster, len(decided) - faster, len(pairs))


def speedup_lines(study: Study) -> list[tuple[str, ...]]:
    """A line for each ``Speedup``, cells as in ``SPEEDUP_HEAD``."""
    return [
        (
            one.pacing,
            title(study, one.case),
            one.metric,
            f"{one.ratio:.2f}",
            f"{one.low:.2f} to {one.high:.2f}",
            *(f"{count} of {one.lengths}" for count in (one.faster, one.slower, one.undecided)),
        )
        for one in speedups(study)
    ]


def speedup_caption(study: Study) -> str:
    """What the analysis shows."""
    return (
        f"{title(study, HYBRID)} against each other case: their average over its own. Faster and slower count prompt "
        f"lengths whose 95 % intervals do not overlap; {study.model['name']} on {study.device}"
    )


def no_speedups(study: Study) -> str:
    """Why there is no analysis."""
    if (HYBRID, 0) in study.select(WARMUP, "ready_s", INTERACTIVE):
        return "No other case was measured at the same lengths."
    return f"{TITLES[HYBRID]} has no figures: {reason_of(study, HYBRID) or 'nothing was measured'}."


def write_approaches(study: Study, folder: Path) -> list[Path]:
    """Both tables as CSV and Markdown; the second only where there is something to compare.

    Raises:
        OutputError: the folder cannot be written.
    """
    files = []
    tables: tuple[tuple[str, str, tuple[str, ...], list[tuple[str, ...]]], ...] = (
        (APPROACH_FILE, approach_caption(study), APPROACH_HEAD, approach_lines(study)),
        (SPEEDUP_FILE, speedup_caption(study), SPEEDUP_HEAD, speedup_lines(study)),
    )
    for name, caption, head, lines in tables:
        if not lines:
            continue
        csv_lines = [(*head, "Conditions"), *((*line, caption) for line in lines)]
        rule = "|" + "|".join([":---"] * len(head)) + "|"
        body = [markdown_row([cell or NO_VALUE for cell in line]) for line in lines]
        markdown = "\n".join([f"**{caption}**", "", markdown_row(head), rule, *body]) + "\n"
        for suffix, text in (("csv", BOM + csv_text(csv_lines)), ("md", markdown)):
            files.append(folder / f"{name}.{suffix}")
            write_text(files[-1], text)
    return files
