"""A replay gives the bits that the same shape gives run eagerly; exact and padded graphs agree within rounding.

On the CPU the graph is the emulated one (then this checks that a step depends on its buffers alone); on a GPU it is a
CUDA graph of the Triton kernels.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_correctness import SHAPE, VOCABULARY, poison

from jitgraph.config import EngineConfig
from jitgraph.engine.engine import Engine
from jitgraph.graphs.key import GraphKey, Phase, Sampling
from jitgraph.model.loader import load_model
from jitgraph.types import Request, SamplingParams

BUCKETS = (4, 16, 48)
STREAMS = 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import transformers

    torch.manual_seed(1)
    path = tmp_path_factory.mktemp("llama")
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE)).save_pretrained(path)
    return path


def make(folder: Path, device: torch.device, **settings: Any) -> Engine:
    loaded = load_model(str(folder), device=device, dtype="float16" if device.type == "cuda" else "float32")
    wanted = {"max_model_len": 96, "prefill_buckets": BUCKETS, "max_streams": STREAMS, **settings}
    return Engine(loaded.spec, loaded.weights, EngineConfig(**wanted), ())


def start_requests(engine: Engine, params: SamplingParams) -> None:
    """Three sequences in the middle of their lives, so that every row of a decode step is a real one."""
    for identity in range(STREAMS):
        ids = tuple((7 * identity + 3 * i) % VOCABULARY for i in range(5 + identity))
        engine.submit(Request(identity, ids, params))
    for _ in range(3 * STREAMS):
        engine.step()
    engine.drain()


def snapshot(engine: Engine) -> dict[str, torch.Tensor]:
    """All that a step reads and changes: slots, cache, arena."""
    return {
        "slots": engine.buffers.slots.words.clone(),
        "cache": engine.cache.data.clone(),
        "arena": engine.buffers.arena.clone(),
    }


def restore(engine: Engine, state: dict[str, torch.Tensor]) -> None:
    engine.buffers.slots.words.copy_(state["slots"])
    engine.cache.data.copy_(state["cache"])
    engine.buffers.arena.copy_(state["arena"])
    if engine.device.type == "cuda":
        torch.cuda.synchronize()


@pytest.mark.parametrize(
    "params",
    [SamplingParams(max_tokens=40), SamplingParams(max_tokens=40, temperature=0.9, top_k=40, top_p=0.9, seed=3)],
    ids=["greedy", "sampled"],
)
def test_replay_gives_the_bits_of_the_eager_step(folder: Path, device: torch.device, params: SamplingParams) -> None:
    """Every captured key: the whole state of the engine after a replay equals that after the same step run eagerly."""
    engine = make(folder, device)
    runner = engine.runner
    start_requests(engine, params)
    keys = [key for key in engine.ready.captured if (key.sampling is Sampling.GREEDY) == params.greedy]
    assert {key.tokens for key in keys if key.phase is Phase.PREFILL} == set(BUCKETS)
    slots = [sequence.slot for sequence in engine.scheduler.running]
    for key in keys:
        poison(engine)
        with torch.inference_mode(), runner._on_stream():
            if key.phase is Phase.PREFILL:
                runner._stage_prompt(slots[0], 0, range(3, 3 + key.tokens - 1), emit=True)
            else:
                runner._stage_rows(tuple(slots[: key.rows]), key.rows)
        if engine.device.type == "cuda":
            torch.cuda.synchronize()
        before = snapshot(engine)
        results = []
        for graph in (None, runner._graphs[key], runner._graphs[key]):
            restore(engine, before)
            with torch.inference_mode(), runner._on_stream():
                step = runner._execute(key, (key.sampling,), graph)
            engine.buffers["counter"].fill_(runner._program.host_step)  # restoring took the counter back as well
            runner._program.host_step = step + 1
            if engine.device.type == "cuda":
                torch.cuda.synchronize()
            _, work = engine.buffers.views(key)
            results.append(
                {
                    "logits": work.logits.clone(),
                    "tokens": work.tokens.clone(),
                    "cache": engine.cache.data.clone(),
                    "slots": engine.buffers.slots.words.clone(),
                }
            )
        restore(engine, before)
        engine.buffers["counter"].fill_(runner._program.host_step)
        eager = results[0]
        assert not eager["logits"].isnan().any(), key
        for replayed in results[1:]:
            for name, tensor in eager.items():
                same = torch.equal(tensor.view(torch.uint8), replayed[name].view(torch.uint8))
                assert same, f"{key}: {name} differs between eager and replay"


@pytest.mark.parametrize("length", [1, 3, 5, 15, 17, 47])
def test_exact_and_padded_agree(folder: Path, device: torch.device, length: int) -> None:
    """The same prompt through its exact graph and through the next bucket: equal within rounding, and on the top token
    wherever its lead exceeds that."""
    ids = tuple((11 * i + length) % VOCABULARY for i in range(length))
    logits, paths = [], []
    for exact in ((length,), ()):
        engine = make(folder, device, precapture_lengths=exact)
        engine.submit(Request(0, ids, SamplingParams(max_tokens=1)))
        while engine.busy:
            engine.step()
        paths.append({path.value for (phase, path) in engine.dispatcher.paths if phase is Phase.PREFILL})
        logits.append(engine.buffers["logits"][0].float().cpu())
    assert paths == [{"exact"}, {"padded"}]
    rounding = 4 * torch.finfo(torch.float16 if device.type == "cuda" else torch.float32).eps * logits[0].abs().max()
    assert (logits[0] - logits[1]).abs().max() <= rounding * SHAPE["num_hidden_layers"] ** 0.5 * 4
    lead = logits[0].topk(2).values.diff().abs()
    if lead > 2 * (logits[0] - logits[1]).abs().max():
        assert logits[0].argmax() == logits[1].argmax()


def test_padded_rows_disturb_nobody(folder: Path, device: torch.device) -> None:
    """A batch of 2 in a graph of 3 rows: the dummy row writes into the dummy page alone."""
    engine = make(folder, device, max_graphs=0)
    engine.submit(Request(0, (5, 6, 7), SamplingParams(max_tokens=8)))
    while engine.busy:
        engine.step()
    page = engine.cache.data[:, :, 1:].clone()
    key = GraphKey(Phase.DECODE, STREAMS, Sampling.GREEDY)
    with torch.inference_mode(), engine.runner._on_stream():
        engine.runner._stage_rows((), STREAMS)
        engine.runner._execute(key, (Sampling.GREEDY,), None)
    if device.type == "cuda":
        torch.cuda.synchronize()
    assert torch.equal(engine.cache.data[:, :, 1:], page)
