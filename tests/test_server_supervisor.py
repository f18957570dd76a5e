"""The supervisor against a stand-in for an engine that crashes, hangs, sulks and dawdles as it is told.

No test decides by how long something took: limits in seconds are for what would otherwise never end.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jitgraph.errors import ConfigError
from jitgraph.ipc.messages import Beat, Ready, StartPhase
from jitgraph.ipc.sockets import listen
from jitgraph.server import tether
from jitgraph.server.client import EngineClient, EngineGone
from jitgraph.server.routing import CLEARLY_BUSIER, KEY_TOKENS, LEAST_TOKENS, Candidate, choose
from jitgraph.server.runtime_folder import RuntimeFolder, remove_stale
from jitgraph.server.spawn import EngineProcess, spawn_engine, threads_for
from jitgraph.server.supervisor import Supervisor
from jitgraph.server.supervisor_policy import Limits, Pulse, RestartBudget, Watch, exit_of, patience_s, retry_after_s
from jitgraph.server.supervisor_pool import EnginePool
from jitgraph.server.supervisor_report import HANDOVER, Progress, StartReport
from jitgraph.types import SamplingParams

FAKE = str(Path(__file__).with_name("fake_engine.py"))
STALL_ID, EXIT_ID, PART_ID = 13, 14, 15
QUICK = Limits(hang_s=1.0, start_silence_s=20.0, grace_s=0.5, restarts=3, window_s=600.0, tick_s=0.05)
PATIENCE_S = 60.0
"""Everything here takes a second or so; a loaded machine may take longer."""


def fake(*options: str) -> list[str]:
    return [sys.executable, FAKE, *options]


def is_there(pid: int) -> bool:
    """Whether a process runs: one that nobody has reaped does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except FileNotFoundError:
        return False


def eventually(what: Callable[[], bool]) -> None:
    """Waits for something that other processes do."""
    deadline = time.monotonic() + PATIENCE_S
    while not what():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.01)


async def until(what: Callable[[], bool]) -> None:
    """``eventually`` inside an event loop."""
    deadline = time.monotonic() + PATIENCE_S
    while not what():
        assert time.monotonic() < deadline, "it did not happen"
        await asyncio.sleep(0.01)


@pytest.fixture
def short_path() -> Iterator[Path]:
    """A folder whose path leaves room for a socket's; ``tmp_path`` may not."""
    with tempfile.TemporaryDirectory(prefix="jg-") as folder:
        yield Path(folder)


@pytest.fixture
def socket_path() -> Iterator[Path]:
    with RuntimeFolder() as folder:
        yield folder.path / "engine.sock"


class Lines(list[str]):
    """What a supervisor says."""

    @property
    def text(self) -> str:
        return "\n".join(self)


def supervise(
    socket_path: Path,
    *options: str,
    act: Callable[[Supervisor], Awaitable[None]],
    limits: Limits = QUICK,
    lines: Lines | None = None,
) -> Supervisor:
    """Runs a supervisor of a stand-in, ``act`` with it, and makes sure that nothing is left."""
    said = Lines() if lines is None else lines

    async def main() -> Supervisor:
        supervisor = Supervisor(fake(*options), socket_path, limits=limits, say=said.append)
        supervisor.start()
        try:
            await asyncio.wait_for(act(supervisor), PATIENCE_S)
        finally:
            await supervisor.stop()
        return supervisor

    supervisor = asyncio.run(main())
    for line in said:
        if "fake engine" in line:
            assert not is_there(int(line.split()[-1])), "an engine process is left"
    assert list(socket_path.parent.iterdir()) == []
    assert supervisor.client is None
    assert supervisor.pid is None
    return supervisor


async def answer(client: EngineClient, ids: list[int], count: int) -> list[int]:
    found: list[int] = []
    async for record in client.submit(ids, SamplingParams(max_tokens=count)):
        found += record.token_ids
    return found


def engine(supervisor: Supervisor) -> EngineClient:
    assert supervisor.client is not None
    return supervisor.client


# ------------------------------------------------------------------------------------------------------ pure decisions


def test_limits_are_checked() -> None:
    with pytest.raises(ConfigError, match="hang_s must be above zero"):
        Limits(hang_s=0)
    with pytest.raises(ConfigError, match="restarts"):
        Limits(restarts=-1)


@given(st.lists(st.floats(0, 50), max_size=60), st.integers(0, 4), st.floats(1, 100))
def test_no_window_has_more_restarts_than_the_budget(gaps: list[float], restarts: int, window_s: float) -> None:
    budget, now, taken = RestartBudget(restarts, window_s), 0.0, []
    for gap in gaps:
        now += gap
        recent = [at for at in taken if now - at < window_s]
        allowed = budget.take(now)
        assert allowed == (len(recent) < restarts)
        if allowed:
            taken.append(now)


