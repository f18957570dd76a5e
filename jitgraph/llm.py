"""The offline API: text or token ids in, text and token ids out, on the same engine as everything else.

The caller's thread drives the engine; a fair lock lets several threads share one ``LLM``. Streams that run at once
share steps, whoever asks first.
"""

from __future__ import annotations

import math
import resource
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from jitgraph.config import EngineConfig
from jitgraph.engine.engine import Engine
from jitgraph.errors import CheckpointError, ConfigError, RequestError
from jitgraph.graphs.key import Phase
from jitgraph.locks import FairLock
from jitgraph.model.device import resolve_device
from jitgraph.model.generation import generation_defaults
from jitgraph.model.loader import LoadedModel, load_model
from jitgraph.text.detokenize import IncrementalDetokenizer
from jitgraph.text.prompts import Prompt, as_prompts, token_ids
from jitgraph.text.tokenizer import Tokenizer, bundled_tokenizer_folder
from jitgraph.types import FinishReason, Request, RequestOutput, SamplingParams, Timings, TokenChunk, TokenLogprobs

DETOKENIZER_TAIL = 64
"""Last prompt ids shown to the detokenizer: it needs the last 8 visible ones to know how the text continues."""


@dataclass(frozen=True)
class StreamChunk:
    """One token's worth of a stream."""

    text: str
    """New text, safe to show: never half a character, never the beginning of a stop string."""
    token_id: int
    time_ns: int
    """``time.perf_counter_ns`` at which the host read the token."""
    finish_reason: FinishReason | None = None
    logprobs: TokenLogprobs | None = None


@dataclass
class _Live:
    """A request on its way: its text, its times, and what its reader has not taken yet."""

    request: Request
    submitted_ns: int
    detokenizer: IncrementalDetokenizer | None
    pending: deque[StreamChunk] = field(default_factory=deque)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    times_ns: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None

    def output(self) -> RequestOutput:
        """Everything at the end of the request."""
        assert self.finish_reason is not None
        gaps = tuple((b - a) / 1e6 for a, b in pairwise(self.times_ns))
        if self.times_ns:
            ttft, latency = ((t - self.submitted_ns) / 1e6 for t in (self.times_ns[0], self.times_ns[-1]))
        else:  # cancelled before its first token
            ttft = latency = math.nan
        return RequestOutput(
            prompt_token_ids=self.request.prompt_token_ids,
            text=self.detokenizer.text if self.detokenizer else "",
            token_ids=tuple(self.token_ids),
            finish_reason=self.finish_reason,
            timings=Timings(ttft, gaps, latency),
            logprobs=tuple(self.logprobs) if self.request.params.logprobs is not None else None,
        )


class Stream:
    """One request's tokens as they come: an iterator that may be closed.

    ``close`` (or leaving a ``with`` block, or dropping the stream) cancels the request at its next step.
    """

    def __init__(self, llm: LLM, live: _Live) -> None:
        self._llm = llm
        self._live = live
        self._closed = False

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> StreamChunk:
        while not self._live.pending:
            if self._closed or self._live.finish_reason is not None:
                self.close()
                raise StopIteration
            self._llm._step()
        return self._live.pending.popleft()

    @property
    def finish_reason(self) -> FinishReason | None:
        """Why the request ended; None while it runs."""
        return self._live.finish_reason

    def close(self) -> None:
        """Cancels the request if it still runs. May be called more than once."""
        if not self._closed:
            self._closed = True
            self._llm._forget([self._live])

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if not self._closed:
            self._llm._abandoned.append(self._live)  # no lock here: a collection may run while this thread holds it


