"""Stand-ins shaped like the packages and servers that peer cases drive, for machines where these are not."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

Answer = Callable[[dict[str, Any]], "tuple[int, Any]"]
"""A request's fields to (status, the error's object, or the stream's events)."""


def module(monkeypatch: pytest.MonkeyPatch, name: str, **names: Any) -> None:
    """Makes an importable module of these names, for one test."""
    made = ModuleType(name)
    made.__spec__ = ModuleSpec(name, None)
    vars(made).update(names)
    monkeypatch.setitem(sys.modules, name, made)


# --------------------------------------------------------------------------------------------------------------- vLLM


class FakeAsyncLLM:
    """``vllm.v1.engine.async_llm.AsyncLLM``: answers 7, 8, 9 and so on, two of them in the second message."""

    made: list[FakeAsyncLLM]

    def __init__(self, arguments: Any) -> None:
        self.arguments, self.asked, self.closed = arguments, list[Any](), False

    @classmethod
    def from_engine_args(cls, arguments: Any) -> FakeAsyncLLM:
        cls.made.append(cls(arguments))
        return cls.made[-1]

    async def generate(self, prompt: Any, params: Any, request_id: str) -> Any:
        self.asked.append((prompt, params, request_id))
        left = list(range(7, 7 + params.max_tokens))
        sizes = [1, 2]
        while left:
            count = sizes.pop(0) if sizes else 1
            ids, left = left[:count], left[count:]
            yield SimpleNamespace(
                outputs=[SimpleNamespace(token_ids=ids)], metrics=SimpleNamespace(first_token_latency=0.002)
            )

    def shutdown(self) -> None:
        self.closed = True


def fake_vllm(monkeypatch: pytest.MonkeyPatch) -> type[FakeAsyncLLM]:
    """A ``vllm`` package of the names that the case imports."""
    FakeAsyncLLM.made = []
    keep: Callable[..., Any] = SimpleNamespace
    module(monkeypatch, "vllm", SamplingParams=keep, __version__="0.0")
    module(monkeypatch, "vllm.engine")
    module(monkeypatch, "vllm.engine.arg_utils", AsyncEngineArgs=keep)
    module(monkeypatch, "vllm.sampling_params", RequestOutputKind=SimpleNamespace(DELTA="delta"))
    module(monkeypatch, "vllm.v1")
    module(monkeypatch, "vllm.v1.engine")
    module(monkeypatch, "vllm.v1.engine.async_llm", AsyncLLM=FakeAsyncLLM)
    return FakeAsyncLLM


# -------------------------------------------------------------------------------------------------------- TensorRT-LLM


class FakeTensorRT:
    """``tensorrt_llm.LLM``: messages repeat everything so far, and a closing one follows the last token."""

    made: list[FakeTensorRT]

    def __init__(self, **arguments: Any) -> None:
        self.arguments, self.asked, self.closed = arguments, list[Any](), False
        FakeTensorRT.made.append(self)

    def generate_async(self, ids: list[int], params: Any, streaming: bool) -> Iterator[Any]:
        assert streaming
        self.asked.append((ids, params))
        for count in [*range(1, params.max_tokens + 1), params.max_tokens]:
            yield SimpleNamespace(outputs=[SimpleNamespace(token_ids=list(range(7, 7 + count)))])

    def shutdown(self) -> None:
        self.closed = True


def fake_tensorrt(monkeypatch: pytest.MonkeyPatch) -> type[FakeTensorRT]:
    """A ``tensorrt_llm`` package of the names that the case imports."""
    FakeTensorRT.made = []
    keep: Callable[..., Any] = SimpleNamespace
    module(monkeypatch, "tensorrt_llm", LLM=FakeTensorRT, SamplingParams=keep, __version__="0.0")
    module(monkeypatch, "tensorrt_llm.llmapi", KvCacheConfig=keep)
    return FakeTensorRT


# ------------------------------------------------------------------------------------------------------------- servers


def piece(text: str, ids: Sequence[int] | None = None, **more: Any) -> dict[str, Any]:
    """An event of a completion's stream."""
    choice: dict[str, Any] = {"index": 0, "text": text, "finish_reason": None}
    if ids is not None:
        choice["token_ids"] = list(ids)
    return {"id": "cmpl-1", "object": "text_completion", "choices": [choice], **more}


def usage(prompt: int, completion: int, cached: int = 0) -> dict[str, Any]:
    """The closing event that ``include_usage`` asks for."""
    counts = {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
    return {"choices": [], "usage": {**counts, "prompt_tokens_details": {"cached_tokens": cached}}}


@contextmanager
def completions_server(answer: Answer) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """A server of OpenAI's completions; yields its address and the requests that it was asked."""
    asked: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._whole(200, {"object": "list", "data": [{"id": "served", "object": "model"}]})

        def do_POST(self) -> None:
            fields = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append({**fields, "authorization": self.headers.get("Authorization")})
            status, told = answer(fields)
            if status != 200:
                self._whole(status, {"error": told})
                return
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            for event in told:
                line = b"data: " + (event if isinstance(event, bytes) else json.dumps(event).encode()) + b"\n\n"
                self.wfile.write(b"%x\r\n%s\r\n" % (len(line), line))
                self.wfile.flush()
            self.wfile.write(b"0\r\n\r\n")

        def _whole(self, status: int, document: Any) -> None:
            body = json.dumps(document).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
