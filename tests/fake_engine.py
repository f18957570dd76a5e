"""A stand-in for an engine process: speaks the protocol, makes tokens by counting, and misbehaves as it is told.

``python tests/fake_engine.py --socket PATH [options]``. Needs neither torch nor a model. Token *i* of an answer is the
sum of the prompt plus *i*, so that answers can be checked.
"""

from __future__ import annotations

import argparse
import os
import select
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from jitgraph.ipc import messages as m
from jitgraph.ipc.frames import ProtocolError, engine_framer
from jitgraph.ipc.sockets import Connection, listen
from jitgraph.types import SamplingParams

STALL_ID = 13
"""A prompt that begins with this id is accepted and never answered, and no step is made any more."""
PART_ID = 15
"""A prompt that begins with this id ends its client's connection, with a goodbye; the process lives on."""
EXIT_ID = 14
"""A prompt that begins with this id ends the process."""


@dataclass
class Running:
    """A request that is being answered."""

    to: Connection
    request_id: int
    base: int
    left: int
    made: int = 0
    due_s: float = 0.0
    stalled: bool = False


class FakeEngine:
    """One engine process."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.begun = time.perf_counter()
        self.connections: list[Connection] = []
        self.running: list[Running] = []
        self.steps = 0
        self.beat_at = 0.0
        self.draining_until: float | None = None
        self.ready: m.Ready | None = None
        self.greeted: set[int] = set()

    def facts(self) -> m.EngineFacts:
        plain = SamplingParams()
        return m.EngineFacts(
            os.getpid(), "fake", None, 1000, 10**6, 8, (2,), plain, "cpu", "float32", "f00d", emulated=True
        )

    def run(self) -> int:
        options = self.options
        if options.exit_early is not None:
            print("error: this engine does not want to start", flush=True)
            return int(options.exit_early)
        if options.deaf:
            time.sleep(3600)
        self.listener = listen(Path(options.socket))
        ready_at = self.begun + options.start_s
        told = 0
        while True:
            now = time.perf_counter()
            if self.ready is None and not options.never_ready:
                if told < 3 and now - self.begun > told * options.start_s / 4 and self.greeted:
                    told += 1
                    self.tell(m.StartPhase("load", told, 3, now - self.begun, 12.5))
                if now >= ready_at and (told or not options.start_s):
                    spent = now - self.begun
                    self.ready = m.Ready(self.facts(), {"load": spent / 2, "capture": spent / 2}, {"load": 12.5})
                    self.tell(self.ready)
            if self.ready is not None:
                if options.crash_after is not None and now - ready_at > options.crash_after:
                    os.kill(os.getpid(), signal.SIGKILL)
                self.work(now)
            if self.draining_until is not None and (not self.running or now > self.draining_until):
                self.listener.close()
                Path(options.socket).unlink(missing_ok=True)
                return 0
            self.listen_for(0.005)

    def tell(self, message: object) -> None:
        for connection in list(self.connections):
            if id(connection) in self.greeted:
                self.send(connection, message)

    def send(self, connection: Connection, message: object) -> None:
        try:
            connection.send(message)
        except ProtocolError:
            self.drop(connection)

    def drop(self, connection: Connection) -> None:
        if connection in self.connections:
            self.connections.remove(connection)
        connection.close()
        self.running = [one for one in self.running if one.to is not connection]

    def work(self, now: float) -> None:
        stalled = any(one.stalled for one in self.running)
        for one in [] if stalled else list(self.running):
            if now < one.due_s:
                continue
            one.due_s = now + self.options.token_s
            one.made += 1
            one.left -= 1
            self.steps += 1
            reason = "length" if one.left == 0 else None
            news = m.Tokens(one.request_id, ((one.base + one.made) % 1000,), (time.perf_counter_ns(),), (), reason)
            if reason:
                self.running.remove(one)
            self.send(one.to, news)
        if now - self.beat_at >= m.BEAT_S / 2:
            self.beat_at = now
            beat = m.Beat(time.perf_counter_ns(), len(self.running), 0, 100 - len(self.running), 100, self.steps)
            self.tell(beat)

    def listen_for(self, seconds: float) -> None:
        readable, _, _ = select.select([self.listener, *self.connections], [], [], seconds)
        for one in readable:
            if one is self.listener:
                connected, _ = self.listener.accept()
                self.connections.append(Connection(connected, engine_framer()))
                continue
            try:
                for record in one.receive():
                    self.take(one, record)
            except ProtocolError:
                self.drop(one)

    def take(self, connection: Connection, record: object) -> None:
        if isinstance(record, m.Hello):
            self.greeted.add(id(connection))
            self.send(connection, m.Welcome(m.PROTOCOL, os.getpid(), self.ready.facts if self.ready else None))
            if self.ready:
                self.send(connection, self.ready)
        elif isinstance(record, m.Submit):
            if self.draining_until is not None:
                self.send(connection, m.Refused(record.request_id, "draining", "the engine is ending", 1.0))
                return
            ids = m.unpack_ids(record.prompt)
            if ids[0] == EXIT_ID:
                os._exit(9)
            if ids[0] == PART_ID:
                self.send(connection, m.Goodbye("the test wants it"))
                self.drop(connection)
                return
            params = m.unpack_params(record.params)
            one = Running(connection, record.request_id, sum(ids), params.max_tokens)
            one.stalled = ids[0] == STALL_ID
            self.running.append(one)
        elif isinstance(record, m.Cancel):
            for one in [one for one in self.running if (one.to, one.request_id) == (connection, record.request_id)]:
                self.running.remove(one)
                self.send(connection, m.Tokens(record.request_id, (), (), (), "cancelled"))
        elif isinstance(record, m.AskStats):
            self.send(connection, m.Stats({"steps": self.steps}))
        elif isinstance(record, m.Drain):
            self.draining_until = time.perf_counter() + record.timeout_s


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--socket", required=True)
    parser.add_argument("--start-s", type=float, default=0.0)
    parser.add_argument("--token-s", type=float, default=0.005)
    parser.add_argument("--exit-early", type=int)
    parser.add_argument("--deaf", action="store_true", help="never listens")
    parser.add_argument("--never-ready", action="store_true", help="listens, welcomes, and is never ready")
    parser.add_argument("--crash-after", type=float, help="seconds from ready to a crash")
    parser.add_argument("--stubborn", action="store_true", help="ignores SIGTERM")
    parser.add_argument("--grandchild", action="store_true", help="starts a process of its own, prints its number")
    options = parser.parse_args()
    if options.stubborn:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if options.grandchild:
        print("grandchild", subprocess.Popen(["sleep", "1000"]).pid, flush=True)
    print(f"fake engine {os.getpid()}", flush=True)
    engine = FakeEngine(options)
    try:
        return engine.run()
    except KeyboardInterrupt:
        engine.tell(m.Goodbye("told to end at once"))
        return 130


if __name__ == "__main__":
    sys.exit(main())
