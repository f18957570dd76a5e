"""Random and mutated frames against the readers of the protocol between processes.

Whatever bytes arrive, a reader returns valid records or raises ``ProtocolError``; sampling parameters and token ids
inside a valid record give values or their own documented error. Anything else is a crash.
"""

from __future__ import annotations

import random
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import msgspec

from jitgraph.errors import RequestError
from jitgraph.ipc.frames import Framer, ProtocolError, encode
from jitgraph.ipc.messages import FromClient, FromEngine, Submit, unpack_ids, unpack_params
from reliability_parts.wire_values import CLIENT_RECORDS, ENGINE_RECORDS, loose_value, random_record

CAP_BYTES = 64 * 1024
"""Cap of the readers under test: small, so that frames come near it and claims go over it."""
MOST_CRASHES = 20
"""Crashes that are described; further ones are only counted."""
_LENGTH = struct.Struct("<I")
_CLAIMS = (b"\xdd", b"\xdf", b"\xdb", b"\xc6", b"\xc9", b"\xdc", b"\xde", b"\xd9", b"\xc4", b"\xc7")
_OPENERS = (b"\x91", b"\x81\xa1a", b"\x92\xc0", b"\xdc\x00\x01")


@dataclass
class FrameFuzz:
    """What became of the frames."""

    frames: int = 0
    records: int = 0
    """Valid records that readers returned."""
    refused: int = 0
    """Streams that ended with ``ProtocolError``."""
    refused_requests: int = 0
    """Valid ``Submit`` records whose parameters or ids were refused by the documented error."""
    crash_count: int = 0
    crashes: list[str] = field(default_factory=list)
    """The first of them: what was raised, and the bytes."""
    slowest_ms: float = 0.0
    """Longest time for one stream of at most a few frames."""
    most_held_bytes: int = 0
    """Most that a reader kept of a frame that had not ended."""

    def crash(self, what: str, stream: bytes) -> None:
        """Counts one, and keeps its description."""
        self.crash_count += 1
        if len(self.crashes) < MOST_CRASHES:
            self.crashes.append(f"{what}: {stream[:400].hex()}")


def fuzz_frames(count: int, seed: int) -> FrameFuzz:
    """Feeds ``count`` random or mutated frames, drawn from ``seed``, to the readers of both directions.

    Some come behind a few valid ones in the same stream; those are not counted.
    """
    rng = random.Random(seed)
    outcome = FrameFuzz()
    for _ in range(count):
        kinds, records = rng.choice(((FromClient, CLIENT_RECORDS), (FromEngine, ENGINE_RECORDS)))
        before_it = [_valid(rng, records) for _ in range(rng.choice((0, 0, 0, 1, 4)))]
        stream = b"".join(before_it) + rng.choice(_MAKERS)(rng, records)
        outcome.frames += 1
        before = time.perf_counter()
        feed_stream(Framer(kinds, CAP_BYTES), stream, _cuts(rng, len(stream)), outcome)
        outcome.slowest_ms = max(outcome.slowest_ms, 1e3 * (time.perf_counter() - before))
    return outcome


def broken_stream(rng: random.Random) -> bytes:
    """What a client may send that went wrong: mostly no valid frame, sometimes one. Never one that ends the engine."""
    while True:
        stream = rng.choice(_MAKERS)(rng, CLIENT_RECORDS)
        if b"Drain" not in stream:
            return stream


def feed_stream(framer: Framer[Any], stream: bytes, cuts: list[int], outcome: FrameFuzz) -> list[Any]:
    """Feeds a stream cut at these places and notes in ``outcome`` what became of it; returns the records."""
    got: list[Any] = []
    try:
        for begin, end in zip([0, *cuts], [*cuts, len(stream)], strict=True):
            for record in framer.feed(stream[begin:end]):
                got.append(record)
                _use(record, outcome)
            outcome.most_held_bytes = max(outcome.most_held_bytes, framer.held)
    except ProtocolError:
        outcome.refused += 1
    except Exception as error:  # this is what must not happen
        outcome.crash(repr(error), stream)
    if framer.held > min(len(stream), CAP_BYTES + _LENGTH.size):
        outcome.crash(f"{framer.held} bytes held", stream)
    outcome.records += len(got)
    return got


def _use(record: Any, outcome: FrameFuzz) -> None:
    """A valid record can be sent on unchanged, and what it carries packed gives values or the documented error."""
    frame = encode(record)
    (again,) = Framer[Any](type(record)).feed(frame)
    if encode(again) != frame:
        outcome.crash(f"{record!r:.200} does not survive", frame)
    if isinstance(record, Submit):
        try:
            unpack_ids(record.prompt)
            unpack_params(record.params)
        except (RequestError, ValueError):
            outcome.refused_requests += 1


