"""Proof, before a model of transformers serves, that the engine's way of calling it gives what its own forward gives.

Runs once at load, in inference mode, on the model's device. A few made-up tokens go through the forward whole, as
transformers meant it; then in chunks and single tokens, beside another sequence, as the engine will call it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from jitgraph.model.batch import Batch
from jitgraph.model.cache import KVCache
from jitgraph.model.hf_attention import NAME, LayerCall, PagedPass, working_on
from jitgraph.model.hf_decoder import HfDecoder, OwnCacheDecoder
from jitgraph.model.hf_spec import ForeignSpec
from jitgraph.ops.select import select_ops
from jitgraph.ops.slots import SlotTable

TOKENS = 13
"""Of the longer made-up sequence; the other has two less."""
CHUNK = 5
PAGE = 8
LEAST_LIKENESS = {torch.float32: 0.9999, torch.float16: 0.99, torch.bfloat16: 0.98}
"""Cosine of two rows of logits, their means taken off: rounding keeps it above, a wrong mask or position does not."""
PLAIN_LAYERS = frozenset({"full_attention", "sliding_attention"})
PLAIN_ROPE = frozenset({"default", "linear", "llama3", "yarn", "proportional"})
"""Rotations that depend on a token's position alone, not on how long its sequence is."""


@dataclass(frozen=True)
class Survey:
    """What a model does when it is called."""

    vocabulary: int
    """Entries of its logits."""
    sequences: tuple[torch.Tensor, torch.Tensor]
    """Two made-up sequences, int64."""
    expected: tuple[torch.Tensor, torch.Tensor]
    """Their logits ``[n, V]`` by the model's own forward."""
    why_not_pages: str
    """Why its attention cannot work on pages; empty where it may."""
    places: dict[int, int]
    heads: int = 0
    kv_heads: int = 0
    head_size: int = 0


def survey(model: Any, spec: ForeignSpec) -> Survey:
    """Calls the model as its makers meant it, then with an attention that only notes how it is called."""
    device = model.get_input_embeddings().weight.device
    entries = min(spec.vocab_size, model.get_input_embeddings().weight.shape[0])
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, entries, (2, TOKENS), generator=generator).to(device)
    sequences = ids[0], ids[1, : TOKENS - 2]
    expected = tuple(model(input_ids=one[None], use_cache=False).logits[0].float() for one in sequences)
    vocabulary = int(expected[0].shape[-1])
    both = (sequences, (expected[0], expected[1]))
    why = _refusal(model)
    calls: list[LayerCall] = []
    if not why:
        model.set_attn_implementation(NAME)
        with working_on(calls):
            model(input_ids=sequences[0][None], use_cache=False)
        why = _odd_calls(model, calls)
    if why:
        return Survey(vocabulary, *both, why, {})
    return Survey(
        vocabulary,
        *both,
        "",
        {call.index: place for place, call in enumerate(calls)},
        max(call.heads for call in calls),
        max(call.kv_heads for call in calls),
        max(max(call.key_size, call.value_size) for call in calls),
    )


def _refusal(model: Any) -> str:
    """Why pages are out of the question, from what the class and the configuration say."""
    if not getattr(model, "_supports_attention_backend", False):
        return "transformers has no replaceable attention for this family"
    if getattr(model, "_is_stateful", False):
        return "it keeps a state besides keys and values"
    text = model.config.get_text_config()
    kinds = sorted(set(getattr(text, "layer_types", None) or ()) - PLAIN_LAYERS)
    if kinds or getattr(text, "attention_chunk_size", None):
        return f"it has layers of the kind {', '.join(kinds) or 'chunked_attention'}"
    rotations = sorted(set(_rope_kinds(text)) - PLAIN_ROPE)
    if rotations:
        return f"its rotation ({', '.join(rotations)}) depends on the length of the whole sequence"
    return ""


def _rope_kinds(text: Any) -> list[str]:
    """The kinds of rotation of a configuration, in both of the spellings that transformers has had."""
    found = []
    for name in ("rope_scaling", "rope_parameters"):
        table = getattr(text, name, None) or {}
        parts = [table, *(part for part in table.values() if isinstance(part, dict))]
        kinds = [part.get("rope_type", part.get("type")) for part in parts]
        found += [kind for kind in kinds if kind]
    return found


