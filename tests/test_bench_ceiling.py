"""The ceiling's kernel and the ``linears`` products: they do all the work that they are timed for."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.utils.flop_counter

from jitgraph.bench.ceiling import LinearsGraph, linear_weights, linears, model_linears
from jitgraph.bench.ceiling_kernels import READ_GRANULE, READ_SHAPES, read_all
from jitgraph.model.loader import find_model, load_model

ROOT = Path(__file__).resolve().parents[1]
COMPILE = """
import sys, torch
from jitgraph.bench.ceiling_kernels import READ_SHAPES, read_all
from jitgraph.jit.compile_only import compile_only
data, sums = torch.empty(8192 * 64, dtype=torch.float16), torch.empty(8192)
with compile_only(int(sys.argv[1])) as report:
    for block, loads in READ_SHAPES:
        read_all(data, sums, block, loads)
assert len(report.binaries) == len(READ_SHAPES), report.table()
assert not any(binary.local_bytes for binary in report.binaries), report.table()
"""


@pytest.mark.parametrize("shape", READ_SHAPES)
def test_the_read_kernel_reads_everything(shape: tuple[int, int], device: torch.device) -> None:
    block, loads = shape
    data = torch.ones(READ_GRANULE, device=device)
    data[::7] = 3.0
    sums = torch.zeros(READ_GRANULE // (block * loads), device=device)
    read_all(data, sums, block, loads)
    assert torch.equal(sums, data.view(len(sums), -1).sum(1))


@pytest.mark.parametrize("arch", [80, 90])
def test_the_read_kernel_compiles_without_a_gpu(arch: int) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", COMPILE, str(arch)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_linears_are_the_products_of_a_step() -> None:
    spec = find_model("tiny", weights="random").spec
    weights = linear_weights(spec, torch.device("cpu"), torch.float32)
    assert sum(weight.numel() for weight in weights) == spec.linear_parameters()
    for tokens in (1, 10):
        with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
            linears(weights, tokens)()
        assert counter.get_total_flops() == spec.prefill_flops(tokens)


def test_a_models_own_matrices_stand_in_the_same_order() -> None:
    spec, device = find_model("tiny", weights="random").spec, torch.device("cpu")
    own = model_linears(load_model("tiny", device=device, weights="random").weights)
    made = linear_weights(spec, device, torch.float32)
    assert [matrix.shape for matrix in own] == [matrix.shape for matrix in made]
    graph = LinearsGraph(own, 5)
    assert graph.replay_ms() > 0
    graph.close()
