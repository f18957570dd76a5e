"""The benchmark of what the service survives: its verdicts, its record, and what it takes for growth and drift."""

from __future__ import annotations

import asyncio
import json
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import httpx
import ipc
import pytest
from reliability_parts import command, record, soak
from reliability_parts import lab as module
from reliability_parts.answers import Known
from reliability_parts.frames import broken_stream
from reliability_parts.lab import Lab
from reliability_parts.soak import Findings, Soak, growth_mib, p99_drift

from jitgraph.errors import OutputError
from jitgraph.types import SamplingParams

ROOT = Path(__file__).resolve().parents[1]
GOOD = {floor.figure: floor.limit for floor in record.FLOORS}


def verdicts(figures: dict[str, float], device: str = "cpu") -> dict[str, bool]:
    found = record.findings({"figures": figures, "parts": {"soak": {"device": device}}})
    return {one["figure"]: one["holds"] for one in found}


def test_a_figure_at_its_floor_holds_and_a_missing_one_does_not() -> None:
    assert all(verdicts(GOOD).values())
    for floor in record.FLOORS:
        without = {name: value for name, value in GOOD.items() if name != floor.figure}
        assert not verdicts(without)[floor.figure]
        worse = floor.limit - 1 if floor.relation == ">=" else floor.limit + 1
        assert not verdicts({**GOOD, floor.figure: worse})[floor.figure]


def test_on_a_gpu_the_soak_is_shorter_and_memory_there_counts() -> None:
    assert not verdicts({**GOOD, "soak_s": 540})["soak_s"]
    on_gpu = {**GOOD, "soak_s": 540, **{floor.figure: floor.limit for floor in record.GPU_FLOORS}}
    assert all(verdicts(on_gpu, "cuda:0").values())
    assert "cancels" not in verdicts(on_gpu, "cuda"), "what takes no GPU stands in the record of a CPU"
    for floor in record.GPU_FLOORS:
        assert not verdicts({**on_gpu, floor.figure: floor.limit + 1}, "cuda")[floor.figure]
        assert floor.figure not in verdicts(GOOD)


def test_memory_that_a_server_leaves_is_waited_for_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    def lab(device: str) -> Lab:
        return Lab("tiny", "checkpoint", device, print, 1, 1, 1, True, ROOT)

    assert lab("cpu").gpu_used_mib() is None and lab("cpu").gpu_held(None) == {}
    used = iter([900.0, 500.0, 100.0])
    monkeypatch.setattr(Lab, "gpu_used_mib", lambda self: next(used))
    assert lab("cuda").gpu_held(100.0) == {"gpu_held_mib": 0.0}
    monkeypatch.setattr(Lab, "gpu_used_mib", lambda self: 130.0)
    monkeypatch.setattr(module, "FREED_S", 0.0)
    assert lab("cuda").gpu_held(100.0) == {"gpu_held_mib": 30.0}


def test_parts_are_added_and_replaced(tmp_path: Path) -> None:
    path = tmp_path / "reliability.json"
    record.add(path, "kill", {"recovery_s": 1.23456, "kill_faults": 3}, {"device": "cpu"})
    record.add(path, "cancels", {"cancels": 10}, {"device": "cpu"})
    record.add(path, "kill", {"recovery_s": float("inf")}, {"device": "cpu"})
    document = json.loads(path.read_text())
    assert document["figures"] == {"recovery_s": None, "cancels": 10}
    assert document["parts"]["kill"] == {"device": "cpu", "figures": ["recovery_s"]}
    assert [child.name for child in tmp_path.iterdir()] == ["reliability.json"]
    path.write_text("[]")
    with pytest.raises(OutputError, match="move it away"):
        record.read(path)


def test_growth_is_from_warm_to_the_end() -> None:
    assert growth_mib([100.0] * 10 + [150.0] * 90) == 0.0
    assert growth_mib([100.0 + n for n in range(100)]) == pytest.approx(80.0)
    assert growth_mib([5.0]) == 0.0


def test_drift_compares_the_last_third_with_the_first() -> None:
    steady = [(float(n), 0.01) for n in range(300)]
    assert p99_drift(steady) == pytest.approx(0.0)
    assert p99_drift([*steady[:200], *((n, 0.02) for n, _ in steady[200:])]) == pytest.approx(1.0)
    assert p99_drift([(0.0, 1.0)]) == float("inf")


def test_only_what_a_kill_touches_is_explained_by_it() -> None:
    found = Findings(troubles=[[10.0, 20.0], [50.0, float("inf")]])
    assert not found.in_trouble(1.0, 9.0)
    assert found.in_trouble(9.0, 11.0)
    assert found.in_trouble(19.0, 25.0)
    assert not found.in_trouble(21.0, 49.0)
    assert found.in_trouble(60.0, 61.0)


