"""Random and mutated requests: whatever comes, the answer is OpenAI's form of it, and never an unplanned 5xx."""

from __future__ import annotations

import copy
import json
import random
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from server_fakes import FakeEngine, Reply, ask, make_site, read_all, served

from jitgraph.server.openai.schema import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest

QUICK = settings(
    max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)
SITE = make_site(FakeEngine(text="ok"), max_body_bytes=200_000)
ROUTES = {
    "/v1/chat/completions": (ChatRequest, {"messages": [{"role": "user", "content": "x"}], "max_tokens": 3}),
    "/v1/completions": (CompletionRequest, {"prompt": "x", "max_tokens": 3}),
    "/tokenize": (TokenizeRequest, {"prompt": "x"}),
    "/detokenize": (DetokenizeRequest, {"tokens": [300]}),
}

NUMBERS = st.one_of(
    st.integers(-3, 40), st.sampled_from([2**31, 2**32, 2**63, 2**64, 10**30, -(2**63)]), st.floats(allow_nan=False)
)
TEXTS = st.one_of(
    st.text(max_size=8), st.sampled_from(["auto", "required", "none", "json_object", "x" * 300, "\x00", "🙂"])
)
SCALARS = st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS)
KEYS = st.one_of(
    st.text(max_size=4),
    st.sampled_from(
        ["role", "content", "type", "text", "function", "name", "parameters", "schema", "json_schema", "5"]
    ),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(KEYS, inner, max_size=4)),
    max_leaves=8,
)


def check(reply: Reply) -> None:
    """What every answer holds to."""
    assert reply.status < 500, reply.body
    assert len(reply.headers["x-request-id"]) == 32
    if reply.status >= 400:
        assert reply.error["param"] is None or isinstance(reply.error["param"], str)
    elif reply.headers["content-type"].startswith("text/event-stream"):
        assert reply.chunks
    else:
        assert reply.json


@pytest.mark.parametrize("path", sorted(ROUTES))
@QUICK
@given(data=st.data())
def test_random_fields(path: str, data: st.DataObject) -> None:
    record, base = ROUTES[path]
    names = st.sampled_from(record.__struct_fields__)
    fields = data.draw(st.dictionaries(st.one_of(names, names, names, KEYS), VALUES, min_size=1, max_size=3))
    check(ask(SITE, path, json.dumps({**base, **fields}).encode()))


FULL: dict[str, Any] = {
    "messages": [
        {"role": "system", "content": "s"},
        {"role": "user", "content": [{"type": "text", "text": "x"}]},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": "{}"}}],
        },
    ],
    "model": "org/fake-model",
    "max_tokens": 3,
    "n": 2,
    "temperature": 0.5,
    "logit_bias": {"5": 1.0},
    "stop": ["a", "b"],
    "stream": True,
    "stream_options": {"include_usage": True},
    "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}}},
    "structured_outputs": {"regex": "a+"},
    "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}],
    "tool_choice": {"type": "function", "function": {"name": "f"}},
    "chat_template_kwargs": {"enable_thinking": True},
    "logprobs": True,
    "top_logprobs": 2,
}
TEMPLATE = (
    "{{ tools | tojson }}{{ enable_thinking }}<tool_call> arguments{% for m in messages %}{{ m.content }}{% endfor %}"
)
TOOLED = make_site(FakeEngine(text="ok", max_model_len=4096), chat_template=TEMPLATE)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in a JSON value."""
    found = [path] if path else []
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        found += places(inner, (*path, key))
    return found


@settings(max_examples=120, deadline=None)
@given(data=st.data())
def test_a_full_request_with_something_wrong_in_it(data: st.DataObject) -> None:
    document = copy.deepcopy(FULL)
    for _ in range(data.draw(st.integers(1, 3))):
        *above, last = data.draw(st.sampled_from(places(document)))
        inner = document
        for key in above:
            inner = inner[key]
        what = data.draw(st.sampled_from(["replace", "drop", "add"]))
        if what == "replace":
            inner[last] = data.draw(VALUES)
        elif what == "drop":
            del inner[last]
        elif isinstance(inner[last], dict):
            inner[last][data.draw(KEYS)] = data.draw(VALUES)
        if not places(document):
            break
    check(ask(TOOLED, "/v1/chat/completions", json.dumps(document).encode()))


@settings(max_examples=300, deadline=None)
@given(seed=st.integers(0, 2**32), count=st.integers(1, 8), path=st.sampled_from(sorted(ROUTES)))
def test_mutated_bytes(seed: int, count: int, path: str) -> None:
    chance = random.Random(seed)
    body = bytearray(json.dumps(FULL if "chat" in path else ROUTES[path][1]).encode())
    for _ in range(count):
        at = chance.randrange(len(body))
        kind = chance.randrange(3)
        if kind == 0:
            body[at] = chance.randrange(256)
        elif kind == 1:
            del body[at : at + chance.randrange(1, 9)]
        else:
            body[at:at] = chance.choice([b'"', b"{", b"[", b"}", b",", b"null", b"1e999", b"\\u0000", b"\xff", b"-"])
        body = body or bytearray(b" ")
    check(ask(TOOLED, path, bytes(body)))


def test_random_bytes_on_the_wire_leave_the_server_whole() -> None:
    chance = random.Random(7)
    good = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 15\r\n\r\n"
    good += b'{"prompt": "x"}'
    with served(FakeEngine(text="ok"), head_timeout_s=5.0) as site:
        for _ in range(150):
            data = bytearray(good)
            for _ in range(chance.randrange(1, 6)):
                at = chance.randrange(len(data))
                data[at : at + chance.randrange(3)] = chance.randbytes(chance.randrange(3))
            with site.connect() as connection:
                connection.sendall(bytes(data))
                connection.shutdown(1)  # what is missing never comes
                answer = read_all(connection)
            assert answer == b"" or answer.startswith(b"HTTP/1.1 ")
            assert not answer.startswith(b"HTTP/1.1 5")
        assert site.post("/v1/completions", {"prompt": "x"}).json()["choices"][0]["text"] == "ok"
