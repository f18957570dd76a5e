"""What a user reads who does something wrong between an engine and its clients: one clear sentence each."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from scripted_engine import ScriptedEngine

from jitgraph import AsyncClient, Client
from jitgraph.errors import ConfigError, JitgraphError
from jitgraph.ipc import messages as m
from jitgraph.ipc import sockets
from jitgraph.ipc.frames import encode
from jitgraph.ipc.listener import Listener
from jitgraph.server.client_errors import EngineGone
from jitgraph.server.supervisor import Supervisor
from jitgraph.server.supervisor_policy import Limits

PATIENCE_S = 60.0
Connect = Callable[[Path], None]


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="jg-") as made:
        yield Path(made)


def blocking(path: Path) -> None:
    Client(path, appear_s=0.0, timeout_s=PATIENCE_S).close()


def from_asyncio(path: Path) -> None:
    async def work() -> None:
        async with AsyncClient(path, appear_s=0.0, timeout_s=PATIENCE_S):
            pass

    asyncio.run(work())


@pytest.fixture(params=[blocking, from_asyncio])
def connect(request: pytest.FixtureRequest) -> Connect:
    found: Connect = request.param
    return found


def said(connect: Connect, path: Path) -> tuple[type[JitgraphError], str]:
    with pytest.raises(JitgraphError) as caught:
        connect(path)
    text = str(caught.value)
    assert "\n" not in text and len(text) < 300
    return type(caught.value), text


def test_nobody_listens(connect: Connect, folder: Path) -> None:
    (folder / "file").touch()
    for name in ("nothing", "file"):
        kind, text = said(connect, folder / name)
        assert kind is EngineGone and text.startswith(f"no engine listens at {folder / name}: start one with")


def test_a_path_too_long_for_a_socket(connect: Connect, folder: Path) -> None:
    kind, text = said(connect, folder / ("x" * 120))
    assert kind is ConfigError and "at most 107 bytes" in text


def test_a_folder_that_may_not_be_entered(connect: Connect, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> Any:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(socket.socket, "connect", refuse)  # the tests may run as root, who may enter all
    kind, text = said(connect, folder / "e.sock")
    assert kind is ConfigError and text == f"{folder / 'e.sock'} cannot be connected to: Permission denied"


def test_an_engine_of_another_user(connect: Connect, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with ScriptedEngine(folder / "e.sock"):
        mine = os.getuid()
        monkeypatch.setattr(sockets.os, "getuid", lambda: mine + 1)
        kind, text = said(connect, folder / "e.sock")
    assert kind is ConfigError and f"user {mine} is not allowed" in text


def test_a_client_of_another_user_is_turned_away(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It hears nothing: who may not talk to an engine is told nothing of it either."""
    listener = Listener(folder / "e.sock")
    plain = socket.socket(socket.AF_UNIX)
    plain.connect(str(folder / "e.sock"))
    mine = os.getuid()
    monkeypatch.setattr(sockets.os, "getuid", lambda: mine + 1)
    assert listener.accept() is None
    assert plain.recv(100) == b""
    plain.close()
    listener.close()


@pytest.mark.parametrize("who", ["welcome", "goodbye"])
def test_another_version(connect: Connect, folder: Path, who: str) -> None:
    """An engine says so itself, and a client also looks."""
    with ScriptedEngine(folder / "e.sock") as engine:
        engine.version = m.PROTOCOL + 1
        if who == "goodbye":
            words = f"this engine speaks version {engine.version} of the protocol, the client version {m.PROTOCOL}"
            engine._hear = lambda to, record: engine.send(to, encode(m.Goodbye(words)))
        kind, text = said(connect, folder / "e.sock")
    assert f"version {m.PROTOCOL + 1}" in text and f"version {m.PROTOCOL}" in text
    assert kind is (ConfigError if who == "welcome" else EngineGone)


def test_something_else_listens(connect: Connect, folder: Path) -> None:
    with ScriptedEngine(folder / "e.sock") as engine:
        engine._hear = lambda to, record: engine.send(to, b"HTTP/1.1 400 Bad Request\r\n\r\n")
        kind, text = said(connect, folder / "e.sock")
    assert kind is EngineGone and "does not keep to the protocol" in text


def test_an_engine_that_is_killed_while_it_starts(connect: Connect, folder: Path) -> None:
    with ScriptedEngine(folder / "e.sock") as engine:
        engine._hear = lambda to, record: to.close()
        kind, text = said(connect, folder / "e.sock")
    assert kind is EngineGone and "crashed or was killed" in text


# ----------------------------------------------------------------------------------------------------- jitgraph engine


def engine_says(path: Path) -> str:
    command = [sys.executable, "-m", "jitgraph", "engine", "tiny", "--device", "cpu", "--socket", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    (line,) = [line for line in done.stderr.splitlines() if "error" in line.lower()]
    return line


def test_a_socket_that_is_in_use(folder: Path) -> None:
    path = folder / "e.sock"
    with ScriptedEngine(path):
        assert f"an engine listens at {path} already: stop it or name another socket" in engine_says(path)
        blocking(path)  # and the one that lives is left alone


def test_a_socket_that_cannot_be(folder: Path) -> None:
    assert "at most 107 bytes" in engine_says(folder / ("x" * 120))
    (folder / "file").touch()
    assert "exists and is no socket" in engine_says(folder / "file")
    assert (folder / "file").exists()
    (folder / "open").mkdir(mode=0o755)
    (folder / "open").chmod(0o755)
    assert "chmod 700" in engine_says(folder / "open" / "e.sock")


# ----------------------------------------------------------------------------------------------------------- supervisor


def test_an_engine_command_that_is_not_there_is_not_tried_again(folder: Path) -> None:
    async def main() -> str | None:
        lines: list[str] = []
        supervisor = Supervisor(["/no/such/jitgraph"], folder / "e.sock", limits=Limits(tick_s=0.02), say=lines.append)
        supervisor.start()
        assert not await supervisor.ready()
        assert supervisor.state == "failed" and supervisor.restarts == 0
        return supervisor.failure

    failure = asyncio.run(asyncio.wait_for(main(), PATIENCE_S))
    assert failure is not None and "/no/such/jitgraph cannot be run: No such file or directory" in failure
    assert "restarts" not in failure
