"""Penalties and bias as a user meets them: through ``LLM``, against transformers, in every kind of graph, and refused
where they make no sense."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from test_correctness import BUCKETS, SHAPE, VOCABULARY

from jitgraph import LLM, SamplingParams
from jitgraph.errors import CheckpointError, RequestError
from jitgraph.model.generation import generation_defaults

TEXT = "The train leaves at nine."
TINY: dict[str, Any] = {"max_model_len": 256, "prefill_buckets": (8, 32, 64)}


@pytest.fixture(scope="module")
def llm(device: torch.device) -> Iterator[LLM]:
    with LLM("tiny", device=str(device), **TINY) as llm:
        yield llm


def tokens(llm: LLM, count: int = 24, prompt: str | list[int] = TEXT, **values: Any) -> tuple[int, ...]:
    return llm.generate([prompt], SamplingParams(max_tokens=count, **values))[0].token_ids


# ------------------------------------------------------------------------------------------------------- what they do


def test_bias_forces_and_bars(llm: LLM) -> None:
    free = tokens(llm)
    assert tokens(llm, logit_bias={7: 100.0}) == (7,) * 24
    assert tokens(llm, logit_bias=((7, 100.0),), temperature=1.0, seed=1) == (7,) * 24
    barred = tokens(llm, logit_bias=dict.fromkeys(set(free), -100.0))
    assert not set(barred) & set(free)
    assert tokens(llm, logit_bias={free[0]: 0.0}) == free, "a bias of nothing changes nothing"


def test_presence_and_frequency_end_repetition(llm: LLM) -> None:
    """The biased model says one word for ever; each penalty ends that, and a negative one brings it about."""
    assert tokens(llm, logit_bias={7: 1.0}) == (7,) * 24
    assert tokens(llm, logit_bias={7: 1.0}, presence_penalty=2.0).count(7) == 1
    assert 1 < tokens(llm, logit_bias={7: 1.0}, frequency_penalty=0.2).count(7) < 12
    free = tokens(llm)
    assert len(set(free)) < 24, "greedy decoding does not repeat itself: too easy"
    for penalties in ({"presence_penalty": 2.0}, {"frequency_penalty": 2.0}):
        assert len(set(tokens(llm, **penalties))) == 24
        opposite = {name: -value for name, value in penalties.items()}
        assert set(tokens(llm, **opposite)) == {free[0]}


def test_presence_and_frequency_look_at_the_output_alone(llm: LLM) -> None:
    prompt = list(range(5, 105))
    wanted = tokens(llm, 1, prompt)[0]
    seen = [wanted, *prompt[1:]]
    first = tokens(llm, 1, seen)
    assert tokens(llm, 1, seen, presence_penalty=2.0, frequency_penalty=2.0) == first
    assert tokens(llm, 1, [first[0]] * 100, repetition_penalty=10.0) != (first[0],)


def test_a_slot_forgets_its_last_request(device: torch.device) -> None:
    """One slot, one request after the other: nothing of an earlier history shows in a later one."""
    with LLM("tiny", max_streams=1, device=str(device), **TINY) as llm:
        penalties = {"repetition_penalty": 1.3, "frequency_penalty": 0.5}
        prompts = [TEXT, list(range(900, 1000)), [5]]  # the second in two chunks
        fresh = [tokens(llm, 20, prompt, **penalties) for prompt in prompts]
        plain = tokens(llm, 20)
        for prompt, expected in [*zip(prompts, fresh, strict=True)][::-1]:
            assert tokens(llm, 20, **penalties, temperature=1.0, seed=3) != plain
            assert tokens(llm, 20) == plain
            assert tokens(llm, 20, prompt, **penalties) == expected


def test_company_changes_nothing(llm: LLM) -> None:
    """Penalised, biased, sampled and greedy requests in one batch: each gets what it gets alone."""
    params = [
        SamplingParams(max_tokens=16),
        SamplingParams(max_tokens=16, repetition_penalty=1.4),
        SamplingParams(max_tokens=16, temperature=0.9, top_p=0.9, presence_penalty=0.8, seed=3),
        SamplingParams(max_tokens=16, logit_bias={7: 1.0, 9: 1.1}, frequency_penalty=0.3, seed=1, temperature=0.5),
        SamplingParams(max_tokens=16, temperature=0.9, seed=3),
    ]
    alone = [llm.generate(TEXT, one)[0].token_ids for one in params]
    assert len(set(alone)) == len(params)
    for order in ([0, 1, 2, 3, 4], [4, 2, 0, 3, 1, 1, 3, 2], [2, 2]):
        together = llm.generate([TEXT] * len(order), [params[i] for i in order])
        assert [output.token_ids for output in together] == [alone[i] for i in order]


def test_logprobs_stay_those_of_the_model(llm: LLM) -> None:
    plain = llm.generate(TEXT, SamplingParams(max_tokens=1, logprobs=5))[0].logprobs
    biased = llm.generate(TEXT, SamplingParams(max_tokens=1, logprobs=5, logit_bias={7: 100.0}))[0].logprobs
    assert plain is not None and biased is not None
    assert biased[0].token_id == 7 and biased[0].logprob < biased[0].top[-1][1]
    assert [i for i, _ in biased[0].top] == [i for i, _ in plain[0].top]
    assert [v for _, v in biased[0].top] == pytest.approx([v for _, v in plain[0].top])


@pytest.mark.parametrize("settings", [{"graphs": False}, {"fused_sampling": False}, {"max_graphs": 1}])
def test_every_path_gives_the_same(llm: LLM, device: torch.device, settings: dict[str, Any]) -> None:
    params = [
        SamplingParams(max_tokens=16, repetition_penalty=1.4, presence_penalty=0.2),
        SamplingParams(max_tokens=16, temperature=0.8, top_k=30, frequency_penalty=0.4, logit_bias={7: 1.0}, seed=3),
    ]
    prompts = [TEXT, list(range(300, 430))]
    expected = [output.token_ids for output in llm.generate(prompts, params)]
    with LLM("tiny", device=str(device), **TINY, **settings) as other:
        assert [output.token_ids for output in other.generate(prompts, params)] == expected


# ------------------------------------------------------------------------------------------------ against transformers


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """(transformers model in float32, folder of the same checkpoint)."""
    torch.manual_seed(2)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE)).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(1.0 if parameter.dim() == 1 else 0.0, 0.1)
    folder = tmp_path_factory.mktemp("llama")
    model.save_pretrained(folder)
    return model, folder


@pytest.mark.parametrize("penalty", [0.7, 1.1, 1.8])
def test_repetition_is_that_of_transformers(pair: tuple[Any, Path], device: torch.device, penalty: float) -> None:
    """Greedy tokens of ``generate(repetition_penalty=...)``, for short prompts and such as come in chunks."""
    model, folder = pair
    generator = torch.Generator().manual_seed(6)
    prompts = [torch.randint(0, VOCABULARY, (n,), generator=generator).tolist() for n in (1, 20, 300)]
    expected = []
    for ids in prompts:
        given = torch.tensor([ids])
        settings = {"max_new_tokens": 40, "min_new_tokens": 40, "do_sample": False, "pad_token_id": 0}
        mask = torch.ones_like(given)
        with torch.inference_mode():
            made = model.generate(given, attention_mask=mask, repetition_penalty=penalty, **settings)
        expected.append(tuple(made[0, len(ids) :].tolist()))
    params = SamplingParams(max_tokens=40, repetition_penalty=penalty)
    with LLM(folder, dtype="float32", max_model_len=400, prefill_buckets=BUCKETS, device=str(device)) as llm:
        assert [output.token_ids for output in llm.generate(prompts, params)] == expected
        assert llm.generate(prompts[1:2], params)[0].token_ids == expected[1]
        assert llm.generate(prompts, SamplingParams(max_tokens=40))[1].token_ids != expected[1]


# ---------------------------------------------------------------------------------------------------------- the records


def test_which_requests_need_what() -> None:
    assert SamplingParams().greedy and not SamplingParams().penalised
    for values in ({"repetition_penalty": 1.1}, {"presence_penalty": -0.1}, {"frequency_penalty": 0.1}):
        params = SamplingParams(**values)
        assert params.penalised and not params.greedy and params.coldest
    biased = SamplingParams(logit_bias={9: 1, 2: -1.5})
    assert not biased.penalised and not biased.greedy
    assert biased.logit_bias == biased.bias_entries == ((2, -1.5), (9, 1.0))
    assert biased == SamplingParams(logit_bias=[(9, 1.0), [2, -1.5]]) and hash(biased)  # type: ignore[arg-type]
    assert SamplingParams(logit_bias={}).greedy


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"repetition_penalty": 0.0}, "repetition_penalty must be between 0.01 and 10"),
        ({"repetition_penalty": 11}, "repetition_penalty must be between 0.01 and 10"),
        ({"repetition_penalty": None}, "repetition_penalty must be a finite number"),
        ({"presence_penalty": 2.1}, "presence_penalty must be between -2 and 2"),
        ({"frequency_penalty": -3}, "frequency_penalty must be between -2 and 2"),
        ({"frequency_penalty": float("nan")}, "frequency_penalty must be a finite number"),
        ({"presence_penalty": True}, "presence_penalty must be a finite number"),
        ({"logit_bias": {3: 101}}, "the logit_bias of token 3 must be between -100 and 100"),
        ({"logit_bias": {3: float("nan")}}, "the logit_bias of token 3 must be between -100 and 100"),
        ({"logit_bias": {3: "1"}}, "the logit_bias of token 3 must be between -100 and 100"),
        ({"logit_bias": {-3: 1}}, "each token id of logit_bias must be a whole number"),
        ({"logit_bias": {"3": 1}}, "each token id of logit_bias must be a whole number"),
        ({"logit_bias": ((3, 1.0), (3, 2.0))}, "logit_bias has token 3 twice"),
        ({"logit_bias": (3, 4)}, "each entry of logit_bias must be a token id and a number"),
        ({"logit_bias": "3=4"}, "logit_bias must map token ids to numbers"),
        ({"logit_bias": None}, "logit_bias must map token ids to numbers"),
        ({"logit_bias": dict.fromkeys(range(301), 1.0)}, "logit_bias has 301 entries; 300 are possible"),
    ],
)
def test_bad_values(values: dict[str, Any], said: str) -> None:
    with pytest.raises(RequestError, match=said):
        SamplingParams(**values)


def test_the_most_biases_possible(llm: LLM) -> None:
    everywhere = {i: 100.0 if i == 2047 else -100.0 for i in range(2047, 0, -7)}
    assert tokens(llm, 4, logit_bias=everywhere) == (2047,) * 4
    assert tokens(llm, 4, logit_bias=dict.fromkeys(range(300), 50.0))[0] < 300


def test_bias_out_of_the_vocabulary(llm: LLM) -> None:
    with pytest.raises(RequestError, match="logit_bias token id 2048 is not in the vocabulary of 2048 entries"):
        tokens(llm, logit_bias={5: 1.0, 2048: 1.0})


def test_generation_config() -> None:
    """The recommended repetition penalty is followed, with sampling and without."""
    assert generation_defaults({"repetition_penalty": 1.2}, "x").params == SamplingParams(repetition_penalty=1.2)
    assert generation_defaults({"repetition_penalty": 1}, "x").params.greedy
    assert generation_defaults({"repetition_penalty": None}, "x").params.greedy
    sampled = generation_defaults({"repetition_penalty": 1.2, "do_sample": True, "temperature": 0.5}, "x")
    assert sampled.params == SamplingParams(repetition_penalty=1.2, temperature=0.5) and sampled.unsupported == ()
    for value, said in ((0, "above zero"), (20.0, "between 0.01 and 10"), ("1.1", "finite number")):
        with pytest.raises(CheckpointError, match=f"x: repetition_penalty must be .*{said}"):
            generation_defaults({"repetition_penalty": value}, "x")
