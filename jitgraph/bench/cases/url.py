"""A case that is a server at a URL: vLLM's, TensorRT-LLM's ``trtllm-serve``, or any that speaks OpenAI's completions.

The server was started by somebody else, so its ready time and memory are unknown. Prompts are sent as token ids, the
same that every case gets. TTFT runs from sending the request to the bytes of the first event with a token; so HTTP, the
server's text processing and the network are in it, and every row says *over HTTP*.

Beyond OpenAI's own fields it asks for a full-length answer, for token ids (else the gate can check nothing), and for no
use of earlier prompts' cache; servers name these fields alike. One that refuses a field is asked without it.
"""

from __future__ import annotations

import http.client
import uuid
from collections.abc import Mapping
from typing import Any

from jitgraph.bench.cases.common import Case, CaseUnavailable, Decoded, FirstToken, Paths
from jitgraph.bench.cases.http_stream import ServerError, StreamClient, Streamed
from jitgraph.bench.plan import Plan
from jitgraph.config import bench_api_key
from jitgraph.errors import JitgraphError

HTTP = "http"
REFUSED = (400, 422)
"""Status of a request with a field that a server does not know."""
NOBODY = (OSError, http.client.HTTPException)


def wanted_fields(case: str, tokens: int) -> dict[str, Any]:
    """Fields beyond the plain request, the least missed one last."""
    fields = {
        "ignore_eos": True,
        "min_tokens": tokens,
        "return_token_ids": True,
        "stream_options": {"include_usage": True},
        "cache_salt": uuid.uuid4().hex,  # of this request alone, so nothing is found again
    }
    if case == "tensorrt-llm":
        fields["detokenize"] = False  # its way to ask for token ids
    return fields


class UrlCase:
    """One server."""

    def __init__(self, case: str, url: str) -> None:
        self._case = case
        self._url = url
        self._client: StreamClient | None = None
        self._model = ""
        self._refused: set[str] = set()
        self._tells_ids = False
        self._cached_tokens = 0

    def load(self, plan: Plan) -> None:
        """See ``Case``. Finds the model's name, and which fields the server takes."""
        self._client = StreamClient(self._url, bench_api_key())
        try:
            self._model = self._client.model or self._served_name(self._client)
            probe = self._settle([1, 2, 3], 2)
        except NOBODY as error:
            sentence = f"no server answers at {self._client.place} ({error}): start it, or name another --url"
            raise CaseUnavailable("no server", sentence) from error
        except ServerError as error:
            raise CaseUnavailable("refused by the server", f"{self._client.place}: {error}") from error
        self._tells_ids = all(piece.token_ids is not None for piece in probe.pieces)

    def _served_name(self, client: StreamClient) -> str:
        names = client.models()
        if not names:
            raise CaseUnavailable("no model", f"{client.place} serves no model: name one as {client.place}#NAME")
        return names[0]

    def _settle(self, token_ids: list[int], tokens: int) -> Streamed:
        """Leaves out, one after the other, the fields that the server refuses."""
        while True:
            wanted = [name for name in wanted_fields(self._case, tokens) if name not in self._refused]
            try:
                return self._ask(token_ids, tokens)
            except ServerError as error:
                if error.code not in REFUSED or not wanted:
                    raise
                named = {name for name in wanted if name in error.text}
                self._refused |= named or {wanted[-1]}

    def _ask(self, token_ids: list[int], tokens: int) -> Streamed:
        assert self._client is not None, "the case is not loaded"
        more = {name: v for name, v in wanted_fields(self._case, tokens).items() if name not in self._refused}
        plain = {"model": self._model, "prompt": token_ids, "max_tokens": tokens, "temperature": 0.0}
        answer = self._client.stream({**plain, **more})
        self._check(answer, token_ids)
        return answer

    def _check(self, answer: Streamed, token_ids: list[int]) -> None:
        """After what was timed: a server that read another prompt answered another question."""
        told = answer.usage.get("prompt_tokens")
        if told is not None and told != len(token_ids):
            raise JitgraphError(f"the server read {told} prompt tokens, {len(token_ids)} were sent as ids")
        if not answer.pieces:
            raise JitgraphError("the server's stream had no token")
        cached: Mapping[str, Any] = answer.usage.get("prompt_tokens_details") or {}
        self._cached_tokens += int(cached.get("cached_tokens") or 0)

    def first_token(self, token_ids: list[int]) -> FirstToken:
        """See ``Case``. The server's own figure is not part of the interface."""
        answer = self._ask(token_ids, 1)
        first = answer.pieces[0]
        token_id = first.token_ids[0] if first.token_ids else None
        return FirstToken(token_id, (first.time_ns - answer.start_ns) / 1e6, None)

    def decode(self, token_ids: list[int], tokens: int) -> Decoded:
        """See ``Case``. Where a server does not tell ids, an event counts as a token, and what its usage says beyond
        that came with the last one."""
        answer = self._ask(token_ids, tokens)
        times: list[int] = []
        for piece in answer.pieces:
            times += [piece.time_ns] * (1 if piece.token_ids is None else len(piece.token_ids))
        told = answer.usage.get("completion_tokens")
        if told is not None and not self._tells_ids:
            times += [times[-1]] * (told - len(times))
        return Decoded.from_times(answer.start_ns, times, tokens)

    def paths(self) -> Paths:
        """See ``Case``: it does not tell."""
        return {}

    def counters(self) -> dict[str, int]:
        """See ``Case``: it does not tell."""
        return {}

    def peak_memory_bytes(self) -> int | None:
        """See ``Case``: it is another process, perhaps of another machine."""
        return None

    def describe(self) -> dict[str, Any]:
        """See ``Case``."""
        assert self._client is not None, "the case is not loaded"
        return {
            "engine": "server at a URL",
            "url": self._client.place,
            "served_model": self._model,
            "transport": HTTP,
            "fields_refused": sorted(self._refused),
            "tells_token_ids": self._tells_ids,
            "cached_tokens": self._cached_tokens,
            "emulated": False,
        }

    def attribution(self, token_ids: list[int]) -> dict[str, float]:
        """See ``Case``: it is another process."""
        return {}

    def close(self) -> None:
        """See ``Case``."""
        if self._client is not None:
            self._client.close()


def make(case: str, url: str) -> Case:
    """The case, not loaded yet."""
    return UrlCase(case, url)
