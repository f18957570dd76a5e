"""Penalties, bias and the history of ids: kernels against their PyTorch meaning, and that against plain loops and
transformers."""

from __future__ import annotations

import pytest
import torch
import transformers
import triton
import triton.language as tl
from ops_cases import DTYPES, draw_count, draws, history_of, int32, poison, sample, sampling_slots

from jitgraph.jit.kernel import kernel
from jitgraph.ops import reference_sampling as reference
from jitgraph.ops import sampling
from jitgraph.ops.history_kernels import biased, penalised
from jitgraph.ops.slots import IN_PROMPT
from jitgraph.types import MAX_LOGIT_BIAS, SamplingParams

Lived = tuple[list[int], list[int]]
"""Prompt and output."""
BLOCK = 1024


def plainly(row: torch.Tensor, params: SamplingParams, sequence: Lived) -> torch.Tensor:
    """The logits ``[V]`` with penalties and bias, one id after the other, in float64."""
    prompt, output = sequence
    x: list[float] = row.double().tolist()
    for i in set(prompt + output):
        x[i] = x[i] / params.repetition_penalty if x[i] > 0 else x[i] * params.repetition_penalty
    for i in output:
        x[i] -= params.frequency_penalty
    for i in set(output):
        x[i] -= params.presence_penalty
    for i, bias in params.bias_entries:
        x[i] += bias
    return torch.tensor(x, dtype=torch.float64, device=row.device)


