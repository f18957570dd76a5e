"""The figures that documents quote, as Markdown between two comments, so that a script can put them there and a test
can see that they are still right. Pure text, no torch.

A document has ``<!-- figures: NAME -->`` and ``<!-- /figures -->`` on lines of their own; what stands between them is
replaced by the block of that name, or left as it is where the record lacks what the block shows.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jitgraph.bench.plan import ABLATION_COLUMNS, TITLES
from runtime_parts.quotes_cases import CASE_BLOCKS
from runtime_parts.quotes_paper import PAPER_BLOCKS
from runtime_parts.quotes_text import Block, Missing, Record, Sources

Rows = Mapping[tuple[str, str, str, int], float]
PLACE = re.compile(r"(<!-- figures: ([\w-]+) -->\n)(.*?)(<!-- /figures -->)", re.DOTALL)
LOOPS, STEPS = "hybrid", "hybrid-steps"
WITHOUT_LOOPS = f"{TITLES[LOOPS]}, each step launched by the host"


def fill(text: str, record: Record, summary: Record, published: Record | None = None) -> str:
    """``text`` with every block made anew from ``runtime.json``, the five cases' ``summary.json`` and the tables that
    the paper's repository shows.

    Raises:
        KeyError: a document names a block that does not exist.
    """

    sources = Sources(record, summary, published or {})

    def block(match: re.Match[str]) -> str:
        name = match[2]
        try:
            lines = BLOCKS[name](record, rows_of(summary)) if name in BLOCKS else MORE_BLOCKS[name](sources)
        except Missing:
            return match[0]
        return match[1] + "\n" + "\n".join(lines) + "\n\n" + match[4]

    return PLACE.sub(block, text)


def rows_of(summary: Record) -> dict[tuple[str, str, str, int], float]:
    """(case, protocol, metric, prompt tokens) to the mean under interactive pacing."""
    rows = [row for row in summary.get("rows", []) if row["pacing"] == "interactive"]
    return {(row["case"], row["protocol"], row["metric"], row["prompt_tokens"]): row["mean"] for row in rows}


def _figure(record: Record, name: str) -> Any:
    if name not in record["figures"]:
        raise Missing(name)
    return record["figures"][name]


def _table(head: Sequence[str], lines: Sequence[Sequence[str]], left: int = 1) -> list[str]:
    rule = [":---"] * left + ["---:"] * (len(head) - left)
    return [f"| {' | '.join(line)} |" for line in (head, rule, *lines)]


# --------------------------------------------------------------------------------------------------------------- blocks


def runtime(record: Record, rows: Rows) -> list[str]:
    """The runtime's own figures with their floors."""

    def f(name: str) -> Any:
        return _figure(record, name)

    def spread(ratios: Mapping[str, float]) -> str:
        return f"{min(ratios.values()):.2f} to {max(ratios.values()):.2f}"

    lines = [
        ("TTFT over the matrix products alone, 10 to 500 tokens", spread(f("ttft_over_linears")), "1.20"),
        ("The same with the engine in a process of its own", spread(f("isolated_ttft_over_linears")), "1.20"),
        ("Time between tokens over the matrix products of one token", f"{f('decode_over_linears'):.2f}", "1.15"),
        (f"P99 of TTFT over its P50, {f('ttft_requests'):,} requests", f"{f('ttft_p99_over_p50'):.3f}", "1.05"),
        (f"P99 between tokens over its P50, {f('itl_tokens'):,} tokens", f"{f('itl_p99_over_p50'):.3f}", "1.02"),
        ("The same with the engine in a process of its own", f"{f('isolated_itl_p99_over_p50'):.3f}", "1.02"),
        ("P99 between tokens while graphs are captured, over idle", f"{f('itl_p99_capturing_over_idle'):.3f}", "1.03"),
        (
            f"First request of {f('unseen_lengths')} unseen lengths over later",
            f"{f('unseen_length_over_exact'):.3f}",
            "1.10",
        ),
        (f"Compilations after ready, {f('sweep_requests'):,} requests", f"{f('compiles_after_ready')}", "0"),
        ("Memory of 50 graphs and their pool, MiB", f"{f('graphs_50_mib'):.0f}", "128"),
        (
            f"Memory gained in {f('soak_cycles'):,} captures and evictions, MiB",
            f"{f('soak_device_growth_mib'):.1f}",
            "16",
        ),
        ("Process start to ready, kernels compiled, s", f"{f('ready_cold_s'):.1f}", "60"),
        ("Process start to ready, kernels in the disk cache, s", f"{f('ready_warm_s'):.1f}", "8"),
        ("Host time for a token, µs", f"{f('host_us_per_token'):.1f}", "20"),
    ]
    return _table(("", "measured", "at most"), lines)


