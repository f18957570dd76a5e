"""The runtime's benchmark: every part end to end on the tiny model, figures from known samples, floors that can be
missed, documents that quote the record, and the committed record itself."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from runtime_parts.command import PARTS
from runtime_parts.figures import FOLLOW, figures
from runtime_parts.floors import FLOORS, findings, value_of
from runtime_parts.quotes import BLOCKS, MORE_BLOCKS, PLACE, Missing, fill, rows_of
from runtime_parts.record import merged, read_raw, rounded
from runtime_parts.scale import FULL, QUICK
from runtime_parts.show import lines

ROOT = Path(__file__).resolve().parent.parent
RECORD = ROOT / "benchmarks" / "h200"
DOCUMENTS = ("README.md", "docs/research.md")
MOST_BYTES = 2_000_000


def script(name: str, *arguments: str) -> tuple[int, str]:
    """Exit code and output of a script in ``benchmarks/``."""
    command = [sys.executable, str(ROOT / "benchmarks" / name), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=280)
    return done.returncode, done.stdout + done.stderr


# ----------------------------------------------------------------------------------------------------------- end to end


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a quick run of every part; the soak has one layer, which is an option of its own."""
    folder = tmp_path_factory.mktemp("runtime")
    settings = ("--quick", "--model", "tiny", "--device", "cpu", "--soak-layers", "1")
    code, shown = script("runtime.py", "--output", str(folder), *settings)
    assert code == 0, shown
    return folder


def load(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "runtime.json").read_text(encoding="utf-8"))
    return found


def test_every_part_runs_and_proves_what_it_says(quick: Path) -> None:
    record, raw = load(quick), read_raw(quick)
    assert set(raw) == set(PARTS) == {*FOLLOW, "ceiling"}
    assert record["emulated"] and record["quick"] and record["environment"]["device_kind"] == "cpu"
    assert record["ceiling"]["read_tb_s"] > 0 and set(record["ceiling"]["linears_ms"]) == {
        "1",
        *map(str, QUICK.lengths),
    }
    found = record["figures"]
    assert set(found["ttft_over_linears"]) == set(map(str, QUICK.lengths))
    assert (found["unseen_first_padded"], found["unseen_later_exact"]) == (QUICK.unseen_lengths, QUICK.unseen_lengths)
    assert found["captures_beside_tokens"] == QUICK.capture_graphs
    assert found["isolated_unseen_first_padded"] == found["isolated_unseen_later_exact"] == QUICK.unseen_lengths
    assert set(found["isolated_ttft_over_linears"]) == set(map(str, QUICK.lengths))
    assert found["compiles_after_ready"] == found["captures_on_request_path"] == 0
    assert found["sweep_requests"] == 4 * len(QUICK.sweep_lengths)
    used = raw["sweep"]["counters"]["decode_graphs_used"]
    assert {f"decode/{rows}/{kind}" for rows in (1, 3) for kind in ("greedy", "full")} <= set(used)
    assert found["window_stream_tokens"] == QUICK.window_tokens and found["window_graph_growth_bytes"] == 0
    assert found["launches_per_step"] == {
        **{"cuda-graph": 1, "jit": 0, "jit-all": 0, "split": 5, "hybrid-steps": 1},
        "hybrid": pytest.approx(1 / 64),
    }, "the CPU launches nothing but (emulated) graphs; the tiny model's four layers stand between five of them"
    assert found["ready_warm_s"] > 0 and found["ready_cold_s"] > 0
    assert all(child["compiles_after_ready"] == 0 for child in raw["ready"]["counters"]["children"])


def test_the_soak_is_real(quick: Path) -> None:
    soak = read_raw(quick)["soak"]
    counters, looks = soak["counters"], soak["samples"]["memory"]
    assert soak["conditions"]["layers"] == 1 and counters["graphs_at_start"] == 50
    assert counters["cycles"] >= QUICK.soak_cycles <= min(counters["captures"] - 50, counters["evictions"])
    assert counters["recaptures"] > 0 and counters["thrash_alarms"] == 0 and counters["answers_changed"] == 0
    planted = {f"{stage}: InjectedFailure": count for stage, count in counters["planted"].items() if count}
    assert planted == counters["capture_failures"] and sum(planted.values()) >= 4
    assert [look[0] for look in looks] == sorted(look[0] for look in looks) and len(looks) >= 8


