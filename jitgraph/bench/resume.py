"""What of a case's record a further process need not measure again: whole rows. Used by the run's own process alone."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

from jitgraph.bench.plan import DECODE_TOKENS, WARMUP, Plan
from jitgraph.bench.records import BlockKey, key_of, write_text

LEADS = {"engine_ttft_ms": "ttft_ms", "tpot_ms": "itl_ms", "e2e_ms": "itl_ms"}
"""Metrics that are taken along with another one, and are whole when that is."""


def samples_of(key: BlockKey, plan: Plan) -> int:
    """How many samples make a row whole."""
    if key.protocol == WARMUP:
        return DECODE_TOKENS - 1 if key.metric == "itl_ms" else 1
    if key.metric == "itl_ms":
        return plan.decode_requests(key.protocol) * (DECODE_TOKENS - 1)
    return plan.iterations(key.protocol)


def expected_rows(case: str, plan: Plan) -> set[BlockKey]:
    """The leading rows of every condition that a process measures."""
    keys = set()
    for protocol in ("ttft", "p99"):
        for pacing in plan.pacings if plan.iterations(protocol) else ():
            keys |= {BlockKey(case, protocol, "ttft_ms", pacing, n) for n in plan.prompt_lengths}
            keys |= {BlockKey(case, protocol, "itl_ms", pacing, n) for n in plan.decode_lengths}
    return keys


def keep_whole_rows(path: Path, plan: Plan) -> dict[int, frozenset[BlockKey]]:
    """Rewrites a case's samples without rows that were cut short, and without lines that are no record. Returns, for
    each process, the rows that it has whole.

    Raises:
        OutputError: the file cannot be written.
    """
    lines: list[tuple[int, BlockKey, str]] = []
    counts: Counter[tuple[int, BlockKey]] = Counter()
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line = json.loads(text)
            key, restart, kind = key_of(line), int(line.get("restart", 0)), line["kind"]
        except (ValueError, KeyError, TypeError, AttributeError):
            continue
        if key.case == path.stem:
            lines.append((restart, key, text))
            counts[restart, key] += kind == "sample"
    whole: dict[int, set[BlockKey]] = {}
    kept = []
    for restart, key, text in lines:
        lead = replace(key, metric=LEADS.get(key.metric, key.metric))
        if counts[restart, lead] >= samples_of(lead, plan):
            whole.setdefault(restart, set()).add(key)
            kept.append(text + "\n")
    write_text(path, "".join(kept))
    return {restart: frozenset(keys) for restart, keys in whole.items()}
