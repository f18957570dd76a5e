"""Large requests: what is refused before any work, and what is done beside the event loop so that others go on."""

from __future__ import annotations

import asyncio
import gc
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from server_fakes import TOKENIZER, FakeEngine, ask, chat, complete, make_site, run

from jitgraph.server.openai import chat as chat_module
from jitgraph.server.openai.decode import decode_raw
from jitgraph.server.openai.errors import ApiError
from jitgraph.server.openai.logprobs import CompletionLogprobWriter
from jitgraph.server.openai.replies import (
    AnswerMessage,
    ChatChoice,
    ChatLogprobs,
    CompletionChoice,
    CompletionLogprobs,
    CompletionReply,
    PromptDetails,
    Tokenized,
    TokenLogprob,
    Usage,
)
from jitgraph.server.openai.sse import json_bytes, json_of_any_length
from jitgraph.server.settings import ServerSettings
from jitgraph.server.texts import Texts
from jitgraph.text.tokenizer import Tokenizer

LONG = "a 1 b 2 c 3 " * 60_000  # two characters a token: much work


async def turns_while(work: Any) -> int:
    """How often the event loop came round while something was awaited."""
    turns = 0

    async def count() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0.001)

    counting = asyncio.ensure_future(count())
    await asyncio.sleep(0.01)
    turns = 0
    await work
    counting.cancel()
    return turns


def test_the_loop_turns_while_a_long_text_is_tokenised() -> None:
    """It takes most of a second, so hundreds of turns; two or three where the interpreter's lock is kept."""
    texts = Texts(TOKENIZER, ServerSettings())
    assert run(turns_while(texts.encode(LONG))) > 25


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads Linux's account of memory")
def test_what_a_long_text_took_is_given_back() -> None:
    def resident_mib() -> float:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20

    texts = Texts(TOKENIZER, ServerSettings())
    run(texts.encode("x" * 100_000))
    gc.collect()
    before = resident_mib()
    for _ in range(3):
        assert len(run(texts.encode(LONG))) > 300_000
    gc.collect()
    assert resident_mib() - before < 60, "about 100 MiB are kept where nothing is given back"


