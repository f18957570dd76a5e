"""The whole front-end process: HTTP before, engine processes behind, signals from outside, nothing left at the end.

Most tests stand a quick fake where the engine would be; one runs ``jitgraph serve tiny`` itself. No test decides by how
long something took.
"""

from __future__ import annotations

import asyncio
import dataclasses
import fcntl
import gc
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from jitgraph.cli_options import EngineOptions
from jitgraph.cli_serve import devices, engine_command
from jitgraph.config import EngineConfig
from jitgraph.errors import ConfigError
from jitgraph.server.address import bound_socket, check_address, is_loopback, url_of
from jitgraph.server.idle_gc import MOST_YOUNG, WORTH_WHILE, IdleCollector

ROOT = Path(__file__).resolve().parent.parent
PATIENCE_S = 60.0


def is_there(pid: int) -> bool:
    """Whether a process runs: one that nobody has reaped does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except FileNotFoundError:
        return False


def eventually(what: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + PATIENCE_S
    while not (found := what()):
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.01)
    return found


class Server:
    """A front-end process and what it prints."""

    def __init__(self, folder: Path, *command: str) -> None:
        folder.chmod(0o700)
        self.folder = folder
        environment = {**os.environ, "XDG_RUNTIME_DIR": str(folder), "OMP_NUM_THREADS": "1"}
        environment.pop("JITGRAPH_API_KEY", None)
        self.process = subprocess.Popen(
            [sys.executable, *command], stderr=subprocess.PIPE, text=True, cwd=ROOT, env=environment
        )
        self.pid = self.process.pid
        self.lines: list[str] = []
        self.deaf = False
        """Whether nothing more that it prints is read."""
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in iter(self.process.stderr.readline, ""):
            self.lines.append(line)
            if self.deaf:
                return

    @property
    def text(self) -> str:
        return "".join(self.lines)

    def find(self, pattern: str) -> list[str]:
        return re.findall(pattern, self.text)

    @property
    def engine_pids(self) -> list[int]:
        return [int(pid) for pid in self.find(r"ready in .* \(process (\d+)\)")]

    def url(self) -> str:
        """Its address, once it is ready."""
        found = eventually(lambda: self.find(r"ready at (http://\S+) after") or self.process.poll() is not None)
        assert found is not True, self.text
        return str(found[0])

    def listening(self) -> str:
        """Its address, once it listens."""
        found = eventually(lambda: self.find(r"listening at (http://[^,]+),") or self.process.poll() is not None)
        assert found is not True, self.text
        return str(found[0])

    def ended(self) -> int:
        """Its exit code, once it has ended; nothing is left of it."""
        code = self.process.wait(PATIENCE_S)
        self._reader.join(PATIENCE_S)
        for pid in self.engine_pids:
            assert not is_there(pid), "an engine process is left"
        assert list(self.folder.iterdir()) == [], "files are left"
        assert "Traceback" not in self.text, self.text
        return code


@pytest.fixture
def start() -> Iterator[Callable[..., Server]]:
    """Starts a front-end before a fake engine. All of a test have one runtime folder, with room for sockets' paths."""
    servers: list[Server] = []
    with tempfile.TemporaryDirectory(prefix="jg-") as folder:

        def make(*engine: str, options: tuple[str, ...] = (), command: tuple[str, ...] = ()) -> Server:
            fake = (str(ROOT / "tests" / "serve_fake.py"), *options, "--", *engine)
            servers.append(Server(Path(folder), *(command or fake)))
            return servers[-1]

        yield make
        for server in servers:
            server.process.kill()
            server.process.wait()