def attribution(record: Record, rows: Rows) -> list[str]:
    """What a decode step costs the host, and what the user sees, in each way to join kernels and graphs."""
    launches, host = _figure(record, "launches_per_step"), _figure(record, "host_us_per_step")
    lines = []
    for case in (*ABLATION_COLUMNS[:-1], STEPS, LOOPS):
        title = TITLES[LOOPS] if case == LOOPS else WITHOUT_LOOPS if case == STEPS else TITLES[case]
        steps = launches[case]
        shown = f"{steps:.3f}" if steps < 1 else f"{steps:.0f}"
        seen = [_mean(rows, case, "ttft_ms", 100), _mean(rows, case, "itl_ms", 10)]
        lines.append((title, shown, f"{host[case]:.0f}", *seen))
    head = ("", "launches a decode step", "host time a step, µs", "TTFT at 100 tokens, ms", "between tokens, ms")
    return _table(head, lines)


def _mean(rows: Rows, case: str, metric: str, tokens: int) -> str:
    found = [rows[key] for protocol in ("p99", "ttft") if (key := (case, protocol, metric, tokens)) in rows]
    return f"{found[0]:.2f}" if found else "\u2013"


def ratios(record: Record, rows: Rows) -> list[str]:
    """TTFT by length against the products."""
    ttft, over = _figure(record, "ttft_ms"), _figure(record, "ttft_over_linears")
    products = record["ceiling"]["linears_ms"]
    head = ("tokens", *ttft)
    lines = [
        ("matrix products alone, ms", *(f"{products[n]:.2f}" for n in ttft)),
        ("TTFT, ms", *(f"{ms:.2f}" for ms in ttft.values())),
        ("TTFT over that", *(f"{ratio:.2f}" for ratio in over.values())),
    ]
    return _table(head, lines)


def rolling(record: Record, rows: Rows) -> list[str]:
    """What rolling graphs cost, and the price of batch-invariant bits."""

    def f(name: str) -> Any:
        return _figure(record, name)

    cost = f("batch_invariant_cost")
    lines = [
        ("first request of an unseen length over later ones, mean", f"{f('unseen_length_over_exact'):.3f}"),
        ("the same, worst of all", f"{f('unseen_length_over_exact_max'):.3f}"),
        ("The same with the engine in a process of its own", f"{f('isolated_itl_p99_over_p50'):.3f}", "1.02"),
        ("P99 between tokens while graphs are captured, over idle", f"{f('itl_p99_capturing_over_idle'):.3f}"),
        ("memory of 50 graphs and their pool, MiB", f"{f('graphs_50_mib'):.0f}"),
        (f"memory gained in {f('soak_cycles'):,} captures and evictions, MiB", f"{f('soak_device_growth_mib'):.1f}"),
        (f"prompt of {f('long_prompt_tokens'):,} tokens, ms", f"{f('long_prompt_ms'):.1f}"),
        (
            f"a token of a windowed stream of {f('window_stream_tokens'):,}, ms",
            f"{f('window_stream_ms_per_token'):.2f}",
        ),
        ("batch-invariant decoding over ordinary", f"{cost['decode']:.3f}"),
    ]
    return _table(("", "measured"), lines)


BLOCKS: dict[str, Callable[[Record, Rows], list[str]]] = {
    "runtime": runtime,
    "attribution": attribution,
    "ratios": ratios,
    "rolling": rolling,
}
"""Blocks of the runtime's own record."""
MORE_BLOCKS: dict[str, Block] = {**CASE_BLOCKS, **PAPER_BLOCKS}
"""Blocks of the five cases' record, and of the published tables beside it."""
