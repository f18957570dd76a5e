"""Models outside the native families against plain transformers: the same greedy ids, logits within 1e-4 in float32,
and everything the engine offers native models, or a word on why not."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from test_correctness import assert_close, poison

from jitgraph.config import EngineConfig
from jitgraph.engine.engine import Engine
from jitgraph.engine.report import counters, describe
from jitgraph.errors import CheckpointError, ConfigError, UnsupportedModelError
from jitgraph.graphs.capture import Capturer
from jitgraph.llm import LLM
from jitgraph.model import hf_check
from jitgraph.model.hf import HfModel
from jitgraph.model.hf_spec import ForeignSpec
from jitgraph.model.loader import find_model, load_model
from jitgraph.types import Request, SamplingParams

VOCABULARY = 320
NEW_TOKENS = 20
LENGTHS = (1, 7, 45)
"""One token; one padded chunk; two chunks, past every window."""
IDS: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}
SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 160,
    **IDS,
}
OLD: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "n_embd": 48,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 160,
    **IDS,
}
GROUPED = {"num_key_value_heads": 2}
MIXTURE = {"num_local_experts": 4, "num_experts_per_tok": 2, **GROUPED}
PAGED: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("gpt2", OLD),
    "gpt_neox": ("gpt_neox", {**SHAPE, "rotary_pct": 0.5}),
    "phi": ("phi", {**SHAPE, **GROUPED}),
    "gemma2": ("gemma2", {**SHAPE, **GROUPED, "head_dim": 20, "sliding_window": 16, "query_pre_attn_scalar": 30}),
    "mixtral": ("mixtral", {**SHAPE, **MIXTURE, "sliding_window": 12}),
    "llama with gelu": ("llama", {**SHAPE, "hidden_act": "gelu"}),
}
"""On the engine's pages. The last is a native family with what the native decoder has not."""
GROWING: dict[str, tuple[str, dict[str, Any]]] = {
    "bloom": ("bloom", {"vocab_size": VOCABULARY, "hidden_size": 48, "n_layer": 2, "n_head": 4, **IDS}),
    "gptj": ("gptj", {**OLD, "rotary_dim": 4}),
    "falcon": ("falcon", {**SHAPE, "multi_query": True, "new_decoder_architecture": False}),
    "phi3, longrope": (
        "phi3",
        {
            **SHAPE,
            **GROUPED,
            "original_max_position_embeddings": 20,
            "rope_scaling": {"type": "longrope", "short_factor": [1.0] * 6, "long_factor": [2.0] * 6},
        },
    ),
}
"""With the cache that the model grows itself."""


def save(folder: Path, family: str, **changes: Any) -> Any:
    """A small random checkpoint as transformers writes it, and the model, in float32. Logits spread over some units."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(family, **changes)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(1.0 if parameter.dim() == 1 else 0.0, 0.15)
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0.0, 0.1)
    model.save_pretrained(folder)
    return model


def pairs(cases: dict[str, tuple[str, dict[str, Any]]]) -> Callable[..., Any]:
    @pytest.fixture(scope="module", params=cases)
    def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, Path]]:
        family, changes = cases[request.param]
        folder = tmp_path_factory.mktemp(family)
        yield save(folder, family, **changes), folder

    return pair


paged, growing = pairs(PAGED), pairs(GROWING)


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    folder = tmp_path_factory.mktemp("gpt2")
    return save(folder, "gpt2", **OLD), folder


@pytest.fixture
def bloom(tmp_path: Path) -> Path:
    save(tmp_path, *GROWING["bloom"][:1], **GROWING["bloom"][1])
    return tmp_path


def prompts() -> list[tuple[int, ...]]:
    generator = torch.Generator().manual_seed(5)
    return [tuple(torch.randint(0, VOCABULARY, (n,), generator=generator).tolist()) for n in LENGTHS]


def make_engine(folder: Path, device: torch.device, **settings: Any) -> Engine:
    loaded = load_model(str(folder), device=device, dtype="float32")
    config = EngineConfig(**{"max_model_len": 96, "prefill_buckets": (8, 32), "max_streams": 4, **settings})
    engine = Engine(loaded.spec, loaded.weights, config, ())
    poison(engine)
    return engine


def run(engine: Engine, wanted: list[tuple[int, ...]], tokens: int = NEW_TOKENS) -> list[list[int]]:
    """Greedy tokens of every prompt, all submitted at once."""
    for identity, ids in enumerate(wanted):
        engine.submit(Request(identity, ids, SamplingParams(max_tokens=tokens)))
    found: list[list[int]] = [[] for _ in wanted]
    while engine.busy:
        for chunk in engine.step():
            assert chunk.token_id is not None
            found[chunk.request_id].append(chunk.token_id)
    assert engine.pages.free == engine.pages.total
    return found


def reference(model: Any, ids: tuple[int, ...]) -> tuple[torch.Tensor, list[int]]:
    """transformers' logits after the prompt ``[V]``, and what its plain ``generate`` writes."""
    given = torch.tensor([ids])
    with torch.inference_mode():
        logits = model(given).logits[0, -1]
        made = model.generate(
            given,
            attention_mask=torch.ones_like(given),
            max_new_tokens=NEW_TOKENS,
            min_new_tokens=NEW_TOKENS,
            do_sample=False,
            pad_token_id=0,
        )
    return logits, made[0, len(ids) :].tolist()


