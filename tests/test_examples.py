"""The examples run as they are, with the model that stands where none is named, and show what they promise."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def run(name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *words: str) -> str:
    """What an example prints."""
    monkeypatch.setattr(sys, "argv", [str(EXAMPLES / name), *words])
    capsys.readouterr()
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    return capsys.readouterr().out


def test_every_example_is_tested_and_public() -> None:
    """They use what the package offers at its front door, and nothing behind it."""
    assert {path.name for path in EXAMPLES.iterdir() if path.suffix} == {"batch.py", "complete.py", "stream.py"}
    for path in EXAMPLES.glob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert "from jitgraph import LLM" in text and "jitgraph." not in text.replace("jitgraph.LLM", ""), path.name
        assert len(text.splitlines()) <= 40, path.name


def test_streaming(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(run("stream.py", capsys, monkeypatch)) > len("def read_json(path):") + 10
    found = run("stream.py", capsys, monkeypatch, "class Stack:", "tiny")
    assert found.startswith("class Stack:") and len(found) > len("class Stack:") + 10


def test_code_completion_shows_ttft_and_what_is_known(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = run("complete.py", capsys, monkeypatch).splitlines()
    found = [re.match(r"TTFT +(\d+\.\d) ms, +(\d+) tokens known  \|.*\[.*", line) for line in lines]
    shown = [match for match in found if match is not None]
    assert len(shown) == 4 and all(float(match[1]) > 0 for match in shown)
    known = [int(match[2]) for match in shown]
    assert known[0] == 0 and known == sorted(known) and known[-1] > 0, "a prompt's beginning is computed once"


def test_a_batch_of_eight(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    found = run("batch.py", capsys, monkeypatch)
    assert len(re.findall(r"# first token after \d+ ms$", found, re.MULTILINE)) == 8
    assert re.search(r"^256 tokens in [\d.]+ s: \d+ a second$", found, re.MULTILINE)
