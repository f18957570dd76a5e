"""The command ``jitgraph bench serve``, and the class that finds it behind ``jitgraph bench``. No torch here.

``bench`` takes names of cases, so ``serve`` cannot be a subcommand beside them in the usual way: a command that begins
with the word is handed on before its arguments are read.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperCommand

from jitgraph.bench.load.limits import PRESETS, parse_limits
from jitgraph.bench.load.plan import Fixed, Plan, parse_lengths, parse_token_ids, read_pairs
from jitgraph.bench.load.run import LoadOptions, run_load
from jitgraph.errors import ConfigError

_DEFAULT_TOKENS = 128


def bench_serve(
    url: Annotated[str, typer.Argument(help="A server of OpenAI's interface: http://127.0.0.1:8000.")],
    requests: Annotated[int, typer.Option(help="How many to send.")] = 100,
    rate: Annotated[
        float | None,
        typer.Option(help="Arrivals a second. Default: a closed loop, each stream sends when it has its answer."),
    ] = None,
    arrivals: Annotated[str | None, typer.Option(help="poisson (default) or fixed gaps; needs --rate.")] = None,
    concurrency: Annotated[int, typer.Option(help="Most requests under way, 1 to 8.")] = 1,
    prompt_tokens: Annotated[str | None, typer.Option(help="N, A:B (uniform) or normal:MEAN,SD. Default: 128.")] = None,
    output_tokens: Annotated[str | None, typer.Option(help="As --prompt-tokens. Default: 128.")] = None,
    lengths: Annotated[
        Path | None,
        typer.Option(help='JSONL file of {"prompt_tokens": N, "output_tokens": N}, used in turn in place of both.'),
    ] = None,
    token_ids: Annotated[str, typer.Option(help="Smallest and largest token id in prompts.")] = "100:999",
    cancel: Annotated[float, typer.Option(help="Share of answers to go away from, after a random token.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of arrivals, lengths, prompts and cancellations.")] = 0,
    limit: Annotated[
        str | None, typer.Option(help=f"Limits for goodput: ttft<=0.45s,tpot<=40ms, or {', '.join(PRESETS)}.")
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Chat messages in place of completions of token ids.")] = False,
    model: Annotated[str | None, typer.Option(help="Default: the first that the server names.")] = None,
    api_key_file: Annotated[Path | None, typer.Option(help="File whose first line is the server's key.")] = None,
    running_count: Annotated[
        bool,
        typer.Option(
            "--running-count/--no-running-count",
            help="Have the server count tokens in each event (continuous_usage_stats); without, an event is one token.",
        ),
    ] = True,
    warmup: Annotated[int, typer.Option(help="Requests of each stream beforehand; they are not recorded.")] = 2,
    max_seconds: Annotated[float | None, typer.Option(help="Begin no request after this time.")] = None,
    timeout: Annotated[float, typer.Option(help="Seconds for a whole request.")] = 600.0,
    output: Annotated[Path | None, typer.Option(help="New folder. Default: output/load-DATE-TIME.")] = None,
) -> None:
    """Puts a load on a running server and measures each request."""
    if arrivals is not None and rate is None:
        raise ConfigError("--arrivals needs --rate: in a closed loop a request follows on an answer")
    if lengths is not None and not prompt_tokens is output_tokens is None:
        raise ConfigError("--lengths gives both lengths: leave out --prompt-tokens and --output-tokens")
    default = Fixed(_DEFAULT_TOKENS)
    plan = Plan(
        requests=requests,
        rate=rate,
        arrivals=arrivals or "poisson",
        prompt=default if prompt_tokens is None else parse_lengths(prompt_tokens, "--prompt-tokens"),
        output=default if output_tokens is None else parse_lengths(output_tokens, "--output-tokens"),
        pairs=() if lengths is None else read_pairs(lengths),
        cancel=cancel,
        seed=seed,
        token_ids=parse_token_ids(token_ids),
    )
    options = LoadOptions(
        url=url,
        plan=plan,
        output=output or Path("output") / time.strftime("load-%Y%m%d-%H%M%S"),
        concurrency=concurrency,
        limits=() if limit is None else parse_limits(limit),
        model=model,
        chat=chat,
        key=None if api_key_file is None else _read_key(api_key_file),
        warmup=warmup,
        max_seconds=max_seconds,
        timeout_s=timeout,
        running_count=running_count,
    )
    raise typer.Exit(run_load(options, Console()))


class BenchCommand(TyperCommand):
    """``jitgraph bench``, which hands ``jitgraph bench serve ...`` on to the load generator."""

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        """The context of this command, or that of ``serve``."""
        if args[:1] == ["serve"]:
            app = typer.Typer(add_completion=False, context_settings={"help_option_names": ["-h", "--help"]})
            app.command(name="serve")(bench_serve)
            return typer.main.get_command(app).make_context(f"{info_name} serve", args[1:], parent=parent, **extra)
        return super().make_context(info_name, args, parent=parent, **extra)


def _read_key(path: Path) -> str:
    try:
        key = path.read_text(encoding="utf-8").partition("\n")[0].strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--api-key-file {path} cannot be read ({error})") from None
    if not key:
        raise ConfigError(f"--api-key-file {path} has an empty first line: put the key there")
    return key
