"""``jitgraph inspect`` and what is refused before a weight is read: figures against the engine's own, and one sentence
for each kind of bad checkpoint."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import tokenizers
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from jitgraph.cli import app
from jitgraph.cli_inspect import lines
from jitgraph.config import EngineConfig
from jitgraph.engine.fitting import check_fit, needed
from jitgraph.engine.inspection import READ_TB_S, inspect_model, nominal_read_tb_s
from jitgraph.engine.opening import open_engine
from jitgraph.errors import CapacityError, CheckpointError, ConfigError, JitgraphError, UnsupportedModelError
from jitgraph.llm import LLM
from jitgraph.model.hf_config import spec_from_config
from jitgraph.model.presets import preset_config
from jitgraph.text.tokenizer import bundled_tokenizer_folder

GIB = 2**30
LLAMA: dict[str, Any] = {
    "vocab_size": 2048,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 8192,
    "eos_token_id": 1,
}


def save(folder: Path, family: str = "llama", tokenizer: bool = True, **changes: Any) -> Path:
    """A small random checkpoint in two shards or more, with the bundled tokenizer."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(family, **{**LLAMA, **changes})
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder, max_shard_size="150KB")
    if tokenizer:
        for path in bundled_tokenizer_folder().glob("*.json"):
            shutil.copy(path, folder / path.name)
    return folder


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("llama"))


@pytest.fixture
def copy(llama: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(llama, tmp_path / "copy"))


# ------------------------------------------------------------------------------------------------------------- figures


def test_a_native_checkpoint(llama: Path) -> None:
    with patch("jitgraph.model.checkpoint.read_into", side_effect=AssertionError("a weight was read")):
        facts = inspect_model(str(llama), device="cpu")
    model = transformers.AutoModelForCausalLM.from_pretrained(llama)
    assert facts["parameters"] == sum(p.numel() for p in model.parameters())
    assert (facts["family"], facts["runs"], facts["why_not_native"]) == ("llama", "native", None)
    assert facts["weight_bytes"] == 4 * facts["parameters"] and facts["context"] == 8192
    assert facts["kv_bytes_per_token"] == 2 * 2 * 2 * 8 * 4  # K and V, layers, heads, size, float32
    stored = facts["stored"]
    assert stored["files"] > 1 and stored["elements_by_dtype"] == {"F32": facts["parameters"]}
    assert stored["file_bytes"] == sum(path.stat().st_size for path in llama.glob("*.safetensors"))
    assert facts["tokenizer"]["entries"] == 2048 and facts["tokenizer"]["chat_template"] is True
    assert facts["quantisation"] is None
    floor = facts["floor"]
    assert floor["bytes_per_token"] == 4 * (facts["parameters"] - 2048 * 32 - 5 * 32)  # no table, no norms
    assert floor["token_ms"] is None and floor["device"] == "cpu"


def test_a_foreign_checkpoint(tmp_path: Path) -> None:
    mixture = {"num_local_experts": 4, "num_experts_per_tok": 2}
    facts = inspect_model(str(save(tmp_path, "mixtral", tokenizer=False, **mixture)), device="cpu")
    assert facts["runs"] == "transformers" and facts["why_not_native"] == (
        "architecture MixtralForCausalLM is not supported"
    )
    assert facts["tokenizer"] is None
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert facts["parameters"] == sum(p.numel() for p in model.parameters())


def test_memory_is_what_the_engine_takes(llama: Path) -> None:
    """Each row of the table against an engine of those settings."""
    rows = inspect_model(str(llama), device="cpu")["memory"]
    assert [(row["context"], row["streams"]) for row in rows] == [(c, n) for c in (4096, 8192) for n in range(1, 9)]
    for row in (rows[0], rows[7], rows[9]):
        config = EngineConfig(device="cpu", max_streams=row["streams"], max_model_len=row["context"], graphs=False)
        engine = open_engine(llama, config=config).engine
        assert row["kv"] == engine.cache.data.nbytes
        assert row["workspace"] == pytest.approx(engine.buffers.arena.nbytes, rel=0.02)
        assert row["total"] == row["weights"] + row["kv"] + row["workspace"]
        engine.close()


def test_known_models_at_their_real_sizes() -> None:
    llama2 = inspect_model("llama-2-7b", device="cpu", dtype="float16")
    assert llama2["weight_bytes"] / GIB == pytest.approx(12.55, abs=0.01)
    full = next(row for row in llama2["memory"] if row["streams"] == 1 and row["context"] == 4096)
    assert full["kv"] / GIB == pytest.approx(2.0, abs=0.02)
    llama3 = inspect_model("llama-3.1-8b", device="cpu", dtype="bfloat16")
    assert llama3["parameters"] == 8_030_261_248 and llama3["memory"][-1]["context"] == 131072


