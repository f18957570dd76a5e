"""Where the parts measure: one model on one device, engines by their settings, prompts, pauses, progress.

Main thread of the measuring process; engines live here, one at a time unless a part asks for more.
"""

from __future__ import annotations

import gc
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from jitgraph import LLM, SamplingParams
from jitgraph.bench.plan import INTERACTIVE, Options, Plan
from jitgraph.config import DEFAULT_PREFILL_BUCKETS
from jitgraph.model.device import resolve_device
from jitgraph.model.loader import ModelSource, find_model
from jitgraph.text.prose import prose
from jitgraph.text.tokenizer import Tokenizer, bundled_tokenizer_folder
from runtime_parts.scale import Scale

BUCKETS = DEFAULT_PREFILL_BUCKETS
PROGRESS_S = 2.0
ONE_TOKEN = SamplingParams(max_tokens=1, ignore_eos=True)


@dataclass
class Result:
    """What a part saw: samples in milliseconds unless their name says otherwise, counters, and its conditions."""

    samples: dict[str, Any] = field(default_factory=dict)
    counters: dict[str, Any] = field(default_factory=dict)
    conditions: dict[str, Any] = field(default_factory=dict)


class Lab:
    """One run's model, device and scale.

    Raises:
        JitgraphError: there is no such model or device.
    """

    def __init__(
        self,
        model: str | None,
        weights: str,
        device: str,
        scale: Scale,
        soak_layers: int | None,
        say: Callable[[str], None],
    ) -> None:
        self.device = resolve_device(device)
        self.cuda = self.device.type == "cuda"
        plan = Options(model=model, weights=weights, pacing=INTERACTIVE).plan(str(self.device))
        self.source: ModelSource = find_model(plan.model, weights=plan.weights)
        self.plan: Plan = plan.within(self.source.spec.max_position_embeddings)
        self.scale = scale
        self.soak_layers = soak_layers
        self.say = say
        tokenizer = Tokenizer.from_folder(self.source.folder or bundled_tokenizer_folder())
        self._text = tokenizer.encode(prose())
        self._llm: LLM | None = None
        self._settings: dict[str, Any] = {}

    # --------------------------------------------------------------------------------------------------------- engines

    def llm(self, **settings: Any) -> LLM:
        """The engine with these settings; all others are as users get them, but no prompt is cached. The one before is
        closed, unless it has the same."""
        if self._llm is None or settings != self._settings:
            self.close()
            self._llm, self._settings = self.another(**settings), settings
        return self._llm

    def another(self, model: str | None = None, **settings: Any) -> LLM:
        """One more engine, beside the current one; its caller closes it."""
        plan = self.plan
        last = time.monotonic()

        def tell(phase: str, done: int, total: int) -> None:
            nonlocal last
            if time.monotonic() - last >= PROGRESS_S:
                last = time.monotonic()
                self.say(f"  engine, {phase}: {done} of {total}")

        made = {"weights": plan.weights, "seed": plan.seed, "device": plan.device, "dtype": plan.dtype}
        # Prompts come again and again, and each time all of one is to be computed.
        return LLM(model or plan.model, progress=tell, **{**made, "prefix_cache": False, **settings})

    def close(self) -> None:
        """Closes the current engine. Its objects know each other, so that only a collection frees them, and one that
        does not pass over what a timed block has frozen."""
        if self._llm is None:
            return
        self._llm.close()
        self._llm = None
        gc.unfreeze()
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()

    def headline_llm(self) -> LLM:
        """The engine as users get it, with a graph of its own for each of the benchmark's lengths."""
        return self.llm(precapture_lengths=self.exact_lengths)

    @property
    def exact_lengths(self) -> tuple[int, ...]:
        """The benchmark's lengths that are no bucket."""
        return tuple(n for n in self.scale.lengths if n not in BUCKETS)

    @contextmanager
    def model_with_layers(self, layers: int) -> Iterator[str]:
        """A folder that holds this model's configuration with another number of layers; no weights."""
        with tempfile.TemporaryDirectory(prefix="jitgraph-layers-") as folder:
            config = {**self.source.config, "num_hidden_layers": layers}
            (Path(folder) / "config.json").write_text(json.dumps(config), encoding="utf-8")
            yield folder

    # -------------------------------------------------------------------------------------------------------- requests

    def ids(self, count: int) -> list[int]:
        """A prompt of real text; a long one repeats it."""
        times = -(-count // len(self._text))
        return (self._text * times)[:count]

    def pause(self) -> None:
        """As a person would, between two requests."""
        time.sleep(self.scale.pause_s)

    def first_token_ms(self, llm: LLM, ids: list[int], params: SamplingParams = ONE_TOKEN) -> float:
        """One request: from handing over its ids to its first token id in the caller's hands."""
        return self.first_token(llm, ids, params)[0]

    def first_token(self, llm: LLM, ids: list[int], params: SamplingParams = ONE_TOKEN) -> tuple[float, float]:
        """``first_token_ms``, and how much of that had passed when the engine read the token."""
        begin = time.perf_counter_ns()
        stream = llm.stream(ids, params)
        chunk = next(stream)
        took = time.perf_counter_ns() - begin
        stream.close()
        return took / 1e6, (chunk.time_ns - begin) / 1e6

    def token_gaps_ms(self, llm: LLM, ids: list[int], tokens: int) -> list[float]:
        """One greedy stream: the gaps between its tokens in the caller's hands."""
        params = SamplingParams(max_tokens=tokens, ignore_eos=True)
        times = [time.perf_counter_ns() for _ in llm.stream(ids, params)]
        assert len(times) == tokens, f"asked for {tokens} tokens, got {len(times)}"
        return [(b - a) / 1e6 for a, b in pairwise(times)]

    def warm(self, llm: LLM, ids: list[int], tokens: int = 3, times: int = 3) -> None:
        """A few requests that nobody times."""
        for _ in range(times):
            self.token_gaps_ms(llm, ids, tokens)

    # ---------------------------------------------------------------------------------------------------------- memory

    def reserved_bytes(self) -> int:
        """What PyTorch's allocator holds; 0 on the CPU."""
        return torch.cuda.memory_reserved(self.device) if self.cuda else 0

    def used_bytes(self) -> int:
        """What is in use on the device, whoever uses it; 0 on the CPU."""
        if not self.cuda:
            return 0
        free, total = torch.cuda.mem_get_info(self.device)
        return int(total - free)

    # -------------------------------------------------------------------------------------------------------- progress

    def counting(self, what: str, total: int) -> Counting:
        """A count that is told every two seconds."""
        return Counting(self.say, what, total)


class Counting:
    """Tells how far a loop is, now and then, between two requests."""

    def __init__(self, say: Callable[[str], None], what: str, total: int) -> None:
        self._say = say
        self._what = what
        self._total = total
        self._done = 0
        self._last = time.monotonic()

    def step(self, count: int = 1) -> None:
        """So many more are done."""
        self._done += count
        now = time.monotonic()
        if now - self._last >= PROGRESS_S:
            self._last = now
            self._say(f"  {self._what}: {self._done} of {self._total}")
