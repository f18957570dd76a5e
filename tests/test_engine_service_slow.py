"""Clients that read slowly, ask for much or want everything: what they lose, and that nobody else does."""

from __future__ import annotations

import struct
import threading
from pathlib import Path
from typing import Any

import msgspec
import pytest
from service_cases import FACTS, Counting, Talk, counted, serving, small_buffers, submission, wait_for

from jitgraph.engine import service_hub
from jitgraph.ipc.messages import (
    Cancel,
    Goodbye,
    Refused,
    Submit,
    Tokens,
    pack_ids,
    pack_params,
)
from jitgraph.types import SamplingParams, TokenChunk, TokenLogprobs

TOP = tuple((i, -0.5) for i in range(20))


class Scoring(Counting):
    """Tells much of each prompt token where it was asked to, with the first token; and of each token."""

    def step(self) -> list[TokenChunk]:
        wanted = {one: request for one, (request, made) in self.running.items() if not made}
        wanted |= {one.request_id: one for one in self.waiting}
        chunks = []
        for chunk in super().step():
            request = wanted.get(chunk.request_id)
            if request is not None and request.prompt_logprobs is not None:
                scores = (None,) + (TokenLogprobs(1, -0.5, TOP),) * (len(request.prompt_token_ids) - 1)
                chunk = chunk._replace(prompt_logprobs=scores)
            chunks.append(chunk._replace(logprobs=TokenLogprobs(1, -0.5, TOP)))
        return chunks


def scored(request_id: int, tokens: int, **params: Any) -> Submit:
    return Submit(request_id, pack_ids([1] * tokens), pack_params(SamplingParams(**params)), prompt_logprobs=20)


def test_who_falls_behind_loses_its_largest_stream_and_keeps_the_rest(tmp_path: Path) -> None:
    """A front-end that is held up has many clients of its own: only who has most unread pays for it."""
    engine = Scoring(gate=threading.Semaphore(0))
    with serving(tmp_path, engine, most_unsent=60_000) as served:
        front, other = served.talk(), served.talk()
        small_buffers(front)
        front.submit(1, [1], max_tokens=400)
        wait_for(lambda: len(engine.running) == 1, "it runs")
        engine.gate.release(60)  # one stream gets far ahead of the other
        wait_for(lambda: engine.steps >= 60, "its steps")
        front.submit(2, [2], max_tokens=50)
        wait_for(lambda: len(engine.running) == 2, "both run")
        engine.gate.release(10_000)
        wait_for(lambda: served.service.figures.outcomes["refused_overloaded"] == 1, "the larger one is given up")
        other.submit(1, [5], max_tokens=3)
        assert other.answer(1) == (counted([5], 3), "length")
        (client,) = [one for one in served.hub.clients if one.connection.unsent]
        assert client.connection.unsent < 70_000
        tokens, end = front.answer(1)
        assert end == "refused overloaded" and tokens == counted([1], len(tokens)), "up to there in order"
        assert front.answer(2) == (counted([2], 50), "length"), "and nothing of the other is lost"
        front.submit(3, [3], max_tokens=2)
        assert front.answer(3) == (counted([3], 2), "length"), "the connection is as good as before"


def test_large_answers_wait_for_room_and_come_all(tmp_path: Path) -> None:
    engine = Scoring()
    with serving(tmp_path, engine, most_unsent=100_000, max_queued=80) as served:
        slow, other = served.talk(), served.talk()
        small_buffers(slow)
        for number in range(60):  # some 28 kB each
            slow.say(scored(number, 100, max_tokens=1))
        wait_for(lambda: len(served.service._requests._held) > 10, "most are held back")
        other.submit(1, [5], max_tokens=3)
        assert other.answer(1) == (counted([5], 3), "length"), "which holds up nobody else"
        most = max(client.connection.unsent for client in served.hub.clients)
        assert most <= 100_000
        slow.say(Cancel(59))
        for number in range(59):
            assert slow.answer(number) == ([100], "length")
        assert slow.answer(59) == ([], "cancelled")
        assert not served.service._requests._held
        assert "refused_overloaded" not in served.service.figures.outcomes


def test_a_large_answer_alone_needs_no_room(tmp_path: Path) -> None:
    with serving(tmp_path, Scoring(), most_unsent=10_000) as served:
        talk = served.talk()
        talk.say(scored(1, 400, max_tokens=1))
        first = talk.until(Tokens)
        assert first.prompt_logprobs is not None and len(first.prompt_logprobs) == 400
        assert first.finish_reason == "length"


