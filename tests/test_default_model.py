"""The model that stands where no name is given: where it is looked for, its card, and what it must be once there."""

from __future__ import annotations

import importlib.util
import json
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from types import ModuleType
from typing import Any

import first_minutes
import pytest
import torch
from test_inspect import save

from jitgraph import LLM, SamplingParams
from jitgraph.engine.inspection import inspect_model
from jitgraph.model import default
from jitgraph.model.default import DEFAULT_MODEL, FOLDER, default_model_folder
from jitgraph.model.loader import find_model

ROOT = Path(__file__).resolve().parent.parent
LARGEST_BYTES = 16 * 10**6
PROMPT = "def read_json(path):"


# -------------------------------------------------------------------------------------------------------- what it means


@pytest.fixture
def bundled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small model in the bundled one's place."""
    folder = save(tmp_path / "model")
    monkeypatch.setattr(default, "FOLDER", folder)
    if not (folder / "model.safetensors").exists():  # saved in shards
        import transformers

        transformers.AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder)
    return folder


def test_it_is_the_bundled_folder(bundled: Path) -> None:
    source = find_model(DEFAULT_MODEL)
    assert (source.name, source.folder) == (DEFAULT_MODEL, bundled)
    assert inspect_model(DEFAULT_MODEL, device="cpu")["hidden_size"] == 32
    with LLM(device="cpu", max_streams=1, prefill_buckets=(8,)) as llm:
        assert llm.name == DEFAULT_MODEL and llm.spec.hidden_size == 32
        assert llm.generate("x", SamplingParams(max_tokens=2, ignore_eos=True))[0].token_ids


@pytest.mark.parametrize("missing", default.NEEDED)
def test_without_it_a_preset_stands_in(bundled: Path, missing: str) -> None:
    (bundled / missing).unlink()
    assert default_model_folder() is None
    source = find_model(DEFAULT_MODEL)
    assert (source.name, source.folder) == (default.STAND_IN, None)


def test_random_weights_of_its_shape(bundled: Path) -> None:
    assert find_model(DEFAULT_MODEL, weights="random").folder == bundled


# ------------------------------------------------------------------------------------------------------------- its card


