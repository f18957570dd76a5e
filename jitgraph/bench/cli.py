"""The commands ``jitgraph bench`` and ``jitgraph report``, mounted by ``jitgraph/cli.py``. No torch in this process."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from jitgraph.bench.plan import CASE_MINUTES, DEFAULT_LENGTHS, TTFT_ITERATIONS, Options
from jitgraph.bench.plan_words import parse_cases, parse_cpus, parse_lengths, parse_pythons, parse_urls
from jitgraph.bench.report_compare import compare
from jitgraph.bench.run import recompute, run_benchmark

_LENGTHS = ",".join(map(str, DEFAULT_LENGTHS))


def bench(
    cases: Annotated[
        list[str] | None,
        typer.Argument(
            help="baseline, cuda-graph, jit, hybrid, tensorrt-llm: these five are all, and run where none is named. "
            "Further: jit-all, split, hf-compile, hf-graphs, vllm, openai. ablation is every case of this engine, "
            "peers are the other engines and the hybrid. "
            "Apart from them, serve URL puts a load on a server: see bench serve -h."
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="Checkpoint folder, hub id or preset. Default: llama-2-7b, on a CPU the bundled model."),
    ] = None,
    weights: Annotated[
        str | None, typer.Option(help="checkpoint or random. Default: random on CUDA where no model is named.")
    ] = None,
    prompt_lengths: Annotated[str, typer.Option(help="Prompt lengths in tokens.")] = _LENGTHS,
    ttft_iterations: Annotated[
        int, typer.Option(help="Requests per cell of the TTFT table; 0 leaves it out.")
    ] = TTFT_ITERATIONS,
    p99_iterations: Annotated[
        int | None, typer.Option(help="Requests per cell of the P99 table; 0 leaves it out. Default: 100, quick 20.")
    ] = None,
    pacing: Annotated[
        str | None,
        typer.Option(
            help="interactive (50 ms pause before a request), sustained (back to back) or both. "
            "Default: both, quick interactive."
        ),
    ] = None,
    output: Annotated[
        str, typer.Option(help="Folder for tables and raw samples; cases of one study may be run one by one into it.")
    ] = "output",
    quick: Annotated[
        bool | None, typer.Option("--quick/--no-quick", help="Fewer samples. Default: on the CPU.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    dtype: Annotated[
        str, typer.Option(help="float16, bfloat16, float32; auto is float16 on CUDA, float32 on the CPU.")
    ] = "auto",
    python: Annotated[
        list[str] | None,
        typer.Option(help="case=PATH: that case's own interpreter, such as tensorrt-llm=PATH. Repeatable."),
    ] = None,
    url: Annotated[
        list[str] | None,
        typer.Option(
            help="case=URL: a running server is that case (vllm, tensorrt-llm, openai); #NAME at the end names the "
            "model. Repeatable."
        ),
    ] = None,
    gate: Annotated[
        bool, typer.Option("--gate/--no-gate", help="Without it nobody checks the tokens, and every row says so.")
    ] = True,
    seed: Annotated[int, typer.Option(help="Of random weights.")] = 0,
    max_minutes: Annotated[
        float | None,
        typer.Option(help="Begin no further row after this time; the rest can be run later into the same folder."),
    ] = None,
    case_minutes: Annotated[
        float, typer.Option(help="End a case whose process takes longer: it hangs. Its rows are kept, the run goes on.")
    ] = CASE_MINUTES,
    restarts: Annotated[
        int, typer.Option(help="Processes that each case is measured in, one after the other; samples are pooled.")
    ] = 1,
    interleave: Annotated[
        str | None,
        typer.Option(help="request or block: cases take turns by requests or by rows, each alive in its own process."),
    ] = None,
    pin_cpu: Annotated[
        str | None, typer.Option(help="Hold every case's processes to these cores, such as 2-5,8.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Measure what is missing in the output folder and keep the rest.")
    ] = False,
    start_times: Annotated[
        bool,
        typer.Option("--start-times", help="Measure each case's start with empty caches of compiled code, and again."),
    ] = False,
) -> None:
    """Runs the latency benchmark's cases, each in a fresh process, and writes its tables."""
    options = Options(
        cases=parse_cases(cases or []),
        model=model,
        weights=weights,
        device=device,
        dtype=dtype,
        seed=seed,
        prompt_lengths=parse_lengths(prompt_lengths),
        ttft_iterations=ttft_iterations,
        p99_iterations=p99_iterations,
        pacing=pacing,
        quick=quick,
        gated=gate,
        output=output,
        pythons=parse_pythons(python or []),
        urls=parse_urls(url or []),
        max_minutes=max_minutes,
        case_minutes=case_minutes,
        restarts=restarts,
        interleave=interleave or "",
        pinned_cpus=parse_cpus(pin_cpu),
        resume=resume,
        start_times=start_times,
    )
    raise typer.Exit(run_benchmark(options, Console()))


def report(
    folders: Annotated[
        list[str] | None,
        typer.Argument(help="Output folders of jitgraph bench; several are compared with the first. Default: output."),
    ] = None,
    output: Annotated[
        str | None,
        typer.Option(help="The page to write. Default: FOLDER/report.html; of several, comparison.html in the first."),
    ] = None,
) -> None:
    """Computes the tables and the report of a run again from its raw samples, or compares several runs."""
    first, *others = [Path(folder) for folder in folders or ["output"]]
    target = None if output is None else Path(output)
    if others:
        compare((first, *others), Console(), target)
    else:
        recompute(first, Console(), target)
