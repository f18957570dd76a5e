"""The offline API as a user meets it: texts, streams, stops, seeds, log-probabilities, queues and refusals."""

from __future__ import annotations

import gc
import json
import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from jitgraph import LLM, SamplingParams
from jitgraph.errors import CapacityError, ConfigError, DeviceError, JitgraphError, RequestError
from jitgraph.model.export import export_model
from jitgraph.stream import Stream
from jitgraph.types import FinishReason

TEXT = "The train leaves at nine."


@pytest.fixture(scope="module")
def llm(device: torch.device) -> Iterator[LLM]:
    with LLM("tiny", max_model_len=256, prefill_buckets=(8, 32, 64), device=str(device)) as llm:
        yield llm


def test_text_and_ids_give_the_same(llm: LLM) -> None:
    ids = llm.tokenizer.encode(TEXT)
    params = SamplingParams(max_tokens=12)
    text, numbers = llm.generate([TEXT, ids], params)
    assert text.token_ids == numbers.token_ids and text.text == numbers.text
    assert text.prompt_token_ids == tuple(ids)
    assert len(text.token_ids) == 12 and text.finish_reason is FinishReason.LENGTH
    assert llm.generate(ids, params)[0].token_ids == text.token_ids, "a bare list of ids is one prompt"
    assert llm.generate(TEXT, params)[0].token_ids == text.token_ids, "so is a bare text"


def test_stream_equals_generate(llm: LLM) -> None:
    params = SamplingParams(max_tokens=20, temperature=0.8, seed=4)
    whole = llm.generate(TEXT, params)[0]
    chunks = list(llm.stream(TEXT, params))
    assert tuple(chunk.token_id for chunk in chunks) == whole.token_ids
    assert "".join(chunk.text for chunk in chunks) == whole.text
    assert [chunk.finish_reason for chunk in chunks] == [None] * 19 + [FinishReason.LENGTH]


def test_timings(llm: LLM) -> None:
    timings = llm.generate(TEXT, SamplingParams(max_tokens=5))[0].timings
    assert timings.ttft_ms > 0 and len(timings.itl_ms) == 4
    assert timings.latency_ms == pytest.approx(timings.ttft_ms + sum(timings.itl_ms))
    assert timings.tpot_ms == pytest.approx(sum(timings.itl_ms) / 4)


def test_more_prompts_than_streams(llm: LLM) -> None:
    """Twenty prompts of unequal lengths on eight streams: each gets what it gets alone."""
    prompts = [f"{TEXT} Number {'x' * i}" for i in range(20)]
    params = [SamplingParams(max_tokens=3 + i % 7) for i in range(20)]
    together = llm.generate(prompts, params)
    for prompt, one, output in zip(prompts, params, together, strict=True):
        assert len(output.token_ids) == one.max_tokens
        assert llm.generate(prompt, one)[0].token_ids == output.token_ids
    assert llm.stats()["free_pages"] == llm._engine.pages.total


def test_seed_fixes_the_text_in_any_company(llm: LLM) -> None:
    params = SamplingParams(max_tokens=16, temperature=1.0, top_k=50, seed=11)
    alone = llm.generate(TEXT, params)[0].token_ids
    others = [SamplingParams(max_tokens=16, temperature=1.3, seed=i) for i in range(5)]
    mixed = llm.generate(["a", "b c", TEXT, "d", "e f g", "h"], [*others[:2], params, *others[2:]])
    assert mixed[2].token_ids == alone
    other = llm.generate(TEXT, SamplingParams(max_tokens=16, temperature=1.0, top_k=50, seed=12))[0]
    assert other.token_ids != alone
    unseeded = SamplingParams(max_tokens=16, temperature=1.0)
    assert llm.generate(TEXT, unseeded)[0].token_ids != llm.generate(TEXT, unseeded)[0].token_ids


