"""One request as its reader sees it: text and tokens as they come, and everything at the end."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple, Protocol

from jitgraph.text.detokenize import IncrementalDetokenizer
from jitgraph.types import FinishReason, PromptLogprobs, Request, RequestOutput, Timings, TokenChunk, TokenLogprobs

DETOKENIZER_TAIL = 64
"""Last prompt ids shown to the detokenizer: it needs the last 8 visible ones to know how the text continues."""


class StreamChunk(NamedTuple):
    """One token's worth of a stream."""

    text: str
    """New text, safe to show: never half a character, never the beginning of a stop string."""
    token_id: int
    time_ns: int
    """``time.perf_counter_ns`` at which the engine's process read the token."""
    finish_reason: FinishReason | None = None
    logprobs: TokenLogprobs | None = None
    prompt_logprobs: PromptLogprobs | None = None
    """With the first token, if asked for."""


@dataclass
class Live:
    """A request on its way: its text, its times, and what its reader has not taken yet."""

    request: Request
    submitted_ns: int
    detokenizer: IncrementalDetokenizer | None = None
    pending: deque[StreamChunk] = field(default_factory=deque)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    times_ns: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    cached_tokens: int = 0
    prompt_logprobs: PromptLogprobs | None = None

    def take(self, chunk: TokenChunk, seen_ns: int | None = None) -> bool:
        """Adds a token: text, times, stop strings. ``seen_ns`` is when this process had it, where the engine's is
        another.

        Returns:
            Whether a stop string ended the request, so that the engine must be told.
        """
        if chunk.token_id is None:
            self.finish_reason = chunk.finish_reason
            return False
        if not self.token_ids:
            self.cached_tokens, self.prompt_logprobs = chunk.cached_tokens, chunk.prompt_logprobs
        self.times_ns.append(seen_ns or chunk.time_ns)
        self.token_ids.append(chunk.token_id)
        if chunk.logprobs is not None:
            self.logprobs.append(chunk.logprobs)
        text, reason, stopped = "", chunk.finish_reason, False
        if self.detokenizer is not None:
            text = self.detokenizer.push(chunk.token_id)
            if self.detokenizer.stopped:
                stopped, reason = reason is None, FinishReason.STOP
            elif reason is not None:
                text += self.detokenizer.finish()
        if reason is not None:
            self.finish_reason = reason
        scores = chunk.prompt_logprobs
        self.pending.append(StreamChunk(text, chunk.token_id, chunk.time_ns, reason, chunk.logprobs, scores))
        return stopped

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
            cached_tokens=self.cached_tokens,
            prompt_logprobs=self.prompt_logprobs,
        )


class StreamOwner(Protocol):
    """Who makes a stream's tokens."""

    abandoned: deque[Live]
    """Requests whose stream was dropped without being closed; to be cancelled at the next step."""

    def step(self) -> None:
        """Waits for the next tokens of anybody, and gives each its own."""

    def forget(self, live: list[Live]) -> None:
        """Cancels what still runs of these, and strikes them off."""


class Stream:
    """One request's tokens as they come: an iterator that may be closed.

    ``close`` (or leaving a ``with`` block, or dropping the stream) cancels the request at its next step.
    """

    def __init__(self, owner: StreamOwner, live: Live) -> None:
        self._owner = owner
        self._live = live
        self._closed = False

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> StreamChunk:
        while not self._live.pending:
            if self._closed or self._live.finish_reason is not None:
                self.close()
                raise StopIteration
            self._owner.step()
        return self._live.pending.popleft()

    @property
    def finish_reason(self) -> FinishReason | None:
        """Why the request ended; None while it runs."""
        return self._live.finish_reason

    @property
    def cached_tokens(self) -> int:
        """Prompt tokens that were in the cache already; known with the first token."""
        return self._live.cached_tokens

    def close(self) -> None:
        """Cancels the request if it still runs. May be called more than once."""
        if not self._closed:
            self._closed = True
            self._owner.forget([self._live])

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if not self._closed:
            self._owner.abandoned.append(self._live)  # no lock here: a collection may run while this thread holds it