def test_runtime_json_follows_from_its_raw_files(quick: Path, tmp_path: Path) -> None:
    raw = read_raw(quick)
    assert load(quick) == json.loads(json.dumps(merged(raw)))
    assert sum(path.stat().st_size for path in (quick / "raw").iterdir()) < MOST_BYTES
    code, shown = script("check_runtime.py", str(quick / "runtime.json"))
    assert code == 1 and "MISS measured on a GPU, in full: False" in shown and "ok   compiles_after_ready: 0" in shown
    record = load(quick)
    record["figures"]["host_us_per_token"] = 1.0
    (tmp_path / "raw").symlink_to(quick / "raw")
    (tmp_path / "runtime.json").write_text(json.dumps(record))
    code, shown = script("check_runtime.py", str(tmp_path / "runtime.json"))
    assert code == 1 and "does not follow from" in shown
    code, shown = script("runtime.py", "--output", str(tmp_path), "--merge")
    assert code == 0 and load(tmp_path) == load(quick)


def test_parts_of_other_conditions_do_not_join(quick: Path, tmp_path: Path) -> None:
    before = (quick / "runtime.json").read_bytes()
    code, shown = script(
        "runtime.py", "--output", str(quick), "--parts", "ceiling", "--model", "tiny", "--device", "cpu"
    )
    assert code == 2 and "of another run (quick: True and False)" in shown
    assert (quick / "runtime.json").read_bytes() == before
    mixed = tmp_path / "mixed" / "raw"
    shutil.copytree(quick / "raw", mixed)
    other = json.loads((mixed / "runtime-host.json").read_text())
    other["environment"]["driver"] = "580.1"
    (mixed / "runtime-host.json").write_text(json.dumps(other))
    code, shown = script("runtime.py", "--output", str(mixed.parent), "--merge")
    assert code == 2 and "driver: 580.1 and None" in shown and not (mixed.parent / "runtime.json").exists()
    for arguments, said in (
        (("--parts", "ttfd"), "ttfd is no part"),
        (("--model", "no-such-model"), "'no-such-model' is no existing folder"),
        (("--merge",), "holds no part of this benchmark"),
    ):
        code, shown = script("runtime.py", "--output", str(tmp_path), "--device", "cpu", *arguments)
        assert code == 2 and said in shown and not (tmp_path / "runtime.json").exists()


# -------------------------------------------------------------------------------------------------------------- figures


def part(samples: dict[str, Any], counters: dict[str, Any] | None = None, **conditions: Any) -> dict[str, Any]:
    return {"samples": samples, "counters": counters or {}, "conditions": conditions}


def known() -> dict[str, dict[str, Any]]:
    """Raw records whose figures can be told by heart."""
    lengths = [str(n) for n in FULL.lengths]
    calm = [[4.0] * 100 for _ in range(8)]
    cases = {
        name: {"host_us_per_step": 10.0, "host_us_per_step_with_text": 15.0, "launches_per_step": 1.0}
        for name in ("cuda-graph", "jit", "jit-all", "split", "hybrid", "hybrid-steps")
    }
    look = [[0, 100, 10 * 2**20], [500, 200, 20 * 2**20], [10_000, 200, 24 * 2**20]]
    soak = {
        "graph_bytes": 2**20,
        "pool_bytes": 3 * 2**20,
        "cycles": 10_000,
        "planted": {"end": 7},
        "answers_changed": 0,
    }
    stream = {"stream_tokens": 20_000, "graph_bytes_before": 5, "graph_bytes_after": 5}
    unseen = {"first": {"padded": 50}, "later": {"exact": 150}}
    same = {"ttft": {"10": [2.0]}, "gaps": [[2.0]]}
    raw = {
        "ttft": part({"client": {n: [4.0, 5.0] for n in lengths}, "linears": {n: [4.0] for n in lengths}}),
        "decode": part({"gaps": {"10": [[4.0, 4.2]], "100": [[4.1]]}, "linears_1": [4.0, 4.2]}),
        "tails": part({"client": [5.0] * 1000, "gaps": [[4.0, 4.04] * 200] * 26}),
        "capturing": part({"gaps_capturing": calm, "gaps_idle": calm, "captures": [[*range(51), *[50] * 50]] * 8}),
        "unseen": part(
            {"first": {str(n): 5.5 for n in range(50)}, "exact": {str(n): [5.0, 5.0, 9.0] for n in range(50)}},
            unseen,
            repeats=3,
        ),
        "isolated": part(
            {
                **{name: {n: [4.0, 4.2] for n in lengths} for name in ("client_here", "linears")},
                "client": {n: [4.1, 4.3] for n in lengths},
                "gaps": [[4.0, 4.2]],
                "linears_1": [4.0],
                "tail_client": [5.0] * 1000,
                "tail_gaps": [[4.0] * 100] * 100,
                "first": {"7": 5.5},
                "exact": {"7": [5.0, 5.0, 9.0]},
            },
            unseen,
            repeats=3,
        ),
        "sweep": part({}, {"compiles": 0, "blocking_captures": 0, "requests": 2048}),
        "soak": part({"memory": look}, soak, growth_after_cycle=500),
        "ready": part({"cold_s": [30.0], "warm_s": [6.0, 8.0]}),
        "host": part({"cases": cases}, as_users_get_it="hybrid"),
        "window": part(
            {"long_prompt": [60.0], "blocks": [4.0, 4.2]},
            {**stream, "used_bytes_before": 0, "used_bytes_after": 2**20},
            long_prompt_tokens=4096,
        ),
        "invariant": part({"on": {"ttft": {"10": [3.0]}, "gaps": [[2.1]]}, "off": same}),
    }
    copied: dict[str, dict[str, Any]] = json.loads(json.dumps(raw))  # as from files: no two lists are one
    return copied