class Heard:
    """Calls that were made, and in which threads."""

    def __init__(self) -> None:
        self.threads: list[int] = []

    def wrap(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.threads.append(threading.get_ident())
            return function(*args, **kwargs)

        return call


@pytest.fixture
def loop_thread() -> int:
    async def here() -> int:
        return threading.get_ident()

    return int(run(here()))


def test_texts_that_cannot_fit_are_refused_before_they_are_tokenised(monkeypatch: pytest.MonkeyPatch) -> None:
    heard = Heard()
    site = make_site(FakeEngine(max_model_len=64))
    complete(site)  # the tokenizer is loaded
    monkeypatch.setattr(Tokenizer, "encode", heard.wrap(Tokenizer.encode))
    for text in (LONG, "x" * (64 * 64 + 1), "字" * 1400):
        for reply, param in ((complete(site, prompt=text), "prompt"), (chat(site, text), "messages")):
            error = reply.error
            assert (reply.status, error["code"], error["param"]) == (400, "context_length_exceeded", param)
            assert error["message"].startswith("This model's maximum context length is 64 tokens, but the text has ")
    assert heard.threads == [] and len(site.engine.asked) == 1


def test_no_text_is_refused_that_fits() -> None:
    pieces = (TOKENIZER.pieces.bytes_of(i, False).decode("utf-8", "ignore") for i in range(2048))
    longest = max(pieces, key=len)
    assert TOKENIZER.bytes_per_token is not None and len(longest) > TOKENIZER.bytes_per_token / 2
    text = longest * 60
    ids = TOKENIZER.encode(text)
    site = make_site(FakeEngine(max_model_len=len(ids) + 1))
    assert complete(site, prompt=text, max_tokens=1).status == 200
    assert complete(site, prompt=text, max_tokens=2).error["code"] == "context_length_exceeded"
    endless = make_site(FakeEngine(max_model_len=None))
    assert complete(endless, prompt="x" * 200_000, max_tokens=1).status == 200


def test_prompts_of_ids_are_measured_before_their_text_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    heard = Heard()
    site = make_site()
    monkeypatch.setattr(Tokenizer, "decode", heard.wrap(Tokenizer.decode))
    reply = complete(site, prompt=[[5] * 10, [5] * 600], echo=True)
    assert reply.error["code"] == "context_length_exceeded" and heard.threads == []
    assert complete(site, prompt=[5] * 10, echo=True).status == 200 and len(heard.threads) == 1


def test_long_texts_of_ids_are_made_beside_the_loop(monkeypatch: pytest.MonkeyPatch, loop_thread: int) -> None:
    heard = Heard()
    site = make_site(FakeEngine(max_model_len=None))
    monkeypatch.setattr(Tokenizer, "decode", heard.wrap(Tokenizer.decode))
    text = complete(site, prompt=[300] * 9_000, echo=True).json["choices"][0]["text"]
    assert text.startswith(TOKENIZER.decode([300] * 9_000))
    assert heard.threads[0] != loop_thread


def test_tokenize_has_a_cap_and_makes_long_answers_beside_the_loop(loop_thread: int) -> None:
    site = make_site(FakeEngine(max_model_len=64), max_tokenize_bytes=20_000, max_body_bytes=2**20)
    for body in ({"prompt": "x" * 20_001}, {"messages": [{"role": "user", "content": "é" * 10_001}]}):
        error = ask(site, "/tokenize", body).error
        assert (error["code"], error["param"]) == ("too_large", next(iter(body)))
        assert "20000 are possible" in error["message"]
    text = "a 1 字 2 " * 1_800  # over the context, which counting is about
    reply = ask(site, "/tokenize", {"prompt": text, "return_token_strs": True}).json
    assert reply["tokens"] == TOKENIZER.encode(text) and reply["count"] == len(reply["tokens"]) > 4096
    own = [TOKENIZER.pieces.bytes_of(i, False).decode("utf-8", "replace") for i in reply["tokens"]]
    assert reply["token_strs"] == own


@pytest.mark.parametrize("stream", [False, True])
def test_reports_on_long_prompts_are_made_beside_the_loop(
    monkeypatch: pytest.MonkeyPatch, loop_thread: int, stream: bool
) -> None:
    heard = Heard()
    site = make_site(FakeEngine(max_model_len=2048))
    monkeypatch.setattr(CompletionLogprobWriter, "add", heard.wrap(CompletionLogprobWriter.add))
    asked = {"echo": True, "logprobs": 5, "max_tokens": 1, "stream": stream}
    reply = complete(site, prompt=[300, 301] * 800, **asked)
    found = reply.chunks[0] if stream else reply.json
    assert len(found["choices"][0]["logprobs"]["tokens"]) in (1600, 1601)
    assert heard.threads and heard.threads[0] != loop_thread
    heard.threads.clear()
    complete(site, prompt=[300, 301], **asked)
    assert heard.threads[0] == loop_thread  # what is short is not worth the way


def test_large_conversations_are_read_beside_the_loop(monkeypatch: pytest.MonkeyPatch, loop_thread: int) -> None:
    heard = Heard()
    monkeypatch.setattr(chat_module, "call_mode", heard.wrap(chat_module.call_mode))
    site = make_site(FakeEngine(max_model_len=None))
    assert chat(site).status == 200 and chat(site, "x" * 200_000).status == 200
    assert heard.threads[0] == loop_thread != heard.threads[1]


# ----------------------------------------------------------------------------------------------------------------- JSON

DOCUMENTS = st.recursive(
    st.none() | st.integers(-5, 5) | st.text('[]{}"\\a', max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text('[{"\\', max_size=2), inner, max_size=3),
    max_leaves=12,
)


def depth_of(value: Any) -> int:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    return 0 if inner is None else 1 + max(map(depth_of, inner), default=0)


@settings(max_examples=150, deadline=None)
@given(value=DOCUMENTS)
def test_nesting_is_measured_without_decoding(value: Any) -> None:
    raw, depth = msgspec.Raw(json.dumps(value).encode()), depth_of(value)
    assert decode_raw(raw, "x", 10_000, max(depth, 1)) == value
    if depth > 1:
        with pytest.raises(ApiError) as caught:
            decode_raw(raw, "x", 10_000, depth - 1)
        assert caught.value.body.code == "too_deep"


def test_json_in_parts_is_the_same_json() -> None:
    words = ["a", "\u2028", 'q"'] * 300
    listed = CompletionLogprobs(
        tokens=words, token_logprobs=[None, -0.5, -1.0] * 300, top_logprobs=[None, {"a": -1.0}] * 450, text_offset=[]
    )
    usage = Usage(
        prompt_tokens=1, completion_tokens=2, total_tokens=3, prompt_tokens_details=PromptDetails(cached_tokens=0)
    )
    choices = [CompletionChoice(index=i, text="x", logprobs=listed, finish_reason="stop") for i in range(3)]
    common = {"id": "1", "created": 1, "model": "m", "system_fingerprint": "f", "usage": usage}
    one = TokenLogprob(token="a", logprob=-1.0, bytes=[97], top_logprobs=[])
    for value in (
        CompletionReply(choices=choices, **common),
        CompletionReply(choices=[], **common),
        ChatChoice(
            index=0,
            message=AnswerMessage(content=None, tool_calls=[]),
            logprobs=ChatLogprobs(content=[one] * 600),
            finish_reason="stop",
            token_ids=list(range(1000)),
        ),
        Tokenized(count=0, max_model_len=None, tokens=[]),
    ):
        assert json_of_any_length(value) == json_bytes(value)
