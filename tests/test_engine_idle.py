"""Work in idle time: the numbers of steps and launches stay those of the device, whatever is broken off."""

from __future__ import annotations

import pytest
import torch

from jitgraph import LLM, SamplingParams
from jitgraph.graphs.key import GraphKey, Phase, Sampling

PROMPT = [5, 6, 7]


def numbers(llm: LLM) -> tuple[int, int]:
    """Next step and launch as the host counts them."""
    program = llm._engine.runner._program
    return program.next_step, program.next_launch


def device_numbers(llm: LLM) -> tuple[int, int]:
    """The same as the device counts them."""
    buffers = llm._engine.buffers
    return int(buffers["counter"]), int(buffers["launches"])


@pytest.mark.parametrize("fused", [True, False])
def test_a_warm_up_may_be_given_up_between_any_two_pieces(device: torch.device, fused: bool) -> None:
    settings = {"device": str(device), "max_model_len": 64, "rolling": False, "fused_sampling": fused}
    with LLM("tiny", **settings) as llm:  # type: ignore[arg-type]
        expected = llm.generate(PROMPT, SamplingParams(max_tokens=5))[0].token_ids
        key = GraphKey(Phase.PREFILL, 7, Sampling.FULL if fused else Sampling.OUTSIDE)
        pieces, finished = 0, False
        while not finished:
            stages = llm._engine.runner.warm_up_stages(key)
            with llm._lock, torch.inference_mode():
                for _ in range(pieces):
                    finished = next(stages, "done") == "done"
                stages.close()
            if device.type == "cuda":
                torch.cuda.synchronize()
            assert numbers(llm) == device_numbers(llm), f"given up after {pieces} pieces"
            pieces += 1
        assert pieces > 4
        assert llm.generate(PROMPT, SamplingParams(max_tokens=5))[0].token_ids == expected


def test_loops_called_off_are_settled_before_idle_work(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """The device was far ahead of a slow reader when the stream was closed; then a new length is warmed up."""
    with LLM("tiny", device=str(device), max_model_len=256, prefill_buckets=(8, 16)) as llm:
        llm.settle()
        params = SamplingParams(max_tokens=150, ignore_eos=True)
        expected = llm.generate([PROMPT, PROMPT[:2]], SamplingParams(max_tokens=6))
        llm.settle()
        with llm._lock:
            monkeypatch.setattr(llm._engine._shadow, "_is_warm", lambda key: False)
        stream = llm.stream(PROMPT, params)
        next(stream)
        with llm._lock, torch.inference_mode():
            if llm._engine.runner.emulated is not None:
                llm._engine.runner.emulated.drain()
            else:
                torch.cuda.current_stream().wait_stream(llm._engine.runner.stream)
            llm._engine.store.want(GraphKey(Phase.PREFILL, 5, Sampling.FULL))
        stream.close()
        assert llm.settle(30)
        again = llm.generate([PROMPT, PROMPT[:2]], SamplingParams(max_tokens=6))
        assert [one.token_ids for one in again] == [one.token_ids for one in expected]
        assert numbers(llm)[1] == device_numbers(llm)[1] or llm._engine.busy
