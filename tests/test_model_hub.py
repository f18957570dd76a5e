"""Hub ids: what is downloaded, and a sentence for every way it can fail. The download itself is stood in for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
import transformers
from huggingface_hub.errors import (
    GatedRepoError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)

from jitgraph.errors import CheckpointError, UnsupportedModelError
from jitgraph.model import hub
from jitgraph.model.loader import load_model


def response(status: int) -> httpx.Response:
    return httpx.Response(status, request=httpx.Request("GET", "https://hub.invalid/owner/name"))


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (GatedRepoError("no", response=response(403)), ["gated", "huggingface.co/owner/name", "HF_TOKEN"]),
        (RepositoryNotFoundError("no", response=response(404)), ["neither a local folder", "owner/name"]),
        (LocalEntryNotFoundError("no"), ["not a local folder", "cannot be reached", "HF_HUB_OFFLINE"]),
        (OfflineModeIsEnabled("no"), ["not a local folder", "HF_HUB_OFFLINE"]),
        (httpx.ReadTimeout("slow"), ["downloading owner/name failed", "slow"]),
        (OSError("disk full"), ["downloading owner/name failed", "disk full"]),
    ],
)
def test_failures(error: Exception, words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> str:
        raise error

    monkeypatch.setattr(hub, "snapshot_download", fail)
    with pytest.raises(CheckpointError) as caught:
        load_model("owner/name", device="cpu")
    assert all(word in str(caught.value) for word in words), caught.value


def test_config_first_then_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    asked: list[list[str]] = []

    def serve(repo: str, revision: str | None, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
        assert revision in (None, tmp_path.name)
        assert repo == "owner/name" and "consolidated*" in ignore_patterns
        asked.append(allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr(hub, "snapshot_download", serve)
    loaded = load_model("owner/name", device="cpu")
    assert (loaded.name, loaded.folder) == ("owner/name", tmp_path)
    assert torch.isfinite(loaded.weights.embedding).all()
    assert ["*.safetensors" in patterns for patterns in asked] == [False, True]
    asked.clear()
    load_model("owner/name", device="cpu", weights="random")
    assert ["*.safetensors" in patterns for patterns in asked] == [False]
    asked.clear()
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(UnsupportedModelError, match="bert"):
        load_model("owner/name", device="cpu")
    assert ["*.safetensors" in patterns for patterns in asked] == [False]