def test_figures_of_known_samples() -> None:
    found = figures(known())
    assert set(found["ttft_over_linears"].values()) == {1.125} and found["ttft_ms"]["500"] == 4.5
    assert found["decode_ms"] == 4.1 and found["decode_over_linears"] == 1.0
    assert found["ttft_p99_over_p50"] == 1.0 and found["ttft_requests"] == 1000
    assert found["itl_p99_over_p50"] == pytest.approx(4.04 / 4.02, rel=1e-5) and found["itl_tokens"] == 10_400
    assert found["itl_p99_over_p50_same_context"] == 1.0, "the place in the stream explains every difference"
    assert found["itl_p99_capturing_over_idle"] == 1.0 and found["captures_beside_tokens"] == 50
    assert found["itl_capturing_tokens"] == 8 * 50, "only the gaps up to the last capture count"
    assert found["unseen_length_over_exact"] == 1.1 and found["unseen_later_exact"] == 50
    assert found["isolated_ttft_added_us"] == pytest.approx(100) and found["isolated_ttft_ms"]["10"] == 4.2
    assert found["isolated_ttft_over_linears"]["10"] == pytest.approx(4.2 / 4.1, rel=1e-5)
    assert found["isolated_decode_over_linears"] == 1.025 and found["isolated_unseen_length_over_exact"] == 1.1
    assert (found["isolated_unseen_first_padded"], found["isolated_unseen_later_exact"]) == (50, 50)
    assert (found["soak_reserved_growth_bytes"], found["soak_device_growth_mib"], found["graphs_50_mib"]) == (
        0,
        4.0,
        4.0,
    )
    assert found["soak_failures"] == 7 and found["ready_warm_s"] == 7.0
    assert found["window_stream_ms_per_token"] == 4.1 and found["window_device_growth_mib"] == 1.0
    assert found["batch_invariant_cost"] == {"10": 1.5, "decode": 1.05}


def test_a_slow_gap_beside_a_capture_shows() -> None:
    raw = known()
    for stream in raw["capturing"]["samples"]["gaps_capturing"]:
        stream[10] = stream[20] = 8.0
        stream[70] = 100.0  # after the last capture: nobody's fault
    assert figures(raw)["itl_p99_capturing_over_idle"] == 2.0


def good() -> dict[str, Any]:
    """A record over all floors."""
    return {"figures": figures(known()), "emulated": False, "quick": False, "ceiling": {"flags": []}}


def test_a_good_record_holds() -> None:
    assert [one["figure"] for one in findings(good()) if not one["holds"]] == []
    assert len(findings(good())) == len(FLOORS) + 2


@pytest.mark.parametrize("floor", FLOORS, ids=lambda floor: floor.figure)
def test_each_floor_can_be_missed(floor: Any) -> None:
    for value in (floor.limit * 1.001 + 1e-3 if floor.relation == "<=" else floor.limit - 1, None):
        record = good()
        name, _, entry = floor.figure.partition(".")
        holder = record["figures"][name] if entry else record["figures"]
        holder[entry or name] = value
        missed = [one["figure"] for one in findings(record) if not one["holds"]]
        assert missed == [floor.figure], value
    assert value_of(good()["figures"], floor.figure) is not None


