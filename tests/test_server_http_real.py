"""``jitgraph serve`` over a real engine, by the real ``openai`` package: what a stand-in for the engine cannot show."""

from __future__ import annotations

import json
import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from test_serve_process import Server

HELLO: list[Any] = [{"role": "user", "content": "Say something"}]
TEMPLATE = """{% for tool in tools or [] %}{{ tool | tojson }}{% endfor %}<tool_call> arguments
{% for message in messages %}{{ message.role }}: {{ message.content }}
{% endfor %}"""
SCHEMA = {
    "type": "object",
    "properties": {"count": {"type": "integer", "minimum": 0, "maximum": 99}, "kind": {"enum": ["one", "two"]}},
    "required": ["count", "kind"],
    "additionalProperties": False,
}
TOOL: Any = {"type": "function", "function": {"name": "note", "parameters": SCHEMA, "strict": True}}


@pytest.fixture(scope="module")
def client() -> Iterator[openai.OpenAI]:
    """A client of one server for all tests of this file, which ends without a word."""
    with tempfile.TemporaryDirectory(prefix="jg-") as folder:
        template, runtime = Path(folder) / "template.jinja", Path(folder) / "run"
        template.write_text(TEMPLATE)
        runtime.mkdir()
        words = ("--device", "cpu", "--port", "0", "--max-model-len", "1024", "--api-key", "secret")
        server = Server(runtime, "-m", "jitgraph", "serve", "tiny", *words, "--chat-template", str(template))
        try:
            yield openai.OpenAI(base_url=f"{server.url()}/v1", api_key="secret", max_retries=0)
            os.kill(server.pid, signal.SIGTERM)
            assert server.ended() == 0
        finally:
            server.process.kill()
            server.process.wait()


def said(client: openai.OpenAI, **fields: Any) -> list[str]:
    """The texts of a chat's answers."""
    reply = client.chat.completions.create(**{"model": "tiny", "messages": HELLO, "max_tokens": 12, **fields})
    return [choice.message.content or "" for choice in reply.choices]


def test_seeds(client: openai.OpenAI) -> None:
    [first] = said(client, seed=3, temperature=1.0)
    assert said(client, seed=3, temperature=1.0) == [first]
    three = said(client, seed=3, temperature=1.0, n=3)
    assert three[0] == first and len(set(three)) == 3
    assert said(client, seed=3, temperature=1.0, n=3) == three


def test_shaped_answers(client: openai.OpenAI) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": SCHEMA}}
    [text] = said(client, max_tokens=80, temperature=1.0, seed=1, response_format=form)
    found = json.loads(text)
    assert sorted(found) == ["count", "kind"] and 0 <= found["count"] <= 99 and found["kind"] in ("one", "two")
    choices = ["perhaps", "never (again)"]
    assert said(client, max_tokens=40, extra_body={"structured_outputs": {"choice": choices}})[0] in choices


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "note"}}])
def test_forced_calls_follow_their_schema(client: openai.OpenAI, choice: Any) -> None:
    create = client.chat.completions.create
    reply = create(
        model="tiny", messages=HELLO, tools=[TOOL], tool_choice=choice, parallel_tool_calls=False, max_tokens=200
    )
    [call] = reply.choices[0].message.tool_calls or []
    assert call.type == "function" and call.function.name == "note"
    arguments = json.loads(call.function.arguments)
    assert 0 <= arguments["count"] <= 99 and arguments["kind"] in ("one", "two")


def test_streams_say_what_whole_answers_say_and_stop_where_they_stop(client: openai.OpenAI) -> None:
    fields: Any = {"model": "tiny", "prompt": "Once upon", "max_tokens": 20, "temperature": 0}
    whole = client.completions.create(**fields).choices[0].text
    for more in ({}, {"stop": ["@@@@", whole[5:8]]}, {"stop": [whole[5:8]], "extra_body": {"min_tokens": 20}}):
        text = client.completions.create(**fields, **more).choices[0].text
        stream = client.completions.create(**fields, **more, stream=True)
        assert "".join(chunk.choices[0].text for chunk in stream) == text
        assert text == (whole[:5] if more and "extra_body" not in more else whole)
    included = {"stop": [whole[5:8]], "extra_body": {"include_stop_str_in_output": True}}
    assert client.completions.create(**fields, **included).choices[0].text == whole[:8]


def test_a_prompt_is_scored_as_it_is_generated(client: openai.OpenAI) -> None:
    """What the model said, sent back as a prompt, has the log-probabilities with which it was said."""
    fields: Any = {"model": "tiny", "temperature": 0, "logprobs": 1}
    made = client.completions.create(
        prompt=[300, 301, 302], max_tokens=8, extra_body={"return_token_ids": True}, **fields
    ).choices[0]
    ids = [300, 301, 302, *made.token_ids]  # type: ignore[attr-defined]
    scored = client.completions.create(prompt=ids, max_tokens=0, echo=True, **fields).choices[0].logprobs
    assert scored is not None and made.logprobs is not None
    assert scored.token_logprobs[0] is None  # type: ignore[index]
    assert scored.token_logprobs[3:] == pytest.approx(made.logprobs.token_logprobs, abs=1e-3)  # type: ignore[index]


def test_the_next_turn_finds_what_the_last_one_left(client: openai.OpenAI) -> None:
    long = [*HELLO, {"role": "assistant", "content": "word " * 60}, {"role": "user", "content": "And?"}]
    create, counts = client.chat.completions.create, []
    for _ in range(2):
        usage = create(model="tiny", messages=long, max_tokens=2).usage
        assert usage is not None and usage.prompt_tokens_details is not None
        counts.append((usage.prompt_tokens_details.cached_tokens, usage.prompt_tokens))
    (before, _), (after, tokens) = counts
    assert before < after < tokens and after > tokens - 32


def test_what_is_too_long_or_not_there(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="tiny", prompt=[5] * 1024)
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="gpt-17", prompt="x")
    assert [model.id for model in client.models.list()] == ["tiny"]
    page = httpx.get(str(client.base_url).replace("/v1/", "/"), auth=("anybody", "secret"))
    assert page.status_code == 200 and "<title>jitgraph</title>" in page.text
    assert httpx.get(str(client.base_url).replace("/v1/", "/")).status_code == 401
