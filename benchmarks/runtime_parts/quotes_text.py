"""What the blocks of figures share: the records they read, the cells of two tables, Markdown lines. Pure, no torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jitgraph.bench.plan import ABLATION, CASES, TITLES

Record = Mapping[str, Any]
NOTHING = "\u2013"
"""Stands where there is no figure."""
HYBRID, BASELINE = "hybrid", "baseline"


class Missing(Exception):
    """The records lack a figure."""


@dataclass(frozen=True)
class Sources:
    """All that documents may quote."""

    record: Record
    """``runtime.json``."""
    summary: Record
    """The five cases' ``summary.json``."""
    published: Record = field(default_factory=dict)
    """``benchmarks/published.json``: the tables that the paper's repository shows."""


Block = Callable[[Sources], list[str]]


def figure(record: Record, name: str) -> Any:
    """A figure of ``runtime.json``.

    Raises:
        Missing: it has none of this name.
    """
    if name not in record.get("figures", {}):
        raise Missing(name)
    return record["figures"][name]


def table(head: Sequence[str], lines: Iterable[Sequence[str]], left: int = 1) -> list[str]:
    """Markdown lines; the first ``left`` columns are words, the others figures."""
    rule = [":---"] * left + ["---:"] * (len(head) - left)
    return [f"| {' | '.join(line)} |" for line in (head, rule, *lines)]


def shown(value: float | None, form: str = ".2f", unit: str = "") -> str:
    """A figure, or what stands for none."""
    return NOTHING if value is None else f"{value:{form}}{unit}"


# --------------------------------------------------------------------------------------------- rows of the five cases


def rows(summary: Record) -> dict[tuple[str, str, str, int], Record]:
    """(case, protocol, metric, prompt tokens) to the row under interactive pacing."""
    found = [row for row in summary.get("rows", []) if row["pacing"] == "interactive"]
    return {(row["case"], row["protocol"], row["metric"], row["prompt_tokens"]): row for row in found}


def lengths(summary: Record) -> list[int]:
    """Prompt lengths at which the time to the first token was measured.

    Raises:
        Missing: at none.
    """
    found = {n for case, protocol, metric, n in rows(summary) if (protocol, metric) == ("ttft", "ttft_ms")}
    if not found - {1}:
        raise Missing("ttft_ms")
    return sorted(found - {1})  # one token is the matrix products' alone


def column(summary: Record, case: str, protocol: str, statistic: str) -> list[float] | None:
    """A statistic of TTFT at every length; None where the case lacks one."""
    found = rows(summary)
    keys = [(case, protocol, "ttft_ms", n) for n in lengths(summary)]
    return [float(found[key][statistic]) for key in keys] if all(key in found for key in keys) else None


def cases_shown(summary: Record) -> list[str]:
    """The five, measured or not, and what else was measured beside them; the ablation has a table of its own."""
    others = (case for case in TITLES if case not in (*CASES, *ABLATION))
    return [*CASES, *(case for case in others if column(summary, case, "ttft", "mean") is not None)]


def between_tokens_ms(summary: Record, case: str, tokens: int) -> float | None:
    """Mean time between tokens after a prompt; of the protocol with more requests, where both have it."""
    found = rows(summary)
    keys = [key for protocol in ("p99", "ttft") if (key := (case, protocol, "itl_ms", tokens)) in found]
    return float(found[keys[0]]["mean"]) if keys else None


def ready_s(summary: Record, case: str) -> float | None:
    """Process start to ready."""
    row = rows(summary).get((case, "warmup", "ready_s", 0))
    return None if row is None else float(row["mean"])


def peak_gib(summary: Record, case: str) -> float | None:
    """Most memory that the case held."""
    found = [row["peak_memory_gib"] for row in summary.get("rows", []) if row["case"] == case]
    known = [float(value) for value in found if value is not None]
    return max(known) if known else None


def mean(values: Sequence[float] | None) -> float | None:
    """Arithmetic mean; None of None."""
    return None if values is None else sum(values) / len(values)


@dataclass(frozen=True)
class Cells:
    """The two tables of a study, published or our own: case to a figure for each length. Only whole columns."""

    lengths: Sequence[int]
    ttft_ms: Mapping[str, Sequence[float]]
    p99_ms: Mapping[str, Sequence[float]]
    std_ms: Mapping[str, Sequence[float]]

    def average(self, which: str, case: str, skip: int = 0) -> float | None:
        """Mean of a column (``ttft_ms``, ``p99_ms``) without its first ``skip`` lengths."""
        values = getattr(self, which).get(case)
        return None if values is None else mean(values[skip:])

    def times(self, which: str, other: str, case: str = HYBRID, skip: int = 0) -> float | None:
        """How many times the average of ``case`` that of ``other`` is."""
        over, under = self.average(which, other, skip), self.average(which, case, skip)
        return None if over is None or under is None else over / under

    def wins(self, which: str, case: str, others: Iterable[str] | None = None) -> tuple[int, int] | None:
        """At how many lengths a case has the lowest figure, and of how many; None where it or all others are absent."""
        columns = getattr(self, which)
        rivals = [columns[other] for other in (others or columns) if other != case and other in columns]
        if case not in columns or not rivals:
            return None
        best = [all(value < rival[at] for rival in rivals) for at, value in enumerate(columns[case])]
        return sum(best), len(best)


def our_cells(summary: Record) -> Cells:
    """The run of record's."""
    columns: dict[str, dict[str, list[float]]] = {}
    for name, protocol, statistic in (("ttft", "ttft", "mean"), ("p99", "p99", "p99"), ("std", "ttft", "std")):
        found = {case: column(summary, case, protocol, statistic) for case in cases_shown(summary)}
        columns[name] = {case: values for case, values in found.items() if values is not None}
    return Cells(lengths(summary), columns["ttft"], columns["p99"], columns["std"])


def published_cells(published: Record) -> Cells:
    """The paper's repository's.

    Raises:
        Missing: they were not given.
    """
    if not published:
        raise Missing("published")
    return Cells(published["lengths"], published["ttft_ms"], published["p99_ms"], published["ttft_std_ms"])