def test_stop_token_ids_and_min_tokens(llm: LLM) -> None:
    free = llm.generate(TEXT, SamplingParams(max_tokens=20))[0].token_ids
    stop = free[3]
    first = free.index(stop)
    stopped = llm.generate(TEXT, SamplingParams(max_tokens=20, stop_token_ids=(stop,)))[0]
    assert stopped.token_ids == free[: first + 1] and stopped.finish_reason is FinishReason.STOP
    later = llm.generate(TEXT, SamplingParams(max_tokens=20, min_tokens=10, stop_token_ids=(stop,)))[0]
    assert len(later.token_ids) >= 10 and stop not in later.token_ids[:10]


def test_stop_string(llm: LLM) -> None:
    """The text ends before the stop string even where it spans tokens, and the engine stops working on it."""
    free = llm.generate(TEXT, SamplingParams(max_tokens=40))[0].text
    stop = free[10:13]
    stopped = llm.generate(TEXT, SamplingParams(max_tokens=40, stop=(stop,)))[0]
    assert stopped.text == free[: free.index(stop)] and stopped.finish_reason is FinishReason.STOP
    assert len(stopped.token_ids) < 40
    assert llm.generate(TEXT, SamplingParams(max_tokens=5))[0].token_ids, "the engine goes on after it"


def test_eos_ends_unless_ignored(device: torch.device, tmp_path: Path) -> None:
    """Every EOS id of the checkpoint ends a text, in a stream and in a batch, unless the request says otherwise."""
    settings: dict[str, Any] = {"max_model_len": 128, "prefill_buckets": (16,), "dtype": "float32"}
    settings["device"] = str(device)
    endless = SamplingParams(max_tokens=10, ignore_eos=True)
    with LLM("tiny", **settings) as llm:
        free = llm.generate(TEXT, endless)[0].token_ids
    folder = export_model("tiny", tmp_path / "tiny", dtype="float32", device=str(device))
    config = folder / "generation_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "eos_token_id": [2047, free[2]]}))
    with LLM(folder, **settings) as llm:
        for _ in range(2):
            ended = llm.generate(TEXT, SamplingParams(max_tokens=10))[0]
            assert ended.token_ids == free[: free.index(free[2]) + 1] and ended.finish_reason is FinishReason.STOP
            llm.settle()
            chunks = list(llm.stream(TEXT, SamplingParams(max_tokens=10)))
            assert tuple(chunk.token_id for chunk in chunks) == ended.token_ids
            llm.settle()
        assert llm.generate(TEXT, endless)[0].token_ids == free
        assert tuple(chunk.token_id for chunk in llm.stream(TEXT, endless)) == free


def test_logprobs(llm: LLM) -> None:
    greedy = llm.generate(TEXT, SamplingParams(max_tokens=6))[0]
    assert greedy.logprobs is None
    reported = llm.generate(TEXT, SamplingParams(max_tokens=6, logprobs=4))[0]
    assert reported.token_ids == greedy.token_ids
    assert reported.logprobs is not None and len(reported.logprobs) == 6
    for token, entry in zip(reported.token_ids, reported.logprobs, strict=True):
        assert entry.token_id == token and len(entry.top) == 4
        assert entry.top[0][0] == token and entry.top[0][1] == pytest.approx(entry.logprob)
        values = [value for _, value in entry.top]
        assert values == sorted(values, reverse=True) and sum(math.exp(v) for v in values) <= 1.0001


def assert_nothing_left(llm: LLM) -> None:
    llm.generate(TEXT, SamplingParams(max_tokens=1))
    llm._engine.drain()
    assert not llm._live and not llm._engine._sequences and llm._engine.scheduler.idle
    assert llm.stats()["free_pages"] == llm._engine.pages.total


