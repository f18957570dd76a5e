"""Small text that every table is made of: titles, CSV and Markdown lines, conditions in words. No torch, owns nothing.

CSV files begin with a byte order mark: spreadsheets take UTF-8 for what it is only then.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence

from jitgraph.bench.plan import INTERACTIVE, PACINGS, PROTOCOLS, TITLES
from jitgraph.bench.study import Study

BOM = "\ufeff"
EMULATED = " (emulated)"
"""Follows the title of a case whose kernels and graphs the CPU imitates."""
NO_VALUE = "\u2013"


def title(study: Study, case: str) -> str:
    """A case's title; an emulated case says so."""
    return TITLES[case] + (EMULATED if study.emulated(case) else "")


def pacings_of(study: Study) -> list[str]:
    """Pacings with rows, headline first."""
    present = {row.key.pacing for row in study.rows if row.key.protocol in PROTOCOLS}
    return [pacing for pacing in PACINGS if pacing in present] or [INTERACTIVE]


def lengths_of(study: Study, protocol: str, cases: Sequence[str]) -> list[int]:
    """Prompt lengths at which any of ``cases`` was measured."""
    keys = [row.key for row in study.rows if row.key.case in cases]
    return sorted({key.prompt_tokens for key in keys if key.protocol == protocol and key.metric == "ttft_ms"})


def conditions(study: Study, pacing: str) -> str:
    """Pacing, model and device of a table."""
    pause = "50 ms pause before each request" if pacing == INTERACTIVE else "back to back"
    model = study.model
    subject = f"{model['name']}, {model['weights']} weights, {model['dtype']}, on {study.device}"
    return f"{pacing} pacing ({pause}): {subject}"


def csv_text(lines: Sequence[Sequence[object]]) -> str:
    """Lines of cells as CSV."""
    text = io.StringIO(newline="")
    csv.writer(text).writerows(lines)
    return text.getvalue()


def markdown_row(cells: Sequence[str]) -> str:
    """One line of a Markdown table."""
    return "| " + " | ".join(cells) + " |"