class LLM:
    """A model ready to answer.

    ``model`` is a checkpoint folder, a hub id or a preset (``llama-2-7b``, ``llama-3.1-8b``, ``qwen2.5-0.5b``,
    ``tiny``); presets other than ``tiny`` need ``weights="random"``. Further keyword arguments are the fields of
    ``jitgraph.config.EngineConfig``. ``progress(phase, done, total)`` hears about loading, warming up and capturing.

    Raises:
        CheckpointError, ConfigError, CapacityError, DeviceError: one sentence that says what to do.
    """

    def __init__(
        self,
        model: str | Path = "tiny",
        *,
        weights: str = "checkpoint",
        seed: int = 0,
        progress: Callable[[str, int, int], None] | None = None,
        **settings: Any,
    ) -> None:
        config = EngineConfig(**settings)
        device = resolve_device(config.device)
        started = time.perf_counter()
        loaded: LoadedModel = load_model(
            str(model), device=device, dtype=config.dtype, weights=weights, seed=seed, progress=progress
        )
        load_ms = (time.perf_counter() - started) * 1e3
        self.name = loaded.name
        self.spec = loaded.spec
        self.device = device
        self._tokenizer = _find_tokenizer(loaded.folder)
        defaults = generation_defaults(loaded.generation_config, f"{loaded.name}: generation_config.json")
        self._default_params = defaults.params
        self.unsupported_defaults = defaults.unsupported
        """Settings of ``generation_config.json`` that this engine does not have, as ``name value``."""
        self._lock = FairLock()
        self._live: dict[int, _Live] = {}
        self._abandoned: deque[_Live] = deque()
        self._next_id = 0
        self._running: Engine | None = Engine(loaded.spec, loaded.weights, config, loaded.spec.eos_token_ids, progress)
        self._ready_ms = {"load": load_ms, **self._running.ready.phases_ms}

    @property
    def _engine(self) -> Engine:
        if self._running is None:
            raise ConfigError(f"this LLM ({self.name}) has been closed: make a new one")
        return self._running

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer.

        Raises:
            CheckpointError: the checkpoint has none; prompts of token ids work all the same.
        """
        if self._tokenizer is None:
            raise CheckpointError(f"{self.name} has no tokenizer.json: add one, or give prompts as token ids")
        return self._tokenizer

    # ---------------------------------------------------------------------------------------------------- generation

    def default_params(self) -> SamplingParams:
        """The model's own sampling settings (``generation_config.json``); greedy where it has none."""
        return self._default_params

    def generate(
        self, prompts: Prompt | Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> list[RequestOutput]:
        """Answers every prompt (a text, a list of token ids, or a list of either), in order.

        ``params`` serve all prompts, or are one per prompt; None takes ``default_params``. Up to ``max_streams``
        prompts run at once, the rest wait.

        Raises:
            RequestError, CapacityError: a prompt that cannot be answered; then nothing runs.
        """
        batch = as_prompts(prompts)
        each = _as_params(params, len(batch), self.default_params())
        requests = [(self._encode(prompt), one) for prompt, one in zip(batch, each, strict=True)]
        live: list[_Live] = []
        with self._lock:
            for one in [self._make(ids, one) for ids, one in requests]:
                self._submit(one)
                live.append(one)
        try:
            while any(one.finish_reason is None for one in live):
                self._step()
        finally:
            self._forget(live)
        return [one.output() for one in live]

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Stream:
        """Answers one prompt token by token.

        The request is handed over at the call, not at the first ``next``. Raises as ``generate`` does.
        """
        ids = self._encode(prompt)
        with self._lock:
            live = self._make(ids, params or self.default_params())
            self._submit(live)
        return Stream(self, live)

    def _encode(self, prompt: Prompt) -> tuple[int, ...]:
        if not isinstance(prompt, str):
            return token_ids(prompt)
        if not prompt:
            raise RequestError("the prompt is empty: give at least one character")
        return tuple(self.tokenizer.encode(prompt))

    def _make(self, ids: tuple[int, ...], params: SamplingParams) -> _Live:
        """A request that is valid but not handed over yet. The caller holds the lock."""
        started = time.perf_counter_ns()
        self._next_id += 1
        request = Request(self._next_id, ids, params)
        self._engine.validate(request)
        detokenizer = None
        if self._tokenizer is not None or params.stop:
            detokenizer = IncrementalDetokenizer(
                self.tokenizer, ids[-DETOKENIZER_TAIL:], params.stop, params.min_tokens
            )
        return _Live(request, started, detokenizer)

    def _submit(self, live: _Live) -> None:
        """Hands a request over. The caller holds the lock."""
        self._drop_abandoned()
        self._engine.enqueue(live.request)
        self._live[live.request.request_id] = live

    def _forget(self, live: list[_Live]) -> None:
        with self._lock:
            self._drop_abandoned()
            for one in live:
                self._end(one)

    def _drop_abandoned(self) -> None:
        while self._abandoned:
            self._end(self._abandoned.popleft())

    def _end(self, live: _Live) -> None:
        """Takes a request out of the books, out of the engine too if it still runs. The caller holds the lock."""
        self._live.pop(live.request.request_id, None)
        if live.finish_reason is None:
            live.finish_reason = FinishReason.CANCELLED
            if self._running is not None:
                self._running.cancel(live.request.request_id)

    def _step(self) -> None:
        with self._lock:
            self._drop_abandoned()
            for chunk in self._engine.step():
                live = self._live.get(chunk.request_id)
                if live is not None:
                    self._take(live, chunk)
                    if live.finish_reason is not None:
                        del self._live[chunk.request_id]

    def _take(self, live: _Live, chunk: TokenChunk) -> None:
        """Adds a token to its request: text, times, stop strings."""
        if chunk.token_id is None:
            live.finish_reason = chunk.finish_reason
            return
        live.times_ns.append(chunk.time_ns)
        live.token_ids.append(chunk.token_id)
        if chunk.logprobs is not None:
            live.logprobs.append(chunk.logprobs)
        text, reason = "", chunk.finish_reason
        if live.detokenizer is not None:
            text = live.detokenizer.push(chunk.token_id)
            if live.detokenizer.stopped:
                reason = FinishReason.STOP
                self._engine.cancel(chunk.request_id, reason)
            elif reason is not None:
                text += live.detokenizer.finish()
        live.finish_reason = reason
        live.pending.append(StreamChunk(text, chunk.token_id, chunk.time_ns, reason, chunk.logprobs))

    # -------------------------------------------------------------------------------------------------------- report

    def describe(self) -> dict[str, Any]:
        """Model, device, dtype, kernels and sizes, for reports."""
        engine = self._engine
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu"
        return {
            "model": self.name,
            "device": name,
            "dtype": str(engine.dtype).removeprefix("torch."),
            "ops": engine.ops.flavour,
            "kernels": engine.ops.describe(),
            "emulated": engine.emulated,
            "graphs": engine.config.graphs,
            "fused_sampling": engine.config.fused_sampling,
            "max_model_len": engine.sizing.max_model_len,
            "kv_cache_bytes": engine.cache.data.nbytes,
            "arena_bytes": engine.buffers.arena.nbytes,
        }

    def stats(self) -> dict[str, Any]:
        """Which path steps took and why, compiles on the request path (all since ready or ``reset_stats``), and
        sizes."""
        engine, paths = self._engine, self._engine.dispatcher.paths
        by_phase = {phase: {path.value: count for (p, path), count in paths.items() if p is phase} for phase in Phase}
        total: dict[str, int] = {"exact": 0, "padded": 0, "eager": 0}
        for counts in by_phase.values():
            for path, count in counts.items():
                total[path] += count
        cuda = self.device.type == "cuda"
        return {
            "paths": total,
            "prefill_paths": by_phase[Phase.PREFILL],
            "decode_paths": by_phase[Phase.DECODE],
            "reasons": {reason.name.lower(): count for reason, count in engine.dispatcher.reasons.items()},
            "steps": engine.runner.steps,
            "captures": engine.captures,
            "compiles_after_ready": engine.compiles_after_ready,
            "graphs_left_out": [str(key) for key in engine.ready.left_out],
            "capture_pool_bytes": engine.ready.pool_bytes,
            "capture_reserved_growth_bytes": engine.ready.reserved_growth_bytes,
            "ready_ms": dict(self._ready_ms),
            "free_pages": engine.pages.free,
            "peak_memory_bytes": torch.cuda.max_memory_allocated(self.device) if cuda else _peak_rss_bytes(),
        }

    def reset_stats(self) -> None:
        """Sets the counters of steps, paths and compiles to zero."""
        self._engine.reset_counters()

    def close(self) -> None:
        """Ends what is running (as cancelled) and gives the device's memory back. May be called more than once."""
        with self._lock:
            engine = self._running
            if engine is None:
                return
            for live in list(self._live.values()):
                self._end(live)
            engine.drain()
            self._running = None
            del engine
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.empty_cache()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _find_tokenizer(folder: Path | None) -> Tokenizer | None:
    """The folder's tokenizer, the bundled one for presets, None for a checkpoint that comes without any."""
    if folder is None:
        return Tokenizer.from_folder(bundled_tokenizer_folder())
    known = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")
    if not any((folder / name).exists() for name in known):
        return None
    return Tokenizer.from_folder(folder)


def _as_params(
    params: SamplingParams | Sequence[SamplingParams] | None, count: int, default: SamplingParams
) -> list[SamplingParams]:
    if params is None:
        return [default] * count
    if isinstance(params, SamplingParams):
        return [params] * count
    if len(params) != count:
        raise RequestError(f"{len(params)} sampling parameters for {count} prompts: give one, or one for each prompt")
    return list(params)


def _peak_rss_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
