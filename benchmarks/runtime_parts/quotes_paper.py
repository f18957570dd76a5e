"""Blocks of figures for ``docs/from_the_paper.md``: the published tables computed again, and set beside the run of
record. Pure, no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from jitgraph.bench.plan import CASES, TITLES
from runtime_parts.quotes_text import (
    BASELINE,
    HYBRID,
    NOTHING,
    Block,
    Cells,
    Missing,
    Record,
    Sources,
    figure,
    our_cells,
    peak_gib,
    published_cells,
    shown,
    table,
)

TENSORRT = "tensorrt-llm"
Count = tuple[int, int]


def _count(found: Count | None) -> str:
    return NOTHING if found is None else f"{found[0]} of {found[1]}"


def _add(*counts: Count | None) -> Count | None:
    known = [one for one in counts if one is not None]
    return (sum(one for one, _ in known), sum(of for _, of in known)) if known else None


def _verdict(found: Count | None) -> str:
    """Whether something holds at all of the places where it was looked for."""
    if found is None:
        return "not measured"
    return "yes" if found[0] == found[1] else "no" if found[0] == 0 else "in part"


# --------------------------------------------------------------------------------------------------------------- blocks


def published_averages(sources: Sources) -> list[str]:
    """Each average as it is stated, as its ten cells give it, and in the overview of the approaches."""
    published, cells = sources.published, published_cells(sources.published)
    stated, overview = published["stated"], published["overview"]
    lines = []
    for case in CASES:
        line = [TITLES[case]]
        for which in ("ttft_ms", "p99_ms"):
            line += [
                shown(stated[f"average_{which}"][case]),
                shown(cells.average(which, case)),
                shown(overview[which][case]),
            ]
        lines.append((*line, shown(cells.average("ttft_ms", case, skip=1))))
    head = (
        *("", "TTFT, stated", "its ten cells", "overview", "P99, stated", "its ten cells", "overview"),
        "TTFT, cells without 10 tokens",
    )
    return table(head, lines)


def published_times(sources: Sources) -> list[str]:
    """The hybrid's advantage over each case: as stated, from the stated averages, and from the cells."""
    published, cells = sources.published, published_cells(sources.published)
    stated, overview = published["stated"], published["overview"]["ttft_ms"]
    lines = []
    for case in (case for case in CASES if case != HYBRID):
        line = [f"over {TITLES[case]}"]
        for which in ("ttft", "p99"):
            averages = stated[f"average_{which}_ms"]
            line += [
                shown(stated[f"{which}_times"][case]),
                shown(averages[case] / averages[HYBRID]),
                shown(cells.times(f"{which}_ms", case)),
            ]
        lines.append((*line, shown(cells.times("ttft_ms", case, skip=1)), shown(overview[case] / overview[HYBRID])))
    head = (
        *("", "TTFT, stated", "stated averages give", "cells give", "P99, stated", "stated averages give"),
        *("cells give", "TTFT, cells without 10 tokens", "TTFT, overview's averages give"),
    )
    return table(head, lines)


def published_cells_block(sources: Sources) -> list[str]:
    """What can be seen in the cells themselves."""
    cells = published_cells(sources.published)
    pairs = [(mean, tail) for case in CASES for mean, tail in zip(cells.ttft_ms[case], cells.p99_ms[case], strict=True)]
    steps = [round(a - b, 2) for a, b in zip(cells.p99_ms["jit"], cells.p99_ms[HYBRID], strict=True)]
    first, last = cells.lengths[0], cells.lengths[-1]
    spread = {case: values[0] / cells.ttft_ms[case][0] for case, values in cells.std_ms.items()}
    best = max(cells.ttft_ms[TENSORRT][at] / cells.ttft_ms[HYBRID][at] for at in range(1, len(cells.lengths)))
    stated, overview = sources.published["stated"], sources.published["overview"]
    factors = (stated["key_finding_times"], overview["key_insight_times"], stated["ttft_times"])
    over = overview["ttft_ms"][BASELINE] / overview["ttft_ms"][HYBRID]
    lines = [
        (
            "HF baseline over the hybrid as stated: key findings, overview, analysis",
            ", ".join(f"{factor[BASELINE]:.2f}" for factor in factors),
        ),
        (
            "the same from averages: the cells', the overview's",
            f"{shown(cells.times('ttft_ms', BASELINE))}, {over:.2f}",
        ),
        ("cells in which the P99 of a case is below its mean TTFT", _count((sum(t < m for m, t in pairs), len(pairs)))),
        ("P99 of JIT less P99 of the hybrid, least and most, ms", f"{min(steps):.2f} and {max(steps):.2f}"),
        *(
            (f"standard deviation over mean at {first} tokens, {TITLES[case]}", shown(value))
            for case, value in spread.items()
        ),
        (
            f"TensorRT-LLM over the hybrid at {first} tokens, TTFT",
            shown(cells.ttft_ms[TENSORRT][0] / cells.ttft_ms[HYBRID][0]),
        ),
        (f"the same at its best from {cells.lengths[1]} to {last} tokens", shown(best)),
    ]
    return table(("in the published tables", ""), lines)


