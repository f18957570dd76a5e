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

from jitgraph.ipc.messages import EngineFacts, Ready, StartPhase
from jitgraph.server.client_link import Link
from jitgraph.server.client_text import ModelText, RemoteLive, request_frame
from jitgraph.stream import Stream, StreamChunk
from jitgraph.text.prompts import Prompt, as_params, as_prompts
from jitgraph.text.tokenizer import Tokenizer
from jitgraph.types import Grammar, Request, RequestOutput, SamplingParams

APPEAR_S = 5.0
"""How long a client waits for an engine to listen at all."""
READY_S = 600.0
"""How long it waits for one that listens to be ready."""


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


class Client:
    """A connection to the engine process that listens at ``path`` (``jitgraph engine MODEL --socket PATH``).

    Several threads may share one client: each hands its requests over at once, and of those who wait for tokens one
    reads for all. A thread that is alone waits in the socket itself. Where the connection ends, running requests end
    with ``EngineGone``, and the next request tries to connect anew.

    ``progress(phase, done, total)`` hears about an engine that is still starting. ``appear_s`` is how long to wait for
    somebody to listen, ``timeout_s`` for the engine to be ready, both in seconds. ``spin_s`` is for how long after the
    last news a thread that waits polls without sleeping: tokens come a little earlier, for a busy core.

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
        spin_s: float = 0.0,
    ) -> None:
        self._link = Link(Path(path), as_listener(progress), timeout_s, appear_s, spin_s)
        self._text = ModelText(self.facts)

    @property
    def facts(self) -> EngineFacts:
        """What the engine says about itself and its model."""
        return self.ready.facts

    @property
    def ready(self) -> Ready:
        """How long the engine's start took, by phase."""
        return self._link.ready

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

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        grammar: Grammar | None = None,
        prompt_logprobs: int | None = None,
    ) -> list[RequestOutput]:
        """Answers every prompt, in order; arguments and results are those of ``LLM.generate``. Times are what this
        process sees: TTFT is from handing over the token ids to the first token here.

        Raises:
            RequestError, CapacityError: a prompt that cannot be answered; the others are cancelled.
            RequestRefused: the engine is overloaded, or takes no new requests.
            EngineGone: the engine process is gone.
        """
        batch = as_prompts(prompts)
        each = as_params(params, len(batch), self.default_params())
        encoded = [(self._text.encode(prompt), one) for prompt, one in zip(batch, each, strict=True)]
        lives = [self._make(ids, one, time.perf_counter_ns(), grammar, prompt_logprobs) for ids, one in encoded]
        waiting, running = deque(lives), list[RemoteLive]()
        at_once = 2 * self.facts.max_streams  # so many that the engine always has the next one
        mailbox = lives[0].mailbox
        for live in lives:
            live.mailbox, live.whole = mailbox, True
        try:
            while waiting or running:
                while waiting and len(running) < at_once:
                    running.append(waiting.popleft())
                    self._hand_over(running[-1])
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
    ) -> ClientStream:
        """Answers one prompt token by token, as ``LLM.stream``. The request is handed over at the call; what the engine
        finds wrong with it comes out of the first ``next``, as the errors of ``generate``.

        Raises:
            RequestError, CheckpointError: a prompt that cannot be sent.
            EngineGone: the engine process is gone.
        """
        started = time.perf_counter_ns()
        params = params or self.default_params()
        live = self._make(self._text.encode(prompt), params, started, grammar, prompt_logprobs)
        self._hand_over(live)
        return ClientStream(self._link, live)

    def _make(
        self,
        ids: tuple[int, ...],
        params: SamplingParams,
        started_ns: int,
        grammar: Grammar | None,
        prompt_logprobs: int | None,
    ) -> RemoteLive:
        number = self._link.next_id()
        request = Request(number, ids, params, grammar=grammar, prompt_logprobs=prompt_logprobs)
        return self._text.live(request, started_ns)

    def _hand_over(self, live: RemoteLive) -> None:
        self._link.submit(live, request_frame(live.request))
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


def as_listener(progress: Callable[[str, int, int], None] | None) -> Callable[[StartPhase], None] | None:
    """``progress`` as the connection calls it."""
    if progress is None:
        return None
    return lambda news: progress(news.phase, news.done, news.total)
