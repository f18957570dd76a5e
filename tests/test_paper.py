"""The wrappers in ``paper/``: short, honest about what they call, and each run for real on the CPU."""

from __future__ import annotations

import ast
import csv
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from jitgraph.bench.plan import FILE_STEMS, INTERACTIVE, LINEARS, TITLES
from jitgraph.bench.records import BlockFacts, BlockKey, RawWriter, prepare_folder, raw_path, write_json

ROOT = Path(__file__).resolve().parent.parent
PAPER = ROOT / "paper"
MOST_LINES = 15
CASES = {
    "case1_baseline.py": "baseline",
    "run_case2_benchmark.sh": "cuda-graph",
    "case3_jit_only.py": "jit",
    "run_case4_benchmark.sh": "hybrid",
    "case5_tensorrt_llm.py": "tensorrt-llm",
}
TABLES = "generate_final_tables.py"
COMMANDS = {**{name: ("bench", case) for name, case in CASES.items()}, TABLES: ("report",)}
SHARED = "jitgraph.sh"
LENGTH, TTFT, P99 = 4, 1, 2
COUNTS = ("--ttft-iterations", str(TTFT), "--p99-iterations", str(P99))
TINY = ("--prompt-lengths", str(LENGTH), "--device", "cpu", "--model", "tiny", "--weights", "random", "--no-gate")
LANES = (("case1_baseline.py", "case3_jit_only.py"), ("case5_tensorrt_llm.py", *(n for n in CASES if n.endswith("sh"))))
"""Two at a time: each lane has a folder of its own, in which its cases join."""
EXIT = 7


@dataclass(frozen=True)
class Ran:
    """A wrapper that has run for real."""

    code: int
    shown: str
    folder: Path


def run(name: str, *arguments: str, python: Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    """A wrapper, started as its user would from another folder; ``python`` is JITGRAPH_PYTHON."""
    start = [sys.executable] if name.endswith(".py") else []
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"JITGRAPH_PYTHON": str(python)}
    command = [*start, str(PAPER / name), *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=200, check=False)


def interpreter(folder: Path, last: str) -> Path:
    """An interpreter for which the set-up's check passes at once (it has tests of its own); else it does ``last``."""
    path = folder / "python"
    path.write_text(f'#!/bin/sh\ncase "$1" in */scripts/check_environment.py) [ "$2" = bench ]; exit;; esac\n{last}\n')
    path.chmod(0o755)
    return path


def with_a_ceiling(folder: Path) -> Path:
    """An output folder in which the machine's ceiling is known, so that no run spends seconds on measuring it."""
    prepare_folder(folder)
    rates = {"read_tb_s": 0.01, "copy_tb_s": 0.01, "gemm_tflops": 0.1}
    write_json(raw_path(folder, "ceiling.json"), {"by_pacing": {INTERACTIVE: rates}})
    writer = RawWriter(folder, LINEARS)
    for tokens in (1, LENGTH):
        key = BlockKey(LINEARS, "ttft", "ttft_ms", INTERACTIVE, tokens)
        writer.sample(key, 0, 1.0, time.time())
        writer.block(key, BlockFacts())
    writer.close()
    return folder


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Ran]:
    """Every case through its wrapper, with the fewest requests there can be."""
    home = tmp_path_factory.mktemp("paper")
    python = interpreter(home, f'exec "{sys.executable}" "$@"')

    def lane(names: tuple[str, ...]) -> dict[str, Ran]:
        folder = with_a_ceiling(home / names[0])
        found = {}
        for name in names:
            done = run(name, *COUNTS, *TINY, "--output", str(folder), python=python, cwd=home)
            found[name] = Ran(done.returncode, done.stdout + done.stderr, folder)
        return found

    with ThreadPoolExecutor(len(LANES)) as pool:
        lanes = list(pool.map(lane, LANES))
    return {name: one for found in lanes for name, one in found.items()}


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        return list(csv.DictReader(file))