def conclusions(sources: Sources) -> list[str]:
    """Each conclusion: as stated, as its own cells have it, as measured here, and whether it holds here."""
    theirs, ours = published_cells(sources.published), our_cells(sources.summary)
    if HYBRID not in ours.ttft_ms or BASELINE not in ours.ttft_ms:
        raise Missing(HYBRID)
    stated = sources.published["stated"]

    def wins(cells: Cells) -> Count | None:
        return _add(cells.wins("ttft_ms", HYBRID), cells.wins("p99_ms", HYBRID))

    def slower(cells: Cells) -> Count | None:
        return _add(cells.wins("ttft_ms", BASELINE, ["cuda-graph"]), cells.wins("p99_ms", BASELINE, ["cuda-graph"]))

    def steady(cells: Cells) -> Count | None:
        return cells.wins("std_ms", HYBRID)

    times = stated["ttft_times"]
    finding = stated["key_finding_times"]
    lines = [
        _by_count("the hybrid has the lowest TTFT and P99 of all cases", "20 of 20", wins, theirs, ours),
        _by_average(BASELINE, f"{finding[BASELINE]} and {times[BASELINE]}", theirs, ours),
        _by_average(TENSORRT, f"{finding[TENSORRT]}", theirs, ours),
        _by_average("jit", f"{times['jit']}", theirs, ours),
        _by_average("cuda-graph", f"{times['cuda-graph']}", theirs, ours),
        _by_count("graphs alone are slower than the baseline, TTFT and P99", "yes", slower, theirs, ours),
        _by_count("the hybrid's TTFT varies least (standard deviation)", "yes", steady, theirs, ours),
        _memory(sources.summary),
        _rolling(sources.record),
    ]
    head = ("conclusion", "as stated", "its cells give (without 10 tokens)", "here", "holds here")
    return table(head, lines, left=len(head))


def _by_count(
    claim: str, stated: str, count: Callable[[Cells], Count | None], theirs: Cells, ours: Cells
) -> tuple[str, ...]:
    here = count(ours)
    return (claim, stated, _count(count(theirs)), _count(here), _verdict(here))


def _by_average(other: str, stated: str, theirs: Cells, ours: Cells) -> tuple[str, ...]:
    claim, here = f"the hybrid is faster than {TITLES[other]}: average TTFT, times", ours.times("ttft_ms", other)
    cells = f"{shown(theirs.times('ttft_ms', other))} ({shown(theirs.times('ttft_ms', other, skip=1))})"
    return (claim, stated, cells, shown(here), _verdict(None if here is None else (int(here > 1), 1)))


def _memory(summary: Record) -> tuple[str, ...]:
    found: Mapping[str, float | None] = {case: peak_gib(summary, case) for case in CASES}
    known = {case: value for case, value in found.items() if value is not None}
    least = min(known, key=lambda case: known[case])
    here = f"{shown(known.get(HYBRID), '.1f')} GiB, least {known[least]:.1f} ({TITLES[least]})"
    return ("the hybrid needs little memory, the baseline much", "low, high", NOTHING, here, _less(known))


def _less(known: Mapping[str, float]) -> str:
    if HYBRID not in known or BASELINE not in known:
        return "not measured"
    return "yes" if known[HYBRID] < known[BASELINE] else "no"


def _rolling(record: Record) -> tuple[str, ...]:
    tokens, growth = figure(record, "window_stream_tokens"), figure(record, "window_graph_growth_bytes")
    here = f"a stream of {tokens:,} tokens, its graphs grew by {growth} bytes"
    return ("rolling graphs keep memory bounded at any length", "yes", NOTHING, here, "no" if growth else "yes")


def both(sources: Sources) -> list[str]:
    """Published and own TTFT of the baseline and the hybrid by length."""
    theirs, ours = published_cells(sources.published), our_cells(sources.summary)
    if list(theirs.lengths) != list(ours.lengths) or not {HYBRID, BASELINE} <= {*ours.ttft_ms}:
        raise Missing(HYBRID)
    lines = []
    for case in (BASELINE, HYBRID):
        for whose, cells in (("published", theirs), ("here", ours)):
            values = cells.ttft_ms[case]
            lines.append((f"{TITLES[case]}, {whose}", *map(shown, values), shown(cells.average("ttft_ms", case))))
    return table(("TTFT, ms", *map(str, ours.lengths), "average of the cells"), lines)


PAPER_BLOCKS: dict[str, Block] = {
    "published-averages": published_averages,
    "published-times": published_times,
    "published-cells": published_cells_block,
    "conclusions": conclusions,
    "both": both,
}
