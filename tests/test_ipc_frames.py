"""Whatever bytes arrive, a reader gives valid records or ``ProtocolError``, in bounded memory, however they are cut."""

from __future__ import annotations

import random
import struct
import tracemalloc
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import msgspec
import pytest
import reliability_parts.frames as fuzz
from hypothesis import given, settings
from hypothesis import strategies as st
from reliability_parts.frames import FrameFuzz, feed_stream, fuzz_frames
from reliability_parts.wire_values import CLIENT_RECORDS, random_record

from jitgraph.ipc.frames import MAX_FRAME_BYTES, Framer, ProtocolError, client_framer, encode, engine_framer
from jitgraph.ipc.messages import AskStats, Cancel, EngineFacts, FromClient, FromEngine, Hello, Ready, Stats, Submit
from jitgraph.types import SamplingParams

RANDOM = st.randoms(use_true_random=False)


def framed(payload: bytes) -> bytes:
    return struct.pack("<I", len(payload)) + payload


def text(value: str) -> bytes:
    """A short text in msgpack."""
    return bytes([0xA0 | len(value)]) + value.encode()


def record_with(kind: str, name: str, value: bytes) -> bytes:
    """The payload of a record with one field of raw msgpack."""
    return b"\x82" + text("type") + text(kind) + text(name) + value


# ----------------------------------------------------------------------------------------------------------------- cuts


@settings(max_examples=80, deadline=None)
@given(rng=RANDOM, data=st.data())
def test_cuts_do_not_matter(rng: random.Random, data: st.DataObject) -> None:
    frames = [encode(random_record(rng, rng.choice(CLIENT_RECORDS))) for _ in range(data.draw(st.integers(1, 5)))]
    stream = b"".join(frames)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=10)))
    framer = engine_framer()
    got: list[bytes] = []
    for begin, end in pairwise([0, *cuts, len(stream)]):
        got += [encode(record) for record in framer.feed(stream[begin:end])]
        done = sum(map(len, got))
        assert stream[:done] == b"".join(got)
        assert framer.held == end - done  # nothing late, nothing twice, nothing more kept than what is not done
    assert got == frames
    assert not framer.partial


def test_single_bytes() -> None:
    framer = engine_framer()
    records = [Hello(1, "a"), Cancel(5), AskStats(), Cancel(2**63)]
    stream = b"".join(map(encode, records))
    assert [record for i in range(len(stream)) for record in framer.feed(stream[i : i + 1])] == records


def test_records_before_a_bad_one_arrive() -> None:
    framer = engine_framer()
    got = []
    with pytest.raises(ProtocolError):
        for record in framer.feed(encode(Cancel(1)) + encode(Cancel(2)) + framed(b"\xc1") + encode(Cancel(3))):
            got.append(record)
    assert got == [Cancel(1), Cancel(2)]


@pytest.mark.parametrize("bad", [framed(b"\xc1"), b"\xff\xff\xff\xff"])
def test_a_broken_stream_stays_broken_and_keeps_nothing(bad: bytes) -> None:
    framer = engine_framer()
    with pytest.raises(ProtocolError):
        list(framer.feed(bad + b"x" * 1000))
    for _ in range(3):
        with pytest.raises(ProtocolError):
            list(framer.feed(encode(Cancel(1))))
        assert framer.held == 0


# --------------------------------------------------------------------------------------------------------------- limits


def test_the_cap() -> None:
    room = MAX_FRAME_BYTES - len(encode(Submit(1, b"", msgspec.Raw(b"\x80")))) + 4 - 3  # a longer length for the bytes
    largest = Submit(1, b"\0" * room, msgspec.Raw(b"\x80"))
    frame = encode(largest)
    assert len(frame) == 4 + MAX_FRAME_BYTES
    (got,) = engine_framer().feed(frame)
    assert isinstance(got, Submit)
    assert len(got.prompt) == room
    with pytest.raises(ProtocolError, match="over the limit"):
        encode(Submit(1, b"\0" * (room + 1), msgspec.Raw(b"\x80")))
    with pytest.raises(ProtocolError, match="over the limit"):
        list(engine_framer().feed(struct.pack("<I", MAX_FRAME_BYTES + 1)))  # the length is enough to know


def test_a_reader_keeps_at_most_one_frame() -> None:
    framer: Framer[Any] = Framer(FromClient, most=1000)
    one = encode(Cancel(3))
    for _ in range(100):
        assert list(framer.feed(one * 50 + one[:7])) == [Cancel(3)] * 50
        assert framer.held == 7
        assert list(framer.feed(one[7:])) == [Cancel(3)]
    assert list(framer.feed(struct.pack("<I", 1000) + b"x" * 999)) == []
    assert framer.held == 1003


