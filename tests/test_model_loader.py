"""Checkpoint folders to packed weights: every family, every way a folder can be wrong, no socket for a local path."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from jitgraph.errors import CheckpointError, ConfigError, DeviceError, UnsupportedModelError
from jitgraph.model import packing
from jitgraph.model.device import resolve_device, resolve_dtype
from jitgraph.model.loader import LoadedModel, find_model, load_model
from jitgraph.model.packing import hf_views

SMALL: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama with biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama, tied": ("llama", {"tie_word_embeddings": True}),
    "mistral": ("mistral", {"sliding_window": 16, "head_dim": 16}),
    "qwen2": ("qwen2", {}),
    "qwen2, tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {"head_dim": 16}),
}


def save(folder: Path, family: str = "llama", shard: str = "5GB", **changes: Any) -> transformers.PreTrainedModel:
    """A small random checkpoint, biases included, as transformers writes it."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(family, **{**SMALL, **changes})
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    model.save_pretrained(folder, max_shard_size=shard)
    return model


def edit_json(path: Path, **changes: Any) -> None:
    values = json.loads(path.read_text())
    path.write_text(json.dumps({**values, **changes}))


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def assert_same(loaded: LoadedModel, model: transformers.PreTrainedModel, dtype: torch.dtype = torch.float32) -> None:
    theirs = model.state_dict()
    views = hf_views(loaded.spec, loaded.weights)
    assert set(theirs) - {"lm_head.weight"} == set(views) - {"lm_head.weight"}
    for name, view in views.items():
        assert view.dtype == dtype
        assert torch.equal(view, theirs[name].to(dtype)), name
    assert torch.equal(loaded.weights.lm_head, theirs["lm_head.weight"].to(dtype))


@pytest.mark.parametrize("variant", VARIANTS)
def test_families(variant: str, tmp_path: Path) -> None:
    family, changes = VARIANTS[variant]
    model = save(tmp_path, family, **changes)
    loaded = load_model(str(tmp_path), device="cpu")
    assert_same(loaded, model)
    assert (loaded.spec.family, loaded.folder, loaded.name) == (family, tmp_path, tmp_path.name)
    tied = loaded.weights.lm_head is loaded.weights.embedding
    assert tied == changes.get("tie_word_embeddings", False)
    assert all(tensor.is_contiguous() for tensor in loaded.weights.tensors())
    assert loaded.weights.nbytes() == sum(p.numel() * 4 for p in model.parameters())


def test_packed_rows_follow_their_names(tmp_path: Path) -> None:
    theirs = save(tmp_path, "qwen2").state_dict()
    layer = load_model(str(tmp_path), device="cpu").weights.layers[1]
    prefix = "model.layers.1."
    for kind, packed in (("weight", layer.qkv), ("bias", layer.qkv_bias)):
        assert packed is not None
        assert torch.equal(packed, torch.cat([theirs[f"{prefix}self_attn.{part}_proj.{kind}"] for part in "qkv"]))
    halves = [theirs[f"{prefix}mlp.{part}_proj.weight"] for part in ("gate", "up")]
    assert torch.equal(layer.gate_up, torch.cat(halves))


def test_sharded_is_the_same_as_single(tmp_path: Path) -> None:
    model = save(tmp_path, shard="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    assert_same(load_model(str(tmp_path), device="cpu"), model)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_dtype_on_the_way_in(dtype: str, tmp_path: Path) -> None:
    model = save(tmp_path)
    loaded = load_model(str(tmp_path), device="cpu", dtype=dtype)
    assert loaded.dtype == getattr(torch, dtype)
    assert_same(loaded, model, getattr(torch, dtype))


def test_auto_dtype_is_float32_on_the_cpu_and_the_checkpoints_own_on_cuda(tmp_path: Path) -> None:
    save(tmp_path).to(torch.bfloat16).save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path), device="cpu")
    assert (loaded.dtype, loaded.spec.dtype) == (torch.float32, "bfloat16")
    assert resolve_dtype("auto", loaded.spec.dtype, torch.device("cuda", 0)) == torch.bfloat16
    edit_json(tmp_path / "config.json", dtype=None)
    assert load_model(str(tmp_path), device="cpu").spec.dtype == "bfloat16"  # as stored, where the config is silent


def test_progress_counts_to_the_end(tmp_path: Path) -> None:
    save(tmp_path, vocab_size=20000)
    heard: list[tuple[str, int, int]] = []
    load_model(str(tmp_path), device="cpu", progress=lambda *news: heard.append(news))
    assert len(heard) == 21 and heard == sorted(heard)
    assert heard[-1][1] == heard[-1][2] == 4  # MiB: two tables of 20000 x 32 float32 fill all but the last


