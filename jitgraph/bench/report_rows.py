"""Further tables of a run's report, as HTML from a study: peers, percentiles, starts, restarts, the machine."""

from __future__ import annotations

from jitgraph.bench.case_tables import STATISTICS
from jitgraph.bench.finals import AVERAGE, TIE, FinalTable, caption, final_tables, header, peer_columns
from jitgraph.bench.plan import ALL_CASES, INTERACTIVE, PROTOCOLS, WARMUP
from jitgraph.bench.plots_data import richest_rows
from jitgraph.bench.report_html import paragraph, table
from jitgraph.bench.restarts import HEAD, restart_lines, restarted_rows
from jitgraph.bench.stats import Summary
from jitgraph.bench.study import Row, Study
from jitgraph.bench.table_text import conditions, pacings_of, title

PERCENTILES = ("P50", "P90", "P95", "P99", "P99.9")
WHOLE_ANSWERS = (("e2e_ms", "a whole answer"), ("tpot_ms", "a token after the first, by answer (TPOT)"))
STARTS = (("ready_cold_s", "Ready, cold, s"), ("ready_warm_s", "Ready, warm, s"))
FIRST_TOKENS = (("first_token_cold_s", "First token, cold, s"), ("first_token_warm_s", "First token, warm, s"))


def peers_html(study: Study) -> str:
    """Other engines beside the hybrid; says how to get them where none was asked for."""
    columns = peer_columns(study)
    if not columns:
        return paragraph("No peer was asked for: jitgraph bench peers --output FOLDER adds them to a run's folder.")
    found = []
    for protocol in PROTOCOLS:
        if any(row.key.protocol == protocol for row in study.rows):
            found += [_final_html(study, protocol, one, columns) for one in final_tables(study, protocol, columns)]
    return "".join(found)


def _final_html(study: Study, protocol: str, final: FinalTable, columns: tuple[str, ...]) -> str:
    head = header(study, columns)
    won = [(number, line[-1]) for number, line in enumerate(final.lines) if line[-1] not in ("", TIE)]
    strong = {(number, column) for number, winner in won for column in (head.index(winner), len(head) - 1)}
    average = any(line[0] == AVERAGE for line in final.lines)
    shown = caption(study, protocol, final.pacing)
    return table(shown, head, final.lines, text_columns={0, len(head) - 1}, strong=strong, last_apart=average)


def percentiles_html(study: Study) -> str:
    """Every percentile with its interval: TTFT, whole answers, time per token."""
    head = ("Case", "Prompt tokens", "n", "Mean", *PERCENTILES, "Max", "Energy, J a token")
    found = []
    for metric, what in (("ttft_ms", "the first token"), *WHOLE_ANSWERS):
        for pacing in pacings_of(study):
            rows = richest_rows(study, metric, pacing, ALL_CASES)
            order = sorted(rows, key=lambda where: (ALL_CASES.index(where[0]), where[1]))
            lines = [_percentile_line(study, rows[where]) for where in order]
            if lines:
                shown = f"Time of {what} in ms, with 95 % intervals, {conditions(study, pacing)}"
                found.append(table(shown, head, lines))
    return "".join(found) or paragraph("No case has rows.")


def _percentile_line(study: Study, row: Row) -> tuple[str, ...]:
    s = row.summary
    figures = (_with_interval(s, name) for name in STATISTICS)
    energy = "" if row.energy_j_per_token is None else f"{row.energy_j_per_token:.3g}"
    return (title(study, row.key.case), str(row.key.prompt_tokens), str(s.n), *figures, f"{s.max:.2f}", energy)


def _with_interval(summary: Summary, name: str) -> str:
    value = f"{getattr(summary, name):.2f}"
    if summary.n < 2:
        return value
    low, high = getattr(summary, f"{name}_ci")
    return f"{value} ({low:.2f} to {high:.2f})"


def restarts_html(study: Study) -> str:
    """How far a case's processes lie apart."""
    rows = restarted_rows(study)
    if not rows:
        return paragraph(
            "Each case ran in one process: --restarts N shows how much its figures move between processes."
        )
    shown = "How far the means of a case's processes lie apart; every other table pools their samples"
    return table(shown, HEAD, restart_lines(study, rows), text_columns=(0, 1, 2, 3))


def cold_starts_html(study: Study) -> str:
    """Ready times with empty and with filled caches of compiled code; nothing where they were not measured."""
    names = (*STARTS, *FIRST_TOKENS)
    found = {name: study.select(WARMUP, name, INTERACTIVE) for name, _ in names}
    cases = [case for case in ALL_CASES if any((case, 0) in rows for rows in found.values())]
    if not cases:
        return ""
    lines = []
    for case in cases:
        rows = (found[name].get((case, 0)) for name, _ in names)
        lines.append((title(study, case), *("" if row is None else f"{row.summary.mean:.2f}" for row in rows)))
    shown = "From the start of a process, with every cache of compiled code empty (cold) and as that left it (warm)"
    return table(shown, ("Case", *(shown_name for _, shown_name in names)), lines)


def machine_html(study: Study) -> str:
    """Clocks, power and heat beside the rows; says so where nobody looked."""
    conditions_head = ("Case", "Metric", "Pacing", "Prompt tokens")
    head = (*conditions_head, "SM clock, MHz", "Power, W", "At most, °C", "In use, GiB", "Held by")
    lines = []
    for row in study.rows:
        m, key = row.machine, row.key
        if key.protocol in PROTOCOLS and key.metric in ("ttft_ms", "itl_ms") and m.sm_clock_mhz is not None:
            about = (title(study, key.case), key.metric, key.pacing, str(key.prompt_tokens))
            figures = (m.sm_clock_mhz, m.power_w, m.temperature_c, m.memory_used_gib)
            shown = ("" if value is None else f"{value:.4g}" for value in figures)
            lines.append((*about, *shown, m.held_by or "nothing"))
    if not lines:
        return paragraph("Clocks, power and heat were not recorded: there was no GPU whose driver tells them.")
    return table("The GPU beside the samples", head, lines, text_columns=(0, 1, 2, 8))
