"""A replay gives the bits that the same shape gives run eagerly; exact and padded graphs agree within rounding.

On the CPU the graph is the emulated one (then this checks that a step depends on its buffers alone); on a GPU it is a
CUDA graph of the Triton kernels.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from test_correctness import SHAPE, VOCABULARY, poison

from jitgraph.config import EngineConfig
from jitgraph.engine.engine import Engine
from jitgraph.graphs.key import GraphKey, Phase, Sampling
from jitgraph.graphs.piecewise import PiecewiseGraph
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
    fixed = {"max_model_len": 96, "prefill_buckets": BUCKETS, "max_streams": STREAMS, "rolling": False}
    return Engine(loaded.spec, loaded.weights, EngineConfig(**{**fixed, **settings}), ())


def start_requests(engine: Engine, params: SamplingParams) -> None:
    """Three sequences in the middle of their lives, so that every row of a decode step is a real one."""
    for identity in range(STREAMS):
        ids = tuple((7 * identity + 3 * i) % VOCABULARY for i in range(5 + identity))
        engine.submit(Request(identity, ids, params))
    for _ in range(3 * STREAMS):
        engine.step()
    engine.drain()


def finish_requests(engine: Engine) -> list[list[int]]:
    """Runs to the end; the tokens of the sequences that were running."""
    sequences = list(engine.scheduler.running)
    while engine.busy:
        engine.step()
    assert engine.pages.free == engine.pages.total
    return [sequence.tokens for sequence in sequences]


def state(engine: Engine) -> dict[str, torch.Tensor]:
    """All that a step reads and changes, on the device and in the ring."""
    return {
        "slots": engine.buffers.slots.words,
        "cache": engine.cache.data,
        "arena": engine.buffers.arena,
        "ring": engine.buffers.ring,
    }


def snapshot(engine: Engine) -> dict[str, torch.Tensor]:
    if engine.device.type == "cuda":
        torch.cuda.synchronize()
    return {name: tensor.clone() for name, tensor in state(engine).items()}


def restore(engine: Engine, kept: dict[str, torch.Tensor]) -> None:
    for name, tensor in state(engine).items():
        tensor.copy_(kept[name])
    if engine.device.type == "cuda":
        torch.cuda.synchronize()


def stage(engine: Engine, key: GraphKey, slots: list[int]) -> None:
    """Inputs of a step of this key on real sequences, in the inbox's next row."""
    if key.phase is Phase.PREFILL:
        engine.runner._stage_prompt(slots[0], 0, range(3, 3 + max(1, key.tokens - 1)), emit=True)
    else:
        engine.runner._stage_rows(tuple(slots[: key.rows]), key.rows)


PARAMS = {
    "greedy": SamplingParams(max_tokens=40),
    "sampled": SamplingParams(max_tokens=40, temperature=0.9, top_k=40, top_p=0.9, seed=3),
    "penalised": SamplingParams(max_tokens=40, repetition_penalty=1.3, frequency_penalty=0.2, logprobs=3, seed=4),
}


@pytest.mark.parametrize("scope", ["step", "static"])
@pytest.mark.parametrize("params", PARAMS.values(), ids=PARAMS)
def test_replay_gives_the_bits_of_the_eager_step(
    folder: Path, device: torch.device, params: SamplingParams, scope: str
) -> None:
    """Every captured key: the whole state of the engine after a replay (slots, cache, arena, ring) equals that after
    the same step run eagerly. Then the requests go on, to the tokens of an engine that was left alone."""
    engine = make(folder, device, graph_scope=scope)
    start_requests(engine, params)
    decode = Sampling.GREEDY if params.greedy else Sampling.FULL
    keys = [key for key in engine.ready.captured if key.phase is Phase.PREFILL or key.sampling is decode]
    assert {key.tokens for key in keys if key.phase is Phase.PREFILL} == set(BUCKETS)
    assert {key.tokens for key in keys if key.phase is Phase.DECODE} == set(range(1, STREAMS + 1))
    slots = [sequence.slot for sequence in engine.scheduler.running]
    assert len(slots) == STREAMS
    runner = engine.runner
    for key in keys:
        poison(engine)
        stage(engine, key, slots)
        before = snapshot(engine)
        results = []
        graph = engine.store.lookup(key)
        assert graph is not None
        if isinstance(graph, PiecewiseGraph):
            assert graph.launches == SHAPE["num_hidden_layers"] + 1
        assert isinstance(graph, PiecewiseGraph) == (scope == "static")
        for how in (None, graph, graph):
            restore(engine, before)
            with torch.inference_mode(), runner._on_stream():
                runner._execute(key, key.sampling, how)
            results.append(snapshot(engine))
            _, work = engine.buffers.views(key)
            assert not work.logits.isnan().any(), key
        restore(engine, before)
        eager = results[0]
        assert not torch.equal(eager["ring"], before["ring"]), "the step has published its tokens"
        for replayed in results[1:]:
            for name, tensor in eager.items():
                same = torch.equal(tensor.view(torch.uint8), replayed[name].view(torch.uint8))
                assert same, f"{key}: {name} differs between eager and replay"
    undisturbed = make(folder, device, graph_scope=scope)
    start_requests(undisturbed, params)
    assert finish_requests(engine) == finish_requests(undisturbed)