def test_eos_of_the_generation_config_wins(tmp_path: Path) -> None:
    save(tmp_path, eos_token_id=3)
    edit_json(tmp_path / "generation_config.json", eos_token_id=[4, 5])
    loaded = load_model(str(tmp_path), device="cpu")
    assert loaded.spec.eos_token_ids == (4, 5) and loaded.generation_config["eos_token_id"] == [4, 5]
    (tmp_path / "generation_config.json").unlink()
    loaded = load_model(str(tmp_path), device="cpu")
    assert loaded.spec.eos_token_ids == (3,) and loaded.generation_config == {}


def test_leftovers_of_old_checkpoints_are_ignored(tmp_path: Path) -> None:
    model = save(tmp_path, tie_word_embeddings=True)

    def add(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    edit_tensors(tmp_path, add)
    assert_same(load_model(str(tmp_path), device="cpu"), model)


def test_all_misfits_are_named_in_one_error(tmp_path: Path) -> None:
    save(tmp_path)

    def break_it(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["model.norm.weight"], tensors["model.layers.1.mlp.up_proj.weight"]
        tensors["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(32)
        tensors["model.layers.0.mlp.down_proj.weight"] = torch.zeros(3, 5)
        tensors["lm_head.weight"] = torch.zeros(61, 32, dtype=torch.int8)

    edit_tensors(tmp_path, break_it)
    with pytest.raises(CheckpointError) as caught:
        load_model(str(tmp_path), device="cpu")
    message = str(caught.value)
    assert "2 missing: model.layers.1.mlp.up_proj.weight, model.norm.weight" in message
    assert "1 unexpected: model.layers.0.self_attn.q_proj.bias" in message
    assert "model.layers.0.mlp.down_proj.weight is [3, 5] instead of [32, 48]" in message
    assert "lm_head.weight is I8" in message and str(tmp_path) in message


def test_config_that_contradicts_the_weights(tmp_path: Path) -> None:
    save(tmp_path)
    edit_json(tmp_path / "config.json", intermediate_size=40)
    with pytest.raises(CheckpointError, match=r"mlp.gate_proj.weight is \[48, 32\] instead of \[40, 32\]"):
        load_model(str(tmp_path), device="cpu")


def test_misfits_are_found_before_anything_is_allocated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path)
    edit_json(tmp_path / "config.json", vocab_size=2**45)
    monkeypatch.setattr(packing, "_allocate", lambda *_: pytest.fail("allocated"))
    with pytest.raises(CheckpointError, match=r"model\.embed_tokens\.weight"):
        load_model(str(tmp_path), device="cpu")


@pytest.mark.parametrize("keep", [0, 4, 100, 0.5, 0.999])
@pytest.mark.parametrize("shard", ["5GB", "20KB"])
def test_truncated_file_is_named(keep: float, shard: str, tmp_path: Path) -> None:
    save(tmp_path, shard=shard)
    victim = sorted(tmp_path.glob("*.safetensors"))[-1]
    data = victim.read_bytes()
    victim.write_bytes(data[: keep if isinstance(keep, int) else int(len(data) * keep)])
    with pytest.raises(CheckpointError, match=f"{victim.name} is truncated or damaged"):
        load_model(str(tmp_path), device="cpu")


def test_not_safetensors_at_all(tmp_path: Path) -> None:
    save(tmp_path)
    (tmp_path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\nsize 123\n")
    with pytest.raises(CheckpointError, match=r"model\.safetensors is truncated or damaged"):
        load_model(str(tmp_path), device="cpu")


def test_shards_that_do_not_add_up(tmp_path: Path) -> None:
    save(tmp_path, shard="20KB")
    index = tmp_path / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    first = sorted(set(weight_map.values()))[0]
    data = (tmp_path / first).read_bytes()
    (tmp_path / first).unlink()
    with pytest.raises(CheckpointError, match=f"{first} is missing"):
        load_model(str(tmp_path), device="cpu")
    (tmp_path / first).write_bytes(data)
    edit_json(index, weight_map={**weight_map, "model.norm.weight": "../outside.safetensors"})
    with pytest.raises(CheckpointError, match="not a file of this folder"):
        load_model(str(tmp_path), device="cpu")
    edit_json(index, weight_map={})
    with pytest.raises(CheckpointError, match="weight_map names no file"):
        load_model(str(tmp_path), device="cpu")
    edit_json(index, weight_map=weight_map)
    (tmp_path / "copy.safetensors").write_bytes(data)
    edit_json(index, weight_map={**weight_map, "extra": "copy.safetensors"})
    with pytest.raises(CheckpointError, match="is in both"):
        load_model(str(tmp_path), device="cpu")


def test_folders_without_what_is_needed(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json does not exist"):
        load_model(str(tmp_path), device="cpu")
    save(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="holds no weights"):
        load_model(str(tmp_path), device="cpu")
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(CheckpointError, match=r"pickled weights.*convert"):
        load_model(str(tmp_path), device="cpu")
    for content in ("{", "[1]", '{"model_type": "bert"}'):
        (tmp_path / "config.json").write_text(content)
        expected = UnsupportedModelError if "bert" in content else CheckpointError
        with pytest.raises(expected, match=r"config\.json"):
            load_model(str(tmp_path), device="cpu")
    (tmp_path / "config.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(CheckpointError, match="not valid JSON"):
        load_model(str(tmp_path), device="cpu")


@pytest.mark.parametrize(
    "name",
    ["no-such-thing", "./no/such", "/no/such/folder", "a/b/c", "~/no such", "~nobody-here/x", "a\0b", "x" * 5000, ""],
)
def test_names_that_mean_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "socket", lambda *_, **__: pytest.fail("a socket was opened"))
    with pytest.raises(CheckpointError, match=r"tiny.*hub id"):
        load_model(name, device="cpu")


def test_a_file_is_not_a_folder(tmp_path: Path) -> None:
    save(tmp_path)
    with pytest.raises(CheckpointError, match="is a file"):
        load_model(str(tmp_path / "model.safetensors"), device="cpu")


def test_local_paths_and_presets_never_touch_the_hub(tmp_path: Path) -> None:
    save(tmp_path)
    program = (
        "import socket, sys\n"
        "class Refused(socket.socket):\n"
        "    def __init__(self, *a, **k): raise AssertionError('a socket was opened')\n"
        "socket.socket = Refused\n"
        "from jitgraph.model.loader import load_model\n"
        "load_model(sys.argv[1], device='cpu')\n"
        "load_model('tiny', device='cpu')\n"
        "assert 'huggingface_hub' not in sys.modules\n"
    )
    result = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_random_weights_for_a_folder_need_no_weights(tmp_path: Path) -> None:
    save(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    loaded = load_model(str(tmp_path), device="cpu", weights="random", seed=3)
    assert loaded.folder == tmp_path
    assert 0.015 < loaded.weights.embedding.std().item() < 0.025


def test_settings_are_checked(tmp_path: Path) -> None:
    save(tmp_path)
    with pytest.raises(ConfigError, match="weights must be one of checkpoint, random"):
        load_model(str(tmp_path), weights="none")
    with pytest.raises(ConfigError, match="dtype must be one of"):
        load_model(str(tmp_path), device="cpu", dtype="int8")
    with pytest.raises(ConfigError, match="--weights random"):
        find_model("llama-2-7b")


@pytest.mark.parametrize("name", ["gpu", "cuda:x", "cuda:", "cuda:-1", "mps", ""])
def test_device_names(name: str) -> None:
    with pytest.raises(DeviceError, match="device must be auto, cpu, cuda or cuda:N"):
        resolve_device(name)


def test_cuda_without_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device("auto") == torch.device("cpu") == resolve_device("cpu")
    with pytest.raises(DeviceError, match=r"'cuda' was asked for but .*use device 'cpu'"):
        load_model("tiny", device="cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert resolve_device("auto") == resolve_device("cuda") == torch.device("cuda", 0)
    assert resolve_device("cuda:1") == torch.device("cuda", 1)
    with pytest.raises(DeviceError, match="cuda:0 to cuda:1"):
        resolve_device("cuda:2")


def test_a_tied_head_that_is_another_matrix_contradicts_the_config(tmp_path: Path) -> None:
    save(tmp_path, tie_word_embeddings=True)

    def add_head(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].flip(0).contiguous()

    edit_tensors(tmp_path, add_head)
    with pytest.raises(CheckpointError, match=r"ties lm_head\.weight .* set tie_word_embeddings to false"):
        load_model(str(tmp_path), device="cpu")
    edit_json(tmp_path / "config.json", tie_word_embeddings=False)
    assert load_model(str(tmp_path), device="cpu").weights.lm_head is not None


@pytest.mark.parametrize(("ids", "said"), [([0, 61], "61 is not in the vocabulary of 61"), (list(range(40)), "40 ids")])
def test_eos_ids_that_cannot_be(ids: list[int], said: str, tmp_path: Path) -> None:
    save(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
    with pytest.raises(CheckpointError, match=said):
        load_model(str(tmp_path), device="cpu")
