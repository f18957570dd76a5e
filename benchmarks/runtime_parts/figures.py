"""Figures from raw records: pure arithmetic, so that anybody can compute them again from the files. No torch.

Percentiles interpolate linearly, as everywhere in the benchmark. A figure by prompt length is an object whose names are
the lengths. What a part did not measure has no figure.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

Raw = Mapping[str, Mapping[str, Any]]
Part = Mapping[str, Any]
MIB = 2**20


def figures(raw: Raw) -> dict[str, Any]:
    """Every figure of every part that is there."""
    found: dict[str, Any] = {}
    for part, follow in FOLLOW.items():
        if part in raw:
            found |= follow(raw[part])
    return {name: _short(value) for name, value in found.items()}


def _short(value: Any) -> Any:
    """Six digits are more than any of it is good for."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    return {name: _short(one) for name, one in value.items()} if isinstance(value, dict) else value


def linears_ms(raw: Raw) -> dict[str, float]:
    """Tokens to the mean time of the model's matrix products, the largest part first."""
    found: dict[str, float] = {}
    if "decode" in raw:
        found["1"] = mean(raw["decode"]["samples"]["linears_1"])
    if "ttft" in raw:
        found |= {n: mean(values) for n, values in raw["ttft"]["samples"]["linears"].items()}
    return {n: float(f"{ms:.6g}") for n, ms in found.items()}


def mean(values: Sequence[float]) -> float:
    """Arithmetic mean."""
    return statistics.fmean(values)


def quantile(values: Sequence[float], percent: float) -> float:
    """A percentile."""
    return float(np.percentile(np.asarray(values, dtype=np.float64), percent))


def tail(values: Sequence[float]) -> float:
    """P99 over P50."""
    return quantile(values, 99) / quantile(values, 50)


def flat(streams: Sequence[Sequence[float]]) -> list[float]:
    """Samples of all streams."""
    return [value for stream in streams for value in stream]


# -------------------------------------------------------------------------------------------------------------- latency


def _ttft(part: Part) -> dict[str, Any]:
    client, products = part["samples"]["client"], part["samples"]["linears"]
    return {
        "ttft_ms": {n: mean(values) for n, values in client.items()},
        "ttft_over_linears": {n: mean(client[n]) / mean(products[n]) for n in client},
    }


def _decode(part: Part) -> dict[str, Any]:
    gaps = flat([gaps for rounds in part["samples"]["gaps"].values() for gaps in rounds])
    return {"decode_ms": mean(gaps), "decode_over_linears": mean(gaps) / mean(part["samples"]["linears_1"])}


def _tails(part: Part) -> dict[str, Any]:
    requests, streams = part["samples"]["client"], part["samples"]["gaps"]
    place = np.median(np.asarray(streams), axis=0)  # of the gap at each place in a stream: the context's share
    return {
        "ttft_requests": len(requests),
        "ttft_p99_over_p50": tail(requests),
        "itl_tokens": len(flat(streams)),
        "itl_p99_over_p50": tail(flat(streams)),
        "itl_p99_over_p50_same_context": quantile((np.asarray(streams) / place).ravel().tolist(), 99),
    }


# -------------------------------------------------------------------------------------------------------------- rolling


def _capturing(part: Part) -> dict[str, Any]:
    beside, idle = _beside(part)
    return {
        "itl_p99_capturing_over_idle": quantile(beside, 99) / quantile(idle, 99),
        "itl_capturing_tokens": len(beside),
        "captures_beside_tokens": min(made[-1] for made in part["samples"]["captures"]),
    }


def _beside(part: Part) -> tuple[list[float], list[float]]:
    """Gaps of the streams beside which graphs were captured, up to the last capture, and those at the same places of
    the streams beside which nothing happened."""
    beside: list[float] = []
    idle: list[float] = []
    samples = part["samples"]
    for busy, calm, made in zip(samples["gaps_capturing"], samples["gaps_idle"], samples["captures"], strict=True):
        last = next(index for index, count in enumerate(made) if count == made[-1])  # the token at which all were made
        count = max(last, 1)
        beside += busy[:count]
        idle += calm[:count]
    return beside, idle


def _unseen(part: Part) -> dict[str, Any]:
    first, later = part["samples"]["first"], part["samples"]["exact"]
    ratios = [first[n] / statistics.median(later[n]) for n in first]
    return {
        "unseen_length_over_exact": mean(ratios),
        "unseen_length_over_exact_p50": statistics.median(ratios),
        "unseen_length_over_exact_max": max(ratios),
        "unseen_lengths": len(ratios),
        "unseen_first_padded": part["counters"]["first"].get("padded", 0),
        "unseen_later_exact": part["counters"]["later"].get("exact", 0) // part["conditions"]["repeats"],
    }