def test_nobody_needs_to_read_what_it_prints(start: Callable[..., Server]) -> None:
    """A pipe that is full blocks whoever writes: that must be nobody whom requests, engines or signals wait for."""
    server = start()
    url = server.url()
    server.deaf = True
    assert server.process.stderr is not None
    fcntl.fcntl(server.process.stderr.fileno(), fcntl.F_SETPIPE_SZ, 4096)
    client = httpx.Client(base_url=url, timeout=PATIENCE_S)
    for _ in range(150):
        assert client.get("/v1/models").status_code == 200
    (engine,) = server.engine_pids
    os.kill(engine, signal.SIGKILL)
    eventually(lambda: not is_there(engine))
    eventually(lambda: client.get("/health").status_code == 503 or client.get("/ready").status_code == 200)
    eventually(lambda: client.get("/ready").status_code == 200)
    body = {"model": "fake", "prompt": [3], "max_tokens": 2}
    assert client.post("/v1/completions", json=body).status_code == 200
    server.process.send_signal(signal.SIGTERM)
    assert server.ended() == 0


class Stream:
    """A streamed completion: its data events, as they come."""

    def __init__(self, client: httpx.AsyncClient, prompt: list[int] | str, tokens: int, model: str = "fake") -> None:
        self.body = {"model": model, "prompt": prompt, "max_tokens": tokens, "stream": True, "temperature": 0}
        self.client = client
        self.events: list[Any] = []
        self.status = 0
        self.done = False

    async def run(self) -> Stream:
        async with self.client.stream("POST", "/v1/completions", json=self.body) as response:
            self.status = response.status_code
            async for line in response.aiter_lines():
                if line == "data: [DONE]":
                    self.done = True
                elif line.startswith("data: "):
                    self.events.append(json.loads(line.removeprefix("data: ")))
        return self

    @property
    def error(self) -> Any:
        return next((event["error"] for event in self.events if "error" in event), None)

    @property
    def finish_reason(self) -> str | None:
        reasons = [event["choices"][0]["finish_reason"] for event in self.events if event.get("choices")]
        return reasons[-1] if reasons else None


def with_client(url: str, act: Callable[[httpx.AsyncClient], Awaitable[None]]) -> None:
    async def main() -> None:
        async with httpx.AsyncClient(base_url=url, timeout=PATIENCE_S) as client:
            await asyncio.wait_for(act(client), PATIENCE_S)

    asyncio.run(main())


