"""``comparison.html``: several runs side by side, every row against the first run's. All from raw samples.

A difference is called one where the 95 % intervals of the two figures do not overlap. Runs of other machines, models or
versions may be compared, and the page says in what they differ.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from rich.console import Console

from jitgraph.bench.plan import ALL_CASES, INTERACTIVE, PACINGS, TITLES, WARMUP
from jitgraph.bench.plots import Drawn, Plot, draw, missing_reason, write_plots
from jitgraph.bench.plots_data import peak_memory_gib, richest_rows
from jitgraph.bench.plots_draw import draw_ratios
from jitgraph.bench.records import write_text
from jitgraph.bench.remarks import reason_of
from jitgraph.bench.report_estimates import MEAN, P99, Estimate, apart, estimate
from jitgraph.bench.report_html import Section, bullet_list, figures, page, paragraph, table, tiles
from jitgraph.bench.report_sections import why_empty
from jitgraph.bench.study import Row, Study, load_study
from jitgraph.bench.table_text import EMULATED
from jitgraph.errors import ConfigError

FILE = "comparison.html"
SLOWER, FASTER, SAME, UNKNOWN = "slower", "faster", "overlap", "no interval"
WORDS = (FASTER, SLOWER, SAME, UNKNOWN)
"""What can be said of two figures. Memory and a ready time measured once have no interval."""


@dataclass(frozen=True)
class Run:
    """One of the folders."""

    name: str
    folder: Path
    study: Study


@dataclass(frozen=True)
class Pair:
    """One figure of the first run and of another one."""

    first: Estimate
    other: Estimate

    @property
    def ratio(self) -> float:
        """The other's over the first's: below 1 is faster."""
        return self.other.value / self.first.value

    @property
    def verdict(self) -> str:
        """One of ``WORDS``."""
        if self.first.interval is None or self.other.interval is None:
            return UNKNOWN
        if not apart(self.first, self.other):
            return SAME
        return FASTER if self.ratio < 1 else SLOWER


@dataclass(frozen=True)
class Comparison:
    """One metric under one pacing, over cases and prompt lengths."""

    anchor: str
    """Of its metric, whatever the pacing."""
    name: str
    pacing: str
    unit: str
    estimates: tuple[Mapping[tuple[str, int], Estimate], ...]
    """For each run, (case, prompt tokens) to its figure."""

    @property
    def keys(self) -> list[tuple[str, int]]:
        """Whatever any run has, in table order."""
        every = {key for run in self.estimates for key in run}
        return sorted(every, key=lambda key: (ALL_CASES.index(key[0]), key[1]))

    def pairs(self, run: int) -> dict[tuple[str, int], Pair]:
        """What the first run and another one both have."""
        first, other = self.estimates[0], self.estimates[run]
        return {key: Pair(first[key], other[key]) for key in self.keys if key in first and key in other}


def compare(folders: Sequence[Path], console: Console, target: Path | None = None) -> Path:
    """Writes the comparison (to ``target``, else into the first folder) with its plots beside it. Returns the page.

    Raises:
        ConfigError: a folder is named twice.
        OutputError: a folder holds no run, or the page cannot be written.
    """
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise ConfigError("a folder is named twice: a comparison wants different runs")
    runs = [Run(name, folder, load_study(folder)) for name, folder in zip(_names(folders), folders, strict=True)]
    found = comparisons([run.study for run in runs])
    target = target or folders[0] / FILE
    why_not = missing_reason()
    drawn = [] if why_not else [draw(plot) for plot in comparison_plots(runs, found)]
    write_text(target, _page(runs, found, drawn, why_not))
    if drawn:
        write_plots(drawn, target.parent)
    for number, run in enumerate(runs[1:], 1):
        counts = verdicts(found, number)
        told = ", ".join(f"{counts[word]} {word}" for word in WORDS if counts[word])
        line = f"{run.name} against {runs[0].name}: {told or 'nothing in common'}"
        console.print(line, highlight=False, markup=False)
    console.print(f"Comparison: {target}", highlight=False, markup=False)
    return target


def _names(folders: Sequence[Path]) -> list[str]:
    """As short as they can be told apart."""
    short = [folder.resolve().name for folder in folders]
    return short if len(set(short)) == len(short) else [str(folder) for folder in folders]


def comparisons(studies: Sequence[Study]) -> list[Comparison]:
    """Every metric and pacing that any run has."""
    found = []
    for pacing in PACINGS:
        kinds = (
            ("ttft", "TTFT", MEAN, [study.select("ttft", "ttft_ms", pacing) for study in studies]),
            ("p99", "P99 of TTFT", P99, [study.select("p99", "ttft_ms", pacing) for study in studies]),
            ("itl", "time between tokens", MEAN, [_gaps(study, pacing) for study in studies]),
            ("itl-p99", "P99 of time between tokens", P99, [_gaps(study, pacing) for study in studies]),
        )
        for anchor, name, statistic, rows in kinds:
            estimates = tuple(_estimates(one, statistic) for one in rows)
            if any(estimates):
                found.append(Comparison(anchor, name, pacing, "ms", estimates))
    ready = tuple(_estimates(study.select(WARMUP, "ready_s", INTERACTIVE), MEAN) for study in studies)
    if any(ready):
        found.append(Comparison("ready", "ready time", "", "s", ready))
    memory = tuple(_memory(study) for study in studies)
    if any(memory):
        found.append(Comparison("memory", "peak memory", "", "GiB", memory))
    return found


def _gaps(study: Study, pacing: str) -> Mapping[tuple[str, int], Row]:
    return richest_rows(study, "itl_ms", pacing, ALL_CASES)


def _estimates(rows: Mapping[tuple[str, int], Row], statistic: str) -> dict[tuple[str, int], Estimate]:
    return {key: estimate(row, statistic) for key, row in rows.items() if key[0] in ALL_CASES}


def _memory(study: Study) -> dict[tuple[str, int], Estimate]:
    return {(case, 0): Estimate(gib, None, study.emulated(case)) for case, gib in peak_memory_gib(study).items()}


def verdicts(found: Sequence[Comparison], run: int) -> dict[str, int]:
    """How many figures of a run are faster than the first's, slower, not told apart, or without an interval."""
    words = [pair.verdict for one in found for pair in one.pairs(run).values()]
    return {word: words.count(word) for word in WORDS}


