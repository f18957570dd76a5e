"""``report.html``: one run as one page that needs nothing else, and its plots as files. All from a study's raw samples.

Nothing is measured here, and the same record gives the same page. Where matplotlib is missing, the page has no plots
and says how to get them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from jitgraph.bench.plan import ALL_CASES
from jitgraph.bench.plots import FOLDER as PLOTS
from jitgraph.bench.plots import Drawn, draw, missing_reason, write_plots
from jitgraph.bench.plots_run import run_plots
from jitgraph.bench.records import write_text
from jitgraph.bench.remarks import remarks
from jitgraph.bench.report_approaches import write_approaches
from jitgraph.bench.report_html import Section, bullet_list, figures, page, paragraph
from jitgraph.bench.report_rows import cold_starts_html, machine_html, peers_html, percentiles_html, restarts_html
from jitgraph.bench.report_runtime import host_cost, padding_cost
from jitgraph.bench.report_sections import (
    ablation_html,
    all_rows_html,
    approaches_html,
    environment_html,
    final_html,
    gaps_html,
    headline_tiles,
    start_html,
)
from jitgraph.bench.study import Study

FILE = "report.html"
BANNER = (
    "Emulated: on the CPU plain PyTorch stands in for kernels and graphs. The figures show that everything runs; "
    "they say nothing about a GPU."
)


def write_report(study: Study, folder: Path, target: Path | None = None) -> list[Path]:
    """Writes the page (to ``target``, else into the folder), its plots, and the tables that it adds to the others.

    Raises:
        OutputError: a file cannot be written, or a record that it reads is damaged.
    """
    target = target or folder / FILE
    host, padding = host_cost(study, folder), padding_cost(study, folder)
    why_not = missing_reason()
    if why_not and (folder / PLOTS).exists():
        why_not += f"; what {folder / PLOTS} holds is of an earlier report"
    drawn = [] if why_not else [draw(plot) for plot in run_plots(study, host, padding)]
    files = write_approaches(study, folder)
    files += write_plots(drawn, folder) if drawn else []
    sections = [
        Section("overview", "Overview", _overview(study, why_not)),
        Section("ttft", "Time to the first token", figures(drawn, "ttft") + final_html(study, "ttft")),
        Section("p99", "Its 99th percentile", figures(drawn, "p99") + final_html(study, "p99")),
        Section("distributions", "Distributions", _distributions(drawn)),
        Section("itl", "Between tokens", figures(drawn, "itl") + gaps_html(study)),
        Section("percentiles", "Percentiles", percentiles_html(study)),
        Section("start", "Start and memory", figures(drawn, "startup") + start_html(study) + cold_starts_html(study)),
        Section("restarts", "Restarts", restarts_html(study)),
        Section("peers", "Peers", peers_html(study)),
        Section("approaches", "Approaches", figures(drawn, "approaches") + approaches_html(study)),
        Section("ablation", "Ablation", figures(drawn, "ablation") + ablation_html(study, host, padding)),
        Section("conditions", "Conditions", environment_html(study) + machine_html(study)),
        Section("rows", "All rows", all_rows_html(study) or paragraph("No case has rows.")),
    ]
    banner = BANNER if any(study.emulated(case) for case in ALL_CASES) else ""
    write_text(target, page("Latency report", _lead(study), sections, banner))
    return [*files, target]


def _lead(study: Study) -> str:
    model = study.model
    return f"{model['name']}, {model['weights']} weights, {model['dtype']}, batch 1, on {study.device}"


def _overview(study: Study, why_not: str) -> str:
    notes = remarks(study) + ([f"This report has no plots: {why_not}."] if why_not else [])
    heading = paragraph("What to know beside the figures:") if notes else ""
    return headline_tiles(study) + heading + bullet_list(notes)


def _distributions(drawn: Sequence[Drawn]) -> str:
    return figures(drawn, "cdf") or paragraph("Distributions are plots; this report has none of them.")
