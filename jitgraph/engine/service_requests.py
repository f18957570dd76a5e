"""The requests of all clients inside one engine process: checked, handed over, answered, withdrawn. No torch.

Engine's thread. Always holds: a request stands in three books (here, in its client's and in the engine's) or in none.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from functools import partial

from jitgraph.engine.service_client import Client
from jitgraph.engine.service_deadlines import Deadlines
from jitgraph.engine.service_figures import Figures
from jitgraph.engine.service_live import Live, news_of, party_of
from jitgraph.engine.service_needs import Compiling, Grammars, Limits, RequestEngine, Sender
from jitgraph.engine.service_reader import RequestReader
from jitgraph.engine.service_room import Room, scores_bytes
from jitgraph.engine.service_shares import Shares
from jitgraph.errors import CapacityError, RequestError
from jitgraph.ipc.frames import ProtocolError, encode
from jitgraph.ipc.messages import Refused, Submit, Tokens
from jitgraph.types import FinishReason, Request, TokenChunk

_CANCELLED = FinishReason.CANCELLED.value
_BEHIND_S = 1.0
"""When to try again a request that was given up because its client had fallen behind."""
_LOGGER = logging.getLogger(__name__)


class _EngineFailed(Exception):
    """The engine raised something that is not the request's fault."""

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.error = error


