"""The engine process itself: its start as clients see it, its answers, and every way in which it ends."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from service_cases import PATIENCE_S, Served, Talk, serving, small_buffers, submission

from jitgraph import LLM, SamplingParams
from jitgraph.engine import service_lobby
from jitgraph.engine.opening import open_engine
from jitgraph.engine.report import Report
from jitgraph.engine.service_hub import Hub
from jitgraph.engine.service_lobby import Lobby
from jitgraph.engine.worker import process_age_s
from jitgraph.errors import ConfigError
from jitgraph.ipc.listener import Listener
from jitgraph.ipc.messages import (
    AskStats,
    Cancel,
    Drain,
    Goodbye,
    Ready,
    Refused,
    StartPhase,
    Stats,
    Submit,
    Tokens,
    Welcome,
    pack_ids,
    pack_params,
)

SETTINGS = {"device": "cpu", "max_model_len": 2048, "max_graphs": 12}
COMMAND = [sys.executable, "-m", "jitgraph", "engine", "tiny"]
FLAGS = ["--device", "cpu", "--max-model-len", "2048", "--max-graphs", "12"]
LONG = 2000
"""Tokens of an answer that does not end while a test looks at it."""


class Process:
    """An engine process."""

    def __init__(self, folder: Path, *words: str, command: list[str] | None = None) -> None:
        folder.chmod(0o700)
        self.path = folder / "engine.sock"
        command = command or [*COMMAND, *FLAGS]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.started = time.monotonic()
        self.child = subprocess.Popen(
            [*command, "--socket", str(self.path), *words], env=environment, stderr=subprocess.PIPE, text=True
        )

    def ended(self) -> int:
        """Waits for the end: the exit status. No socket may be left."""
        self.errors = self.child.communicate(timeout=PATIENCE_S)[1]
        assert not self.path.exists(), "the socket is left"
        return self.child.returncode


@contextlib.contextmanager
def process(folder: Path, *words: str, **options: Any) -> Iterator[Process]:
    started = Process(folder, *words, **options)
    try:
        yield started
    finally:
        started.child.kill()
        started.child.communicate()


# --------------------------------------------------------------------------------------------------------- before ready


class Loading:
    """A lobby, and what its loading thread would do."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.hub = Hub(Listener(path))
        self.drains: list[float] = []
        self.used = 10.0
        self.lobby = Lobby(self.hub, lambda: self.used, self.drains.append)
        self.lobby.open()


@pytest.fixture
def loading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Loading]:
    tmp_path.chmod(0o700)
    monkeypatch.setattr(service_lobby, "NEWS_S", 0.0)
    loading = Loading(tmp_path / "e.sock")
    yield loading
    loading.lobby.close()
    loading.hub.close("the test is over")


def test_clients_hear_how_far_the_start_is(loading: Loading) -> None:
    talk = Talk(loading.path)
    welcome = talk.read()
    assert isinstance(welcome, Welcome) and welcome.facts is None
    loading.lobby.progress("load", 1, 4)
    first = talk.until(StartPhase)
    assert (first.phase, first.done, first.total, first.mib) == ("load", 1, 4, 0.0)
    loading.used = 25.0
    loading.lobby.progress("load", 3, 4)
    second = talk.until(StartPhase)
    assert (second.done, second.mib) == (3, 15.0) and second.seconds >= first.seconds
    late = Talk(loading.path)
    assert late.until(StartPhase) == second, "who comes late is told as well"
    loading.lobby.progress("capture", 0, 2)
    assert talk.until(StartPhase).mib == 0.0, "each phase counts for itself"


def test_what_comes_too_early_is_answered(loading: Loading) -> None:
    talk = Talk(loading.path)
    talk.say(submission(3, [1]), Cancel(3), AskStats())
    refused = talk.until(Refused)
    assert (refused.request_id, refused.kind) == (3, "overloaded") and refused.retry_after_s > 0
    assert talk.until(Stats).values == {}
    talk.say(Drain(5.0))
    deadline = time.monotonic() + PATIENCE_S
    while not loading.drains:
        assert time.monotonic() < deadline
        time.sleep(1e-3)
    assert loading.drains == [5.0]


