"""``jitgraph collect-env``: what a bug report needs to know of a machine, its software and this installation.

Never fails for what is missing: each part is asked by itself, and one that cannot be told says why in its place. No
secret is shown, and the user's home is written ``~``.
"""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

import jitgraph
from jitgraph import config
from jitgraph.bench.environment import cpu_name, driver_version, package_version
from jitgraph.bench.nvml import NvmlError, gpu_facts

PACKAGES = (
    "torch",
    "triton",
    "numpy",
    "tokenizers",
    "safetensors",
    "huggingface_hub",
    "httpx",
    "jinja2",
    "typer",
    "rich",
    "starlette",
    "uvicorn",
    "uvloop",
    "httptools",
    "msgspec",
    "prometheus-client",
    "llguidance",
    "transformers",
    "cuda-bindings",
    "cuda-toolkit",
    "nvidia-cublas",
    "nvidia-cuda-runtime",
    "nvidia-cuda-nvrtc",
    "tensorrt-llm",
    "vllm",
    "matplotlib",
)
"""Packages whose version can matter to how this one behaves."""

Facts = dict[str, Any]


def collect() -> dict[str, Facts]:
    """All parts, by name. A part that cannot be told is ``{"error": why}``."""
    parts: dict[str, Callable[[], Facts]] = {
        "jitgraph": _installation,
        "system": _system,
        "cpu": _cpu,
        "gpu": _gpu,
        "torch": _torch,
        "kernels": _kernels,
        "cache": _cache,
        "packages": _packages,
        "environment": config.environment_settings,
    }
    return {name: _without_home(_told(part)) for name, part in parts.items()}


def as_text(found: dict[str, Facts]) -> str:
    """The same for people: a heading for each part, a line for each fact."""
    lines: list[str] = []
    for part, facts in found.items():
        lines += ["", part] if lines else [part]
        lines += _lines(facts, "  ") or ["  none"]
    return "\n".join(lines)


def collect_env(
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document instead of text.")] = False,
) -> None:
    """Print what a bug report needs: hardware, driver, versions, caches, settings."""
    found = collect()
    typer.echo(json.dumps(found, indent=2, default=str) if as_json else as_text(found))


def _told(part: Callable[[], Facts]) -> Facts:
    try:
        return part()
    except Exception as error:  # whatever is broken here is what the report is about
        return {"error": f"{type(error).__name__}: {error}"}


def _lines(facts: Facts, indent: str) -> list[str]:
    lines = []
    for name, value in facts.items():
        if isinstance(value, dict):
            lines += [f"{indent}{name}:", *_lines(value, indent + "  ")]
        elif isinstance(value, list):
            for index, entry in enumerate(value):
                inner = entry if isinstance(entry, dict) else {"is": entry}
                lines += [f"{indent}{name} {index}:", *_lines(inner, indent + "  ")]
        else:
            lines.append(f"{indent}{name}: {_words(value)}")
    return lines