@pytest.fixture(scope="module")
def writer() -> ModuleType:
    path = ROOT / "scripts" / "write_model_card.py"
    spec = importlib.util.spec_from_file_location("write_model_card", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def record() -> dict[str, Any]:
    plan = {
        "vocabulary": 6144, "hidden": 256, "intermediate": 640, "layers": 8, "heads": 8, "kv_heads": 2, "context": 1024,
        "batch": 64, "steps": 450, "peak_rate": 3e-3, "last_rate": 1e-4, "warm_up": 200, "seed": 20261122,
    }  # fmt: skip
    return {
        "plan": plan,
        "parameters": 6_823_168,
        "python": "3.12.3",
        "torch": "2.11.0",
        "device": "NVIDIA H200",
        "files": ["a.py", "json/decoder.py", "json/encoder.py"],
        "held_out_files": ["json/encoder.py"],
        "files_sha256": "ab" * 32,
        "training_ids": 9_876_543,
        "held_out_ids": 123_456,
        "curve": [{"step": n, "train": 6.0 - n / 100, "held_out": 6.2 - n / 110} for n in (18, 200, 450)],
        "held_out_loss": 2.109,
        "held_out_perplexity": 8.24,
        "samples": {PROMPT: f"{PROMPT}\n    with open(path) as f:\n        return f", "x": "x = '''```'''"},
    }


def test_the_card_says_what_the_record_says(writer: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "training.json").write_text(json.dumps(record()))
    assert writer.main(["--training", str(tmp_path / "training.json"), "--docs", str(tmp_path / "docs")]) == 0
    text = (tmp_path / "docs" / writer.CARD).read_text()
    flat = " ".join(text.split())
    for words in (
        "6.8 million parameters", "8 layers of width 256", "6,144 entries", "context of 1,024 tokens", "Python 3.12.3",
        "3 files, of which 2 were trained on (9,876,543 tokens", "1 were held out (123,456 tokens)", "450 steps of 64",
        "one NVIDIA H200 with PyTorch 2.11.0, seed 20261122", "0.003 after 200 steps", "**8.24** a token (loss 2.109",
        "Python Software Foundation", "PSF-2.0", "Trained on: 2 files", "a.py, json/decoder.py", "ab" * 32, "## Limits",
    ):  # fmt: skip
        assert words in flat, words
    assert f"```python\n{PROMPT}\n    with open(path) as f:\n        return f\n```" in text
    assert "````python\nx = '''```'''\n````" in text
    assert (tmp_path / "docs" / writer.CURVE).is_file() and f"]({writer.CURVE})" in text


def test_another_record_another_card(writer: ModuleType) -> None:
    """No figure of the card is typed by hand."""
    other = record()
    other |= {"parameters": 5_100_000, "held_out_perplexity": 11.5, "held_out_loss": 2.442, "training_ids": 777}
    other["plan"] = {**other["plan"], "steps": 451, "warm_up": 3}
    text = writer.card(other)
    assert "5.1 million" in text and "**11.50**" in text and "(777 tokens" in text and "451 steps" in text
    assert "6.8 million" not in text and "8.24" not in text and "450" not in text


def test_the_curve_is_drawn_to_scale(writer: ModuleType) -> None:
    root = ET.fromstring(writer.curve(record()["curve"]))
    lines = {one.get("class"): one.get("points", "") for one in root.iter("{http://www.w3.org/2000/svg}polyline")}
    assert set(lines) == {"train", "held_out"}
    points = [tuple(map(float, pair.split(","))) for pair in lines["train"].split()]
    assert len(points) == 3 and points[0][1] < points[1][1] < points[2][1], "less loss, further down"
    steps = [18, 200, 450]
    share = (points[1][0] - points[0][0]) / (points[2][0] - points[0][0])
    assert share == pytest.approx((steps[1] - steps[0]) / (steps[2] - steps[0]), abs=0.001)
    width, height = map(float, root.get("viewBox", "").split()[2:])
    assert all(0 < x < width and 0 < y < height for x, y in points)


# --------------------------------------------------------------------------------------------------------- what it is


def test_the_bundled_folder(writer: ModuleType) -> None:
    """Small, of the shape that its record says, with the licence of what it learned from, and with its card."""
    assert sum(path.stat().st_size for path in FOLDER.rglob("*")) <= LARGEST_BYTES
    training = json.loads((FOLDER / "training.json").read_text())
    facts = inspect_model(DEFAULT_MODEL, device="cpu")
    assert facts["runs"] == "native" and facts["parameters"] == training["parameters"]
    assert facts["context"] == training["plan"]["context"] and facts["own_dtype"] == "float16"
    assert facts["tokenizer"]["entries"] == facts["vocab_size"] == training["plan"]["vocabulary"]
    for name, text in writer.documents(training).items():
        assert (ROOT / "docs" / name).read_text() == text, (
            f"run scripts/write_model_card.py: docs/{name} is not the record's"
        )


def test_it_writes_what_its_card_shows() -> None:
    """The samples of the record were made by transformers; greedy decoding here begins alike."""
    samples = json.loads((FOLDER / "training.json").read_text())["samples"]
    with LLM(device="cpu", max_streams=1) as llm:
        for prompt, text in samples.items():
            found = llm.generate(prompt, SamplingParams(max_tokens=24))[0].text
            assert found or text == prompt, "it ends at once where the record does, and nowhere else"
            assert text.removeprefix(prompt).startswith(found[: len(found) // 2]), prompt


@pytest.mark.parametrize("prompt", [PROMPT, "import os\n\n\nclass Path", "for line in"])
def test_real_weights_give_the_tokens_of_transformers(prompt: str) -> None:
    """Greedy, 64 tokens in float32; random weights would forgive a confusion of two that are alike."""
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32)
    with LLM(device="cpu", max_streams=1) as llm:
        found = llm.generate(prompt, SamplingParams(max_tokens=64, ignore_eos=True, logprobs=0))[0]
    ids = torch.tensor([[*found.prompt_token_ids, *found.token_ids]])
    with torch.no_grad():
        logits = model(ids).logits[0, len(found.prompt_token_ids) - 1 : -1]
    assert logits.argmax(-1).tolist() == list(found.token_ids)
    expected = logits.log_softmax(-1).max(-1).values
    assert found.logprobs is not None
    torch.testing.assert_close(torch.tensor([one.logprob for one in found.logprobs]), expected, rtol=0, atol=1e-3)


def test_it_learned_something() -> None:
    """A held-out text is far likelier to it than to chance, by the engine's own log-probabilities."""
    text = "def main():\n    parser = argparse.ArgumentParser()\n    args = parser.parse_args()\n    return 0\n"
    with LLM(device="cpu", max_streams=1) as llm:
        scored = llm.generate(text, SamplingParams(max_tokens=1), prompt_logprobs=0)[0].prompt_logprobs
    assert scored is not None
    known = [one.logprob for one in scored if one is not None]
    assert -sum(known) / len(known) < 4.0, "nats a token; chance is 8.7"


# ------------------------------------------------------------------------------------------- the first minutes' figures


def test_the_benchmark_of_the_first_minutes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "first.json"
    code = first_minutes.main(["tiny", "--runs", "1", "--output", str(output)])
    found = json.loads(output.read_text())
    assert found["answer_s"] == found["runs"][0]["answer_s"] > 0.1 and found["tokens_per_s"] > 0
    held = found["answer_s"] <= first_minutes.ANSWER_S and found["tokens_per_s"] >= first_minutes.TOKENS_PER_S
    assert found["holds"] == held and code == (0 if held else 1)
    assert "answer begins after" in capsys.readouterr().out
    with pytest.raises(RuntimeError, match="no existing folder"):
        first_minutes.one_run("nonesuch", [0], str(tmp_path))