def test_a_slow_reader_does_not_hold_up_the_start(loading: Loading) -> None:
    slow = Talk(loading.path)
    small_buffers(slow)
    slow.until(Welcome)
    loading.hub.most_unsent = 1000
    loading.lobby.progress("load", 0, 10**6)
    for done in range(2000):
        loading.lobby.progress("load", done, 10**6)
        slow.say(AskStats())
    talk = Talk(loading.path)
    assert isinstance(talk.read(), Welcome)


# ------------------------------------------------------------------------------------------------------- a real engine


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """The real engine on the CPU, served by a thread of this process."""
    from jitgraph.config import EngineConfig

    opened = open_engine("tiny", config=EngineConfig(**SETTINGS))
    with serving(tmp_path_factory.mktemp("engine"), opened.engine, Report(opened.engine), opened.facts()) as served:
        yield served
    assert opened.engine.pages.free == opened.engine.pages.total
    opened.engine.close()


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM("tiny", **SETTINGS) as llm:
        yield llm


def requests(count: int) -> list[tuple[list[int], SamplingParams]]:
    """Prompts and parameters of all kinds."""
    return [
        (
            [(7 * number + i) % 500 + 2 for i in range(1 + number * 3 % 40)],
            SamplingParams(
                max_tokens=1 + number % 9,
                temperature=0.9 * (number % 2),
                seed=number,
                ignore_eos=number % 3 > 0,
                logprobs=2 if number % 5 == 0 else None,
            ),
        )
        for number in range(count)
    ]


def alone(llm: LLM, wanted: list[tuple[list[int], SamplingParams]]) -> list[tuple[list[int], str]]:
    """What the same model answers inside this process."""
    prompts, params = zip(*wanted, strict=True)
    return [(list(one.token_ids), one.finish_reason.value) for one in llm.generate(list(prompts), list(params))]


def test_many_clients_get_what_one_alone_would(served: Served, llm: LLM) -> None:
    wanted = requests(24)
    answers = alone(llm, wanted)
    talks = [served.talk() for _ in range(4)]
    for number, (ids, params) in enumerate(wanted):
        talks[number % 4].say(Submit(number, pack_ids(ids), pack_params(params)))
    for number in range(24):
        assert talks[number % 4].answer(number) == answers[number]
    assert talks[0].settled().running == 0


def test_withdrawn_requests_leave_the_others_alone(served: Served, llm: LLM) -> None:
    (whole,) = llm.generate([[5, 6, 7]], SamplingParams(max_tokens=60, ignore_eos=True))
    stayer, leaver = served.talk(), served.talk()
    for number in range(12):
        leaver.submit(number, [9 + number] * (1 + number), max_tokens=LONG, ignore_eos=True)
    stayer.submit(1, [5, 6, 7], max_tokens=60, ignore_eos=True)
    for number in range(0, 12, 2):
        leaver.say(Cancel(number))
        assert leaver.answer(number)[1] == "cancelled"
    leaver.close()
    assert stayer.answer(1) == (list(whole.token_ids), "length")
    beat = stayer.settled()
    assert beat.free_pages == beat.total_pages


def test_time_that_is_over_frees_pages_and_leaves_the_others_alone(served: Served, llm: LLM) -> None:
    """Alone, so in the middle of a loop of the device, and beside others, waiting and running."""
    wanted = requests(4)
    answers, talk = alone(llm, wanted), served.talk()
    total = talk.settled().total_pages
    talk.submit(90, [3, 4], timeout_s=0.05, max_tokens=LONG, ignore_eos=True)
    assert talk.answer(90)[1] == "refused deadline" and talk.settled().free_pages == total
    for number in range(12):  # more than run at once
        talk.submit(100 + number, [number + 3], timeout_s=0.05, max_tokens=LONG, ignore_eos=True)
    for number, (ids, params) in enumerate(wanted):
        talk.say(Submit(number, pack_ids(ids), pack_params(params)))
    assert {talk.answer(100 + number)[1] for number in range(12)} == {"refused deadline"}
    assert [talk.answer(number) for number in range(4)] == answers
    assert talk.settled().free_pages == total


