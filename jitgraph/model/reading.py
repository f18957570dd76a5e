"""Reads a checkpoint's tensors into their places with several threads: large reads, straight to where the bytes belong.

Runs on the thread that loads the model, which starts the readers, hears of each finished tensor and ends them. Where
file and place have the same dtype on the CPU, a read writes into the place itself. Everything else goes through a few
staging buffers, pinned for CUDA: so of a checkpoint no more than ``readers x 2 x CHUNK_BYTES`` is ever held on the host
for a GPU. Readers take neighbouring chunks, in the order of the files, which is the order a disk reads ahead in.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import torch

from jitgraph.errors import CheckpointError

CHUNK_BYTES = 4 << 20
"""Of one read. Smaller ones cost calls, larger ones leave the processor's caches before they are copied on."""
MOST_READERS = 8


@dataclass(frozen=True)
class Extent:
    """Where a tensor's bytes lie: row-major, little-endian, as safetensors writes them."""

    file: Path
    start: int
    """Bytes from the file's beginning."""
    nbytes: int
    dtype: torch.dtype


@dataclass(frozen=True)
class _Chunk:
    """One read: elements ``first`` to ``first + count`` of the tensor ``name``."""

    name: str
    first: int
    count: int


def reader_count() -> int:
    """Threads that read: one for each core of this process, 2 to ``MOST_READERS``."""
    return max(2, min(MOST_READERS, len(os.sched_getaffinity(0))))


def read_into(
    places: dict[str, torch.Tensor], extents: dict[str, Extent], done: Callable[[str], None], readers: int | None = None
) -> None:
    """Fills every place, contiguous tensors of one device, with the extent of its name, converted where dtypes differ.

    ``done(name)`` is called on the caller's thread as each tensor is complete. When this returns the places may be read
    on any stream; when it raises, no reader is left and what stands in the places means nothing.

    Raises:
        CheckpointError: a file that cannot be read, or that ends before its header says so.
    """
    reading = _Reading(places, extents, readers or reader_count())
    try:
        for name in reading.finished():
            done(name)
    finally:
        reading.end()