def _cuts(rng: random.Random, length: int) -> list[int]:
    """Where the stream is cut into deliveries: nowhere, somewhere, or after every byte."""
    kind = rng.randrange(4)
    if kind == 0 and length <= 2000:
        return list(range(1, length))
    return sorted(rng.randrange(length + 1) for _ in range(rng.randrange(6))) if kind == 1 else []


def _framed(payload: bytes) -> bytes:
    return _LENGTH.pack(len(payload)) + payload


def _payload(rng: random.Random, kinds: Any) -> bytes:
    return encode(random_record(rng, rng.choice(kinds)))[_LENGTH.size :]


def _valid(rng: random.Random, kinds: Any) -> bytes:
    return _framed(_payload(rng, kinds))


def _other_direction(rng: random.Random, kinds: Any) -> bytes:
    return _valid(rng, ENGINE_RECORDS if kinds is CLIENT_RECORDS else CLIENT_RECORDS)


def _noise(rng: random.Random, kinds: Any) -> bytes:
    return rng.randbytes(rng.choice((1, 3, 4, 5, 20, 300)))


def _framed_noise(rng: random.Random, kinds: Any) -> bytes:
    return _framed(rng.randbytes(rng.choice((0, 1, 2, 20, 300))))


def _flipped(rng: random.Random, kinds: Any) -> bytes:
    payload = bytearray(_payload(rng, kinds))
    for _ in range(rng.choice((1, 1, 2, 8))):
        payload[rng.randrange(len(payload))] ^= 1 << rng.randrange(8)
    return _framed(bytes(payload))


def _edited(rng: random.Random, kinds: Any) -> bytes:
    """Cut short, a piece removed, repeated or replaced by noise, or two records spliced."""
    payload = _payload(rng, kinds)
    begin, end = sorted(rng.randrange(len(payload) + 1) for _ in range(2))
    middle = rng.choice((b"", payload[begin:end] * 2, rng.randbytes(rng.randrange(8))))
    tail = rng.choice((payload[end:], payload[end:], b"", _payload(rng, kinds)[end:]))
    return _framed(payload[:begin] + middle + tail)


def _wrong_length(rng: random.Random, kinds: Any) -> bytes:
    payload = _payload(rng, kinds)
    claims = (0, 1, len(payload) - 1, len(payload) + 1, CAP_BYTES, CAP_BYTES + 1, 2**31, 2**32 - 1)
    return _LENGTH.pack(rng.choice(claims)) + payload


def _claiming(rng: random.Random, kinds: Any) -> bytes:
    """A container or text that claims to be far longer than the frame."""
    payload = _payload(rng, kinds)
    at = rng.randrange(len(payload))
    claim = rng.choice(_CLAIMS) + rng.choice((b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\x00\xff\xff\xff"))
    return _framed(payload[:at] + claim + payload[at + rng.randrange(2) :])


def _deep(rng: random.Random, kinds: Any) -> bytes:
    payload = _payload(rng, kinds)
    at = rng.randrange(len(payload))
    return _framed(payload[:at] + rng.choice(_OPENERS) * rng.choice((10, 200, 2000, 8000)) + payload[at:])


def _wrong_field(rng: random.Random, kinds: Any) -> bytes:
    """A well-formed map, with fields of other types, missing or unknown ones."""
    record: dict[str, Any] = msgspec.msgpack.decode(_payload(rng, kinds))
    for _ in range(rng.choice((1, 1, 2))):
        name = rng.choice([*record, "unknown"])
        if rng.random() < 0.2:
            record.pop(name, None)
        else:
            record[name] = loose_value(rng)
    return _framed(msgspec.msgpack.encode(record))


def _wrong_params(rng: random.Random, kinds: Any) -> bytes:
    """A valid ``Submit`` whose sampling parameters are of any value and type."""
    names = (
        "max_tokens",
        "min_tokens",
        "temperature",
        "top_k",
        "seed",
        "stop",
        "logit_bias",
        "stop_token_ids",
        "top_p",
    )
    params = {name: loose_value(rng) for name in rng.sample(names, rng.randrange(1, 4))}
    submit = Submit(rng.randrange(2**32), rng.randbytes(rng.randrange(9)), msgspec.Raw(msgspec.msgpack.encode(params)))
    return encode(submit)


_MAKERS: tuple[Callable[[random.Random, Any], bytes], ...] = (
    _valid,
    _other_direction,
    _noise,
    _framed_noise,
    _flipped,
    _flipped,
    _edited,
    _edited,
    _wrong_length,
    _claiming,
    _deep,
    _wrong_field,
    _wrong_field,
    _wrong_params,
)
