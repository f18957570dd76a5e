"""``jitgraph engine``: the engine process, for a front-end or for clients of your own."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated

import typer

from jitgraph import cli_options as options
from jitgraph.cli_progress import progress_reporter
from jitgraph.errors import ConfigError
from jitgraph.lines import LineHandler, LineWriter
from jitgraph.model.default import DEFAULT_MODEL


@options.takes_engine_options
def engine(
    socket: Annotated[Path, typer.Option(help="Unix socket to listen at, in a folder that only you can enter.")],
    model: options.Model = DEFAULT_MODEL,
    device: options.Device = "auto",
    spin_us: Annotated[
        float | None,
        typer.Option(
            help="Microseconds after a request in which a core polls instead of sleeping. "
            "Default: a second beside a GPU and four cores, else 0."
        ),
    ] = None,
    parent_pid: Annotated[
        int | None, typer.Option(help="End at once when this process, which must be the parent, ends.")
    ] = None,
    *,
    shared: options.EngineOptions,
) -> None:
    """Run an engine process; `jitgraph.Client` and `jitgraph serve` talk to it.

    SIGTERM lets running requests finish, a second one or SIGINT ends at once.
    """
    from jitgraph.engine.service import ServiceOptions
    from jitgraph.engine.worker import Worker, WorkerOptions

    if spin_us is not None and not 0.0 <= spin_us <= 1e6:
        raise ConfigError(f"--spin-us must be between 0 and 1000000, not {spin_us}")
    config = shared.config(device)
    say = LineWriter()
    logging.basicConfig(level=logging.WARNING, handlers=[LineHandler(say)])
    service = ServiceOptions(shared.max_queued, None if spin_us is None else spin_us / 1e6)
    worker = Worker(
        WorkerOptions(
            model, socket, shared.weights, shared.weights_seed, config, service, shared.shutdown_timeout, parent_pid
        ),
        progress_reporter,
        say,
    )
    try:
        code = worker.run()
    finally:
        say.flush(1.0)
    raise typer.Exit(code)
