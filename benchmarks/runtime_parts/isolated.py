"""Part *isolated*: the latencies again with the engine in a process of its own, IPC included, beside the same products.

The engine in this process stays, for its weights and as the other half of the comparison. They take turns by lengths,
not by requests, and what comes first after a change is not counted: a GPU takes some 150 us to change from one process
to another, which nobody pays whose engine has the GPU to itself.
"""

from __future__ import annotations

import time
from typing import Any

from jitgraph import LLM
from jitgraph.bench.ceiling import LinearsGraph
from runtime_parts import inside
from runtime_parts.lab import BUCKETS, Lab, Result
from runtime_parts.latency import tail_samples
from runtime_parts.rolling import GRAPHS_AT_START, random_lengths

SETTLED_S = 5.0
"""How long a graph that was asked for may take to come."""
_LOOK_S = 0.02


def isolated(lab: Lab) -> Result:
    """TTFT by length, tokens, tails and unseen lengths, through another process."""
    here, scale = lab.headline_llm(), lab.scale
    known = lab.exact_lengths
    drawn = random_lengths(scale.unseen_lengths + len(known), BUCKETS[-1])
    unseen = [n for n in drawn if n not in known][: scale.unseen_lengths]
    room = GRAPHS_AT_START + len(known) + len(unseen)
    with lab.another(precapture_lengths=known, max_graphs=room, isolated=True) as apart:
        samples: dict[str, Any] = _ttft(lab, here, apart)
        samples |= _decode(lab, here, apart)
        samples["tail_client"], samples["tail_gaps"] = tail_samples(lab, apart)
        found, counters = _unseen(lab, apart, unseen)
        stats = apart.stats()
    return Result(
        samples={**samples, **found},
        counters={**counters, "compiles_after_ready": stats["compiles_after_ready"]},
        conditions={"repeats": scale.unseen_repeats, "max_graphs": room},
    )


def _ttft(lab: Lab, here: LLM, apart: LLM) -> dict[str, Any]:
    """At each length the products and the engine in this process by turns, then the engine in the other. ``read``: when
    the engine had the token; what follows is the way to the caller."""
    scale, weights = lab.scale, inside.linear_matrices(here)
    names = ("linears", "client_here", "read_here", "client", "read")
    found: dict[str, dict[str, list[float]]] = {name: {} for name in names}
    count = lab.counting("requests", len(scale.lengths) * scale.isolated_requests)
    for length in scale.lengths:
        prompt, graph = lab.ids(length), LinearsGraph(weights, length)
        lab.warm(here, prompt, tokens=1)
        rows = {name: found[name].setdefault(str(length), []) for name in names}
        for _ in range(scale.isolated_requests):
            lab.pause()
            rows["linears"].append(graph.replay_ms())
            lab.pause()
            _add_first(lab, here, prompt, rows["client_here"], rows["read_here"])
        graph.close()
        lab.warm(apart, prompt, tokens=1)
        for _ in range(scale.isolated_requests):
            lab.pause()
            _add_first(lab, apart, prompt, rows["client"], rows["read"])
            count.step()
    return found


def _add_first(lab: Lab, llm: LLM, prompt: list[int], client: list[float], read: list[float]) -> None:
    took, until_read = lab.first_token(llm, prompt)
    client.append(took)
    read.append(until_read)


def _decode(lab: Lab, here: LLM, apart: LLM) -> dict[str, Any]:
    """Streams from the other process, and the products of one token before each."""
    scale = lab.scale
    graph = LinearsGraph(inside.linear_matrices(here), 1)
    gaps, products = list[list[float]](), list[float]()
    for _ in range(scale.decode_rounds):
        for prompt, tokens in scale.decode_spans:
            lab.pause()
            products.append(graph.replay_ms())
            lab.pause()
            gaps.append(lab.token_gaps_ms(apart, lab.ids(prompt), tokens))
    graph.close()
    return {"gaps": gaps, "linears_1": products}


def _unseen(lab: Lab, apart: LLM, lengths: list[int]) -> tuple[dict[str, Any], dict[str, Any]]:
    """As the part *unseen*; that a graph has come is seen in the engine's counters."""
    first: dict[str, float] = {}
    later: dict[str, list[float]] = {}
    paths: dict[str, dict[str, int]] = {"first": {}, "later": {}}
    lab.warm(apart, lab.ids(BUCKETS[-1]), tokens=1)
    count = lab.counting("lengths", len(lengths))
    for length in lengths:
        prompt, before = lab.ids(length), apart.stats()
        lab.pause()
        first[str(length)] = lab.first_token_ms(apart, prompt)
        after = _captured(apart, before["captures"])
        _add(paths["first"], before, after)
        later[str(length)] = []
        for _ in range(lab.scale.unseen_repeats):
            lab.pause()
            later[str(length)].append(lab.first_token_ms(apart, prompt))
        _add(paths["later"], after, apart.stats())
        count.step()
    return {"first": first, "exact": later}, paths


def _captured(apart: LLM, before: int) -> dict[str, Any]:
    """Waits until another graph has been captured; the counters then."""
    deadline = time.monotonic() + SETTLED_S
    while (stats := apart.stats())["captures"] <= before and time.monotonic() < deadline:
        time.sleep(_LOOK_S)
    return stats


def _add(paths: dict[str, int], before: dict[str, Any], after: dict[str, Any]) -> None:
    """Adds the steps by path that came between two looks at the counters."""
    for path, count in after["prefill_paths"].items():
        paths[path] = paths.get(path, 0) + count - before["prefill_paths"].get(path, 0)
