"""``jitgraph engine``: the engine process, for a front-end or for clients of your own."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated

import typer

from jitgraph import cli_options as options
from jitgraph.cli_progress import progress_reporter
from jitgraph.config import EngineConfig
from jitgraph.errors import ConfigError


def engine(
    socket: Annotated[Path, typer.Option(help="Unix socket to listen at, in a folder that only you can enter.")],
    model: options.Model = "tiny",
    weights: options.Weights = "checkpoint",
    weights_seed: options.WeightSeed = 0,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    max_model_len: options.ContextLength = None,
    kv_cache_memory: options.KVMemory = None,
    kv_window: options.KVWindow = None,
    batch_invariant: options.BatchInvariant = False,
    precapture: options.Precapture = "",
    max_graphs: options.MaxGraphs = 50,
    max_streams: options.MaxStreams = 8,
    prefix_cache: options.PrefixCache = True,
    strict: options.Strict = False,
    max_queued: options.MaxQueued = 64,
    shutdown_timeout: options.ShutdownTimeout = 30.0,
    spin_us: Annotated[
        float, typer.Option(help="Microseconds after a request in which a core polls instead of sleeping.")
    ] = 0.0,
    parent_pid: Annotated[
        int | None, typer.Option(help="End at once when this process, which must be the parent, ends.")
    ] = None,
) -> None:
    """Run an engine process; `jitgraph.Client` and `jitgraph serve` talk to it.

    SIGTERM lets running requests finish, a second one or SIGINT ends at once.
    """
    from jitgraph.engine.service import ServiceOptions
    from jitgraph.engine.worker import Worker, WorkerOptions

    if max_queued < 0:
        raise ConfigError(f"--max-queued must be 0 or more, not {max_queued}")
    if not 0.0 <= shutdown_timeout < 1e9:
        raise ConfigError(f"--shutdown-timeout must be a number of seconds from 0 up, not {shutdown_timeout}")
    if not 0.0 <= spin_us <= 1e6:
        raise ConfigError(f"--spin-us must be between 0 and 1000000, not {spin_us}")
    config = EngineConfig(
        device=device,
        dtype=dtype,
        max_model_len=max_model_len,
        kv_cache_memory=kv_cache_memory,
        kv_window=kv_window,
        batch_invariant=batch_invariant,
        precapture_lengths=precapture or (),
        max_graphs=max_graphs,
        max_streams=max_streams,
        prefix_cache=prefix_cache,
        strict=strict,
    )
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    service = ServiceOptions(max_queued, spin_us / 1e6)
    worker = Worker(
        WorkerOptions(model, socket, weights, weights_seed, config, service, shutdown_timeout, parent_pid),
        progress_reporter,
        lambda line: typer.echo(line, err=True),
    )
    raise typer.Exit(worker.run())
