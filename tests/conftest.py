"""Set-up of every test process: its first lines run before anything imports Triton, which then reads its switch."""

from __future__ import annotations

import os
from typing import Any

import numpy
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start: small products, and the cores are shared

import pytest

torch.set_num_threads(1)

if os.environ.get("TRITON_INTERPRET") == "1":
    import quick_interpreter

    quick_interpreter.install()

LONGEST = "test_kernels_compile.py"
"""Begun first: what another worker has to do beside it must not be over before it."""


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where tests run: the first CUDA device, else the CPU."""
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


@pytest.fixture
def products_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests of bits: a tensor-core product sums each element in one order, whatever the tile's width. In Triton's
    interpreter it is NumPy's product, whose order depends on the shape and on the processor; here one that does not."""
    if torch.cuda.is_available():
        return
    from triton.runtime import interpreter

    class InOrder:
        """NumPy as the interpreter sees it."""

        def __getattr__(self, name: str) -> Any:
            return getattr(numpy, name)

        @staticmethod
        def matmul(a: Any, b: Any, dtype: Any) -> Any:
            total = numpy.zeros((a.shape[0], b.shape[1]), dtype)
            for k in range(a.shape[1]):
                total += a[:, k, None].astype(dtype) * b[k].astype(dtype)
            return total

    monkeypatch.setattr(interpreter, "np", InOrder())


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts the longest file first. Skips tests marked ``gpu`` where no CUDA device exists, and nowhere else."""
    items.sort(key=lambda item: item.path.name != LONGEST)
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="no CUDA device")
    for item in items:
        if item.get_closest_marker("gpu") is not None:
            item.add_marker(skip)
