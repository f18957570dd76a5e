"""Settings: each field documented, each default once, the one place that reads the environment. No torch.

``EngineConfig`` is what a caller may wish for (``None`` and ``"auto"`` included). ``model`` and ``engine`` resolve it
against a model and a device into definite figures; nothing is ever written back into a config.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

from jitgraph.errors import ConfigError
from jitgraph.lengths import Lengths, parse_lengths

DEFAULT_PREFILL_BUCKETS = (*(8, 16, 32, 48, 64, 96, 128, 160, 192, 224, 256, 288, 320, 352, 384, 416, 448, 480, 512),)
"""Prompt sizes with a graph from the start; a prompt is padded to the next one, longer ones run as chunks."""

DTYPES = ("auto", "float16", "bfloat16", "float32")
OPS_FLAVOURS = ("auto", "torch", "mixed", "jit", "jit-all")
GRAPH_SCOPES = ("step", "static")

ENVIRONMENT = {
    "JITGRAPH_CACHE": "folder of compiled kernels (default: $XDG_CACHE_HOME/jitgraph or ~/.cache/jitgraph)",
    "XDG_CACHE_HOME": "the user's cache folder, where JITGRAPH_CACHE is not set",
    "XDG_RUNTIME_DIR": "the user's folder for sockets; where it is not set, a private one below the temporary folder",
    "JITGRAPH_API_KEY": "key that clients of `jitgraph serve` must show, where --api-key is not given",
    "JITGRAPH_BENCH_API_KEY": "key that `jitgraph bench` shows to the servers that --url names",
    "TRITON_CACHE_DIR": "set by `jitgraph bench` where it measures a cold start: where Triton keeps kernels",
    "TRITON_INTERPRET": "1 runs Triton's kernels in its CPU interpreter, for tests",
    "JITGRAPH_PYTHON": "read by the shell scripts: the Python whose environment they use instead of making .venv",
    "HF_HOME": "read by huggingface_hub: where downloaded checkpoints live",
    "HF_HUB_OFFLINE": "read by huggingface_hub: 1 forbids downloads",
    "HF_TOKEN": "read by huggingface_hub: token for gated models",
}
"""Every environment variable the project or its set-up scripts react to, with its meaning."""


def cache_dir() -> str:
    """Folder of compiled kernels, from ``JITGRAPH_CACHE`` or the user's cache folder."""
    explicit = os.environ.get("JITGRAPH_CACHE")
    if explicit:
        return explicit
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return os.path.join(base, "jitgraph")


def runtime_base() -> str | None:
    """The user's folder for sockets (``XDG_RUNTIME_DIR``); None where there is none."""
    return os.environ.get("XDG_RUNTIME_DIR") or None


def server_api_key() -> str | None:
    """The key that clients of the server must show, from ``JITGRAPH_API_KEY``; None where it is not set or empty."""
    return os.environ.get("JITGRAPH_API_KEY") or None


def bench_api_key() -> str | None:
    """The key for servers that the benchmark measures, from ``JITGRAPH_BENCH_API_KEY``; None where it is not set."""
    return os.environ.get("JITGRAPH_BENCH_API_KEY") or None


def empty_cache_environment(folder: str) -> dict[str, str]:
    """This process's environment with every cache of compiled code that engines keep moved below ``folder``."""
    caches = {
        "JITGRAPH_CACHE": "jitgraph",
        "TRITON_CACHE_DIR": "triton",
        "TORCHINDUCTOR_CACHE_DIR": "inductor",
        "CUDA_CACHE_PATH": "cuda",
        "VLLM_CACHE_ROOT": "vllm",
        "FLASHINFER_WORKSPACE_BASE": "flashinfer",
    }
    return {**os.environ, **{name: os.path.join(folder, inside) for name, inside in caches.items()}}


def engine_environment(threads: int | None = None) -> dict[str, str]:
    """The environment of an engine process: this one's without the server's key, which is no business of an engine.
    ``threads``: for its work on the CPU, unless the user has said how many (``OMP_NUM_THREADS``)."""
    wanted = {} if threads is None else {"OMP_NUM_THREADS": str(threads)}
    return {**wanted, **{name: value for name, value in os.environ.items() if name != "JITGRAPH_API_KEY"}}


def threads_are_given() -> bool:
    """Whether the user has said how many threads work on the CPU (``OMP_NUM_THREADS``)."""
    return bool(os.environ.get("OMP_NUM_THREADS"))


