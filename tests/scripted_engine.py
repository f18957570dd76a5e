"""An engine process's side of the protocol in a thread, which answers as a test tells it to. No model, no torch."""

from __future__ import annotations

import os
import select
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jitgraph.ipc import messages as m
from jitgraph.ipc.frames import ProtocolError, encode, engine_framer
from jitgraph.ipc.sockets import Connection, listen
from jitgraph.types import SamplingParams

VOCABULARY = 2048
PLAIN = SamplingParams()


def facts(**changes: Any) -> m.EngineFacts:
    values: dict[str, Any] = {
        "pid": os.getpid(),
        "model": "scripted",
        "folder": None,
        "vocab_size": VOCABULARY,
        "max_model_len": 4096,
        "max_streams": 4,
        "eos_token_ids": (1,),
        "default_params": SamplingParams(max_tokens=4),
        "device": "cpu",
        "dtype": "float32",
        "fingerprint": "f",
        "emulated": True,
    }
    return m.EngineFacts(**{**values, **changes})


class Asked:
    """A request as the engine sees it."""

    def __init__(self, engine: ScriptedEngine, connection: Connection[Any], record: m.Submit) -> None:
        self.engine, self.connection, self.record = engine, connection, record
        self.ids = m.unpack_ids(record.prompt)
        self.params = m.unpack_params(record.params)

    def tokens(self, ids: Sequence[int], finish: str | None = None, **more: Any) -> None:
        now = time.perf_counter_ns()
        self.say(m.Tokens(self.record.request_id, tuple(ids), (now,) * len(ids), finish_reason=finish, **more))

    def refuse(self, kind: str, message: str, retry_after_s: float = 0.0) -> None:
        self.say(m.Refused(self.record.request_id, kind, message, retry_after_s))

    def say(self, record: m.Message) -> None:
        self.engine.send(self.connection, encode(record))


def count_up(asked: Asked) -> None:
    """Answers with as many tokens as wanted: the prompt's sum, plus 0, 1, 2 ..., each in a record of its own."""
    first, count = sum(asked.ids), asked.params.max_tokens
    for i in range(count):
        asked.tokens([(first + i) % VOCABULARY], "length" if i == count - 1 else None)


class ScriptedEngine:
    """Listens at ``path`` until closed. ``answer`` is called in its thread with each request; requests are kept."""

    def __init__(self, path: Path, answer: Callable[[Asked], None] = count_up, **changes: Any) -> None:
        self.path, self.answer, self.facts = path, answer, facts(**changes)
        self.requests: list[Asked] = []
        self.cancelled: list[int] = []
        self.beats = True
        self.wait_ready = False
        """Greets as an engine that is not ready; ``get_ready`` ends that."""
        self.version = m.PROTOCOL
        self.drained = threading.Event()
        self.hellos: list[str] = []
        self._connections: list[Connection[Any]] = []
        self._lock = threading.RLock()
        self._stopped = False
        self._listener = listen(path)
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> ScriptedEngine:
        self._thread.start()
        return self

    def _run(self) -> None:
        beat_at = 0.0
        while not self._stopped:
            with self._lock:
                open_ones = [one for one in self._connections if not one.closed]
            watched: list[Any] = [self._listener, *open_ones]
            try:
                readable, _, _ = select.select(watched, [], [], 0.005)
            except (OSError, ValueError):  # a test closed one of them
                continue
            with self._lock:
                for one in readable:
                    if one is self._listener:
                        self._connections.append(Connection(self._listener.accept()[0], engine_framer()))
                    else:
                        self._receive(one)
                for one in self._connections:
                    if not one.closed and one.unsent:
                        self._try(one, one.flush)
                if self.beats and not self.wait_ready and time.monotonic() > beat_at:
                    beat_at = time.monotonic() + m.BEAT_S / 2
                    self.broadcast(m.Beat(time.perf_counter_ns(), 0, 0, 9, 9, len(self.requests)))

    def _receive(self, connection: Connection[Any]) -> None:
        try:
            for record in connection.receive():
                self._hear(connection, record)
        except ProtocolError:
            connection.close()

    def _hear(self, connection: Connection[Any], record: Any) -> None:
        if isinstance(record, m.Hello):
            self.hellos.append(record.name)
            self.send(connection, encode(m.Welcome(self.version, os.getpid(), None if self.wait_ready else self.facts)))
            if not self.wait_ready:
                self.send(connection, encode(m.Ready(self.facts, {"load": 1.0}, {"load": 2.0})))
        elif isinstance(record, m.Submit):
            asked = Asked(self, connection, record)
            self.requests.append(asked)
            self.answer(asked)
        elif isinstance(record, m.Cancel):
            self.cancelled.append(record.request_id)
            if any(one.record.request_id == record.request_id for one in self.requests):
                self.send(connection, encode(m.Tokens(record.request_id, (), (), finish_reason="cancelled")))
        elif isinstance(record, m.AskStats):
            self.send(connection, encode(m.Stats({"steps": len(self.requests)})))
        elif isinstance(record, m.Drain):
            self.send(connection, encode(m.Goodbye("the engine has been drained")))
            self.drained.set()
            connection.close()

    def get_ready(self) -> None:
        self.wait_ready = False
        self.broadcast(m.Ready(self.facts, {"load": 1.0}, {"load": 2.0}))

    def broadcast(self, record: m.Message) -> None:
        with self._lock:
            for one in self._connections:
                self.send(one, encode(record))

    def send(self, connection: Connection[Any], data: bytes) -> None:
        with self._lock:
            if not connection.closed:
                self._try(connection, lambda: connection.send_frame(data))

    def _try(self, connection: Connection[Any], what: Callable[[], None]) -> None:
        try:
            what()
        except ProtocolError:
            connection.close()

    def raw(self, data: bytes) -> None:
        """Sends any bytes to everybody."""
        with self._lock:
            for one in self._connections:
                self.send(one, data)

    def hang_up(self) -> None:
        """Closes every connection and goes on listening."""
        with self._lock:
            for one in self._connections:
                one.close()

    def close(self) -> None:
        self._stopped = True
        if self._thread.is_alive():
            self._thread.join(5)
        self.hang_up()
        self._listener.close()
        self.path.unlink(missing_ok=True)

    def __enter__(self) -> ScriptedEngine:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.close()


def wait_until(true: Callable[[], bool], seconds: float = 20.0) -> None:
    """Waits for something that happens in another thread."""
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.002)
