"""What clients send, made into requests of the engine: nothing is taken on trust. Engine's thread. No torch."""

from __future__ import annotations

import msgspec

from jitgraph.errors import RequestError
from jitgraph.ipc.messages import MAX_TIMEOUT_S, Submit, unpack_ids, unpack_params
from jitgraph.types import Grammar, Request, SamplingParams

MAX_SALT_CHARS = 1024
_KNOWN_PARAMS = 128
"""Sampling parameters whose packed form is remembered."""
_KNOWN_BYTES = 1024
"""Longer packed forms are not remembered."""
_FIELDS = frozenset(SamplingParams.__dataclass_fields__)
_LOOSE = msgspec.msgpack.Decoder()


class ParamsReader:
    """Unpacks sampling parameters. Mostly they are those of the last requests, and then need no second check."""

    def __init__(self) -> None:
        self._known: dict[bytes, SamplingParams] = {}

    def read(self, packed: msgspec.Raw) -> SamplingParams:
        """The parameters.

        Raises:
            RequestError: a name that this engine does not know, or a value out of its range.
        """
        key = bytes(packed)
        params = self._known.get(key)
        if params is None:
            params = unpack_params(packed)
            unknown = sorted(set(_LOOSE.decode(key)) - _FIELDS, key=str)
            if unknown:
                raise RequestError(f"{str(unknown[0])[:64]!r} is no sampling parameter of this engine: leave it out")
            if len(key) <= _KNOWN_BYTES:
                if len(self._known) >= _KNOWN_PARAMS:
                    del self._known[next(iter(self._known))]
                self._known[key] = params
        return params


class RequestReader:
    """Reads the requests for one model."""

    def __init__(self, max_model_len: int | None) -> None:
        """``max_model_len``: tokens of prompt and output together; None where there is no end."""
        self._limit = max_model_len
        self._params = ParamsReader()

    def read(self, identity: int, record: Submit) -> Request:
        """The request, under the engine's name for it. Ids and sizes are still to be checked against the model.

        Raises:
            RequestError: it cannot be one.
        """
        packed, limit, wanted = record.prompt, self._limit, record.grammar
        if len(packed) % 4:
            raise RequestError(f"a prompt of {len(packed)} bytes holds no whole number of token ids")
        if limit is not None and len(packed) >= 4 * limit:  # refused before it is unpacked
            raise RequestError(
                f"the prompt has {len(packed) // 4} tokens but the context holds {limit} and must leave room for a new "
                "one: shorten the prompt or raise max_model_len"
            )
        if not 0.0 <= record.timeout_s <= MAX_TIMEOUT_S:
            raise RequestError(f"timeout_s must be between 0 and {MAX_TIMEOUT_S:g} seconds, not {record.timeout_s}")
        if len(record.salt) > MAX_SALT_CHARS:
            raise RequestError(f"salt has {len(record.salt)} characters; {MAX_SALT_CHARS} are possible")
        return Request(
            identity,
            unpack_ids(packed),
            self._params.read(record.params),
            record.salt,
            grammar=None if wanted is None else Grammar(wanted.kind, wanted.source),
            prompt_logprobs=record.prompt_logprobs,
        )
