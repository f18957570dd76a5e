"""What an engine process and its clients say to each other: msgspec records, one union for each direction.

A conversation: the client says ``Hello``, the engine ``Welcome`` (or ``Goodbye`` with the reason), both with the
version of this file. Before the engine is ready it sends ``StartPhase`` records, then one ``Ready``. From then on the
client sends ``Submit`` and ``Cancel`` under request ids of its own, and gets ``Tokens`` until one carries a finish
reason, or one ``Refused``. ``Beat`` comes at least every ``BEAT_S`` whatever happens; an engine that is silent for long
hangs. Times are ``time.perf_counter_ns``, which on Linux is one clock for all processes of a host.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Annotated, Any

import msgspec

from jitgraph.errors import RequestError
from jitgraph.types import SamplingParams

PROTOCOL = 3
"""Version of these records; both sides must have the same."""
BEAT_S = 0.25
"""Most time between two ``Beat`` records of a live engine that is ready."""
MAX_PARAMS_BYTES = 64 * 1024
"""Largest packed sampling parameters: the longest bias list takes 5 KB, the rest is for stop strings."""
MAX_NAME_CHARS = 256
"""Longest name of a client."""
MAX_DRAIN_S = 86_400.0
"""Longest time a ``Drain`` may grant."""
MAX_TIMEOUT_S = 604_800.0
"""Longest time that a ``Submit`` may give its request."""


class Message(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """Base of all records. The tag is the name of the class."""


# ---------------------------------------------------------------------------------------------------- client to engine


class Hello(Message, frozen=True):
    """First record of a connection."""

    version: int
    name: Annotated[str, msgspec.Meta(max_length=MAX_NAME_CHARS)]
    """Who it is, for the engine's log."""


