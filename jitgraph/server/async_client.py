"""``jitgraph.AsyncClient``: what asyncio code uses to talk to an engine process. No torch.

Belongs to one event loop, asyncio's or uvloop's. It takes what ``LLM.generate`` and ``LLM.stream`` take and gives what
these give. Tokenizing and making text happen in the caller's process, on the loop; the engine process sees token ids
only.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

from jitgraph.errors import ConfigError
from jitgraph.ipc.messages import Ready
from jitgraph.server.client import EngineClient, EngineStream
from jitgraph.server.client_base import APPEAR_S, READY_S, ModelClient, Wishes, as_listener, check_same_model
from jitgraph.server.client_errors import EngineGone, RequestRefused, user_error
from jitgraph.server.client_link import SILENT_S
from jitgraph.server.client_text import ModelText, RemoteLive, take_record, wire_grammar
from jitgraph.stream import StreamChunk
from jitgraph.text.prompts import Prompt
from jitgraph.types import FinishReason, Grammar, RequestOutput, SamplingParams


class AsyncStream:
    """One request's tokens as they come: an async iterator for one task.

    ``close`` (or leaving an ``async with`` block, cancelling the task that waits, or dropping the stream) cancels the
    request at the engine.
    """

    def __init__(self, live: RemoteLive, source: EngineStream | None, later: Callable[[], Awaitable[EngineStream]]):
        """``later`` sends the request where there is no ``source`` yet: the connection has to be made anew first."""
        self._source = source
        self._later = later
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
        source = self._source
        if source is None:
            source = self._source = await self._later()
        try:
            record = await source.__anext__()
        except RequestRefused as error:
            raise user_error(error) from None
        if take_record(self._live, record, time.perf_counter_ns()):
            source.cancel()

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
            if self._source is not None:
                self._source.cancel()
            if self._live.finish_reason is None:
                self._live.finish_reason = FinishReason.CANCELLED

    async def __aenter__(self) -> AsyncStream:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()


class AsyncClient(ModelClient):
    """A connection to the engine process that listens at ``path``: ``async with AsyncClient(path) as client``, or
    ``await client.connect()`` before and ``await client.close()`` after use.

    Arguments are those of ``Client``. Where the connection ends, running requests end with ``EngineGone``, and the next
    call connects anew, to an engine that was started again meanwhile; after ``close`` only ``connect`` does.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        progress: Callable[[str, int, int], None] | None = None,
        timeout_s: float = READY_S,
        appear_s: float = APPEAR_S,
    ) -> None:
        super().__init__()
        self._path = Path(path)
        self._listener = as_listener(progress)
        self._limits = (timeout_s, appear_s)
        self._connecting = asyncio.Lock()
        self._engine: EngineClient | None = None
        self._model_text: ModelText | None = None
        self._closed = False

    async def connect(self) -> AsyncClient:
        """Connects, or connects anew where the connection has ended; returns once the engine is ready.

        Raises:
            EngineGone: nobody listens there, the engine ended before it was ready, or time ran out.
            ConfigError: the path is no socket of one of this user's engines, or the engine is of another version.
        """
        self._closed = False
        await self._connect(self._limits[1])
        return self

    async def _connect(self, appear_s: float) -> EngineClient:
        """The connection, made if there is none."""
        async with self._connecting:
            engine = self._engine
            if engine is None or engine.closed.is_set():
                engine = await EngineClient.connect(
                    self._path, self._listener, self._limits[0], appear_s=appear_s, silence_s=SILENT_S
                )
                self._engine, self._model_text = engine, ModelText(engine.facts)
            return engine

    async def _current(self) -> EngineClient:
        """The connection, made anew if it has ended.

        Raises:
            EngineGone: it has, and nobody serves the same model there now.
        """
        engine = self._connected
        if not engine.hung_up:
            return engine
        await engine.closed.wait()
        before, reason = engine.facts, str(engine.gone)
        if self._closed:
            raise EngineGone(reason)
        try:
            engine = await self._connect(0.0)
        except EngineGone as error:
            raise EngineGone(f"{reason}; {error.reason}") from None
        check_same_model(self._path, before, engine.facts, reason)
        return engine

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
    def ready(self) -> Ready:
        """How long the engine's start took, by phase."""
        return self._connected.ready

    async def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        grammar: Grammar | None = None,
        prompt_logprobs: int | None = None,
        timeout_s: float | None = None,
    ) -> list[RequestOutput]:
        """Answers every prompt, in order; see ``Client.generate``, whose errors are raised."""
        wishes = Wishes(grammar, prompt_logprobs, timeout_s, time.perf_counter_ns())
        await self._current()
        requests = self._encode(prompts, params)
        started = time.perf_counter_ns()
        room = asyncio.Semaphore(self._at_once)

        async def answer(ids: tuple[int, ...], one: SamplingParams) -> RequestOutput:
            async with room:
                return await self._send(self._live(ids, one, wishes, started), wishes).finish()

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
        timeout_s: float | None = None,
    ) -> AsyncStream:
        """Answers one prompt token by token: ``async for chunk in client.stream(prompt)``. The request is handed over
        at the call, or with the first step of the iteration where the connection must be made anew before; what the
        engine finds wrong with it comes out of that step, as the errors of ``Client.generate``.

        Raises:
            RequestError, CheckpointError: a prompt that cannot be sent.
        """
        wishes = Wishes(grammar, prompt_logprobs, timeout_s, time.perf_counter_ns())
        params = params or self.default_params()
        return self._send(self._live(self._text.encode(prompt), params, wishes, wishes.started_ns), wishes)

    def _send(self, live: RemoteLive, wishes: Wishes) -> AsyncStream:
        async def later() -> EngineStream:
            return self._submit(await self._current(), live, wishes)

        engine = self._connected
        source = None if engine.hung_up else self._submit(engine, live, wishes)
        live.make_text()  # the engine is at work meanwhile
        return AsyncStream(live, source, later)

    @staticmethod
    def _submit(engine: EngineClient, live: RemoteLive, wishes: Wishes) -> EngineStream:
        request = live.request
        try:
            return engine.submit(
                request.prompt_token_ids,
                request.params,
                prompt_logprobs=request.prompt_logprobs,
                grammar=wire_grammar(request),
                timeout_s=wishes.left_s,
            )
        except RequestRefused as error:
            raise user_error(error) from None

    async def stats(self) -> dict[str, Any]:
        """The engine's counters since it was ready.

        Raises:
            EngineGone: the engine process is gone.
        """
        return await (await self._current()).stats()

    async def close(self) -> None:
        """Ends the connection, and with it what is running; the engine process lives on. May be called more than
        once."""
        self._closed = True
        if self._engine is not None:
            await self._engine.close()

    async def __aenter__(self) -> AsyncClient:
        return await self.connect()

    async def __aexit__(self, *_: object) -> None:
        await self.close()
