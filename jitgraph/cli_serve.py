"""``jitgraph serve``: an OpenAI-compatible server; this process answers HTTP, each engine has a process of its own."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from jitgraph import cli_options as options
from jitgraph.config import server_api_key
from jitgraph.errors import ConfigError
from jitgraph.model.default import DEFAULT_MODEL

MOST_ENGINES = 16

ApiKey = Annotated[
    list[str] | None,
    typer.Option(help="Key that clients must show; may be repeated. Others see it in `ps`: JITGRAPH_API_KEY is safer."),
]
RequestLog = Annotated[
    str, typer.Option(metavar="FILE", help="One JSON line for each request; `-` is standard error, `none` writes none.")
]


@options.takes_engine_options
def serve(
    model: options.Model = DEFAULT_MODEL,
    host: Annotated[str, typer.Option(help="Address to listen at.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen at; 0 takes a free one.")] = 8000,
    api_key: ApiKey = None,
    allow_public: Annotated[
        bool, typer.Option("--allow-public", help="Let other machines in although no key is wanted.")
    ] = False,
    allowed_origin: Annotated[
        list[str] | None,
        typer.Option(help="Origin (https://host:port) whose pages may use the server; `*` is any; may be repeated."),
    ] = None,
    allowed_host: Annotated[
        list[str] | None,
        typer.Option(help="Name under which a server without a key may be asked too; `*` is any; may be repeated."),
    ] = None,
    served_model_name: Annotated[
        list[str] | None, typer.Option(help="Name that clients ask for, instead of the model's; may be repeated.")
    ] = None,
    chat_template: Annotated[
        Path | None, typer.Option(help="File with a Jinja chat template, instead of the checkpoint's.")
    ] = None,
    device: Annotated[
        str, typer.Option(help="`auto`, `cpu`, `cuda:1`; several, `cuda:0,cuda:1`, have an engine each.")
    ] = "auto",
    engines: Annotated[int | None, typer.Option(help="Engines on the CPU (default 1).")] = None,
    hang_timeout: Annotated[
        float, typer.Option(metavar="SECONDS", help="Silence after which an engine counts as hung and is replaced.")
    ] = 10.0,
    request_timeout: Annotated[
        float | None,
        typer.Option(
            metavar="SECONDS", help="What one answer may take, its wait in the queue included (default: any)."
        ),
    ] = None,
    request_log: RequestLog = "-",
    metrics_prefix: Annotated[
        str, typer.Option(help="First part of the names of metrics; `vllm` suits dashboards made for it.")
    ] = "jitgraph",
    *,
    shared: options.EngineOptions,
) -> None:
    """Serve a model to clients of OpenAI's API, and try it in a browser.

    Ctrl-C or SIGTERM lets running requests finish, a second one ends at once.
    """
    from jitgraph.server.serve import ServeOptions
    from jitgraph.server.serve import serve as run
    from jitgraph.server.settings import ServerSettings
    from jitgraph.server.supervisor_policy import Limits

    shared.config()  # what is wrong with these is said at once, not by an engine that has to be started for it
    key = server_api_key()
    targets = devices(device, engines)
    settings = ServerSettings(
        served_names=tuple(served_model_name or ()),
        api_keys=tuple(api_key or ([key] if key else ())),
        allowed_origins=tuple(allowed_origin or ()),
        allowed_hosts=tuple(allowed_host or ()),
        request_timeout_s=request_timeout,
        max_answers=len(targets) * (shared.max_streams + shared.max_queued),
        chat_template=None if chat_template is None else _read(chat_template),
    )
    code = run(
        ServeOptions(
            model=model,
            commands=tuple(engine_command(model, one, shared) for one in targets),
            host=host,
            port=port,
            allow_public=allow_public,
            settings=settings,
            shutdown_timeout_s=shared.shutdown_timeout,
            limits=Limits(hang_s=hang_timeout),
            metrics_prefix=metrics_prefix,
            request_log=None if request_log == "none" else request_log,
        )
    )
    raise typer.Exit(code)


def devices(text: str, engines: int | None) -> list[str]:
    """The device of each engine.

    Raises:
        ConfigError: a device named twice, several engines on a GPU, or a count that contradicts the devices.
    """
    named = [part.strip() for part in text.split(",") if part.strip()]
    if not named:
        raise ConfigError("--device names no device: give cpu, cuda, or several as cuda:0,cuda:1")
    if engines is not None and not 1 <= engines <= MOST_ENGINES:
        raise ConfigError(f"--engines must be between 1 and {MOST_ENGINES}, not {engines}")
    if len(named) == 1:
        count = engines or 1
        if count > 1 and named[0] != "cpu":
            raise ConfigError("--engines above 1 is for --device cpu: give GPUs by name, --device cuda:0,cuda:1")
        return named * count
    if engines not in (None, len(named)):
        raise ConfigError(f"--engines {engines} contradicts the {len(named)} devices of --device: leave it out")
    if len(set(named)) != len(named) or not all(name.startswith("cuda:") for name in named):
        raise ConfigError(f"--device {text}: several devices must be different GPUs, cuda:0,cuda:1")
    if len(named) > MOST_ENGINES:
        raise ConfigError(f"--device names {len(named)} devices; {MOST_ENGINES} are possible")
    return named


def engine_command(model: str, device: str, shared: options.EngineOptions) -> tuple[str, ...]:
    """The command of one engine process, its socket aside."""
    return (sys.executable, "-m", "jitgraph", "engine", model, "--device", device, *shared.words())


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--chat-template {path} cannot be read: {error}") from error