def test_what_is_no_measurement_does_not_pass() -> None:
    for change in ({"emulated": True}, {"quick": True}, {"ceiling": {"flags": ["read rate too low"]}}):
        assert sum(not one["holds"] for one in findings({**good(), **change})) == 1


def test_the_table_judges_full_runs_alone() -> None:
    record = {**good(), "floors": findings(good())}
    shown = list(lines(record))
    assert len([line for line in shown if line.endswith("ok")]) == len(FLOORS)
    record["figures"]["host_us_per_token"] = 30.0
    record["floors"] = findings(record)
    assert [line for line in lines(record) if line.endswith("MISS")] == [
        f"{'host_us_per_token':<42} {'30':>12}   <= 20   MISS"
    ]
    assert not [line for line in lines({**record, "quick": True}) if line.endswith(("ok", "MISS"))]


def test_rounding_keeps_small_values() -> None:
    assert rounded({"a": [5.123456, 1 / 64], "b": (3, "x", True)}) == {"a": [5.1235, 0.015625], "b": [3, "x", True]}


# ------------------------------------------------------------------------------------------------------------ documents


def places(name: str) -> Iterator[str]:
    """Names of the blocks that a document has a place for."""
    return (match[2] for match in PLACE.finditer((ROOT / name).read_text(encoding="utf-8")))


def test_documents_have_places_for_known_blocks() -> None:
    assert list(places("README.md")) == ["runtime"]
    assert set(BLOCKS) - {"runtime"} <= set(places("docs/research.md")) <= {*BLOCKS, *MORE_BLOCKS}


def test_figures_are_put_in_their_places() -> None:
    record = {"figures": figures(known()), "ceiling": {"linears_ms": {str(n): 4.0 for n in FULL.lengths}}}
    row = {
        "case": "jit",
        "protocol": "ttft",
        "metric": "ttft_ms",
        "prompt_tokens": 100,
        "pacing": "interactive",
        "mean": 9.5,
    }
    text = "A\n<!-- figures: attribution -->\nold\n<!-- /figures -->\nB\n"
    once = fill(text, record, {"rows": [row]})
    assert "old" not in once and once.startswith("A\n<!-- figures: attribution -->\n\n| ") and once.endswith("-->\nB\n")
    assert (
        "| JIT | 1 | 10 | 9.50 | \u2013 |" in once
        and "| JIT + CUDA graph, each step launched by the host | 1 |" in once
    )
    assert fill(once, record, {"rows": [row]}) == once
    assert fill(text, {"figures": {}}, {}) == text, "no figures, no change"
    with pytest.raises(KeyError):
        fill(text.replace("attribution", "nonsense"), record, {})
    for block in BLOCKS.values():
        assert len(block(record, {})) >= 4
        with pytest.raises(Missing):
            block({"figures": {}}, {})
    runtime = "\n".join(BLOCKS["runtime"](record, {}))
    assert "| TTFT over the matrix products alone, 10 to 500 tokens | 1.12 to 1.12 | 1.20 |" in runtime


def test_a_quick_run_is_not_quoted(quick: Path, tmp_path: Path) -> None:
    before = [(ROOT / name).read_bytes() for name in DOCUMENTS]
    code, shown = script("quote.py", str(quick))
    assert code == 2 and "is no measurement" in shown
    code, shown = script("quote.py", str(tmp_path))
    assert code == 2 and "has no runtime.json" in shown
    assert before == [(ROOT / name).read_bytes() for name in DOCUMENTS]


# --------------------------------------------------------------------------------------------------------------- record

needs_record = pytest.mark.skipif(
    not (RECORD / "runtime.json").exists(), reason="no run of record of the runtime's benchmark has been made yet"
)


@needs_record
def test_the_record_follows_from_its_raw_files_and_is_complete() -> None:
    raw = read_raw(RECORD)
    assert set(raw) == set(PARTS)
    assert load(RECORD) == json.loads(json.dumps(merged(raw)))
    assert not load(RECORD)["emulated"] and not load(RECORD)["quick"]
    assert sum(path.stat().st_size for path in (RECORD / "raw").glob("runtime-*.json")) < MOST_BYTES


@needs_record
@pytest.mark.parametrize("name", DOCUMENTS)
def test_documents_quote_the_record(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    summary = json.loads((RECORD / "summary.json").read_text(encoding="utf-8"))
    assert rows_of(summary)
    assert fill(text, load(RECORD), summary) == text, f"run benchmarks/quote.py: {name} does not quote the record"