@pytest.mark.parametrize("params", PARAMS.values(), ids=PARAMS)
def test_a_loop_gives_the_bits_of_its_steps(folder: Path, device: torch.device, params: SamplingParams) -> None:
    """The whole state after loops equals that after as many ordinary steps of the same lone sequence; on the CPU, where
    the device waits for the host, with poison before each of them."""
    results = []
    for loops in (True, False):
        engine = make(folder, device, device_loop=loops)
        poison(engine)
        engine.submit(Request(0, (5, 6, 7, 8), params))
        chunks = []
        while engine.busy:
            if engine.emulated:
                engine.buffers.poison()
            chunks += engine.step()
        assert len(chunks) == 40 and engine.pages.free == engine.pages.total
        kept = snapshot(engine)
        kept |= {d.name: engine.buffers[d.name].clone() for d in engine.buffers.declared}
        results.append({name: tensor for name, tensor in kept.items() if name not in ("arena", "launches", "inputs")})
    looped, stepped = results
    for name, tensor in looped.items():
        assert torch.equal(tensor.view(torch.uint8), stepped[name].view(torch.uint8)), name


@pytest.mark.parametrize("tokens", [1, 2, 15, 48])
def test_only_the_row_that_gets_a_token_goes_all_the_way(folder: Path, device: torch.device, tokens: int) -> None:
    """Behind the last attention one row is computed, and its logits are those of the step that computes them all."""
    engine = make(folder, device)
    start_requests(engine, PARAMS["greedy"])
    program, sequence = engine.runner._program, engine.scheduler.running[0]
    key = GraphKey(Phase.PREFILL, tokens, Sampling.OUTSIDE)
    rows: list[int] = []

    def norm_gated(*args: Any) -> None:
        rows.append(args[1].shape[0])
        program.decoder.ops.norm_gated(*args)

    batch, work = engine.buffers.views(key)
    decoder = dataclasses.replace(
        program.decoder, ops=dataclasses.replace(program.decoder.ops, norm_gated=norm_gated)
    )  # the engine's own is as it was
    logits = []
    for whole in (False, True):
        engine.buffers.poison()
        engine.runner._stage_prompt(sequence.slot, 0, range(3, 3 + tokens), emit=True)
        with torch.inference_mode(), engine.runner._on_stream():
            program.before_graph(key)
            if program.decoder.ops.receives_on_device:
                program.receive(key)
            program.prepare(key)
            decoder.forward("prefill", batch, work, engine.cache, engine.buffers.slots, whole)
            logits.append(work.logits[0].float().cpu())
        program.next_launch += 1
    layers = SHAPE["num_hidden_layers"]
    assert rows == [*[tokens] * (layers - 1), 1, *[tokens] * layers]
    close = 1e-5 if device.type == "cpu" else 2e-2
    torch.testing.assert_close(logits[0], logits[1], rtol=close, atol=close)


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
        engine.runner._execute(key, Sampling.GREEDY, None)
    if device.type == "cuda":
        torch.cuda.synchronize()
    assert torch.equal(engine.cache.data[:, :, 1:], page)
