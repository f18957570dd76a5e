"""What somebody meets who tries it on a CPU: ``python benchmarks/first_minutes.py [MODEL] [--runs N] [--cores N]``.

Starts ``jitgraph generate --prompt "def read_json(path):"`` as a process again and again and takes the time from its
start to the first byte of the answer, and its own figure for the tokens after the first. The limits, on two cores:
the answer begins within 5 seconds of the command, and streams at 50 tokens a second or more. Medians count; the command
ends with 1 where one does not hold.

``--fresh`` adds a run for which Python compiles every module, as the first one after an installation without bytecode
does. It is shown, not judged. ``--imports`` shows what the start consists of.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PROMPT = "def read_json(path):"
ANSWER_S = 5.0
TOKENS_PER_S = 50.0
TOKENS = 200


def main(arguments: list[str] | None = None) -> int:
    """Command entry; works without an installed package."""
    options = _options(arguments)
    found = measure(options)
    for line in lines(found):
        print(line)
    if options.output:
        Path(options.output).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 0 if found["holds"] else 1


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="From the command to the first word, on a CPU.")
    parser.add_argument("model", nargs="?", help="checkpoint folder or preset (default: the bundled model)")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--cores", type=int, default=2, help="cores that the command may use")
    parser.add_argument("--fresh", action="store_true", help="add a run without compiled modules")
    parser.add_argument("--imports", action="store_true", help="show what the imports take")
    parser.add_argument("--output", help="file for the figures (JSON)")
    return parser.parse_args(arguments)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Seconds and rates of all runs, their medians, and whether both limits hold."""
    cores = sorted(os.sched_getaffinity(0))[: options.cores]
    with tempfile.TemporaryDirectory(prefix="jitgraph-first-") as kept:
        fresh = one_run(options.model, cores, f"{kept}/empty") if options.fresh else None
        one_run(options.model, cores, f"{kept}/modules")  # compiles; not counted
        runs = [one_run(options.model, cores, f"{kept}/modules") for _ in range(options.runs)]
        imports = import_times(cores, f"{kept}/modules") if options.imports else None
    answer_s = statistics.median(run["answer_s"] for run in runs)
    rate = statistics.median(run["tokens_per_s"] for run in runs)
    return {
        "model": options.model or "default",
        "cores": len(cores),
        "answer_s": answer_s,
        "answer_s_limit": ANSWER_S,
        "tokens_per_s": rate,
        "tokens_per_s_limit": TOKENS_PER_S,
        "holds": answer_s <= ANSWER_S and rate >= TOKENS_PER_S,
        "without_compiled_modules": fresh,
        "imports_s": imports,
        "runs": runs,
    }


def lines(found: dict[str, Any]) -> list[str]:
    """The figures for a reader."""
    shown = [
        f"{found['model']} on {found['cores']} cores, medians of {len(found['runs'])} runs",
        f"answer begins after   {found['answer_s']:6.2f} s of {found['answer_s_limit']:.0f} s",
        f"tokens a second       {found['tokens_per_s']:6.1f}, at least {found['tokens_per_s_limit']:.0f}",
    ]
    fresh = found["without_compiled_modules"]
    if fresh is not None:
        shown.append(
            f"without compiled modules: {fresh['answer_s']:.2f} s, {fresh['tokens_per_s']:.1f} tokens a second"
        )
    if found["imports_s"] is not None:
        shown += [f"import {name:<16}{seconds:6.2f} s" for name, seconds in found["imports_s"].items()]
    return shown


def one_run(model: str | None, cores: list[int], modules: str) -> dict[str, float]:
    """One command; ``modules`` is the folder where Python keeps what it compiles.

    Raises:
        RuntimeError: the command failed, with its words.
    """
    words = ["generate", *([model] if model else []), "--device", "cpu", "--prompt", PROMPT]
    command = [sys.executable, "-m", "jitgraph", *words, "--max-tokens", str(TOKENS), "--ignore-eos"]
    with tempfile.TemporaryFile() as notes:
        started = time.perf_counter()
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=notes,
            env=_environment(modules),
            preexec_fn=lambda: os.sched_setaffinity(0, cores),
        )
        assert process.stdout is not None
        first = process.stdout.read(1)
        answer_s = time.perf_counter() - started
        process.stdout.read()
        code = process.wait()
        notes.seek(0)
        said = notes.read().decode(errors="replace")
    found = re.search(r"TTFT ([\d.]+) ms, (\d+) tokens/s", said)
    if code != 0 or not first or found is None:
        raise RuntimeError(f"{' '.join(command)} ended with {code}: {said.strip()}")
    return {"answer_s": answer_s, "ttft_ms": float(found[1]), "tokens_per_s": float(found[2])}


def import_times(cores: list[int], modules: str) -> dict[str, float]:
    """Seconds that importing takes: Python itself, PyTorch, and all that a generation needs."""
    found = {}
    for name, code in (("nothing", ""), ("torch", "import torch"), ("jitgraph.llm", "import jitgraph.llm")):
        samples = []
        for _ in range(3):
            started = time.perf_counter()
            subprocess.run(
                [sys.executable, "-c", code],
                env=_environment(modules),
                check=True,
                preexec_fn=lambda: os.sched_setaffinity(0, cores),
            )
            samples.append(time.perf_counter() - started)
        found[name] = min(samples)
    return found


def _environment(modules: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    return {**kept, "PYTHONPATH": str(ROOT), "PYTHONPYCACHEPREFIX": modules}


if __name__ == "__main__":
    raise SystemExit(main())
