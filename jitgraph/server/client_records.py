"""What the asyncio client and the blocking one do alike with records: the greeting, checks, frames of requests.

No torch, no state; any thread.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from jitgraph.errors import ConfigError, RequestError
from jitgraph.ipc.frames import ProtocolError, encode
from jitgraph.ipc.messages import (
    MAX_NAME_CHARS,
    PROTOCOL,
    Grammar,
    Hello,
    Ready,
    Submit,
    Tokens,
    Welcome,
    pack_ids,
    pack_params,
)
from jitgraph.ipc.sockets import MAX_PATH_BYTES, PeerGone
from jitgraph.types import FinishReason, SamplingParams

FINISH_REASONS = {reason.value: reason for reason in FinishReason}
CLOSED = "the engine process has closed the connection without a word: it crashed or was killed, see its output"
"""One that ends in any other way says goodbye first."""


def hello(name: str) -> bytes:
    """The first frame of a connection; of a name, as much as goes into it."""
    process = f" (process {os.getpid()})"
    return encode(Hello(PROTOCOL, name[: MAX_NAME_CHARS - len(process)] + process))


def welcomed(record: Welcome) -> Ready | None:
    """What an engine that was ready before says about itself; None while it starts.

    Raises:
        ConfigError: it speaks another version of the protocol.
    """
    if record.version != PROTOCOL:
        raise ConfigError(
            f"the engine process speaks version {record.version} of the protocol and this program version {PROTOCOL}: "
            "run both from the same installation"
        )
    return None if record.facts is None else Ready(record.facts, {}, {})


def check_tokens(record: Tokens) -> None:
    """A record whose parts belong together.

    Raises:
        ProtocolError: they do not.
    """
    count = len(record.token_ids)
    if len(record.times_ns) != count or len(record.logprobs) not in (0, count):
        raise ProtocolError("a record whose tokens, times and log-probabilities are not of one length")
    if count and min(record.token_ids) < 0:
        raise ProtocolError(f"a token id below zero: {min(record.token_ids)}")
    if record.finish_reason is not None and record.finish_reason not in FINISH_REASONS:
        raise ProtocolError(f"a finish reason that nobody knows: {record.finish_reason!r}")


def submit_frame(
    request_id: int,
    ids: Sequence[int],
    params: SamplingParams,
    salt: str = "",
    prompt_logprobs: int | None = None,
    grammar: Grammar | None = None,
    timeout_s: float = 0.0,
) -> bytes:
    """A request as it is sent.

    Raises:
        RequestError: ids that are no 32-bit numbers, or too many for a frame.
    """
    try:
        packed = pack_ids(ids)
        return encode(Submit(request_id, packed, pack_params(params), salt, prompt_logprobs, grammar, timeout_s))
    except (OverflowError, TypeError):
        raise RequestError("a prompt of token ids must be whole numbers from 0 up, below 2**31") from None
    except ProtocolError as error:
        raise RequestError(f"the prompt is too long to be sent: {error}") from None


def loss(error: ProtocolError) -> str:
    """Why a connection has ended, as its user reads it."""
    return CLOSED if isinstance(error, PeerGone) else f"the engine process does not keep to the protocol: {error}"


def check_path(path: Path) -> None:
    """A path that a Unix socket can have.

    Raises:
        ConfigError: it is too long.
    """
    if len(os.fsencode(path)) > MAX_PATH_BYTES:
        raise ConfigError(f"the socket's path must be at most {MAX_PATH_BYTES} bytes long: {path}")


def nobody_there(path: Path) -> str:
    """Why there is no connection, and what to do."""
    return f"no engine listens at {path}: start one with `jitgraph engine MODEL --socket {path}`"