CLAIM = b"\x05\xf5\xe1\x00"  # 100 million entries
BOMBS = {
    "tuple of ids": (FromEngine, record_with("Tokens", "token_ids", b"\xdd" + CLAIM)),
    "tuple of records": (FromEngine, record_with("Tokens", "logprobs", b"\xdd" + CLAIM)),
    "list in a loose value": (FromEngine, record_with("Stats", "values", b"\x81\xa1a\xdd" + CLAIM)),
    "map in a loose value": (FromEngine, record_with("Stats", "values", b"\xdf" + CLAIM)),
    "text": (FromClient, record_with("Hello", "name", b"\xdb" + CLAIM)),
    "bytes": (FromClient, record_with("Submit", "prompt", b"\xc6" + CLAIM)),
    "raw": (FromClient, record_with("Submit", "params", b"\xdd" + CLAIM)),
    "whole record": (FromClient, b"\xdf" + CLAIM),
    "unknown field": (FromClient, record_with("AskStats", "x", b"\xdd" + CLAIM)),
    "deep raw": (FromClient, record_with("Submit", "params", b"\x91" * 1_000_000 + b"\xc0")),
    "deep loose value": (FromEngine, record_with("Stats", "values", b"\x81\xa1a" + b"\x91" * 1_000_000 + b"\xc0")),
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_claim_takes_no_memory(name: str) -> None:
    kinds, payload = BOMBS[name]
    frame = framed(payload)
    framer: Framer[Any] = Framer(kinds)
    tracemalloc.start()
    try:
        with pytest.raises(ProtocolError):
            list(framer.feed(frame))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 4 * len(frame) + 2**20


# --------------------------------------------------------------------------------------------------------- not a record


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"\xc0",
        b"\x90",
        b"\x80",
        msgspec.msgpack.encode({"type": "Nobody"}),
        msgspec.msgpack.encode({"type": "Cancel"}),
        msgspec.msgpack.encode({"request_id": 1}),
        msgspec.msgpack.encode({"type": "Cancel", "request_id": "1"}),
        msgspec.msgpack.encode({"type": "Cancel", "request_id": 1.0}),
        msgspec.msgpack.encode({"type": "Cancel", "request_id": True}),
        msgspec.msgpack.encode({"type": "Cancel", "request_id": 1, "more": 1}),
        msgspec.msgpack.encode({"type": "Cancel", "request_id": 1}) + b"\0",
        msgspec.msgpack.encode({"type": "Hello", "version": 1, "name": b"x"}),
        b"\x83" + text("type") + text("Hello") + text("version") + b"\x01" + text("name") + b"\xa1\xff",
    ],
)
def test_what_is_no_record(payload: bytes) -> None:
    with pytest.raises(ProtocolError, match="not a record"):
        list(engine_framer().feed(framed(payload)))


def test_an_engine_does_not_read_what_engines_say() -> None:
    with pytest.raises(ProtocolError):
        list(engine_framer().feed(encode(Stats({}))))
    with pytest.raises(ProtocolError):
        list(client_framer().feed(encode(AskStats())))


def test_a_record_that_checks_itself_is_refused_as_any_other() -> None:
    """``EngineFacts`` carries parameters, whose own check raises an error of this project."""
    facts = EngineFacts(1, "m", None, 9, 9, 8, (), SamplingParams(), "cpu", "float32", "", True)
    frame = encode(Ready(facts, {}, {}))
    bad = msgspec.msgpack.decode(frame[4:])
    bad["facts"]["default_params"]["max_tokens"] = 0
    with pytest.raises(ProtocolError, match="max_tokens"):
        list(client_framer().feed(framed(msgspec.msgpack.encode(bad))))


def test_what_cannot_be_encoded_is_a_protocol_error() -> None:
    for values in ({"a": 2**70}, {"a": object()}, {"\ud800": 1}):
        with pytest.raises(ProtocolError, match="Stats"):
            encode(Stats(values))


# ----------------------------------------------------------------------------------------------------------------- fuzz


@settings(max_examples=300, deadline=None)
@given(stream=st.binary(max_size=200), cuts=st.lists(st.integers(0, 200), max_size=5), engine=st.booleans())
def test_any_bytes(stream: bytes, cuts: list[int], engine: bool) -> None:
    outcome = FrameFuzz()
    places = sorted(cut for cut in cuts if cut <= len(stream))
    feed_stream(Framer(FromClient if engine else FromEngine, fuzz.CAP_BYTES), stream, places, outcome)
    assert outcome.crashes == []


@settings(max_examples=200, deadline=None)
@given(rng=RANDOM, edits=st.lists(st.tuples(st.integers(0, 10**6), st.binary(max_size=6), st.integers(0, 6))))
def test_edited_records(rng: random.Random, edits: list[tuple[int, bytes, int]]) -> None:
    """Edits anywhere in a frame, its length included."""
    frame = encode(random_record(rng, rng.choice(CLIENT_RECORDS)))
    for place, inserted, removed in edits:
        at = place % (len(frame) + 1)
        frame = frame[:at] + inserted + frame[at + removed :]
    outcome = FrameFuzz()
    feed_stream(Framer(FromClient, fuzz.CAP_BYTES), frame, [], outcome)
    assert outcome.crashes == []


def test_seeded_fuzz() -> None:
    outcome = fuzz_frames(4000, seed=20261122)
    assert outcome.crashes == []
    assert outcome.crash_count == 0
    assert outcome.frames == 4000
    assert outcome.records > 1000  # it reaches what lies behind a valid record
    assert outcome.refused > 1000
    assert outcome.refused_requests > 50
    assert outcome.most_held_bytes <= fuzz.CAP_BYTES + 4
    assert outcome.slowest_ms < 10_000
    again = fuzz_frames(4000, seed=20261122)
    assert (again.records, again.refused) == (outcome.records, outcome.refused)


class Careless(Framer[Any]):
    """A reader that lets the decoder's own errors through."""

    def _decode(self, payload: bytes) -> Any:
        return self._decoder.decode(payload)


class Hoarder(Framer[Any]):
    """A reader that keeps what it has read."""

    def feed(self, data: bytes) -> Iterator[Any]:
        yield from super().feed(data)
        self._buffer += b"x" * 100_000


@pytest.mark.parametrize("faulty", [Careless, Hoarder])
def test_the_fuzz_finds_a_faulty_reader(faulty: type[Framer[Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuzz, "Framer", faulty)
    outcome = fuzz_frames(200, seed=1)
    assert outcome.crash_count > 0
    assert len(outcome.crashes) == min(outcome.crash_count, fuzz.MOST_CRASHES)
