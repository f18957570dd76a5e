"""Requests with known answers: worked out by ``LLM`` alone, one by one, and asked for over HTTP in all conditions."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass, field
from typing import Any

import httpx

from jitgraph.types import SamplingParams
from reliability_parts.served import as_json

CONTEXT_TOKENS = 2048
PROBE_IDS = range(5, 25)
"""Prompt of the small request that is asked again and again."""
_WORDS = ("the", " river", " 42", "é", " 漢字", "🙂", " over", "\n", " graph", " and", " token")


@dataclass(frozen=True)
class Known:
    """A request, and the only right answer to it."""

    prompt: str | list[int]
    params: SamplingParams
    text: str
    finish_reason: str

    def body(self, model: str, stream: bool) -> dict[str, Any]:
        """The request as ``/v1/completions`` takes it."""
        params = self.params
        body: dict[str, Any] = {"model": model, "prompt": self.prompt, "stream": stream}
        body |= {"max_tokens": params.max_tokens, "temperature": params.temperature, "top_p": params.top_p}
        return body if params.seed is None else {**body, "seed": params.seed}


def known_answers(model: str, weights: str, device: str, count: int, seed: int = 0) -> tuple[Known, list[Known]]:
    """The probe, and that many requests of many lengths, greedy and seeded ones, with ``LLM``'s answers."""
    from jitgraph import LLM

    rng = random.Random(seed)
    settings = {"device": device, "batch_invariant": True, "max_streams": 1, "max_model_len": CONTEXT_TOKENS}
    llm = LLM(model, weights=weights, **settings)
    vocabulary = llm.spec.vocab_size

    def known(prompt: str | list[int], params: SamplingParams) -> Known:
        output = llm.generate([prompt], params)[0]
        return Known(prompt, params, output.text, output.finish_reason.value)

    found, probe = [], known(list(PROBE_IDS), SamplingParams(max_tokens=2))
    for number in range(count):
        length = rng.choice((1, 3, 8, 20, 20, 60, 150, 400))
        prompt: str | list[int] = [rng.randrange(3, vocabulary) for _ in range(length)]
        if number % 3 == 0:
            prompt = "".join(rng.choice(_WORDS) for _ in range(length))
        tokens = rng.choice((1, 8, 16, 32, 64))
        params = SamplingParams(max_tokens=tokens)
        if number % 2:
            params = SamplingParams(max_tokens=tokens, temperature=0.8, top_p=0.9, seed=rng.randrange(2**31))
        found.append(known(prompt, params))
    llm.close()
    return probe, found


@dataclass
class Outcome:
    """What became of one request over HTTP."""

    status: int = 0
    text: str = ""
    finish_reason: str | None = None
    error: dict[str, Any] | None = None
    """What the server said went wrong, in a status or in mid-stream."""
    done: bool = False
    """The stream ended as streams must."""
    retry_after_s: float | None = None
    ended_s: float = 0.0
    """``time.monotonic`` when the last of it came."""
    ttft_s: float | None = None
    pieces: list[str] = field(default_factory=list)

    @property
    def complete(self) -> bool:
        """It claims to be a whole answer."""
        return self.status == 200 and self.error is None and self.done

    def right(self, known: Known) -> bool:
        """Whether it is this answer."""
        return (self.text, self.finish_reason) == (known.text, known.finish_reason)

    @property
    def well_formed_error(self) -> bool:
        """An error that clients understand."""
        return self.error is not None and set(self.error) == {"message", "type", "param", "code"}


async def ask(client: httpx.AsyncClient, body: dict[str, Any]) -> Outcome:
    """Asks ``/v1/completions`` and reads to the end; what the connection itself does wrong is raised."""
    outcome, begun_s = Outcome(), time.monotonic()
    async with client.stream("POST", "/v1/completions", json=body) as response:
        outcome.status = response.status_code
        retry = response.headers.get("retry-after")
        outcome.retry_after_s = None if retry is None else float(retry)
        if response.status_code == 200 and body["stream"]:
            async for line in response.aiter_lines():
                _take(outcome, line, begun_s)
        else:
            document = (await response.aread(), response.json())[1]
            outcome.error = document.get("error")
            for choice in document.get("choices", ()):
                outcome.text, outcome.finish_reason = choice["text"], choice["finish_reason"]
                outcome.done = True
    outcome.ended_s = time.monotonic()
    return outcome


def _take(outcome: Outcome, line: str, begun_s: float) -> None:
    outcome.done |= line == "data: [DONE]"
    event = as_json(line)
    if event is None:
        return
    if "error" in event:
        outcome.error = event["error"]
    for choice in event.get("choices", ()):
        if outcome.ttft_s is None:
            outcome.ttft_s = time.monotonic() - begun_s
        outcome.pieces.append(choice["text"])
        outcome.text += choice["text"]
        outcome.finish_reason = choice["finish_reason"] or outcome.finish_reason
