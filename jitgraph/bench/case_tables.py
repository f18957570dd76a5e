"""The CSV of one case and protocol: every row with all its figures. Text from a study, no torch."""

from __future__ import annotations

from collections.abc import Sequence

from jitgraph.bench.plan import ALL_CASES, WARMUP
from jitgraph.bench.remarks import reason_of
from jitgraph.bench.study import Row, Study
from jitgraph.bench.table_text import csv_text, lengths_of, pacings_of

STATISTICS = ("mean", "p50", "p90", "p95", "p99", "p999")
"""Each with its interval, which a single sample does not have."""
COLUMNS = (
    *("case", "device", "emulated", "protocol", "metric", "pacing", "prompt_tokens", "n", "std", "min", "max"),
    *(name for one in STATISTICS for name in (one, f"{one}_ci_low", f"{one}_ci_high")),
    *("ceiling_ms", "ratio", "peak_memory_gib", "host_memory_gib", "energy_j_per_token"),
    *("sm_clock_mhz", "power_w", "temperature_c", "device_memory_gib", "clocks_held_by", "restarts"),
    *("exact", "padded", "eager", "note"),
)


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
    key, s, machine = row.key, row.summary, row.machine
    spread: list[float | None] = [s.std, s.min, s.max]
    for name in STATISTICS:
        interval = getattr(s, f"{name}_ci") if s.n > 1 else (None, None)
        spread += [getattr(s, name), *interval]
    figures = [*spread, row.ceiling_ms, row.ratio, row.peak_memory_gib, row.host_memory_gib, row.energy_j_per_token]
    figures += [machine.sm_clock_mhz, machine.power_w, machine.temperature_c, machine.memory_used_gib]
    emulated = "yes" if row.emulated else "no"
    return [
        *(key.case, row.device, emulated, key.protocol, key.metric, key.pacing, key.prompt_tokens, s.n),
        *("" if value is None else f"{value:.6g}" for value in figures),
        *(machine.held_by, len(set(row.restarts)) or 1),
        *(row.paths.get(path, "") for path in ("exact", "padded", "eager")),
        "; ".join(row.notes),
    ]
