"""Options of the command line that several commands share: each name, and its help, once."""

from __future__ import annotations

from typing import Annotated

import typer

Model = Annotated[str, typer.Argument(help="Checkpoint folder, hub id or preset; `tiny` needs no download.")]
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