@given(st.lists(st.tuples(st.floats(0, 100), st.integers(0, 2)), max_size=40))
def test_a_pulse_counts_only_while_it_is_looked_at(looks: list[tuple[float, int]]) -> None:
    tick_s, now = 0.1, 0.0
    pulse, last, expected = Pulse(0.0, tick_s), None, 0.0
    for gap, sign in looks:
        now += gap
        expected = expected + min(gap, 5 * tick_s) if sign == last else 0.0
        last = sign
        assert pulse.look(now, sign) == pytest.approx(expected, abs=1e-6)


def test_a_host_that_slept_is_no_hang() -> None:
    pulse = Pulse(0.0, 0.1)
    pulse.look(0.1, "beat")
    assert pulse.look(3600.0, "beat") <= 0.5


def beat(at_s: float, steps: int, running: int) -> Beat:
    return Beat(int(at_s * 1e9), running, 0, 10, 10, steps)


@given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 2)), max_size=120))
def test_a_busy_engine_may_stand_still_for_the_limit_and_an_idle_one_for_ever(lives: list[tuple[int, int]]) -> None:
    limits = Limits(hang_s=2.0)
    watch, now, steps, still, before = Watch(0.0, limits), 0.0, 0, 0.0, None
    for made, running in lives:
        now += 0.25
        steps += made
        still = still + 0.25 if running and (steps, True) == before else 0.0
        before = (steps, running > 0)
        hang = watch.hang(now, int(now * 1e9), beat(now, steps, running))
        assert (hang is not None) == (still > limits.hang_s)
        assert hang is None or "no step" in hang


def test_a_long_step_is_no_hang_and_one_much_longer_is() -> None:
    """The limit is the user's, or some times the longest step that the engine has ever made."""
    watch = Watch(0.0, Limits(hang_s=2.0, tick_s=0.25))

    def away(at_s: float, away_s: float, longest_s: float) -> Beat:
        return Beat(int(at_s * 1e9), 1, 0, 10, 10, 7, away_s, longest_s)

    steps = [n / 4 for n in range(1, 41)]
    found = [watch.hang(at_s, int(at_s * 1e9), away(at_s, at_s, 2.0)) for at_s in steps]
    assert found[:31] == [None] * 31 and "at one thing for 8 s" in str(found[-1])
    watch = Watch(0.0, Limits(hang_s=2.0, tick_s=0.25))
    found = [watch.hang(at_s, int(at_s * 1e9), away(at_s, at_s, 0.01)) for at_s in steps]
    assert found[:7] == [None] * 7 and "at one thing for 2 s" in str(found[9])
    assert patience_s(2.0, away(0.0, 0.0, 1e9)) == 120.0, "one pause of a host must not make it blind"
    assert patience_s(2.0, None) == 2.0


def test_an_engine_that_is_silent_for_too_long_hangs() -> None:
    watch = Watch(0.0, Limits(hang_s=1.0, tick_s=0.1))
    first = beat(0.0, 1, 1)
    found = [watch.hang(n / 10, 7, first) for n in range(1, 14)]
    assert found[:10] == [None] * 10
    assert "said nothing" in str(found[-1])


def test_retry_after() -> None:
    assert retry_after_s("ready", 20.0, 300.0) == 0.0
    assert retry_after_s("restarting", 20.0, 5.0) == 15.0
    assert retry_after_s("restarting", 20.0, 50.0) == 1.0
    assert retry_after_s("starting", None, 0.0) >= 1.0
    assert retry_after_s("draining", 20.0, 300.0) == 20.0


def test_exits_are_described() -> None:
    assert exit_of(-9, "").reason == "was killed by SIGKILL"
    assert exit_of(3, "a\nno memory").reason == "ended with status 3; its last words: no memory"
    assert exit_of(2, "", before_ready=True).hopeless
    assert not exit_of(2, "").hopeless
    assert not exit_of(1, "", before_ready=True).hopeless


def test_a_report_adds_up_to_the_wall_time() -> None:
    class Facts:
        pass

    ready = Ready(Facts(), {"load": 2.0, "capture": 1.0}, {"load": 100.0, "capture": 28.0})  # type: ignore[arg-type]
    report = StartReport.of(ready, 3.5)
    assert sum(report.phases_s.values()) == pytest.approx(3.5)
    assert report.phases_s[HANDOVER] == pytest.approx(0.5)
    assert report.lines()[-1].split() == ["sum", "3.50", "s", "128.0", "MiB"]
    assert len(report.lines()) == 4