def _odd_calls(model: Any, calls: list[LayerCall]) -> str:
    """Why pages cannot serve the calls that the layers made."""
    indices = [call.index for call in calls]
    if not calls or -1 in indices or len(set(indices)) != len(indices):
        return "its layers do not say which is which"
    unknown = sorted({name for call in calls for name in call.unknown})
    if unknown:
        return f"its attention takes {', '.join(unknown)}"
    text = model.config.get_text_config()
    window = getattr(text, "sliding_window", None)
    wanted = isinstance(window, int) and getattr(text, "use_sliding_window", True)
    kinds = getattr(text, "layer_types", None)
    if kinds and len(kinds) == len(calls):
        silent = any(k == "sliding_attention" and not call.window for k, call in zip(kinds, calls, strict=True))
    else:
        silent = bool(wanted) and not any(call.window for call in calls)
    return "its attention does not say how far its sliding window reaches" if silent else ""


def alike(got: list[torch.Tensor], expected: list[torch.Tensor], dtype: torch.dtype) -> bool:
    """Whether rows of logits agree up to rounding: all in float32; in a half type, where a mixture may now and then
    route a token otherwise, most of them."""
    found, wanted = torch.stack(got).float(), torch.stack(expected).float()
    likeness = F.cosine_similarity(found - found.mean(-1, keepdim=True), wanted - wanted.mean(-1, keepdim=True))
    same = (found - wanted).abs().amax(-1) <= 1e-6
    good = (likeness >= LEAST_LIKENESS[dtype]) | same
    return bool(good.all() if dtype == torch.float32 else good.float().mean() > 0.5)


def pages_alike(model: Any, spec: ForeignSpec, found: Survey) -> bool:
    """Whether the model gives the same over pages: two sequences, a prompt of two chunks and one of one, then single
    tokens of both in one step."""
    weight = model.get_input_embeddings().weight
    each = -(-TOKENS // PAGE)
    cache = KVCache.allocate(spec, 2 * each + 1, PAGE, weight.dtype, weight.device)
    slots = SlotTable.allocate(2, each, weight.device)
    slots.block_table()[:2].copy_(torch.arange(1, 2 * each + 1, device=weight.device).view(2, each))
    decoder = HfDecoder(spec, model, select_ops("torch", weight.device), found.places)

    def run(phase: str, tokens: list[tuple[int, int]], padding: int = 0) -> torch.Tensor:
        """Logits ``[T, V]`` of tokens given as (sequence, position), with padding behind."""
        rows = [*tokens, *[(slots.dummy, 0)] * padding]
        ids = [int(found.sequences[s][p]) if s < slots.dummy else 0 for s, p in rows]
        columns = (ids, [p for _, p in rows], [s for s, _ in rows], list(range(len(rows))), [0], [0])
        batch = Batch(*(torch.tensor(column, dtype=torch.int32, device=weight.device) for column in columns))
        return decoder.logits(PagedPass(phase, batch, None, cache, slots, None, found.places), batch.sample_index)

    lengths = [len(one) for one in found.sequences]
    got = []
    split = lengths[0] - 3
    run("prefill", [(0, p) for p in range(CHUNK)])
    got.append((0, split - 1, run("prefill", [(0, p) for p in range(CHUNK, split)], padding=2)[split - CHUNK - 1]))
    after = lengths[1] - 3
    got.append((1, after - 1, run("prefill", [(1, p) for p in range(after)])[after - 1]))
    for step in range(3):
        both = run("decode", [(1, after + step), (0, split + step)])
        got += [(1, after + step, both[0]), (0, split + step, both[1])]
    return alike([row for *_, row in got], [found.expected[s][p] for s, p, _ in got], weight.dtype)


def grows_alike(model: Any, spec: ForeignSpec, found: Survey) -> bool:
    """Whether the model gives the same with the cache it grows: a prompt, then single tokens."""
    weight = model.get_input_embeddings().weight
    decoder = OwnCacheDecoder(spec, model, select_ops("torch", weight.device))
    ids, got, start = found.sequences[0].tolist(), [], 0
    ends = range(len(ids) - 4, len(ids) + 1)
    for end in ends:
        try:
            row = decoder.extend(0, start, ids[start:end])
        except (AttributeError, TypeError, ValueError, RuntimeError, KeyError, IndexError):
            return False  # no cache of the usual kind
        assert row is not None
        got.append(row)
        start = end
    return alike(got, [found.expected[0][end - 1] for end in ends], weight.dtype)


def turning_length(model: Any) -> int:
    """Tokens after which a ``longrope`` model rotates all keys otherwise; 0 for all other models."""
    text = model.config.get_text_config()
    if "longrope" not in _rope_kinds(text):
        return 0
    tables = [getattr(text, name, None) or {} for name in ("rope_scaling", "rope_parameters")]
    lengths = [text, *tables]
    name = "original_max_position_embeddings"
    values = [one.get(name) if isinstance(one, dict) else getattr(one, name, None) for one in lengths]
    return next((int(value) for value in values if value), 0)