def test_a_probe_with_a_wrong_answer_is_found() -> None:
    """The smallest answers of the soak are compared like all others."""
    probe = Known([5], SamplingParams(max_tokens=2), "right", "length")
    lab = SimpleNamespace(minutes=0.001, model="m", probe=lambda: probe)
    texts = iter(["right", "wrong"])

    def answer(_: httpx.Request) -> httpx.Response:
        event = {"choices": [{"text": next(texts, "wrong"), "finish_reason": "length"}]}
        return httpx.Response(200, text=f"data: {json.dumps(event)}\n\ndata: [DONE]\n\n")

    async def main() -> Findings:
        transport = httpx.MockTransport(answer)
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
            run = Soak(cast(Any, lab), cast(Any, SimpleNamespace(url=lambda: "http://x")), client)
            run.seconds = 2.2 * soak.PROBE_S
            await run._probe_on()
            return run.found

    found = asyncio.run(main())
    assert found.right == 1 and found.wrong and set(found.wrong) == {"'wrong'"} and not found.unexplained


def test_no_broken_stream_asks_the_engine_to_end() -> None:
    rng = random.Random(0)
    streams = [broken_stream(rng) for _ in range(500)]
    assert len(set(streams)) > 400
    assert not any(b"Drain" in stream for stream in streams)


def test_the_cost_of_a_process_comes_from_its_own_benchmark(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    samples = {"here_ttft": [1000.0] * 3, "apart_ttft": [1080.0] * 3, "here_itl": [5.0], "apart_itl": [7.5]}
    engines = {"emulated": False, "conditions": {"model": "m"}, "samples": samples}
    where = {"device": "cuda:0", "device_name": "a GPU"}
    given, path = tmp_path / "ipc.json", tmp_path / "reliability.json"
    given.write_text(json.dumps({"environment": where, "channel": {}, "engines": engines}))
    assert command.main(["--parts", "ipc", "--ipc-record", str(given), "--output", str(path)]) == 0
    document = json.loads(path.read_text())
    assert document["figures"] == {"ipc_ttft_us_p50": 80.0, "ipc_ttft_us_p99": 80.0, "ipc_token_us_p50": 2.5}
    part = document["parts"]["ipc"]
    assert (part["measured_on"], part["device"], part["model"]) == ("a GPU", "cuda:0", "m"), "the record's, not ours"
    assert part["samples"]["apart_ttft"] == 3
    given.write_text("{}")
    assert command.main(["--parts", "ipc", "--ipc-record", str(given), "--output", str(path)]) == 1
    assert "is no raw record of benchmarks/ipc.py" in capsys.readouterr().err


def test_the_committed_record_holds_and_is_quoted() -> None:
    found = record.read(ROOT / "benchmarks" / "reliability.json")
    assert [one for one in record.findings(found) if not one["holds"]] == []
    assert not any(part.get("quick") for part in found["parts"].values()) and set(found["parts"]) == set(command.PARTS)
    text = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    assert "<!-- figures: reliability -->" in text
    assert record.quoted(text, found) == text, "run benchmarks/reliability.py --check --quote"
    raw = json.loads((ROOT / "benchmarks" / "h200" / "raw" / "ipc.json").read_text())
    taken = {name: round(value, 4) for name, value in ipc.figures(raw)["figures"].items()}
    assert taken == {name: found["figures"][name] for name in taken}


def test_the_committed_record_of_a_gpu_holds_and_is_quoted() -> None:
    found = record.read(ROOT / "benchmarks" / "h200" / "reliability.json")
    assert [one for one in record.findings(found) if not one["holds"]] == []
    assert set(found["parts"]) == set(record.GPU_PARTS)
    for part in found["parts"].values():
        assert part["device"].startswith("cuda") and not part["quick"]
    text = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    assert "<!-- figures: reliability on a GPU -->" in text
    assert record.quoted(text, found) == text, "run benchmarks/reliability.py --check --quote --output RECORD"


def test_mistakes_of_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(tmp_path / "reliability.json")
    assert command.main(["--parts", "kil", "--output", path]) == 2
    assert "kil is no part; choose from ipc, kill" in capsys.readouterr().err
    assert command.main(["--check", "--output", path]) == 1
    record.add(Path(path), "kill", GOOD, {})
    assert command.main(["--check", "--output", path]) == 0
    assert "ok   recovery_s" in capsys.readouterr().out
