"""Exported folders: the same tensors for transformers and for the loader, whole or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from jitgraph.errors import ConfigError, OutputError
from jitgraph.model import export as export_module
from jitgraph.model.export import export_model, plan_shards
from jitgraph.model.hf_config import spec_from_config
from jitgraph.model.loader import load_model
from jitgraph.model.packing import hf_views
from jitgraph.model.presets import preset_config

FILES = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}


def small(name: str) -> dict[str, Any]:
    """A preset's config with the preset's structure and small figures."""
    figures = {"vocab_size": 2048, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return {**preset_config(name), **figures, **heads}


@pytest.mark.parametrize("max_shard_bytes", [export_module.MAX_SHARD_BYTES, 300_000])
@pytest.mark.parametrize("preset", ["llama-2-7b", "llama-3.1-8b", "qwen2.5-0.5b"])
def test_loads_everywhere_bit_for_bit(
    preset: str, max_shard_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export_module, "preset_config", small)
    folder = export_model(preset, tmp_path / "out", seed=3, device="cpu", max_shard_bytes=max_shard_bytes)
    shards = list(folder.glob("*.safetensors"))
    assert (len(shards) > 1) == (max_shard_bytes == 300_000)
    ours = load_model(str(folder), device="cpu", dtype=small(preset)["dtype"])
    again = load_model(str(folder), device="cpu", dtype=small(preset)["dtype"], weights="random", seed=3)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    state = theirs.state_dict()
    views, remade = hf_views(ours.spec, ours.weights), hf_views(again.spec, again.weights)
    for name, view in views.items():
        assert torch.equal(view, state[name]) and view.dtype == state[name].dtype, name
        assert torch.equal(view, remade[name]), name
    assert ours.spec.eos_token_ids == (small(preset)["eos_token_id"],)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_tiny_as_a_whole(tmp_path: Path) -> None:
    heard: list[tuple[str, int, int]] = []
    (tmp_path / "out").mkdir()  # an empty folder may be there
    folder = export_model("tiny", tmp_path / "out", device="cpu", progress=lambda *news: heard.append(news))
    assert {path.name for path in folder.iterdir()} >= FILES
    assert heard[-1][1] == heard[-1][2] > 0
    assert len({path.stat().st_mode for path in folder.iterdir()}) == 1
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("Hello", return_tensors="pt").input_ids
    with torch.no_grad():
        logits = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(ids).logits
    assert logits.shape[-1] == 2048 and torch.isfinite(logits).all()
    loaded, preset = (
        load_model(str(folder), device="cpu", dtype="float16"),
        load_model("tiny", device="cpu", dtype="float16"),
    )
    assert loaded.spec == preset.spec
    for a, b in zip(loaded.weights.tensors(), preset.weights.tensors(), strict=True):
        assert torch.equal(a, b)


def test_dtype_is_written(tmp_path: Path) -> None:
    folder = export_model("tiny", tmp_path / "out", dtype="bfloat16", device="cpu")
    assert load_model(str(folder), device="cpu").spec.dtype == "bfloat16"
    with pytest.raises(ConfigError, match="dtype must be one of"):
        export_model("tiny", tmp_path / "other", dtype="int8")
    with pytest.raises(ConfigError, match="no preset 'large'"):
        export_model("large", tmp_path / "other")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_shards_keep_to_the_limit() -> None:
    spec = spec_from_config(preset_config("llama-2-7b"), "llama-2-7b")
    plan = plan_shards(spec, 4_000_000_000)
    assert len(plan) == 4
    assert [name for names in plan for name in names] == list(dict.fromkeys(name for names in plan for name in names))
    assert all(len(names) == 1 for names in plan_shards(spec, 1))


def test_targets_that_are_in_use_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "note.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for name in ("full", "file"):
        with pytest.raises(OutputError, match="exists and is not an empty folder"):
            export_model("tiny", tmp_path / name, device="cpu")
    for parent in ("absent", "file"):
        with pytest.raises(OutputError, match=r"is not an existing folder|cannot be written"):
            export_model("tiny", tmp_path / parent / "out", device="cpu")
    assert (tmp_path / "full" / "note.txt").read_text() == (tmp_path / "file").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "full"]


def test_full_disk_is_told_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = export_module.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(export_module.shutil, "disk_usage", lambda _: real._replace(free=1000))
    with pytest.raises(OutputError, match=r"0\.0 GiB free and the weights need 12\.6 GiB"):
        export_model("llama-2-7b", tmp_path / "out", device="cpu")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [OSError(13, "Permission denied"), KeyboardInterrupt()])
@pytest.mark.parametrize("step", ["_write_json", "save_file"])
def test_nothing_half_written(error: BaseException, step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(export_module, step, fail)
    expected: type[BaseException] = OutputError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(expected):
        export_model("tiny", tmp_path / "out", device="cpu")
    assert list(tmp_path.iterdir()) == []


def test_unwritable_parent() -> None:
    with pytest.raises(OutputError, match=r"cannot be written|not an existing folder"):
        export_model("tiny", "/proc/jitgraph-export", device="cpu")
