"""``jitgraph serve`` over a real engine, by the real ``openai`` package: what a stand-in for the engine cannot show."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from server_fakes import http_bytes, read_all
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
        words = (
            "--device",
            "cpu",
            "--port",
            "0",
            "--max-model-len",
            "1024",
            "--api-key",
            "secret",
            "--max-queued",
            "4",
        )
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


# ------------------------------------------------------------------------------------ each field that steers, in effect

WILD = {"temperature": 2.0, "max_tokens": 24}


def ids(client: openai.OpenAI, **fields: Any) -> list[int]:
    """The tokens of a completion."""
    more = {"return_token_ids": True, "ignore_eos": True, **fields.pop("extra_body", {})}
    reply = client.completions.create(model="tiny", prompt=[300, 301, 302], extra_body=more, **fields)
    return list(reply.choices[0].token_ids)  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def likeliest(client: openai.OpenAI) -> list[int]:
    """What the model says where nothing is left to chance."""
    return ids(client, temperature=0, max_tokens=24)


@pytest.mark.parametrize("filtered", [{"top_p": 1e-6}, {"extra_body": {"top_k": 1}}, {"extra_body": {"min_p": 1.0}}])
def test_filters_leave_the_likeliest_token(client: openai.OpenAI, likeliest: list[int], filtered: Any) -> None:
    assert ids(client, seed=1, **WILD) != likeliest
    assert ids(client, seed=1, **WILD, **filtered) == likeliest


def test_filters_that_are_off_change_nothing(client: openai.OpenAI) -> None:
    free = ids(client, seed=1, **WILD)
    for off in (
        {"top_p": 1.0},
        {"extra_body": {"top_k": 0}},
        {"extra_body": {"top_k": -1}},
        {"extra_body": {"min_p": 0}},
    ):
        assert ids(client, seed=1, **WILD, **off) == free  # type: ignore[arg-type]


def test_penalties_keep_tokens_from_coming_again(client: openai.OpenAI) -> None:
    """A bias makes one token come for ever; each penalty ends that."""
    liked = {"temperature": 0, "max_tokens": 24, "logit_bias": {"700": 8, "701": 7.5, "702": 7}}
    plain = ids(client, **liked)
    assert len(set(plain)) < 6
    for penalty in ("presence_penalty", "frequency_penalty"):
        assert len(set(ids(client, **liked, **{penalty: 2.0}))) > len(set(plain)), penalty
    free = {"temperature": 0, "max_tokens": 24}
    again, never = (ids(client, **free, extra_body={"repetition_penalty": factor}) for factor in (0.01, 10.0))
    assert len(set(again)) < 6 and len(set(never)) == 24 and not {300, 301, 302} & set(never)


def test_biases_force_and_forbid(client: openai.OpenAI, likeliest: list[int]) -> None:
    assert ids(client, temperature=0, max_tokens=5, logit_bias={"777": 100}) == [777] * 5
    assert likeliest[0] not in ids(client, temperature=0, max_tokens=24, logit_bias={str(likeliest[0]): -100})


def test_stop_token_ids_end_the_answer(client: openai.OpenAI, likeliest: list[int]) -> None:
    stop = likeliest[9]
    first = likeliest.index(stop)
    reply = client.completions.create(
        model="tiny",
        prompt=[300, 301, 302],
        temperature=0,
        max_tokens=24,
        extra_body={"stop_token_ids": [stop], "return_token_ids": True},
    )
    [choice] = reply.choices
    assert choice.token_ids[: first + 1] == likeliest[: first + 1]  # type: ignore[attr-defined]
    assert (choice.finish_reason, len(choice.token_ids)) == ("stop", first + 1)  # type: ignore[attr-defined]


# --------------------------------------------------------------------------------------------- what goes over the wire


def scrape(client: openai.OpenAI) -> dict[str, float]:
    """Every sample of a raw scrape, by its name with labels."""
    url = str(client.base_url).replace("/v1/", "/metrics")
    text = httpx.get(url, headers={"Authorization": "Bearer secret"}).raise_for_status().text
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    odd = [line for line in lines if not re.fullmatch(r'jitgraph:[a-z0-9_]+\{.*model_name="tiny".*\} \S+', line)]
    assert lines and odd == []
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}


def of(samples: dict[str, float], name: str) -> float:
    return samples[f'jitgraph:{name}{{model_name="tiny"}}']


def raw(client: openai.OpenAI, path: str, document: Any, *headers: str) -> socket.socket:
    """A request over a plain connection, sent and not read yet."""
    connection = socket.create_connection((client.base_url.host, client.base_url.port), timeout=20)
    connection.sendall(http_bytes(path, document, "Authorization: Bearer secret", "Connection: close", *headers))
    return connection


def until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not true():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)


ENDLESS: Any = {"model": "tiny", "prompt": "x", "max_tokens": 900, "stream": True}


def test_a_stream_that_is_closed_early_ends_at_the_engine(client: openai.OpenAI) -> None:
    before = scrape(client)
    aborted = 'jitgraph:request_success_total{finished_reason="abort",model_name="tiny"}'
    stream = client.completions.create(**ENDLESS, extra_body={"ignore_eos": True})
    assert next(iter(stream)).choices
    stream.close()
    with client.completions.create(**ENDLESS, n=2, extra_body={"ignore_eos": True}) as two:
        for _, _ in zip(range(4), two, strict=False):
            pass
    until(lambda: of(scrape(client), "num_requests_running") == 0)
    after = scrape(client)
    assert after[aborted] - before[aborted] == 3
    assert of(after, "generation_tokens_total") - of(before, "generation_tokens_total") < 900


def test_metrics_while_streams_run(client: openai.OpenAI) -> None:
    before = scrape(client)
    streams = [raw(client, "/v1/completions", {**ENDLESS, "ignore_eos": True}) for _ in range(3)]
    try:
        until(lambda: of(scrape(client), "num_requests_running") == 3)
        during = scrape(client)
        assert of(during, "engine_up") == 1 and 0 < of(during, "kv_cache_usage_perc") <= 1
        until(lambda: of(scrape(client), "engine_steps_total") > of(during, "engine_steps_total"))
        assert of(during, "time_to_first_token_seconds_count") == of(before, "time_to_first_token_seconds_count")
    finally:
        for one in streams:
            one.close()
    until(
        lambda: (
            of(scrape(client), "time_to_first_token_seconds_count")
            == of(before, "time_to_first_token_seconds_count") + 3
        )
    )
    after = scrape(client)
    edges = [value for name, value in after.items() if name.startswith("jitgraph:time_to_first_token_seconds_bucket")]
    assert edges == sorted(edges) and edges[-1] == of(after, "time_to_first_token_seconds_count")
    assert 'jitgraph:time_to_first_token_seconds_bucket{le="0.00025",model_name="tiny"}' in after
    assert all(after[name] >= value for name, value in before.items() if "_total" in name or "_bucket" in name)


def test_a_full_queue_is_a_429_on_the_wire(client: openai.OpenAI) -> None:
    """Eight run and four wait; who comes then is sent away at once, and nothing of the others is lost."""
    body = {**ENDLESS, "ignore_eos": True, "stream": False, "max_tokens": 150}
    connections = [raw(client, "/v1/completions", body) for _ in range(18)]
    statuses = []
    for connection in connections:
        with connection:
            head, _, found = read_all(connection).partition(b"\r\n\r\n")
        statuses.append(int(head.split()[1]))
        if statuses[-1] == 200:
            assert json.loads(found)["usage"]["completion_tokens"] == 150
            continue
        assert re.search(rb"\r\nretry-after: [1-9][0-9]*(\r\n|$)", head)
        error = json.loads(found)["error"]
        assert sorted(error) == ["code", "message", "param", "type"] and error["code"] == "rate_limit_exceeded"
    assert set(statuses) == {200, 429} and statuses.count(200) >= 12


def test_events_byte_by_byte(client: openai.OpenAI) -> None:
    """The frames as a strict reader takes them: UTF-8 whole in every event, a choice or usage in every chunk."""
    body = {
        **{"model": "tiny", "messages": HELLO, "stream": True, "max_tokens": 40, "temperature": 1.5, "seed": 4},
        **{"stream_options": {"include_usage": True}, "ignore_eos": True},
    }
    with raw(client, "/v1/chat/completions", body) as connection:
        head, _, chunked = read_all(connection).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 OK") and b"content-type: text/event-stream; charset=utf-8" in head
    assert b"transfer-encoding: chunked" in head and b"cache-control: no-cache" in head
    parts = []
    while chunked:
        size, _, rest = chunked.partition(b"\r\n")
        parts.append(rest[: int(size, 16)])
        assert rest[int(size, 16) :][:2] == b"\r\n"
        chunked = rest[int(size, 16) + 2 :]
    assert parts.pop() == b"" and all(part.endswith(b"\n\n") for part in parts)  # events are never cut
    *events, done = [event for part in parts for event in part.decode().split("\n\n")[:-1]]
    assert done == "data: [DONE]" and all(event.startswith("data: {") for event in events)
    *chunks, usage = [json.loads(event.removeprefix("data: ")) for event in events]
    assert usage["choices"] == [] and usage["usage"]["completion_tokens"] == 40
    assert len({chunk["id"] for chunk in chunks} | {usage["id"]}) == 1
    for chunk in chunks:
        assert chunk["model"] == "tiny" and chunk["usage"] is None and chunk["object"] == "chat.completion.chunk"
        assert [choice["index"] for choice in chunk["choices"]] == [0]
    assert chunks[0]["choices"][0]["delta"]["role"] == "assistant" and chunks[0]["choices"][0]["delta"]["content"] == ""
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"
    text = "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks)
    more = {"temperature": 1.5, "seed": 4, "extra_body": {"ignore_eos": True}}
    assert [text] == said(client, max_tokens=40, **more)


def test_stop_strings_across_tokens_on_the_wire(client: openai.OpenAI) -> None:
    """A stop string that begins in one token and ends in another shows in no event, and what came before does."""
    fields = {"model": "tiny", "prompt": "Once upon", "max_tokens": 40, "temperature": 0, "ignore_eos": True}
    with raw(client, "/v1/completions", fields) as connection:
        whole = json.loads(read_all(connection).partition(b"\r\n\r\n")[2])["choices"][0]["text"]
    for begin in range(4, min(len(whole) - 6, 24), 5):
        stop = whole[begin : begin + 5]
        with raw(client, "/v1/completions", {**fields, "stop": [stop, "never there"], "stream": True}) as connection:
            data = read_all(connection).partition(b"\r\n\r\n")[2]
        events = [json.loads(found) for found in re.findall(rb"data: (\{.*\})\n\n", data)]
        shown = "".join(event["choices"][0]["text"] for event in events)
        assert shown == whole[: whole.index(stop)] and events[-1]["choices"][0]["finish_reason"] == "stop"