def test_closing_a_stream_frees_its_place(llm: LLM) -> None:
    """Read or not, closed by hand, by ``with`` or by being dropped: the request ends and leaves nothing behind."""
    for read in (0, 1, 3):
        streams = [llm.stream(TEXT, SamplingParams(max_tokens=200)) for _ in range(8)]
        for stream in streams:
            for _ in range(read):
                next(stream)
            stream.close()
            stream.close()
            assert stream.finish_reason is FinishReason.CANCELLED
            assert len(list(stream)) <= 200, "what had come may still be read, and then it ends"
        assert_nothing_left(llm)
        with llm.stream(TEXT, SamplingParams(max_tokens=200)):
            pass
        llm.stream(TEXT, SamplingParams(max_tokens=200))
        gc.collect()
        assert_nothing_left(llm)


def test_the_last_token_comes_before_the_books_are_closed(llm: LLM) -> None:
    """What its reader does next finds them closed, whatever it is."""
    params = SamplingParams(max_tokens=12, ignore_eos=True)
    expected = llm.generate(TEXT, params)[0].token_ids
    assert llm.settle(), "with graphs to be made, waiting for a token is more than that"

    def read_to_the_last() -> Stream:
        stream = llm.stream(TEXT, params)
        chunks = [next(stream) for _ in range(12)]
        assert tuple(chunk.token_id for chunk in chunks) == expected
        assert chunks[-1].finish_reason is FinishReason.LENGTH and llm._owed and llm._engine.busy
        return stream

    assert next(read_to_the_last(), None) is None and not llm._engine.busy
    read_to_the_last().close()
    assert not llm._engine.busy
    before = llm.stats()["decode_paths"]
    stream = read_to_the_last()
    after = llm.stats()["decode_paths"]
    assert sum(after.values()) == sum(before.values()) + 11 and not llm._engine.busy, "and none is counted twice"
    stream.close()
    stream = read_to_the_last()
    assert tuple(chunk.token_id for chunk in llm.stream(TEXT, params)) == expected
    assert llm.generate([TEXT, TEXT], params)[1].token_ids == expected
    stream.close()
    del stream
    stream = read_to_the_last()
    del stream
    gc.collect()
    assert llm.settle() and not llm._engine.busy
    assert_nothing_left(llm)


def test_an_engine_may_be_closed_with_its_books_open(device: torch.device) -> None:
    llm = LLM("tiny", max_model_len=64, prefill_buckets=(8, 32), device=str(device), rolling=False)
    stream = llm.stream(TEXT, SamplingParams(max_tokens=12, ignore_eos=True))
    for _ in range(12):
        next(stream)
    assert llm._owed
    llm.close()
    assert next(stream, None) is None