def environment_settings() -> dict[str, str]:
    """The variables of ``ENVIRONMENT`` that are set, for reports: of a secret, only that it is."""
    secret = ("TOKEN", "KEY", "SECRET", "PASSWORD")
    return {
        name: "(set)" if any(word in name for word in secret) else os.environ[name]
        for name in ENVIRONMENT
        if name in os.environ
    }


def interpreting() -> bool:
    """Whether Triton runs its kernels in its CPU interpreter (``TRITON_INTERPRET=1``)."""
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


_SIZE = re.compile(r"^\s*(\d+(?:\.\d+)?)\s*(B|KiB|MiB|GiB|KB|MB|GB)?\s*$", re.IGNORECASE)
_UNITS = {"b": 1, "kib": 2**10, "mib": 2**20, "gib": 2**30, "kb": 10**3, "mb": 10**6, "gb": 10**9}


def parse_size(text: str | int, what: str = "size") -> int:
    """Bytes in ``"4GiB"``, ``"512 MiB"``, ``"1000"`` or an int.

    Raises:
        ConfigError: not a size.
    """
    if isinstance(text, int) and not isinstance(text, bool):
        value = text
    else:
        match = _SIZE.match(str(text))
        if match is None:
            raise ConfigError(f"{what} must be a size such as 4GiB or 512MiB, not {text!r}")
        value = int(float(match.group(1)) * _UNITS[(match.group(2) or "B").lower()])
    if value <= 0:
        raise ConfigError(f"{what} must be above zero, not {text!r}")
    return value


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


