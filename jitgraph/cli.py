"""The command line: generate, chat, serve, inspect, engine, export, bench, report, collect-env. Heavy imports are
inside commands.

Text goes to standard output, everything about it (progress, timings) to standard error. A ``JitgraphError`` prints its
sentence and exits with 2, Ctrl-C exits with 130.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from jitgraph import __version__
from jitgraph.bench.cli import bench, report
from jitgraph.bench.load.cli import BenchCommand
from jitgraph.cli_collect_env import collect_env
from jitgraph.cli_engine import engine
from jitgraph.cli_inspect import inspect
from jitgraph.cli_options import (
    BatchInvariant,
    ContextLength,
    Device,
    Dtype,
    KVMemory,
    KVWindow,
    MaxGraphs,
    Model,
    Precapture,
    Strict,
    Weights,
    WeightSeed,
)
from jitgraph.cli_progress import progress_reporter
from jitgraph.cli_serve import serve
from jitgraph.cli_threads import settle_threads
from jitgraph.errors import ConfigError, JitgraphError, RequestError
from jitgraph.model.default import DEFAULT_MODEL
from jitgraph.types import FinishReason, RequestOutput, SamplingParams

if TYPE_CHECKING:
    from jitgraph.llm import LLM

app = typer.Typer(
    name="jitgraph",
    help="The lowest latency an LLM can have on one GPU: JIT-compiled kernels inside CUDA graphs.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

MaxTokens = Annotated[int | None, typer.Option(help="Most tokens to generate (default 128).")]
MinTokens = Annotated[int | None, typer.Option(help="No stop before this many tokens.")]
Temperature = Annotated[float | None, typer.Option(help="0 is greedy (default: the model's own setting).")]
TopK = Annotated[int | None, typer.Option(help="Keep the k most likely tokens; 0 keeps all.")]
TopP = Annotated[float | None, typer.Option(help="Keep the most likely tokens up to this probability.")]
MinP = Annotated[float | None, typer.Option(help="Keep tokens at least this fraction as likely as the likeliest.")]
RepetitionPenalty = Annotated[float | None, typer.Option(help="Over 1: ids in prompt or output become less likely.")]
PresencePenalty = Annotated[float | None, typer.Option(help="Taken once from the logits of ids in the output.")]
FrequencyPenalty = Annotated[float | None, typer.Option(help="Taken from an id's logit for each time it was output.")]
LogitBias = Annotated[
    list[str] | None, typer.Option(metavar="ID=VALUE", help="Add VALUE to a token id's logit; may be repeated.")
]
Seed = Annotated[int | None, typer.Option(help="Same seed, same text.")]
Stop = Annotated[list[str] | None, typer.Option(help="End the text before this string; may be repeated.")]
StopTokenId = Annotated[list[int] | None, typer.Option(help="End at this token id; may be repeated.")]
IgnoreEos = Annotated[bool, typer.Option("--ignore-eos", help="Do not stop at the model's EOS.")]
Logprobs = Annotated[int | None, typer.Option(help="Report log-probabilities with this many alternatives.")]


@app.command()
def generate(
    model: Model = DEFAULT_MODEL,
    prompt: Annotated[str | None, typer.Option(help="The text to continue; `-` reads standard input.")] = None,
    token_ids: Annotated[str | None, typer.Option(help="The prompt as token ids: 1,2,3.")] = None,
    weights: Weights = "checkpoint",
    weights_seed: WeightSeed = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    max_model_len: ContextLength = None,
    kv_cache_memory: KVMemory = None,
    kv_window: KVWindow = None,
    batch_invariant: BatchInvariant = False,
    precapture: Precapture = "",
    max_graphs: MaxGraphs = 50,
    strict: Strict = False,
    max_tokens: MaxTokens = None,
    min_tokens: MinTokens = None,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    min_p: MinP = None,
    repetition_penalty: RepetitionPenalty = None,
    presence_penalty: PresencePenalty = None,
    frequency_penalty: FrequencyPenalty = None,
    logit_bias: LogitBias = None,
    seed: Seed = None,
    stop: Stop = None,
    stop_token_id: StopTokenId = None,
    ignore_eos: IgnoreEos = False,
    logprobs: Logprobs = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document instead of streamed text.")] = False,
) -> None:
    """Continue a prompt, streaming the text as it comes."""
    text = _prompt(prompt, token_ids)
    overrides = {
        "max_tokens": max_tokens,
        "min_tokens": min_tokens,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "presence_penalty": presence_penalty,
        "frequency_penalty": frequency_penalty,
        "logit_bias": _biases(logit_bias or []) or None,
        "seed": seed,
        "stop": tuple(stop or ()) or None,
        "stop_token_ids": tuple(stop_token_id or ()) or None,
        "ignore_eos": ignore_eos or None,
        "logprobs": logprobs,
    }
    settings = {
        "device": device,
        "dtype": dtype,
        "max_model_len": max_model_len,
        "kv_cache_memory": kv_cache_memory,
        "kv_window": kv_window,
        "batch_invariant": batch_invariant,
        "precapture_lengths": precapture or (),
        "max_graphs": max_graphs,
        "strict": strict,
    }
    if logprobs is not None and not as_json:
        raise RequestError("--logprobs needs --json: streamed text has no place for them")
    SamplingParams(**_given(overrides))  # a wrong value is refused before anything is loaded
    with _open(model, weights, weights_seed, max_streams=1, **settings) as llm:
        params = dataclasses.replace(_default_params(llm), **_given(overrides))
        if as_json:
            typer.echo(json.dumps(_as_document(llm.generate([text], params)[0]), ensure_ascii=False))
        else:
            _stream(llm, text, params)


@app.command()
def chat(
    model: Model = DEFAULT_MODEL,
    system: Annotated[str | None, typer.Option(help="System message that opens the conversation.")] = None,
    weights: Weights = "checkpoint",
    weights_seed: WeightSeed = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    max_model_len: ContextLength = None,
    kv_cache_memory: KVMemory = None,
    kv_window: KVWindow = None,
    batch_invariant: BatchInvariant = False,
    strict: Strict = False,
    max_tokens: MaxTokens = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    repetition_penalty: RepetitionPenalty = None,
    presence_penalty: PresencePenalty = None,
    frequency_penalty: FrequencyPenalty = None,
    seed: Seed = None,
) -> None:
    """Talk with a model; an empty line or Ctrl-D ends it, Ctrl-C ends an answer."""
    overrides = _given(
        {
            "max_tokens": max_tokens,
            "temperature": temperature,
            "top_p": top_p,
            "repetition_penalty": repetition_penalty,
            "presence_penalty": presence_penalty,
            "frequency_penalty": frequency_penalty,
            "seed": seed,
        }
    )
    settings = {
        "device": device,
        "dtype": dtype,
        "max_model_len": max_model_len,
        "kv_cache_memory": kv_cache_memory,
        "kv_window": kv_window,
        "batch_invariant": batch_invariant,
        "strict": strict,
    }
    SamplingParams(**overrides)
    with _open(model, weights, weights_seed, max_streams=1, **settings) as llm:
        tokenizer = llm.tokenizer
        if tokenizer.chat_template is None:
            raise ConfigError(f"{llm.name} has no chat template: use `jitgraph generate` instead")
        params = dataclasses.replace(_default_params(llm), **overrides)
        messages: list[dict[str, str]] = [{"role": "system", "content": system}] if system else []
        while True:
            said = _ask()
            if not said:
                return
            messages.append({"role": "user", "content": said})
            try:
                answer = _stream(llm, tokenizer.encode_chat(messages), params, interruptible=True)
                messages.append({"role": "assistant", "content": answer})
            except RequestError as error:  # a conversation that outgrew the context, most likely
                _note(f"not answered: {error} (--max-model-len); the last message is dropped")
                messages.pop()


@app.command()
def export(
    preset: Annotated[str, typer.Argument(help="llama-2-7b, llama-3.1-8b, qwen2.5-0.5b or tiny.")],
    folder: Annotated[Path, typer.Argument(help="Folder to create.")],
    seed: Annotated[int, typer.Option(help="Seed of the random weights.")] = 0,
    dtype: Annotated[str, typer.Option(help="float16, bfloat16 or float32.")] = "float16",
    device: Device = "auto",
) -> None:
    """Write a preset with seeded random weights as a Hugging Face folder, for other engines."""
    from jitgraph.model.export import export_model

    with progress_reporter() as progress:
        export_model(preset, folder, seed=seed, dtype=dtype, device=device, progress=progress)
    _note(f"{preset} with random weights (seed {seed}, {dtype}) is in {folder}")


app.command(name="collect-env")(collect_env)
app.command(name="engine")(engine)
app.command(name="inspect")(inspect)
app.command(name="serve")(serve)
app.command(name="bench", cls=BenchCommand)(bench)
app.command(name="report")(report)


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.", is_eager=True)] = False,
) -> None:
    if version:
        typer.echo(f"jitgraph {__version__}")
        raise typer.Exit


def main() -> None:
    """Entry point of the ``jitgraph`` command."""
    run_cli(app)


def run_cli(command: Callable[[], Any]) -> None:
    """Runs a typer application with this project's exit codes."""
    try:
        command()
    except JitgraphError as error:
        Console(stderr=True, soft_wrap=True).print(f"[bold red]error:[/] {_plain(str(error))}", highlight=False)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output has left
        sys.stderr.close()
        sys.exit(1)


