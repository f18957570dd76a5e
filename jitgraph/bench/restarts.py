"""How much a figure moves when a case's process is started again: what pooled samples hide. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from jitgraph.bench.study import Row, Study
from jitgraph.bench.table_text import csv_text, markdown_row, title

HEAD = (
    *("Case", "Protocol", "Metric", "Pacing", "Prompt tokens", "Processes", "Mean of means", "Std of means"),
    *("Least", "Greatest", "Range, %", "n"),
)


@dataclass(frozen=True)
class RestartSpread:
    """The means of one row's processes, in the row's unit."""

    means: tuple[float, ...]

    @property
    def std(self) -> float:
        """Sample standard deviation of the means."""
        return stdev(self.means)

    @property
    def range_share(self) -> float:
        """Greatest less least, as a share of their mean."""
        return (max(self.means) - min(self.means)) / fmean(self.means)


def restart_spread(row: Row) -> RestartSpread | None:
    """None where one process took all samples."""
    by_process: dict[int, list[float]] = {}
    for restart, value in zip(row.restarts, row.values, strict=True):
        by_process.setdefault(restart, []).append(value)
    if len(by_process) < 2:
        return None
    return RestartSpread(tuple(fmean(by_process[number]) for number in sorted(by_process)))


def restarted_rows(study: Study) -> list[tuple[Row, RestartSpread]]:
    """Every row that several processes share, with its spread."""
    return [(row, spread) for row in study.rows if (spread := restart_spread(row)) is not None]


def restart_lines(study: Study, rows: Sequence[tuple[Row, RestartSpread]]) -> list[tuple[str, ...]]:
    """Cells as in ``HEAD``; figures in the unit that the metric's name ends with."""
    lines = []
    for row, spread in rows:
        key, means = row.key, spread.means
        about = (title(study, key.case), key.protocol, key.metric, key.pacing, str(key.prompt_tokens), str(len(means)))
        figures = (fmean(means), spread.std, min(means), max(means), 100 * spread.range_share)
        lines.append((*about, *(f"{value:.3f}" for value in figures), str(row.summary.n)))
    return lines


def restart_csv(study: Study, rows: Sequence[tuple[Row, RestartSpread]]) -> str:
    """The table as CSV."""
    return csv_text([HEAD, *restart_lines(study, rows)])


def restart_markdown(study: Study, rows: Sequence[tuple[Row, RestartSpread]]) -> str:
    """The table as Markdown, what it shows above it."""
    rule = "|" + "|".join([":---"] * 4 + ["---:"] * (len(HEAD) - 4)) + "|"
    told = "**How far the means of a case's processes lie apart; every other table pools their samples**"
    return "\n".join([told, "", markdown_row(HEAD), rule, *map(markdown_row, restart_lines(study, rows))]) + "\n"