class _Reading:
    """The readers of one checkpoint, and what they share."""

    def __init__(self, places: dict[str, torch.Tensor], extents: dict[str, Extent], readers: int) -> None:
        self._places = {name: place.view(-1) for name, place in places.items()}
        self._extents = {name: extents[name] for name in places}
        for name, place in self._places.items():
            extent = extents[name]
            assert place.numel() * extent.dtype.itemsize == extent.nbytes, f"{name}: {extent} does not fit its place"
        self._device = next(iter(self._places.values())).device
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()  # fresh memory may have been somebody's a moment ago
        self._lock = threading.Lock()
        self._chunks = self._all_chunks()
        self._left: dict[str, int] = {}
        self._news: SimpleQueue[str | Exception] = SimpleQueue()
        self._stopped = False
        self._files = ExitStack()
        self._descriptors: dict[Path, int] = {}
        self._threads = [threading.Thread(target=self._read, name=f"reader {n}", daemon=True) for n in range(readers)]

    def _all_chunks(self) -> Iterator[_Chunk]:
        """Every read, file by file and front to back. The caller holds the lock."""
        for name, extent in sorted(self._extents.items(), key=lambda item: (str(item[1].file), item[1].start)):
            total, step = self._places[name].numel(), CHUNK_BYTES // extent.dtype.itemsize
            starts = range(0, total, step)
            self._left[name] = len(starts)
            if extent.file not in self._descriptors:
                self._descriptors[extent.file] = descriptor = os.open(extent.file, os.O_RDONLY)
                self._files.callback(os.close, descriptor)
            for first in starts:
                yield _Chunk(name, first, min(step, total - first))

    def finished(self) -> Iterator[str]:
        """Names of tensors, each as its last chunk is in place."""
        for thread in self._threads:
            thread.start()
        for _ in self._places:
            news = self._news.get()
            if isinstance(news, OSError):
                raise CheckpointError(
                    f"{news.filename or 'the checkpoint'} cannot be read ({news}): try again"
                ) from news
            if isinstance(news, Exception):
                raise news
            yield news

    def end(self) -> None:
        """Lets the readers finish their chunk, and closes the files."""
        self._stopped = True
        for thread in self._threads:
            if thread.ident is not None:
                thread.join()
        self._files.close()

    def _next(self) -> _Chunk | None:
        with self._lock:
            return None if self._stopped else next(self._chunks, None)

    def _read(self) -> None:
        """One reader's thread."""
        try:
            cuda = self._device.type == "cuda"
            with torch.inference_mode(), torch.cuda.device(self._device) if cuda else nullcontext():
                stages = [_Stage(self._device), _Stage(self._device)]
                turn = 0
                while (chunk := self._next()) is not None:
                    turn = 1 - turn
                    self._move(chunk, stages[turn])
                for stage in stages:
                    self._tell(stage.settle())
        except Exception as error:  # the loading thread raises it
            self._stopped = True
            self._news.put(error)

    def _move(self, chunk: _Chunk, stage: _Stage) -> None:
        """One chunk from its file to its place."""
        extent = self._extents[chunk.name]
        place = self._places[chunk.name][chunk.first : chunk.first + chunk.count]
        start, nbytes = extent.start + chunk.first * extent.dtype.itemsize, chunk.count * extent.dtype.itemsize
        self._tell(stage.settle())  # its buffer is still read by the copy before
        if place.device.type == "cpu" and place.dtype == extent.dtype:
            self._fill(extent.file, start, place)
            self._tell([chunk.name])
            return
        staged = stage.buffer[:nbytes].view(extent.dtype)
        self._fill(extent.file, start, staged)
        stage.copy(staged, place, chunk.name)

    def _fill(self, file: Path, start: int, target: torch.Tensor) -> None:
        """Reads the bytes of ``target``, a contiguous tensor on the CPU.

        Raises:
            CheckpointError: the file ends first.
        """
        bytes_of_it: Any = target.view(torch.uint8).numpy()
        room = memoryview(bytes_of_it)
        got, descriptor = 0, self._descriptors[file]
        while got < len(room):
            read = os.preadv(descriptor, [room[got:]], start + got)
            if read == 0:
                raise CheckpointError(f"{file} became shorter while it was read: download or write it again")
            got += read

    def _tell(self, names: Iterable[str]) -> None:
        """Counts chunks that are in place."""
        for name in names:
            with self._lock:
                self._left[name] -= 1
                complete = self._left[name] == 0
            if complete:
                self._news.put(name)


class _Stage:
    """One buffer of one reader, and the copy that still reads it."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._buffer: torch.Tensor | None = None
        self._stream: Any = torch.cuda.Stream(device) if self._cuda else None
        self._copied: Any = torch.cuda.Event() if self._cuda else None
        self._names: list[str] = []

    @property
    def buffer(self) -> torch.Tensor:
        """uint8 ``[CHUNK_BYTES]``, made at its first use."""
        if self._buffer is None:
            self._buffer = torch.empty(CHUNK_BYTES, dtype=torch.uint8, pin_memory=self._cuda)
        return self._buffer

    def copy(self, staged: torch.Tensor, place: torch.Tensor, name: str) -> None:
        """Begins the way from the buffer to the place, converting where dtypes differ; ``settle`` ends it."""
        if self._cuda:
            with torch.cuda.stream(self._stream):
                # A conversion happens on the GPU: what crosses the bus has the checkpoint's own size.
                moved = staged if staged.dtype == place.dtype else staged.to(place.device, non_blocking=True)
                place.copy_(moved, non_blocking=True)
                self._copied.record()
        else:
            place.copy_(staged)
        self._names.append(name)

    def settle(self) -> list[str]:
        """Waits for the copy; the tensors whose chunks are now in place."""
        names, self._names = self._names, []
        if names and self._cuda:
            self._copied.synchronize()
        return names
