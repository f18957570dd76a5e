"""``benchmarks/load_agreement.py``: its record, how it reads AIPerf's export, AIPerf itself where it is installed."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from load_agreement import CONDITIONS, RECORD, compare, verdicts
from load_parts.tools import FIGURES, MEDIANS, Condition, of_samples, read_aiperf


def record() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(RECORD.read_text(encoding="utf-8"))
    return found


def test_the_record_says_that_the_tools_agree() -> None:
    found = record()
    assert found["agree"] and all(one["agree"] for one in verdicts(found))
    for row, condition in zip(found["rows"], CONDITIONS, strict=True):
        assert Condition(**row["condition"]) == condition and row["schedule"] == condition.truth()


@pytest.mark.parametrize(("who", "names"), [("jitgraph", MEDIANS), ("aiperf", MEDIANS), ("aiperf_samples", FIGURES)])
def test_a_figure_that_is_apart_is_found(who: str, names: tuple[str, ...]) -> None:
    for name in names:
        found = copy.deepcopy(record())
        found["rows"][1][who][name] *= 1.06
        assert [one["agree"] for one in verdicts(found)] == [True, False, True], name


def test_the_schedules_figures() -> None:
    truth = Condition(ttft_ms=100, gap_ms=20, tokens=51, concurrency=2, requests=4).truth()
    assert truth == {"ttft_ms": 100, "tpot_ms": 20, "e2e_ms": 1100, "output_tokens_per_s": pytest.approx(2 * 51 / 1.1)}


def test_figures_of_aiperfs_own_requests() -> None:
    """Two requests of three tokens, in the shape of AIPerf 0.13's exports."""
    requests = [
        {
            "metadata": {"request_start_ns": start * 10**6, "request_end_ns": (start + 200) * 10**6},
            "metrics": {
                "output_sequence_length": {"value": 3, "unit": "tokens"},
                "time_to_first_token": {"value": 100.0, "unit": "ms"},
                "inter_chunk_latency": {"value": [20.0, 40.0], "unit": "ms"},
            },
        }
        for start in (10**6, 10**6 + 200)
    ]
    wanted = {"ttft_ms": 100.0, "tpot_ms": 30.0, "e2e_ms": 160.0, "output_tokens_per_s": 15.0}
    assert of_samples(requests) == pytest.approx(wanted)
    export = {
        "time_to_first_token": {"unit": "ms", "avg": 9.0, "p50": 100.0},
        "inter_token_latency": {"unit": "ms", "avg": 9.0, "p50": 30.0},
        "request_latency": {"unit": "ms", "avg": 9.0, "p50": 160.0},
        "output_token_throughput": {"unit": "tokens/sec", "avg": 15.0},
    }
    assert read_aiperf(export) == wanted


@pytest.mark.skipif(shutil.which("aiperf") is None, reason="aiperf is not on PATH")
@pytest.mark.timeout(300)
def test_aiperf_itself_agrees() -> None:
    aiperf = shutil.which("aiperf")
    assert aiperf is not None
    row = compare(Condition(ttft_ms=400, gap_ms=20, tokens=50, concurrency=2, requests=8), aiperf)
    (said,) = verdicts({"rows": [row]})
    assert said["agree"], said


def test_without_aiperf_the_script_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch, capsys: Any, tmp_path: Path
) -> None:
    import load_agreement

    monkeypatch.setattr("sys.argv", ["load_agreement.py", "--output", str(tmp_path / "x.json")])
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SystemExit) as caught:
        load_agreement.main()
    assert caught.value.code == 2 and "pip install aiperf" in capsys.readouterr().err
