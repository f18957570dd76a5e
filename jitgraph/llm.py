"""The offline API: text or token ids in, text and token ids out, on the same engine as everything else.

The caller's thread drives the engine; a fair lock lets several threads share one ``LLM``. Streams that run at once
share steps, whoever asks first.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from jitgraph.config import EngineConfig
from jitgraph.engine.engine import Engine
from jitgraph.engine.opening import open_engine
from jitgraph.engine.report import counters, describe
from jitgraph.errors import CheckpointError, ConfigError, RequestError
from jitgraph.idle import IdleThread
from jitgraph.locks import FairLock
from jitgraph.model.default import DEFAULT_MODEL
from jitgraph.model.loader import LoadedModel
from jitgraph.stream import DETOKENIZER_TAIL, Live, Stream
from jitgraph.text.detokenize import IncrementalDetokenizer
from jitgraph.text.prompts import Prompt, as_params, as_prompts, token_ids
from jitgraph.text.tokenizer import Tokenizer, find_tokenizer
from jitgraph.types import FinishReason, Grammar, Request, RequestOutput, SamplingParams, TokenChunk


class LLM:
    """A model ready to answer.

    ``model`` is a checkpoint folder, a hub id or a preset (``llama-2-7b``, ``llama-3.1-8b``, ``qwen2.5-0.5b``,
    ``tiny``); presets other than ``tiny`` need ``weights="random"``. Without one it is the bundled model. Further
    keyword arguments are the fields of ``jitgraph.config.EngineConfig``. ``progress(phase, done, total)`` hears about
    loading, warming up and capturing.

    ``isolated=True`` runs the engine in a process of its own: see ``jitgraph.llm_isolated``.

    While it captures graphs, other code of this process must not wait for the whole GPU (``torch.cuda.synchronize``):
    CUDA refuses that as long as any stream is being captured. Streams and events may be waited for. ``settle`` returns
    when nothing is left to capture, and ``rolling=False`` captures nothing after the start.

    Raises:
        CheckpointError, ConfigError, CapacityError, DeviceError: one sentence that says what to do.
    """

    def __new__(cls, *_: Any, isolated: bool = False, **__: Any) -> LLM:
        """An ``IsolatedLLM`` where one is asked for."""
        if not isinstance(isolated, bool):
            raise ConfigError(f"isolated must be true or false, not {isolated!r}")
        if not isolated or cls is not LLM:
            return super().__new__(cls)
        from jitgraph.llm_isolated import IsolatedLLM

        return super().__new__(IsolatedLLM)

    def __init__(
        self,
        model: str | Path = DEFAULT_MODEL,
        *,
        isolated: bool = False,
        weights: str = "checkpoint",
        seed: int = 0,
        progress: Callable[[str, int, int], None] | None = None,
        **settings: Any,
    ) -> None:
        if isolated:
            raise ConfigError(f"isolated=True is for LLM itself, not for its subclass {type(self).__name__}")
        opened = open_engine(
            model,
            config=EngineConfig(**settings),
            weights=weights,
            seed=seed,
            progress=progress,
            on_loaded=self._take_tokenizer,
        )
        self.name = opened.name
        self.spec = opened.spec
        self.device = opened.device
        self._default_params = opened.default_params
        self.unsupported_defaults = opened.unsupported_defaults
        """Settings of ``generation_config.json`` that this engine does not have, as ``name value``."""
        self.notices = opened.engine.notices
        """What to know of how this model runs, where it is not native: a sentence each."""
        self._lock = FairLock()
        self._live: dict[int, Live] = {}
        self.abandoned: deque[Live] = deque()
        self._owed = False
        """Whether a token was given ahead of the engine's books, so that ``Engine.step`` must follow."""
        self._next_id = 0
        self._running: Engine | None = opened.engine
        self._ready_ms = opened.phases_ms
        self._idle = IdleThread(self._work_while_idle)
        self._idle.wake()

    def _take_tokenizer(self, loaded: LoadedModel) -> None:
        """A damaged one is found before the engine is built, which takes long."""
        self._tokenizer = find_tokenizer(loaded.folder)

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
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        grammar: Grammar | None = None,
        prompt_logprobs: int | None = None,
    ) -> list[RequestOutput]:
        """Answers every prompt (a text, a list of token ids, or a list of either), in order.

        ``params`` serve all prompts, or are one per prompt; None takes ``default_params``. Up to ``max_streams``
        prompts run at once, the rest wait. ``grammar`` is what every answer must look like. ``prompt_logprobs`` asks
        for the log-probabilities of the prompts' own tokens, with so many alternatives.

        Raises:
            RequestError, CapacityError: a prompt that cannot be answered, or a grammar that does not compile; then
                nothing runs.
        """
        batch = as_prompts(prompts)
        each = as_params(params, len(batch), self.default_params())
        requests = [(self._encode(prompt), one) for prompt, one in zip(batch, each, strict=True)]
        live: list[Live] = []
        with self._lock:
            for one in [self._make(ids, one, grammar, prompt_logprobs) for ids, one in requests]:
                self._submit(one)
                live.append(one)
            self._engine.launch()
            for one in live:
                self._add_text(one)
        try:
            while any(one.finish_reason is None for one in live):
                self.step()
        finally:
            self.forget(live)
        return [one.output() for one in live]

    def stream(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        grammar: Grammar | None = None,
        prompt_logprobs: int | None = None,
    ) -> Stream:
        """Answers one prompt token by token; arguments and errors are those of ``generate``.

        The request is handed over at the call, not at the first ``next``.
        """
        started = time.perf_counter_ns()
        params = params or self._default_params
        ids: list[int] | tuple[int, ...] = prompt if type(prompt) is list else self._encode(prompt)
        if params.stop:
            self.tokenizer  # noqa: B018 - without one there is no text to look for them in, and this says so
        with self._lock:
            plain = grammar is None and prompt_logprobs is None
            if self._owed:
                self._tidy()
            shot = self._engine.fire(ids, params) if plain else None  # the GPU works from here on, if it was idle
            self._next_id += 1
            request = Request(self._next_id, token_ids(ids), params, grammar=grammar, prompt_logprobs=prompt_logprobs)
            if shot is not None:
                self._engine.book(request, shot)
            else:
                self._tidy()
                self._engine.submit(request)
                self._engine.launch()
            live = Live(request, started)
            self._live[request.request_id] = live
            try:
                self._add_text(live)
                if shot is not None and self.device.type == "cuda":  # whose time is not this thread's
                    self._practise()
                return Stream(self, live)
            except BaseException:  # interrupted: nobody would read it
                self._end(live)
                raise

    def _encode(self, prompt: Prompt) -> tuple[int, ...]:
        if not isinstance(prompt, str):
            return token_ids(prompt)
        if not prompt:
            raise RequestError("the prompt is empty: give at least one character")
        return tuple(self.tokenizer.encode(prompt))

    def _make(
        self, ids: tuple[int, ...], params: SamplingParams, grammar: Grammar | None, prompt_logprobs: int | None
    ) -> Live:
        """A request that is valid but not handed over yet. The caller holds the lock."""
        started = time.perf_counter_ns()
        self._next_id += 1
        request = Request(self._next_id, ids, params, grammar=grammar, prompt_logprobs=prompt_logprobs)
        self._engine.validate(request)
        if params.stop:
            self.tokenizer  # noqa: B018 - without one there is no text to look for them in, and this says so
        return Live(request, started)

    def _add_text(self, live: Live) -> None:
        """Makes the request's detokenizer; the GPU need not wait for it."""
        if self._tokenizer is not None:
            prompt, params = live.request.prompt_token_ids, live.request.params
            live.detokenizer = IncrementalDetokenizer(
                self._tokenizer, prompt[-DETOKENIZER_TAIL:], params.stop, params.min_tokens
            )

    def _practise(self) -> None:
        """Does for nothing what a lone stream's first token will need, while the GPU is at work: what runs for the
        first time after a while is slow."""
        live = next(iter(self._live.values()), None)
        if live is None or live.token_ids:
            return
        other = Live(live.request, live.submitted_ns)
        self._add_text(other)
        other.take(TokenChunk(0, live.request.prompt_token_ids[-1], 0, finish_reason=FinishReason.LENGTH))

    def _submit(self, live: Live) -> None:
        """Hands a request over. The caller holds the lock."""
        self._tidy()
        self._engine.enqueue(live.request)
        self._live[live.request.request_id] = live

    def forget(self, live: list[Live]) -> None:
        """Cancels what still runs of these requests; streams call it when they are closed."""
        with self._lock:
            try:
                self._tidy()
            finally:
                for one in live:
                    self._end(one)
                if not self._live:
                    self._idle.wake()

    def _tidy(self) -> None:
        """Does what was put off: the engine's books of a token that was handed out ahead of them, and the cancelling of
        streams that were dropped. The caller holds the lock."""
        if self._owed:
            self._owed = False
            self._give(self._engine.step())
        while self.abandoned:
            self._end(self.abandoned.popleft())

    def _end(self, live: Live) -> None:
        """Takes a request out of the books, out of the engine too if it still runs. The caller holds the lock."""
        self._live.pop(live.request.request_id, None)
        if live.finish_reason is None:
            live.finish_reason = FinishReason.CANCELLED
            if self._running is not None:
                self._running.cancel(live.request.request_id)

    def _work_while_idle(self) -> bool:
        """One piece of the engine's idle work, for the idle thread; whether there is more."""
        with self._lock:
            self._tidy()
            return self._running is not None and not self._live and self._running.work_while_idle()

    def settle(self, timeout_s: float = 60.0) -> bool:
        """Waits until the engine has captured all that recent prompts asked for; False where time ran out.

        Nothing needs it: captures are made while nobody waits. Measurements that want them done before may call it.
        """
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            with self._lock:
                self._tidy()
                if not self._live:
                    if not self._engine.idle_work:
                        return True
                    self._engine.work_while_idle()
                    continue
            time.sleep(1e-3)  # somebody's request runs
        return False

    def step(self) -> None:
        """Waits for the next tokens of any request, and gives each stream its own. Streams and ``generate`` call it."""
        with self._lock:
            self._tidy()
            early = self._engine.early_token(self._practise)
            self._owed = early is not None
            self._give(early or self._engine.step())

    def _give(self, chunks: list[TokenChunk]) -> None:
        for chunk in chunks:
            live = self._live.get(chunk.request_id)
            if live is not None:
                if live.take(chunk):
                    self._engine.cancel(chunk.request_id, FinishReason.STOP)
                if live.finish_reason is not None:
                    del self._live[chunk.request_id]

    # -------------------------------------------------------------------------------------------------------- report

    def describe(self) -> dict[str, Any]:
        """Model, device, dtype, kernels and sizes, for reports."""
        return describe(self.name, self._engine)

    def stats(self) -> dict[str, Any]:
        """Which path steps took and why, compiles on the request path (all since ready or ``reset_stats``), and
        sizes."""
        engine = self._settled_engine()
        return {
            **counters(engine),
            "graphs_left_out": [str(key) for key in engine.ready.left_out],
            "ready_ms": dict(self._ready_ms),
        }

    def reset_stats(self) -> None:
        """Sets the counters of steps, paths and compiles to zero."""
        self._settled_engine().reset_counters()

    def _settled_engine(self) -> Engine:
        with self._lock:
            self._tidy()
            return self._engine

    def close(self) -> None:
        """Ends what is running (as cancelled) and gives the device's memory back. May be called more than once."""
        with self._lock:
            engine = self._running
            if engine is None:
                return
            for live in list(self._live.values()):
                self._end(live)
            try:
                engine.close()
            finally:  # an engine that has failed is let go all the same
                self._running = None
                self._owed = False
                self._idle.stop()
            del engine
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.empty_cache()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
