"""The parallel reader: what it gives is what safetensors gives, bit for bit; it ends cleanly, and holds little."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_model_loader import save

from jitgraph.errors import CheckpointError
from jitgraph.model import checkpoint, reading
from jitgraph.model.checkpoint import open_checkpoint
from jitgraph.model.loader import load_model
from jitgraph.model.packing import hf_views
from jitgraph.model.reading import read_into

DTYPES = [torch.float16, torch.bfloat16, torch.float32]
CHUNK = 1 << 10


def bits(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Any bits that a tensor can have: subnormals, infinities and NaN with their payload too."""
    integers = torch.int32 if dtype == torch.float32 else torch.int16
    info = torch.iinfo(integers)
    drawn = torch.randint(info.min, info.max, shape, generator=torch.Generator().manual_seed(seed))
    return drawn.to(integers).view(dtype)


def write(folder: Path, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Two files of tensors that fit chunks in every way: less than one, exactly one, many and a bit, one element."""
    shapes = [(3, 5), (CHUNK // dtype.itemsize,), (70, 31), (1,), (2048, 4), (17,)]
    tensors = {f"t{n}": bits(shape, dtype, n) for n, shape in enumerate(shapes)}
    save_file({name: tensors[name] for name in ("t0", "t2", "t5")}, folder / "a.safetensors")
    save_file({name: tensors[name] for name in ("t1", "t3", "t4")}, folder / "b.safetensors")
    (folder / checkpoint.INDEX_FILE).write_text('{"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}')
    return tensors


def read(folder: Path, dtype: torch.dtype, device: str = "cpu", readers: int | None = None) -> dict[str, torch.Tensor]:
    """All tensors of a folder through the reader."""
    stored = open_checkpoint(folder).stored
    places = {name: torch.empty(one.shape, dtype=dtype, device=device) for name, one in stored.items()}
    heard: list[str] = []
    read_into(places, {name: stored[name].extent(places[name].numel()) for name in stored}, heard.append, readers)
    assert sorted(heard) == sorted(stored), "each tensor is told once"
    return places


def raw(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.cpu().contiguous().view(torch.uint8)


@pytest.mark.parametrize("stored", DTYPES, ids=str)
@pytest.mark.parametrize("wanted", DTYPES, ids=str)
@pytest.mark.parametrize("readers", [1, 2, 5])
def test_bit_for_bit(stored: torch.dtype, wanted: torch.dtype, readers: int, tmp_path: Path, device: Any) -> None:
    write(tmp_path, stored)
    theirs = {**load_file(tmp_path / "a.safetensors"), **load_file(tmp_path / "b.safetensors")}
    with patch.object(reading, "CHUNK_BYTES", CHUNK):
        for where in {"cpu", str(device)}:
            ours = read(tmp_path, wanted, where, readers)
            assert set(ours) == set(theirs)
            for name, tensor in ours.items():
                expected = theirs[name].to(where).to(wanted)
                assert torch.equal(raw(tensor), raw(expected)), name


def test_the_loader_reads_through_it(tmp_path: Path) -> None:
    """And never asks the library for a tensor."""
    model = save(tmp_path, shard="20KB")
    asked: list[str] = []

    def watched(places: dict[str, torch.Tensor], *rest: Any) -> None:
        asked.extend(places)
        read_into(places, *rest)

    class NoTensors:
        def __init__(self, *arguments: Any, **options: Any) -> None:
            self._file = safe_open(*arguments, **options)

        def __enter__(self) -> NoTensors:
            self._file.__enter__()
            return self

        def __exit__(self, *_: object) -> None:
            self._file.__exit__(None, None, None)

        def keys(self) -> list[str]:
            return list(self._file.keys())

        def get_slice(self, name: str) -> Any:
            return self._file.get_slice(name)

    with (
        patch.object(checkpoint, "read_into", watched),
        patch.object(checkpoint, "safe_open", NoTensors),
        patch.object(reading, "CHUNK_BYTES", 64),
    ):
        loaded = load_model(str(tmp_path), device="cpu")
    views, theirs = hf_views(loaded.spec, loaded.weights), model.state_dict()
    assert sorted(asked) == sorted(views)
    for name, view in views.items():
        assert torch.equal(raw(view), raw(theirs[name])), name


def readers_left() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("reader ")]


def test_a_file_that_changes_after_its_header_was_read(tmp_path: Path) -> None:
    write(tmp_path, torch.float32)
    stored = open_checkpoint(tmp_path).stored
    places = {name: torch.empty(one.shape) for name, one in stored.items()}
    extents = {name: stored[name].extent(places[name].numel()) for name in stored}
    whole = (tmp_path / "b.safetensors").read_bytes()
    (tmp_path / "b.safetensors").write_bytes(whole[:-100])
    with patch.object(reading, "CHUNK_BYTES", CHUNK):
        with pytest.raises(CheckpointError, match=r"b\.safetensors became shorter while it was read"):
            read_into(places, extents, lambda _: None)
        (tmp_path / "b.safetensors").unlink()
        with pytest.raises(CheckpointError, match=r"b\.safetensors cannot be read .*: try again"):
            read_into(places, extents, lambda _: None)
    assert readers_left() == []


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_the_caller_may_end_it(tmp_path: Path, error: type[BaseException]) -> None:
    """Ctrl-C, or a report that fails: it comes out, and no reader goes on."""
    write(tmp_path, torch.float16)

    def refuse(_: str) -> None:
        raise error

    stored = open_checkpoint(tmp_path).stored
    places = {name: torch.empty(one.shape) for name, one in stored.items()}
    extents = {name: stored[name].extent(places[name].numel()) for name in stored}
    with patch.object(reading, "CHUNK_BYTES", CHUNK), pytest.raises(error):
        read_into(places, extents, refuse)
    assert readers_left() == []


def test_it_stages_little(tmp_path: Path) -> None:
    """However large the checkpoint: two buffers a reader where a conversion or a GPU is in between, else none."""
    write(tmp_path, torch.float16)
    made: list[int] = []
    real = torch.empty

    def counted(*shape: Any, **how: Any) -> torch.Tensor:
        if threading.current_thread().name.startswith("reader "):
            made.append(shape[0])
        return real(*shape, **how)

    with patch.object(reading, "CHUNK_BYTES", CHUNK), patch.object(reading.torch, "empty", counted):
        read(tmp_path, torch.float32, readers=3)
        assert 1 <= len(made) <= 6 and set(made) == {CHUNK}
        made.clear()
        read(tmp_path, torch.float16, readers=3)
        assert made == []


@pytest.mark.gpu
def test_on_a_gpu_the_host_holds_a_few_buffers(tmp_path: Path) -> None:
    """Resident memory that is the process's own grows by the staging, not by the checkpoint."""
    size = 1 << 29
    save_file({"big": torch.zeros(size // 2, dtype=torch.float16)}, tmp_path / "model.safetensors")

    def own_bytes() -> int:
        status = Path("/proc/self/status").read_text()
        return 1024 * int(status.partition("RssAnon:")[2].split()[0])

    torch.zeros(1, device="cuda")
    before = own_bytes()
    place = read(tmp_path, torch.float16, "cuda:0")["big"]
    assert own_bytes() - before < size // 4 and not place.any()