# ------------------------------------------------------------------------------------------------------------- isolated


def _isolated(part: Part) -> dict[str, Any]:
    samples = part["samples"]
    here, client, products = samples["client_here"], samples["client"], samples["linears"]
    first, later = samples["first"], samples["exact"]
    added = [statistics.median(client[n]) - statistics.median(here[n]) for n in client]
    return {
        "isolated_ttft_ms": {n: mean(values) for n, values in client.items()},
        "isolated_ttft_over_linears": {n: mean(client[n]) / mean(products[n]) for n in client},
        "isolated_ttft_added_us": mean(added) * 1e3,
        "isolated_decode_over_linears": mean(flat(samples["gaps"])) / mean(samples["linears_1"]),
        "isolated_ttft_p99_over_p50": tail(samples["tail_client"]),
        "isolated_itl_p99_over_p50": tail(flat(samples["tail_gaps"])),
        "isolated_unseen_length_over_exact": mean([first[n] / statistics.median(later[n]) for n in first]),
        "isolated_unseen_first_padded": part["counters"]["first"].get("padded", 0),
        "isolated_unseen_later_exact": part["counters"]["later"].get("exact", 0) // part["conditions"]["repeats"],
    }


# --------------------------------------------------------------------------------------------------------------- steady


def _sweep(part: Part) -> dict[str, Any]:
    counters = part["counters"]
    return {
        "compiles_after_ready": counters["compiles"],
        "captures_on_request_path": counters["blocking_captures"],
        "sweep_requests": counters["requests"],
    }


def _soak(part: Part) -> dict[str, Any]:
    looks, counters = part["samples"]["memory"], part["counters"]
    begin = next((look for look in looks if look[0] >= part["conditions"]["growth_after_cycle"]), looks[-1])
    return {
        "graphs_50_mib": (counters["graph_bytes"] + counters["pool_bytes"]) / MIB,
        "soak_cycles": counters["cycles"],
        "soak_failures": sum(counters["planted"].values()),
        "soak_reserved_growth_bytes": looks[-1][1] - begin[1],
        "soak_device_growth_mib": (looks[-1][2] - begin[2]) / MIB,
        "soak_answers_changed": counters["answers_changed"],
    }


def _ready(part: Part) -> dict[str, Any]:
    return {"ready_cold_s": mean(part["samples"]["cold_s"]), "ready_warm_s": mean(part["samples"]["warm_s"])}


def _host(part: Part) -> dict[str, Any]:
    cases, looping = part["samples"]["cases"], part["conditions"]["as_users_get_it"]
    return {
        "host_us_per_token": cases[looping]["host_us_per_step"],
        "host_us_per_token_with_text": cases[looping]["host_us_per_step_with_text"],
        "host_us_per_step": {name: case["host_us_per_step"] for name, case in cases.items()},
        "launches_per_step": {name: case["launches_per_step"] for name, case in cases.items()},
    }


# ----------------------------------------------------------------------------------------------------------------- long


def _window(part: Part) -> dict[str, Any]:
    counters = part["counters"]
    return {
        "long_prompt_tokens": part["conditions"]["long_prompt_tokens"],
        "long_prompt_ms": mean(part["samples"]["long_prompt"]),
        "window_stream_tokens": counters["stream_tokens"],
        "window_stream_ms_per_token": mean(part["samples"]["blocks"]),
        "window_graph_growth_bytes": counters["graph_bytes_after"] - counters["graph_bytes_before"],
        "window_device_growth_mib": (counters["used_bytes_after"] - counters["used_bytes_before"]) / MIB,
    }


def _invariant(part: Part) -> dict[str, Any]:
    on, off = part["samples"]["on"], part["samples"]["off"]
    cost = {n: mean(on["ttft"][n]) / mean(off["ttft"][n]) for n in on["ttft"]}
    return {"batch_invariant_cost": {**cost, "decode": mean(flat(on["gaps"])) / mean(flat(off["gaps"]))}}


FOLLOW: dict[str, Callable[[Part], dict[str, Any]]] = {
    "ttft": _ttft,
    "decode": _decode,
    "tails": _tails,
    "capturing": _capturing,
    "unseen": _unseen,
    "isolated": _isolated,
    "sweep": _sweep,
    "soak": _soak,
    "ready": _ready,
    "host": _host,
    "window": _window,
    "invariant": _invariant,
}