def _open(model: str, weights: str, seed: int, **settings: Any) -> LLM:
    """An ``LLM`` with a progress bar while it gets ready."""
    from jitgraph import LLM

    with progress_reporter() as progress:
        llm = LLM(model, weights=weights, seed=seed, progress=progress, **settings)
    settle_threads(llm)
    for notice in llm.notices:
        _note(notice)
    return llm


def _default_params(llm: LLM) -> SamplingParams:
    """The model's own sampling settings, named on standard error where they are not plain greedy ones."""
    params, plain = llm.default_params(), SamplingParams()
    differing = [
        f"{field.name} {getattr(params, field.name)}"
        for field in dataclasses.fields(params)
        if getattr(params, field.name) != getattr(plain, field.name)
    ]
    if llm.unsupported_defaults:
        _note(f"generation_config.json also asks for what is not supported: {', '.join(llm.unsupported_defaults)}")
    if differing:
        _note(f"from the model's generation_config.json: {', '.join(differing)}")
    return params


def _prompt(prompt: str | None, token_ids: str | None) -> str | list[int]:
    if (prompt is None) == (token_ids is None):
        raise RequestError("give the prompt either as --prompt TEXT or as --token-ids 1,2,3")
    if token_ids is not None:
        try:
            return [int(part) for part in token_ids.split(",")]
        except ValueError as error:
            raise RequestError(f"--token-ids must be whole numbers between commas, not {token_ids!r}") from error
    if prompt == "-":
        prompt = sys.stdin.read()
    if not prompt:
        raise RequestError("the prompt is empty: give at least one character")
    return prompt


