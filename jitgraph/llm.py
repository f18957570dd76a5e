"""The offline API: text or token ids in, text and token ids out, on the same engine as everything else.

The caller's thread drives the engine; a lock lets several threads share one ``LLM``. Streams that run at once share
steps, whoever asks first.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from jitgraph.config import EngineConfig
from jitgraph.engine.engine import Engine
from jitgraph.errors import CheckpointError, RequestError
from jitgraph.graphs.key import Phase
from jitgraph.model.device import resolve_device
from jitgraph.model.loader import LoadedModel, load_model
from jitgraph.text.detokenize import IncrementalDetokenizer
from jitgraph.text.tokenizer import Tokenizer, bundled_tokenizer_folder
from jitgraph.types import FinishReason, Request, RequestOutput, SamplingParams, Timings, TokenChunk, TokenLogprobs

Prompt = str | Sequence[int]

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
        gaps = tuple((b - a) / 1e6 for a, b in zip(self.times_ns, self.times_ns[1:], strict=False))
        first, last = self.times_ns[0], self.times_ns[-1]
        return RequestOutput(
            prompt_token_ids=self.request.prompt_token_ids,
            text=self.detokenizer.text if self.detokenizer else "",
            token_ids=tuple(self.token_ids),
            finish_reason=self.finish_reason,
            timings=Timings((first - self.submitted_ns) / 1e6, gaps, (last - self.submitted_ns) / 1e6),
            logprobs=tuple(self.logprobs) if self.request.params.logprobs is not None else None,
        )


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
        self._generation_config = loaded.generation_config
        self._engine = Engine(loaded.spec, loaded.weights, config, loaded.spec.eos_token_ids, progress)
        self._ready_ms = {"load": load_ms, **self._engine.ready.phases_ms}
        self._lock = threading.RLock()
        self._live: dict[int, _Live] = {}
        self._next_id = 0

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
        settings = self._generation_config
        if not settings.get("do_sample", False):
            return SamplingParams()
        return SamplingParams(
            temperature=float(settings.get("temperature") or 1.0),
            top_k=int(settings.get("top_k") or 0),
            top_p=float(settings.get("top_p") or 1.0),
            min_p=float(settings.get("min_p") or 0.0),
        )

    def generate(
        self, prompts: Prompt | Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> list[RequestOutput]:
        """Answers every prompt (a text, a list of token ids, or a list of either), in order.

        ``params`` serve all prompts, or are one per prompt; None takes ``default_params``. Up to ``max_streams``
        prompts run at once, the rest wait.

        Raises:
            RequestError, CapacityError: a prompt that cannot be answered; then nothing runs.
        """
        batch = _as_prompts(prompts)
        each = _as_params(params, len(batch), self.default_params())
        encoded = [self._encode(prompt) for prompt in batch]
        with self._lock:
            for ids, one in zip(encoded, each, strict=True):
                self._engine.validate(Request(-1, ids, one))
            live = [self._submit(ids, one) for ids, one in zip(encoded, each, strict=True)]
        try:
            while any(one.finish_reason is None for one in live):
                self._step()
        finally:
            self._forget(live)
        return [one.output() for one in live]

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Iterator[StreamChunk]:
        """Answers one prompt token by token. Closing the iterator cancels the request.

        The request is handed over at the call, not at the first ``next``. Raises as ``generate`` does.
        """
        ids = self._encode(prompt)
        with self._lock:
            live = self._submit(ids, params or self.default_params())
        return self._read(live)

    def _read(self, live: _Live) -> Iterator[StreamChunk]:
        try:
            while live.pending or live.finish_reason is None:
                if live.pending:
                    yield live.pending.popleft()
                else:
                    self._step()
        finally:
            self._forget([live])

    def _encode(self, prompt: Prompt) -> tuple[int, ...]:
        if isinstance(prompt, str):
            return tuple(self.tokenizer.encode(prompt))
        ids = tuple(prompt)
        if not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
            raise RequestError("a prompt of token ids must be whole numbers only")
        return ids

    def _submit(self, ids: tuple[int, ...], params: SamplingParams) -> _Live:
        submitted = time.perf_counter_ns()
        request = Request(self._next_id, ids, params)
        detokenizer = None
        if self._tokenizer is not None or params.stop:
            tail = ids[-DETOKENIZER_TAIL:]
            detokenizer = IncrementalDetokenizer(self.tokenizer, tail, params.stop, params.min_tokens)
        self._engine.submit(request)
        self._next_id += 1
        live = _Live(request, submitted, detokenizer)
        self._live[request.request_id] = live
        return live

    def _forget(self, live: list[_Live]) -> None:
        with self._lock:
            for one in live:
                self._live.pop(one.request.request_id, None)
                if one.finish_reason is None:
                    self._engine.cancel(one.request.request_id)

    def _step(self) -> None:
        with self._lock:
            for chunk in self._engine.step():
                live = self._live.get(chunk.request_id)
                if live is not None and live.finish_reason is None:
                    self._take(live, chunk)

    def _take(self, live: _Live, chunk: TokenChunk) -> None:
        """Adds a token to its request: text, times, stop strings."""
        assert chunk.token_id is not None
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
        """Counters since ready or ``reset_stats``: which path steps took and why; compiles and captures."""
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
            "capture_reserved_growth_bytes": engine.ready.reserved_growth_bytes,
            "ready_ms": dict(self._ready_ms),
            "free_pages": engine.pages.free,
            "peak_memory_bytes": torch.cuda.max_memory_allocated(self.device) if cuda else _peak_rss_bytes(),
        }

    def reset_stats(self) -> None:
        """Sets the path counters to zero."""
        self._engine.dispatcher.reset()

    def close(self) -> None:
        """Ends what is running and gives the device's memory back."""
        with self._lock:
            for identity in list(self._live):
                self._engine.cancel(identity)
            self._engine.drain()
            del self._engine
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


def _as_prompts(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, str):
        return [prompts]
    items: list[Any] = list(prompts)
    if items and all(isinstance(item, int) for item in items):
        return [items]
    if not items:
        raise RequestError("there is no prompt: give a text or a non-empty list of token ids")
    return items


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
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