def test_progress_is_a_line_now_and_then() -> None:
    progress = Progress()
    lines = [progress.line(StartPhase("load", done, 400, done / 10, 0.0)) for done in range(1, 200)]
    told = [line for line in lines if line is not None]
    assert told[0] == "load 1 of 400"
    assert len(told) == 4  # the first, and one every five seconds of twenty
    assert progress.line(StartPhase("capture", 1, 1, 0.0, 0.0)) == "capture"


# ------------------------------------------------------------------------------------------------------- folders


def test_a_runtime_folder_is_private_and_goes(short_path: Path) -> None:
    with RuntimeFolder(short_path) as folder:
        assert folder.path.parent.parent == short_path
        assert folder.path.stat().st_mode & 0o777 == 0o700
        (folder.path / "engine.sock").touch()
    assert list(short_path.iterdir()) == []
    folder.remove()


def test_folders_of_dead_processes_are_removed_and_no_others(short_path: Path) -> None:
    code = (
        "import os, sys; from pathlib import Path; from jitgraph.server.runtime_folder import RuntimeFolder\n"
        "folder = RuntimeFolder(Path(sys.argv[1])); (folder.path / 'engine.sock').touch(); os._exit(0)"
    )
    subprocess.run([sys.executable, "-c", code, str(short_path)], check=True, timeout=PATIENCE_S)
    (dead,) = short_path.iterdir()
    foreign = short_path / "jitgraph-notes"
    foreign.mkdir()
    link = short_path / "jitgraph-1-link"
    link.symlink_to(foreign)
    with RuntimeFolder(short_path) as folder:
        assert not dead.exists()
        assert remove_stale(short_path) == []
        assert folder.path.exists()
    assert {path.name for path in short_path.iterdir()} == {"jitgraph-notes", "jitgraph-1-link"}


def test_the_users_runtime_folder_is_used_if_it_is_private(short_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(short_path))
    short_path.chmod(0o700)
    with RuntimeFolder() as folder:
        assert folder.path.parent.parent == short_path
    short_path.chmod(0o777)
    with RuntimeFolder() as folder:
        assert folder.path.parent.parent != short_path


def test_a_path_too_long_for_a_socket_is_refused_or_passed_over(
    short_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deep = short_path / ("d" * 100)
    deep.mkdir(mode=0o700)
    with pytest.raises(ConfigError, match="XDG_RUNTIME_DIR"):
        RuntimeFolder(deep)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(deep))
    monkeypatch.setattr(tempfile, "tempdir", str(deep))
    with RuntimeFolder() as folder:
        assert folder.path.parent.parent == Path("/tmp")
    assert list(deep.iterdir()) == []


# ----------------------------------------------------------------------------------------------------------- processes


def test_a_process_says_its_words_and_its_end(socket_path: Path) -> None:
    lines: list[str] = []
    process = spawn_engine(fake("--exit-early", "3"), socket_path, lines.append)
    ends: list[int | None] = []
    process.on_end(lambda: ends.append(process.returncode))
    assert process.wait(PATIENCE_S) == 3
    assert "does not want to start" in process.tail
    assert lines == process.tail.split("\n")
    process.on_end(lambda: ends.append(None))
    eventually(lambda: len(ends) == 2)
    assert set(ends) == {3, None}
    assert not process.alive
    process.kill()  # of no effect, and no error


def test_a_command_that_is_not_there(socket_path: Path) -> None:
    process = spawn_engine(["/no/such/command"], socket_path, lambda line: None)
    assert process.wait(PATIENCE_S) == 127
    assert "cannot be run" in process.tail


def test_the_end_of_a_process_takes_its_children_with_it(socket_path: Path) -> None:
    process = spawn_engine(fake("--grandchild", "--stubborn"), socket_path, lambda line: None)
    eventually(lambda: "fake engine" in process.tail)
    child = int(process.tail.split()[1])
    assert is_there(child)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait(PATIENCE_S) == -signal.SIGKILL
    eventually(lambda: not is_there(child))


def test_ending_a_process_that_will_not(socket_path: Path) -> None:
    process = spawn_engine(fake("--stubborn"), socket_path, lambda line: None)
    eventually(lambda: "fake engine" in process.tail)
    assert process.end(grace_s=0.2) == -signal.SIGKILL


