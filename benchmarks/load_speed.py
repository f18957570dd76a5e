"""How fast a checkpoint is loaded: ``python benchmarks/load_speed.py [--gib N] [--device D] [--cache C]``.

Writes a sharded safetensors checkpoint with the shapes of Llama-2-7B in fp16 (with ``--gib``, as many layers as fit),
then measures three rates on the same files, in turns, each from the same state of the page cache:

- ``cat`` of all shards to /dev/null,
- the way to the device: a pinned copy over the bus; on the CPU, filling memory that nobody has touched,
- loading: ``load_model`` from the folder's name to weights that can be used.

The ratio is the third over the lower of the first two. ``--cache warm`` reads the files once before; ``dropped`` asks
the kernel before each measurement to forget them (posix_fadvise), which a host below a virtual machine does not hear.
A few tensors are compared with safetensors' own reading, bit for bit. The command ends with 1 where the ratio on a GPU
is below 0.8.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

FLOOR = 0.8
SHARD_BYTES = 1 << 30
PRESET = "llama-2-7b"
COMPARED = 5
"""Tensors that are compared with safetensors' own reading."""


def main(arguments: list[str] | None = None) -> int:
    """Command entry; works without an installed package."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    options = _options(arguments)
    parent = Path(options.folder or tempfile.gettempdir())
    with tempfile.TemporaryDirectory(prefix="jitgraph-load-", dir=parent) as name:
        found = measure(Path(name), options)
    for line in lines(found):
        print(line)
    if options.output:
        Path(options.output).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 0 if found["holds"] is not False else 1


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="The rate at which a checkpoint is loaded, beside cat and the bus.")
    parser.add_argument("--gib", type=float, help="size of the checkpoint (default: all layers, 12.6 GiB)")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--cache", choices=("warm", "dropped"), default="warm", help="the page cache before each run")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", help="where the files are written (default: the temporary folder)")
    parser.add_argument("--output", help="file for the figures (JSON)")
    return parser.parse_args(arguments)


def measure(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """All samples in GB/s, their medians, the ratio, and whether the floor holds (None on a CPU)."""
    import torch

    from jitgraph.bench.environment import collect_environment
    from jitgraph.model.device import resolve_device
    from jitgraph.model.loader import load_model
    from jitgraph.model.reading import CHUNK_BYTES, reader_count

    device = resolve_device(options.device)
    started = time.perf_counter()
    size, layers = write_checkpoint(folder, options.gib)
    written_s = time.perf_counter() - started
    files = sorted(folder.glob("*.safetensors"))
    before: Callable[[], None] = (lambda: _drop(files)) if options.cache == "dropped" else (lambda: None)

    def load() -> Any:
        return load_model(str(folder), device=device, dtype="float16").weights

    with _own_memory() as peak:
        weights = load()  # not counted; it also makes the CUDA context, and reads the files into the cache
        compared = compare(folder, weights)
        del weights
    samples: dict[str, list[float]] = {"cat": [], "device": [], "load": []}
    for _ in range(options.rounds):
        gc.collect()
        before()
        samples["cat"].append(_rate(size, lambda: _cat(files)))
        before()
        begun = time.perf_counter()
        weights = load()
        samples["load"].append(size / 1e9 / (time.perf_counter() - begun))
        del weights
        gc.collect()
        samples["device"].append(_device_rate(device, size, reader_count()))
    if device.type == "cuda":
        torch.cuda.empty_cache()
    middle = {name: statistics.median(values) for name, values in samples.items()}
    limit = min(middle["cat"], middle["device"])
    ratio = middle["load"] / limit
    return {
        "checkpoint": {"shapes": PRESET, "layers": layers, "bytes": size, "files": len(files), "written_s": written_s},
        "device": str(device),
        "cache": options.cache,
        "readers": reader_count(),
        "chunk_bytes": CHUNK_BYTES,
        "gb_s": middle,
        "limited_by": "cat" if limit == middle["cat"] else "device",
        "ratio": ratio,
        "floor": FLOOR,
        "holds": ratio >= FLOOR if device.type == "cuda" else None,
        "host_memory_peak_mib": peak[0] / 2**20,
        "tensors_compared": compared,
        "samples_gb_s": samples,
        "environment": collect_environment(str(device)),
    }


def lines(found: dict[str, Any]) -> list[str]:
    """The figures for a reader."""
    made, rates = found["checkpoint"], found["gb_s"]
    way = "pinned copy to the GPU" if found["device"] != "cpu" else "into fresh memory"
    return [
        f"{made['bytes'] / 2**30:.2f} GiB in {made['files']} files ({made['shapes']}, {made['layers']} layers), "
        f"page cache {found['cache']}, {found['device']}, {found['readers']} readers",
        f"cat to /dev/null         {rates['cat']:7.2f} GB/s",
        f"{way:<25}{rates['device']:7.2f} GB/s",
        f"load                     {rates['load']:7.2f} GB/s, {found['ratio']:.2f} of the lower "
        f"({found['limited_by']})",
        f"own memory of the host while loading: {found['host_memory_peak_mib']:.0f} MiB at most; "
        f"{found['tensors_compared']} tensors compared bit for bit",
    ]


# ----------------------------------------------------------------------------------------------------------- checkpoint


def write_checkpoint(folder: Path, gib: float | None) -> tuple[int, int]:
    """A checkpoint of the preset's shapes in files of about 1 GiB; its tensors' bytes, and its layers."""
    import torch
    from safetensors.torch import save_file

    from jitgraph.model.hf_config import spec_from_config
    from jitgraph.model.packing import hf_shapes
    from jitgraph.model.presets import preset_config

    config = preset_config(PRESET)
    sizes: dict[int, int] = {}
    for layers in range(1, config["num_hidden_layers"] + 1):
        shapes = hf_shapes(spec_from_config({**config, "num_hidden_layers": layers}, PRESET))
        sizes[layers] = sum(2 * torch.Size(shape).numel() for shape in shapes.values())
    chosen = max((n for n, size in sizes.items() if gib is None or size <= gib * 2**30), default=1)
    if shutil.disk_usage(folder).free < sizes[chosen] * 1.05:
        raise SystemExit(
            f"{folder} has no room for {sizes[chosen] / 2**30:.1f} GiB: name another with --folder, or --gib"
        )
    config["num_hidden_layers"] = chosen
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    tile = (torch.randn(1 << 24, generator=torch.Generator().manual_seed(0)) * 0.02).half().view(torch.int16)
    shards: list[dict[str, Any]] = [{}]
    weight_map: dict[str, str] = {}
    total = 0

    def flush() -> None:
        name = f"model-{len(shards):05d}.safetensors"
        save_file(shards[-1], folder / name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(shards[-1], name))
        shards[-1] = {}
        shards.append({})

    held = 0
    for number, (name, shape) in enumerate(hf_shapes(spec_from_config(config, PRESET)).items()):
        count = torch.Size(shape).numel()
        flat = torch.empty(count, dtype=torch.int16)
        for first in range(0, count, len(tile)):
            part = flat[first : first + len(tile)]
            torch.bitwise_xor(tile[: len(part)], (number * 7 + first // len(tile)) % 64, out=part)  # no two alike
        shards[-1][name] = flat.view(torch.float16).view(shape)
        held, total = held + 2 * count, total + 2 * count
        if held >= SHARD_BYTES:
            flush()
            held = 0
    if shards[-1]:
        flush()
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return total, chosen


def compare(folder: Path, weights: Any) -> int:
    """How many tensors were compared with safetensors' own reading, bit for bit.

    Raises:
        SystemExit: one of them differs.
    """
    import torch
    from safetensors import safe_open

    from jitgraph.model.hf_config import spec_from_config
    from jitgraph.model.packing import hf_views

    spec = spec_from_config(json.loads((folder / "config.json").read_text()), str(folder))
    views = hf_views(spec, weights)
    weight_map = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    names = list(views)[:: max(1, len(views) // COMPARED)]
    for name in names:
        with safe_open(folder / weight_map[name], framework="pt") as file:
            if not torch.equal(views[name].cpu().view(torch.int16), file.get_tensor(name).view(torch.int16)):
                raise SystemExit(f"{name} is not what safetensors reads")
    return len(names)


# ---------------------------------------------------------------------------------------------------------------- rates


def _rate(size: int, work: Callable[[], None]) -> float:
    begun = time.perf_counter()
    work()
    return size / 1e9 / (time.perf_counter() - begun)


def _cat(files: list[Path]) -> None:
    subprocess.run(["cat", *map(str, files)], stdout=subprocess.DEVNULL, check=True)


def _drop(files: list[Path]) -> None:
    """Has the kernel forget the files' pages, which are on the disk already."""
    for path in files:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def _device_rate(device: Any, size: int, threads: int) -> float:
    """GB/s of the way to the device."""
    import torch

    if device.type == "cuda":
        pinned = torch.empty(1 << 28, dtype=torch.uint8, pin_memory=True)
        place = torch.empty_like(pinned, device=device)
        place.copy_(pinned)
        torch.cuda.synchronize(device)
        begun = time.perf_counter()
        for _ in range(8):
            place.copy_(pinned, non_blocking=True)
        torch.cuda.synchronize(device)
        return 8 * pinned.nbytes / 1e9 / (time.perf_counter() - begun)
    block = torch.ones(1 << 22, dtype=torch.uint8)
    fresh = torch.empty(min(size, 2 << 30), dtype=torch.uint8)
    with ThreadPoolExecutor(threads) as pool:
        begun = time.perf_counter()
        list(pool.map(lambda part: part.copy_(block[: len(part)]), fresh.split(len(block))))
        return fresh.nbytes / 1e9 / (time.perf_counter() - begun)


@contextlib.contextmanager
def _own_memory() -> Iterator[list[int]]:
    """A list of one: by how many bytes the process's own memory (no file's pages) grew at most while the block ran."""
    peak, stop = [0], threading.Event()

    def own() -> int:
        return 1024 * int(Path("/proc/self/status").read_text().partition("RssAnon:")[2].split()[0])

    first = own()

    def watch() -> None:
        while not stop.wait(0.01):
            peak[0] = max(peak[0], own() - first)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield peak
    finally:
        stop.set()
        watcher.join()


if __name__ == "__main__":
    raise SystemExit(main())
