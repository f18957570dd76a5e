"""``LLM(..., isolated=True)`` and the clients against a real engine process with the tiny model on the CPU."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from jitgraph import LLM, AsyncClient, Client, SamplingParams
from jitgraph.errors import ConfigError, RequestError
from jitgraph.llm_isolated import _connect
from jitgraph.server.client_errors import EngineGone
from jitgraph.server.client_records import nobody_there
from jitgraph.types import FinishReason

TEXT = "The train leaves at nine."
SETTINGS: dict[str, Any] = {
    "max_model_len": 256,
    "prefill_buckets": (8, 32, 64),
    "device": "cpu",
    "prefix_cache": False,
}
PARAMS = [
    SamplingParams(max_tokens=20),
    SamplingParams(max_tokens=20, temperature=0.9, top_k=50, seed=5, logprobs=2),
    SamplingParams(max_tokens=12, temperature=1.0, seed=9, repetition_penalty=1.2, min_tokens=3, logit_bias={7: 2.0}),
]


@pytest.fixture(scope="module")
def apart() -> Iterator[LLM]:
    """The engine process has one thread for its products, as this one: the order of sums may change a token."""
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        with LLM("tiny", isolated=True, **SETTINGS) as llm:
            pid, socket = pid_of(llm), socket_of(llm)
            yield llm
        wait_gone(pid)
        assert not socket.parent.exists(), "nothing is left of it"
    finally:
        os.environ.pop("OMP_NUM_THREADS")
        if before is not None:
            os.environ["OMP_NUM_THREADS"] = before


@pytest.fixture(scope="module")
def here() -> Iterator[LLM]:
    with LLM("tiny", **SETTINGS) as llm:
        yield llm


def socket_of(llm: LLM) -> Path:
    path = llm._client._link._path  # type: ignore[attr-defined]
    assert isinstance(path, Path)
    return path


def pid_of(llm: LLM) -> int:
    return int(llm.describe()["isolated"])


def gone(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return True
    return state == "Z"


def wait_gone(pid: int) -> None:
    for _ in range(500):
        if gone(pid):
            return
        time.sleep(0.02)
    raise AssertionError("the engine process lives on")


@pytest.mark.parametrize("params", PARAMS, ids=["greedy", "sampled", "penalised"])
def test_the_same_as_in_one_process(apart: LLM, here: LLM, params: SamplingParams) -> None:
    prompts = [TEXT, list(range(5, 12)), "Überall 🌸"]
    expected, found = (llm.generate(prompts, params) for llm in (here, apart))
    for one, other in zip(expected, found, strict=True):
        assert (one.token_ids, one.text, one.finish_reason) == (other.token_ids, other.text, other.finish_reason)
        assert one.prompt_token_ids == other.prompt_token_ids
        assert (one.logprobs is None) == (other.logprobs is None)
        for a, b in zip(one.logprobs or (), other.logprobs or (), strict=True):
            assert a.token_id == b.token_id and a.logprob == pytest.approx(b.logprob, abs=1e-4)
        assert other.timings.ttft_ms > 0 and len(other.timings.itl_ms) == len(other.token_ids) - 1
    for llm in (here, apart):
        chunks = list(llm.stream(TEXT, params))
        assert "".join(chunk.text for chunk in chunks) == expected[0].text
        assert [chunk.token_id for chunk in chunks] == list(expected[0].token_ids)
        assert chunks[-1].finish_reason is FinishReason.LENGTH
    stop = expected[0].text[5:8]
    stopping = SamplingParams(max_tokens=40, stop=(stop,))
    if params.greedy:
        assert here.generate(TEXT, stopping)[0].text == apart.generate(TEXT, stopping)[0].text


def test_all_kinds_of_clients_share_one_engine(apart: LLM) -> None:
    """Threads, two blocking clients and an asyncio one at once: each answer is the one it gets alone."""
    params = [SamplingParams(max_tokens=10, temperature=0.9, seed=i) for i in range(6)]
    alone = [apart.generate(TEXT, one)[0].token_ids for one in params]
    pages = apart.stats()["free_pages"]

    async def work() -> list[tuple[int, ...]]:
        async with AsyncClient(socket_of(apart)) as client:
            return [output.token_ids for output in await client.generate([TEXT] * 6, params)]

    with Client(socket_of(apart)) as client, ThreadPoolExecutor(8) as pool:
        others = [pool.submit(client.generate, TEXT, one) for one in params]
        streams = [pool.submit(lambda one=one: [c.token_id for c in apart.stream(TEXT, one)]) for one in params]
        assert asyncio.run(work()) == alone
        assert [future.result(60)[0].token_ids for future in others] == alone
        assert [tuple(future.result(60)) for future in streams] == alone
        assert client.facts.pid == pid_of(apart) and client.facts.model == "tiny"
    assert apart.stats()["free_pages"] == pages


def test_what_is_refused(apart: LLM) -> None:
    with pytest.raises(RequestError, match="token id 2048 is not in the vocabulary of 2048 entries"):
        apart.generate([[5, 2048]])
    with pytest.raises(RequestError, match="token id -1 is not in the vocabulary"):
        apart.generate([[1, 2], [-1], [3]])
    with pytest.raises(RequestError, match="the prompt has 256 tokens but the context holds 256"):
        next(apart.stream([3] * 256))
    with pytest.raises(RequestError, match="the prompt is empty"):
        apart.generate([[]])
    assert apart.generate(TEXT, SamplingParams(max_tokens=3))[0].token_ids


def test_closing_a_stream_frees_its_place(apart: LLM) -> None:
    pages = apart.stats()["free_pages"]
    for how in ("close", "drop", "with"):
        streams = [apart.stream(TEXT, SamplingParams(max_tokens=200)) for _ in range(8)]
        next(streams[0])
        if how == "with":
            with streams[1]:
                next(streams[1])
        while streams:
            if how == "close":
                streams[-1].close()
                assert streams[-1].finish_reason is FinishReason.CANCELLED
            streams.pop()
        gc.collect()
        apart.generate(TEXT, SamplingParams(max_tokens=1))
        for _ in range(500):
            if apart.stats()["free_pages"] == pages:
                break
            time.sleep(0.01)
        assert apart.stats()["free_pages"] == pages


def test_what_it_tells_of_itself(apart: LLM, here: LLM) -> None:
    about, same = apart.describe(), here.describe()
    assert about.pop("isolated") != os.getpid()
    assert about == {name: about[name] if name == "kernels" else value for name, value in same.items()}
    stats = apart.stats()
    assert set(here.stats()) - set(stats) == set()
    assert stats["compiles_after_ready"] == 0 and sum(stats["ready_ms"].values()) > 0
    assert (apart.name, str(apart.device), apart.unsupported_defaults) == ("tiny", "cpu", ())
    assert apart.default_params() == here.default_params() and isinstance(apart, LLM)
    assert apart.tokenizer.encode(TEXT) == here.tokenizer.encode(TEXT)
    for call in (apart.settle, apart.reset_stats, apart.step, lambda: apart._engine, lambda: apart.spec):
        with pytest.raises(ConfigError, match="isolated=False"):
            call()
    assert not hasattr(apart, "spec")


@pytest.mark.parametrize(
    ("arguments", "error", "said"),
    [
        ({"isolated": "yes"}, ConfigError, "isolated must be true or false"),
        ({"isolated": True, "max_streams": 9}, ConfigError, "max_streams must be between 1 and 8"),
        ({"isolated": True, "model": "no-such-model"}, EngineGone, "no existing folder"),
    ],
)
def test_what_cannot_be_started(arguments: dict[str, Any], error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        LLM(**{"model": "tiny", "device": "cpu", **arguments})


class Starting:
    """A process that lives."""

    tail = ""

    def wait(self, timeout_s: float) -> int | None:
        return None


def test_a_socket_that_appears_a_moment_after_the_look(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is looked for again for as long as the process lives; a connection that ends for a reason is another thing."""
    socket = tmp_path / "engine.sock"
    said = [nobody_there(socket), nobody_there(socket), "it cannot read the checkpoint"]

    def connects(*_: Any, **__: Any) -> None:
        socket.touch()
        raise EngineGone(said.pop(0))

    monkeypatch.setattr("jitgraph.llm_isolated.Client", connects)
    with pytest.raises(EngineGone, match="cannot read the checkpoint"):
        _connect(socket, Starting(), None)  # type: ignore[arg-type]
    assert not said