def whole_reference(model: Any, ids: tuple[int, ...]) -> tuple[torch.Tensor, list[int]]:
    """As ``reference``, but every token from a forward of all before it: transformers 5.17's ``generate`` itself loses
    the thread where a ``longrope`` model passes its original context."""
    tokens: list[int] = []
    with torch.inference_mode():
        logits = model(torch.tensor([ids])).logits[0, -1]
        for _ in range(NEW_TOKENS):
            tokens.append(int(model(torch.tensor([[*ids, *tokens]])).logits[0, -1].argmax()))
    return logits, tokens


def check_against_transformers(model: Any, engine: Engine) -> None:
    turning = "longrope" in str(model.config.to_dict())
    expected = []
    for ids in prompts():
        logits, tokens = (whole_reference if turning else reference)(model, ids)
        expected.append(tokens)
        run(engine, [ids], tokens=1)
        assert_close(engine, logits, f"after the prompt of {len(ids)} tokens")
        poison(engine)
        assert run(engine, [ids]) == [tokens], f"alone, {len(ids)} tokens"
    poison(engine)
    assert run(engine, prompts()) == expected, "in a batch"
    assert run(engine, prompts()[::-1]) == expected[::-1], "in another order"


def test_on_pages(paged: tuple[Any, Path], device: torch.device) -> None:
    """Captured like native steps (exact, padded, in loops), in batches, in chunks, and on pages of earlier prompts."""
    model, folder = paged
    engine = make_engine(folder, device)
    assert engine.notices[0].endswith("on the engine's KV cache")
    check_against_transformers(model, engine)
    assert engine.pages.prefixes is not None and engine.pages.prefixes.found_tokens > 0
    if engine.config.graphs:  # on a GPU some mixtures cannot be captured
        paths = counters(engine)["paths"]
        assert paths["eager"] == 0 and min(paths["exact"], paths["padded"], paths["loop"]) > 0, paths


def test_with_a_cache_of_its_own(growing: tuple[Any, Path], device: torch.device) -> None:
    """Eager, one stream after another, and said so."""
    model, folder = growing
    engine = make_engine(folder, device)
    assert "a KV cache of its own" in engine.notices[0] and "every step runs eagerly" in engine.notices[1]
    check_against_transformers(model, engine)
    found = counters(engine)
    assert found["paths"] == {"exact": 0, "padded": 0, "eager": found["steps"], "loop": 0}
    assert found["eager_reasons"] == {"not_capturable": found["steps"]}
    assert engine.pages.prefixes is None and not engine.config.graphs