class Grammar(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the output must look like."""

    kind: str
    """``json_object``, ``json_schema``, ``regex`` or ``lark``."""
    source: str = ""
    """The schema or grammar; empty for ``json_object``."""


class Submit(Message, frozen=True):
    """A request."""

    request_id: int
    """Chosen by the client; not in use by another of its requests."""
    prompt: bytes
    """Token ids, int32, little-endian (``pack_ids``)."""
    params: msgspec.Raw
    """``SamplingParams``, packed (``pack_params``): values out of their range refuse the request, not the client."""
    salt: str = ""
    """Prompts share cached prefixes only with prompts of the same salt. What stands before its first colon names whom a
    client sends this for: each of those has a share of the queue."""
    prompt_logprobs: int | None = None
    """Alternatives to report for each prompt token; None reports nothing."""
    grammar: Grammar | None = None
    timeout_s: float = 0.0
    """Seconds from its arrival at the engine after which it ends as ``Refused`` of kind ``deadline``, whether it waits
    or runs; 0 lets it take its time. Out of range it refuses the request, not the client."""


class Cancel(Message, frozen=True):
    """Ends a request; unknown ids are ignored. Its last ``Tokens`` carries the finish reason ``cancelled``."""

    request_id: int


class AskStats(Message, frozen=True):
    """Asks for ``Stats``."""


class Drain(Message, frozen=True):
    """No new requests from anybody; the engine process ends once the running ones are done, or after ``timeout_s``."""

    timeout_s: Annotated[float, msgspec.Meta(ge=0.0, le=MAX_DRAIN_S)]


FromClient = Hello | Submit | Cancel | AskStats | Drain


# ---------------------------------------------------------------------------------------------------- engine to client


class EngineFacts(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a client must know of the engine and its model."""

    pid: int
    model: str
    folder: str | None
    """The checkpoint's folder, where tokenizer and templates lie; None for a preset."""
    vocab_size: int
    max_model_len: int | None
    """Tokens of prompt and output together; None where the KV cache rolls."""
    max_streams: int
    eos_token_ids: tuple[int, ...]
    default_params: SamplingParams
    device: str
    dtype: str
    fingerprint: str
    """Changes with model, settings, kernels and versions."""
    emulated: bool
    """On the CPU: graphs are emulated and figures mean little."""
    about: dict[str, Any] = {}
    """What ``LLM.describe`` tells of the engine, and a few things that its owner knows besides; plain values."""


class Welcome(Message, frozen=True):
    """The engine's answer to ``Hello``. ``facts`` is None until the engine is ready; ``Ready`` has them then."""

    version: int
    pid: int
    facts: EngineFacts | None = None


class StartPhase(Message, frozen=True):
    """Progress before ready; ``seconds`` and ``mib`` are those of the phase so far, ``mib`` of device memory."""

    phase: str
    done: int
    total: int
    seconds: float
    mib: float


class Ready(Message, frozen=True):
    """The engine takes requests."""

    facts: EngineFacts
    phases_s: dict[str, float]
    """Seconds by phase; their sum is the time from the process's start."""
    phases_mib: dict[str, float]


class WireLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """Log-probabilities of one token; fields as in ``TokenLogprobs``."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


class Tokens(Message, frozen=True):
    """News of one request: the tokens since the last news, mostly one."""

    request_id: int
    token_ids: tuple[int, ...]
    times_ns: tuple[int, ...]
    """When the engine had each token."""
    logprobs: tuple[WireLogprobs, ...] = ()
    """One for each token, if asked for."""
    finish_reason: str | None = None
    """A value of ``FinishReason``; nothing follows."""
    cached_tokens: int = 0
    """With the first token: prompt tokens that the prefix cache had."""
    received_ns: int = 0
    """With the first token: when the engine process had read the request."""
    launched_ns: int = 0
    """With the first token: when its first step was launched."""
    prompt_logprobs: tuple[WireLogprobs | None, ...] | None = None
    """With the first token, if asked for: one for each prompt token, None for the first."""


class Refused(Message, frozen=True):
    """A request that does not run."""

    request_id: int
    kind: str
    """``request``, ``capacity``, ``overloaded``, ``draining``, ``deadline`` or ``internal``."""
    message: str
    retry_after_s: float = 0.0


class Beat(Message, frozen=True):
    """Sign of life, and how busy the engine is."""

    now_ns: int
    running: int
    waiting: int
    free_pages: int
    total_pages: int
    steps: int
    """Steps since ready; a busy engine whose count stands still for much longer than ``longest_s`` hangs."""
    away_s: float = 0.0
    """For how long the engine's thread has been at one thing; 0 where it beats itself. What else this record says is of
    its last own beat then."""
    longest_s: float = 0.0
    """The longest that it has been at one thing and came back, the time before ready included: a step, mostly."""
    draining: bool = False
    """No new requests are taken: the process ends once the running ones are done."""


class Stats(Message, frozen=True):
    """Counters of the engine since ready; numbers, or dicts of numbers by label."""

    values: dict[str, Any]


class Goodbye(Message, frozen=True):
    """The engine closes the connection; ``reason`` is one sentence."""

    reason: str


FromEngine = Welcome | StartPhase | Ready | Tokens | Refused | Beat | Stats | Goodbye


_ENCODER = msgspec.msgpack.Encoder()
_PARAMS: msgspec.msgpack.Decoder[SamplingParams] = msgspec.msgpack.Decoder(SamplingParams, strict=True)


def pack_params(params: SamplingParams) -> msgspec.Raw:
    """Sampling parameters as ``Submit`` carries them.

    Raises:
        RequestError: they are too large, or a stop string is no valid Unicode.
    """
    try:
        packed = _ENCODER.encode(params)
    except UnicodeEncodeError as error:
        raise RequestError(f"each stop string must be valid Unicode: {error}") from error
    _check_size(packed)
    return msgspec.Raw(packed)


def unpack_params(packed: msgspec.Raw) -> SamplingParams:
    """The reverse of ``pack_params``.

    Raises:
        RequestError: not sampling parameters, too large, or a value out of its range.
    """
    _check_size(packed)
    try:
        return _PARAMS.decode(packed)
    except (msgspec.MsgspecError, ValueError, TypeError, OverflowError, RecursionError) as error:
        raise RequestError(f"these are no sampling parameters: {error}") from error


def _check_size(packed: bytes | msgspec.Raw) -> None:
    """Refuses before anything is made of it: a list of millions of entries would keep its reader busy for seconds."""
    size = memoryview(packed).nbytes
    if size > MAX_PARAMS_BYTES:
        raise RequestError(
            f"the sampling parameters take {size} bytes and {MAX_PARAMS_BYTES} are possible: use fewer or shorter "
            f"stop strings"
        )


def pack_ids(ids: Sequence[int]) -> bytes:
    """Token ids as ``Submit`` carries them.

    Raises:
        OverflowError: an id outside int32.
        TypeError: not whole numbers.
    """
    words = array("i", ids)
    if words.itemsize != 4:
        raise TypeError("this platform's C int has no 32 bits")
    return words.tobytes()


def unpack_ids(packed: bytes) -> tuple[int, ...]:
    """The reverse of ``pack_ids``.

    Raises:
        ValueError: not a whole number of ids.
    """
    words = array("i")
    words.frombytes(packed)
    return tuple(words)