def test_the_server_key_stays_here(socket_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JITGRAPH_API_KEY", "secret")
    process = EngineProcess(["env"], lambda line: None)
    assert process.wait(PATIENCE_S) == 0
    assert "PATH=" in process.tail
    assert "secret" not in process.tail


@pytest.mark.parametrize("stopped", [False, True])
def test_the_death_of_the_parent_ends_the_engine(short_path: Path, stopped: bool) -> None:
    """Killed, so that it can do nothing about it; also where the engine cannot run at all at that time. The thread
    that asked for the process has ended long before: that must not end it."""
    code = (
        "import sys, threading, time; from pathlib import Path; from jitgraph.server.spawn import spawn_engine\n"
        "start = lambda: spawn_engine([sys.executable, sys.argv[1]], Path(sys.argv[2]), lambda line: print(line, "
        "flush=True))\n"
        "thread = threading.Thread(target=start); thread.start(); thread.join(); time.sleep(1000)"
    )
    command = [sys.executable, "-c", code, FAKE, str(short_path / "s" / "engine.sock")]
    parent = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    engine_pid = int(parent.stdout.readline().split()[-1])
    eventually((short_path / "s" / "engine.sock").exists)
    assert is_there(engine_pid)
    if stopped:
        os.kill(engine_pid, signal.SIGSTOP)
    parent.kill()
    parent.wait()
    eventually(lambda: not is_there(engine_pid))
    parent.stdout.close()
    eventually(lambda: not (short_path / "s" / "engine.sock").exists())


# ---------------------------------------------------------------------------------------------------------- a live one


def test_ready_serving_stopped(socket_path: Path) -> None:
    lines = Lines()

    async def act(supervisor: Supervisor) -> None:
        assert supervisor.state == "starting"
        assert supervisor.client is None
        assert supervisor.retry_after_s >= 1.0
        assert await supervisor.ready()
        assert supervisor.state == "ready"
        assert supervisor.retry_after_s == 0.0
        assert await answer(engine(supervisor), [1, 2, 3], 4) == [7, 8, 9, 10]
        assert supervisor.last_start is not None
        assert sum(supervisor.last_start.phases_s.values()) == pytest.approx(supervisor.last_start.wall_s)
        assert {"load", "capture"} <= set(supervisor.last_start.phases_s)

    supervisor = supervise(socket_path, "--start-s", "0.3", act=act, lines=lines)
    assert supervisor.state == "stopped"
    assert supervisor.restarts == 0
    assert "load 1 of 3" in lines.text
    assert "MiB" in lines.text
    assert "ready in" in lines.text


@pytest.mark.parametrize("how", ["kill", "exit"])
def test_a_crash_is_told_and_mended(socket_path: Path, how: str) -> None:
    async def act(supervisor: Supervisor) -> None:
        await supervisor.ready()
        first, first_pid = engine(supervisor), supervisor.pid
        streams = [asyncio.create_task(answer(first, [n], 500)) for n in range(8)]
        await until(lambda: first.last_beat is not None and first.last_beat.running == 8)
        if how == "kill":
            assert first_pid is not None
            os.kill(first_pid, signal.SIGKILL)
        else:
            streams.append(asyncio.create_task(answer(first, [EXIT_ID], 1)))
        ended = await asyncio.gather(*streams, return_exceptions=True)
        assert all(isinstance(error, EngineGone) for error in ended)
        await until(lambda: supervisor.state == "restarting")
        assert supervisor.client is None
        assert supervisor.retry_after_s >= 1.0
        await until(lambda: supervisor.state == "ready")
        assert supervisor.pid != first_pid
        assert await answer(engine(supervisor), [5], 3) == [6, 7, 8]
        assert dict(supervisor.endings) == {"exit": 1}
        assert supervisor.restarts == 1

    lines = Lines()
    supervise(socket_path, act=act, lines=lines)
    assert ("was killed by SIGKILL" if how == "kill" else "ended with status 9") in lines.text


def test_an_engine_that_says_nothing_is_replaced(socket_path: Path) -> None:
    """SIGSTOP: the process lives, its socket is open, and nothing comes. Its streams hear of it by name."""

    async def act(supervisor: Supervisor) -> None:
        await supervisor.ready()
        stopped = supervisor.pid
        assert stopped is not None
        stream = asyncio.create_task(answer(engine(supervisor), [1], 100_000))
        await asyncio.sleep(0.1)
        os.kill(stopped, signal.SIGSTOP)
        with pytest.raises(EngineGone, match="has said nothing for"):
            await stream
        await until(lambda: supervisor.state == "ready")
        assert not is_there(stopped)
        assert await answer(engine(supervisor), [5], 3) == [6, 7, 8]
        assert dict(supervisor.endings) == {"hang": 1}

    supervise(socket_path, act=act)


def test_an_engine_that_beats_and_does_not_step_is_replaced(socket_path: Path) -> None:
    async def act(supervisor: Supervisor) -> None:
        await supervisor.ready()
        with pytest.raises(EngineGone, match="has made no step"):
            await answer(engine(supervisor), [STALL_ID], 5)
        await until(lambda: supervisor.state == "ready")
        assert dict(supervisor.endings) == {"hang": 1}

    supervise(socket_path, act=act)


def slow(step_s: float, longest_s: float) -> list[str]:
    """An engine with steps of that length that knows it: the real service, and no model."""
    script = str(Path(__file__).with_name("slow_engine.py"))
    return [sys.executable, script, "--step-s", str(step_s), "--longest-s", str(longest_s)]


@pytest.mark.parametrize("hangs", [False, True])
def test_an_engine_with_long_steps_is_left_alone_and_one_that_hangs_is_not(socket_path: Path, hangs: bool) -> None:
    """Both say nothing themselves for longer than a hang may last, and live; one comes back."""
    said = Lines()
    limits = replace(QUICK, hang_s=0.6)

    async def main() -> Supervisor:
        command = slow(0.01, 0.01) if hangs else slow(1.3, 1.3)
        supervisor = Supervisor(command, socket_path, limits=limits, say=said.append)
        supervisor.start()
        try:
            assert await supervisor.ready()
            client = engine(supervisor)
            if hangs:
                with pytest.raises(EngineGone, match="main thread has been at one thing"):
                    await answer(client, [STALL_ID], 3)
                await until(lambda: supervisor.state == "ready" and supervisor.client is not client)
            else:
                assert await answer(client, [5], 2) == [5, 6]
                assert client.last_beat is not None and client.last_beat.longest_s >= 1.3
        finally:
            await supervisor.stop()
        return supervisor

    supervisor = asyncio.run(asyncio.wait_for(main(), PATIENCE_S))
    assert dict(supervisor.endings) == ({"hang": 1} if hangs else {})


def test_an_engine_that_only_seems_to_hang_can_say_goodbye(socket_path: Path) -> None:
    """One whose step takes too long is ended all the same; whoever else talks to it hears why, not a reset."""
    lines = Lines()

    async def act(supervisor: Supervisor) -> None:
        await supervisor.ready()
        other = await EngineClient.connect(socket_path)
        with pytest.raises(EngineGone, match="has made no step"):
            await answer(engine(supervisor), [STALL_ID], 5)
        await asyncio.wait_for(other.closed.wait(), PATIENCE_S)
        assert other.gone == "told to end at once"
        assert "has made no step" in lines.text, "and people are told before anything is done"

    patient = replace(QUICK, grace_s=PATIENCE_S)  # on a loaded machine a goodbye takes its time
    supervise(socket_path, act=act, lines=lines, limits=patient)


def test_an_engine_that_lives_is_connected_again(socket_path: Path) -> None:
    """A connection that ended is no engine that ended: what it knows and holds is kept."""
    lines = Lines()

    async def act(supervisor: Supervisor) -> None:
        await supervisor.ready()
        first, pid = engine(supervisor), supervisor.pid
        running = asyncio.create_task(answer(first, [1], 100_000))
        await asyncio.sleep(0.05)
        with pytest.raises(EngineGone, match="the test wants it"):
            await answer(first, [PART_ID], 5)
        with pytest.raises(EngineGone, match="the test wants it"):
            await running
        await until(lambda: supervisor.state == "ready" and supervisor.client is not first)
        assert supervisor.pid == pid and supervisor.restarts == 0
        assert await answer(engine(supervisor), [5], 3) == [6, 7, 8]
        assert "engine: has lost the connection: the test wants it; it lives, and is connected again" in lines

    supervise(socket_path, act=act, lines=lines)


def test_an_engine_that_cannot_be_kept_connected_is_replaced(socket_path: Path) -> None:
    lines = Lines()

    async def act(supervisor: Supervisor) -> None:
        await supervisor.ready()
        pid = supervisor.pid
        for _ in range(QUICK.restarts + 1):
            client = engine(supervisor)
            with pytest.raises(EngineGone, match="the test wants it"):
                await answer(client, [PART_ID], 5)
            await until(lambda client=client: supervisor.state == "ready" and supervisor.client is not client)
        assert supervisor.pid != pid
        assert dict(supervisor.endings) == {"lost": 1}
        assert await answer(engine(supervisor), [5], 3) == [6, 7, 8]
        assert "engine: has lost the connection: the test wants it" in lines

    supervise(socket_path, act=act, lines=lines)


def test_a_quiet_engine_is_left_alone(socket_path: Path) -> None:
    """Idle for much longer than a hang may last: beats come, steps need not."""

    async def act(supervisor: Supervisor) -> None:
        await supervisor.ready()
        pid = supervisor.pid
        await asyncio.sleep(2 * limits.hang_s)
        assert (supervisor.pid, supervisor.state) == (pid, "ready")

    limits = Limits(hang_s=1.5, tick_s=0.05)
    assert supervise(socket_path, act=act, limits=limits).restarts == 0


@pytest.mark.parametrize("option", ["--deaf", "--never-ready"])
def test_a_start_that_never_ends_is_given_up(socket_path: Path, option: str) -> None:
    async def act(supervisor: Supervisor) -> None:
        assert not await supervisor.ready()
        await supervisor.over()
        assert supervisor.state == "failed"
        assert supervisor.failure is not None
        assert "has said nothing" in supervisor.failure

    supervise(socket_path, option, act=act, limits=Limits(start_silence_s=0.8, grace_s=0.5, restarts=1, tick_s=0.05))


def test_a_crash_loop_ends_when_the_budget_is_spent(socket_path: Path) -> None:
    async def act(supervisor: Supervisor) -> None:
        await supervisor.over()
        assert supervisor.state == "failed"
        assert supervisor.failure is not None
        assert "after 3 restarts" in supervisor.failure
        assert supervisor.restarts == 3

    lines = Lines()
    supervise(socket_path, "--crash-after", "0.01", act=act, lines=lines)
    assert sum(line.startswith("engine: fake engine") for line in lines) == 4


def test_settings_that_cannot_work_are_not_tried_again(socket_path: Path) -> None:
    async def act(supervisor: Supervisor) -> None:
        assert not await supervisor.ready()
        assert supervisor.failure is not None
        assert "does not want to start" in supervisor.failure
        assert supervisor.restarts == 0

    supervise(socket_path, "--exit-early", "2", act=act)


def test_a_drain_lets_streams_finish_and_takes_no_more(socket_path: Path) -> None:
    async def act(supervisor: Supervisor) -> None:
        await supervisor.ready()
        client, pid = engine(supervisor), supervisor.pid
        stream = asyncio.create_task(answer(client, [1], 60))
        await until(lambda: client.last_beat is not None and client.last_beat.running == 1)
        draining = asyncio.create_task(supervisor.drain(PATIENCE_S))
        await asyncio.sleep(0.05)
        assert supervisor.state == "draining"
        assert supervisor.client is client
        assert supervisor.retry_after_s >= 1.0
        assert await stream == list(range(2, 62))
        await draining
        assert supervisor.state == "stopped"
        assert pid is not None
        assert not is_there(pid)
        assert supervisor.restarts == 0

    supervise(socket_path, act=act)


def test_a_drain_does_not_wait_for_ever(socket_path: Path) -> None:
    async def act(supervisor: Supervisor) -> None:
        await supervisor.ready()
        stream = asyncio.create_task(answer(engine(supervisor), [1], 100_000))
        await asyncio.sleep(0.05)
        await supervisor.drain(0.2)
        with pytest.raises(EngineGone):
            await stream
        assert supervisor.state == "stopped"

    supervise(socket_path, act=act)


def test_a_drain_of_an_engine_that_hears_nothing_has_one_deadline(socket_path: Path) -> None:
    """SIGSTOP: neither its goodbye nor its end comes, and each must not be waited for in full."""

    async def act(supervisor: Supervisor) -> None:
        await supervisor.ready()
        assert supervisor.pid is not None
        os.kill(supervisor.pid, signal.SIGSTOP)
        timeouts: list[float] = []
        wait_for = asyncio.wait_for

        async def noted(what: Awaitable[None], timeout: float) -> None:
            timeouts.append(timeout)
            await wait_for(what, timeout)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("jitgraph.server.supervisor.asyncio.wait_for", noted)
            await supervisor.drain(1.0)
        assert supervisor.state == "stopped"
        assert timeouts[0] == pytest.approx(1.0 + limits.grace_s, abs=0.1), "for the goodbye"
        assert timeouts[2] < 0.1, "and nothing is left of it for the end (between them: the client's own)"

    limits = replace(QUICK, hang_s=PATIENCE_S)
    supervise(socket_path, act=act, limits=limits)


@pytest.mark.parametrize("when", ["starting", "stubborn", "draining"])
def test_a_stop_is_at_once(socket_path: Path, when: str) -> None:
    """While it starts, while it will not end, and while it still drains (the second signal)."""

    async def act(supervisor: Supervisor) -> None:
        draining: asyncio.Task[None] | None = None
        if when == "starting":
            await until(lambda: supervisor.pid is not None)
        else:
            await supervisor.ready()
        if when == "draining":
            stream = asyncio.create_task(answer(engine(supervisor), [1], 100_000))
            await asyncio.sleep(0.05)
            draining = asyncio.create_task(supervisor.drain(1000.0))
            await asyncio.sleep(0.05)
        await supervisor.stop()
        assert supervisor.state == "stopped"
        if draining is not None:
            await draining
            with pytest.raises(EngineGone):
                await stream

    options = {"starting": ("--never-ready",), "stubborn": ("--stubborn",), "draining": ()}
    supervise(socket_path, *options[when], act=act)


def test_a_stop_before_the_start(socket_path: Path) -> None:
    async def main() -> str:
        supervisor = Supervisor(fake(), socket_path, limits=QUICK)
        await supervisor.stop()
        await supervisor.over()
        return supervisor.state

    assert asyncio.run(main()) == "stopped"


def test_the_cores_are_divided_and_one_is_left() -> None:
    assert [threads_for(16, engines) for engines in (1, 2, 3, 15, 16)] == [15, 7, 5, 1, 1]
    assert threads_for(1, 1) == threads_for(2, 1) == threads_for(2, 5) == 1


@pytest.mark.parametrize("own", [None, "3"])
def test_threads_are_the_users_or_else_ours(
    socket_path: Path, monkeypatch: pytest.MonkeyPatch, own: str | None
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if own is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", own)
    (socket_path.parent / "env").write_text("#!/bin/sh\nenv\n")
    (socket_path.parent / "env").chmod(0o700)
    command = [str(socket_path.parent / "env")]
    for threads in (None, 2):
        process = spawn_engine(command, socket_path, lambda line: None, threads)
        assert process.wait(PATIENCE_S) == 0
        seen = [line for line in process.tail.splitlines() if line.startswith("OMP_NUM_THREADS")]
        expected = own or threads
        assert seen == ([] if expected is None else [f"OMP_NUM_THREADS={expected}"])


# -------------------------------------------------------------------------------------------------------------- routing

NAMES = st.lists(st.text(max_size=8), min_size=1, max_size=6, unique=True)
IDS = st.integers(0, 2**31 - 1)
PROMPTS = st.lists(IDS, max_size=100)
LONG_PROMPTS = st.lists(IDS, min_size=KEY_TOKENS, max_size=KEY_TOKENS + 9)


@st.composite
def engines_of(draw: st.DrawFn) -> list[Candidate]:
    return [Candidate(name, draw(st.booleans()), draw(st.integers(0, 5))) for name in draw(NAMES)]


@given(PROMPTS, st.text(max_size=5), engines_of(), st.integers(0, 99))
def test_no_request_goes_where_it_would_wait(ids: list[int], salt: str, engines: list[Candidate], turn: int) -> None:
    chosen = engines[choose(ids, salt, engines, turn)]
    heard = [one for one in engines if not one.silent] or engines
    assert chosen in heard, "an engine that may hang gets nothing while there is another"
    extra = chosen.load - min(one.load for one in heard)
    assert extra < (CLEARLY_BUSIER if len(ids) >= LEAST_TOKENS else 1)


@given(LONG_PROMPTS, PROMPTS, PROMPTS, st.text(max_size=5), NAMES, st.randoms(use_true_random=False))
def test_one_beginning_one_engine(
    ids: list[int], more: list[int], other: list[int], salt: str, names: list[str], rng: random.Random
) -> None:
    """Whatever follows, in whatever order the engines stand, and whoever else comes and goes."""
    engines = [Candidate(name, False, 1) for name in names]
    home = engines[choose(ids, salt, engines)]
    rng.shuffle(engines)
    assert engines[choose(ids + more, salt, engines, rng.randrange(9))] is home
    fewer = [one for one in engines if one is home or rng.random() < 0.5]
    assert fewer[choose(ids + other, salt, fewer)] is home
    busy = [one._replace(load=1 + CLEARLY_BUSIER) if one is home else one for one in engines]
    away = busy[choose(ids, salt, busy)].name
    assert (away == home.name) == (len(names) == 1)
    left = [one for one in engines if one is not home]
    assert not left or left[choose(ids, salt, left)].name == away, "where it goes then is settled as well"


def test_beginnings_are_spread_and_salts_kept_apart() -> None:
    engines = [Candidate(f"engine {n}", False, 0) for n in range(4)]
    counts = Counter(choose([n] * 64, "", engines) for n in range(400))
    assert all(50 < counts[n] < 150 for n in range(4))
    salts = Counter(choose([7] * 64, f"key {n}", engines) for n in range(400))
    assert all(50 < salts[n] < 150 for n in range(4))
    turns = Counter(choose([1, 2], "", engines, turn) for turn in range(8))
    assert turns == dict.fromkeys(range(4), 2), "short prompts take turns"


def test_a_socket_that_somebody_listens_at_is_left_alone(socket_path: Path) -> None:
    tether.remove_dead(str(socket_path))
    with listen(socket_path):
        tether.remove_dead(str(socket_path))
        assert socket_path.exists()
    tether.remove_dead(str(socket_path))
    assert not socket_path.exists()
    link = socket_path.with_name("link")
    for other in (socket_path, link):
        other.symlink_to(link) if other is link else other.write_text("mine")
        tether.remove_dead(str(other))
        assert other.is_symlink() or other.read_text() == "mine", "what is no socket is never removed"
        other.unlink()


def test_a_tether_of_another_version_does_nothing(socket_path: Path) -> None:
    """A server that runs while its installation is replaced starts the new one with the old arguments."""
    mine = socket_path.with_name("program")
    mine.write_text("mine")
    command = [sys.executable, "-I", "-S", str(tether.__file__), str(os.getpid()), str(mine), "-c", "pass"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    assert done.returncode == tether.NOT_FOUND and "another version" in done.stderr
    assert mine.read_text() == "mine"
    mine.unlink()


def test_what_an_earlier_engine_left_is_in_nobodys_way(socket_path: Path) -> None:
    process = spawn_engine(fake(), socket_path, lambda line: None)
    eventually(socket_path.exists)
    process.kill()
    process.wait(PATIENCE_S)
    listen(socket_path).close()
    assert socket_path.exists()

    async def act(supervisor: Supervisor) -> None:
        assert await supervisor.ready()

    supervise(socket_path, act=act)


# ------------------------------------------------------------------------------------------------------ several engines


def test_a_pool_sends_what_begins_alike_to_one_engine(socket_path: Path) -> None:
    async def main() -> None:
        paths = [socket_path.with_name(f"{n}.sock") for n in range(3)]
        said = Lines()
        pool = EnginePool([Supervisor(fake(), path, name=path.stem, limits=QUICK, say=said.append) for path in paths])
        pool.start()
        try:
            assert await pool.ready()
            for chat in range(6):
                before = [(await client.stats())["steps"] for client in pool.clients]
                for turn in range(4):
                    ids = [100 + chat] * 64 + [1] * turn
                    link = pool.client
                    assert link is not None
                    assert await answer(link, ids, 5) == [(sum(ids) + 1 + n) % 1000 for n in range(5)]
                after = [(await client.stats())["steps"] for client in pool.clients]
                assert sorted(b - a for a, b in zip(before, after, strict=True)) == [0, 0, 20], "all turns at one"
            link = pool.client
            assert link is not None and link.gone is None and link.facts.model == "fake" and link.last_beat is not None
            assert link.last_seen_ns > 0 and "steps" in await link.stats()
            slow = [asyncio.create_task(answer(link, [9] * 64, 100_000)) for _ in range(3 * CLEARLY_BUSIER)]
            await until(lambda: sum(client.in_flight for client in pool.clients) == len(slow))
            assert max(client.in_flight for client in pool.clients) <= 2 + CLEARLY_BUSIER, "not all behind each other"
            for task in slow:
                task.cancel()
        finally:
            await pool.stop()
        assert pool.client is None and pool.route([1] * 64, "") is None

    asyncio.run(asyncio.wait_for(main(), PATIENCE_S))


def test_a_pool_spreads_requests_and_outlives_an_engine(socket_path: Path) -> None:
    async def main() -> None:
        paths = [socket_path.with_name(f"{n}.sock") for n in range(2)]
        said = Lines()
        pool = EnginePool([Supervisor(fake(), path, limits=QUICK, say=said.append) for path in paths])
        pool.start()
        try:
            assert pool.state == "starting"
            assert pool.client is None
            assert await pool.ready()
            assert pool.state == "ready"
            first = pool.least_busy(pool.clients)
            tasks = [asyncio.create_task(answer(first, [1], 400))]
            await asyncio.sleep(0.02)
            second = pool.least_busy(pool.clients)
            assert second is not first, "the busy one was chosen"
            tasks += [asyncio.create_task(answer(second, [1], 400)) for _ in range(2)]
            await asyncio.sleep(0.02)
            assert pool.least_busy(pool.clients) is first
            victim = next(one for one in pool.supervisors if one.client is second)
            assert victim.pid is not None
            os.kill(victim.pid, signal.SIGKILL)
            await until(lambda: second.closed.is_set())
            assert pool.client is first
            assert pool.state == "ready"
            await until(lambda: len(pool.clients) == 2)
            assert pool.restarts == 1
            assert dict(pool.endings) == {"exit": 1}
            draining = asyncio.create_task(pool.drain(PATIENCE_S))
            ended = await asyncio.gather(*tasks, return_exceptions=True)
            assert ended[0] == list(range(2, 402))
            assert [type(one) for one in ended[1:]] == [EngineGone, EngineGone]
            await draining
            assert pool.state == "stopped"
        finally:
            await pool.stop()

    asyncio.run(asyncio.wait_for(main(), PATIENCE_S))
    assert list(socket_path.parent.iterdir()) == []