class Requests:
    """The books of one engine process."""

    def __init__(
        self,
        engine: RequestEngine,
        hub: Sender,
        limits: Limits,
        figures: Figures,
        on_error: Callable[[Exception], None],
        grammars: Grammars | None = None,
    ) -> None:
        """``on_error`` hears of an engine that failed over a request. ``grammars``: who compiles them beside the token
        path; None lets ``validate`` do it, which waits."""
        self._engine = engine
        self._hub = hub
        self._limits = limits
        self._figures = figures
        self._on_error = on_error
        self._grammars = grammars
        self._compiling: list[tuple[Live, Request, Compiling]] = []
        self._held: deque[tuple[Live, Request]] = deque()
        """Those whose answers have no room yet, oldest first; ended ones may still be among them."""
        self._reader = RequestReader(limits.max_model_len)
        self._shares = Shares()
        self._room = Room(hub.most_unsent)
        self._live: dict[int, Live] = {}
        self._deadlines = Deadlines(self._live)
        self._next_identity = 1
        self._most = limits.max_streams + limits.max_queued
        self.unlaunched: deque[Live] = deque()
        """Those whose first step has not been launched, oldest first; ended ones may still be among them."""
        self.closed_because = ""
        """Why no request is taken any more; empty while they are."""

    @property
    def held_up(self) -> bool:
        """Whether any request waits for its grammar, or for room."""
        return bool(self._compiling) or bool(self._held)

    def __len__(self) -> int:
        return len(self._live)

    # -------------------------------------------------------------------------------------------------------- incoming

    def submit(self, client: Client, record: Submit) -> None:
        """Hands a request to the engine, by the shortest way where it is idle, or refuses it."""
        received_ns = time.perf_counter_ns()
        request_id = record.request_id
        if request_id in client.requests:
            return self._refuse(client, request_id, "request", f"request id {request_id} is in use: choose another")
        if self.closed_because:
            return self._refuse(client, request_id, "draining", self.closed_because)
        party = party_of(client, record.salt)
        if len(self._live) >= self._most and not self._make_way(party):
            return self._overloaded(client, request_id)
        identity = self._next_identity
        self._next_identity += 1
        live = Live(client, request_id, identity, party, received_ns, 0, False)
        self._guarded(live, lambda: self._take(live, self._reader.read(identity, record)))
        if record.timeout_s and identity in self._live:
            self._deadlines.add(time.monotonic(), identity, record.timeout_s)

    def _make_way(self, party: Hashable) -> bool:
        """Makes room in a full queue for a request of a party that has less than its share of it."""
        identity = self._shares.gives_way(party)
        if identity is None:
            return False
        live = self._live[identity]
        self._withdraw(live)
        self._overloaded(live.client, live.request_id)
        return True

    @property
    def next_deadline_s(self) -> float:
        """``time.monotonic`` at which ``expire`` may have something to do; infinite where nothing has a limit."""
        return self._deadlines.next_s

    def expire(self, now_s: float) -> None:
        """Ends the requests whose time is over, those that wait and those that run; their pages are free at once."""
        for identity, timeout_s in self._deadlines.due(now_s):
            live = self._live[identity]
            self._withdraw(live)
            how = "it was answered in part" if live.told else "it had not come to its first token"
            self._refuse(
                live.client,
                live.request_id,
                "deadline",
                f"this request was not done within the {timeout_s:g} s that it was given: {how}",
            )

    def _guarded(self, live: Live, take: Callable[[], None]) -> None:
        """Does what brings a request into the engine, and refuses it where that fails."""
        client, request_id = live.client, live.request_id
        try:
            take()
            return
        except CapacityError as error:
            kind, message, failure = "capacity", str(error), None
        except RequestError as error:
            kind, message, failure = "request", str(error), None
        except _EngineFailed as failed:
            kind, message, failure = "internal", f"the engine failed over this request: {failed}", failed.error
        except Exception:  # the engine knows nothing of it yet
            _LOGGER.exception("a request of %s could not be read", client.name)
            kind, message, failure = "internal", "this request could not be read", None
        self._forget(live)
        self._refuse(client, request_id, kind, message)
        if failure is not None:
            self._on_error(failure)

    def _take(self, live: Live, request: Request) -> None:
        """By the shortest way, or the ordinary one, or into the line of those that wait for their grammar."""
        if request.plain and not self._live and self._fire(live, request):
            return
        if request.grammar is not None and self._grammars is not None:
            compilation = self._grammars.start(request.grammar, self._hub.wake)
            if not compilation.done:
                self._await(live)
                self._compiling.append((live, request, compilation))
                return
            compilation.result()
        self._admit(live, request)

    def _admit(self, live: Live, request: Request) -> None:
        """Checks a request and hands it over, or lets it wait for room for its answer."""
        self._engine.validate(request)
        if request.prompt_logprobs is not None:
            scores_bytes(len(request.prompt_token_ids), request.prompt_logprobs)
            if not self._has_room(live, request):
                self._await(live)
                self._held.append((live, request))
                return
        self._enqueue(live, request)

    def _has_room(self, live: Live, request: Request) -> bool:
        size = scores_bytes(len(request.prompt_token_ids), request.prompt_logprobs or 0)
        return self._room.take(live.client, live.identity, size, live.client.connection.unsent)

    def look_at_held_up(self) -> None:
        """Hands over the requests whose grammar has been compiled meanwhile, and those for which there is room now."""
        if self._compiling:
            self._look_at_grammars()
        full: set[Client] = set()
        for _ in range(len(self._held)):
            live, request = self._held.popleft()
            if live.identity not in self._live:
                continue
            if live.client in full or not self._has_room(live, request):  # in the order of each client's own
                full.add(live.client)
                self._held.append((live, request))
            else:
                self._guarded(live, partial(self._enqueue, live, request))

    def _look_at_grammars(self) -> None:
        waiting, self._compiling = self._compiling, []
        for live, request, compilation in waiting:
            if live.identity not in self._live:
                continue
            if compilation.done:
                self._guarded(live, partial(self._hand_over, live, request, compilation))
            else:
                self._compiling.append((live, request, compilation))

    def _hand_over(self, live: Live, request: Request, compilation: Compiling) -> None:
        compilation.result()  # says why there is none
        self._admit(live, request)

    def _fire(self, live: Live, request: Request) -> bool:
        """Launches a request that finds nobody else here, if there is a short way for it now."""
        engine = self._engine
        try:
            shot = engine.fire(request.prompt_token_ids, request.params, request.salt)
            if shot is None:
                return False
            live.launched_ns = time.perf_counter_ns()  # the GPU works from here on
            self._add(live)
            engine.book(request, shot)
        except Exception as error:
            raise _EngineFailed(error) from error
        self._figures.begun(live.received_ns, live.launched_ns)
        return True

    def _enqueue(self, live: Live, request: Request) -> None:
        try:
            self._engine.enqueue(request)
        except Exception as error:
            raise _EngineFailed(error) from error
        self._await(live)
        self.unlaunched.append(live)

    def _await(self, live: Live) -> None:
        """It waits from now on."""
        self._shares.add(live.party, live.identity)
        self._add(live)

    def _add(self, live: Live) -> None:
        self._live[live.identity] = live
        live.client.requests[live.request_id] = live.identity

    def _overloaded(self, client: Client, request_id: int) -> None:
        waiting = len(self._live) - self._limits.max_streams
        self._refuse(
            client,
            request_id,
            "overloaded",
            f"{waiting} requests wait already, as many as may: try again later",
            self._figures.retry_after_s(waiting, self._limits.max_streams),
        )

    def _refuse(self, client: Client, request_id: int, kind: str, message: str, retry_after_s: float = 0.0) -> None:
        self._figures.outcomes[f"refused_{kind}"] += 1
        self._hub.send(client, Refused(request_id, kind, message, retry_after_s))

    def cancel(self, client: Client, request_id: int) -> None:
        """Withdraws a request; unknown ids are ignored."""
        identity = client.requests.get(request_id)
        if identity is not None:
            self._withdraw(self._live[identity])
            self._figures.outcomes[_CANCELLED] += 1
            self._hub.send(client, Tokens(request_id, (), (), finish_reason=_CANCELLED))

    def left(self, client: Client) -> None:
        """A client is gone: its requests go as well, at once."""
        for identity in list(client.requests.values()):
            self._withdraw(self._live[identity])
            self._figures.outcomes["abandoned"] += 1

    def end_all(self, kind: str, message: str) -> None:
        """Ends every request for a reason of the engine's."""
        for live in list(self._live.values()):
            self._withdraw(live)
            self._refuse(live.client, live.request_id, kind, message)

    def _withdraw(self, live: Live) -> None:
        self._forget(live)
        self._engine.cancel(live.identity)

    def behind(self, live: Live) -> None:
        """A client leaves too much unread: it loses the news of this request, and with them the request."""
        if live.identity in self._live:
            self._withdraw(live)
        unread = live.client.connection.take_back(live)
        self._refuse(
            live.client,
            live.request_id,
            "overloaded",
            f"{unread} bytes of this answer were left unread, more than of any other: read faster, or ask for less",
            _BEHIND_S,
        )

    def _forget(self, live: Live) -> None:
        self._live.pop(live.identity, None)
        self._shares.remove(live.identity)
        self._room.give_back(live.identity)
        requests = live.client.requests
        if requests.get(live.request_id) == live.identity:
            del requests[live.request_id]

    # -------------------------------------------------------------------------------------------------------- outgoing

    def rehearse(self, frame: bytes) -> None:
        """Goes the way of the first token that is waited for, for nothing and with another frame in its place."""
        live = next((one for one in self._live.values() if one.launched_ns and not one.told), None)
        if live is not None:
            encode(news_of(live, TokenChunk(live.identity, 1, live.received_ns)))
            self._hub.send_owned(live.client, ((live, frame),))

    def note_launched(self, begun: set[int]) -> None:
        """Steps were launched; ``begun``: the running requests that have had one."""
        now = time.perf_counter_ns()
        waiting = self.unlaunched
        for _ in range(len(waiting)):
            live = waiting.popleft()
            if live.identity in begun:
                live.launched_ns = now
                self._shares.remove(live.identity)
                self._figures.begun(live.received_ns, now)
            elif live.identity in self._live:
                waiting.append(live)

    def deliver(self, chunks: Sequence[TokenChunk], failure: Exception | None = None) -> None:
        """Sends each client its news. ``failure``: why the engine has ended requests, where it did."""
        frames: dict[Client, list[tuple[Live, bytes]]] = {}
        sent = list[tuple[Live, bool, FinishReason | None]]()
        for chunk in chunks:
            live = self._live.get(chunk.request_id)
            if live is None:
                continue  # withdrawn meanwhile
            if chunk.token_id is None and failure is not None:
                self._forget(live)
                self._refuse(live.client, live.request_id, "internal", f"the engine had to end this: {failure}")
                continue
            first, frame = not live.told, self._frame(live, chunk)
            if frame is not None:
                frames.setdefault(live.client, []).append((live, frame))
                sent.append((live, first, chunk.finish_reason))
        for client, theirs in frames.items():
            self._hub.send_owned(client, theirs)
        for live, first, reason in sent:
            if live.identity in self._live:  # not withdrawn over the sending, and counted as that
                self._note_sent(live, first, reason)

    def _frame(self, live: Live, chunk: TokenChunk) -> bytes | None:
        """A chunk as its client reads it; None where no frame holds it, and the client has been told."""
        record = news_of(live, chunk)
        live.told = True
        try:
            return encode(record)
        except ProtocolError as error:
            self._withdraw(live)
            self._refuse(live.client, live.request_id, "request", f"{error}: ask for less in one request")
            return None

    def _note_sent(self, live: Live, first: bool, reason: FinishReason | None) -> None:
        if reason is not None:
            self._forget(live)
            self._figures.ended(reason.value, (time.perf_counter_ns() - live.received_ns) / 1e9)
        elif first:
            self._shares.remove(live.identity)
            self._room.give_back(live.identity)
