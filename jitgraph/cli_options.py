"""Options of the command line that several commands share: each name, and its help, once."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields
from functools import wraps
from typing import Annotated, Any, get_type_hints

import typer

from jitgraph.config import EngineConfig
from jitgraph.errors import ConfigError

Model = Annotated[str, typer.Argument(help="Checkpoint folder, hub id or preset; without one, the bundled model.")]
Weights = Annotated[str, typer.Option(help="`checkpoint`, or `random` for a preset's seeded random weights.")]
WeightSeed = Annotated[int, typer.Option("--weights-seed", help="Seed of random weights.")]
Device = Annotated[str, typer.Option(help="`auto`, `cuda`, `cuda:1` or `cpu`.")]
Dtype = Annotated[str, typer.Option(help="`auto`, `float16`, `bfloat16` or `float32`.")]
ContextLength = Annotated[int | None, typer.Option("--max-model-len", help="Most tokens of prompt and output.")]
KVMemory = Annotated[str | None, typer.Option("--kv-cache-memory", help="KV cache budget, for example 4GiB.")]
KVWindow = Annotated[
    int | None, typer.Option("--kv-window", help="Tokens a stream keeps in the KV cache, for streams without an end.")
]
BatchInvariant = Annotated[bool, typer.Option("--batch-invariant", help="Same bits whatever else runs; slower.")]
Precapture = Annotated[str, typer.Option(help="Prompt lengths with a graph from the start: 1-50,64.")]
MaxGraphs = Annotated[int, typer.Option(help="Most graphs at any time.")]
Strict = Annotated[bool, typer.Option("--strict", help="Fail rather than compile a kernel after ready.")]
MaxStreams = Annotated[int, typer.Option(help="Requests that run at once, 1 to 8.")]
PrefixCache = Annotated[
    bool, typer.Option("--prefix-cache/--no-prefix-cache", help="Keep what ended requests computed for similar ones.")
]
MaxQueued = Annotated[int, typer.Option(help="Requests that may wait besides those that run; more are refused.")]
ShutdownTimeout = Annotated[
    float, typer.Option(metavar="SECONDS", help="How long running requests may go on after SIGTERM.")
]


@dataclass(frozen=True)
class EngineOptions:
    """What ``jitgraph engine`` takes and ``jitgraph serve`` hands on to it, an option each; the device aside, for a
    server may have several."""

    weights: Weights = "checkpoint"
    weights_seed: WeightSeed = 0
    dtype: Dtype = "auto"
    max_model_len: ContextLength = None
    kv_cache_memory: KVMemory = None
    kv_window: KVWindow = None
    batch_invariant: BatchInvariant = False
    precapture: Precapture = ""
    max_graphs: MaxGraphs = 50
    max_streams: MaxStreams = 8
    prefix_cache: PrefixCache = True
    strict: Strict = False
    max_queued: MaxQueued = 64
    shutdown_timeout: ShutdownTimeout = 30.0

    def config(self, device: str = "auto") -> EngineConfig:
        """The engine's settings on a device.

        Raises:
            ConfigError: a value out of its range, of the options beside the settings too.
        """
        if self.max_queued < 0:
            raise ConfigError(f"--max-queued must be 0 or more, not {self.max_queued}")
        if not 0.0 <= self.shutdown_timeout < 1e9:
            left = self.shutdown_timeout
            raise ConfigError(f"--shutdown-timeout must be a number of seconds from 0 up, not {left}")
        return EngineConfig(
            device=device,
            dtype=self.dtype,
            max_model_len=self.max_model_len,
            kv_cache_memory=self.kv_cache_memory,
            kv_window=self.kv_window,
            batch_invariant=self.batch_invariant,
            precapture_lengths=self.precapture or (),
            max_graphs=self.max_graphs,
            max_streams=self.max_streams,
            prefix_cache=self.prefix_cache,
            strict=self.strict,
        )

    def words(self) -> list[str]:
        """The options that are not as they would be anyway, as a command line has them."""
        found = []
        for field in fields(self):
            value, name = getattr(self, field.name), field.name.replace("_", "-")
            if value == field.default:
                continue
            found += (
                [f"--{name}" if value else f"--no-{name}"] if isinstance(value, bool) else [f"--{name}", str(value)]
            )
        return found


def takes_engine_options(command: Callable[..., None]) -> Callable[..., None]:
    """Gives a command the options of ``EngineOptions``, after its own; it gets them as its parameter ``shared``."""
    own = inspect.signature(command, eval_str=True)
    hints = get_type_hints(EngineOptions, include_extras=True)
    keyword = inspect.Parameter.KEYWORD_ONLY
    shared = [
        inspect.Parameter(field.name, keyword, default=field.default, annotation=hints[field.name])
        for field in fields(EngineOptions)
        if field.default is not MISSING
    ]

    @wraps(command)
    def run(**given: Any) -> None:
        picked = {one.name: given.pop(one.name) for one in shared}
        command(**given, shared=EngineOptions(**picked))

    parameters = [one.replace(kind=keyword) for one in own.parameters.values() if one.name != "shared"]
    run.__signature__ = own.replace(parameters=[*parameters, *shared])  # type: ignore[attr-defined] # typer reads it
    run.__annotations__ = {one.name: one.annotation for one in (*parameters, *shared)}
    return run