def _words(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "-" if value is None else str(value).replace("\n", " ")


def _without_home(value: Any) -> Any:
    """The same with the user's home folder, which has a name in it, as ``~``."""
    home = os.path.expanduser("~")
    if isinstance(value, dict):
        return {name: _without_home(entry) for name, entry in value.items()}
    if isinstance(value, list):
        return [_without_home(entry) for entry in value]
    if isinstance(value, str) and len(home) > 1:
        return "~" if value == home else value.replace(f"{home}/", "~/")
    return value


# -------------------------------------------------------------------------------------------------------------- parts


def _installation() -> Facts:
    root = Path(jitgraph.__file__).resolve().parents[1]
    return {
        "version": jitgraph.__version__,
        "folder": str(root),
        "commit": git_commit(root),
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "executable": sys.executable,
    }


def _system() -> Facts:
    release = _read("/etc/os-release") or ""
    names = [line.partition("=")[2].strip('"') for line in release.splitlines() if line.startswith("PRETTY_NAME=")]
    container = any(Path(mark).exists() for mark in ("/.dockerenv", "/run/.containerenv"))
    return {
        "os": names[0] if names else platform.system(),
        "kernel": platform.release(),
        "libc": " ".join(platform.libc_ver()).strip() or None,
        "wsl": "microsoft" in platform.release().lower(),
        "container": container,
    }


def _cpu() -> Facts:
    memory = dict(line.split(":", 1) for line in (_read("/proc/meminfo") or "").splitlines() if ":" in line)
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None
    return {
        "name": cpu_name(),
        "architecture": platform.machine(),
        "cores": os.cpu_count(),
        "cores_usable": usable,
        "cpu_limit_of_the_container": _cpu_limit(_read("/sys/fs/cgroup/cpu.max")),
        "governor": _read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
        "memory_gib": _gib(memory.get("MemTotal")),
        "memory_available_gib": _gib(memory.get("MemAvailable")),
    }


def _gpu() -> Facts:
    try:
        return gpu_facts()
    except NvmlError as error:
        return {"none": str(error), "driver": driver_version()}


def _torch() -> Facts:
    import torch

    usable = torch.cuda.is_available()
    found: Facts = {
        "version": torch.__version__,
        "built_for_cuda": torch.version.cuda,
        "cuda_usable": usable,
        "threads": torch.get_num_threads(),
    }
    if usable:
        found["cudnn"] = torch.backends.cudnn.version()
        found["devices"] = [_torch_device(index) for index in range(torch.cuda.device_count())]
    return found


def _torch_device(index: int) -> Facts:
    import torch

    properties = torch.cuda.get_device_properties(index)
    return {
        "name": properties.name,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "compute_capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
    }


def _kernels() -> Facts:
    """How kernels would be launched here, and whether decoding can loop on the device."""
    from jitgraph.graphs.loop import why_no_loops
    from jitgraph.jit.driver import bindings
    from jitgraph.model.device import resolve_device

    device = resolve_device("auto")
    why = why_no_loops(device)
    launcher = "cuda.bindings" if bindings() is not None else "Triton's own launcher, which needs a C compiler"
    return {
        "cuda_bindings": bindings() is not None,
        "launched_by": launcher if device.type == "cuda" else "nobody: the CPU runs plain PyTorch",
        "interpreted": config.interpreting(),
        "device_loops": why is None,
        "no_device_loops_because": why,
    }


def _cache() -> Facts:
    folder = Path(config.cache_dir())
    sizes = [path.stat().st_size for path in folder.rglob("*") if path.is_file()]
    there = folder if folder.exists() else next(parent for parent in folder.absolute().parents if parent.exists())
    return {
        "folder": str(folder),
        "files": len(sizes),
        "mib": round(sum(sizes) / 2**20, 1),
        "writable": os.access(there, os.W_OK | os.X_OK),
    }


def _packages() -> Facts:
    return {name: found for name in PACKAGES if (found := package_version(name)) is not None}


def git_commit(root: Path) -> str | None:
    """The commit that a checkout stands at, read from its files; None where ``root`` is no checkout."""
    folder = root / ".git"
    link = _read(folder) if folder.is_file() else None
    if link is not None:  # a work tree beside its repository
        folder = root / link.removeprefix("gitdir:").strip()
    head = _read(folder / "HEAD")
    if head is None:
        return None
    if not head.startswith("ref:"):
        return head
    name = head.removeprefix("ref:").strip()
    common = folder / (_read(folder / "commondir") or ".")
    for place in (folder, common):
        commit = _read(place / name)
        if commit:
            return commit
    for line in (_read(common / "packed-refs") or "").splitlines():
        commit, _, packed = line.partition(" ")
        if packed == name:
            return commit
    return None


def _read(path: str | Path) -> str | None:
    """A small file's text without blanks at its ends; None where it cannot be read."""
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return None


def _gib(line: str | None) -> float | None:
    """A value of ``/proc/meminfo``, which counts in KiB."""
    return None if line is None else round(int(line.split()[0]) / 2**20, 1)


def _cpu_limit(text: str | None) -> float | None:
    """Cores that a control group allows (``cpu.max``: microseconds in each period, or ``max``)."""
    words = (text or "max").split()
    return None if words[0] == "max" or len(words) < 2 else round(int(words[0]) / int(words[1]), 2)
