"""Writes the tables of a run: a CSV per case and protocol, comparisons as CSV and Markdown, ``summary.json``."""

from __future__ import annotations

from pathlib import Path

from jitgraph.bench.ablation import ablation_csv, ablation_markdown, ablation_tables
from jitgraph.bench.case_tables import case_csv
from jitgraph.bench.finals import final_csv, final_markdown, final_tables, peer_columns
from jitgraph.bench.plan import ALL_CASES, CASES, FILE_STEMS, PROTOCOLS
from jitgraph.bench.records import write_json, write_text
from jitgraph.bench.restarts import restart_csv, restart_markdown, restarted_rows
from jitgraph.bench.study import Study
from jitgraph.bench.summary import summary_json
from jitgraph.bench.table_text import BOM, lengths_of


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
    for name, cases in (("final", CASES), ("peers", peer_columns(study))):
        for protocol in measured if cases else ():
            tables = final_tables(study, protocol, cases)
            texts[f"{name}_{protocol}_table.csv"] = BOM + final_csv(study, protocol, tables, cases)
            texts[f"{name}_{protocol}_table.md"] = final_markdown(study, protocol, tables, cases)
    if ablation := ablation_tables(study):
        texts["ablation_table.csv"] = BOM + ablation_csv(study, ablation)
        texts["ablation_table.md"] = ablation_markdown(study, ablation)
    if restarted := restarted_rows(study):
        texts["restart_table.csv"] = BOM + restart_csv(study, restarted)
        texts["restart_table.md"] = restart_markdown(study, restarted)
    for file, text in texts.items():
        write_text(folder / file, text)
    write_json(folder / "summary.json", summary_json(study))
    return [folder / file for file in (*texts, "summary.json")]
