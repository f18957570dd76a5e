"""What the front-end notes of each HTTP request: times, counts, how it ended. The source of metrics and of the log.

Owned by the front-end's event loop; one record belongs to one request. A token costs two appends, and its share of a
block of tokens that is counted at once. Everything else is worked out when the request has ended. All ``_ns`` are
``time.perf_counter_ns``, one clock for all processes of a Linux host, so the engine's times and the front-end's may be
subtracted.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import Any

from jitgraph.ipc.messages import Tokens
from jitgraph.metrics import LATENCY_EDGES_S, PAUSE_EDGES_S, Histogram
from jitgraph.types import FinishReason

COMPLETED = (FinishReason.STOP.value, FinishReason.LENGTH.value)
"""Finish reasons of a sequence that ended by itself."""
CLIENT_LEFT = 499
"""Stands for the status of a response that nobody waited for."""
MAX_TEXT = 256
"""Characters of a client's own words that are kept in a document."""

_BLOCK = 32
"""Tokens whose times are counted at once."""


@dataclass(slots=True)
class SequenceRecord:
    """One sequence that a request asked for; ``n`` above 1 and several prompts make several. Its size does not grow
    with its tokens."""

    prompt_tokens: int
    submitted_ns: int = field(default_factory=time.perf_counter_ns)
    """When it was handed to the engine's client."""
    cached_tokens: int = 0
    """Prompt tokens that the prefix cache had."""
    finish_reason: str | None = None
    """A value of ``FinishReason``; None where it was cut off (the engine ended, an error)."""
    engine_received_ns: int = 0
    """When the engine process had read it; 0 before its first token, like the following."""
    engine_launched_ns: int = 0
    """When its first step was launched."""
    engine_first_ns: int = 0
    """When the engine had its first token."""
    first_token_ns: int = 0
    """When this process had its first token."""
    last_token_ns: int = 0
    """When this process had its latest token."""
    completion_tokens: int = 0
    """Tokens generated."""
    itl: Histogram = field(default_factory=lambda: Histogram(LATENCY_EDGES_S))
    """Gaps between consecutive tokens as this process had them, in seconds; zero between tokens of one record."""
    from_engine: Histogram = field(default_factory=lambda: Histogram(PAUSE_EDGES_S))
    """For each token, seconds from the engine's having it to this process's having it."""
    longest_gap_s: float | None = None
    """Longest of ``itl``."""
    _here: list[int] = field(default_factory=list)
    _there: list[int] = field(default_factory=list)

    def take(self, news: Tokens, now_ns: int) -> None:
        """Notes news of the engine that arrived at ``now_ns``. What comes after the finish reason is not noted: a stop
        string ends the sequence here (``finish_reason = "stop"``) before the engine knows."""
        if self.finish_reason is not None:
            return
        times = news.times_ns
        if times:
            if not self.completion_tokens:
                self._take_first(news, now_ns)
            self.completion_tokens += len(times)
            here = self._here
            if len(times) == 1:
                here.append(now_ns)
                self._there.append(times[0])
            else:
                here.extend([now_ns] * len(times))
                self._there.extend(times)
            if len(here) >= _BLOCK:
                self.settle()
        self.finish_reason = news.finish_reason

    def _take_first(self, news: Tokens, now_ns: int) -> None:
        self.engine_received_ns = news.received_ns
        self.engine_launched_ns = news.launched_ns
        self.engine_first_ns = news.times_ns[0]
        self.cached_tokens = news.cached_tokens
        self.first_token_ns = now_ns

    def settle(self) -> None:
        """Brings ``itl``, ``from_engine``, ``longest_gap_s`` and ``last_token_ns`` up to date. ``take`` does it in
        blocks, ``RequestRecord.finish`` at the end."""
        here, there = self._here, self._there
        if not here:
            return
        times = [self.last_token_ns, *here] if self.last_token_ns else here
        gaps = [(later - earlier) / 1e9 for earlier, later in itertools.pairwise(times)]
        if gaps:
            self.itl.observe_many(gaps)
            self.longest_gap_s = max(self.longest_gap_s or 0.0, *gaps)
        self.from_engine.observe_many([(to - begin) / 1e9 for begin, to in zip(there, here, strict=True)])
        self.last_token_ns = here[-1]
        here.clear()
        there.clear()

    @property
    def completed(self) -> bool:
        """Whether it ended by itself: neither cancelled nor cut off."""
        return self.finish_reason in COMPLETED and self.completion_tokens > 0

    @property
    def to_engine_s(self) -> float | None:
        """From its submission here to the engine process's having read it."""
        return _seconds(self.submitted_ns, self.engine_received_ns)

    @property
    def queue_s(self) -> float | None:
        """From the engine's having read it to the launch of its first step."""
        return _seconds(self.engine_received_ns, self.engine_launched_ns)

    @property
    def prefill_s(self) -> float | None:
        """From the launch of its first step to the engine's having its first token."""
        return _seconds(self.engine_launched_ns, self.engine_first_ns)

    @property
    def decode_s(self) -> float | None:
        """From its first token to its last, as this process had them."""
        return _seconds(self.first_token_ns, self.last_token_ns)

    @property
    def tpot_s(self) -> float | None:
        """(latency - TTFT) / (tokens - 1); None below two tokens."""
        decode_s = self.decode_s
        return None if decode_s is None or self.completion_tokens < 2 else decode_s / (self.completion_tokens - 1)


