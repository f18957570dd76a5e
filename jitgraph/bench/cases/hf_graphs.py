"""Peer: one CUDA graph for each exact length around the forward pass of Hugging Face transformers, without a KV cache.

The method of the paper that this project follows. A length's graph is the whole forward pass over a prompt of that
length; a request copies its ids into the graph's input, replays it, and takes the best token outside. As nothing is
cached, each further token is the forward pass over everything so far, through the graph of the next length. Every
length that the benchmark needs is captured before ready, all graphs in one memory pool, since one runs at a time.
While it is captured, transformers makes its attention mask inside the graph: it cannot ask whether it needs one.

On the CPU graphs are emulated: what would have been captured runs again on the same input, and rows say so.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from jitgraph.bench.cases.common import Case, Decoded, FirstToken, Paths, process_peak_bytes
from jitgraph.bench.plan import DECODE_TOKENS, Plan
from jitgraph.errors import JitgraphError

WARM_RUNS = 2
"""Eager runs of a length before its capture: libraries choose and load their kernels in them."""


def captured_lengths(plan: Plan) -> tuple[int, ...]:
    """Prompt lengths, and those that a prompt grows to while its answer is generated."""
    grown = {n + step for n in plan.decode_lengths for step in range(DECODE_TOKENS)}
    return tuple(sorted({*plan.prompt_lengths, *grown}))


class ExactGraphsCase:
    """transformers behind a graph for each length."""

    def __init__(self) -> None:
        self._model: Any = None
        self._device = "cpu"
        self._ids: Any = None
        """``[1, longest]``: the input of all graphs, each of which reads its own length of it."""
        self._replays: dict[int, Callable[[], None]] = {}
        self._logits: dict[int, Any] = {}
        """Length to ``[1, 1, V]``, which a replay fills; the next replay of any length may overwrite it."""
        self._keep: list[Any] = []
        self._counts = {"prefill": 0, "decode": 0}

    def load(self, plan: Plan) -> None:
        """See ``Case``."""
        import torch

        from jitgraph.bench.hf_model import load_hf_model

        self._device = plan.device
        self._model = load_hf_model(plan)
        lengths = captured_lengths(plan)
        self._ids = torch.zeros((1, lengths[-1]), dtype=torch.long, device=plan.device)
        pool = None
        with torch.inference_mode():
            for length in reversed(lengths):  # the longest first: the others fit into what it has allocated
                pool = self._capture(length, pool)

    def _forward(self, length: int) -> Any:
        return self._model(self._ids[:, :length], use_cache=False, logits_to_keep=1).logits

    def _capture(self, length: int, pool: Any) -> Any:
        """Makes the graph of a length; returns the pool that all of them share."""
        import torch

        if not self._device.startswith("cuda"):
            self._replays[length] = lambda: self._logits.__setitem__(length, self._forward(length))
            return None
        stream = torch.cuda.Stream(self._device)
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            for _ in range(WARM_RUNS):
                self._forward(length)
        torch.cuda.current_stream(self._device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, stream=stream):
            self._logits[length] = self._forward(length)
        self._keep.append(graph)
        self._replays[length] = graph.replay
        return graph.pool()

    def _next(self, length: int) -> int:
        """The best token after the first ``length`` ids of the input, on the host."""
        replay = self._replays.get(length)
        if replay is None:
            raise JitgraphError(f"no graph was captured for {length} tokens: this method serves exact lengths alone")
        replay()
        return int(self._logits[length][0, -1].argmax())

    def _enter(self, token_ids: list[int]) -> None:
        import torch

        self._ids[0, : len(token_ids)].copy_(torch.tensor(token_ids))

    def first_token(self, token_ids: list[int]) -> FirstToken:
        """See ``Case``."""
        import torch

        with torch.inference_mode():
            start = time.perf_counter_ns()
            self._enter(token_ids)
            token_id = self._next(len(token_ids))
            end = time.perf_counter_ns()
        self._counts["prefill"] += 1
        return FirstToken(token_id, (end - start) / 1e6, None)

    def decode(self, token_ids: list[int], tokens: int) -> Decoded:
        """See ``Case``."""
        import torch

        times = []
        with torch.inference_mode():
            start = time.perf_counter_ns()
            self._enter(token_ids)
            for length in range(len(token_ids), len(token_ids) + tokens):
                token_id = self._next(length)
                times.append(time.perf_counter_ns())
                if len(times) < tokens:
                    self._ids[0, length] = token_id
        self._counts["prefill"] += 1
        self._counts["decode"] += tokens - 1
        return Decoded.from_times(start, times, tokens)

    def paths(self) -> Paths:
        """See ``Case``: every step replays the graph of its exact length."""
        return {phase: {"exact": count, "padded": 0, "eager": 0} for phase, count in self._counts.items()}

    def counters(self) -> dict[str, int]:
        """See ``Case``: it captures nothing after ready."""
        return {}

    def peak_memory_bytes(self) -> int:
        """See ``Case``. What captures reserve counts: it stays with the graphs."""
        import torch

        cuda = self._device.startswith("cuda")
        return int(torch.cuda.max_memory_reserved(self._device)) if cuda else process_peak_bytes()

    def describe(self) -> dict[str, Any]:
        """See ``Case``."""
        import transformers

        about = {"engine": "transformers", "version": transformers.__version__, "attention": "sdpa", "kv_cache": False}
        return {**about, "captures": len(self._replays), "emulated": not self._device.startswith("cuda")}

    def attribution(self, token_ids: list[int]) -> dict[str, float]:
        """See ``Case``. One graph a step, and the kernels that copy a token in and take one out."""
        if not self._device.startswith("cuda"):
            return {}
        from jitgraph.bench.ablation import LAUNCHES
        from jitgraph.bench.attribution import calls_per_step

        short = token_ids[: min(self._replays)]  # its next lengths have graphs
        found = calls_per_step(lambda tokens: self._serve(short, tokens))
        return {**found, "graphs_per_step": 1.0, LAUNCHES: found["kernels_per_step"] + 1.0}

    def _serve(self, token_ids: list[int], tokens: int) -> None:
        if tokens == 1:
            self.first_token(token_ids)
        else:
            self.decode(token_ids, tokens)

    def close(self) -> None:
        """See ``Case``."""
        self._replays.clear()
        self._logits.clear()
        self._keep.clear()
        self._model = None


def make() -> Case:
    """The case, not loaded yet."""
    return ExactGraphsCase()
