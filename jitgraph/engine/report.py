"""What an engine tells of itself: what it is, what it has counted, how busy it is. Engine's thread; nothing waits."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from jitgraph.engine.engine import Engine
from jitgraph.engine.memory import peak_bytes
from jitgraph.graphs.key import Path, Phase, Sampling
from jitgraph.model.hf_spec import ForeignSpec


class Load(NamedTuple):
    """How busy an engine is now."""

    running: int
    waiting: int
    free_pages: int
    total_pages: int
    steps: int
    """Steps since ready, or since the counters were reset."""


class Report:
    """One engine's figures, for whoever drives it."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def load(self) -> Load:
        """How busy it is."""
        engine = self._engine
        scheduler, pages = engine.scheduler, engine.pages
        return Load(len(scheduler.running), len(scheduler.waiting), pages.free, pages.total, engine.runner.steps)

    def begun(self) -> set[int]:
        """The running requests whose first step has been launched."""
        return {one.request.request_id for one in self._engine.scheduler.running if one.begun}

    def counters(self) -> dict[str, Any]:
        """See ``counters``."""
        return counters(self._engine)


def describe(name: str, engine: Engine) -> dict[str, Any]:
    """Model, device, dtype, kernels and sizes."""
    device = engine.device
    return {
        "model": name,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "dtype": str(engine.dtype).removeprefix("torch."),
        "forward": "transformers" if isinstance(engine.spec, ForeignSpec) else "native",
        "notices": list(engine.notices),
        "ops": engine.ops.flavour,
        "kernels": engine.ops.describe(),
        "emulated": engine.emulated,
        "graphs": engine.config.graphs,
        "graph_scope": engine.config.graph_scope,
        "batch_invariant": engine.config.batch_invariant,
        "device_loop": [kind.value for kind in (Sampling.GREEDY, Sampling.FULL) if kind in engine.runner.loops],
        "kv_window": engine.config.kv_window,
        "fused_sampling": engine.config.fused_sampling,
        "prefix_cache": engine.pages.prefixes is not None,
        "max_model_len": engine.sizing.max_model_len if engine.sizing.window is None else None,
        "kv_cache_bytes": engine.cache.data.nbytes,
        "arena_bytes": engine.buffers.arena.nbytes,
    }


def counters(engine: Engine) -> dict[str, Any]:
    """Which path steps took and why, compiles on the request path (all since ready, or since the counters were reset),
    and sizes: numbers, and dicts of numbers by label; ``graphs`` has each graph's state by its key."""
    store, loops, prefixes = engine.store.counters, engine.runner.loops, engine.pages.prefixes
    by_phase = {
        phase: {path.value: count for (p, path), count in engine.dispatcher.paths.items() if p is phase}
        for phase in Phase
    }
    total = {path.value: 0 for path in Path}
    for counts in by_phase.values():
        for path, count in counts.items():
            total[path] += count
    return {
        "paths": total,
        "prefill_paths": by_phase[Phase.PREFILL],
        "decode_paths": by_phase[Phase.DECODE],
        "reasons": {reason.name.lower(): count for reason, count in engine.dispatcher.reasons.items()},
        "eager_reasons": {reason.name.lower(): count for reason, count in engine.dispatcher.eager_reasons.items()},
        "steps": engine.runner.steps,
        "launches": engine.runner.launches,
        "loops": loops.launched,
        "loop_reasons": {reason.name.lower(): count for reason, count in loops.reasons.items()},
        "ready_graphs": len(engine.store.ready_keys),
        "graphs": {str(key): state.value for key, state in engine.store.states().items()},
        "graph_bytes": engine.store.budget.nbytes,
        "captures": store.captures,
        "recaptures": store.recaptures,
        "evictions": store.evictions,
        "captures_abandoned": store.abandoned,
        "capture_failures": dict(store.failures),
        "thrash_alarms": store.thrash_alarms,
        "compiles_before_ready": engine.ready.compiled,
        "compiles_after_ready": engine.compiles_after_ready,
        "capture_pool_bytes": engine.ready.pool_bytes,
        "capture_reserved_growth_bytes": engine.ready.reserved_growth_bytes,
        "grammar_failures": engine.constraints.failures,
        "free_pages": engine.pages.free,
        "cached_pages": 0 if prefixes is None else prefixes.kept,
        "prefix_tokens_asked": 0 if prefixes is None else prefixes.asked_tokens,
        "prefix_tokens_found": 0 if prefixes is None else prefixes.found_tokens,
        "peak_memory_bytes": peak_bytes(engine.device),
    }
