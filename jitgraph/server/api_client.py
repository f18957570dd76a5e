"""``jitgraph.Client``: what blocking code uses to talk to an engine process. No torch.

It takes what ``LLM.generate`` and ``LLM.stream`` take and gives what these give. Tokenizing and making text happen in
the caller's process and thread; the engine process sees token ids only.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jitgraph.ipc.messages import Ready
from jitgraph.server.client_base import APPEAR_S, READY_S, ModelClient, Wishes, as_listener
from jitgraph.server.client_link import Link
from jitgraph.server.client_records import submit_frame
from jitgraph.server.client_text import ModelText, RemoteLive, request_frame
from jitgraph.stream import Stream, StreamChunk
from jitgraph.text.prompts import Prompt
from jitgraph.types import Grammar, Request, RequestOutput, SamplingParams


class ClientStream(Stream):
    """A ``Stream`` whose engine is another process. Several threads may each read their own."""

    def __init__(self, link: Link, live: RemoteLive) -> None:  # not the base's: it is owned by a link
        self._link = link
        self._live: RemoteLive = live
        self._closed = False
        self.keeps: object = None
        """Something that must live as long as this does."""

    def __next__(self) -> StreamChunk:
        live = self._live
        while True:
            live.mailbox.news = False
            if live.pending:
                return live.pending.popleft()
            if live.error is not None:
                raise live.error
            if self._closed or live.finish_reason is not None:
                self._closed = True
                raise StopIteration
            self._link.wait(live.mailbox)

    def close(self) -> None:
        """Cancels the request if it still runs. May be called more than once."""
        if not self._closed:
            self._closed = True
            self._link.end(self._live)

    def __del__(self) -> None:
        if not self._closed and not self._live.ended:
            self._link.abandon(self._live)


class Client(ModelClient):
    """A connection to the engine process that listens at ``path`` (``jitgraph engine MODEL --socket PATH``).

    Several threads may share one client: each hands its requests over at once, and of those who wait for tokens one
    reads for all. A thread that is alone waits in the socket itself. Where the connection ends, running requests end
    with ``EngineGone``, and the next call connects anew, to an engine that was started again meanwhile.

    ``progress(phase, done, total)`` hears about an engine that is still starting. ``appear_s`` is how long to wait for
    somebody to listen, ``timeout_s`` for the engine to be ready, both in seconds. ``spin_s`` is for how long after the
    last news a thread that waits polls without sleeping: tokens come earlier, for a busy core. Its default is 20 ms
    where the engine has a GPU and this machine four cores, else 0.

    Raises:
        EngineGone: nobody listens there, the engine ended before it was ready, or time ran out.
        ConfigError: the path is no socket of one of this user's engines, or the engine is of another version.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        progress: Callable[[str, int, int], None] | None = None,
        timeout_s: float = READY_S,
        appear_s: float = APPEAR_S,
        spin_s: float | None = None,
    ) -> None:
        super().__init__()
        self._link = Link(Path(path), as_listener(progress), timeout_s, appear_s, spin_s)
        self._model_text = ModelText(self.facts)

    @property
    def ready(self) -> Ready:
        """How long the engine's start took, by phase."""
        return self._link.ready

    @property
    def _text(self) -> ModelText:
        return self._model_text

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        grammar: Grammar | None = None,
        prompt_logprobs: int | None = None,
        timeout_s: float | None = None,
    ) -> list[RequestOutput]:
        """Answers every prompt, in order; arguments and results are those of ``LLM.generate``. Times are what this
        process sees: TTFT is from handing over the token ids to the first token here.

        ``timeout_s``: seconds from the call that all of it may take; the engine then ends what is not done.

        Raises:
            RequestError, CapacityError: a prompt that cannot be answered; the others are cancelled.
            RequestRefused: the engine is overloaded, takes no new requests, or was not done in time (``kind``).
            EngineGone: the engine process is gone.
        """
        wishes = Wishes(grammar, prompt_logprobs, timeout_s, time.perf_counter_ns())
        encoded = self._encode(prompts, params)
        lives = [self._live(ids, one, wishes, time.perf_counter_ns()) for ids, one in encoded]
        waiting, running = deque(lives), list[RemoteLive]()
        mailbox = lives[0].mailbox
        for live in lives:
            live.mailbox, live.whole = mailbox, True
        try:
            while waiting or running:
                while waiting and len(running) < self._at_once:
                    running.append(waiting.popleft())
                    self._hand_over(running[-1], wishes)
                self._link.wait(mailbox)
                mailbox.news = False
                failed = next((live.error for live in running if live.error is not None), None)
                if failed is not None:
                    raise failed
                running = [live for live in running if not live.ended]
        finally:
            for live in running:
                self._link.end(live)
        return [live.output() for live in lives]

    def stream(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        grammar: Grammar | None = None,
        prompt_logprobs: int | None = None,
        timeout_s: float | None = None,
    ) -> ClientStream:
        """Answers one prompt token by token, as ``LLM.stream``. The request is handed over at the call; what the engine
        finds wrong with it comes out of the first ``next``, as the errors of ``generate``. ``timeout_s``: see there.

        Raises:
            RequestError, CheckpointError: a prompt that cannot be sent.
            EngineGone: the engine process is gone.
        """
        started_ns = time.perf_counter_ns()
        params = params or self.default_params()
        plain = grammar is None and prompt_logprobs is None and timeout_s is None and not params.stop
        if plain and type(prompt) is list and set(map(type, prompt)) == {int}:
            live = self._fire(prompt, params, started_ns)
        else:
            wishes = Wishes(grammar, prompt_logprobs, timeout_s, started_ns)
            live = self._live(self._text.encode(prompt), params, wishes, started_ns)
            self._hand_over(live, wishes)
        return ClientStream(self._link, live)

    def _fire(self, ids: list[int], params: SamplingParams, started_ns: int) -> RemoteLive:
        """The same for ids with nothing besides, where little more than packing them comes before the sending: a thread
        that has slept runs all it does for the first time, and slowly."""
        number = next(self._ids)

        def book() -> RemoteLive:
            return self._text.live(Request(number, tuple(ids), params), started_ns)

        live = self._link.fire(number, submit_frame(number, ids, params), book)
        live.make_text()
        return live

    def _hand_over(self, live: RemoteLive, wishes: Wishes) -> None:
        self._link.submit(live, request_frame(live.request, wishes.left_s))
        live.make_text()  # the engine is at work meanwhile

    def stats(self) -> dict[str, Any]:
        """The engine's counters since it was ready.

        Raises:
            EngineGone: the engine process is gone.
        """
        return self._link.ask_stats()

    def close(self) -> None:
        """Ends what is running (as cancelled) and the connection; the engine process lives on. May be called more than
        once."""
        self._link.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
