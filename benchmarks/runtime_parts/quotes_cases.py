"""Blocks of figures for the documents about the approaches: what the run of record says of each case. No torch."""

from __future__ import annotations

from functools import partial

from jitgraph.bench.plan import CASES, LINEARS, PAUSE_S, TITLES
from runtime_parts.quotes_text import (
    BASELINE,
    HYBRID,
    NOTHING,
    Block,
    Missing,
    Record,
    Sources,
    between_tokens_ms,
    cases_shown,
    column,
    figure,
    lengths,
    mean,
    our_cells,
    peak_gib,
    ready_s,
    rows,
    shown,
    table,
)

LIBRARIES = {"torch": "PyTorch", "cuda": "CUDA", "triton": "Triton", "transformers": "transformers", "driver": "driver"}


def conditions(summary: Record) -> str:
    """What was measured on what, in a sentence.

    Raises:
        Missing: the summary does not tell.
    """
    if not {"environment", "model"} <= {*summary}:
        raise Missing("environment")
    environment, model = summary["environment"], summary["model"]
    versions = ", ".join(f"{title} {environment[key]}" for key, title in LIBRARIES.items() if environment.get(key))
    hybrid = summary.get("cases", {}).get(HYBRID, {})
    process = "a process of its own" if hybrid.get("isolated") else "the client's own process"
    loop = "decoding in loops on the device" if hybrid.get("device_loop") else "each decode step launched by the host"
    return (
        f"*Run of record: one {environment['device_name']}, {model['name']}, {model['weights']} weights, "
        f"{model['dtype']}, batch 1, {PAUSE_S * 1e3:.0f} ms before each request; {versions}. The hybrid's engine in "
        f"{process}, {loop}.*"
    )


def _why(summary: Record, case: str) -> str:
    """Why a case has no figures.

    Raises:
        Missing: nobody knows.
    """
    facts = summary.get("cases", {}).get(case, {})
    if not facts.get("reason"):
        raise Missing(case)
    return f"*{TITLES[case]} has no figures in the run of record: {facts['reason']}.*"


# --------------------------------------------------------------------------------------------------------------- blocks


def one_case(case: str, sources: Sources) -> list[str]:
    """Everything about one case; where it has no figures, why."""
    summary = sources.summary
    times, tails = column(summary, case, "ttft", "mean"), column(summary, case, "p99", "p99")
    floors = column(summary, case, "ttft", "ratio")
    if times is None or tails is None or floors is None:
        return [conditions(summary), "", _why(summary, case)]
    lines = [
        ("TTFT, ms", times, mean(times)),
        ("P99 of TTFT, ms", tails, mean(tails)),
        ("TTFT over the machine's floor", floors, mean(floors)),
    ]
    head = ("prompt tokens", *map(str, lengths(summary)), "average")
    by_length = table(head, [(name, *(shown(v) for v in values), shown(whole)) for name, values, whole in lines])
    return [conditions(summary), "", *by_length, "", *table(("", "measured"), _besides(case, sources))]


def _besides(case: str, sources: Sources) -> list[tuple[str, str]]:
    """What does not go by length, as far as it is known."""
    summary, (launches, host, where) = sources.summary, _host(sources, case)
    ends = sorted({lengths(summary)[0], lengths(summary)[-1]})
    found = [(f"between tokens after {n}, ms", shown(between_tokens_ms(summary, case, n))) for n in ends]
    found += [
        (f"launches a decode step{where}", _launches(launches)),
        (f"host time a decode step{where}, µs", shown(host, ".0f")),
        ("process start to ready, s", shown(ready_s(summary, case), ".1f")),
        ("peak memory, GiB", shown(peak_gib(summary, case), ".1f")),
    ]
    return [line for line in found if line[1] != NOTHING]


def _host(sources: Sources, case: str) -> tuple[float | None, float | None, str]:
    """Launches and microseconds of the host in a decode step, of the five cases' own record where it has the hybrid's,
    else of the runtime's; and in that case a remark that says so."""
    attributed = {name: facts.get("attribution") or {} for name, facts in sources.summary.get("cases", {}).items()}
    if attributed.get(HYBRID):
        own = attributed.get(case, {})
        return own.get("launches_per_step"), own.get("host_us_per_step"), ""
    figures = sources.record.get("figures", {})
    launches, host = (figures.get(name, {}).get(case) for name in ("launches_per_step", "host_us_per_step"))
    return launches, host, " (runtime's record)"


def _launches(count: float | None) -> str:
    return shown(count, ".3f" if count is not None and count < 1 else ".0f")


def approaches(sources: Sources) -> list[str]:
    """One line a case, the five first."""
    summary = sources.summary
    first = lengths(summary)[0]
    lines = []
    for case in cases_shown(summary):
        launches, _, where = _host(sources, case)
        lines.append(
            (
                TITLES[case],
                shown(mean(column(summary, case, "ttft", "mean"))),
                shown(mean(column(summary, case, "p99", "p99"))),
                shown(between_tokens_ms(summary, case, first)),
                _launches(launches),
                shown(ready_s(summary, case), ".1f"),
                shown(peak_gib(summary, case), ".1f"),
            )
        )
    head = (
        *("", "TTFT, average, ms", "P99, average, ms", f"between tokens after {first}, ms"),
        *(f"launches a decode step{where}", "ready, s", "peak memory, GiB"),
    )
    without = [case for case in CASES if column(summary, case, "ttft", "mean") is None]
    reasons = [line for case in without for line in ("", _why(summary, case))]
    return [conditions(summary), "", *table(head, lines), *reasons]


