"""What a load run shows in the terminal: a line of progress, then a table. Owns nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from jitgraph.bench.load.records import CANCELLED, ERROR, OK, Record

_ROWS = (
    ("TTFT", "ttft_ms"),
    ("TPOT", "tpot_ms"),
    ("gap between tokens", "itl_ms"),
    ("end to end", "e2e_ms"),
    ("queue delay", "queue_ms"),
)
_COLUMNS = ("n", "mean", "p50", "p90", "p95", "p99", "max")


def progress_line(seconds: float, wanted: int, running: int, records: Sequence[Record]) -> str:
    """How far a run is."""
    counts = {outcome: sum(record.outcome == outcome for record in records) for outcome in (OK, CANCELLED, ERROR)}
    line = f"{seconds:.0f} s: {len(records)} of {wanted} done, {running} running"
    if counts[CANCELLED]:
        line += f", {counts[CANCELLED]} cancelled"
    if counts[ERROR]:
        line += f", {counts[ERROR]} failed"
    first = [record.ttft_ms for record in records if record.outcome == OK and record.ttft_ms is not None]
    return f"{line}; TTFT P50 {np.median(first):.2f} ms" if first else line


def show_figures(console: Console, found: dict[str, Any]) -> None:
    """The table and what belongs below it."""
    counts = found["requests"]
    title = f"{counts['ok']} whole answers in {found['duration_s']:.1f} s, times in ms"
    table = Table(title=title, title_justify="left")
    table.add_column("")
    for name in _COLUMNS:
        table.add_column(name.upper() if name.startswith("p") else name, justify="right")
    for name, key in _ROWS:
        if (row := found[key]) is not None:
            table.add_row(name, str(row["n"]), *(f"{row[column]:.2f}" for column in _COLUMNS[1:]))
    if table.row_count:
        console.print(table)
    for line in remarks(found):
        console.print(escape(line), highlight=False)


def remarks(found: dict[str, Any]) -> list[str]:
    """Rates, goodput, and what did not go as asked, a sentence each."""
    counts = found["requests"]
    lines = []
    if counts["ok"]:
        lines.append(f"{found['requests_per_s']:.2f} requests/s, {found['output_tokens_per_s']:.1f} output tokens/s")
    if (good := found["goodput"]) and good["share"] is not None:
        within = ", ".join(f"{limit} {'kept' if kept else 'missed'}" for limit, kept in good["p99_within"].items())
        rate = f"{good['requests_per_s']:.2f} requests/s, " if good["requests_per_s"] is not None else ""
        lines.append(f"goodput {rate}{good['share']:.1%} within {', '.join(good['limits'])}; P99: {within}")
    if counts["cancelled"]:
        lines.append(f"{counts['cancelled']} cancelled as planned, after {found['cancelled']['tokens']} tokens in all")
    if found["shorter_than_asked"]:
        lines.append(f"{found['shorter_than_asked']} answers were shorter than asked")
    lines += [f"{count} failed: {kind}" for kind, count in found["errors_by_kind"].items()]
    return lines
