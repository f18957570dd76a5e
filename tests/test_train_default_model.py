"""The training of the bundled model: what it learns from, that it can be taken up again, what it writes."""

from __future__ import annotations

import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from jitgraph import LLM, SamplingParams

SCRIPT = Path(__file__).parent.parent / "scripts" / "train_default_model.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("train_default_model", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def library(tmp_path: Path) -> Path:
    root = tmp_path / "library"
    for name in ("a.py", "pkg/b.py", "pkg/c.py", "test/d.py", "site-packages/e.py"):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"# {name}\ndef one(x):\n    return x + 1\n")
    (root / "latin.py").write_bytes(b"# \xe9\n")
    return root


def test_it_reads_the_library_without_tests_and_other_peoples_packages(script: ModuleType, library: Path) -> None:
    assert [name for name, _ in script.source_files(library)] == ["a.py", "pkg/b.py", "pkg/c.py"]


def test_definitions_stand_alone(script: ModuleType) -> None:
    text = "class A:\n    @staticmethod\n    def f(x):\n        return x\n\nasync def g():\n    pass\n"
    found = sorted(script.definitions(text))
    assert found == [
        "@staticmethod\ndef f(x):\n    return x\n",
        "async def g():\n    pass\n",
        "class A:\n    @staticmethod\n    def f(x):\n        return x\n",
    ]
    assert list(script.definitions("def broken(:\n")) == []


def test_files_are_held_out_by_their_name_alone(script: ModuleType) -> None:
    share = sum(script.is_held_out(f"pkg/module_{i}.py") for i in range(20_000)) / 20_000
    assert 0.02 < share < 0.04
    assert script.is_held_out("json/decoder.py") == script.is_held_out("json/decoder.py")


def test_the_rate_warms_up_and_falls(script: ModuleType) -> None:
    plan = script.Plan()
    rates = [script.rate(plan, step) for step in range(plan.steps)]
    peak = int(np.argmax(rates))
    assert plan.warm_up - 1 <= peak <= plan.warm_up and rates[peak] == pytest.approx(plan.peak_rate)
    assert rates[-1] == pytest.approx(plan.last_rate, rel=0.01) and rates[0] < rates[10] < rates[peak]


def test_a_broken_off_run_goes_on_to_the_same_weights(script: ModuleType, tmp_path: Path) -> None:
    model = {"vocabulary": 300, "hidden": 16, "intermediate": 24, "layers": 1, "heads": 2, "kv_heads": 1, "context": 16}
    plan = replace(script.Plan(), **model, batch=2, steps=6, warm_up=2)
    tokenizer = script.train_tokenizer(["def f(x):\n    return x\n" * 50, "class A:\n    pass\n" * 50], plan.vocabulary)
    corpus = script.encode(tokenizer, ["def f(x):\n    return x\n" * 20, "class A:\n    pass\n" * 20])
    cpu = torch.device("cpu")

    def training(name: str) -> object:
        return script.Training(plan, script.build_model(plan, tokenizer), cpu, tmp_path / name)

    whole = training("whole.pt")
    assert whole.run(corpus, corpus, 600)
    broken = training("broken.pt")
    while not broken.run(corpus, corpus, 0):  # time is up after every step
        broken = training("broken.pt")
        broken.resume()
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, broken.model.state_dict()[name]), name
        assert torch.equal(whole.best[name], broken.best[name]), name
    assert [look["step"] for look in broken.curve] == list(range(1, plan.steps + 1))

    written = script.write_model(tmp_path / "model", whole.model, tokenizer)
    assert {tensor.dtype for tensor in written.state_dict().values()} == {torch.float16}
    assert json.loads((tmp_path / "model" / "config.json").read_text())["vocab_size"] == plan.vocabulary
    with LLM(tmp_path / "model", device="cpu") as llm:
        assert llm.generate(["def f("], SamplingParams(max_tokens=3, ignore_eos=True))[0].token_ids
