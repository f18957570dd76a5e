"""The tables of a run's report, as HTML from a study: final tables, time between tokens, start, ablation, and so on."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

from jitgraph.bench.ablation import HOST_LINES, HOST_US, LAUNCHES, ablation_caption, ablation_header, ablation_tables
from jitgraph.bench.case_tables import case_csv
from jitgraph.bench.finals import AVERAGE, TIE, caption, final_tables, header
from jitgraph.bench.plan import ABLATION_COLUMNS, ALL_CASES, CASES, INTERACTIVE, PROTOCOLS, TITLES, WARMUP
from jitgraph.bench.plots_data import common_means_ms, peak_memory_gib, richest_rows, start_ups
from jitgraph.bench.plots_draw import short
from jitgraph.bench.remarks import reason_of
from jitgraph.bench.report_approaches import (
    APPROACH_HEAD,
    HYBRID,
    SPEEDUP_HEAD,
    approach_caption,
    approach_lines,
    averages,
    no_speedups,
    speedup_caption,
    speedup_lines,
)
from jitgraph.bench.report_html import bullet_list, details, paragraph, side_by_side, table, tiles
from jitgraph.bench.report_runtime import HostCost, Padding
from jitgraph.bench.study import Row, Study
from jitgraph.bench.table_text import EMULATED, conditions, pacings_of, title

PARTS = (
    ("graphs around all kernels", "jit-all", HYBRID),
    ("kernels inside the graphs", "cuda-graph", HYBRID),
    ("one graph instead of graphs and kernels in turn", "split", HYBRID),
    ("kernels for the static ops as well, no graph", "jit", "jit-all"),
    ("kernels and graphs together", "baseline", HYBRID),
)
"""What is added, the case without it, the case with it."""


def why_empty(study: Study, case: str) -> str:
    """In few words, why a cell has no figure."""
    facts = study.cases.get(case)
    if facts is None:
        return "not run"
    return "not measured" if facts["status"] == "complete" else str(facts["status"])


def reasons(study: Study, cases: Sequence[str]) -> str:
    """Under a table: the whole reason of each case that has no figures, or only some."""
    told = [(case, reason_of(study, case)) for case in cases if case in study.cases]
    return "".join(paragraph(f"{TITLES[case]}: {reason}.", "soft") for case, reason in told if reason)


def headline_tiles(study: Study) -> str:
    """The hybrid's averages beside the baseline's, and how often it is first."""
    pacing, name = pacings_of(study)[0], title(study, HYBRID)
    label = EMULATED if study.emulated(HYBRID) else ""
    found = []
    for protocol, what in (("ttft", "TTFT"), ("p99", "P99 of TTFT")):
        cells = averages(study, protocol, pacing)
        if cells[HYBRID]:
            found.append((f"{what}, average{label}", f"{cells[HYBRID]} ms", _beside(study, cells)))
    gaps = {case: f"{gap:.2f}" for case, gap in common_means_ms(study, "itl_ms", pacing, ALL_CASES).items()}
    if HYBRID in gaps:
        found.append((f"Between tokens, average{label}", f"{gaps[HYBRID]} ms", _beside(study, gaps)))
    winners = [line[-1] for p in PROTOCOLS for one in final_tables(study, p) for line in one.lines[:-1] if line[-1]]
    if winners:
        first = sum(winner == name for winner in winners)
        found.append((f"{name} comes first in", f"{first} of {len(winners)}", "cells of the final tables"))
    return tiles(found)


def _beside(study: Study, cells: Mapping[str, str]) -> str:
    other = cells.get("baseline")
    return f"{title(study, 'baseline')}: {other} ms" if other else title(study, HYBRID)


def final_html(study: Study, protocol: str) -> str:
    """The final tables of a protocol, the winner of each line standing out."""
    if not any(row.key.protocol == protocol and row.key.case in CASES for row in study.rows):
        return paragraph("Not measured in this run: its iterations were 0, or no case came so far.")
    head, found = header(study), []
    for final in final_tables(study, protocol):
        lines, soft, strong = [], set(), set()
        for number, line in enumerate(final.lines):
            cells = list(line)
            for column, case in enumerate(CASES, 1):
                if not cells[column]:
                    cells[column] = "" if line[0] == AVERAGE else why_empty(study, case)
                    soft.add((number, column))
            if cells[-1] == TIE:
                soft.add((number, len(cells) - 1))
            elif cells[-1]:
                strong.add((number, len(cells) - 1))
                strong |= {(number, column) for column in range(1, len(cells) - 1) if head[column] == cells[-1]}
            cells[-1] = cells[-1].removesuffix(EMULATED)  # its column's title says so
            lines.append(cells)
        words = {0, len(head) - 1}
        found.append(
            table(
                caption(study, protocol, final.pacing),
                head,
                lines,
                text_columns=words,
                strong=strong,
                soft=soft,
                last_apart=True,
            )
        )
    return "".join(found) + reasons(study, CASES)


def gaps_html(study: Study) -> str:
    """The time between tokens, a table for each pacing."""
    head = ("Case", "Prompt tokens", "n", "Mean ± std, ms", "P50", "P90", "P99", "95 % interval", "Max", "Over ceiling")
    found = []
    for pacing in pacings_of(study):
        rows = richest_rows(study, "itl_ms", pacing, ALL_CASES)
        order = sorted(rows, key=lambda where: (ALL_CASES.index(where[0]), where[1]))
        if rows:
            lines = [_gap_line(study, rows[where]) for where in order]
            found.append(table(f"Time between tokens in ms, {conditions(study, pacing)}", head, lines))
    return "".join(found) or paragraph("No case got as far as the time between tokens.")


def _gap_line(study: Study, row: Row) -> tuple[str, ...]:
    s = row.summary
    figures = (f"{value:.2f}" for value in (s.p50, s.p90, s.p99))
    interval = f"{s.p99_ci[0]:.2f} to {s.p99_ci[1]:.2f}"
    ratio = "" if row.ratio is None else f"{row.ratio:.2f}"
    about = (title(study, row.key.case), str(row.key.prompt_tokens), str(s.n), f"{s.mean:.2f} ± {s.std:.2f}")
    return (*about, *figures, interval, f"{s.max:.2f}", ratio)


def start_html(study: Study) -> str:
    """Ready time, the first request of the process, and memory."""
    first = study.select(WARMUP, "ttft_ms", INTERACTIVE)
    lengths = sorted({n for case, n in first if case in ALL_CASES})[:1]
    memory, lines = peak_memory_gib(study), []
    for start in start_ups(study):
        row = first.get((start.case, lengths[0])) if lengths else None
        cold = f"{row.summary.mean:.1f}" if row else ""
        phases = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in start.phases)
        held = f"{memory[start.case]:.2f}" if start.case in memory else ""
        lines.append((start.title, f"{start.ready_s:.2f}", cold, held, phases))
    if not lines:
        return paragraph("No case became ready.")
    at = f" at {lengths[0]} tokens" if lengths else ""
    head = ("Case", "Ready, s", f"First request{at}, ms", "Peak memory, GiB", "Phases")
    return table("The cold start, one sample each", head, lines, text_columns=(0, 4)) + reasons(study, ALL_CASES)


def approaches_html(study: Study) -> str:
    """Summary by approach and speed-up analysis."""
    lines, soft = [], set()
    for number, (case, cells) in enumerate(zip(CASES, approach_lines(study), strict=True)):
        empty = {column for column in range(1, 6) if not cells[column]}
        soft |= {(number, column) for column in empty}
        lines.append([why_empty(study, case) if i in empty else cell for i, cell in enumerate(cells[:-1])])
    summary = table(approach_caption(study), APPROACH_HEAD[:-1], lines, text_columns=(0, 6, 7), soft=soft)
    summary += reasons(study, CASES)
    compared = speedup_lines(study)
    if not compared:
        return summary + paragraph(no_speedups(study))
    return summary + table(speedup_caption(study), SPEEDUP_HEAD, compared, text_columns=(0, 1, 2))


def ablation_html(study: Study, host: HostCost, padding: Padding | None) -> str:
    """What each part is worth, what a step costs the host, and padding."""
    gains = ("TTFT, times as fast", "Between tokens, times as fast", "Host time, times less")
    head = ("What is added", "Without", "With", *gains)
    lines = [_part_line(study, host, *part) for part in PARTS]
    pacing = pacings_of(study)[0]
    shown = f"The effect of each part, from the rows with the most samples, {conditions(study, pacing)}"
    found = [table(shown, head, lines, text_columns=(0, 1, 2))]
    host_lines = [
        (shown, *(short(values[case]) if case in values else _no_host(study, case) for case in ABLATION_COLUMNS))
        for (name, shown), values in zip(HOST_LINES.items(), (host.launches, host.host_us), strict=True)
    ]
    assert list(HOST_LINES) == [LAUNCHES, HOST_US], "the values above stand in this order"
    found.append(table("What a decode step costs the host", ablation_header(study), host_lines))
    for one in ablation_tables(study):
        found.append(table(ablation_caption(study, one.pacing), ablation_header(study), one.lines))
    notes = list(host.sources)
    if not ablation_tables(study):
        notes.append("The cases that exist for the ablation alone were not run: jitgraph bench ablation runs them.")
    if padding is None:
        notes.append(
            "Padding cost: not in this folder's record; python benchmarks/runtime.py --parts unseen measures it."
        )
    else:
        notes.append(
            f"Padding costs the first request of an unseen length {100 * (padding.mean_ratio - 1):.1f} % on average "
            f"and {100 * (max(padding.ratios.values()) - 1):.1f} % at most, {padding.source}."
        )
    return "".join(found) + bullet_list(notes)


def _no_host(study: Study, case: str) -> str:
    return "not told" if case in study.cases else "not run"


def _part_line(study: Study, host: HostCost, what: str, without: str, having: str) -> tuple[str, ...]:
    pacing = pacings_of(study)[0]
    ttft = _average_ratio(richest_rows(study, "ttft_ms", pacing, ALL_CASES), without, having)
    gaps = _average_ratio(richest_rows(study, "itl_ms", pacing, ALL_CASES), without, having)
    told = without in host.host_us and having in host.host_us
    less = short(host.host_us[without] / host.host_us[having]) if told else "not told"
    missing = next((case for case in (without, having) if case not in study.cases), None)
    nothing = f"{TITLES[missing]}: not run" if missing else "not measured"
    return (what, title(study, without), title(study, having), ttft or nothing, gaps or nothing, less)


def _average_ratio(rows: Mapping[tuple[str, int], Row], without: str, having: str) -> str:
    lengths = [n for case, n in rows if case == without and (having, n) in rows]
    if not lengths:
        return ""
    slow, fast = (sum(rows[case, n].summary.mean for n in lengths) for case in (without, having))
    return f"{slow / fast:.2f}"


def environment_html(study: Study) -> str:
    """The machine, the model, the ceiling, and what each case says of itself."""
    parts = [
        side_by_side(
            table("Machine and versions", ("", ""), _pairs(study.environment), text_columns=(0, 1)),
            table("Model", ("", ""), _pairs(study.model), text_columns=(0, 1)),
        )
    ]
    if study.ceiling:
        names = ("read_tb_s", "copy_tb_s", "gemm_tflops")
        lines = [
            (pacing, *(f"{rates[name]:.4g}" for name in names)) for pacing, rates in study.ceiling["by_pacing"].items()
        ]
        head = ("Pacing", "Read, TB/s", "Copy, TB/s", "Matrix products, TFLOP/s")
        parts.append(table("Ceilings: the best that anything reached on this machine", head, lines))
    else:
        parts.append(paragraph("No ceiling was measured in this run."))
    cases = [case for case in ALL_CASES if case in study.cases]
    told = {case: _flat(study.cases[case]) for case in cases}
    names_told = list(dict.fromkeys(name for facts in told.values() for name in facts))
    lines = [(name, *(told[case].get(name, "") for case in cases)) for name in names_told]
    every = range(len(cases) + 1)
    parts.append(
        table("What each case says of itself", ("", *(title(study, c) for c in cases)), lines, text_columns=every)
    )
    return "".join(parts)


def _pairs(facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [(name.replace("_", " "), _words(value)) for name, value in facts.items() if not isinstance(value, dict)]


def _flat(facts: Mapping[str, Any]) -> dict[str, str]:
    """Facts that fit a cell; a plan's stand beside the others, longer ones stay in ``summary.json``."""
    whole = {**facts, **(facts.get("plan") or {})}
    return {
        name.replace("_", " "): _words(value)
        for name, value in whole.items()
        if not isinstance(value, dict) and name != "reason"
    }


def _words(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value)) or "none"
    if value is None:
        return "unknown"
    return f"{value:,}" if isinstance(value, int) and value >= 10_000 else str(value)


def all_rows_html(study: Study) -> str:
    """Every row, as in the cases' CSV files."""
    found = []
    for case in ALL_CASES:
        for protocol in PROTOCOLS if case in study.cases else ():
            head, *lines = csv.reader(io.StringIO(case_csv(study, case, protocol)))
            if lines:
                words = [i for i, name in enumerate(head) if name in ("case", "device", "metric", "pacing", "note")]
                shown = table(f"{title(study, case)}, {protocol}", head, lines, text_columns=words)
                found.append(details(f"{title(study, case)}, {protocol}: {len(lines)} rows", shown))
    return "".join(found)