def test_a_failure_in_a_step_is_survived(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    talk = served.talk()
    talk.submit(1, [3, 4], max_tokens=4)
    good = talk.answer(1)
    engine = served.engine
    launch, failed = engine.runner.launch, threading.Event()

    def failing(plan: Any) -> Any:
        if not failed.is_set():
            failed.set()
            raise RuntimeError("a launch went wrong")
        return launch(plan)

    talk.submit(2, [5], max_tokens=LONG, ignore_eos=True)
    talk.until(Tokens)
    monkeypatch.setattr(engine.runner, "launch", failing)
    talk.submit(3, [3, 4], max_tokens=4)
    assert talk.answer(3) == ([], "refused internal") and talk.answer(2)[1] == "refused internal"
    talk.submit(4, [3, 4], max_tokens=4)
    assert talk.answer(4) == good
    assert talk.settled().free_pages == engine.pages.total


def test_log_probabilities_and_grammars(served: Served, llm: LLM) -> None:
    params = SamplingParams(max_tokens=3, logprobs=2)
    (whole,) = llm.generate([[5, 6, 7]], params, prompt_logprobs=1)
    talk = served.talk()
    talk.say(Submit(1, pack_ids([5, 6, 7]), pack_params(params), prompt_logprobs=1))
    records = [talk.until(Tokens) for _ in range(3)]
    assert whole.logprobs is not None and whole.prompt_logprobs is not None
    for record, expected in zip(records, whole.logprobs, strict=True):
        (one,) = record.logprobs
        assert (one.token_id, one.logprob, one.top) == (expected.token_id, expected.logprob, expected.top)
    told = records[0].prompt_logprobs
    assert told is not None and told[0] is None and len(told) == 3
    assert [one.logprob for one in told[1:]] == [one.logprob for one in whole.prompt_logprobs[1:]]
    from jitgraph.ipc.messages import Grammar

    for number, (kind, source, end) in enumerate(
        [("regex", "[ab]{3,6}", None), ("regex", "[", "refused request"), ("json_object", "", None)], 2
    ):
        grammar = Grammar(kind, source)
        talk.say(Submit(number, pack_ids([5]), pack_params(SamplingParams(max_tokens=40)), grammar=grammar))
        ids, ended = talk.answer(number)
        assert ended == end or (end is None and ended in ("stop", "length") and ids)


def test_the_age_of_a_process() -> None:
    one = process_age_s()
    time.sleep(0.05)
    assert 0.0 < one < process_age_s() < 24 * 3600.0


# ----------------------------------------------------------------------------------------------------------- a process


def test_a_process_from_its_start_to_a_drain(tmp_path: Path, llm: LLM) -> None:
    wanted = requests(6)
    answers = alone(llm, wanted)
    with process(tmp_path) as engine:
        talk = Talk(engine.path)
        welcome = talk.read()
        assert isinstance(welcome, Welcome) and welcome.facts is None and welcome.pid == engine.child.pid
        assert isinstance(talk.read(), StartPhase)
        ready = talk.ready()
        spent, wall = sum(ready.phases_s.values()), time.monotonic() - engine.started
        assert wall / 2 < spent < wall + 0.1, "the phases are all of the start"
        assert {"start", "import", "load", "allocate", "capture"} <= set(ready.phases_s)
        assert ready.phases_mib["load"] > 1.0 and all(seconds >= 0 for seconds in ready.phases_s.values())
        facts = ready.facts
        assert (facts.pid, facts.model, facts.max_model_len, facts.emulated) == (engine.child.pid, "tiny", 2048, True)
        assert facts.vocab_size == llm.spec.vocab_size and facts.fingerprint.startswith("jg-")
        for number, (ids, params) in enumerate(wanted):
            talk.say(Submit(number, pack_ids(ids), pack_params(params)))
        for number in range(6):
            assert talk.answer(number) == answers[number]
        deadline = time.monotonic() + PATIENCE_S
        while (stats := talk.stats())["gc_pause_count"] == 0:  # garbage is collected when it has been quiet
            assert time.monotonic() < deadline
        assert stats["requests"] == {reason: sum(end == reason for _, end in answers) for _, reason in answers}
        assert stats["compiles_after_ready"] == 0 and stats["steps"] > 6 and stats["gc_pause_seconds"] > 0.0

        talk.submit(10, [3, 4], max_tokens=300, ignore_eos=True)
        talk.until(Tokens)
        engine.child.send_signal(signal.SIGTERM)
        while talk.answer(_ask(talk))[1] != "refused draining":
            pass  # what comes before the signal is still answered
        ids, reason = talk.answer(10)
        assert len(ids) == 299 and reason == "length"
        assert isinstance(talk.closed()[-1], Goodbye)
        assert engine.ended() == 0


@pytest.mark.parametrize(("signals", "code"), [(["SIGTERM", "SIGTERM"], 0), (["SIGINT"], 130)])
def test_ending_at_once(tmp_path: Path, signals: list[str], code: int) -> None:
    with process(tmp_path) as engine:
        talk = Talk(engine.path)
        talk.ready()
        talk.submit(1, [3, 4], max_tokens=LONG, ignore_eos=True)
        talk.until(Tokens)
        for number, name in enumerate(signals):
            engine.child.send_signal(getattr(signal, name))
            while number + 1 < len(signals) and talk.answer(_ask(talk))[1] != "refused draining":
                pass  # it has not been heard yet
        ids, end = talk.answer(1)
        assert end == "refused draining" and len(ids) < LONG - 1
        assert isinstance(talk.closed()[-1], Goodbye)
        assert engine.ended() == code


_numbers = itertools.count(100)


def _ask(talk: Talk) -> int:
    """A request of one token."""
    number = next(_numbers)
    talk.submit(number, [3], max_tokens=1)
    return number


def test_ending_before_ready(tmp_path: Path) -> None:
    with process(tmp_path) as engine:
        talk = Talk(engine.path)
        talk.until(StartPhase)
        engine.child.send_signal(signal.SIGTERM)
        last = talk.closed()[-1]
        assert isinstance(last, Goodbye) and "before it was ready" in last.reason
        assert engine.ended() == 0


def test_what_cannot_start_says_why(tmp_path: Path) -> None:
    with process(tmp_path, "--kv-cache-memory", "1KiB") as engine:
        talk = Talk(engine.path)
        last = talk.closed()[-1]
        assert isinstance(last, Goodbye) and "kv_cache_memory" in last.reason
        assert engine.ended() == 2 and "kv_cache_memory" in engine.errors


def test_no_process_outlives_its_parent(tmp_path: Path) -> None:
    """A parent that is killed takes its engine along; the socket that stays is no hindrance to the next engine."""
    words = [*COMMAND, *FLAGS, "--socket", str(tmp_path / "engine.sock")]
    code = (
        "import os, subprocess, time\n"
        f"subprocess.Popen({words!r} + ['--parent-pid', str(os.getpid())])\n"
        "time.sleep(1000)\n"
    )
    with process(tmp_path, command=[sys.executable, "-c", code]) as parent:
        talk = Talk(parent.path)
        pid = talk.until(Ready).facts.pid
        assert pid != parent.child.pid
        parent.child.kill()
        talk.closed()
        deadline = time.monotonic() + PATIENCE_S
        while Path(f"/proc/{pid}").exists() and "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text():
            assert time.monotonic() < deadline, "it lives on"
            time.sleep(0.01)
        while True:  # its first thread is dead before the others, which have the socket until then
            try:
                Listener(parent.path).close()
                break
            except ConfigError:
                assert time.monotonic() < deadline, "nobody can take its place"
                time.sleep(0.01)


def test_a_parent_that_has_gone_already(tmp_path: Path) -> None:
    with process(tmp_path, "--parent-pid", "1") as engine:
        assert engine.ended() == 1