def _biases(words: list[str]) -> tuple[tuple[int, float], ...]:
    """``ID=VALUE`` words as pairs."""
    try:
        return tuple((int(token), float(bias)) for token, bias in (word.split("=") for word in words))
    except ValueError as error:
        raise RequestError(f"--logit-bias must be ID=VALUE with two numbers, not {' '.join(words)!r}") from error


def _stream(llm: LLM, prompt: str | list[int], params: SamplingParams, interruptible: bool = False) -> str:
    """Prints a stream as it comes, then a line of timings; returns the text. ``interruptible``: Ctrl-C ends it
    alone."""
    import time

    started = time.perf_counter_ns()
    parts, times = [], []
    with llm.stream(prompt, params) as stream:
        try:
            for chunk in stream:
                times.append(chunk.time_ns)
                parts.append(chunk.text)
                sys.stdout.write(chunk.text)
                sys.stdout.flush()
        except KeyboardInterrupt:
            if not interruptible:
                raise
    sys.stdout.write("\n")
    if not times:
        _note("stopped before the first token")
        return ""
    ttft = (times[0] - started) / 1e6
    rate = (len(times) - 1) / ((times[-1] - times[0]) / 1e9) if len(times) > 1 else 0.0
    emulated = ", emulated graphs" if llm.describe()["emulated"] else ""
    ended = {"stop": "ended by itself", "length": "max_tokens or the context reached", "cancelled": "stopped"}
    reason = ended[(stream.finish_reason or FinishReason.CANCELLED).value]
    speed = f"TTFT {ttft:.1f} ms, {rate:.0f} tokens/s after the first"
    _note(f"{len(times)} tokens, {reason}; {speed} ({llm.device}{emulated})")
    return "".join(parts)


def _ask() -> str:
    try:
        return input("> ").strip()
    except EOFError:
        return ""


def _as_document(output: RequestOutput) -> dict[str, Any]:
    document = dataclasses.asdict(output)
    document["finish_reason"] = output.finish_reason.value
    document["timings"]["tpot_ms"] = output.timings.tpot_ms
    return document


def _given(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _note(text: str) -> None:
    typer.echo(text, err=True)


def _plain(text: str) -> str:
    return text.replace("[", "\\[")