@pytest.mark.parametrize(
    ("name", "rate"),
    [
        ("NVIDIA H200", 4.8),
        ("NVIDIA H100 80GB HBM3", 3.35),
        ("NVIDIA H100 PCIe", 2.0),
        ("NVIDIA A100-SXM4-80GB", 2.04),
        ("NVIDIA A100-SXM4-40GB", 1.56),
        ("NVIDIA A10", 0.6),
        ("NVIDIA L40S", 0.86),
        ("NVIDIA L4", 0.3),
        ("NVIDIA GeForce RTX 4090", 1.01),
        ("Tesla T4", 0.32),
        ("NVIDIA Quadro of 2031", None),
    ],
)
def test_nominal_bandwidth(name: str, rate: float | None) -> None:
    assert nominal_read_tb_s(name) == rate


def test_the_floor_on_a_gpu(llama: Path) -> None:
    with (
        patch("jitgraph.engine.inspection.resolve_device", return_value=torch.device("cuda", 0)),
        patch("torch.cuda.get_device_name", return_value="NVIDIA H200"),
    ):
        facts = inspect_model(str(llama), dtype="float16")
    floor = facts["floor"]
    assert floor["token_ms"] == pytest.approx(floor["bytes_per_token"] / (READ_TB_S["H200"] * 1e9))
    assert any("ms a token on NVIDIA H200" in line and "nominal 4.8 TB/s" in line for line in lines(facts))
    floor["token_ms"] = floor["read_tb_s"] = None
    assert any("the bandwidth of NVIDIA H200 is not known" in line for line in lines(facts))


def test_the_command(llama: Path) -> None:
    runner = CliRunner()
    found = json.loads(runner.invoke(app, ["inspect", str(llama), "--device", "cpu", "--json"]).stdout)
    assert found == inspect_model(str(llama), device="cpu")
    text = runner.invoke(app, ["inspect", str(llama), "--device", "cpu"]).stdout
    assert "llama, native" in text and "no GPU here" in text and text.count("8192") >= 8
    assert "no weights here" in runner.invoke(app, ["inspect", "tiny", "--device", "cpu"]).stdout


def test_small_models_are_shown_in_mib(llama: Path) -> None:
    small, large = lines(inspect_model(str(llama), device="cpu")), lines(inspect_model("llama-2-7b", device="cpu"))
    assert "MiB in all" in "".join(small) and "GiB" not in "".join(small)
    assert "GiB in all" in "".join(large) and "MiB" not in "".join(large)
    facts = inspect_model(str(llama), device="cpu")
    assert f"{facts['weight_bytes'] / 2**20:.2f} MiB" in small[2]


# ----------------------------------------------------------------------------------------------------------- bad input


def refused(model: Path, kind: type[JitgraphError], *words: str, **settings: Any) -> None:
    """Both ``inspect`` and ``LLM`` refuse it in one sentence, before a weight is read."""
    with patch("jitgraph.model.checkpoint.read_into", side_effect=AssertionError("a weight was read")):
        for call in (
            lambda: inspect_model(str(model), device="cpu"),
            lambda: LLM(str(model), device="cpu", **settings),
        ):
            with pytest.raises(kind) as caught:
                call()
            assert all(word in str(caught.value) for word in words) and "\n" not in str(caught.value)


def test_a_missing_shard(copy: Path) -> None:
    shard = sorted(copy.glob("model-*.safetensors"))[1]
    shard.unlink()
    refused(copy, CheckpointError, shard.name, "is missing", "download it again")


def test_a_truncated_shard(copy: Path) -> None:
    shard = sorted(copy.glob("model-*.safetensors"))[0]
    shard.write_bytes(shard.read_bytes()[:-5])
    refused(copy, CheckpointError, shard.name, "truncated or damaged")


def test_an_unknown_quantisation(copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "nonesuch"}}))
    refused(
        copy, UnsupportedModelError, "quantization_config: nonesuch", "use the float16, bfloat16 or float32 original"
    )


def test_pickled_weights(copy: Path) -> None:
    for path in copy.glob("model*"):
        path.unlink()
    (copy / "pytorch_model.bin").write_bytes(b"")
    refused(copy, CheckpointError, "only pickled weights")