@pytest.mark.parametrize(
    "settings", [{"graphs": False}, {"fused_sampling": False}, {"max_graphs": 2}, {"prefix_cache": False}], ids=str
)
def test_settings_do_not_change_tokens(gpt2: tuple[Any, Path], settings: dict[str, Any], device: torch.device) -> None:
    model, folder = gpt2
    expected = [reference(model, ids)[1] for ids in prompts()]
    assert run(make_engine(folder, device, **settings), prompts()) == expected


def test_sampling_is_the_engines_own(gpt2: tuple[Any, Path], bloom: Path) -> None:
    """Seeds, penalties, bias and stop ids mean what they mean everywhere, on either way of running, alone or not."""
    params = SamplingParams(
        max_tokens=12, temperature=0.9, top_k=40, seed=7, repetition_penalty=1.3, logit_bias={5: -100.0}, logprobs=1
    )
    for folder in (gpt2[1], bloom):
        with LLM(str(folder), device="cpu", max_streams=3, max_model_len=96, prefill_buckets=(8, 32)) as llm:
            together = llm.generate([list(ids) for ids in prompts()], params)
            for ids, expected in zip(prompts(), together, strict=True):
                alone = llm.generate([list(ids)], params)[0]
                assert alone.token_ids == expected.token_ids and 5 not in alone.token_ids
            stopped = llm.generate([list(prompts()[1])], SamplingParams(max_tokens=20, temperature=0.0))[0]
            end = stopped.token_ids[3]
            again = llm.generate([list(prompts()[1])], SamplingParams(max_tokens=20, stop_token_ids=(end,)))[0]
            assert again.token_ids == stopped.token_ids[: stopped.token_ids.index(end) + 1]


@pytest.mark.parametrize("which", ["pages", "own"])
def test_prompt_logprobs(gpt2: tuple[Any, Path], tmp_path: Path, which: str) -> None:
    model, folder = gpt2 if which == "pages" else (save(tmp_path, "bloom", **GROWING["bloom"][1]), tmp_path)
    ids = prompts()[2]
    with torch.inference_mode():
        expected = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    with LLM(str(folder), device="cpu", max_streams=1, max_model_len=96, prefill_buckets=(8, 32)) as llm:
        found = llm.generate([list(ids)], SamplingParams(max_tokens=2), prompt_logprobs=1)[0].prompt_logprobs
    assert found is not None and found[0] is None and len(found) == len(ids)
    for place, one in enumerate(found[1:]):
        assert one is not None and one.token_id == ids[place + 1]
        assert one.logprob == pytest.approx(float(expected[place, ids[place + 1]]), abs=1e-4)
        assert one.top[0][0] == int(expected[place].argmax())


def test_in_a_process_of_its_own(gpt2: tuple[Any, Path]) -> None:
    """The same answers over the wire, and the same notices."""
    model, folder = gpt2
    expected = reference(model, prompts()[1])[1]
    settings: dict[str, Any] = {"device": "cpu", "max_streams": 1, "max_model_len": 96, "prefill_buckets": (8, 32)}
    with LLM(str(folder), isolated=True, **settings) as llm:
        found = llm.generate([list(prompts()[1])], SamplingParams(max_tokens=NEW_TOKENS, ignore_eos=True))[0]
        assert list(found.token_ids) == expected
        assert llm.describe()["forward"] == "transformers" and "transformers" in llm.notices[0]


# --------------------------------------------------------------------------------------------- what cannot be captured


def test_what_cannot_be_captured_runs_eagerly_and_says_so(gpt2: tuple[Any, Path], device: torch.device) -> None:
    model, folder = gpt2

    def refuse(*_: Any) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    with patch.object(Capturer, "capture", refuse):
        engine = make_engine(folder, device)
    assert "cannot be captured in CUDA graphs (RuntimeError: operation not permitted" in engine.notices[1]
    assert "\n" not in engine.notices[1]
    assert run(engine, prompts()) == [reference(model, ids)[1] for ids in prompts()]
    found = counters(engine)
    assert set(found["eager_reasons"]) == {"not_capturable"} and found["paths"]["eager"] == found["steps"]
    assert found["capture_failures"] == {"capture: RuntimeError": 10}  # 4 rows in 2 kinds, 2 buckets
    assert any(event.detail.startswith("capture: RuntimeError") for event in engine.store.events)


