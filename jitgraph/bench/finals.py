"""The comparison of cases: prompt lengths down, cases across, and who wins. Text from a study, no torch.

A case wins where its interval overlaps no other's; else the line is a *tie*, whatever the means say.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from jitgraph.bench.plan import CASES, PEER_COLUMNS, PEERS
from jitgraph.bench.remarks import remarks
from jitgraph.bench.stats import Interval, average_interval, overlap
from jitgraph.bench.study import Row, Study
from jitgraph.bench.table_text import NO_VALUE, conditions, csv_text, lengths_of, markdown_row, pacings_of, title

AVERAGE = "AVERAGE"
TIE = "tie"


@dataclass(frozen=True)
class FinalTable:
    """One pacing's comparison of the cases."""

    pacing: str
    lines: tuple[tuple[str, ...], ...]
    """Each: prompt length or ``AVERAGE``, a cell per case (empty where there is no value), the winner's title, ``TIE``,
    or nothing where there is nobody to beat."""


@dataclass(frozen=True)
class _Value:
    """What a cell is compared by."""

    value: float
    interval: Interval | None
    """None for a single sample, which wins against nobody."""


def peer_columns(study: Study) -> tuple[str, ...]:
    """Columns of the peers' tables: those of them that were asked for. None where no peer was."""
    asked = tuple(case for case in PEER_COLUMNS if case in study.cases)
    return asked if any(case in PEERS for case in asked) else ()


def final_tables(study: Study, protocol: str, cases: Sequence[str] = CASES) -> list[FinalTable]:
    """A table for each pacing that was measured, the headline first."""
    return [_final_table(study, protocol, pacing, cases) for pacing in pacings_of(study)]


def _final_table(study: Study, protocol: str, pacing: str, cases: Sequence[str]) -> FinalTable:
    found = study.select(protocol, "ttft_ms", pacing)
    lengths = lengths_of(study, protocol, cases)
    lines = []
    for length in lengths:
        here = {case: found[case, length] for case in cases if (case, length) in found}
        cells = tuple(_cell(here.get(case), protocol) for case in cases)
        values = {case: _value([row], protocol) for case, row in here.items()}
        lines.append((str(length), *cells, _winner(study, values)))
    # An average over other lengths than its neighbour's compares nothing: only complete columns have one.
    complete = [case for case in cases if lengths and all((case, length) in found for length in lengths)]
    averages = {case: _value([found[case, n] for n in lengths], protocol) for case in complete}
    cells = tuple(f"{averages[case].value:.2f}" if case in averages else "" for case in cases)
    return FinalTable(pacing, (*lines, (AVERAGE, *cells, _winner(study, averages))))


def _value(rows: Sequence[Row], protocol: str) -> _Value:
    """The average over rows; of one row, its own figure and interval."""
    ttft = protocol == "ttft"
    values = [row.summary.mean if ttft else row.summary.p99 for row in rows]
    if len(rows) == 1:
        summary = rows[0].summary
        own = summary.mean_ci if ttft else summary.p99_ci
        return _Value(values[0], own if summary.n > 1 else None)
    taken = [row.restarts for row in rows]
    interval = average_interval([row.values for row in rows], "mean" if ttft else "p99", taken)
    return _Value(sum(values) / len(values), interval)


def _cell(row: Row | None, protocol: str) -> str:
    if row is None:
        return ""
    s = row.summary
    return f"{s.mean:.2f} ± {s.std:.2f}" if protocol == "ttft" else f"{s.p99:.2f}"


def _winner(study: Study, values: Mapping[str, _Value]) -> str:
    """Title of the case with the lowest value, where no other's interval reaches its own; nobody wins alone."""
    if len(values) < 2:
        return ""
    best = min(values, key=lambda case: values[case].value)
    won = all(_apart(values[best], other) for case, other in values.items() if case != best)
    return title(study, best) if won else TIE


def _apart(one: _Value, other: _Value) -> bool:
    return one.interval is not None and other.interval is not None and not overlap(one.interval, other.interval)


def header(study: Study, cases: Sequence[str] = CASES) -> tuple[str, ...]:
    """Column titles of a final table."""
    return ("Prompt tokens", *(title(study, case) for case in cases), "Winner")


def caption(study: Study, protocol: str, pacing: str) -> str:
    """What a final table shows."""
    what = "TTFT in ms, mean ± std" if protocol == "ttft" else "P99 of TTFT in ms"
    return f"{what}, {conditions(study, pacing)}"


def final_csv(study: Study, protocol: str, tables: Sequence[FinalTable], cases: Sequence[str] = CASES) -> str:
    """The tables under each other: the pacing in the first column, what was measured on what in the last."""
    lines: list[Sequence[object]] = [("Pacing", *header(study, cases), "Conditions")]
    for table in tables:
        shown = caption(study, protocol, table.pacing)
        lines += [(table.pacing, *line, shown) for line in table.lines]
    return csv_text(lines)


def final_markdown(study: Study, protocol: str, tables: Sequence[FinalTable], cases: Sequence[str] = CASES) -> str:
    """The tables under each other, each with its caption, the winner in bold; remarks at the end."""
    parts = []
    for table in tables:
        head = header(study, cases)
        rule = "|" + "|".join(["---:"] * (len(head) - 1) + [":---"]) + "|"
        body = [_markdown_line(line) for line in table.lines]
        parts.append("\n".join([f"**{caption(study, protocol, table.pacing)}**", "", markdown_row(head), rule, *body]))
    notes = "\n".join(f"- {note}" for note in remarks(study))
    return "\n\n".join(parts + ([notes] if notes else [])) + "\n"


def _markdown_line(line: Sequence[str]) -> str:
    *cells, winner = line
    if cells[0] == AVERAGE:
        cells[0] = f"**{AVERAGE}**"
    bold = f"**{winner}**" if winner and winner != TIE else winner
    return markdown_row([*(cell or NO_VALUE for cell in cells), bold])
