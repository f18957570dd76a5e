"""Hugging Face tensor names to places in the packed weights.

One table of names and shapes serves checkpoints, random weights and export. Whatever comes in is copied once, straight
into its place: no second copy of the model exists at any time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch

from jitgraph.errors import CapacityError
from jitgraph.model.device import check_memory
from jitgraph.model.spec import ModelSpec
from jitgraph.model.weights import LayerWeights, ModelWeights

Progress = Callable[[str, int, int], None]
"""Told (phase, MiB done, MiB in all) after each tensor."""


def hf_shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that a checkpoint of this model holds; no ``lm_head.weight`` where it is tied."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (spec.vocab_size, spec.hidden_size)}
    for index in range(spec.num_layers):
        for name, shape in _layer_shapes(spec).items():
            shapes[f"model.layers.{index}.{name}"] = shape
    shapes["model.norm.weight"] = (spec.hidden_size,)
    if not spec.tie_embeddings:
        shapes["lm_head.weight"] = (spec.vocab_size, spec.hidden_size)
    return shapes


def _layer_shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    d, i, q, kv = spec.hidden_size, spec.intermediate_size, spec.q_size, spec.kv_size
    shapes: dict[str, tuple[int, ...]] = {"input_layernorm.weight": (d,), "post_attention_layernorm.weight": (d,)}
    matrices = (
        ("self_attn.q_proj", q, d, spec.qkv_bias),
        ("self_attn.k_proj", kv, d, spec.qkv_bias),
        ("self_attn.v_proj", kv, d, spec.qkv_bias),
        ("self_attn.o_proj", d, q, spec.o_bias),
        ("mlp.gate_proj", i, d, spec.mlp_bias),
        ("mlp.up_proj", i, d, spec.mlp_bias),
        ("mlp.down_proj", d, i, spec.mlp_bias),
    )
    for name, rows, columns, bias in matrices:
        shapes[f"{name}.weight"] = (rows, columns)
        if bias:
            shapes[f"{name}.bias"] = (rows,)
    if spec.qk_norm:
        shapes["self_attn.q_norm.weight"] = shapes["self_attn.k_norm.weight"] = (spec.head_dim,)
    return shapes


def allocate_weights(spec: ModelSpec, device: torch.device, dtype: torch.dtype) -> ModelWeights:
    """Packed tensors with undefined contents.

    Raises:
        CapacityError: the device has not that much memory; the message has the figure.
    """
    need = sum(math.prod(shape) for shape in hf_shapes(spec).values()) * dtype.itemsize
    check_memory(need, device, "the weights", "use a smaller model or dtype (float16 takes half of float32)")
    try:
        return _allocate(spec, device, dtype)
    except (torch.OutOfMemoryError, RuntimeError) as error:
        raise CapacityError(
            f"the weights need {need / 2**30:.2f} GiB, more than {device} can give: "
            "free its memory, or use a smaller model or dtype"
        ) from error


def _allocate(spec: ModelSpec, device: torch.device, dtype: torch.dtype) -> ModelWeights:
    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    def layer() -> LayerWeights:
        d, i = spec.hidden_size, spec.intermediate_size
        return LayerWeights(
            input_norm=empty(d),
            qkv=empty(spec.qkv_size, d),
            qkv_bias=empty(spec.qkv_size) if spec.qkv_bias else None,
            q_norm=empty(spec.head_dim) if spec.qk_norm else None,
            k_norm=empty(spec.head_dim) if spec.qk_norm else None,
            o=empty(d, spec.q_size),
            o_bias=empty(d) if spec.o_bias else None,
            post_norm=empty(d),
            gate_up=empty(2 * i, d),
            gate_up_bias=empty(2 * i) if spec.mlp_bias else None,
            down=empty(d, i),
            down_bias=empty(d) if spec.mlp_bias else None,
        )

    embedding = empty(spec.vocab_size, spec.hidden_size)
    return ModelWeights(
        embedding=embedding,
        layers=tuple(layer() for _ in range(spec.num_layers)),
        final_norm=empty(spec.hidden_size),
        lm_head=embedding if spec.tie_embeddings else empty(spec.vocab_size, spec.hidden_size),
    )


def hf_views(spec: ModelSpec, weights: ModelWeights) -> dict[str, torch.Tensor]:
    """Each name of ``hf_shapes`` to the view of ``weights`` where it lives, in the same order."""
    views = {"model.embed_tokens.weight": weights.embedding}
    for index, layer in enumerate(weights.layers):
        places = _layer_views(spec, layer)
        for name in _layer_shapes(spec):
            views[f"model.layers.{index}.{name}"] = places[name]
    views["model.norm.weight"] = weights.final_norm
    if not spec.tie_embeddings:
        views["lm_head.weight"] = weights.lm_head
    return views


def _layer_views(spec: ModelSpec, layer: LayerWeights) -> dict[str, torch.Tensor]:
    qkv = [f"self_attn.{part}_proj" for part in "qkv"]
    sizes = [spec.q_size, spec.kv_size, spec.kv_size]
    halves = ["mlp.gate_proj", "mlp.up_proj"]
    widths = [spec.intermediate_size] * 2
    packed = (
        (qkv, "weight", layer.qkv, sizes),
        (qkv, "bias", layer.qkv_bias, sizes),
        (halves, "weight", layer.gate_up, widths),
        (halves, "bias", layer.gate_up_bias, widths),
    )
    views: dict[str, torch.Tensor] = {}
    for names, kind, tensor, rows in packed:
        if tensor is not None:
            start = 0
            for name, count in zip(names, rows, strict=True):
                views[f"{name}.{kind}"] = tensor[start : start + count]
                start += count
    whole = {
        "input_layernorm.weight": layer.input_norm,
        "post_attention_layernorm.weight": layer.post_norm,
        "self_attn.q_norm.weight": layer.q_norm,
        "self_attn.k_norm.weight": layer.k_norm,
        "self_attn.o_proj.weight": layer.o,
        "self_attn.o_proj.bias": layer.o_bias,
        "mlp.down_proj.weight": layer.down,
        "mlp.down_proj.bias": layer.down_bias,
    }
    views.update((name, tensor) for name, tensor in whole.items() if tensor is not None)
    return views


def fill(
    views: dict[str, torch.Tensor], tensors: Iterable[tuple[str, torch.Tensor]], progress: Progress | None = None
) -> None:
    """Copies each named tensor into its place, converting dtype and device; every place must come exactly once."""
    total, done = sum(view.nbytes for view in views.values()), 0
    report = progress or (lambda phase, done, total: None)
    waiting = set(views)
    for name, tensor in tensors:
        waiting.remove(name)
        view = views[name]
        assert view.shape == tensor.shape, f"{name}: {tuple(tensor.shape)} does not fit {tuple(view.shape)}"
        view.copy_(tensor)
        done += view.nbytes
        report("loading weights (MiB)", done >> 20, total >> 20)
    assert not waiting, f"never filled: {sorted(waiting)}"