def comparison_plots(runs: Sequence[Run], found: Sequence[Comparison]) -> list[Plot]:
    """A plot for each other run, and metric with lengths: its ratio to the first run."""
    plots = []
    for one in found:
        for number, run in enumerate(runs[1:], 1):
            pairs = {key: pair for key, pair in one.pairs(number).items() if key[1]}
            if not pairs:
                continue
            points = {
                _title(case, [run.study, runs[0].study]): (
                    case,
                    [(n, pair.ratio, pair.verdict in (FASTER, SLOWER)) for (c, n), pair in pairs.items() if c == case],
                )
                for case in dict.fromkeys(case for case, _ in pairs)
            }
            ratios = [pair.ratio for pair in pairs.values()]
            what = f"{one.name}, {one.pacing} pacing: {run.name} over {runs[0].name}"
            plots.append(
                Plot(
                    f"comparison_{number}_{one.anchor.replace('-', '_')}_{one.pacing}",
                    one.anchor,
                    f"{what}. Below 1 is faster; hollow points are those whose intervals overlap.",
                    f"Points of the ratio by prompt length, {what}: from {min(ratios):.3f} to {max(ratios):.3f}.",
                    partial(draw_ratios, points=points, label=f"{run.name} over {runs[0].name}"),
                )
            )
    return plots


def _title(case: str, studies: Sequence[Study]) -> str:
    """A case's title; emulated where it is in any of the runs."""
    return TITLES[case] + (EMULATED if any(study.emulated(case) for study in studies) else "")


# ----------------------------------------------------------------------------------------------------------------- page