def test_a_subclass_says_that_it_cannot() -> None:
    class Mine(LLM):
        pass

    with pytest.raises(ConfigError, match="not for its subclass Mine"):
        Mine("tiny", isolated=True)


def test_an_owner_that_goes_and_an_engine_that_is_killed() -> None:
    """A stream keeps its engine alive. Killed: who waits gets an error, so does who comes later. Nothing is left behind
    by an owner that forgets to close."""
    llm = LLM("tiny", isolated=True, **SETTINGS)
    pid, socket = pid_of(llm), socket_of(llm)
    stream = llm.stream(TEXT, SamplingParams(max_tokens=8))
    del llm
    gc.collect()
    assert len(list(stream)) == 8, "a stream keeps what it needs"
    llm = stream.keeps  # type: ignore[attr-defined]
    stream = llm.stream(TEXT, SamplingParams(max_tokens=250))
    next(stream)
    threading.Timer(0.1, lambda: os.kill(pid, signal.SIGKILL)).start()
    with pytest.raises(EngineGone):
        list(stream)
    with pytest.raises(EngineGone, match="closed"):
        llm.generate(TEXT)
    wait_gone(pid)
    del llm, stream
    gc.collect()
    assert not socket.parent.exists()


def test_clients_load_no_torch() -> None:
    code = "import sys; from jitgraph import Client, AsyncClient; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
