"""The tables of a run: a CSV per case and protocol, and the two final tables as CSV and Markdown. Text from a study."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jitgraph.bench import jobs
from jitgraph.bench.ablation import ablation_csv, ablation_markdown, ablation_tables
from jitgraph.bench.plan import ALL_CASES, CASES, FILE_STEMS, PROTOCOLS, TITLES, WARMUP
from jitgraph.bench.records import write_json, write_text
from jitgraph.bench.stats import Summary
from jitgraph.bench.study import Row, Study
from jitgraph.bench.summary import summary_json
from jitgraph.bench.table_text import BOM, NO_VALUE, conditions, csv_text, lengths_of, markdown_row, pacings_of, title

COLUMNS = (
    *("case", "device", "emulated", "protocol", "metric", "pacing", "prompt_tokens"),
    *("n", "mean", "std", "p50", "p90", "p99", "p99_ci_low", "p99_ci_high", "min", "max"),
    *("ceiling_ms", "ratio", "peak_memory_gib", "exact", "padded", "eager", "note"),
)
AVERAGE = "AVERAGE"
DISTURBED = 3.0
"""A P99 over this many medians is remarked on."""


def write_tables(study: Study, folder: Path) -> list[Path]:
    """Writes every table and ``summary.json``; returns the files.

    Raises:
        OutputError: the folder cannot be written.
    """
    texts = {}
    measured = [protocol for protocol in PROTOCOLS if lengths_of(study, protocol, ALL_CASES)] or list(PROTOCOLS)
    for case in ALL_CASES:
        if case in study.cases:
            for protocol in measured:
                texts[f"{FILE_STEMS[case]}_{protocol}.csv"] = BOM + case_csv(study, case, protocol)
    for protocol in measured:
        tables = final_tables(study, protocol)
        texts[f"final_{protocol}_table.csv"] = BOM + final_csv(study, protocol, tables)
        texts[f"final_{protocol}_table.md"] = final_markdown(study, protocol, tables)
    if ablation := ablation_tables(study):
        texts["ablation_table.csv"] = BOM + ablation_csv(study, ablation)
        texts["ablation_table.md"] = ablation_markdown(study, ablation)
    for name, text in texts.items():
        write_text(folder / name, text)
    write_json(folder / "summary.json", summary_json(study))
    return [folder / name for name in (*texts, "summary.json")]


def case_csv(study: Study, case: str, protocol: str) -> str:
    """All rows of a case under a protocol; those of the cold start stand with ``ttft``. A case without rows has one
    line per prompt length that other cases have, its cells empty, and the reason."""
    protocols = (protocol, WARMUP) if protocol == "ttft" else (protocol,)
    rows = [row for row in study.rows if row.key.case == case and row.key.protocol in protocols]
    lines: list[Sequence[object]] = [COLUMNS, *(_csv_line(row) for row in rows)]
    if not rows:
        blank = [""] * (len(COLUMNS) - 8)
        for pacing in pacings_of(study):
            for length in lengths_of(study, protocol, ALL_CASES):
                where = [case, study.device, "", protocol, "ttft_ms", pacing, length]
                lines.append([*where, *blank, reason_of(study, case)])
    return csv_text(lines)


def _csv_line(row: Row) -> list[object]:
    key, s = row.key, row.summary
    statistics = (s.mean, s.std, s.p50, s.p90, s.p99, *s.p99_ci, s.min, s.max)
    figures = (*statistics, row.ceiling_ms, row.ratio, row.peak_memory_gib)
    return [
        *(
            key.case,
            row.device,
            "yes" if row.emulated else "no",
            key.protocol,
            key.metric,
            key.pacing,
            key.prompt_tokens,
            s.n,
        ),
        *("" if value is None else f"{value:.6g}" for value in figures),
        *(row.paths.get(path, "") for path in ("exact", "padded", "eager")),
        "; ".join(row.notes),
    ]


@dataclass(frozen=True)
class FinalTable:
    """One pacing's comparison of the cases: prompt lengths down, cases across."""

    pacing: str
    lines: tuple[tuple[str, ...], ...]
    """Each: prompt length or ``AVERAGE``, a cell per case (empty where there is no value), the winner's title."""


def final_tables(study: Study, protocol: str) -> list[FinalTable]:
    """A table for each pacing that was measured, the headline first."""
    return [_final_table(study, protocol, pacing) for pacing in pacings_of(study)]


def _final_table(study: Study, protocol: str, pacing: str) -> FinalTable:
    found = study.select(protocol, "ttft_ms", pacing)
    lengths = lengths_of(study, protocol, CASES)
    lines = []
    for length in lengths:
        here = {case: found[case, length].summary for case in CASES if (case, length) in found}
        cells = tuple(_cell(here.get(case), protocol) for case in CASES)
        lines.append((str(length), *cells, _winner(study, {case: _value(s, protocol) for case, s in here.items()})))
    # An average over other lengths than its neighbour's compares nothing: only complete columns have one.
    complete = [case for case in CASES if lengths and all((case, length) in found for length in lengths)]
    means = {case: sum(_value(found[case, n].summary, protocol) for n in lengths) / len(lengths) for case in complete}
    cells = tuple(f"{means[case]:.2f}" if case in means else "" for case in CASES)
    return FinalTable(pacing, (*lines, (AVERAGE, *cells, _winner(study, means))))