def test_a_tokenizer_that_does_not_match(copy: Path) -> None:
    model = tokenizers.models.WordLevel({f"w{n}": n for n in range(2049)}, unk_token="w0")
    tokenizers.Tokenizer(model).save(str(copy / "tokenizer.json"))
    words = ("the tokenizer does not match", "2049 entries", "2048 rows")
    refused(copy, CheckpointError, *words, max_model_len=64, prefill_buckets=(8,))


def test_entries_that_were_added_to_a_tokenizer_are_harmless(copy: Path) -> None:
    tokenizer = tokenizers.Tokenizer.from_file(str(copy / "tokenizer.json"))
    tokenizer.add_special_tokens(["<|extra|>"])
    tokenizer.save(str(copy / "tokenizer.json"))
    assert inspect_model(str(copy), device="cpu")["tokenizer"]["entries"] == 2049


def test_a_gated_model(tmp_path: Path) -> None:
    """Nothing but the sentence; ``test_model_hub`` has what leads to it."""
    error = CheckpointError("the hub repository some/model is gated: accept its terms and set HF_TOKEN")
    with patch("jitgraph.model.hub.download", side_effect=error):
        result = CliRunner().invoke(app, ["inspect", "some/model"])
    assert isinstance(result.exception, CheckpointError) and "HF_TOKEN" in str(result.exception)


# ---------------------------------------------------------------------------------------------------- what does not fit


def test_a_model_that_does_not_fit(llama: Path) -> None:
    """Refused before a weight is read; the figure that it names fits, and the next one does not."""
    spec = spec_from_config(json.loads((llama / "config.json").read_text()), "x")
    config = EngineConfig(max_streams=4)
    free = needed(spec, config, 4, False).total - (2 << 20)
    with (
        patch("jitgraph.model.checkpoint.read_into", side_effect=AssertionError("a weight was read")),
        patch("jitgraph.engine.opening.free_bytes", return_value=free),
        pytest.raises(CapacityError, match=r"does not fit on cpu: it needs .* max_model_len=\d+ would fit") as caught,
    ):
        LLM(str(llama), device="cpu", max_streams=4)
    length = int(str(caught.value).partition("max_model_len=")[2].split()[0])
    assert needed(spec, dataclasses.replace(config, max_model_len=length), 4, False).total <= free
    assert needed(spec, dataclasses.replace(config, max_model_len=length + 64), 4, False).total > free


@given(st.integers(1, 200), st.integers(1, 8), st.sampled_from([None, 256, 4096]), st.sampled_from(["float16", None]))
@settings(max_examples=60, deadline=None)
def test_every_remedy_is_one(free_mib: int, streams: int, length: int | None, budget: str | None) -> None:
    """Whatever is free: what fits passes, and a figure that the refusal names would pass."""
    spec = spec_from_config(preset_config("tiny"), "tiny")
    memory = "64MiB" if budget else None
    config = EngineConfig(max_streams=streams, max_model_len=min(length or 2048, 2048), kv_cache_memory=memory)
    free, device = free_mib << 20, torch.device("cpu")
    fits = needed(spec, config, 4, False).total <= free
    try:
        check_fit("tiny", spec, config, 4, device, free)
        assert fits
    except CapacityError as error:
        assert not fits
        text = str(error)
        if "max_model_len=" in text:
            chosen = int(text.partition("max_model_len=")[2].split()[0])
            fewer = 1 if "max_streams=1" in text else streams
            check_fit(
                "tiny", spec, dataclasses.replace(config, max_model_len=chosen, max_streams=fewer), 4, device, free
            )
        elif "kv_cache_memory of" in text:
            mib = int(text.partition("kv_cache_memory of ")[2].split()[0])
            check_fit("tiny", spec, dataclasses.replace(config, kv_cache_memory=f"{mib}MiB"), 4, device, free)
        else:
            assert "use a device with" in text


def test_settings_are_refused_before_a_weight_is_read(llama: Path, tmp_path: Path) -> None:
    save(tmp_path, "gpt_neox", tokenizer=False)
    with patch("jitgraph.model.hf.load_hf_model", side_effect=AssertionError("it was loaded")):
        with pytest.raises(ConfigError, match="batch_invariant is for native models"):
            LLM(str(tmp_path), device="cpu", batch_invariant=True)
        with pytest.raises(ConfigError, match="over the model's limit"):
            LLM(str(tmp_path), device="cpu", max_model_len=9000)
