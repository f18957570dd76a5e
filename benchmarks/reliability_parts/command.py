"""The command behind ``benchmarks/reliability.py``: which parts run, and what becomes of their figures."""

from __future__ import annotations

import argparse
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from jitgraph.errors import ConfigError, JitgraphError
from reliability_parts import cancels, crashes, fuzz, ipc_record, record, soak
from reliability_parts.lab import Lab, Part

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "reliability.md"
ABOUT = "Breaks the service on purpose, and checks that it does what it promises."
PARTS: dict[str, Callable[[Lab], Part]] = {
    "ipc": ipc_record.ipc,
    "kill": crashes.kill,
    "stop": crashes.stop,
    "frontend_kill": crashes.frontend_kill,
    "cancels": cancels.cancels,
    "fuzz": fuzz.fuzz,
    "soak": soak.soak,
}


def main(arguments: list[str] | None = None) -> int:
    """Command entry: 0 where all that was asked for ran and every figure holds, 1 where not, 2 for a mistake."""
    options = _parser().parse_args(arguments)
    path = Path(options.output)
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # small products, and more processes than cores: threads would wait
    try:
        parts = _parts(options.parts)
        failed = [] if options.check else _run(path, parts, options)
        found = record.read(path)
    except JitgraphError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2
    for line in record.lines(found):
        print(line)
    if options.quote:
        DOCUMENT.write_text(record.quoted(DOCUMENT.read_text(encoding="utf-8"), found), encoding="utf-8")
    missed = [one["figure"] for one in record.findings(found) if not one["holds"]]
    if not options.check and len(parts) < len(PARTS):  # what was not run just now is shown, and judged another time
        measured = {name for part in parts for name in found["parts"].get(part, {}).get("figures", ())}
        missed = [name for name in missed if name in measured]
    return 1 if failed or (missed and not options.quick) else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="reliability.py", description=ABOUT)
    parser.add_argument("--output", default=str(Path(__file__).resolve().parents[1] / "reliability.json"))
    parser.add_argument("--parts", default=",".join(PARTS), help=f"some of {', '.join(PARTS)}; all where not given")
    parser.add_argument("--model", default="tiny", help="preset or checkpoint folder")
    parser.add_argument("--weights", default="checkpoint", choices=("checkpoint", "random"))
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    parser.add_argument("--minutes", type=float, default=60.0, help="how long the soak runs")
    parser.add_argument("--frames", type=int, default=200_000, help="frames of the fuzz")
    parser.add_argument("--cancels", type=int, default=10_000, help="requests that are cancelled")
    parser.add_argument(
        "--ipc-record",
        type=Path,
        default=Path(__file__).resolve().parents[1] / "h200" / "raw" / "ipc.json",
        help="raw record of benchmarks/ipc.py that the part ipc takes its figures from",
    )
    parser.add_argument("--quick", action="store_true", help="little of everything: that it runs, not that it holds")
    parser.add_argument("--quote", action="store_true", help="put the figures into docs/reliability.md")
    parser.add_argument("--check", action="store_true", help="run nothing, check what is there")
    return parser


def _parts(text: str) -> list[str]:
    """The parts named, in the order of ``PARTS``.

    Raises:
        ConfigError: an unknown one.
    """
    wanted = {name.strip() for name in text.split(",") if name.strip()}
    unknown = sorted(wanted - set(PARTS))
    if unknown or not wanted:
        raise ConfigError(f"--parts: {', '.join(unknown) or 'nothing'} is no part; choose from {', '.join(PARTS)}")
    return [name for name in PARTS if name in wanted]


def _run(path: Path, parts: list[str], options: argparse.Namespace) -> list[str]:
    """Runs the parts; those that failed."""
    record.read(path)  # a damaged file is said before anything runs
    quick = options.quick
    lab = Lab(
        options.model,
        options.weights,
        options.device,
        _say,
        minutes=0.25 if quick else options.minutes,
        frames=2000 if quick else options.frames,
        cancels=200 if quick else options.cancels,
        quick=quick,
        ipc_record=options.ipc_record,
    )
    failed = []
    for part in parts:
        _say(part)
        begun = time.monotonic()
        try:
            found = PARTS[part](lab)
        except Exception:
            traceback.print_exc()
            failed.append(part)
            continue
        seconds = time.monotonic() - begun
        about = {"seconds": round(seconds, 1), "model": lab.model, "device": lab.device, "quick": quick}
        record.add(path, part, found.figures, {**about, **found.about})
        shown = ", ".join(f"{name} {value:g}" for name, value in found.figures.items())
        _say(f"{part}: {shown} ({seconds:.0f} s)")
    if failed:
        _say(f"failed: {', '.join(failed)}")
    return failed


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
