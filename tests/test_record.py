"""The committed run of record: its tables follow from its raw samples, its floors hold, and the README quotes it
right."""

from __future__ import annotations

import json
import re
import runpy
import shutil
from pathlib import Path

import pytest
from rich.console import Console

from jitgraph.bench.run import recompute

ROOT = Path(__file__).resolve().parent.parent
RECORD = ROOT / "benchmarks" / "h200"
TABLES = ("final_ttft_table", "final_p99_table")


def test_tables_follow_from_the_raw_samples(tmp_path: Path) -> None:
    copy = tmp_path / "record"
    shutil.copytree(RECORD, copy)
    committed = {path.name: path.read_bytes() for path in copy.iterdir() if path.suffix in (".csv", ".md")}
    committed["summary.json"] = (copy / "summary.json").read_bytes()
    for name in committed:
        (copy / name).unlink()
    recompute(copy, Console(quiet=True))
    assert len(committed) in (15, 21), "five cases; with the ablation two more and its table"
    for name, content in committed.items():
        assert (copy / name).read_bytes() == content, name


def test_floors_hold(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = tmp_path / "summary.json"
    shutil.copy(RECORD / "summary.json", copy)
    monkeypatch.setattr("sys.argv", ["check_floors.py", str(copy)])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / "benchmarks" / "check_floors.py"), run_name="__main__")
    assert end.value.code == 0 and "MISS" not in capsys.readouterr().out


def test_the_readme_quotes_the_record() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for name in TABLES:
        first = (RECORD / f"{name}.md").read_text(encoding="utf-8").split("\n\n")[1]
        assert first in readme, f"the README's table is not that of {name}.md"
    summary = json.loads((RECORD / "summary.json").read_text())
    rows = {
        tuple(row[k] for k in ("case", "protocol", "metric", "pacing", "prompt_tokens")): row for row in summary["rows"]
    }

    def mean(case: str, protocol: str, metric: str, tokens: int) -> float:
        return float(rows[case, protocol, metric, "interactive", tokens]["mean"])

    lengths = [10, 50, 100, 150, 200, 250, 300, 350, 400, 500]
    products = [mean("linears", "ttft", "ttft_ms", n) for n in lengths]
    ratios = [mean("hybrid", "ttft", "ttft_ms", n) / one for n, one in zip(lengths, products, strict=True)]
    assert f"| matrix products alone, ms | {' | '.join(f'{one:.2f}' for one in products)} |" in readme
    assert f"| hybrid TTFT over that | {' | '.join(f'{one:.2f}' for one in ratios)} |" in readme
    after = {case: mean(case, "p99", "itl_ms", 10) for case in ("hybrid", "cuda-graph", "jit", "baseline")}
    late, one = mean("hybrid", "p99", "itl_ms", 500), mean("linears", "ttft", "ttft_ms", 1)
    text = re.sub(r"\s+", " ", readme)
    means = {case: f"{value:.2f}" for case, value in after.items()}
    for phrase in (
        f"Decoding takes {after['hybrid']:.2f} ms a token after 10 tokens and {late:.2f} after 500",
        f"{after['hybrid'] / one:.2f} and {late / one:.2f} times the matrix products of one token",
        f"case takes {means['cuda-graph']} ms, the JIT case {means['jit']}, transformers {means['baseline']}",
    ):
        assert phrase in text, phrase