def _page(runs: Sequence[Run], found: Sequence[Comparison], drawn: Sequence[Drawn], why_not: str) -> str:
    nothing = "" if found else paragraph("None of the runs has a single row.")
    sections = [Section("overview", "Overview", _overview(runs, found, why_not) + nothing)]
    for anchor, name in {one.anchor: one.name for one in found}.items():
        tables = "".join(_table(runs, one) for one in found if one.anchor == anchor)
        sections.append(Section(anchor, f"{name[0].upper()}{name[1:]}", figures(drawn, anchor) + tables))
    lead = " and ".join([", ".join(run.name for run in runs[:-1]), runs[-1].name])
    emulated = any(run.study.emulated(case) for run in runs for case in ALL_CASES)
    banner = "Emulated cases are among these: their figures say nothing about a GPU." if emulated else ""
    return page("Comparison of latency runs", f"{lead}; ratios are to {runs[0].name}", sections, banner)


def _overview(runs: Sequence[Run], found: Sequence[Comparison], why_not: str) -> str:
    shown, lines = [], []
    for number, run in enumerate(runs[1:], 1):
        counts = verdicts(found, number)
        told = f"slower in {counts[SLOWER]}, intervals overlap in {counts[SAME]}"
        shown.append((f"{run.name} is faster than {runs[0].name} in", f"{counts[FASTER]} figures", told))
        for one in found:
            by_word = verdicts([one], number)
            lines.append((run.name, one.name, one.pacing, *(str(by_word[word]) for word in WORDS)))
    head = (f"Against {runs[0].name}", "Metric", "Pacing", *(word.capitalize() for word in WORDS))
    counted = table("Figures told apart, by metric", head, lines, text_columns=(0, 1, 2))
    notes = [
        f"{run.name}: {TITLES[case]}: {reason}."
        for run in runs
        for case in ALL_CASES
        if case in run.study.cases and (reason := reason_of(run.study, case))
    ]
    if why_not:
        notes.append(f"This comparison has no plots: {why_not}.")
    return tiles(shown) + counted + _conditions(runs) + bullet_list(notes)


def _conditions(runs: Sequence[Run]) -> str:
    """In what the runs differ."""
    facts = [{**run.study.model, **run.study.environment, "folder": str(run.folder)} for run in runs]
    names = dict.fromkeys(name for one in facts for name in one if not isinstance(one[name], dict))
    lines = [
        (name.replace("_", " "), *("" if one.get(name) is None else str(one[name]) for one in facts))
        for name in names
        if any(one.get(name) != facts[0].get(name) for one in facts)
    ]
    alike = "" if len(lines) > 1 else paragraph("Machine, versions and model are the same.")
    every = range(len(runs) + 1)
    return table("What the runs differ in", ("", *(run.name for run in runs)), lines, text_columns=every) + alike


def _table(runs: Sequence[Run], one: Comparison) -> str:
    lengths = any(length for _, length in one.keys)
    head = ["Case", *(["Prompt tokens"] if lengths else []), f"{runs[0].name}, {one.unit}"]
    for run in runs[1:]:
        head += [f"{run.name}, {one.unit}", "Ratio", "Intervals"]
    lines, strong, soft = [], set[tuple[int, int]](), set[tuple[int, int]]()
    for number, key in enumerate(one.keys):
        line = [_title(key[0], [run.study for run in runs]), *([str(key[1])] if lengths else [])]
        for index, (run, estimates) in enumerate(zip(runs, one.estimates, strict=True)):
            line.append(_figure(estimates[key]) if key in estimates else why_empty(run.study, key[0]))
            if key not in estimates:
                soft.add((number, len(line) - 1))
            if index:
                pair = one.pairs(index).get(key)
                line += ["", ""] if pair is None else [f"{pair.ratio:.3f}", _shown(pair)]
                if pair is not None:
                    (strong if pair.verdict in (FASTER, SLOWER) else soft).add((number, len(line) - 1))
        lines.append(line)
    words = {0} | {index for index, name in enumerate(head) if name == "Intervals"}
    caption = f"{one.name} in {one.unit}" + (f", {one.pacing} pacing" if one.pacing else "")
    return table(f"{caption}, with 95 % intervals", head, lines, text_columns=words, strong=strong, soft=soft)


def _figure(one: Estimate) -> str:
    interval = "" if one.interval is None else f" ({one.interval[0]:.2f} to {one.interval[1]:.2f})"
    return f"{one.value:.2f}{interval}"


def _shown(pair: Pair) -> str:
    return f"apart: {pair.verdict}" if pair.verdict in (FASTER, SLOWER) else pair.verdict