def lived(vocabulary: int, seed: int) -> Lived:
    """A prompt and an output full of repeats; the first and the last id of the vocabulary are among them."""
    generator = torch.Generator().manual_seed(seed)
    few = torch.randint(0, vocabulary, (max(2, vocabulary // 8),), generator=generator)
    prompt, output = (few[torch.randint(0, len(few), (40,), generator=generator)].tolist() for _ in range(2))
    return [*prompt, 0], [*output, vocabulary - 1, vocabulary - 1]


def biases(vocabulary: int, count: int) -> dict[int, float]:
    """Ids spread over the vocabulary, crowds at block boundaries included, each with its own value."""
    wanted = [*range(count // 3), *range(BLOCK - 9, BLOCK + 9), *range(vocabulary - count // 3, vocabulary)]
    ids = sorted({i for i in wanted if 0 <= i < vocabulary})[-count:]
    return {i: ((i * 37) % 400 - 200) / 16 for i in ids}


def mixture(vocabulary: int) -> list[SamplingParams]:
    """Rows of every kind, those without any penalty or bias among them."""
    return [
        SamplingParams(temperature=1.0),
        SamplingParams(temperature=1.0, repetition_penalty=1.3),
        SamplingParams(temperature=0.7, presence_penalty=0.9),
        SamplingParams(temperature=1.0, frequency_penalty=0.35),
        SamplingParams(temperature=1.0, logit_bias=biases(vocabulary, 40)),
        SamplingParams(
            temperature=1.0,
            top_k=40,
            top_p=0.9,
            repetition_penalty=0.6,
            presence_penalty=-1.3,
            frequency_penalty=-0.7,
            logit_bias=biases(vocabulary, MAX_LOGIT_BIAS),
        ),
        SamplingParams(temperature=0.0, repetition_penalty=1.1, presence_penalty=2.0, frequency_penalty=2.0),
    ]


# --------------------------------------------------------------------------------------------------------------- values


@kernel
def _adjust_kernel(
    x, slots, history, out,
    SLOT_STRIDE: tl.constexpr, VOCABULARY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Row r of ``x`` belongs to slot r: what ``sample`` sees after penalties and bias."""
    row = tl.program_id(0)
    first = tl.program_id(1) * BLOCK
    ids = first + tl.arange(0, BLOCK)
    words = slots + row * SLOT_STRIDE
    value = tl.load(x + row * VOCABULARY + ids, mask=ids < VOCABULARY, other=float("-inf")).to(tl.float32)
    value = penalised(value, ids, words, history + row * VOCABULARY, VOCABULARY)
    tl.store(out + row * VOCABULARY + ids, biased(value, ids, first, words, BLOCK), mask=ids < VOCABULARY)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocabulary", [5, 1023, 1025, 3001])
def test_values(device: torch.device, dtype: torch.dtype, vocabulary: int) -> None:
    """The kernel's values are the reference's to the bit, and the reference's are those of plain loops."""
    params = mixture(vocabulary)
    rows = len(params)
    sequences = [lived(vocabulary, seed) for seed in range(rows)]
    slots = sampling_slots([(p, 3, (), 0) for p in params], device)
    kept = [s if p.penalised else None for p, s in zip(params, sequences, strict=True)]
    history = history_of(kept, vocabulary, device)
    logits = (torch.randn(rows, vocabulary, device=device) * 4).to(dtype)
    logits[:, 0] = -3.0  # an id below 0 that is penalised for certain
    slot = torch.arange(rows, device=device)
    expected = reference._penalise(logits.float(), slot, slots, history) + reference._bias(slot, slots, vocabulary)
    actual = poison(rows, vocabulary, device=device)
    _adjust_kernel[(rows, triton.cdiv(vocabulary, BLOCK))](
        logits, slots.words, history, actual, SLOT_STRIDE=slots.stride, VOCABULARY=vocabulary, BLOCK=BLOCK
    )
    assert torch.equal(actual, expected)
    assert torch.equal(actual[0], logits[0].float())
    for r in range(rows):
        plain = plainly(logits[r], params[r], sequences[r])
        torch.testing.assert_close(actual[r].double(), plain, atol=1e-5, rtol=1e-6)
        assert r == 0 or not torch.equal(actual[r], logits[r].float())


@pytest.mark.parametrize("penalty", [0.5, 1.0, 1.7, 10.0])
def test_repetition_is_that_of_transformers(device: torch.device, penalty: float) -> None:
    logits = torch.randn(1, 500, device=device) * 3
    prompt, output = lived(500, 3)
    slots = sampling_slots([(SamplingParams(repetition_penalty=penalty), 3, (), 0)], device)
    history = history_of([(prompt, output)], 500, device)
    theirs = transformers.RepetitionPenaltyLogitsProcessor(penalty)(int32([prompt + output], device).long(), logits)
    ours = reference._penalise(logits, torch.zeros(1, dtype=torch.long, device=device), slots, history)
    torch.testing.assert_close(ours, theirs, atol=0, rtol=2e-7)
    assert torch.equal(ours, logits) == (penalty == 1.0)


# --------------------------------------------------------------------------------------------------------------- choice


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocabulary", [7, 1025])
def test_mixed_rows_draw_the_reference_tokens(device: torch.device, dtype: torch.dtype, vocabulary: int) -> None:
    """A batch in which every row asks for something else, over several positions."""
    params = mixture(vocabulary)
    sequences = [lived(vocabulary, seed) if p.penalised else None for seed, p in enumerate(params)]
    slots = sampling_slots([(p, 3, (), seed) for seed, p in enumerate(params)], device)
    history = history_of(sequences, vocabulary, device)
    slot = torch.arange(len(params), dtype=torch.int32, device=device)
    for position in range(draw_count(device, 2, 20)):
        logits = torch.randn(len(params), vocabulary, device=device).to(dtype)
        args = (logits, slot, slot + 10 * position, slots, history)
        assert torch.equal(sample(sampling, *args)[0], sample(reference, *args)[0])


@pytest.mark.filterwarnings("ignore:All-NaN")
def test_neighbours_do_not_change_a_row(device: torch.device) -> None:
    """Any company, any order, any slot: each row draws what it draws alone."""
    vocabulary, generator = 1100, torch.Generator().manual_seed(2)
    params = mixture(vocabulary)
    rows = len(params)
    sequences = [lived(vocabulary, seed) if p.penalised else None for seed, p in enumerate(params)]
    logits = torch.randn(rows, vocabulary, generator=generator)
    logits[3, ::7] = torch.nan  # not even this
    position = int32([9 + 5 * r for r in range(rows)], device)

    def drawn(order: list[int]) -> list[int]:
        slots = sampling_slots([(params[r], 3, (), r) for r in order], device)
        history = history_of([sequences[r] for r in order], vocabulary, device)
        slot = torch.arange(len(order), dtype=torch.int32, device=device)
        return sample(sampling, logits[order].to(device), slot, position[order], slots, history)[0].tolist()

    alone = [drawn([r])[0] for r in range(rows)]
    assert drawn(list(range(rows))) == alone
    for _ in range(draw_count(device, 3, 20)):
        order = torch.randperm(rows, generator=generator).tolist()[
            : 1 + int(torch.randint(0, rows, (1,), generator=generator))
        ]
        assert drawn(order) == [alone[r] for r in order]


@pytest.mark.parametrize("ops", [sampling, reference], ids=["kernel", "reference"])
def test_the_most_likely_token_after_penalties(device: torch.device, ops: object) -> None:
    """Temperature 0 takes the argmax of the changed logits, and reports the raw log-probability."""
    row = torch.zeros(2000, device=device)
    row[[4, 1500, 1999, 8]] = torch.tensor([5.0, 4.0, 3.0, 2.0], device=device)
    for values, expected in (
        ({}, 4),
        ({"repetition_penalty": 2.0}, 1999),  # 4 is in the prompt: 2.5, 1500 in the output: 2.0
        ({"presence_penalty": 1.5}, 4),  # 1500 falls to 2.5; prompt ids are not touched
        ({"frequency_penalty": -0.75}, 1500),  # twice in the output: 5.5
        ({"logit_bias": {4: -100.0, 1500: -100.0}}, 1999),
        ({"logit_bias": {8: 100.0}}, 8),
        ({"logit_bias": {8: 3.5}, "repetition_penalty": 1.25}, 8),  # 5.5 against 4.0
    ):
        params = SamplingParams(logprobs=1, **values)
        slots = sampling_slots([(params, 3, (), 0)], device)
        history = history_of([([4, 7], [1500, 1500])], 2000, device)
        results = sample(ops, row[None], int32([0], device), int32([9], device), slots, history)
        tokens, logprobs, ids, _ = results
        assert tokens.tolist() == [expected], values
        assert ids[0, 0] == 4
        torch.testing.assert_close(logprobs[0], torch.log_softmax(row, -1)[expected], atol=1e-5, rtol=1e-5)


def test_bias_does_not_lift_the_bar_on_stop_ids(device: torch.device) -> None:
    row = torch.zeros(50, device=device)
    params = SamplingParams(temperature=1.0, min_tokens=4, logit_bias={2: 100.0})
    for ops in (sampling, reference):
        tokens = draws(ops, row, params, 9, stops=(2,)).tolist()  # positions 1..9, MIN_LENGTH 7
        assert 2 not in tokens[:6] and tokens[6:] == [2, 2, 2]


# -------------------------------------------------------------------------------------------------------------- history


def note(
    ops: object, ids: list[int], start: int, slot: int, padding: int, kinds: list[SamplingParams], history: torch.Tensor
) -> None:
    """``note_prompt`` of a chunk with ``padding`` tokens of the dummy slot behind it."""
    device = history.device
    slots = sampling_slots([(p, 3, (), 0) for p in kinds], device)
    token_ids = int32(ids + [0] * padding, device)
    positions = int32([*range(start, start + len(ids)), *[0] * padding], device)
    token_slot = int32([slot] * len(ids) + [slots.dummy] * padding, device)
    ops.note_prompt(token_ids, positions, token_slot, slots, history)  # type: ignore[attr-defined]


@pytest.mark.parametrize("padding", [0, 3, 300])
@pytest.mark.parametrize("length", [1, 2, 300])
def test_note_prompt(device: torch.device, length: int, padding: int) -> None:
    """Chunks of one prompt on a slot that held another sequence: the new prompt's marks alone, no other row changed."""
    vocabulary = 4100
    kinds = [SamplingParams(), SamplingParams(presence_penalty=1.0), SamplingParams(repetition_penalty=1.2)]
    generator = torch.Generator().manual_seed(length)
    ids = torch.randint(1, vocabulary, (2 * length,), generator=generator).tolist()
    ids[0], ids[length - 1], ids[-1] = 2047, 2048, vocabulary - 1  # about the end of one program's ids
    for slot in (1, 2):
        histories = []
        for ops in (sampling, reference):
            history = history_of([None, lived(vocabulary, 1), lived(vocabulary, 2)], vocabulary, device)
            before = history.clone()
            note(ops, ids[:length], 0, slot, padding, kinds, history)
            note(ops, ids[length:], length, slot, padding, kinds, history)
            others = [row for row in range(4) if row != slot]
            assert torch.equal(history[others], before[others])
            histories.append(history)
        expected = history_of([(ids, [])], vocabulary, device)[0]
        assert torch.equal(histories[0][slot], expected) and torch.equal(histories[1][slot], expected)


@pytest.mark.parametrize("ops", [sampling, reference], ids=["kernel", "reference"])
def test_slots_without_penalties_have_no_history(device: torch.device, ops: object) -> None:
    """A slot that is not PENALISED, and a step of padding alone, change nothing."""
    kinds = [SamplingParams(temperature=1.0, logit_bias={3: 1.0}), SamplingParams(presence_penalty=1.0)]
    history = history_of([None, lived(60, 1)], 60, device)
    before = history.clone()
    note(ops, [5, 6, 7], 0, 0, 2, kinds, history)
    note(ops, [], 0, 0, 4, kinds, history)
    assert torch.equal(history, before)


@pytest.mark.parametrize("ops", [sampling, reference], ids=["kernel", "reference"])
def test_a_whole_life(device: torch.device, ops: object) -> None:
    """Two chunks of a prompt, then token after token: each is the argmax that plain loops find."""
    vocabulary, prompt = 1030, [5, 1029, 5, 17]
    params = SamplingParams(max_tokens=40, repetition_penalty=1.2, presence_penalty=0.5, frequency_penalty=0.3)
    slots = sampling_slots([(SamplingParams(), 3, (), 0), (params, len(prompt), (), 0)], device)
    history = history_of([None, lived(vocabulary, 9)], vocabulary, device)
    base = torch.randn(vocabulary, generator=torch.Generator().manual_seed(4))
    base[prompt] += 5.0
    note(ops, prompt[:3], 0, 1, 2, [SamplingParams(), params], history)
    note(ops, prompt[3:], 3, 1, 0, [SamplingParams(), params], history)
    slot, counter = int32([1], device), torch.ones(1, dtype=torch.int64, device=device)
    ring = torch.zeros(64, 4, 42, dtype=torch.int64, pin_memory=device.type == "cuda")
    output: list[int] = []
    for step in range(1, draw_count(device, 13, 37)):
        logits = base[None].roll(step % 3, 1).to(device).contiguous()
        position = int32([len(prompt) + len(output)], device)
        results = sample(ops, logits, slot, position, slots, history)
        ops.advance(slot, position, *results, slots, history, counter, ring, step)  # type: ignore[attr-defined]
        expected = int(plainly(logits[0], params, (prompt, output)).argmax())
        assert results[0].tolist() == [expected], f"step {step}"
        output.append(expected)
    assert len(set(output)) < len(output), "nothing was ever chosen twice: too easy"
    assert torch.equal(history[1].cpu(), history_of([(prompt, output)], vocabulary, torch.device("cpu"))[0])
    assert int(history[1, 5]) & IN_PROMPT
