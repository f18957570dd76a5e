"""What a case is, and the part that this engine's cases share. No torch at import.

A case lives on the main thread of a process of its own. Its timed calls take token ids and return when the token id is
on the host; everything else (counters, memory) is asked for between timed calls.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

from jitgraph.bench.plan import Plan
from jitgraph.errors import JitgraphError

Paths = Mapping[str, Mapping[str, int]]
"""Phase (``prefill``, ``decode``) to counters (``exact``, ``padded``, ``eager``); empty where a case has none."""


class CaseUnavailable(JitgraphError):
    """A case that cannot run on this machine; ``status`` says in two words why."""

    def __init__(self, status: str, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class FirstToken:
    """One request for a single token."""

    token_id: int | None
    """None where a server does not tell ids: the gate cannot check such a case."""
    client_ms: float
    """From handing over the token ids to the token id on the host."""
    engine_ms: float | None
    """The engine's own figure for the same, where it gives one."""


@dataclass(frozen=True)
class Decoded:
    """One request for several tokens."""

    ttft_ms: float
    """As ``FirstToken.client_ms``."""
    gaps_ms: tuple[float, ...]
    """Between consecutive tokens; tokens that arrive in one message share its time."""

    @classmethod
    def from_times(cls, start_ns: int, times_ns: Sequence[int], tokens: int) -> Decoded:
        """From the clock when the ids were handed over and when each token was there.

        Raises:
            JitgraphError: not as many tokens came as were asked for.
        """
        if len(times_ns) != tokens:
            raise JitgraphError(f"asked for {tokens} tokens, got {len(times_ns)}: the engine stopped early")
        gaps = tuple((later - earlier) / 1e6 for earlier, later in pairwise(times_ns))
        return cls((times_ns[0] - start_ns) / 1e6, gaps)

    @property
    def e2e_ms(self) -> float:
        """From handing over the token ids to the last token on the host."""
        return self.ttft_ms + sum(self.gaps_ms)

    @property
    def tpot_ms(self) -> float:
        """Time per output token after the first."""
        return sum(self.gaps_ms) / len(self.gaps_ms)


class Case(Protocol):
    """One way to serve a model."""

    def load(self, plan: Plan) -> None:
        """Makes everything ready to serve.

        Raises:
            CaseUnavailable: this machine cannot run the case.
        """

    def first_token(self, token_ids: list[int]) -> FirstToken:
        """Serves a prompt for one token, greedily."""

    def decode(self, token_ids: list[int], tokens: int) -> Decoded:
        """Generates ``tokens`` (two or more) tokens greedily, no early stop."""

    def paths(self) -> Paths:
        """How steps ran since ``load``."""

    def counters(self) -> Mapping[str, int]:
        """Graphs captured and destroyed so far, as ``capture`` and ``eviction``; empty where the case has none."""

    def peak_memory_bytes(self) -> int | None:
        """Most memory held so far: on CUDA that of the device, else that of the process. None where nobody can tell,
        as of a server elsewhere."""

    def describe(self) -> dict[str, Any]:
        """Device, dtype, versions, settings; ``emulated`` where graphs are, ``transport`` where requests go over a
        network to a server that somebody else has started."""

    def attribution(self, token_ids: list[int]) -> dict[str, float]:
        """What a decode step after this prompt costs the host, by the names of ``attribution``; empty where the case
        cannot tell. It is the last thing that a process is asked: the profiler slows down what comes after it."""

    def close(self) -> None:
        """Lets go of everything."""


