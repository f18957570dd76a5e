"""A model outside the native families as its users meet it: behind ``jitgraph serve``, and in ``jitgraph bench``."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import openai
import pytest
from test_inspect import save
from test_serve_process import Server

from jitgraph import LLM, SamplingParams
from jitgraph.bench import jobs

ROOT = Path(__file__).resolve().parent.parent
SMALL: dict[str, Any] = {"max_position_embeddings": 256}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPT-NeoX of random weights with the bundled tokenizer."""
    return save(tmp_path_factory.mktemp("foreign"), "gpt_neox", **SMALL)


def test_served_text_is_the_offline_text(folder: Path, tmp_path: Path) -> None:
    """Greedy and seeded completions, a stream, a schema, log-probabilities: the server is the same for all models."""
    with LLM(str(folder), device="cpu", max_model_len=128) as llm:
        assert "through its own forward" in llm.notices[0]
        settings = [{"temperature": 0.0}, {"temperature": 0.9, "seed": 3}]
        expected = [llm.generate("The train", SamplingParams(max_tokens=8, **one))[0].text for one in settings]
    words = ("--device", "cpu", "--port", "0", "--max-model-len", "128", "--api-key", "secret")
    server = Server(tmp_path, "-m", "jitgraph", "serve", str(folder), *words, "--served-model-name", "foreign")
    try:
        client = openai.OpenAI(base_url=f"{server.url()}/v1", api_key="secret", max_retries=0)
        how: dict[str, Any] = {"model": "foreign", "prompt": "The train", "max_tokens": 8}
        assert [client.completions.create(**how, **one).choices[0].text for one in settings] == expected
        stream = client.completions.create(**how, temperature=0.0, stream=True)
        assert "".join(chunk.choices[0].text for chunk in stream) == expected[0]
        found = client.completions.create(**how, temperature=0.0, logprobs=2).choices[0]
        assert found.logprobs is not None and len(found.logprobs.token_logprobs or []) == 8
        schema = {"type": "object", "properties": {"a": {"enum": ["x", "y"]}}, "required": ["a"]}
        form = {"name": "one", "schema": {**schema, "additionalProperties": False}, "strict": True}
        chat = client.chat.completions.create(
            model="foreign",
            messages=[{"role": "user", "content": "Hello"}],
            max_tokens=60,
            response_format={"type": "json_schema", "json_schema": form},  # type: ignore[typeddict-item]
        )
        choice = chat.choices[0]
        if choice.finish_reason == "stop":  # random weights may fill the space between tokens
            assert json.loads(choice.message.content or "")["a"] in ("x", "y")
        else:
            assert choice.finish_reason == "length" and (choice.message.content or "").startswith("{")
        os.kill(server.pid, signal.SIGTERM)
        assert server.ended() == 0
    finally:
        server.process.kill()
        server.process.wait()


@pytest.mark.timeout(600)
def test_the_benchmark_measures_it(folder: Path, tmp_path: Path) -> None:
    """Baseline and hybrid, behind the same correctness gate; each step of the hybrid is a graph's."""
    command = [sys.executable, "-m", "jitgraph", "bench", "baseline", "hybrid", "--model", str(folder)]
    counts = ["--prompt-lengths", "5,16", "--ttft-iterations", "1", "--p99-iterations", "2", "--dtype", "float32"]
    done = subprocess.run(
        [*command, *counts, "--output", str(tmp_path), "--device", "cpu"],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "summary.json").read_text())
    for case in ("baseline", "hybrid"):
        assert found["cases"][case]["status"] == jobs.COMPLETE, found["cases"][case]
    rows = [row for row in found["rows"] if row["metric"] == "ttft_ms" and row["protocol"] == "p99"]
    hybrid = [row for row in rows if row["case"] == "hybrid"]
    assert [row["prompt_tokens"] for row in hybrid] == [5, 16] and all(row["mean"] > 0 for row in rows)
    assert all(row["paths"]["eager"] == 0 and row["paths"]["exact"] == 2 for row in hybrid)
    gate = json.loads((tmp_path / "raw" / "gate.json").read_text())
    assert {*gate} == {"5", "16"} and all(one["gap"] > one["error"] for one in gate.values()), (
        "both lengths were judged"
    )
