"""What a process of its own costs the engine's clients: ``python benchmarks/ipc.py [--output FOLDER]``.

Two measurements, each by turns in this process and in another. *Engines*: the same model and the same prompts.
*Channel*: an engine that computes nothing, so that the difference is the way between the processes and nothing else.
Prints a table. ``--output`` writes ``FOLDER/raw/ipc.json`` with every sample and ``FOLDER/ipc.json`` with the figures.

The figures are differences of percentiles between the two engines, with a pause of 50 ms before each request. Where
graphs are emulated (on the CPU) these drown in the model's own noise, and the channel's are taken: ``figures_from``
says which.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

FLOORS = {"ipc_ttft_us_p50": 150.0, "ipc_ttft_us_p99": 300.0, "ipc_token_us_p50": 50.0}
SPACES = "{:<44}{:>10}{:>10}{:>8}"
TITLES = {
    "sync_ttft": "Client: first token, back to back",
    "sync_ttft_paused": "Client: first token after 50 ms",
    "sync_gap": "Client: added to the gap between tokens",
    "sync_delay": "Client: a token on its way",
    "async_ttft": "AsyncClient: first token, back to back",
    "async_ttft_paused": "AsyncClient: first token after 50 ms",
    "async_gap": "AsyncClient: added to the gap",
    "async_delay": "AsyncClient: a token on its way",
    "here_ttft": "in this process: first token",
    "here_ttft_paused": "in this process: first token after 50 ms",
    "here_itl": "in this process: between tokens",
    "apart_ttft": "in its own process: first token",
    "apart_itl": "in its own process: between tokens",
    "apart_delay": "in its own process: a token on its way",
}


def percentile(values: list[float], share: float) -> float:
    """Linear between order statistics, as in the benchmark's tables."""
    import numpy as np

    return float(np.percentile(values, share))


def figures(raw: dict[str, Any]) -> dict[str, Any]:
    """What is compared with the floors, from the raw record alone."""
    samples = raw.get("engines", {}).get("samples")
    if samples is not None and not raw["engines"]["emulated"]:
        pairs = {"ttft": ("here_ttft", "apart_ttft"), "token": ("here_itl", "apart_itl")}
        source = "engines"
    else:
        samples = raw["channel"]["samples"]
        pairs = {"ttft": ("here_ttft_paused", "sync_ttft_paused"), "token": (None, "sync_gap")}
        source = "channel"

    def added(what: str, share: float) -> float:
        here, apart = pairs[what]
        return percentile(samples[apart], share) - (percentile(samples[here], share) if here else 0.0)

    found = {
        "ipc_ttft_us_p50": added("ttft", 50),
        "ipc_ttft_us_p99": added("ttft", 99),
        "ipc_token_us_p50": added("token", 50),
    }
    return {"figures": found, "figures_from": source}


def show(raw: dict[str, Any], found: dict[str, Any]) -> None:
    """The table."""
    for part in ("channel", "engines"):
        print(SPACES.format(f"{part}, microseconds", "P50", "P99", "n"))
        for name, values in raw.get(part, {}).get("samples", {}).items():
            cells = (f"{percentile(values, share):.1f}" for share in (50, 99))
            print(SPACES.format(TITLES[name], *cells, len(values)))
    print(f"\nfigures, from the {found['figures_from']}:")
    for name, value in found["figures"].items():
        print(f"  {'holds' if value <= FLOORS[name] else 'MISS '} {name} {value:.1f} (at most {FLOORS[name]:g})")


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Everything asked for, as the raw record."""
    from ipc_parts.measure import channel, engines

    from jitgraph import LLM
    from jitgraph.bench.environment import collect_environment
    from jitgraph.bench.protocol import still_collector
    from jitgraph.model.device import resolve_device
    from jitgraph.polling import BETWEEN_REQUESTS_S, FOR_AN_ANSWER_S, polling_s

    device = str(resolve_device(options.device))
    spin_us, client_spin_us = (  # as engines and clients do it by themselves on this device
        polling_s(None if given is None else given / 1e6, device, usual_s) * 1e6
        for given, usual_s in (
            (options.spin_us, BETWEEN_REQUESTS_S),
            (options.client_spin_us, FOR_AN_ANSWER_S),
        )
    )
    raw: dict[str, Any] = {"environment": collect_environment(device)}
    with still_collector():
        counts = (options.requests, options.paused, options.decodes, options.channel_tokens)
        samples = channel(*counts, spin_us, client_spin_us)
    spins = {"spin_us": spin_us, "client_spin_us": client_spin_us}
    conditions = {"prompt_tokens": options.channel_tokens, "pause_ms": 50, **spins}
    raw["channel"] = {"conditions": conditions, "samples": samples}
    if options.channel_only:
        return raw
    settings = {
        "model": options.model,
        "weights": options.weights,
        "device": options.device,
        "dtype": options.dtype,
        "max_model_len": options.max_model_len,
        "max_streams": 1,
        "prefix_cache": False,
        "precapture_lengths": tuple(options.lengths),
    }
    with LLM(**settings) as here, LLM(**settings, isolated=True) as apart:
        vocabulary = here.spec.vocab_size
        prompts = [[(7 * i + n) % vocabulary for i in range(n)] for n in options.lengths]
        with still_collector():
            samples = engines(here, apart, prompts, options.model_requests, options.model_decodes, options.tokens)
        about = here.describe()
    raw["engines"] = {"conditions": settings, "emulated": about["emulated"], "samples": samples}
    return raw


def main() -> int:
    """Command entry; works without an installed package."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    parser = argparse.ArgumentParser(description="What a process of its own costs the engine's clients.")
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--weights", default="random", choices=("checkpoint", "random"))
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--max-model-len", type=int, default=1024)
    parser.add_argument("--lengths", type=int, nargs="+", default=[10, 100, 500], help="prompt lengths")
    parser.add_argument("--tokens", type=int, default=128, help="tokens of a decoding request")
    parser.add_argument("--model-requests", type=int, default=300, help="first tokens of each engine")
    parser.add_argument("--model-decodes", type=int, default=9, help="decoding requests of each engine")
    parser.add_argument("--requests", type=int, default=2000, help="first tokens through the channel, back to back")
    parser.add_argument("--paused", type=int, default=2000, help="and with a pause of 50 ms before each")
    parser.add_argument("--decodes", type=int, default=60, help="decoding requests through the channel")
    parser.add_argument("--channel-tokens", type=int, default=100, help="prompt length of these")
    parser.add_argument("--spin-us", type=float, help="polling of the model-free engine after a request")
    parser.add_argument("--client-spin-us", type=float, help="polling of the blocking client of that engine")
    parser.add_argument("--channel-only", action="store_true", help="no model")
    parser.add_argument("--output", type=Path, help="folder for the record")
    options = parser.parse_args()
    from jitgraph.errors import JitgraphError

    try:
        raw = measure(options)
    except JitgraphError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    found = figures(raw)
    show(raw, found)
    if options.output is not None:
        (options.output / "raw").mkdir(parents=True, exist_ok=True)
        (options.output / "raw" / "ipc.json").write_text(json.dumps(raw), encoding="utf-8")
        (options.output / "ipc.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