def test_one_size_that_cannot_be_captured(gpt2: tuple[Any, Path], device: torch.device) -> None:
    """The others are, and serve in its place."""
    model, folder = gpt2
    real, first = Capturer.capture, []

    def refuse_largest(self: Capturer, work: Callable[[], None]) -> Any:
        if not first:
            first.append(work)
            raise RuntimeError("not this one")
        return real(self, work)

    with patch.object(Capturer, "capture", refuse_largest):
        engine = make_engine(folder, device, rolling=False)
    assert len(engine.notices) == 1 and engine.config.graphs
    assert run(engine, prompts()) == [reference(model, ids)[1] for ids in prompts()]
    found = counters(engine)
    assert found["capture_failures"] == {"capture: RuntimeError": 1}
    assert found["eager_reasons"] == {"capture_failed": 1, "never_captured": 1}  # 32 tokens, and 13


def test_a_native_model_that_cannot_be_captured_is_a_defect(device: torch.device) -> None:
    with (
        patch.object(Capturer, "capture", side_effect=RuntimeError("no")),
        pytest.raises(RuntimeError, match="no"),
    ):
        LLM("tiny", device=str(device), max_streams=1, prefill_buckets=(8,))


# ------------------------------------------------------------------------------------------- a way that would be wrong


def test_a_way_that_differs_is_not_taken(gpt2: tuple[Any, Path], device: torch.device) -> None:
    """Attention that misses a factor, as one of an odd family might: the check before ready finds it, the model's own
    cache serves."""
    model, folder = gpt2
    with patch("jitgraph.model.hf_attention.paged_attention", side_effect=lambda q, *_: q * 0.5):
        engine = make_engine(folder, device)
    assert "the logits differ from those of the model's own forward" in engine.notices[0]
    assert run(engine, prompts()) == [reference(model, ids)[1] for ids in prompts()]


def test_a_model_without_any_way_is_refused(tmp_path: Path) -> None:
    save(tmp_path, "mamba", vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=1, state_size=4, **IDS)
    with pytest.raises(UnsupportedModelError, match="mamba model does not go on with a sequence from a cache"):
        load_model(str(tmp_path), device="cpu")


def test_likeness_tells_rounding_from_error() -> None:
    rows = [torch.randn(50, generator=torch.Generator().manual_seed(seed)) for seed in range(4)]
    assert hf_check.alike([row + 3.0 + 1e-4 for row in rows], [row + 3.0 for row in rows], torch.float32)
    other = [*rows[:3], rows[3].roll(1)]
    assert not hf_check.alike(other, rows, torch.float32)
    assert hf_check.alike(other, rows, torch.float16)  # one token in four may be routed otherwise
    assert not hf_check.alike([row.roll(1) for row in rows], rows, torch.float16)
    assert not hf_check.alike([row * float("nan") for row in rows], rows, torch.bfloat16)


# ------------------------------------------------------------------------------------------------- settings and errors


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"kv_window": 64, "max_model_len": None}, "kv_window"),
        ({"batch_invariant": True}, "batch_invariant"),
        ({"graph_scope": "static"}, "graph_scope"),
    ],
)
def test_settings_of_native_models_are_refused(gpt2: tuple[Any, Path], settings: dict[str, Any], word: str) -> None:
    with pytest.raises(ConfigError, match=f"{word}.* is for native models; a gpt2 model runs through transformers"):
        make_engine(gpt2[1], torch.device("cpu"), **settings)


def test_figures_before_anything_is_loaded(gpt2: tuple[Any, Path], tmp_path: Path) -> None:
    model, folder = gpt2
    spec = find_model(str(folder)).spec
    assert isinstance(spec, ForeignSpec) and (spec.family, spec.num_layers, spec.hidden_size) == ("gpt2", 2, 48)
    assert spec.parameters == sum(p.numel() for p in model.parameters())  # tied embeddings once
    assert spec.streamed_parameters == spec.parameters and "gpt2" in spec.why.lower()
    mixture = save(tmp_path, "mixtral", **PAGED["mixtral"][1])
    spec = find_model(str(tmp_path)).spec
    assert isinstance(spec, ForeignSpec)
    experts = sum(p.numel() for name, p in mixture.named_parameters() if ".experts." in name)
    table = VOCABULARY * 48
    assert spec.parameters == sum(p.numel() for p in mixture.parameters())
    assert spec.streamed_parameters == spec.parameters - table - experts // 2  # 2 of 4 experts


