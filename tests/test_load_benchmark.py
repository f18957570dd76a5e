"""``benchmarks/load_speed.py``: it runs, its figures follow from its samples, and it notices a wrong byte."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import load_speed
import pytest

from jitgraph.model import presets
from jitgraph.model.loader import load_model

SMALL = {"hidden_size": 64, "intermediate_size": 96, "vocab_size": 500, "num_hidden_layers": 6}


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The preset at a size for tests, in several files."""
    shapes = {**presets.PRESETS[load_speed.PRESET], **SMALL, "num_attention_heads": 4, "num_key_value_heads": 4}
    monkeypatch.setattr(presets, "PRESETS", {**presets.PRESETS, load_speed.PRESET: shapes})
    monkeypatch.setattr(load_speed, "SHARD_BYTES", 100_000)


@pytest.mark.parametrize("cache", ["warm", "dropped"])
def test_figures_follow_from_the_samples(tmp_path: Path, cache: str, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "load.json"
    arguments = ["--device", "cpu", "--cache", cache, "--rounds", "2", "--folder", str(tmp_path)]
    assert load_speed.main([*arguments, "--output", str(output)]) == 0
    found = json.loads(output.read_text())
    rates = {name: statistics.median(values) for name, values in found["samples_gb_s"].items()}
    assert (
        found["gb_s"] == rates
        and min(rates.values()) > 0
        and all(len(values) == 2 for values in found["samples_gb_s"].values())
    )
    assert found["ratio"] == pytest.approx(rates["load"] / min(rates["cat"], rates["device"]))
    assert (found["cache"], found["device"], found["holds"]) == (cache, "cpu", None)
    made = found["checkpoint"]
    assert made["layers"] == 6 and made["files"] > 1 and found["tensors_compared"] >= load_speed.COMPARED
    assert f"page cache {cache}" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["load.json"], "the checkpoint is gone"


def test_the_record_and_what_is_told_of_it() -> None:
    """The committed figures follow from their samples, hold, and are what the documentation shows."""
    root = Path(__file__).resolve().parents[1]
    found = json.loads((root / "benchmarks/h200/load.json").read_text(encoding="utf-8"))
    rates = {name: statistics.median(values) for name, values in found["samples_gb_s"].items()}
    assert found["gb_s"] == rates and found["checkpoint"]["layers"] == 32
    assert found["ratio"] == pytest.approx(rates["load"] / min(rates["cat"], rates["device"]))
    assert found["holds"] is True and found["ratio"] >= load_speed.FLOOR
    shown = "\n".join(load_speed.lines(found))
    assert f"```\n{shown}\n```" in (root / "docs/models.md").read_text(encoding="utf-8")


def test_a_size_in_gib_takes_layers_away(tmp_path: Path) -> None:
    size, layers = load_speed.write_checkpoint(tmp_path, 400_000 / 2**30)
    assert 1 < layers < 6 and size <= 400_000
    assert load_model(str(tmp_path), device="cpu").spec.num_layers == layers


def test_a_wrong_byte_is_noticed(tmp_path: Path) -> None:
    load_speed.write_checkpoint(tmp_path, None)
    weights = load_model(str(tmp_path), device="cpu", dtype="float16").weights
    assert load_speed.compare(tmp_path, weights) >= load_speed.COMPARED
    weights.embedding[7, 7] += 1
    with pytest.raises(SystemExit, match="is not what safetensors reads"):
        load_speed.compare(tmp_path, weights)


def test_no_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load_speed.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 10}))
    with pytest.raises(SystemExit, match="has no room"):
        load_speed.write_checkpoint(tmp_path, None)
