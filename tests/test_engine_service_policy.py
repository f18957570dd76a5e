"""What the engine process decides by: shares of the queue, room for large answers, what waits for a slow reader."""

from __future__ import annotations

import random
from collections import Counter, deque

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jitgraph.engine.service_deadlines import Deadlines
from jitgraph.engine.service_room import Room, scores_bytes
from jitgraph.engine.service_shares import Shares
from jitgraph.errors import RequestError
from jitgraph.ipc.frames import MAX_FRAME_BYTES, encode
from jitgraph.ipc.messages import Tokens, WireLogprobs
from jitgraph.ipc.outbox import Outbox

PARTIES = "abcde"


# --------------------------------------------------------------------------------------------------------------- shares


@settings(max_examples=300)
@given(st.integers(1, 12), st.lists(st.tuples(st.sampled_from(PARTIES), st.integers(0, 3)), max_size=120))
def test_nobody_with_less_than_a_share_is_turned_away(places: int, arrivals: list[tuple[str, int]]) -> None:
    """Arrivals of parties, and how many of the oldest leave the queue after each."""
    shares, queue = Shares(), deque[tuple[str, int]]()
    for identity, (party, leave) in enumerate(arrivals):
        waiting = Counter(who for who, _ in queue)
        share = places // len({*waiting, party})
        if len(queue) < places:
            queue.append((party, identity))
            shares.add(party, identity)
        else:
            victim = shares.gives_way(party)
            if victim is None:
                assert waiting[party] >= share, "a newcomer with less than its share was turned away"
            else:
                [whose] = [who for who, one in queue if one == victim]
                assert waiting[whose] > share, "somebody with no more than its share lost a request"
                assert whose != party and victim == max(one for who, one in queue if who == whose), "the newest"
                queue.remove((whose, victim))
                shares.remove(victim)
                queue.append((party, identity))
                shares.add(party, identity)
        for _ in range(min(leave, len(queue))):
            shares.remove(queue.popleft()[1])
    for _, identity in queue:
        shares.remove(identity)
    assert not shares._waiting and not shares._party, "nothing is left"


def test_who_is_alone_may_have_it_all() -> None:
    shares = Shares()
    for identity in range(1000):
        shares.add("a", identity)
    assert shares.gives_way("a") is None
    assert shares.gives_way("b") == 999
    assert Shares().gives_way("b") is None, "where all run and none waits nobody can make way"


# ----------------------------------------------------------------------------------------------------------------- room


@settings(max_examples=200)
@given(st.lists(st.tuples(st.sampled_from("ab"), st.integers(1, 60), st.integers(0, 50)), max_size=40))
def test_no_more_is_promised_than_there_is_room_for(wishes: list[tuple[str, int, int]]) -> None:
    room, promised = Room(100), dict[str, dict[int, int]](a={}, b={})
    for identity, (who, size, unread) in enumerate(wishes):
        theirs = promised[who]
        before = sum(theirs.values())
        taken = room.take(who, identity, size, unread)
        assert taken == (before + unread + size <= 100 or not (before or unread))
        if taken:
            theirs[identity] = size
        elif theirs:
            room.give_back(next(iter(theirs)))
            del theirs[next(iter(theirs))]
    for identity in range(len(wishes)):
        room.give_back(identity)
        room.give_back(identity)
    assert not room._promised and not room._of


@given(st.integers(1, 40), st.integers(0, 20), st.integers(0, 2**31 - 1))
def test_no_record_of_scores_is_larger_than_thought(tokens: int, alternatives: int, token_id: int) -> None:
    one = WireLogprobs(token_id, -1.2345678901234567, ((token_id, -0.1),) * alternatives)
    times = 2**63 - 1
    record = Tokens(2**63 - 1, (token_id,), (times,), (one,), "cancelled", 2**31, times, times, (one,) * tokens)
    bare = msgspec.structs.replace(record, prompt_logprobs=())
    assert len(encode(record)) - len(encode(bare)) <= scores_bytes(tokens, alternatives) + 4


def test_scores_that_no_frame_holds_are_refused() -> None:
    each = 18 + 20 * 15
    most = (MAX_FRAME_BYTES - 2**16) // each
    assert scores_bytes(most, 20) <= MAX_FRAME_BYTES - 2**16
    with pytest.raises(RequestError, match="fewer alternatives or a shorter prompt"):
        scores_bytes(most + 1, 20)
    assert scores_bytes(most + 1, 19) > 0


# --------------------------------------------------------------------------------------------------------------- outbox


@settings(max_examples=300)
@given(st.integers(0, 2**32), st.lists(st.sampled_from("addddfsst"), max_size=60))
def test_what_waits_is_sent_in_order_and_taken_back_whole(seed: int, actions: list[str]) -> None:
    """a: the rest of a piece that went in part, where nothing waits; d: a piece; f, s: some bytes go; t: the heaviest
    owner's are taken back."""
    rng, outbox = random.Random(seed), Outbox()
    model: list[tuple[str | None, bytearray, bool]] = []  # whose, what, whether it has begun
    expected, sent = bytearray(), bytearray()
    for number, action in enumerate(actions):
        if action in "ad":
            owner = rng.choice((None, "x", "y", "z"))
            begun = action == "a" and not model
            data = bytes([number % 256]) * rng.randrange(1, 40)
            outbox.add(owner, data, begun)
            model.append((owner, bytearray(data), begun))
        elif action == "t":
            owned = Counter[str]()
            for owner, data, begun in model:
                if owner is not None and not begun:
                    owned[owner] += len(data)
            heaviest = outbox.heaviest()
            assert (heaviest is None) == (not owned)
            if heaviest is not None:
                assert owned[str(heaviest)] == max(owned.values()) == outbox.take_back(heaviest)
                model = [one for one in model if one[0] != heaviest or one[2]]
        else:
            front = outbox.front(rng.randrange(1, 60))
            assert bool(front) or not model or len(model[0][1]) == 0 or front == b""
            count = rng.randrange(len(front) + 1)
            sent += front[:count]
            outbox.sent(count)
            while count:
                owner, data, _ = model[0]
                step = min(count, len(data))
                expected += data[:step]
                del data[:step]
                count -= step
                model[0] = (owner, data, True)
                if not data:
                    model.pop(0)
        assert sent == expected
        assert outbox.size == sum(len(data) for _, data, _ in model)
        assert outbox.loose == sum(len(data) for owner, data, _ in model if owner is None)
        assert outbox.owned == sum(len(data) for owner, data, begun in model if owner is not None and not begun)
    outbox.take_all_back()
    assert outbox.size == sum(len(data) for _, data, begun in model if begun)
    outbox.clear()
    assert (outbox.size, outbox.owned, outbox.loose, outbox.heaviest(), outbox.front(9)) == (0, 0, 0, None, b"")


# ------------------------------------------------------------------------------------------------------------ deadlines


def test_deadlines_keep_little_of_what_has_ended() -> None:
    live: set[int] = set()
    deadlines = Deadlines(live)
    for identity in range(5000):
        deadlines.add(0.0, identity, 100.0)
    live.update((4998, 4999))
    deadlines.add(0.0, 5000, 1.0)
    assert len(deadlines) < 600
    assert deadlines.next_s == 1.0
    assert list(deadlines.due(50.0)) == []
    assert sorted(deadlines.due(100.0)) == [(4998, 100.0), (4999, 100.0)]