@pytest.mark.parametrize("where", ["_stage_prompt", "_count"], ids=["before the work", "after it"])
def test_an_interrupt_hurts_nobody_else(device: torch.device, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    """Ctrl-C while waiting for tokens: the next call goes on where it was. In the middle of a launch: every request
    ends as cancelled, and the engine serves new ones with the right tokens. The same for a lone stream in its loop."""

    def interrupt(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    with LLM("tiny", max_model_len=128, prefill_buckets=(16,), device=str(device)) as llm:
        expected = llm.generate(TEXT, SamplingParams(max_tokens=9))[0].token_ids
        first, second = (llm.stream(TEXT, SamplingParams(max_tokens=9)) for _ in range(2))
        tokens = [next(first).token_id for _ in range(3)]
        with monkeypatch.context() as patch:
            patch.setattr(llm._engine.runner, "read", interrupt)
            with pytest.raises(KeyboardInterrupt):
                while True:
                    tokens.append(next(first).token_id)
        assert tuple(tokens + [chunk.token_id for chunk in first]) == expected
        assert tuple(chunk.token_id for chunk in second) == expected
        lone = llm.stream(TEXT, SamplingParams(max_tokens=9))
        tokens = [next(lone).token_id for _ in range(3)]
        with monkeypatch.context() as patch:
            patch.setattr(llm._engine.runner, "read", interrupt)
            with pytest.raises(KeyboardInterrupt):
                next(lone)
        assert tuple(tokens + [chunk.token_id for chunk in lone]) == expected
        with monkeypatch.context() as patch:
            patch.setattr(llm._engine.runner, where, interrupt)
            with pytest.raises(KeyboardInterrupt):
                llm.stream(TEXT, SamplingParams(max_tokens=9))
        assert_nothing_left(llm)
        first, second = (llm.stream(TEXT, SamplingParams(max_tokens=9)) for _ in range(2))
        next(first)
        with monkeypatch.context() as patch:
            patch.setattr(llm._engine.runner, where, interrupt)
            with pytest.raises(KeyboardInterrupt):
                list(first)
        assert len(list(second)) < 9 and second.finish_reason is FinishReason.CANCELLED
        assert_nothing_left(llm)
        assert llm.generate([TEXT] * 3, SamplingParams(max_tokens=9))[2].token_ids == expected


def test_extreme_parameters_stay_with_their_request(llm: LLM) -> None:
    """The largest figures that are accepted neither break a step nor reach a neighbour."""
    expected = llm.generate(TEXT, SamplingParams(max_tokens=6))[0].token_ids
    huge = SamplingParams(max_tokens=2**31 - 1, min_tokens=2**31 - 1, top_k=2**31 - 1, seed=2**64 - 1, temperature=100)
    greedy = SamplingParams(max_tokens=6)
    outputs = llm.generate([list(range(5, 200)), TEXT, TEXT], [huge, greedy, greedy])
    assert len(outputs[0].prompt_token_ids) + len(outputs[0].token_ids) == 256
    assert outputs[1].token_ids == outputs[2].token_ids == expected
    for temperature in (1e-45, 1e-39, 1e-6):
        cold = SamplingParams(max_tokens=6, temperature=temperature, seed=1, logprobs=1)
        assert llm.generate(TEXT, cold)[0].token_ids == expected


@pytest.mark.parametrize("limit", [2, 9, 64, 200])
def test_warming_up_stays_inside_a_short_context(device: torch.device, limit: int) -> None:
    """Buckets longer than the context are cut to it: no step writes past the block table or the rotary table."""
    with LLM("tiny", max_model_len=limit, device=str(device)) as llm:
        engine = llm._engine
        assert engine.sizing.buckets[-1] == min(limit - 1, 512)
        page = engine.cache.data[:, :, 1:].clone()
        with torch.inference_mode():
            engine.runner.warm_up(engine.ready.captured, lambda key: None)
        assert torch.equal(engine.cache.data[:, :, 1:], page), "only the dummy page may change"
        longest = llm.generate([[5] * (limit - 1)], SamplingParams(max_tokens=5))[0]
        assert len(longest.token_ids) == 1


def test_numpy_and_tensors_are_prompts(llm: LLM) -> None:
    expected = llm.generate([[3, 4, 5]], SamplingParams(max_tokens=3))[0].token_ids
    for prompt in (np.array([3, 4, 5]), torch.tensor([3, 4, 5]), [np.int64(3), np.int32(4), 5], (3, 4, 5)):
        assert llm.generate(prompt, SamplingParams(max_tokens=3))[0].token_ids == expected


def test_closing_twice_and_using_it_afterwards(device: torch.device) -> None:
    llm = LLM("tiny", max_model_len=64, prefill_buckets=(16,), device=str(device))
    stream = llm.stream(TEXT, SamplingParams(max_tokens=30))
    next(stream)
    llm.close()
    llm.close()
    assert list(stream) == [] and stream.finish_reason is FinishReason.CANCELLED
    with pytest.raises(ConfigError, match="has been closed"):
        llm.generate(TEXT)


def test_threads_share_one_engine(llm: LLM) -> None:
    """Six threads at once, each with its own streams: everybody gets what he gets alone."""
    params = [SamplingParams(max_tokens=12, temperature=0.8, seed=i) for i in range(6)]
    alone = [llm.generate(TEXT, one)[0].token_ids for one in params]
    with ThreadPoolExecutor(6) as pool:
        work = [pool.submit(lambda one=one: [c.token_id for c in llm.stream(TEXT, one)]) for one in params * 3]
        found = [tuple(future.result(timeout=120)) for future in work]
    assert found == alone * 3
    assert_nothing_left(llm)


def test_an_interrupt_while_a_stream_is_closed(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its first token was handed out ahead of the books; that these cannot be kept now does not leave it running."""
    stream = llm.stream([5, 6, 7], SamplingParams(max_tokens=40, ignore_eos=True))
    next(stream)

    def interrupted() -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(llm._engine, "step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            stream.close()
    assert stream.finish_reason is FinishReason.CANCELLED
    llm.settle()
    assert_nothing_left(llm)


def test_streams_can_be_read_in_turns(llm: LLM) -> None:
    params = [SamplingParams(max_tokens=15, temperature=0.7, seed=i) for i in range(3)]
    alone = [llm.generate(TEXT, one)[0].token_ids for one in params]
    streams = [llm.stream(TEXT, one) for one in params]
    together: list[list[int]] = [[], [], []]
    for _ in range(15):
        for i, stream in enumerate(streams):
            together[i].append(next(stream).token_id)
    assert [tuple(tokens) for tokens in together] == alone


def test_the_context_ends_with_a_reason(llm: LLM) -> None:
    output = llm.generate([list(range(100, 350))], SamplingParams(max_tokens=50))[0]
    assert len(output.prompt_token_ids) + len(output.token_ids) == 256
    assert output.finish_reason is FinishReason.LENGTH


def test_stats_prove_the_path(llm: LLM) -> None:
    """A bucket's length is exact; alone a stream decodes in loops, two streams share steps until one is alone."""
    llm.reset_stats()
    llm.generate([list(range(5, 37))], SamplingParams(max_tokens=3))
    stats = llm.stats()
    assert stats["prefill_paths"] == {"exact": 1} and stats["decode_paths"] == {"loop": 2}
    assert stats["paths"] == {"exact": 1, "padded": 0, "eager": 0, "loop": 2}
    assert stats["reasons"] == {"captured": 1, "lone_stream": 2}
    assert stats["steps"] == 3 and stats["launches"] == 2
    assert stats["compiles_after_ready"] == 0
    llm.reset_stats()
    assert llm.stats()["paths"] == {"exact": 0, "padded": 0, "eager": 0, "loop": 0}
    new = [list(range(start, start + 32)) for start in (100, 200)]  # nothing of them is cached
    llm.generate(new, SamplingParams(max_tokens=3))
    stats = llm.stats()
    assert stats["prefill_paths"] == {"exact": 2} and stats["decode_paths"]["exact"] >= 1
    assert stats["steps"] == sum(stats["paths"].values())


@pytest.mark.parametrize(
    "settings",
    [
        {"graph_scope": "static"},
        {"batch_invariant": True},
        {"device_loop": False},
        {"rolling": False},
        {"fused_sampling": False},
        {"strict": True},
        {"precapture_lengths": "7, 1-3"},
        {"graph_memory": "1MiB"},
        {"kv_window": 200, "max_model_len": None},
    ],
    ids=str,
)
def test_settings_change_no_token(llm: LLM, device: torch.device, settings: dict[str, Any]) -> None:
    """Every way of running gives the same texts, alone and in company, and ``describe`` tells which it is."""
    prompts = [TEXT, list(range(5, 12)), list(range(40, 120))]
    params = [SamplingParams(max_tokens=12), SamplingParams(max_tokens=12, temperature=0.8, seed=3, logprobs=1)]
    chosen = {"max_model_len": 256, "prefill_buckets": (8, 32, 64), "device": str(device), **settings}
    with LLM("tiny", **chosen) as other:
        about = other.describe()
        told = {"graph_scope", "batch_invariant", "kv_window", "fused_sampling"} & set(settings)
        assert all(about[name] == settings[name] for name in told)
        for one in params:
            expected = [output.token_ids for output in llm.generate(prompts, one)]
            assert [output.token_ids for output in other.generate(prompts, one)] == expected
            assert [other.generate([prompt], one)[0].token_ids for prompt in prompts] == expected
        assert other.stats()["compiles_after_ready"] == 0
        assert other.stats()["free_pages"] == other._engine.pages.total


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        ([], "there is no prompt"),
        ([[]], "the prompt is empty"),
        ([[5, 2048]], "token id 2048 is not in the vocabulary of 2048 entries"),
        ([[-1]], "token id -1 is not in the vocabulary"),
        ([[3] * 256], "the prompt has 256 tokens but the context holds 256"),
        ([["a", "b"]], "whole numbers"),
        ("", "the prompt is empty"),
        (None, "a prompt must be a text or a list of token ids, not NoneType"),
        ({"a": 1}, "a prompt must be a text or a list of token ids, not dict"),
        (b"abc", "a prompt must be a text or a list of token ids, not bytes"),
        ([3, 4.5], "whole numbers"),
        ([[True]], "whole numbers"),
    ],
)
def test_bad_prompts(llm: LLM, prompt: Any, said: str) -> None:
    with pytest.raises(RequestError, match=said):
        llm.generate(prompt, SamplingParams(max_tokens=2))


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"temperature": -1}, "temperature must be between 0 and 100"),
        ({"temperature": float("nan")}, "temperature must be a finite number"),
        ({"top_p": float("inf")}, "top_p must be a finite number"),
        ({"top_p": 0.0}, "top_p must be above 0"),
        ({"min_p": 1.5}, "min_p must be between 0 and 1"),
        ({"top_k": -2}, "top_k must be 0"),
        ({"top_k": 0.5}, "top_k must be a whole number"),
        ({"max_tokens": 0}, "max_tokens must be at least 1"),
        ({"max_tokens": 4, "min_tokens": 5}, "min_tokens must be between 0 and max_tokens"),
        ({"seed": -3}, "seed must be a whole number"),
        ({"stop": ("",)}, "each stop string must be a non-empty text"),
        ({"stop_token_ids": (-4,)}, "each stop token id"),
        ({"stop_token_ids": tuple(range(40))}, "at most 32 stop token ids"),
        ({"logprobs": 21}, "logprobs must be between 0 and 20"),
        ({"stop": None}, "stop must be a list, not None"),
        ({"stop_token_ids": None}, "stop_token_ids must be a list, not None"),
        ({"ignore_eos": "no"}, "ignore_eos must be true or false"),
        ({"max_tokens": 2**40}, "below 2\\*\\*31"),
    ],
)
def test_bad_sampling(values: dict[str, Any], said: str) -> None:
    with pytest.raises(RequestError, match=said):
        SamplingParams(**values)


