"""A benchmark run with fake cases: rows, tables, gate, merging, interruption, and what is said about each."""

from __future__ import annotations

import csv
import io
import json
import time
from pathlib import Path

import pytest
from bench_fakes import FakeCase, FakeLauncher, fast_and_slow
from rich.console import Console

from jitgraph.bench import jobs
from jitgraph.bench.cases.common import FirstToken
from jitgraph.bench.plan import CASES, FILE_STEMS, Options
from jitgraph.bench.process import Outcome
from jitgraph.bench.records import read_blocks
from jitgraph.bench.run import recompute, run_benchmark
from jitgraph.errors import ConfigError, JitgraphError, OutputError

ROW_FIELDS = {
    "case",
    "protocol",
    "metric",
    "pacing",
    "prompt_tokens",
    "n",
    "mean",
    "std",
    "p50",
    "p90",
    "p99",
    "p99_ci",
}
ROW_FIELDS |= {"min", "max", "ceiling_ms", "peak_memory_gib", "paths"}


@pytest.fixture(autouse=True)
def without_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """They take longer than everything else here, and have tests of their own."""
    monkeypatch.setattr("jitgraph.bench.report.missing_reason", lambda: "none in these tests")


def options(folder: Path, **settings: object) -> Options:
    defaults = {"prompt_lengths": (10, 100), "ttft_iterations": 5, "p99_iterations": 20, "pacing": "both"}
    return Options(output=str(folder), **{**defaults, **settings})  # type: ignore[arg-type]


def run(folder: Path, launcher: FakeLauncher, **settings: object) -> tuple[int, str]:
    """Exit code and what the terminal showed."""
    console = Console(record=True, width=160, file=io.StringIO())
    return run_benchmark(options(folder, **settings), console, launcher), console.export_text()


def summary(folder: Path) -> dict:  # type: ignore[type-arg]
    found = json.loads((folder / "summary.json").read_text())
    assert isinstance(found, dict)
    return found


def cell_rows(folder: Path, **wanted: object) -> list[dict]:  # type: ignore[type-arg]
    return [row for row in summary(folder)["rows"] if all(row[name] == value for name, value in wanted.items())]


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        return list(csv.DictReader(file))


