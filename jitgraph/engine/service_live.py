"""A request of a client on its way through the engine process, and its news as the client reads them. No torch."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

from jitgraph.engine.service_client import Client
from jitgraph.ipc.messages import Tokens, WireLogprobs
from jitgraph.types import TokenChunk, TokenLogprobs


@dataclass(eq=False)
class Live:
    """A request on its way."""

    __slots__ = ("client", "identity", "launched_ns", "party", "received_ns", "request_id", "told")
    client: Client
    request_id: int
    """The client's name for it."""
    identity: int
    """The engine's."""
    party: Hashable
    """Whose share of the queue it takes."""
    received_ns: int
    launched_ns: int
    """0 until its first step has been launched."""
    told: bool
    """Whether its client has had its first token."""


def party_of(client: Client, salt: str) -> Hashable:
    """Whose share of the queue a request takes: its connection's, or, where a front-end sends for many, of whoever the
    beginning of the salt names (see ``Submit.salt``)."""
    return client, salt.partition(":")[0]


def news_of(live: Live, chunk: TokenChunk) -> Tokens:
    """A chunk as its client reads it."""
    token, reason, logprobs = chunk.token_id, chunk.finish_reason, chunk.logprobs
    value = None if reason is None else reason.value
    if token is None:
        return Tokens(live.request_id, (), (), finish_reason=value)
    wire = () if logprobs is None else (_wire(logprobs),)
    if live.told:
        return Tokens(live.request_id, (token,), (chunk.time_ns,), wire, value)
    prompt = chunk.prompt_logprobs
    return Tokens(
        live.request_id,
        (token,),
        (chunk.time_ns,),
        wire,
        value,
        chunk.cached_tokens,
        live.received_ns,
        live.launched_ns,
        None if prompt is None else tuple(None if one is None else _wire(one) for one in prompt),
    )


def _wire(logprobs: TokenLogprobs) -> WireLogprobs:
    return WireLogprobs(logprobs.token_id, logprobs.logprob, logprobs.top)