def process_peak_bytes() -> int:
    """Largest resident size of this process so far (``ru_maxrss`` is in KiB on Linux)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class EngineCase:
    """This project's engine under the settings of one case. Its cache of earlier prompts is off: the same prompt is
    served many times, and a hit would time something else."""

    def __init__(
        self, ops: str, graphs: bool, fused_sampling: bool, *, isolated: bool = False, **settings: Any
    ) -> None:
        """``isolated``: the engine has a process of its own, and every timed call includes the way to it and back.
        ``settings``: further fields of ``EngineConfig``; all others are as users get them."""
        self._ops = ops
        self._graphs = graphs
        self.isolated = isolated
        """To be changed before ``load`` by whoever looks inside the engine."""
        self._settings = {"graphs": graphs, "fused_sampling": fused_sampling, "prefix_cache": False, **settings}
        self._cuda = False
        self._arguments: dict[str, Any] = {}
        self._llm: Any = None

    def load(self, plan: Plan) -> None:
        """Builds the engine; graphs are captured for the buckets and for every benchmark length that is no bucket."""
        from jitgraph.config import DEFAULT_PREFILL_BUCKETS

        self._cuda = plan.device.startswith("cuda")
        buckets = DEFAULT_PREFILL_BUCKETS
        exact = tuple(n for n in plan.prompt_lengths if n not in buckets and n <= buckets[-1])
        self._arguments = {
            "model": plan.model,
            "weights": plan.weights,
            "seed": plan.seed,
            "device": plan.device,
            "dtype": plan.dtype,
            "max_model_len": plan.max_model_len,
            "max_streams": 1,
            "precapture_lengths": exact if self._graphs else (),
            "ops": self._ops if self._cuda else "torch",
            **self._settings,
        }
        self._open(self.isolated)

    def _open(self, isolated: bool) -> None:
        from jitgraph import LLM

        self._llm = LLM(**self._arguments, isolated=isolated)

    def first_token(self, token_ids: list[int]) -> FirstToken:
        """See ``Case``. The engine's figure ends where its process has the token; the client's, where this one has."""
        from jitgraph.types import SamplingParams

        params = SamplingParams(max_tokens=1, ignore_eos=True)
        start = time.perf_counter_ns()
        stream = self._llm.stream(token_ids, params)
        chunk = next(stream)
        end = time.perf_counter_ns()
        for _ in stream:
            raise AssertionError("a request for one token gave more")
        return FirstToken(chunk.token_id, (end - start) / 1e6, (chunk.time_ns - start) / 1e6)

    def decode(self, token_ids: list[int], tokens: int) -> Decoded:
        """See ``Case``."""
        from jitgraph.types import SamplingParams

        params = SamplingParams(max_tokens=tokens, ignore_eos=True)
        start = time.perf_counter_ns()
        times = [time.perf_counter_ns() for _ in self._llm.stream(token_ids, params)]
        return Decoded.from_times(start, times, tokens)

    def paths(self) -> Paths:
        """See ``Case``."""
        stats, none = self._llm.stats(), {"exact": 0, "padded": 0, "eager": 0}
        return {phase: {**none, **stats[f"{phase}_paths"]} for phase in ("prefill", "decode")}

    def counters(self) -> Mapping[str, int]:
        """See ``Case``."""
        stats = self._llm.stats()
        return {"capture": stats["captures"], "eviction": stats["evictions"]}

    def peak_memory_bytes(self) -> int:
        """See ``Case``."""
        return int(self._llm.stats()["peak_memory_bytes"])

    def describe(self) -> dict[str, Any]:
        """See ``Case``."""
        stats = self._llm.stats()
        noted = ("captures", "compiles_after_ready", "graphs_left_out", "ready_ms")
        about = self._llm.describe()
        rolling = about["graphs"] and about["graph_scope"] == "step" and self._settings.get("rolling", True)
        described = {"engine": "jitgraph", **about, "isolated": self.isolated, "rolling": rolling}
        return {**described, **{name: stats[name] for name in noted}}

    def attribution(self, token_ids: list[int]) -> dict[str, float]:
        """See ``Case``. It looks inside the engine, so one in a process of its own is closed and opened in this one."""
        from jitgraph.bench.attribution import engine_attribution

        if self.isolated:
            self._llm.close()
            self._open(isolated=False)
        return engine_attribution(self._llm, token_ids, self._cuda)

    def close(self) -> None:
        """See ``Case``."""
        if self._llm is not None:
            self._llm.close()
