"""The shortest way of a lone stream's token, while there is nothing else to look after.

Engine's thread. Almost all tokens of such a stream come out of a device-side loop, milliseconds apart, when little of
the host's code is in its caches any more: so theirs is one function that touches little. The first one and the last
carry books with them, but are handed out before these. What is asked for besides goes the ordinary way
(``Engine.step``), with the same result; nothing is done then.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable

import torch

from jitgraph.engine.flights import InFlight
from jitgraph.engine.runner import Runner
from jitgraph.engine.scheduler import Scheduler
from jitgraph.graphs.key import GraphKey
from jitgraph.types import FinishReason, TokenChunk

REHEARSE_AHEAD_S = (600e-6, 300e-6, 120e-6)
"""How long before a first token is due its way is rehearsed: the first time is slow, the others leave it at hand."""
_WEIGHT = 0.1


class Steady:
    """One engine's."""

    def __init__(
        self,
        runner: Runner,
        scheduler: Scheduler,
        flights: deque[InFlight],
        recover: Callable[[], None],
    ) -> None:
        """``flights``: the engine's own queue of what has been launched, oldest first. ``recover``: what it does where
        an interrupt may have cost a token."""
        self._runner = runner
        self._reader = runner.reader
        # To wait for the emulated device is to do its work.
        self._read, self._look_out = runner.reader.token, runner.reader.look_out
        if runner.emulated is not None:
            self._read, self._look_out = torch.inference_mode()(self._read), torch.inference_mode()(self._look_out)
        self._took_s: dict[GraphKey, float] = {}
        """From a prompt's launch to its token."""
        self._scheduler = scheduler
        self._dispatcher = runner.dispatcher
        self._flights = flights
        self._loops = runner.loops
        self._recover = recover

    def look(self, flight: InFlight, pending: bool) -> None:
        """Settles, once a token of a flight has been read the ordinary way, whether its others need no more than to be
        read. ``pending``: there are graphs to be made, which the wait for tokens must do where it does that at all."""
        waits_alone = self._reader.shadow is None or not pending
        flight.steady = flight.loop and waits_alone and flight.sequences[0].request.params.logprobs is None

    def token(self) -> list[TokenChunk] | None:
        """Waits for the next token and records it; None where the ordinary way must be taken."""
        flights, scheduler = self._flights, self._scheduler
        flight = flights[0] if flights else None
        if flight is None or not flight.steady or scheduler.waiting or self._loops.called_off:
            return None
        sequence, read, running = flight.sequences[0], flight.read + 1, scheduler.running
        tokens = sequence.tokens
        if (
            read >= flight.count  # the flight's last token ends it
            or (len(flights) == 1 and sequence.remaining > 0)  # another loop is to be launched
            or len(running) != 1
            or running[0] is not sequence
            or len(tokens) + 1 >= sequence.last_at
        ):
            return None
        recording = False
        try:
            token = self._read(flight.first + flight.read)
            now_ns = time.perf_counter_ns()
            if token in sequence.stop_ids:
                return None  # it is read again
            recording = True
            # The store hears that steps are over with the flight's last token: no graph that may go waits for these.
            flight.read = read
            self._runner.steps += 1
            self._dispatcher.looped += 1
            tokens.append(token)
            return [TokenChunk(sequence.request.request_id, token, now_ns)]
        except BaseException:
            if recording or self._reader.broken:
                self._recover()
            raise

    def early(self, pending: bool, rehearse: Callable[[], None] | None) -> list[TokenChunk] | None:
        """Waits for the token that begins a stream, or ends it for its length, and does nothing else: the books take
        longer than the token, so its reader may have it before. The next ``Engine.step`` keeps them. None, without
        waiting, where another token is next; None as well where it is a stop id. ``pending``: as in ``look``.
        ``rehearse`` is called shortly before a first token is due."""
        flights, scheduler = self._flights, self._scheduler
        flight = flights[0] if flights else None
        if flight is None or flight.told or flight.read + 1 < flight.count or len(flight.sequences) != 1:
            return None
        sequence, running = flight.sequences[0], scheduler.running
        made = len(sequence.tokens)
        ends = made + 1 == sequence.last_at
        if (
            scheduler.waiting
            or self._loops.called_off
            or len(running) != 1
            or running[0] is not sequence
            or not (len(flights) == 1 and ends if flight.steady else self._begins(flight, pending))
        ):
            return None
        try:
            if not made and rehearse is not None:
                self._rehearse(flight, rehearse)
            token = self._read(flight.first + flight.read)
            now_ns = time.perf_counter_ns()
        except BaseException:
            if self._reader.broken:
                self._recover()
            raise
        if token in sequence.stop_ids:
            return None
        if not made:
            self._note(flight.key, now_ns / 1e9 - flight.begun_s)
        reason, cached = FinishReason.LENGTH if ends else None, 0 if made else sequence.cached
        chunks = [TokenChunk(sequence.request.request_id, token, now_ns, None, reason, cached)]
        flight.told = True  # at the very end: an interrupt before leaves the token to the ordinary way
        return chunks

    def _note(self, key: GraphKey, took_s: float) -> None:
        """Takes note of a prompt's time: smoothed upwards alone, because too early a rehearsal does no harm."""
        known_s = self._took_s.get(key, math.inf)
        self._took_s[key] = took_s if took_s < known_s else known_s + _WEIGHT * min(took_s - known_s, known_s)

    def _rehearse(self, flight: InFlight, rehearse: Callable[[], None]) -> None:
        """In the last part of the wait for a first token: what ran for the last time when it began may be in no cache
        any more. Only where it is known when the token is due."""
        took_s = self._took_s.get(flight.key)
        if took_s is None:
            return
        for ahead_s in REHEARSE_AHEAD_S:
            if not self._look_out(flight.first, flight.begun_s + took_s - ahead_s):
                return
            rehearse()

    def _begins(self, flight: InFlight, pending: bool) -> bool:
        """Whether a flight is a prompt's last step, and nothing is wanted of it but the token."""
        request = flight.sequences[0].request
        waits_alone = self._reader.shadow is None or not pending
        return (
            waits_alone
            and not flight.loop
            and not flight.sequences[0].tokens
            and request.plain
            and request.params.logprobs is None
        )
