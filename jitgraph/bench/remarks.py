"""What a reader must know beside a run's figures, in sentences. Text from a study, no torch."""

from __future__ import annotations

from jitgraph.bench import jobs
from jitgraph.bench.plan import ALL_CASES, PROTOCOLS, TITLES
from jitgraph.bench.study import Study

DISTURBED = 3.0
"""A P99 over this many medians is remarked on."""


def reason_of(study: Study, case: str) -> str:
    """Why a case has no values, or only some; empty where it is complete."""
    facts = study.cases.get(case)
    if facts is None:
        return "not run"
    if facts["status"] == jobs.RUNNING:
        return "the run was killed while it ran"
    return "" if facts["status"] == jobs.COMPLETE else str(facts.get("reason") or facts["status"])


def remarks(study: Study) -> list[str]:
    """What a reader must know beside the figures, one sentence each."""
    reasons = {case: reason_of(study, case) for case in ALL_CASES if case in study.cases}
    found = [f"{TITLES[case]}: {reason}." for case, reason in reasons.items() if reason]
    if any(study.emulated(case) for case in ALL_CASES):
        found.append(
            "Emulated: on the CPU plain PyTorch stands in for the kernels and captured work is run again; "
            "such figures say nothing about a GPU."
        )
    if any(facts.get("ungated") for facts in study.cases.values()):
        found.append("Ungated: nobody checked that the cases compute the same tokens.")
    if others := sorted({str(facts["shared_gpu"]) for facts in study.cases.values() if facts.get("shared_gpu")}):
        found.append(f"The GPU was in use by others while cases ran ({'; '.join(others)}): measure again alone.")
    if any("cached prompts" in row.notes for row in study.rows):
        found.append("A server answered from its cache of earlier prompts: switch that off, or its times mean nothing.")
    if taken := _turns(study):
        found.append(f"Cases took turns ({taken}): their rows are to be compared with each other alone.")
    few = _few_samples(study)
    if few:
        count = str(few[0]) if len(few) == 1 else f"{few[0]} to {few[-1]}"
        found.append(f"The P99 table has only {count} samples a cell.")
    disturbed = [
        f"{TITLES[case]} ({metric} at {', '.join(map(str, lengths))} tokens)"
        for (case, metric), lengths in _disturbed(study).items()
    ]
    if disturbed:
        found.append(
            f"P99 is over {DISTURBED:.0f} times the median in {', '.join(disturbed)}: either the case pauses, or "
            "something else used this machine; measure again with the machine idle."
        )
    if any(row.ratio is not None and row.ratio < 0.999 for row in study.rows):
        found.append("Some rows are below their ceiling: the ceiling of this run is too low, or its rows are wrong.")
    return found + [f"Flag: {flag}." for flag in study.ceiling.get("flags", [])]


def _turns(study: Study) -> str:
    """Which cases were interleaved, and how; empty where none was."""
    found: dict[str, list[str]] = {}
    for case, facts in study.cases.items():
        if unit := (facts.get("plan") or {}).get("interleave"):
            found.setdefault(str(unit), []).append(TITLES[case])
    return "; ".join(f"{unit} by {unit}: {', '.join(titles)}" for unit, titles in found.items())


def _disturbed(study: Study) -> dict[tuple[str, str], list[int]]:
    """(case, metric) to the prompt lengths at which a few samples of many took far longer than the rest."""
    found: dict[tuple[str, str], list[int]] = {}
    for row in study.rows:
        key, s = row.key, row.summary
        shown = key.case in ALL_CASES and key.protocol in PROTOCOLS and key.metric in ("ttft_ms", "itl_ms")
        if shown and s.n >= 20 and s.p99 > DISTURBED * s.p50:
            lengths = found.setdefault((key.case, key.metric.removesuffix("_ms").upper()), [])
            if key.prompt_tokens not in lengths:
                lengths.append(key.prompt_tokens)
    return found


def _few_samples(study: Study) -> list[int]:
    """Sample counts of P99 rows that are too few for a 99th percentile."""
    rows = [row for row in study.rows if row.key.protocol == "p99" and row.key.metric == "ttft_ms"]
    return sorted({row.summary.n for row in rows if row.summary.n < 100})
