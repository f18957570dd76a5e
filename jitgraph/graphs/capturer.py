"""The shadow capture: fills the store while the engine serves, one short piece at a time.

Engine's thread, which calls ``advance`` where it has nothing better to do: while it waits for the token of a step in
flight, or when idle. What the driver does slowly (instantiating, destroying) goes to a helper thread. What always
holds:

- One capture is open at a time. It may stay open while the engine launches steps on its own stream.
- Nothing here raises to the engine or makes a request wait. A piece that fails ends its capture, leaves nothing behind,
  is counted by its reason, and the key is tried again later.
- What has never run is not captured beside running steps: its first run may load modules and would block. It is warmed
  up when idle, eagerly, on the engine's own stream.
- Every graph that was made is destroyed once, at the latest by ``close``.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass

from jitgraph.graphs.captured import CapturedGraph, ShadowCapture
from jitgraph.graphs.helper import Helper, HelperThread
from jitgraph.graphs.key import GraphKey
from jitgraph.graphs.pieces import Expected, Piece
from jitgraph.graphs.store import Store
from jitgraph.graphs.store_records import Retired


@dataclass
class _Open:
    """The capture under way."""

    key: GraphKey
    capture: ShadowCapture
    exhausted: bool = False


@dataclass
class _Making:
    """A capture that ended and is being instantiated."""

    key: GraphKey
    future: Future[CapturedGraph]


@dataclass
class _Leaving:
    """A graph that is being destroyed."""

    retired: Retired[CapturedGraph]
    future: Future[None]


@dataclass
class _Warming:
    """A key that is being warmed up."""

    key: GraphKey
    pieces: Iterator[None]


class ShadowCapturer:
    """Captures what the store wants and destroys what it lets go.

    ``backend`` makes the capture of a key. ``is_warm`` tells whether all that the key launches has run before;
    ``warm_up`` runs it, in pieces. ``clock`` is in seconds.
    """

    def __init__(
        self,
        store: Store[CapturedGraph],
        backend: Callable[[GraphKey], ShadowCapture],
        is_warm: Callable[[GraphKey], bool],
        warm_up: Callable[[GraphKey], Iterator[None]],
        clock: Callable[[], float] = time.perf_counter,
        helper: Helper | None = None,
    ) -> None:
        self._store = store
        self._backend = backend
        self._is_warm = is_warm
        self._warm_up = warm_up
        self._clock = clock
        self._helper: Helper = HelperThread() if helper is None else helper
        self._expected = {piece: Expected(clock()) for piece in Piece}
        self._eligible = self._warm  # one object, so that the store recognises the question
        self._warmed: set[GraphKey] = set()
        self._next: GraphKey | None = None
        self._warming: _Warming | None = None
        self._open: _Open | None = None
        self._making: list[_Making] = []
        self._leaving: list[_Leaving] = []
        self._closed = False

    @property
    def pending(self) -> bool:
        """Whether there is anything under way, or anything that ``advance`` would begin when idle.

        Keys that wait for their back-off, or are not wanted enough to displace another, are not pending.
        """
        if self._closed:
            return False
        under_way = self._open or self._warming or self._next or self._making or self._leaving
        return bool(under_way) or self._store.retiring or self._store.worth_asking(self._clock())

    def advance(self, deadline: float | None = None, idle: bool = False) -> bool:
        """Does at most one piece of work, if it can be expected to be done by ``deadline`` (on the clock; None: any
        time). Returns whether anything was done.

        ``idle``: no step is running or about to be; only then is anything warmed up. A call without it breaks a warm-up
        off.
        """
        if self._closed:
            return False
        if not idle:
            self.interrupt()
        now = self._clock()
        piece = self._next_piece(now, idle)
        if piece is None or (deadline is not None and now + self._expected[piece].duration(now) > deadline):
            return False
        done = self._run(piece, idle)
        if done and not idle:  # when idle, another thread may hold the interpreter meanwhile: that says nothing
            self._expected[piece].add(self._clock() - now, now)
        return done

    def interrupt(self) -> None:
        """A request has come: a warm-up is broken off; an open capture stays as it is, to be continued. Cheap."""
        warming, self._warming = self._warming, None
        if warming is not None:
            self._store.abandon(warming.key)
            _close_pieces(warming.pieces)

    def abandon(self) -> None:
        """Breaks off the open capture as well; its key is next. For what no open capture survives, such as waiting for
        the whole device."""
        self.interrupt()
        opened, self._open = self._open, None
        if opened is not None:
            self._store.abandon(opened.key)
            opened.capture.abort()

    def close(self) -> None:
        """Breaks off, waits for the helper thread, destroys every graph of the store. All steps must be done.

        May be called more than once. Afterwards ``advance`` does nothing.
        """
        self._closed = True
        self.abandon()
        self._helper.close()
        while self._making:
            self._collect_made(self._making.pop())
        while self._leaving:
            self._collect_gone(self._leaving.pop())
        for retired in self._store.close():
            self._store.destroyed(retired, _failure(Piece.DESTROY, _try(retired.graph.destroy)))

    # ---------------------------------------------------------------------------------------------------------- pieces

    def _next_piece(self, now: float, idle: bool) -> Piece | None:
        if any(one.future.done() for one in self._making) or any(one.future.done() for one in self._leaving):
            return Piece.COLLECT
        if self._store.retiring:
            return Piece.DESTROY
        if self._open is not None:
            return Piece.END if self._open.exhausted else Piece.STAGE
        if self._warming is not None:
            return Piece.WARM_UP
        if self._next is not None or self._store.worth_asking(now, None if idle else self._eligible):
            return Piece.BEGIN
        return None

    def _run(self, piece: Piece, idle: bool) -> bool:
        if piece is Piece.COLLECT:
            return self._collect()
        if piece is Piece.DESTROY:
            return self._destroy()
        if piece is Piece.BEGIN:
            return self._begin(idle)
        return self._warm_up_on() if piece is Piece.WARM_UP else self._capture_on(piece)

    def _collect(self) -> bool:
        for made in self._making:
            if made.future.done():
                self._making.remove(made)
                self._collect_made(made)
                return True
        for gone in self._leaving:
            if gone.future.done():
                self._leaving.remove(gone)
                self._collect_gone(gone)
                return True
        return False

    def _collect_made(self, made: _Making) -> None:
        error = made.future.exception()
        if error is None:
            graph = made.future.result()
            self._store.finish(made.key, graph, graph.nbytes, self._clock())
        else:
            self._store.fail(made.key, f"instantiate: {type(error).__name__}", self._clock(), str(error))

    def _collect_gone(self, gone: _Leaving) -> None:
        self._store.destroyed(gone.retired, _failure(Piece.DESTROY, gone.future.exception()))

    def _destroy(self) -> bool:
        for retired in self._store.destroyable():
            try:
                future = self._helper.submit(retired.graph.destroy)
            except Exception:  # no helper to be had: a pause now is better than a graph that stays
                self._store.destroyed(retired, _failure(Piece.DESTROY, _try(retired.graph.destroy)))
            else:
                self._leaving.append(_Leaving(retired, future))
        return True

    def _begin(self, idle: bool) -> bool:
        """Chooses the next key and opens its capture, or begins to warm it up."""
        now = self._clock()
        key, self._next = self._next, None
        if key is None:
            try:
                key = self._store.next_key(now, None if idle else self._eligible)
            except Exception as error:  # ``is_warm`` came from outside
                self._store.counters.failures[_failure(Piece.BEGIN, error)] += 1
                return False
        if key is None:
            return self._store.retiring  # some were evicted
        if not self._warm(key):
            return self._begin_warm_up(key)
        if not self._store.begin(key):
            return False
        return self._begin_capture(key)

    def _begin_capture(self, key: GraphKey) -> bool:
        try:
            capture = self._backend(key)
        except BaseException as error:
            return self._give_up(key, Piece.BEGIN, error)
        self._open = _Open(key, capture)
        try:
            capture.begin()
        except BaseException as error:
            return self._drop_capture(self._open, Piece.BEGIN, error)
        return True

    def _capture_on(self, piece: Piece) -> bool:
        opened = self._open
        assert opened is not None
        try:
            if piece is Piece.STAGE:
                opened.exhausted = opened.capture.advance()
                return True
            opened.capture.end()
            future = self._helper.submit(lambda: _instantiate(opened.capture))
        except BaseException as error:
            return self._drop_capture(opened, piece, error)
        self._open = None
        self._making.append(_Making(opened.key, future))
        return True

    def _drop_capture(self, opened: _Open, piece: Piece, error: BaseException) -> bool:
        self._open = None
        opened.capture.abort()
        return self._give_up(opened.key, piece, error)

    def _give_up(self, key: GraphKey, piece: Piece, error: BaseException) -> bool:
        """Counts a failure and puts the key on its back-off; an interrupt from outside goes on its way."""
        self._store.fail(key, _failure(piece, error), self._clock(), str(error))
        if not isinstance(error, Exception):
            raise error
        return True

    # ---------------------------------------------------------------------------------------------------------- warm-up

    def _warm(self, key: GraphKey) -> bool:
        return key in self._warmed or self._is_warm(key)

    def _begin_warm_up(self, key: GraphKey) -> bool:
        try:
            self._warming = _Warming(key, self._warm_up(key))
        except BaseException as error:
            return self._give_up(key, Piece.WARM_UP, error)
        return True

    def _warm_up_on(self) -> bool:
        warming = self._warming
        assert warming is not None
        try:
            next(warming.pieces)
        except StopIteration:
            self._warming = None
            self._warmed.add(warming.key)
            self._next = warming.key
        except BaseException as error:
            self._warming = None
            return self._give_up(warming.key, Piece.WARM_UP, error)
        return True


def _instantiate(capture: ShadowCapture) -> CapturedGraph:
    """On the helper thread: the graph, or nothing left of it."""
    try:
        return capture.instantiate()
    except BaseException:
        capture.abort()
        raise


def _try(work: Callable[[], None]) -> Exception | None:
    try:
        work()
    except Exception as error:
        return error
    return None


def _failure(piece: Piece, error: BaseException | None) -> str:
    """The name under which a failure is counted; empty for none."""
    return "" if error is None else f"{piece.value}: {type(error).__name__}"


def _close_pieces(pieces: Iterator[None]) -> None:
    """Ends a generator early; what it raises on the way out concerns nobody any more."""
    with contextlib.suppress(Exception):
        getattr(pieces, "close", lambda: None)()