@dataclass(slots=True)
class RequestRecord:
    """One HTTP request, from its arrival to the end of its response."""

    request_id: str
    route: str
    """The route's pattern, such as ``/v1/models/{id}``, never the path that was asked for."""
    model: str = ""
    """As the client named it, or the served one where it named none; empty where the request is about none."""
    client: str = ""
    """Who asked: the name of a key or an address."""
    streamed: bool = False
    received_ns: int = field(default_factory=time.perf_counter_ns)
    """When the request had arrived, before anything was tokenised."""
    received_at: float = field(default_factory=time.time)
    """The same in seconds since 1970."""
    status: int = 0
    """HTTP status that was sent; ``CLIENT_LEFT`` where the client did not wait for one."""
    error_kind: str | None = None
    """OpenAI's ``type`` or the engine's ``Refused.kind`` of what went wrong, also in the middle of a stream."""
    finished_ns: int = 0
    """When the response had been sent or given up."""
    sequences: list[SequenceRecord] = field(default_factory=list)
    n: int = 1
    """Sequences of each prompt; those of one stand beside each other."""

    def begin(self, prompt_tokens: int) -> SequenceRecord:
        """A new sequence, handed to the engine now."""
        sequence = SequenceRecord(prompt_tokens)
        self.sequences.append(sequence)
        return sequence

    def finish(self, status: int, error_kind: str | None = None) -> None:
        """The response is over; ``status`` is 0 where none was sent. Sequences that the client left have the finish
        reason ``cancelled`` by now; those without one were cut off."""
        self.finished_ns = time.perf_counter_ns()
        self.status = status or CLIENT_LEFT
        self.error_kind = error_kind
        for sequence in self.sequences:
            sequence.settle()

    def ttft_s(self, sequence: SequenceRecord) -> float | None:
        """From the request's arrival to its sequence's first token here; None without a token."""
        return _seconds(self.received_ns, sequence.first_token_ns)

    def latency_s(self, sequence: SequenceRecord) -> float | None:
        """From the request's arrival to its sequence's last token here; None without a token."""
        return _seconds(self.received_ns, sequence.last_token_ns)

    def as_document(self) -> dict[str, Any]:
        """What the log tells of it: plain values, no word of prompt or answer. Counts are sums over its sequences,
        times are milliseconds: the first TTFT, the longest of the others."""
        every = self.sequences
        return {
            "time": datetime.fromtimestamp(self.received_at, timezone.utc).isoformat(timespec="milliseconds"),
            "request_id": _short(self.request_id),
            "client": _short(self.client),
            "route": _short(self.route),
            "model": _short(self.model) or None,
            "streamed": self.streamed,
            "status": self.status,
            "error_kind": None if self.error_kind is None else _short(self.error_kind),
            "finish_reasons": [sequence.finish_reason for sequence in every],
            "prompt_tokens": sum(sequence.prompt_tokens for sequence in every),
            "cached_tokens": sum(sequence.cached_tokens for sequence in every),
            "completion_tokens": sum(sequence.completion_tokens for sequence in every),
            "ttft_ms": _ms(min, (self.ttft_s(sequence) for sequence in every)),
            "tpot_ms": _ms(max, (sequence.tpot_s for sequence in every)),
            "itl_max_ms": _ms(max, (sequence.longest_gap_s for sequence in every)),
            "queue_ms": _ms(max, (sequence.queue_s for sequence in every)),
            "prefill_ms": _ms(max, (sequence.prefill_s for sequence in every)),
            "latency_ms": _ms(max, (self.latency_s(sequence) for sequence in every)),
            "response_ms": _ms(max, [_seconds(self.received_ns, self.finished_ns)]),
        }


def _seconds(begin_ns: int, end_ns: int) -> float | None:
    """None where either has not happened."""
    return (end_ns - begin_ns) / 1e9 if begin_ns and end_ns else None


def _ms(choose: Callable[..., float | None], seconds: Iterable[float | None]) -> float | None:
    """The chosen one of those that there are, in milliseconds."""
    chosen = choose((value for value in seconds if value is not None), default=None)
    return None if chosen is None else round(chosen * 1e3, 3)


def _short(text: str) -> str:
    return text if len(text) <= MAX_TEXT else f"{text[:MAX_TEXT]}..."