def test_full_run_writes_every_file_and_row(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    code, shown = run(folder, fast_and_slow())
    assert code == 0
    for stem in (FILE_STEMS[case] for case in CASES):
        assert (folder / f"{stem}_ttft.csv").exists() and (folder / f"{stem}_p99.csv").exists()
    found = summary(folder)
    assert found["schema"] == 1 and found["ceiling"]["read_tb_s"] == 2.0 and found["model"]["name"] == "fake"
    assert all(row.keys() >= ROW_FIELDS for row in found["rows"])
    (row,) = cell_rows(folder, case="hybrid", protocol="p99", metric="ttft_ms", pacing="sustained", prompt_tokens=100)
    assert row["n"] == 20 and row["paths"] == {"exact": 20, "padded": 0, "eager": 0}
    assert row["ceiling_ms"] == 10.0 and row["ratio"] == pytest.approx(row["mean"] / 10.0)
    assert row["peak_memory_gib"] == 3.0 and row["emulated"] and row["device"] == "Fake GPU"
    (ready,) = cell_rows(folder, case="hybrid", metric="ready_s")
    assert ready["mean"] == 1.5 and ready["protocol"] == "warmup"
    (itl,) = cell_rows(folder, case="jit", protocol="p99", metric="itl_ms", pacing="interactive", prompt_tokens=10)
    assert itl["n"] == 63 and itl["mean"] == pytest.approx(1.2)
    assert itl["ceiling_ms"] == pytest.approx((2e9 + 42 * 1e6) / 2e9)
    assert len(cell_rows(folder, protocol="warmup", metric="ttft_ms", case="baseline")) == 2
    assert "Ceilings of Fake GPU" in shown and "JIT + CUDA graph" in shown
    assert not list(folder.glob("ablation_*")), "nobody asked for it"


def test_final_table_names_the_winner_and_leaves_cells_empty(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    run(folder, fast_and_slow())
    lines = read_csv(folder / "final_ttft_table.csv")
    assert [line["Prompt tokens"] for line in lines] == ["10", "100", "AVERAGE"] * 2
    assert [line["Pacing"] for line in lines] == ["interactive"] * 3 + ["sustained"] * 3
    assert {line["Winner"] for line in lines} == {"JIT + CUDA graph (emulated)"}
    assert all(line["TensorRT-LLM"] == "" for line in lines)
    assert lines[0]["HF baseline (emulated)"].startswith("20.0") and " ± " in lines[0]["HF baseline (emulated)"]
    text = (folder / "final_ttft_table.md").read_text(encoding="utf-8")
    assert "**JIT + CUDA graph (emulated)** |" in text and "**AVERAGE**" in text and "(emulated)" in text
    assert "TensorRT-LLM: not installed: run the script." in text
    assert text.index("interactive pacing") < text.index("sustained pacing")
    case5 = read_csv(folder / "case5_tensorrt_llm_p99.csv")
    assert len(case5) == 4 and case5[0]["note"] == "not installed: run the script" and case5[0]["mean"] == ""


def test_the_ablation_joins_the_five_cases_and_has_a_table_of_its_own(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    run(folder, fast_and_slow())
    five = {name: (folder / f"{name}.md").read_bytes() for name in ("final_ttft_table", "final_p99_table")}
    code, shown = run(folder, fast_and_slow(), cases=("jit-all", "split"), pacing="interactive")
    assert code == 0 and "What each part is worth, mean ± std, interactive pacing" in shown
    assert five == {name: (folder / f"{name}.md").read_bytes() for name in five}, "five columns stay five"
    table = read_csv(folder / "ablation_table.csv")
    assert [line[""] for line in table if line["Pacing"] == "interactive"] == [
        "TTFT at 10 tokens, ms",
        "TTFT at 100 tokens, ms",
        "decoding after 10 tokens, ms",
        "decoding after 100 tokens, ms",
        "launches per decode step",
        "host time per decode step, µs",
    ]
    titles = ["CUDA graph", "JIT", "JIT for all ops", "JIT beside CUDA graphs", "JIT + CUDA graph"]
    assert list(table[0]) == ["Pacing", "", *(f"{one} (emulated)" for one in titles), "Conditions"]
    launches = table[4]
    assert [launches[f"{one} (emulated)"] for one in titles] == ["9.0", "12.0", "15.0", "7.0", "5.0"]
    assert table[5]["JIT for all ops (emulated)"] == "0.15"
    (row,) = cell_rows(folder, case="split", protocol="p99", metric="ttft_ms", prompt_tokens=100)
    assert table[1]["JIT beside CUDA graphs (emulated)"] == f"{row['mean']:.2f} ± {row['std']:.2f}"
    assert table[-6]["Pacing"] == "sustained" and table[-6]["JIT beside CUDA graphs (emulated)"] == ""
    text = (folder / "ablation_table.md").read_text(encoding="utf-8")
    assert "| launches per decode step | 9.0 | 12.0 | 15.0 | 7.0 | 5.0 |" in text
    assert (folder / "ablation_split_ttft.csv").exists() and (folder / "ablation_jit_all_p99.csv").exists()


def test_average_row_is_the_mean_of_its_column(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    run(folder, fast_and_slow(), pacing="interactive")
    lines = read_csv(folder / "final_p99_table.csv")
    rows = cell_rows(folder, case="jit", protocol="p99", metric="ttft_ms")
    assert float(lines[-1]["JIT (emulated)"]) == pytest.approx(sum(row["p99"] for row in rows) / 2, abs=0.006)


def test_tables_come_from_the_raw_samples_alone(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    run(folder, fast_and_slow())
    made = {
        path.name: path.read_bytes() for path in folder.iterdir() if path.is_file() and path.name != "environment.json"
    }
    for name in made:
        (folder / name).unlink()
    recompute(folder, Console(quiet=True))
    assert {name: (folder / name).read_bytes() for name in made} == made
    samples = folder / "raw" / "hybrid.jsonl"
    lines = [json.loads(line) for line in samples.read_text().splitlines()]
    for line in lines:
        if line["kind"] == "sample" and line["protocol"] == "ttft" and line["prompt_tokens"] == 10:
            line["value_ms"] = 99.0
    samples.write_text("".join(json.dumps(line) + "\n" for line in lines))
    recompute(folder, Console(quiet=True))
    assert read_csv(folder / "final_ttft_table.csv")[0]["JIT + CUDA graph (emulated)"] == "99.00 ± 0.00"


def test_a_case_with_wrong_tokens_gets_no_times(tmp_path: Path) -> None:
    folder, launcher = tmp_path / "out", fast_and_slow()
    launcher.cases["jit"] = FakeCase(1.0, token_id=8)
    code, shown = run(folder, launcher)
    assert code == 1 and "correctness gate failed, no times given" in shown
    assert cell_rows(folder, case="jit") == [] and cell_rows(folder, case="hybrid")
    assert summary(folder)["cases"]["jit"]["status"] == jobs.GATE_FAILED
    assert {line["Winner"] for line in read_csv(folder / "final_ttft_table.csv")} == {"JIT + CUDA graph (emulated)"}


def test_without_a_reference_nothing_is_timed_unless_asked(tmp_path: Path) -> None:
    launcher = fast_and_slow()
    launcher.gate = Outcome("not installed", "not installed: pip install 'jitgraph[bench]' brings transformers")
    code, shown = run(tmp_path / "gated", launcher)
    assert code == 1 and "--no-gate measures without it" in shown
    assert {row["case"] for row in summary(tmp_path / "gated")["rows"]} == {"linears"}
    code, _ = run(tmp_path / "ungated", launcher, gated=False)
    assert code == 0
    assert all("ungated" in row["notes"] for row in cell_rows(tmp_path / "ungated", case="hybrid"))
    assert "Ungated" in (tmp_path / "ungated" / "final_p99_table.md").read_text(encoding="utf-8")


def test_cases_can_be_run_one_by_one_into_one_folder(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    first, second = fast_and_slow(), fast_and_slow()
    run(folder, first, cases=("baseline",))
    run(folder, second, cases=("hybrid",))
    assert first.kinds == ["prepare", "gate", "ceiling", "baseline"]
    assert second.kinds == ["prepare", "hybrid"], "reference and ceiling are those of the folder"
    assert {row["case"] for row in summary(folder)["rows"]} == {"baseline", "hybrid", "linears"}
    third = fast_and_slow()
    third.cases["hybrid"] = FakeCase(6.0)
    run(folder, third, cases=("hybrid",), prompt_lengths=(10, 50, 100))
    assert third.kinds == ["prepare", "gate", "ceiling", "hybrid"], "a new length needs both"
    (row,) = cell_rows(folder, case="hybrid", protocol="ttft", metric="ttft_ms", pacing="interactive", prompt_tokens=10)
    assert 6.0 < row["mean"] < 7.0


def test_another_study_is_not_mixed_in(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    run(folder, fast_and_slow(), cases=("baseline",))
    with pytest.raises(OutputError, match=r"holds another study \(seed: 0 and 1\): choose another --output"):
        run(folder, fast_and_slow(), cases=("hybrid",), seed=1)
    elsewhere = fast_and_slow()
    elsewhere.device_name = "Other GPU"
    with pytest.raises(OutputError, match="device_name: Fake GPU and Other GPU"):
        run(folder, elsewhere, cases=("hybrid",))
    run(folder, elsewhere, cases=CASES)
    assert summary(folder)["environment"]["device_name"] == "Other GPU", "a run of all cases begins anew"


def test_interrupted_run_keeps_what_was_measured(tmp_path: Path) -> None:
    folder, launcher = tmp_path / "out", fast_and_slow()
    launcher.cases["jit"] = FakeCase(12.0, stop_after=4 + 7)
    code, shown = run(folder, launcher, pacing="interactive")
    assert code == 130 and "Interrupted: what was measured is kept" in shown
    assert "hybrid" not in launcher.kinds
    rows = cell_rows(folder, case="jit", protocol="ttft", metric="ttft_ms")
    assert [(row["prompt_tokens"], row["n"]) for row in rows] == [(10, 5), (100, 2)]
    assert rows[1]["paths"]["exact"] == 2 and all("interrupted" in row["notes"] for row in rows)
    assert "JIT: interrupted" in (folder / "final_ttft_table.md").read_text(encoding="utf-8")
    jit = read_csv(folder / "final_ttft_table.csv")
    assert jit[-1]["JIT (emulated)"] != "" and read_csv(folder / "final_p99_table.csv")[-1]["JIT (emulated)"] == ""


def test_earlier_results_are_put_aside_and_complete_rows_kept(tmp_path: Path) -> None:
    """A new run of everything moves the old one whole; a run of one case that is cut short leaves the complete rows."""
    folder = tmp_path / "out"
    run(folder, fast_and_slow(), pacing="interactive")
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    launcher = fast_and_slow()
    launcher.cases["baseline"] = FakeCase(12.0, stop_after=4)
    code, shown = run(folder, launcher, pacing="interactive")
    assert code == 130 and "The earlier results are in" in shown
    assert {path.name: path.read_bytes() for path in (folder / "earlier-1").iterdir() if path.is_file()} == before
    recompute(folder / "earlier-1", Console(quiet=True))
    assert summary(folder / "earlier-1")["rows"] and not cell_rows(folder, case="hybrid")

    other = tmp_path / "other"
    run(other, fast_and_slow(), pacing="interactive")
    rows = cell_rows(other, case="jit")
    launcher = fast_and_slow()
    launcher.cases["jit"] = FakeCase(1.0, stop_after=6)
    code, _ = run(other, launcher, cases=("jit",), pacing="interactive")
    assert code == 130 and cell_rows(other, case="jit") == rows
    code, shown = run(other, fast_and_slow(), cases=("jit",), pacing="interactive", max_minutes=1e-9)
    assert cell_rows(other, case="jit") == rows and "rows of an earlier run are kept" in shown
    launcher.cases["jit"] = FakeCase(1.0, token_id=8)
    run(other, launcher, cases=("jit",), pacing="interactive")
    assert cell_rows(other, case="jit") == [], "a case that fails its gate has no times, old ones neither"


def test_another_studys_reference_is_never_reused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that ended before any sample leaves a reference behind; the next study makes its own."""
    folder, first, second = tmp_path / "out", fast_and_slow(), fast_and_slow()
    monkeypatch.setattr(first, "ceiling", lambda job: Outcome(jobs.INTERRUPTED))
    assert run(folder, first)[0] == 130 and (folder / "raw" / "gate.json").exists()
    assert run(folder, second, seed=1)[0] == 0
    assert "gate" in second.kinds and not list(folder.glob("earlier-*"))


def test_a_case_that_crashes_when_run_again_keeps_its_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether it fails cleanly, blows up in this process, or is never started; its facts stay with its rows."""
    folder = tmp_path / "out"
    run(folder, fast_and_slow(), pacing="interactive")
    rows = cell_rows(folder, case="hybrid")
    assert rows[0]["emulated"]
    for break_it in (lambda job: Outcome(jobs.FAILED, "out of memory"), _blow_up):
        launcher = fast_and_slow()
        monkeypatch.setattr(launcher, "case", break_it)
        if break_it is _blow_up:
            with pytest.raises(RuntimeError):
                run(folder, launcher, cases=("hybrid",), pacing="interactive")
        else:
            assert run(folder, launcher, cases=("hybrid",), pacing="interactive")[0] == 1
        assert cell_rows(folder, case="hybrid") == rows
    launcher = fast_and_slow()
    launcher.gate = Outcome(jobs.FAILED, "no memory")
    assert run(folder, launcher, cases=("hybrid",), pacing="interactive", prompt_lengths=(10, 20))[0] == 1
    assert cell_rows(folder, case="hybrid") == rows
    for name in ("hybrid.json", "hybrid.jsonl"):  # what a kill in the middle of a case leaves
        (folder / "raw" / name).rename(folder / "raw" / (name + ".earlier"))
    (folder / "raw" / "hybrid.json").write_text('{"status": "running"}')
    run(folder, fast_and_slow(), cases=("hybrid",), pacing="interactive", max_minutes=1e-9)
    assert cell_rows(folder, case="hybrid") == rows and not list((folder / "raw").glob("*.earlier"))


def _blow_up(job: jobs.Job) -> Outcome:
    raise RuntimeError("a defect")


def test_tokens_are_checked_at_every_request(tmp_path: Path) -> None:
    class Fickle(FakeCase):
        def first_token(self, token_ids: list[int]) -> FirstToken:
            token = super().first_token(token_ids)
            return FirstToken(8, token.client_ms, token.engine_ms) if self.requests == 30 else token

    launcher = fast_and_slow()
    launcher.cases["jit"] = Fickle(12.0)
    code, shown = run(tmp_path / "out", launcher, pacing="interactive")
    assert code == 1 and "gave another first token than the reference" in shown


def test_a_refused_run_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    launcher = fast_and_slow()
    monkeypatch.setattr(launcher, "prepare", lambda job: Outcome(jobs.FAILED, "no such model"))
    with pytest.raises(JitgraphError, match="no such model"):
        run(tmp_path / "out", launcher)
    assert not (tmp_path / "out").exists()


def test_disturbed_cells_are_remarked_on(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    run(folder, fast_and_slow(), pacing="interactive")
    assert "times the median" not in (folder / "final_p99_table.md").read_text(encoding="utf-8")
    samples = folder / "raw" / "hybrid.jsonl"
    lines = [json.loads(line) for line in samples.read_text().splitlines()]
    late = [
        line for line in lines if line.get("protocol") == "p99" and line["metric"] == "ttft_ms" and "value_ms" in line
    ]
    late[0]["value_ms"] = 900.0
    samples.write_text("".join(json.dumps(line) + "\n" for line in lines))
    recompute(folder, Console(quiet=True))
    told = (folder / "final_p99_table.md").read_text(encoding="utf-8")
    assert "P99 is over 3 times the median in JIT + CUDA graph (TTFT at 10 tokens)" in told


def test_nothing_measured_is_a_failure(tmp_path: Path) -> None:
    code, shown = run(tmp_path / "out", fast_and_slow(), cases=("tensorrt-llm",), pacing="interactive")
    assert code == 1 and "not installed" in shown


def test_time_limit_stops_between_rows(tmp_path: Path) -> None:
    folder, launcher = tmp_path / "out", fast_and_slow()
    case = FakeCase(9.0)
    slow = case.first_token

    def first_token(token_ids: list[int]):  # type: ignore[no-untyped-def]
        if case.requests == 12:
            time.sleep(4.0)
        return slow(token_ids)

    case.first_token = first_token  # type: ignore[method-assign]
    launcher.cases["cuda-graph"] = case
    code, shown = run(folder, launcher, max_minutes=3 / 60)
    assert code == 0 and "the time limit was reached; rows not measured yet are missing" in shown
    status = {name: facts["status"] for name, facts in summary(folder)["cases"].items()}
    assert status["cuda-graph"] == status["hybrid"] == jobs.TIME_LIMIT and status["baseline"] == jobs.COMPLETE
    assert all(row["n"] in (1, 5, 20, 63) for row in cell_rows(folder, case="cuda-graph")), "no row is cut"


def test_a_killed_run_is_marked_and_its_torn_line_left_out(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    run(folder, fast_and_slow(), cases=("hybrid",))
    samples = folder / "raw" / "hybrid.jsonl"
    samples.write_text(samples.read_text() + '{"kind": "sample", "case": "hy')
    (folder / "raw" / "hybrid.json").write_text('{"status": "running", "emulated": true}')
    recompute(folder, Console(quiet=True))
    assert all("interrupted" in row["notes"] for row in cell_rows(folder, case="hybrid"))
    samples.write_text("not a record\n" + samples.read_text())
    with pytest.raises(OutputError, match=r"line 1 of .*hybrid\.jsonl is no benchmark record"):
        read_blocks(samples)


def test_bad_folders_and_interpreters_stop_the_run_at_once(tmp_path: Path) -> None:
    launcher = fast_and_slow()
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(OutputError, match="cannot be written"):
        run(file / "out", launcher)
    with pytest.raises(ConfigError, match="there is no such program"):
        run(tmp_path / "out", launcher, pythons={"tensorrt-llm": str(tmp_path / "python")})
    assert launcher.kinds == []
    with pytest.raises(OutputError, match="holds no benchmark run"):
        recompute(tmp_path, Console(quiet=True))