def test_the_wrappers_are_thin_and_all_there() -> None:
    assert {path.name for path in PAPER.iterdir()} == {*COMMANDS, SHARED}
    for path in PAPER.iterdir():
        text = path.read_text(encoding="utf-8")
        assert len(text.splitlines()) <= MOST_LINES, path.name
        assert os.access(path, os.X_OK) and text.startswith("#!/usr/bin/env "), path.name
        if path.suffix == ".sh":
            subprocess.run(["bash", "-n", str(path)], check=True, timeout=30)
            assert "set -euo pipefail\n" in text, path.name
        else:
            imports = [node for node in ast.walk(ast.parse(text)) if isinstance(node, (ast.Import, ast.ImportFrom))]
            names = {alias.name for node in imports for alias in node.names}
            assert names <= {"os", "sys", "Path"}, f"{path.name} runs under any Python, without packages"


@pytest.mark.parametrize("name", COMMANDS)
def test_a_wrapper_hands_its_options_on_and_its_exit_code_back(name: str, tmp_path: Path) -> None:
    """From the repository's folder, where output/ lies, with its code on the path, wherever it is called."""
    python = interpreter(tmp_path, f'printf "%s\\n" "$PWD" "$PYTHONPATH" "$@"\nexit {EXIT}')
    options = ("a folder",) if name == TABLES else (*COUNTS, "--output", "a folder")
    done = run(name, *options, python=python, cwd=tmp_path)
    assert done.returncode == EXIT and done.stderr == ""
    assert done.stdout.splitlines() == [str(ROOT), str(ROOT), "-m", "jitgraph", *COMMANDS[name], *options]
    assert list(tmp_path.iterdir()) == [python]


def test_an_environment_that_cannot_run_is_refused(tmp_path: Path) -> None:
    done = run("case1_baseline.py", python=tmp_path / "no-python", cwd=tmp_path)
    assert done.returncode == 1 and "no-python is not a program" in done.stderr


@pytest.mark.parametrize("name", [name for name in CASES if name != "case5_tensorrt_llm.py"])
def test_a_case_runs_and_leaves_its_tables(name: str, ran: Mapping[str, Ran]) -> None:
    one, case = ran[name], CASES[name]
    assert one.code == 0, one.shown
    for protocol, count in (("ttft", TTFT), ("p99", P99)):
        table = rows(one.folder / f"{FILE_STEMS[case]}_{protocol}.csv")
        found = [row for row in table if (row["protocol"], row["metric"]) == (protocol, "ttft_ms")]
        assert [(row["case"], row["prompt_tokens"], row["n"]) for row in found] == [(case, str(LENGTH), str(count))]
        assert float(found[0]["mean"]) > 0


def test_tensorrt_llm_says_why_it_cannot_run(ran: Mapping[str, Ran]) -> None:
    """Its cells stay empty: nothing stands in for it."""
    one = ran["case5_tensorrt_llm.py"]
    facts = json.loads(raw_path(one.folder, "tensorrt-llm.json").read_text(encoding="utf-8"))
    assert one.code == 1 and facts["status"] in ("not installed", "no CUDA device")
    assert facts["status"] in " ".join(one.shown.split())
    (row,) = rows(one.folder / "case5_tensorrt_llm_ttft.csv")
    assert row["mean"] == row["n"] == "" and row["note"] == facts["reason"]


@pytest.mark.parametrize("first", [lane[0] for lane in LANES])
def test_the_final_tables_are_made_of_what_is_there(first: str, ran: Mapping[str, Ran], tmp_path: Path) -> None:
    folder = ran[first].folder
    names = [f"final_{protocol}_table.{kind}" for protocol in ("ttft", "p99") for kind in ("csv", "md")]
    before = {name: (folder / name).read_bytes() for name in names}
    for name in names:
        (folder / name).unlink()
    python = interpreter(tmp_path, f'exec "{sys.executable}" "$@"')
    done = run(TABLES, str(folder), python=python, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert before == {name: (folder / name).read_bytes() for name in names}
    measured = {TITLES[CASES[name]] for name, one in ran.items() if one.folder == folder and one.code == 0}
    assert len(measured) == 2
    for line in rows(folder / "final_ttft_table.csv"):
        filled = {column.removesuffix(" (emulated)") for column, cell in line.items() if cell}
        assert filled & {*TITLES.values()} == measured
