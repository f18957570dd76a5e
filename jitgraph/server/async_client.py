"""``jitgraph.AsyncClient``: what asyncio code uses to talk to an engine process. No torch.

Belongs to one event loop, asyncio's or uvloop's. It takes what ``LLM.generate`` and ``LLM.stream`` take and gives what
these give. Tokenizing and making text happen in the caller's process, on the loop; the engine process sees token ids
only.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jitgraph.errors import ConfigError
from jitgraph.ipc.messages import EngineFacts, Ready
from jitgraph.server.api_client import APPEAR_S, READY_S, as_listener
from jitgraph.server.client import EngineClient, EngineStream
from jitgraph.server.client_errors import RequestRefused, user_error
from jitgraph.server.client_link import SILENT_S
from jitgraph.server.client_text import ModelText, RemoteLive, take_record, wire_grammar
from jitgraph.stream import StreamChunk
from jitgraph.text.prompts import Prompt, as_params, as_prompts
from jitgraph.text.tokenizer import Tokenizer
from jitgraph.types import FinishReason, Grammar, Request, RequestOutput, SamplingParams


class AsyncStream:
    """One request's tokens as they come: an async iterator for one task.

    ``close`` (or leaving an ``async with`` block, cancelling the task that waits, or dropping the stream) cancels the
    request at the engine.
    """

    def __init__(self, source: EngineStream, live: RemoteLive) -> None:
        self._source = source
        self._live = live
        self._closed = False

    def __aiter__(self) -> AsyncStream:
        return self

    async def __anext__(self) -> StreamChunk:
        live = self._live
        while not live.pending:
            if self._closed or live.finish_reason is not None:
                raise StopAsyncIteration
            await self._advance()
        return live.pending.popleft()

    async def _advance(self) -> None:
        """Waits for the next record and takes it in."""
        try:
            record = await self._source.__anext__()
        except RequestRefused as error:
            raise user_error(error) from None
        if take_record(self._live, record, time.perf_counter_ns()):
            self._source.cancel()

    async def finish(self) -> RequestOutput:
        """Reads the rest; everything at the end, as ``generate`` gives it. Chunks not taken yet are gone."""
        self._live.whole = True
        while self._live.finish_reason is None:
            await self._advance()
        self._live.pending.clear()
        return self._live.output()

    @property
    def finish_reason(self) -> FinishReason | None:
        """Why the request ended; None while it runs."""
        return self._live.finish_reason

    def close(self) -> None:
        """Cancels the request if it still runs. May be called more than once."""
        if not self._closed:
            self._closed = True
            self._source.cancel()
            if self._live.finish_reason is None:
                self._live.finish_reason = FinishReason.CANCELLED

    async def __aenter__(self) -> AsyncStream:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()


class AsyncClient:
    """A connection to the engine process that listens at ``path``: ``async with AsyncClient(path) as client``, or
    ``await client.connect()`` before and ``await client.close()`` after use.

    Arguments are those of ``Client``. Where the connection ends, running requests end with ``EngineGone``; ``connect``
    makes it anew.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        progress: Callable[[str, int, int], None] | None = None,
        timeout_s: float = READY_S,
        appear_s: float = APPEAR_S,
    ) -> None:
        self._path = Path(path)
        self._listener = as_listener(progress)
        self._limits = (timeout_s, appear_s)
        self._ids = itertools.count(1)
        self._engine: EngineClient | None = None
        self._model_text: ModelText | None = None

    async def connect(self) -> AsyncClient:
        """Connects, or connects anew where the connection has ended; returns once the engine is ready.

        Raises:
            EngineGone: nobody listens there, the engine ended before it was ready, or time ran out.
            ConfigError: the path is no socket of one of this user's engines, or the engine is of another version.
        """
        if self._engine is None or self._engine.closed.is_set():
            timeout_s, appear_s = self._limits
            self._engine = await EngineClient.connect(
                self._path, self._listener, timeout_s, appear_s=appear_s, silence_s=SILENT_S
            )
            self._model_text = ModelText(self._engine.facts)
        return self

    @property
    def _connected(self) -> EngineClient:
        if self._engine is None:
            raise ConfigError(f"this client of {self._path} is not connected: use `async with`, or await connect()")
        return self._engine

    @property
    def _text(self) -> ModelText:
        assert self._connected and self._model_text is not None
        return self._model_text

    @property
    def facts(self) -> EngineFacts:
        """What the engine says about itself and its model."""
        return self._connected.facts

    @property
    def ready(self) -> Ready:
        """How long the engine's start took, by phase."""
        return self._connected.ready

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer.

        Raises:
            CheckpointError: the checkpoint has none; prompts of token ids work all the same.
        """
        return self._text.tokenizer

    def default_params(self) -> SamplingParams:
        """The model's own sampling settings (``generation_config.json``); greedy where it has none."""
        return self.facts.default_params

    async def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        grammar: Grammar | None = None,
        prompt_logprobs: int | None = None,
    ) -> list[RequestOutput]:
        """Answers every prompt, in order; see ``Client.generate``.

        Raises:
            RequestError, CapacityError: a prompt that cannot be answered; the others are cancelled.
            RequestRefused: the engine is overloaded, or takes no new requests.
            EngineGone: the engine process is gone.
        """
        batch = as_prompts(prompts)
        each = as_params(params, len(batch), self.default_params())
        requests = [(self._text.encode(prompt), one) for prompt, one in zip(batch, each, strict=True)]
        started = time.perf_counter_ns()
        room = asyncio.Semaphore(2 * self.facts.max_streams)  # so many that the engine always has the next one

        async def answer(ids: tuple[int, ...], one: SamplingParams) -> RequestOutput:
            async with room:
                return await self._send(ids, one, started, grammar, prompt_logprobs).finish()

        tasks = [asyncio.ensure_future(answer(ids, one)) for ids, one in requests]
        try:
            return list(await asyncio.gather(*tasks))
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def stream(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        grammar: Grammar | None = None,
        prompt_logprobs: int | None = None,
    ) -> AsyncStream:
        """Answers one prompt token by token: ``async for chunk in client.stream(prompt)``. The request is handed over
        at the call; what the engine finds wrong with it comes out of the first step of the iteration, as the errors of
        ``generate``.

        Raises:
            RequestError, CheckpointError: a prompt that cannot be sent.
            EngineGone: the engine process is gone.
        """
        started = time.perf_counter_ns()
        ids = self._text.encode(prompt)
        return self._send(ids, params or self.default_params(), started, grammar, prompt_logprobs)

    def _send(
        self,
        ids: tuple[int, ...],
        params: SamplingParams,
        started_ns: int,
        grammar: Grammar | None,
        prompt_logprobs: int | None,
    ) -> AsyncStream:
        request = Request(next(self._ids), ids, params, grammar=grammar, prompt_logprobs=prompt_logprobs)
        live, wire = self._text.live(request, started_ns), wire_grammar(request)
        try:
            source = self._connected.submit(ids, params, prompt_logprobs=prompt_logprobs, grammar=wire)
        except RequestRefused as error:
            raise user_error(error) from None
        live.make_text()  # the engine is at work meanwhile
        return AsyncStream(source, live)

    async def stats(self) -> dict[str, Any]:
        """The engine's counters since it was ready.

        Raises:
            EngineGone: the engine process is gone.
        """
        return await self._connected.stats()

    async def close(self) -> None:
        """Ends the connection, and with it what is running; the engine process lives on. May be called more than
        once."""
        if self._engine is not None:
            await self._engine.close()

    async def __aenter__(self) -> AsyncClient:
        return await self.connect()

    async def __aexit__(self, *_: object) -> None:
        await self.close()