def _value(summary: Summary, protocol: str) -> float:
    return summary.mean if protocol == "ttft" else summary.p99


def _cell(summary: Summary | None, protocol: str) -> str:
    if summary is None:
        return ""
    return f"{summary.mean:.2f} ± {summary.std:.2f}" if protocol == "ttft" else f"{summary.p99:.2f}"


def _winner(study: Study, values: dict[str, float]) -> str:
    """Title of the lowest value; nobody wins alone."""
    return title(study, min(values, key=lambda case: values[case])) if len(values) > 1 else ""


def reason_of(study: Study, case: str) -> str:
    """Why a case has no values, or only some; empty where it is complete."""
    facts = study.cases.get(case)
    if facts is None:
        return "not run"
    if facts["status"] == jobs.RUNNING:
        return "the run was killed while it ran"
    return "" if facts["status"] == jobs.COMPLETE else str(facts.get("reason") or facts["status"])


def header(study: Study) -> tuple[str, ...]:
    """Column titles of a final table."""
    return ("Prompt tokens", *(title(study, case) for case in CASES), "Winner")


def caption(study: Study, protocol: str, pacing: str) -> str:
    """What a final table shows."""
    what = "TTFT in ms, mean ± std" if protocol == "ttft" else "P99 of TTFT in ms"
    return f"{what}, {conditions(study, pacing)}"


def remarks(study: Study) -> list[str]:
    """What a reader must know beside the figures, one sentence each."""
    reasons = {case: reason_of(study, case) for case in ALL_CASES if case in study.cases}
    found = [f"{TITLES[case]}: {reason}." for case, reason in reasons.items() if reason]
    if any(study.emulated(case) for case in ALL_CASES):
        found.append(
            "Emulated: on the CPU plain PyTorch stands in for the kernels and captured work is run again; "
            "such figures say nothing about a GPU."
        )
    if any(facts.get("ungated") for facts in study.cases.values()):
        found.append("Ungated: nobody checked that the cases compute the same tokens.")
    few = _few_samples(study)
    if few:
        count = str(few[0]) if len(few) == 1 else f"{few[0]} to {few[-1]}"
        found.append(f"The P99 table has only {count} samples a cell.")
    disturbed = [
        f"{TITLES[case]} ({metric} at {', '.join(map(str, lengths))} tokens)"
        for (case, metric), lengths in _disturbed(study).items()
    ]
    if disturbed:
        found.append(
            f"P99 is over {DISTURBED:.0f} times the median in {', '.join(disturbed)}: either the case pauses, or "
            "something else used this machine; measure again with the machine idle."
        )
    if any(row.ratio is not None and row.ratio < 0.999 for row in study.rows):
        found.append("Some rows are below their ceiling: the ceiling of this run is too low, or its rows are wrong.")
    return found + [f"Flag: {flag}." for flag in study.ceiling.get("flags", [])]


def _disturbed(study: Study) -> dict[tuple[str, str], list[int]]:
    """(case, metric) to the prompt lengths at which a few samples of many took far longer than the rest."""
    found: dict[tuple[str, str], list[int]] = {}
    for row in study.rows:
        key, s = row.key, row.summary
        shown = key.case in ALL_CASES and key.protocol in PROTOCOLS and key.metric in ("ttft_ms", "itl_ms")
        if shown and s.n >= 20 and s.p99 > DISTURBED * s.p50:
            lengths = found.setdefault((key.case, key.metric.removesuffix("_ms").upper()), [])
            if key.prompt_tokens not in lengths:
                lengths.append(key.prompt_tokens)
    return found


def _few_samples(study: Study) -> list[int]:
    """Sample counts of P99 rows that are too few for a 99th percentile."""
    rows = [row for row in study.rows if row.key.protocol == "p99" and row.key.metric == "ttft_ms"]
    return sorted({row.summary.n for row in rows if row.summary.n < 100})


def final_csv(study: Study, protocol: str, tables: Sequence[FinalTable]) -> str:
    """The tables under each other: the pacing in the first column, what was measured on what in the last."""
    lines: list[Sequence[object]] = [("Pacing", *header(study), "Conditions")]
    for table in tables:
        shown = caption(study, protocol, table.pacing)
        lines += [(table.pacing, *line, shown) for line in table.lines]
    return csv_text(lines)


def final_markdown(study: Study, protocol: str, tables: Sequence[FinalTable]) -> str:
    """The tables under each other, each with its caption, the winner in bold; remarks at the end."""
    parts = []
    for table in tables:
        head = header(study)
        rule = "|" + "|".join(["---:"] * (len(head) - 1) + [":---"]) + "|"
        body = [_markdown_line(line) for line in table.lines]
        parts.append("\n".join([f"**{caption(study, protocol, table.pacing)}**", "", markdown_row(head), rule, *body]))
    notes = "\n".join(f"- {note}" for note in remarks(study))
    return "\n\n".join(parts + ([notes] if notes else [])) + "\n"


def _markdown_line(line: Sequence[str]) -> str:
    *cells, winner = line
    if cells[0] == AVERAGE:
        cells[0] = f"**{AVERAGE}**"
    return markdown_row([*(cell or NO_VALUE for cell in cells), f"**{winner}**" if winner else ""])