def test_one_bad_prompt_stops_all_before_anything_runs(llm: LLM) -> None:
    before = llm.stats()["steps"]
    with pytest.raises(RequestError):
        llm.generate([[1, 2], [99999]], SamplingParams(max_tokens=2))
    assert llm.stats()["steps"] == before


def test_stop_token_out_of_the_vocabulary(llm: LLM) -> None:
    with pytest.raises(RequestError, match="stop token id 2048 is not in the vocabulary"):
        llm.generate(TEXT, SamplingParams(stop_token_ids=(2048,)))


@pytest.mark.parametrize(
    ("settings", "error", "said"),
    [
        ({"kv_cache_memory": "1KiB"}, CapacityError, "is too small: two pages of 16 tokens are the least"),
        ({"kv_cache_memory": "lots"}, ConfigError, "must be a size such as 4GiB"),
        ({"max_model_len": 99999}, ConfigError, "over the model's limit of 2048"),
        ({"max_streams": 9}, ConfigError, "max_streams must be between 1 and 8"),
        ({"prefill_buckets": (8, 4)}, ConfigError, "must ascend"),
        ({"precapture_lengths": (900,)}, ConfigError, "largest bucket"),
        ({"page_size": 20}, ConfigError, "page_size must be"),
        ({"dtype": "float8"}, ConfigError, "dtype must be one of"),
        ({"ops": "magic"}, ConfigError, "ops must be one of"),
        ({"max_streams": 2.5}, ConfigError, "max_streams must be a whole number"),
        ({"max_model_len": 64.0}, ConfigError, "max_model_len must be a whole number"),
        ({"prefill_buckets": 8}, ConfigError, "prefill_buckets must be a list of whole numbers"),
        ({"graphs": "yes"}, ConfigError, "graphs must be true or false"),
        ({"max_model_len": 64, "precapture_lengths": (64,)}, ConfigError, "'64' is not between 1 and"),
        ({"precapture_lengths": "5-3"}, ConfigError, "the range '5-3' descends"),
        ({"precapture_lengths": "1-50, x"}, ConfigError, "' x' is no length"),
        ({"graph_memory": "lots"}, ConfigError, "graph_memory must be a size"),
        ({"graph_scope": "layer"}, ConfigError, "graph_scope must be one of step, static"),
        ({"rolling": 1}, ConfigError, "rolling must be true or false"),
        ({"device_loop": "no"}, ConfigError, "device_loop must be true or false"),
        ({"batch_invariant": 0}, ConfigError, "batch_invariant must be true or false"),
        ({"strict": None}, ConfigError, "strict must be true or false"),
        ({"kv_window": 19}, ConfigError, "kv_window must be at least 20, not 19"),
        ({"kv_window": 2.5}, ConfigError, "kv_window must be a whole number"),
        ({"kv_window": 64, "max_model_len": 64}, ConfigError, "exclude each other"),
        ({"kv_window": 64, "kv_sinks": -1}, ConfigError, "kv_sinks must be 0 or more"),
        ({"kv_window": 4096}, ConfigError, "kv_window 4096 is over the model's limit of 2048"),
    ],
)
def test_bad_settings(settings: dict[str, Any], error: type[JitgraphError], said: str) -> None:
    with pytest.raises(error, match=said):
        LLM("tiny", device="cpu", **settings)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is there")
