"""Parts *sweep* and *soak*: that nothing is compiled or captured once the engine is ready, whatever is asked for, and
that capturing and evicting without end leaves nothing behind."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

from jitgraph import LLM, SamplingParams
from jitgraph.errors import CompileError
from jitgraph.jit.monitor import MONITOR
from runtime_parts import inside
from runtime_parts.lab import BUCKETS, Lab, Result
from runtime_parts.rolling import GRAPHS_AT_START, random_lengths

KINDS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampled": {"temperature": 0.8, "top_k": 50, "top_p": 0.9, "min_p": 0.01, "seed": 1},
    "penalised": {"repetition_penalty": 1.1, "presence_penalty": 0.2, "frequency_penalty": 0.2, "logit_bias": {5: 1.0}},
    "logprobs": {"logprobs": 5},
}
SOAK_RING = 100
"""Lengths that are wanted in turn: more than the store holds, so that each was evicted before it comes again."""
REQUESTS_PER_CYCLE = 60
"""Requests that the store is told of between two cycles: with fewer it would rightly hold back, as at more than 20
recaptures in 1,000."""
FAILING = 0.05
SOAK_SEED = 7
SOAK_LIMIT_S = 420.0
"""A soak that takes longer ends, with the cycles it has."""


def sweep(lab: Lab) -> Result:
    """Every prompt length with each kind of sampling, in batches of every size, in strict mode: a compilation in a step
    would be an error. The process's own monitor counts compilations elsewhere too."""
    scale = lab.scale
    llm = lab.llm(strict=True)
    monitor, blocking = MONITOR.count, inside.blocking_captures(llm)
    llm.reset_stats()
    errors, requests = 0, 0
    count = lab.counting("requests", len(KINDS) * len(scale.sweep_lengths))
    for settings in KINDS.values():
        for batch, lengths in _batches(scale.sweep_batches, scale.sweep_lengths):
            # Long enough that the first of the batch still runs when the last has joined.
            params = SamplingParams(max_tokens=batch + 2, ignore_eos=True, **settings)
            try:
                llm.generate([lab.ids(length) for length in lengths], params)
            except CompileError:
                errors += 1
            requests += len(lengths)
            count.step(len(lengths))
    stats = llm.stats()
    compiles = max(MONITOR.count - monitor, stats["compiles_after_ready"], errors)
    return Result(
        counters={
            "requests": requests,
            "compiles": compiles,
            "blocking_captures": inside.blocking_captures(llm) - blocking,
            "decode_graphs_used": inside.decode_graphs_used(llm),
            **{name: stats[name] for name in ("prefill_paths", "decode_paths", "captures", "evictions")},
        },
        conditions={"strict": True, "kinds": list(KINDS), "batches": list(scale.sweep_batches)},
    )


def _batches(sizes: tuple[int, ...], lengths: tuple[int, ...]) -> Iterator[tuple[int, list[int]]]:
    """The lengths dealt out to the batch sizes, each group as large as its batch; every length once."""
    for index, size in enumerate(sizes):
        share = lengths[index :: len(sizes)]
        for start in range(0, len(share), size):
            yield size, list(share[start : start + size])


def soak(lab: Lab) -> Result:
    """Captures and evictions through the real store and capturer, idle, some of them failing on purpose.

    No request runs meanwhile: the store is told of demand as the dispatcher tells it. Before and after, some lengths
    answer through their graphs, which must give the same tokens.
    """
    scale = lab.scale
    ring = random_lengths(SOAK_RING, BUCKETS[-1])
    exact = ring[: 50 - GRAPHS_AT_START]
    with ExitStack() as stack:
        llm = _soak_engine(lab, stack, exact)
        memory = inside.graph_memory_bytes(llm)
        at_start = llm.stats()["ready_graphs"]
        answers = [_answer(lab, llm, length) for length in exact[:3]]
        begun = time.monotonic()
        looks, planted = _cycles(lab, llm, ring)
        took = time.monotonic() - begun
        changed = 0
        for length, answer in zip(exact[:3], answers, strict=True):
            inside.want(llm, [length], REQUESTS_PER_CYCLE)
            llm.settle()
            changed += _answer(lab, llm, length) != answer
        stats = llm.stats()
        layers = llm.spec.num_layers
    return Result(
        samples={"memory": looks},
        counters={
            "graphs_at_start": at_start,
            "graph_bytes": memory[0],
            "pool_bytes": memory[1],
            "cycles": looks[-1][0],
            "planted": planted,
            "answers_changed": changed,
            **{n: stats[n] for n in ("captures", "recaptures", "evictions", "capture_failures", "thrash_alarms")},
        },
        conditions={
            "layers": layers,
            "failing_share": FAILING,
            "growth_after_cycle": scale.soak_begin,
            "ms_per_cycle": took / max(1, looks[-1][0]) * 1e3,
        },
    )


def _soak_engine(lab: Lab, stack: ExitStack, exact: list[int]) -> LLM:
    """Fifty graphs at the start; of fewer layers where that was asked for."""
    if lab.soak_layers is None:
        return lab.llm(precapture_lengths=exact)
    lab.close()
    folder = stack.enter_context(lab.model_with_layers(lab.soak_layers))
    return stack.enter_context(lab.another(folder, precapture_lengths=exact))


def _cycles(lab: Lab, llm: LLM, ring: list[int]) -> tuple[list[list[int]], dict[str, int]]:
    """Runs the cycles. Returns looks at memory, each ``[cycle, bytes reserved, bytes used]``, and the planted failures.

    A cycle is a capture that was completed and an eviction that made room for one.
    """
    scale, counters = lab.scale, inside.store(llm).counters
    captures, evictions = counters.captures, counters.evictions
    looks: list[list[int]] = [[0, lab.reserved_bytes(), lab.used_bytes()]]
    count = lab.counting("cycles", scale.soak_cycles)
    deadline = time.monotonic() + SOAK_LIMIT_S
    turn, done = 0, 0
    with inside.planted_failures(llm, FAILING, SOAK_SEED) as planted:
        while done < scale.soak_cycles and time.monotonic() < deadline:
            inside.want(llm, [ring[turn % len(ring)]], REQUESTS_PER_CYCLE)
            turn += 1
            llm.settle()
            now = min(counters.captures - captures, counters.evictions - evictions)
            count.step(now - done)
            done = now
            if done >= looks[-1][0] + scale.soak_every:
                looks.append([done, lab.reserved_bytes(), lab.used_bytes()])
    if looks[-1][0] != done:
        looks.append([done, lab.reserved_bytes(), lab.used_bytes()])
    return looks, dict(planted)


def _answer(lab: Lab, llm: LLM, length: int) -> tuple[int, ...]:
    """A few tokens after a prompt of this length, which must have a graph of its own.

    Raises:
        RuntimeError: it has none.
    """
    llm.reset_stats()
    tokens = llm.generate([lab.ids(length)], SamplingParams(max_tokens=4, ignore_eos=True))[0].token_ids
    paths = llm.stats()["prefill_paths"]
    if paths.get("exact", 0) != 1:
        raise RuntimeError(f"the prompt of {length} tokens did not run through its graph: {paths}")
    return tokens
