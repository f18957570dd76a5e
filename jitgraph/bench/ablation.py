"""The ablation's table: what kernels, graphs, and the two joined are each worth on this engine. Text from a study.

A column is a case, a line a figure: TTFT by prompt length, the time between tokens, and what a decode step costs the
host (``attribution``). It is made where one of the cases that exist for it was run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from jitgraph.bench.plan import ABLATION, ABLATION_COLUMNS, PROTOCOLS
from jitgraph.bench.study import Row, Study
from jitgraph.bench.table_text import NO_VALUE, conditions, csv_text, lengths_of, markdown_row, pacings_of, title

LAUNCHES, HOST_US = "launches_per_step", "host_us_per_step"
HOST_LINES = {LAUNCHES: "launches per decode step", HOST_US: "host time per decode step, µs"}


@dataclass(frozen=True)
class AblationTable:
    """One pacing's lines, each a name and a cell per case (empty where there is no value)."""

    pacing: str
    lines: tuple[tuple[str, ...], ...]


def ablation_tables(study: Study) -> list[AblationTable]:
    """A table for each pacing that was measured; none where neither of ``ABLATION`` was run."""
    if not any(row.key.case in ABLATION for row in study.rows):
        return []
    return [AblationTable(pacing, tuple(_lines(study, pacing))) for pacing in pacings_of(study)]


def _lines(study: Study, pacing: str) -> list[tuple[str, ...]]:
    ttft, itl = (_rows(study, metric, pacing) for metric in ("ttft_ms", "itl_ms"))
    lengths = sorted({n for protocol in PROTOCOLS for n in lengths_of(study, protocol, ABLATION_COLUMNS)})
    lines = [(f"TTFT at {n} tokens, ms", *_cells(lambda case, n=n: ttft.get((case, n)))) for n in lengths]  # type: ignore[misc]
    for n in sorted({length for _, length in itl}):
        lines.append((f"decoding after {n} tokens, ms", *_cells(lambda case, n=n: itl.get((case, n)))))  # type: ignore[misc]
    facts = {case: study.cases.get(case, {}).get("attribution") or {} for case in ABLATION_COLUMNS}
    for name, shown in HOST_LINES.items():
        lines.append((shown, *(_figure(facts[case].get(name)) for case in ABLATION_COLUMNS)))
    return lines


def _rows(study: Study, metric: str, pacing: str) -> Mapping[tuple[str, int], Row]:
    """(case, prompt tokens) to the row with the most samples."""
    found: dict[tuple[str, int], Row] = {}
    for protocol in PROTOCOLS:
        for where, row in study.select(protocol, metric, pacing).items():
            if where[0] in ABLATION_COLUMNS and (where not in found or row.summary.n > found[where].summary.n):
                found[where] = row
    return found


def _cells(row_of: Callable[[str], Row | None]) -> list[str]:
    rows = [row_of(case) for case in ABLATION_COLUMNS]
    return ["" if row is None else f"{row.summary.mean:.2f} ± {row.summary.std:.2f}" for row in rows]


def _figure(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.3g}" if value < 1 else f"{value:.1f}"


def ablation_header(study: Study) -> tuple[str, ...]:
    """Column titles."""
    return ("", *(title(study, case) for case in ABLATION_COLUMNS))


def ablation_caption(study: Study, pacing: str) -> str:
    """What a table shows."""
    return f"What each part is worth, mean ± std, {conditions(study, pacing)}"


def ablation_csv(study: Study, tables: Sequence[AblationTable]) -> str:
    """The tables under each other: the pacing in the first column, what was measured on what in the last."""
    lines: list[Sequence[object]] = [("Pacing", *ablation_header(study), "Conditions")]
    for table in tables:
        lines += [(table.pacing, *line, ablation_caption(study, table.pacing)) for line in table.lines]
    return csv_text(lines)


def ablation_markdown(study: Study, tables: Sequence[AblationTable]) -> str:
    """The tables under each other, each with its caption."""
    head = ablation_header(study)
    rule = "|" + "|".join([":---", *["---:"] * (len(head) - 1)]) + "|"
    parts = []
    for table in tables:
        body = [markdown_row([name, *(cell or NO_VALUE for cell in cells)]) for name, *cells in table.lines]
        caption = f"**{ablation_caption(study, table.pacing)}**"
        parts.append("\n".join([caption, "", markdown_row(head), rule, *body]))
    return "\n\n".join(parts) + "\n"
