"""Polling instead of sleeping: where it is done, and that it ends."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest
from scripted_engine import Asked, ScriptedEngine

from jitgraph import Client, SamplingParams
from jitgraph.polling import FOR_AN_ANSWER_S, polling_s
from jitgraph.server import client_link
from jitgraph.server.client import EngineClient


@pytest.fixture
def sixteen_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)))


def hold(asked: Asked) -> None:
    """Answers nothing; the test does."""


def test_it_takes_a_gpu_and_cores_to_spare(monkeypatch: pytest.MonkeyPatch) -> None:
    for cores, device, expected in ((16, "cuda:1", 0.5), (4, "cuda", 0.5), (3, "cuda", 0.0), (16, "cpu", 0.0)):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, cores=cores: set(range(cores)))
        assert polling_s(None, device, 0.5) == expected
        assert polling_s(0.25, device, 0.5) == 0.25, "what is wanted holds everywhere"
        assert polling_s(0.0, device, 0.5) == 0.0


@pytest.mark.usefixtures("sixteen_cores")
def test_an_event_loop_is_kept_awake_while_it_waits_for_an_answer(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)

    async def work(engine: ScriptedEngine) -> None:
        client = await EngineClient.connect(tmp_path / "e.sock")
        channel = client._channel
        assert not channel._awake
        stream = client.submit([1], SamplingParams(max_tokens=2))
        assert channel._awake
        await asyncio.sleep(5 * FOR_AN_ANSWER_S)
        assert not channel._awake, "an answer that takes long is not worth a core"
        engine.requests[0].tokens([7])
        assert (await stream.__anext__()).token_ids == (7,)
        assert channel._awake, "the next token will come soon"
        engine.requests[0].tokens([8], "length")
        assert (await stream.__anext__()).token_ids == (8,)
        await asyncio.sleep(0.01)
        assert not channel._awake, "nothing is awaited any more"
        await client.close()

    engine = ScriptedEngine(tmp_path / "e.sock", hold, device="cuda:0")
    engine.beats = False
    with engine:
        asyncio.run(work(engine))


@pytest.mark.usefixtures("sixteen_cores")
@pytest.mark.parametrize(("device", "polls"), [("cuda:0", True), ("cpu", False)])
def test_a_blocking_client_polls_beside_a_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str, polls: bool
) -> None:
    tmp_path.chmod(0o700)
    with ScriptedEngine(tmp_path / "e.sock", device=device), Client(tmp_path / "e.sock") as client:
        client._link._keeper.stop()  # it might read the answer
        spins, spin = [], client._link._spin
        monkeypatch.setattr(client._link, "_spin", lambda poller: (spins.append(1), spin(poller))[1])
        assert client.generate([5], SamplingParams(max_tokens=3))[0].token_ids == (5, 6, 7)
        assert bool(spins) is polls


@pytest.mark.usefixtures("sixteen_cores")
def test_what_a_client_practises_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside a GPU it takes a made-up token while it waits; text, tokens and times are those of the engine's alone."""
    tmp_path.chmod(0o700)
    params, found = SamplingParams(max_tokens=6), {}
    practised: list[object] = []
    practise = client_link.practise
    monkeypatch.setattr(client_link, "practise", lambda *args: (practised.append(1), practise(*args)))
    for device in ("cuda:0", "cpu"):
        path = tmp_path / f"{device[:3]}.sock"
        with ScriptedEngine(path, device=device) as engine, Client(path) as client:
            chunks = list(client.stream([300, 5], params))
            found[device] = [(chunk.token_id, chunk.text, chunk.finish_reason) for chunk in chunks]
            assert len(engine.requests) == 1 and not engine.cancelled
    assert practised == [1] and found["cuda:0"] == found["cpu"] and len(found["cpu"]) == 6
