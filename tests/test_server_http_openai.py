"""The HTTP server as clients know it: the real ``openai`` package, blocking and not, streaming and not."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator

import openai
import pytest
from pydantic import BaseModel
from server_fakes import EOS, MODEL, FakeEngine, Served, ids_of, make_site, served

from jitgraph.server.client_errors import RequestRefused

MESSAGES = [{"role": "user", "content": "Hi"}]
TEXT = "Hello there, friend!"


@pytest.fixture(scope="module")
def site() -> Iterator[Served]:
    with served() as found:
        yield found


def test_chat_whole(site: Served) -> None:
    answer = site.openai().chat.completions.create(model=MODEL, messages=MESSAGES)
    assert answer.object == "chat.completion"
    assert answer.id.startswith("chatcmpl-")
    assert answer.model == MODEL
    assert answer.system_fingerprint == "fp_0123456789"
    assert abs(answer.created - time.time()) < 60
    [choice] = answer.choices
    assert (choice.index, choice.finish_reason, choice.logprobs) == (0, "stop", None)
    assert (choice.message.role, choice.message.content) == ("assistant", TEXT)
    assert choice.message.tool_calls is None
    usage = answer.usage
    assert usage.completion_tokens == len(ids_of(TEXT)) + 1
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert usage.prompt_tokens == len(site.site.engine.asked[-1].ids)
    assert usage.prompt_tokens_details.cached_tokens == 0


def test_chat_stream(site: Served) -> None:
    chunks = list(
        site.openai().chat.completions.create(
            model=MODEL, messages=MESSAGES, stream=True, stream_options={"include_usage": True}
        )
    )
    assert len({chunk.id for chunk in chunks}) == 1
    assert {(chunk.model, chunk.object) for chunk in chunks} == {(MODEL, "chat.completion.chunk")}
    *parts, last = chunks
    assert all(len(chunk.choices) == 1 and chunk.usage is None for chunk in parts)
    assert parts[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in parts) == TEXT
    assert [chunk.choices[0].finish_reason for chunk in parts[-2:]] == [None, "stop"]
    assert last.choices == []
    assert last.usage.completion_tokens == len(ids_of(TEXT)) + 1


def test_the_helper_for_streams_puts_an_answer_together(site: Served) -> None:
    with site.openai().chat.completions.stream(model=MODEL, messages=MESSAGES) as stream:
        texts = [event.delta for event in stream if event.type == "content.delta"]
        final = stream.get_final_completion()
    assert "".join(texts) == TEXT == final.choices[0].message.content
    assert final.choices[0].finish_reason == "stop"


def test_completions_whole_and_stream(site: Served) -> None:
    client = site.openai()
    answer = client.completions.create(model=MODEL, prompt="Once", max_tokens=64)
    assert (answer.object, answer.choices[0].text, answer.choices[0].finish_reason) == ("text_completion", TEXT, "stop")
    assert answer.id.startswith("cmpl-")
    chunks = list(client.completions.create(model=MODEL, prompt="Once", max_tokens=64, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == TEXT
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_async_client(site: Served) -> None:
    async def work() -> list[str]:
        async with site.async_openai() as client:
            whole = await client.chat.completions.create(model=MODEL, messages=MESSAGES)
            stream = await client.chat.completions.create(model=MODEL, messages=MESSAGES, stream=True)
            text = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
            several = await asyncio.gather(
                *(client.completions.create(model=MODEL, prompt=str(i), max_tokens=64) for i in range(8))
            )
            return [whole.choices[0].message.content, text, *(one.choices[0].text for one in several)]

    assert asyncio.run(work()) == [TEXT] * 10


def test_models(site: Served) -> None:
    client = site.openai()
    assert [model.id for model in client.models.list()] == [MODEL]
    found = client.models.retrieve(MODEL)  # a hub id, with a slash in it
    assert (found.id, found.object, found.owned_by) == (MODEL, "model", "jitgraph")
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("org/other")
    assert caught.value.code == "model_not_found"


def test_shaped_answers_parse(site: Served) -> None:
    class City(BaseModel):
        name: str

    site.site.engine.answer = lambda asked: [*ids_of('{"name": "Rome"}'), EOS]
    try:
        answer = site.openai().chat.completions.parse(model=MODEL, messages=MESSAGES, response_format=City)
    finally:
        site.site.engine.answer = lambda asked: [*ids_of(TEXT), EOS]
    assert answer.choices[0].message.parsed == City(name="Rome")
    grammar = site.site.engine.asked[-1].grammar
    assert grammar is not None and grammar.kind == "json_schema" and '"name"' in grammar.source


def test_logprobs(site: Served) -> None:
    answer = site.openai().chat.completions.create(model=MODEL, messages=MESSAGES, logprobs=True, top_logprobs=2)
    tokens = answer.choices[0].logprobs.content
    assert len(tokens) == answer.usage.completion_tokens
    assert tokens[0].token == "H" and bytes(tokens[0].bytes) == b"H" and tokens[0].logprob == -0.5
    assert [top.logprob for top in tokens[0].top_logprobs] == [-0.5, -1.5]


def test_errors_become_the_clients_own() -> None:
    with served(api_keys=("secret",)) as site:
        wrong = site.openai(api_key="other")
        with pytest.raises(openai.AuthenticationError) as caught:
            wrong.chat.completions.create(model=MODEL, messages=MESSAGES)
        assert caught.value.code == "invalid_api_key"
        client = site.openai(api_key="secret")
        assert client.chat.completions.create(model=MODEL, messages=MESSAGES).choices[0].message.content == TEXT
        with pytest.raises(openai.NotFoundError) as missing:
            client.chat.completions.create(model="gpt-4", messages=MESSAGES)
        assert (missing.value.code, missing.value.param) == ("model_not_found", "model")
        with pytest.raises(openai.BadRequestError) as long:
            client.chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=512)
        assert long.value.code == "context_length_exceeded"
        with pytest.raises(openai.BadRequestError) as bad:
            client.chat.completions.create(model=MODEL, messages=MESSAGES, temperature=-1)
        assert (bad.value.param, bad.value.type) == ("temperature", "invalid_request_error")


def test_overload_is_429_and_the_client_tries_again() -> None:
    engine = FakeEngine()
    engine.refuse = RequestRefused("overloaded", "the queue is full", 0.2)
    with served(engine) as site:
        with pytest.raises(openai.RateLimitError) as caught:
            site.openai().chat.completions.create(model=MODEL, messages=MESSAGES, stream=True)
        assert caught.value.response.headers["retry-after"] == "1"
        assert caught.value.code == "rate_limit_exceeded"
        tries = len(engine.asked)
        client = site.openai(max_retries=2)

        async def free_later() -> None:
            await asyncio.sleep(0.1)
            engine.refuse = None

        asyncio.run_coroutine_threadsafe(free_later(), _loop_of(site))
        assert client.chat.completions.create(model=MODEL, messages=MESSAGES).choices[0].message.content == TEXT
        assert len(engine.asked) == tries + 2


def test_an_answer_whose_time_was_over_is_not_asked_for_again() -> None:
    engine = FakeEngine()
    engine.refuse = RequestRefused("deadline", "this request was not done within the 1 s that it was given")
    with served(engine) as site:
        with pytest.raises(openai.UnprocessableEntityError) as caught:
            site.openai(max_retries=2).chat.completions.create(model=MODEL, messages=MESSAGES)
        assert caught.value.code == "deadline_exceeded" and caught.value.type == "timeout_error"
        assert len(engine.asked) == 1


def _loop_of(site: Served) -> asyncio.AbstractEventLoop:
    [server] = site.server.servers
    return server.get_loop()


def test_failures_in_the_middle_of_a_stream_are_raised() -> None:
    engine = FakeEngine()
    engine.die_after = 3
    with served(engine) as site:
        text = []
        with pytest.raises(openai.APIError) as caught:
            for chunk in site.openai().chat.completions.create(model=MODEL, messages=MESSAGES, stream=True):
                text.append(chunk.choices[0].delta.content or "")
    assert "".join(text) == "Hello"
    assert caught.value.code == "engine_lost"
    assert "engine" in caught.value.message


def test_no_engine_is_503_with_retry_after() -> None:
    site = make_site()
    site.backend.client, site.backend.state = None, "restarting"
    with Served(site) as running:
        client = running.openai()
        with pytest.raises(openai.InternalServerError) as caught:
            client.chat.completions.create(model=MODEL, messages=MESSAGES)
        assert caught.value.status_code == 503
        assert caught.value.response.headers["retry-after"] == "7"
        with pytest.raises(openai.InternalServerError):
            client.models.list()