def test_cuda_without_cuda() -> None:
    with pytest.raises(DeviceError, match="cuda"):
        LLM("tiny", device="cuda")


def test_a_request_that_can_never_fit_names_the_budget_that_would(device: torch.device) -> None:
    with LLM("tiny", max_model_len=512, kv_cache_memory="300KiB", prefill_buckets=(16,), device=str(device)) as llm:
        with pytest.raises(CapacityError, match=r"kv_cache_memory to at least (\d+) bytes") as caught:
            llm.generate([[5] * 400], SamplingParams(max_tokens=8))
        budget = int(str(caught.value).split("at least ")[1].split(" bytes")[0])
        assert llm.generate([[5] * 20], SamplingParams(max_tokens=4)), "what fits still runs"
    with LLM("tiny", max_model_len=512, kv_cache_memory=budget, prefill_buckets=(16,), device=str(device)) as llm:
        assert len(llm.generate([[5] * 400], SamplingParams(max_tokens=8))[0].token_ids) == 8


def test_small_budget_makes_requests_take_turns(device: torch.device) -> None:
    with LLM("tiny", max_model_len=128, kv_cache_memory="700KiB", prefill_buckets=(16,), device=str(device)) as llm:
        outputs = llm.generate([[i + 3] * 20 for i in range(12)], SamplingParams(max_tokens=30))
        assert all(len(output.token_ids) == 30 for output in outputs)
        assert llm.stats()["free_pages"] == llm._engine.pages.total