def parts(sources: Sources) -> list[str]:
    """What graphs and kernels are worth alone and together."""
    summary = sources.summary
    names = {
        BASELINE: "transformers, eager",
        "cuda-graph": "CUDA graph, plain ops, sampling outside",
        "jit": "JIT kernels for the dynamic ops, no graph",
        HYBRID: "JIT kernels inside the graph",
    }
    first = lengths(summary)[0]
    lines = []
    for case, name in names.items():
        average, gap = mean(column(summary, case, "ttft", "mean")), between_tokens_ms(summary, case, first)
        if average is None or gap is None:
            raise Missing(case)
        lines.append((name, shown(average), shown(gap)))
    head = ("", "average TTFT, ms", f"between tokens after {first} tokens, ms")
    return [*table(head, lines), "", conditions(summary)]


def growth(sources: Sources) -> list[str]:
    """Whom the prompt's length costs time, and whom the host: the first does not let TTFT grow, the second its tail."""
    summary = sources.summary
    found, all_lengths = rows(summary), lengths(summary)
    first, last = all_lengths[0], all_lengths[-1]
    lines = []
    for case in (BASELINE, "cuda-graph", "jit", HYBRID):
        times, tails = column(summary, case, "ttft", "mean"), column(summary, case, "p99", "p99")
        if times is None or tails is None:
            raise Missing(case)
        tail = sum(tails) / sum(times)
        lines.append((TITLES[case], *map(shown, (times[0], times[-1], times[-1] / times[0], tail))))
    products = [found.get((LINEARS, "ttft", "ttft_ms", n)) for n in (first, last)]
    if None not in products:
        low, high = (float(row["mean"]) for row in products if row is not None)
        lines.append(("matrix products alone", shown(low), shown(high), shown(high / low), NOTHING))
    head = ("", f"TTFT at {first} tokens, ms", f"at {last}, ms", "growth", "average P99 over average TTFT")
    return table(head, lines)


def against(sources: Sources) -> list[str]:
    """What speaks against the hybrid, or does not speak for it."""
    summary, record = sources.summary, sources.record
    cells = our_cells(summary)
    if HYBRID not in cells.ttft_ms or BASELINE not in cells.ttft_ms or "cuda-graph" not in cells.ttft_ms:
        raise Missing(HYBRID)
    ours = cells.ttft_ms[HYBRID]
    lead, at, rival = min(
        (times / ours[index], cells.lengths[index], case)
        for case, column_ in cells.ttft_ms.items()
        if case != HYBRID
        for index, times in enumerate(column_)
    )
    last = cells.lengths[-1]
    graphs = cells.ttft_ms[BASELINE][-1] / cells.ttft_ms["cuda-graph"][-1]
    cost = figure(record, "batch_invariant_cost")
    window, step = figure(record, "window_stream_ms_per_token"), figure(record, "decode_ms")
    prompts = max((ratio, tokens) for tokens, ratio in cost.items() if tokens != "decode")
    lines = [
        (f"smallest lead of all cells: {TITLES[rival]} over the hybrid, TTFT at {at} tokens", shown(lead)),
        (f"graphs without kernels: the baseline over them, TTFT at {last} tokens", shown(graphs)),
        ("ready, kernels compiled and in the disk cache, s", _pair(record, "ready_cold_s", "ready_warm_s")),
        ("the baseline's ready, s", shown(ready_s(summary, BASELINE), ".1f")),
        ("peak memory: the hybrid and the baseline, GiB", _memory(summary)),
        (
            "first request of an unseen length over later ones, worst",
            shown(figure(record, "unseen_length_over_exact_max")),
        ),
        (f"batch-invariant mode: TTFT at {prompts[1]} tokens, times", shown(prompts[0])),
        ("the same between tokens, times", shown(cost["decode"])),
        ("a token of a windowed stream over an ordinary one, times", shown(window / step)),
        ("host time for a token, µs (wanted: 20 at most)", shown(figure(record, "host_us_per_token"), ".1f")),
    ]
    added = record["figures"].get("isolated_ttft_added_us")
    if added is not None:
        lines.append(("a process of its own adds to TTFT, µs", shown(added, ".0f")))
    return table(("", "measured"), [line for line in lines if line[1] != NOTHING])


def _pair(record: Record, cold: str, warm: str) -> str:
    return f"{figure(record, cold):.1f} and {figure(record, warm):.1f}"


def _memory(summary: Record) -> str:
    found = [peak_gib(summary, case) for case in (HYBRID, BASELINE)]
    return NOTHING if None in found else " and ".join(shown(value, ".1f") for value in found)


CASE_BLOCKS: dict[str, Block] = {
    "approaches": approaches,
    "parts": parts,
    "growth": growth,
    "against": against,
    **{f"case-{case}": partial(one_case, case) for case in CASES},
}