def test_held_back_requests_go_with_their_client(tmp_path: Path) -> None:
    engine = Scoring()
    with serving(tmp_path, engine, most_unsent=50_000, max_queued=80) as served:
        leaver = served.talk()
        small_buffers(leaver)
        for number in range(60):
            leaver.say(scored(number, 100, max_tokens=1))
        wait_for(lambda: len(served.service._requests._held) > 5, "some are held back")
        leaver.close()
        other = served.talk()
        wait_for(lambda: len(served.hub.clients) == 1 and not served.service._requests._held, "nothing is left of it")
        other.say(scored(1, 100, max_tokens=1))
        assert other.answer(1) == ([100], "length")


def test_scores_that_no_frame_holds_are_refused_before_any_work(tmp_path: Path) -> None:
    engine = Scoring()
    roomy = msgspec.structs.replace(FACTS, max_model_len=None)
    with serving(tmp_path, engine, facts=roomy) as served:
        talk = served.talk()
        talk.say(scored(1, 60_000, max_tokens=1))
        refused = talk.until(Refused)
        assert refused.kind == "request" and "fewer alternatives" in refused.message
        assert engine.steps == 0


def test_who_reads_nothing_at_all_is_sent_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(tmp_path) as served:
        silent, other = served.talk(), served.talk()
        small_buffers(silent)
        for number in range(300):
            silent.submit(number, [1], max_tokens=100)
        wait_for(lambda: any(one.connection.unsent for one in served.hub.clients), "something waits")
        other.submit(1, [1], max_tokens=2)
        assert other.answer(1)[1] == "length" and len(served.hub.clients) == 2, "for a while that is nothing bad"
        monkeypatch.setattr(service_hub, "UNREAD_S", 0.3)
        wait_for(lambda: len(served.hub.clients) == 1, "it is sent away")
        last = silent.closed()[-1]
        assert isinstance(last, Goodbye) and "nothing was read for" in last.reason
        assert other.settled().free_pages == 2


# ------------------------------------------------------------------------------------------------------------ the queue


def test_a_flood_leaves_others_their_share(tmp_path: Path) -> None:
    engine = Counting(gate=threading.Semaphore(0))
    with serving(tmp_path, engine, max_queued=6) as served:
        flood, other, third = served.talk(), served.talk(), served.talk()
        for number in range(30):
            flood.submit(number, [number], max_tokens=1)
        refused = [flood.until(Refused).request_id for _ in range(22)]
        assert refused == list(range(8, 30)), "who is alone has all of it"
        for number in range(5):
            other.submit(number, [number], max_tokens=1)
        assert [other.until(Refused).request_id for _ in range(2)] == [3, 4], "half the places, and no more"
        assert [flood.until(Refused).request_id for _ in range(3)] == [7, 6, 5], "the newest made way"
        third.submit(1, [1], max_tokens=1)
        engine.gate.release(100)
        assert third.answer(1) == (counted([1], 1), "length")
        for talk, count in ((flood, 4), (other, 2)):
            for number in range(count):
                assert talk.answer(number) == (counted([number], 1), "length")


def test_those_whom_a_front_end_sends_for_have_their_own_shares(tmp_path: Path) -> None:
    engine = Counting(gate=threading.Semaphore(0))
    with serving(tmp_path, engine, max_queued=4) as served:
        front = served.talk()

        def submit(number: int, salt: str) -> Submit:
            return Submit(number, pack_ids([1]), pack_params(SamplingParams(max_tokens=1)), salt=salt)

        front.say(*(submit(number, f"greedy:{number}") for number in range(8)))
        assert [front.until(Refused).request_id for _ in range(2)] == [6, 7], "its own salts make no other party"
        front.say(submit(8, "modest"))
        assert front.until(Refused).request_id == 5
        engine.gate.release(100)
        assert front.answer(8)[1] == "length"


# ---------------------------------------------------------------------------------------------------------- greetings


def test_who_has_not_said_hello_holds_no_memory(tmp_path: Path) -> None:
    with serving(tmp_path) as served:
        loud = Talk(served.path, hello=False)
        loud.socket.sendall(struct.pack("<I", 2**20) + b"a" * 1000)
        last = loud.closed()[-1]
        assert isinstance(last, Goodbye) and "over the limit" in last.reason
        loud.close()
        big = served.talk()
        big.say(submission(1, [1] * 5000))
        refused = big.until(Refused)
        assert "5000 tokens" in refused.message, "after the greeting frames may be large"
