"""What a request must be, and what becomes of it inside the engine. Pure Python; engine's thread."""

from __future__ import annotations

import random
import secrets

from jitgraph.engine.scheduler import Sequence
from jitgraph.engine.sizing import Sizing
from jitgraph.errors import CapacityError, RequestError
from jitgraph.types import MAX_STOP_TOKEN_IDS, Request, SamplingParams

_NO_IDS: frozenset[int] = frozenset()


class Intake:
    """Checks requests against one engine's model and cache."""

    def __init__(self, vocabulary: int, sizing: Sizing, pages: int, eos: frozenset[int]) -> None:
        self._vocabulary = vocabulary
        self._sizing = sizing
        self._pages = pages
        self._eos = eos
        self._fresh = random.Random(secrets.randbits(128))

    @property
    def eos(self) -> frozenset[int]:
        """The model's EOS ids."""
        return self._eos

    def validate(self, request: Request) -> None:
        """Checks a request against the model and the cache.

        Raises:
            RequestError: empty prompt, ids out of the vocabulary, prompt over the context, too many stop ids.
            CapacityError: it can never fit into the KV cache; the message has the budget that would do.
        """
        ids, vocabulary, limit = request.prompt_token_ids, self._vocabulary, self._sizing.max_model_len
        if not ids:
            raise RequestError("the prompt is empty: give at least one token")
        if min(ids) < 0 or max(ids) >= vocabulary:
            wrong = next(i for i in ids if not 0 <= i < vocabulary)
            raise RequestError(
                f"token id {wrong} is not in the vocabulary of {vocabulary} entries (0 to {vocabulary - 1})"
            )
        if len(ids) >= limit:
            raise RequestError(
                f"the prompt has {len(ids)} tokens but the context holds {limit} and must leave room for a new one: "
                "shorten the prompt or raise max_model_len"
            )
        params = request.params
        if params.stop_token_ids or params.logit_bias or len(self._eos) > MAX_STOP_TOKEN_IDS:
            self._validate_ids(params)
        needed = self._sizing.pages_for(self.max_length(request))
        if needed > self._pages:
            raise CapacityError(
                f"the request needs {needed} KV pages for {self.max_length(request)} tokens but the cache has "
                f"{self._pages}: set kv_cache_memory to at least {(needed + 1) * self._sizing.page_bytes} bytes, "
                "or lower max_tokens"
            )

    def _validate_ids(self, params: SamplingParams) -> None:
        """The ids that sampling parameters name."""
        vocabulary, stop_ids = self._vocabulary, self.stop_ids(params)
        if len(stop_ids) > MAX_STOP_TOKEN_IDS:
            raise RequestError(
                f"{len(stop_ids)} stop ids (with the model's EOS ids) are more than the {MAX_STOP_TOKEN_IDS} possible"
            )
        for name, ids in (
            ("stop", params.stop_token_ids),
            ("logit_bias", tuple(token for token, _ in params.bias_entries)),
        ):
            wrong = [i for i in ids if i >= vocabulary]
            if wrong:
                raise RequestError(f"{name} token id {wrong[0]} is not in the vocabulary of {vocabulary} entries")

    def max_length(self, request: Request) -> int:
        """Tokens of prompt and output together at which a request ends."""
        return min(len(request.prompt_token_ids) + request.params.max_tokens, self._sizing.max_model_len)

    def stop_ids(self, params: SamplingParams) -> frozenset[int]:
        """EOS ids and the request's own stop ids."""
        eos = _NO_IDS if params.ignore_eos else self._eos
        return eos.union(params.stop_token_ids) if params.stop_token_ids else eos

    def sequence(self, request: Request) -> Sequence:
        """A valid request as the scheduler knows it."""
        max_length = self.max_length(request)
        stop_ids = self.stop_ids(request.params)
        return Sequence(request, max_length, stop_ids, self._sizing.pages_for(max_length))

    def seed(self, params: SamplingParams) -> int:
        """The request's own seed, or a fresh one where there is anything to draw."""
        if params.seed is not None:
            return params.seed
        return 0 if params.coldest else self._fresh.getrandbits(64)