def test_random_weights_are_seeded(gpt2: tuple[Any, Path], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((gpt2[1] / "config.json").read_text())
    before = torch.random.get_rng_state()
    held = [load_model(str(tmp_path), device="cpu", weights="random", seed=seed).weights for seed in (3, 3, 4)]
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(isinstance(one, HfModel) for one in held)
    first, same, other = (one.embedding for one in held)
    assert torch.equal(first, same) and not torch.equal(first, other)


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"model_type": "nonesuch"}, UnsupportedModelError, "'nonesuch' is not native and transformers"),
        (
            {"model_type": "nonesuch", "auto_map": {"AutoModelForCausalLM": "evil.Evil"}},
            UnsupportedModelError,
            "code that comes with a checkpoint is never run",
        ),
        ({"model_type": "bert", "architectures": None}, UnsupportedModelError, "'bert' is no causal language model"),
        ({"model_type": "t5", "architectures": None}, UnsupportedModelError, "'t5' is no causal language model"),
        ({"architectures": ["GPT2ForTokenClassification"]}, UnsupportedModelError, "GPT2ForTokenClassification is no"),
        (
            {"quantization_config": {"quant_method": "gptq"}},
            UnsupportedModelError,
            r"quantised checkpoint \(gptq\) of this family",
        ),
        ({"n_head": "four"}, CheckpointError, "transformers refuses|n_head|num_attention_heads"),
        ({"n_head": 7}, CheckpointError, "transformers cannot build this model"),
        ({"n_inner": 33}, CheckpointError, "do not fit its config.json.*of another shape"),
        ({"n_layer": 3}, CheckpointError, "do not fit its config.json.*missing: "),
    ],
)
def test_bad_configurations(
    gpt2: tuple[Any, Path], tmp_path: Path, changes: dict[str, Any], error: type[Exception], words: str
) -> None:
    for path in gpt2[1].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    edit_config(tmp_path, **changes)
    with pytest.raises(error, match=words) as caught:
        load_model(str(tmp_path), device="cpu")
    assert "\n" not in str(caught.value) and not (tmp_path / "ran").exists()


def test_damaged_tensors(gpt2: tuple[Any, Path], tmp_path: Path) -> None:
    for path in gpt2[1].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    whole = load_file(tmp_path / "model.safetensors")
    name = next(name for name in whole if name.endswith("c_proj.weight"))
    save_file({k: v for k, v in whole.items() if k != name}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"1 missing: .*c_proj\.weight"):
        load_model(str(tmp_path), device="cpu")
    eight = {**whole, name: whole[name].to(torch.int8)}
    save_file(eight, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UnsupportedModelError, match="type I8: quantised"):
        load_model(str(tmp_path), device="cpu")


def test_without_transformers(gpt2: tuple[Any, Path]) -> None:
    with (
        patch("jitgraph.model.hf_spec.importlib.util.find_spec", return_value=None),
        pytest.raises(ConfigError, match="runs through transformers, which is not installed: pip install"),
    ):
        find_model(str(gpt2[1]))


def test_transformers_is_left_as_it_was(gpt2: tuple[Any, Path]) -> None:
    log = transformers.utils.logging
    log.set_verbosity_info()
    log.enable_progress_bar()
    try:
        load_model(str(gpt2[1]), device="cpu")
        assert log.get_verbosity() == log.INFO and log.is_progress_bar_enabled()
    finally:
        log.set_verbosity_warning()


def test_describe(gpt2: tuple[Any, Path], device: torch.device) -> None:
    engine = make_engine(gpt2[1], device, max_streams=1)
    about = describe("gpt2", engine)
    assert about["forward"] == "transformers" and about["notices"] == list(engine.notices)