async def until(what: Callable[[], Awaitable[bool]]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not await what():
        assert time.monotonic() < deadline, "it did not happen"
        await asyncio.sleep(0.01)


async def status_of(client: httpx.AsyncClient, path: str) -> int:
    return (await client.get(path)).status_code


async def all_begun(streams: list[Stream]) -> None:
    async def begun() -> bool:
        return all(stream.events for stream in streams)

    await until(begun)


# ---------------------------------------------------------------------------------------------------------- the process


def test_it_serves_without_torch_and_ends_with_a_drain(start: Callable[..., Server]) -> None:
    server = start("--start-s", "0.2")

    async def act(client: httpx.AsyncClient) -> None:
        assert await status_of(client, "/health") == 200
        maps = Path(f"/proc/{server.pid}/maps").read_text()
        assert "uvloop" in maps
        assert "libtorch" not in maps
        metrics = (await client.get("/metrics")).text
        assert 'jitgraph:engine_up{model_name="fake"} 1.0' in metrics
        stream = Stream(client, [5, 6], 120)
        running = asyncio.create_task(stream.run())
        await all_begun([stream])
        os.kill(server.pid, signal.SIGTERM)

        async def refused() -> bool:
            response = await client.post("/v1/completions", json={"model": "fake", "prompt": [5], "max_tokens": 1})
            return response.status_code == 503 and float(response.headers["retry-after"]) >= 1

        await until(refused)
        await running
        assert (stream.finish_reason, stream.done, stream.error) == ("length", True, None)

    with_client(server.url(), act)
    assert server.ended() == 0
    assert "SIGTERM: no new requests; the 1 that run" in server.text
    assert any('"completion_tokens":120' in line for line in server.lines), "no line about the request"


def test_a_second_signal_ends_it_at_once(start: Callable[..., Server]) -> None:
    server = start(options=("--shutdown-timeout", "1000"))

    async def act(client: httpx.AsyncClient) -> None:
        stream = Stream(client, [5], 100_000)
        running = asyncio.create_task(stream.run())
        await all_begun([stream])
        os.kill(server.pid, signal.SIGINT)
        await until(lambda: _is(status_of(client, "/ready"), 503))
        assert not running.done()
        os.kill(server.pid, signal.SIGTERM)
        await asyncio.gather(running, return_exceptions=True)
        assert not stream.done

    with_client(server.url(), act)
    assert server.ended() == 128 + signal.SIGTERM


async def _is(found: Awaitable[int], expected: int) -> bool:
    return await found == expected


def test_a_crash_under_eight_streams(start: Callable[..., Server]) -> None:
    """Every stream gets an error event, new requests a 503 that says when to come again, and the next answers are
    right; the process that clients talk to is the same."""
    server = start("--start-s", "1.0")

    async def act(client: httpx.AsyncClient) -> None:
        streams = [Stream(client, [n], 100_000) for n in range(1, 9)]
        running = [asyncio.create_task(stream.run()) for stream in streams]
        await all_begun(streams)
        os.kill(server.engine_pids[0], signal.SIGKILL)
        await asyncio.gather(*running)
        for stream in streams:
            assert stream.status == 200
            assert stream.error is not None
            assert set(stream.error) == {"message", "type", "param", "code"}
        response = await client.post("/v1/completions", json={"model": "fake", "prompt": [5], "max_tokens": 1})
        assert response.status_code == 503
        assert float(response.headers["retry-after"]) >= 1
        assert await status_of(client, "/health") == 503
        await until(lambda: _is(status_of(client, "/ready"), 200))
        stream = await Stream(client, [5], 3).run()
        assert (stream.finish_reason, stream.done, stream.error) == ("length", True, None)
        assert "engine_restarts_total" in (await client.get("/metrics")).text
        assert server.process.poll() is None

    with_client(server.url(), act)
    os.kill(server.pid, signal.SIGTERM)
    assert server.ended() == 0
    assert len(server.engine_pids) == 2


def test_a_hang_is_seen_and_mended(start: Callable[..., Server]) -> None:
    server = start(options=("--hang-s", "2.5"))

    async def act(client: httpx.AsyncClient) -> None:
        (stopped,) = server.engine_pids
        os.kill(stopped, signal.SIGSTOP)
        await until(lambda: _is(status_of(client, "/health"), 503))
        await until(lambda: _is(status_of(client, "/health"), 200))
        assert not is_there(stopped)
        stream = await Stream(client, [5], 3).run()
        assert stream.done

    with_client(server.url(), act)
    os.kill(server.pid, signal.SIGTERM)
    assert server.ended() == 0


def test_a_killed_front_end_leaves_no_engine_and_the_next_one_cleans_up(start: Callable[..., Server]) -> None:
    server = start()
    server.url()
    os.kill(server.pid, signal.SIGKILL)
    eventually(lambda: not is_there(server.engine_pids[0]))
    assert len(list(server.folder.iterdir())) == 1
    second = start()
    second.url()
    os.kill(second.pid, signal.SIGTERM)
    assert second.ended() == 0


def test_a_crash_loop_ends_the_process(start: Callable[..., Server]) -> None:
    server = start("--crash-after", "0.01")
    assert server.ended() == 1
    assert "engine is given up after 3 restarts" in server.text


def test_settings_that_cannot_work_end_it_with_their_sentence(start: Callable[..., Server]) -> None:
    server = start("--exit-early", "2")
    assert server.ended() == 1
    assert "this engine does not want to start" in server.text
    assert server.text.count("is started again") == 0


def test_a_signal_while_it_starts(start: Callable[..., Server]) -> None:
    server = start("--never-ready")
    with httpx.Client(base_url=server.listening()) as client:
        assert client.get("/ready").status_code == 503
        assert client.get("/health").status_code == 200
    os.kill(server.pid, signal.SIGTERM)
    assert server.ended() == 0


def test_two_engines_and_one_of_them_dies(start: Callable[..., Server]) -> None:
    server = start(options=("--engines", "2"))

    async def act(client: httpx.AsyncClient) -> None:
        streams = [Stream(client, [n], 400) for n in (1, 2)]
        running = [asyncio.create_task(stream.run()) for stream in streams]
        await all_begun(streams)
        os.kill(server.engine_pids[0], signal.SIGKILL)
        assert await status_of(client, "/ready") == 200
        await asyncio.gather(*running)
        assert sorted(stream.error is None for stream in streams) == [False, True]
        assert (await Stream(client, [5], 3).run()).done

    with_client(server.url(), act)
    os.kill(server.pid, signal.SIGTERM)
    assert server.ended() == 0


def test_the_real_one(start: Callable[..., Server]) -> None:
    """``jitgraph serve tiny``: the text of ``LLM("tiny")``, before and after the engine was killed."""
    from jitgraph import LLM, SamplingParams

    command = ("-m", "jitgraph", "serve", "tiny", "--device", "cpu", "--port", "0", "--max-model-len", "256")
    server = start(command=command)
    llm = LLM("tiny", device="cpu", max_model_len=256, max_streams=1)
    expected = llm.generate("Once upon a time", SamplingParams(max_tokens=24))[0]

    async def act(client: httpx.AsyncClient) -> None:
        for life in range(2):
            stream = await Stream(client, "Once upon a time", 24, "tiny").run()
            assert "".join(event["choices"][0]["text"] for event in stream.events) == expected.text
            assert stream.done
            if life == 0:
                os.kill(server.engine_pids[0], signal.SIGKILL)
                await until(lambda: _is(status_of(client, "/ready"), 503))
                await until(lambda: _is(status_of(client, "/ready"), 200))

    with_client(server.url(), act)
    assert "libtorch" not in Path(f"/proc/{server.pid}/maps").read_text()
    os.kill(server.pid, signal.SIGTERM)
    assert server.ended() == 0


# ---------------------------------------------------------------------------------------------- what it decides before


def test_addresses() -> None:
    assert all(is_loopback(host) for host in ("127.0.0.1", "127.1.2.3", "::1", "[::1]", "localhost"))
    assert not any(is_loopback(host) for host in ("0.0.0.0", "::", "192.168.1.1", "example.org", ""))
    check_address("127.0.0.1", (), False)
    check_address("0.0.0.0", ("key",), False)
    check_address("0.0.0.0", (), True)
    with pytest.raises(ConfigError, match="JITGRAPH_API_KEY"):
        check_address("0.0.0.0", (), False)


def test_sockets() -> None:
    with bound_socket("127.0.0.1", 0) as bound:
        bound.listen()
        port = bound.getsockname()[1]
        assert url_of(bound) == f"http://127.0.0.1:{port}"
        with pytest.raises(ConfigError, match="--port"):
            bound_socket("127.0.0.1", port)
    with bound_socket("0.0.0.0", 0) as bound:
        assert url_of(bound).startswith("http://127.0.0.1:")
    for host, port in (("no such host", 0), ("127.0.0.1", 70_000), ("192.0.2.1", 0)):
        with pytest.raises(ConfigError):
            bound_socket(host, port)
    if socket.has_ipv6:
        try:
            with bound_socket("::1", 0) as bound:
                assert url_of(bound).startswith("http://[::1]:")
        except ConfigError:
            pass  # this machine has no such address


def test_devices() -> None:
    assert devices("auto", None) == ["auto"]
    assert devices("cpu", 3) == ["cpu"] * 3
    assert devices("cuda:0, cuda:1", None) == ["cuda:0", "cuda:1"]
    assert devices("cuda:0,cuda:1", 2) == ["cuda:0", "cuda:1"]
    wrong = [("", None), ("cuda", 2), ("cpu", 0), ("cpu", 99), ("cuda:0,cuda:1", 3), ("cuda:0,cuda:0", None)]
    for text, engines in [*wrong, ("cpu,cpu", None), ("cuda,cuda:1", None)]:
        with pytest.raises(ConfigError):
            devices(text, engines)


def test_the_command_of_an_engine_gives_it_what_the_server_was_given() -> None:
    from typer.main import get_command

    from jitgraph.cli import app

    names = [field.name for field in dataclasses.fields(EngineOptions)]
    engine, serve = (get_command(app).commands[name] for name in ("engine", "serve"))  # type: ignore[attr-defined]
    odd = {
        **{"weights": "random", "weights_seed": 3, "dtype": "float32", "max_model_len": 64, "kv_cache_memory": "4MiB"},
        **{"kv_window": 32, "batch_invariant": True, "precapture": "1-4", "max_graphs": 9, "max_streams": 2},
        **{"prefix_cache": False, "strict": True, "max_queued": 5, "shutdown_timeout": 7.5},
    }
    assert sorted(odd) == sorted(names)
    for given in ({}, odd):
        shared = EngineOptions(**given)
        command = engine_command("tiny", "cpu", shared)
        assert command[:5] == (sys.executable, "-m", "jitgraph", "engine", "tiny")
        parsed = engine.make_context("engine", [*command[4:], "--socket", "/tmp/x"]).params
        assert {name: parsed[name] for name in names} == dataclasses.asdict(shared)
        parsed = serve.make_context("serve", ["tiny", *shared.words()]).params
        assert {name: parsed[name] for name in names} == dataclasses.asdict(shared)
    assert EngineOptions(max_graphs=9, precapture="1-4", prefix_cache=False, strict=True).config("cpu") == EngineConfig(
        device="cpu", max_graphs=9, precapture_lengths="1-4", prefix_cache=False, strict=True
    )
    for wrong in ({"max_queued": -1}, {"shutdown_timeout": -1.0}, {"max_streams": 9}, {"precapture": "x"}):
        with pytest.raises(ConfigError):
            EngineOptions(**wrong).config()


# ------------------------------------------------------------------------------------------------------ idle collection


@pytest.fixture
def collector() -> Iterator[tuple[IdleCollector, list[bool], list[float]]]:
    """A collector over a switch that says whether anybody waits, and the pauses that it tells."""
    busy, pauses = [False], []
    was_on = gc.isenabled()
    collector = IdleCollector(lambda: busy[0], pauses.append)
    collector.freeze()
    try:
        yield collector, busy, pauses
    finally:
        gc.unfreeze()
        if was_on:
            gc.enable()


def test_garbage_is_collected_when_nobody_waits(collector: tuple[IdleCollector, list[bool], list[float]]) -> None:
    idle, busy, pauses = collector
    assert not gc.isenabled()
    busy[0] = True
    garbage = [[] for _ in range(3 * WORTH_WHILE)]
    idle.look()
    assert pauses == []
    busy[0] = False
    idle.look()
    assert len(pauses) == idle.pauses.count == 1
    assert idle.pauses.while_busy == 0
    idle.look()
    assert len(pauses) == 1, "nothing new, and yet collected again"
    del garbage


def test_a_server_that_is_never_idle_does_not_grow(collector: tuple[IdleCollector, list[bool], list[float]]) -> None:
    idle, busy, pauses = collector
    busy[0] = True
    garbage = [[] for _ in range(MOST_YOUNG + 1000)]
    idle.look()
    assert idle.pauses.while_busy == len(pauses) == 1
    assert gc.get_count()[0] < MOST_YOUNG
    del garbage


def test_the_collector_is_given_back() -> None:
    was_on = gc.isenabled()
    gc.enable()
    try:

        async def main() -> None:
            idle = IdleCollector(lambda: False)
            idle.freeze()
            task = asyncio.create_task(idle.run())
            await asyncio.sleep(0)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

        asyncio.run(main())
        assert gc.isenabled()
    finally:
        if not was_on:
            gc.disable()