@dataclass(frozen=True)
class EngineConfig:
    """How to build an engine.

    Raises:
        ConfigError: a value out of its range.
    """

    device: str = "auto"
    """``cuda``, ``cuda:1``, ``cpu``; ``auto`` is the first CUDA device, else the CPU."""
    dtype: str = "auto"
    """Weights and activations; ``auto`` is the checkpoint's own on CUDA and float32 on the CPU."""
    max_model_len: int | None = None
    """Most tokens of prompt and output together; None is the model's limit, at most 4096. Not with ``kv_window``, which
    has no such end."""
    kv_window: int | None = None
    """Tokens of a stream that the KV cache holds at most: the first ``kv_sinks`` and the latest others, so that a
    stream may go on for ever (positions are counted inside the window). None keeps all, up to ``max_model_len``."""
    kv_sinks: int = 4
    """First tokens of a stream that stay in its window."""
    max_streams: int = 8
    """Sequences that run at once, 1 to 8; more are queued."""
    kv_cache_memory: int | str | None = None
    """Bytes for the KV cache (``"4GiB"``); None is exactly what ``max_streams`` full sequences need."""
    page_size: int = 16
    """Tokens in a KV page: a power of two from 8 to 128."""
    prefill_buckets: tuple[int, ...] = DEFAULT_PREFILL_BUCKETS
    """Prompt sizes with a graph, ascending, cut to the context; the last one is the chunk size of longer prompts."""
    prefill_chunk_running: int = 128
    """Most prompt tokens of one step while other streams decode, rounded down to a bucket: what a token of theirs may
    have to wait for. Up to about this size a step takes little longer than a decode step, since both read all weights
    once. With nobody decoding, chunks are of the largest bucket."""
    prefix_cache: bool = True
    """Keep the KV pages of requests that have ended, for prompts that begin alike. Memory that requests need is taken
    from them, oldest first. Without ``batch_invariant`` a prompt that is found may differ by rounding from one that is
    computed. Nothing is kept with ``kv_window``, nor for models whose rotation depends on the prompt's length."""
    precapture_lengths: Lengths = ()
    """Prompt lengths that get a graph of their own at start besides the buckets: numbers, ranges such as ``"1-50"``."""
    max_graphs: int = 50
    """Most graphs at any time: decode first, then buckets, then exact lengths; what prompts ask for later takes the
    place of what was not used for longest. What has no graph runs padded or eagerly."""
    graph_memory: int | str = "128MiB"
    """Most device memory of all graphs together."""
    graphs: bool = True
    """Capture and replay graphs; False runs every step eagerly."""
    graph_scope: str = "step"
    """What a graph holds: ``step``, everything; ``static``, only the ops that compute the same every time, with the
    dynamic ones launched between such graphs (for comparison)."""
    rolling: bool = True
    """Capture the lengths that prompts really have, while serving; False keeps the graphs of the start."""
    device_loop: bool = True
    """Decode a lone stream in loops on the device, one launch for up to 64 tokens; False launches every step."""
    batch_invariant: bool = False
    """A stream's tokens do not depend, bit for bit, on its neighbours, on padding or on the path its steps take."""
    ops: str = "auto"
    """Kernels: ``torch`` (plain PyTorch), ``mixed`` (Triton for dynamic ops, PyTorch for static ones), ``jit`` (Triton
    for all but large matrix products), ``jit-all`` (Triton for those as well); ``auto`` is ``jit`` on CUDA and
    ``torch`` on the CPU."""
    tune_products: bool = True
    """Measure once which cuBLAS algorithms are the fastest for this model's matrices on this device and keep the
    result on disk; False takes cuBLAS's own choice. Only for ``ops="jit"`` in a half type on CUDA."""
    fused_sampling: bool = True
    """Sampling and append inside the step's graph; False runs them eagerly after it."""
    strict: bool = False
    """A kernel compilation after ready is an error instead of a counted pause."""

    def __post_init__(self) -> None:
        value = self.prefill_buckets
        listed = isinstance(value, (list, tuple)) and all(_is_whole(n) for n in value)
        self._require(listed, f"prefill_buckets must be a list of whole numbers, not {value!r}")
        object.__setattr__(self, "prefill_buckets", tuple(value))
        whole = ("max_model_len", "kv_window", "kv_sinks", "max_streams", "page_size", "max_graphs")
        for name in (*whole, "prefill_chunk_running"):
            value = getattr(self, name)
            optional = name in ("max_model_len", "kv_window") and value is None
            self._require(optional or _is_whole(value), f"{name} must be a whole number, not {value!r}")
        switches = (
            "graphs", "fused_sampling", "strict", "rolling", "device_loop", "batch_invariant", "tune_products",
            "prefix_cache",
        )  # fmt: skip
        for name in switches:
            value = getattr(self, name)
            self._require(isinstance(value, bool), f"{name} must be true or false, not {value!r}")
        self._require(self.dtype in DTYPES, f"dtype must be one of {', '.join(DTYPES)}, not {self.dtype!r}")
        self._require(self.ops in OPS_FLAVOURS, f"ops must be one of {', '.join(OPS_FLAVOURS)}, not {self.ops!r}")
        self._require(1 <= self.max_streams <= 8, f"max_streams must be between 1 and 8, not {self.max_streams}")
        power = 8 <= self.page_size <= 128 and self.page_size & (self.page_size - 1) == 0
        self._require(power, f"page_size must be 8, 16, 32, 64 or 128, not {self.page_size}")
        buckets = self.prefill_buckets
        self._require(len(buckets) > 0, "prefill_buckets must name at least one prompt size")
        self._require(all(b >= 1 for b in buckets), f"prefill_buckets must be positive, not {buckets}")
        self._require(
            list(buckets) == sorted(set(buckets)), f"prefill_buckets must ascend without repeats, not {buckets}"
        )
        limit = self.prefill_chunk_running
        self._require(limit >= 1, f"prefill_chunk_running must be at least 1, not {limit}")
        scopes = ", ".join(GRAPH_SCOPES)
        known = self.graph_scope in GRAPH_SCOPES
        self._require(known, f"graph_scope must be one of {scopes}, not {self.graph_scope!r}")
        parse_lengths(self.precapture_lengths, buckets, "precapture_lengths")
        parse_size(self.graph_memory, "graph_memory")
        self._require(self.kv_sinks >= 0, f"kv_sinks must be 0 or more, not {self.kv_sinks}")
        if self.kv_window is not None:
            self._require(self.max_model_len is None, "kv_window and max_model_len exclude each other: give one")
            least = self.kv_sinks + 16
            self._require(self.kv_window >= least, f"kv_window must be at least {least}, not {self.kv_window}")
        self._require(self.max_graphs >= 0, f"max_graphs must be 0 or more, not {self.max_graphs}")
        if self.max_model_len is not None:
            self._require(self.max_model_len >= 2, f"max_model_len must be at least 2, not {self.max_model_len}")
        if self.kv_cache_memory is not None:
            parse_size(self.kv_cache_memory, "kv_cache_memory")

    @staticmethod
    def _require(ok: bool, message: str) -> None:
        if not ok:
            raise ConfigError(message)
