"""Signs of life while the engine's thread is at one thing, garbage while it is never quiet, and the news of an end."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest
from service_cases import Counting, counted, serving, wait_for

from jitgraph.engine import service
from jitgraph.engine.service_vigil import LATE_S, Vigil
from jitgraph.ipc.messages import BEAT_S, Beat
from jitgraph.types import TokenChunk


class Long(Counting):
    """Its first step waits for a word."""

    done = threading.Event()

    def step(self) -> list[TokenChunk]:
        self.done.wait()
        return super().step()


def test_a_long_step_is_told_from_beside_and_remembered(tmp_path: Path) -> None:
    engine = Long()
    engine.done = threading.Event()
    with serving(tmp_path, engine) as served:
        talk = served.talk()
        assert talk.settled().away_s == 0.0
        talk.submit(1, [5], max_tokens=3)
        beats: list[Beat] = []
        while len(beats) < 4:
            beat = talk.until(Beat)
            if beat.away_s:
                beats.append(beat)
        away_s = [one.away_s for one in beats]
        assert away_s == sorted(away_s) and away_s[0] < away_s[-1]
        assert len({one.steps for one in beats}) == 1, "and nothing else is made up"
        engine.done.set()
        assert talk.answer(1) == (counted([5], 3), "length")
        settled = talk.settled()
        assert settled.away_s == 0.0 and settled.longest_s >= beats[3].away_s - 0.1


def test_a_vigil_costs_nothing_while_it_is_put_off() -> None:
    beats: list[float] = []
    vigil = Vigil(lambda: beats.append(time.monotonic()))
    try:
        end = time.monotonic() + 4 * LATE_S
        while time.monotonic() < end:
            vigil.put_off()
            time.sleep(BEAT_S / 10)
        assert beats == []
        last = time.monotonic()
        wait_for(lambda: len(beats) >= 3, "it beats where nobody else does")
        assert beats[0] - last >= LATE_S - 0.05
    finally:
        vigil.close()
    count = len(beats)
    time.sleep(2 * BEAT_S)
    assert len(beats) == count, "and never after its end"


def test_garbage_is_collected_where_it_is_never_quiet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "YOUNG_EVERY_S", 0.02)
    with serving(tmp_path) as served:
        talk = served.talk()
        number = 0
        while served.tidied_young < 3:
            talk.submit(number, [1], max_tokens=50)
            talk.submit(number + 1, [2], max_tokens=50)
            assert talk.answer(number)[1] == talk.answer(number + 1)[1] == "length"
            number += 2
        before = served.tidied
        wait_for(lambda: served.tidied > before, "and all of it once it is quiet")


def test_a_slow_collection_is_made_rarely(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "YOUNG_EVERY_S", 0.02)
    with serving(tmp_path) as served:
        monkeypatch.setattr(served, "collect_young", lambda: time.sleep(0.05) or setattr(served, "tidied_young", 1))
        talk = served.talk()
        for number in range(0, 200):
            talk.submit(number, [1], max_tokens=50)
            assert talk.answer(number)[1] == "length"
        assert served.service._young_at_s > time.monotonic() + 10, "its share of the time is bounded"


def test_clients_hear_at_once_that_no_more_is_taken(tmp_path: Path) -> None:
    engine = Counting(gate=threading.Semaphore(0))
    with serving(tmp_path, engine) as served:
        talk = served.talk()
        talk.submit(1, [1], max_tokens=2)
        wait_for(lambda: len(engine.running) == 1, "it runs")
        assert not talk.until(Beat).draining
        served.service.drain(30.0)
        while not talk.until(Beat).draining:
            pass
        engine.gate.release(2)
        assert talk.answer(1) == (counted([1], 2), "length")
