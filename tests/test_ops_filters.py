"""The search for the thresholds of top-k and top-p: exact for every shape of a row, whatever the passes leave open."""

from __future__ import annotations

import pytest
import torch
import triton.language as tl
from ops_cases import int32, no_masks, poison, sample, sampling_slots, scratch_for

from jitgraph.jit.kernel import kernel
from jitgraph.ops import sampling
from jitgraph.ops.sampling_filter_kernels import _after_pass, _finished, _largest, _value
from jitgraph.ops.slots import SlotTable
from jitgraph.types import MAX_LOGPROBS, SamplingParams

VOCABULARY = 1100
FEW = [(1, 1.0), (37, 1.0), (VOCABULARY - 1, 1.0), (0, 0.3), (0, 0.9999), (40, 0.9)]
"""(top_k, top_p) under the interpreter, which is slow; a GPU takes all pairs."""
ALL = [(k, p) for k in (0, 1, 2, 37, 900, VOCABULARY - 1) for p in (1e-6, 0.3, 0.9, 0.9999, 1.0) if k or p < 1]


@kernel
def _threshold_kernel(
    sample_slot, sample_position, slots, scratch, before,
    SLOT_STRIDE: tl.constexpr, SCRATCH_STRIDE: tl.constexpr, VOCABULARY: tl.constexpr, BLOCKS: tl.constexpr,
    BLOCKS_PADDED: tl.constexpr, BLOCK: tl.constexpr, FANOUT: tl.constexpr,
):  # fmt: skip
    """In the place of ``draw_kernel``: leaves the least x that is kept in the row's first word."""
    row = tl.program_id(0)
    words = slots + tl.load(sample_slot + row) * SLOT_STRIDE
    base = scratch + row * SCRATCH_STRIDE
    if tl.program_id(1) == 0:  # every block finds the same
        x_max = _largest(base, words, BLOCKS, BLOCKS_PADDED)
        earlier = before + row * SCRATCH_STRIDE
        low, high, stage, target = _after_pass(earlier, words, x_max, BLOCKS, BLOCKS_PADDED, FANOUT)
        low = _finished(base + 7 * BLOCKS, low, high, stage, target, words, x_max, VOCABULARY, BLOCK)
        tl.store(base, _value(low))


@pytest.fixture(params=[1, sampling._PASSES], ids="passes{}".format)
def passes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The usual passes, and so few that most is left to the bisection at the end."""
    monkeypatch.setattr(sampling, "_PASSES", request.param)
    monkeypatch.setattr(sampling, "draw_kernel", _threshold_kernel)


def thresholds(logits: torch.Tensor, slots: SlotTable) -> torch.Tensor:
    """The least value that each row keeps, float32 ``[R]``; row r belongs to slot r, at temperature 1."""
    rows, device = logits.shape[0], logits.device
    slot, scratch = torch.arange(rows, dtype=torch.int32, device=device), scratch_for(logits)
    history = torch.zeros(slots.words.shape[0], logits.shape[1], dtype=torch.int32, device=device)
    top_ids = poison(rows, MAX_LOGPROBS, device=device, dtype=torch.int32)
    top = (poison(rows, device=device), top_ids, poison(rows, MAX_LOGPROBS, device=device))
    state = (slots, history, no_masks(slots, logits.shape[1]))
    sampling.sample(logits, slot, slot + 9, *state, scratch, int32([0] * rows, device), *top)
    return scratch[:, 0].clone()


def shapes() -> dict[str, torch.Tensor]:
    """Rows ``[V]`` that a search could stumble over."""
    generator = torch.Generator().manual_seed(3)
    normal = torch.randn(VOCABULARY, generator=generator) * 3
    adjacent = (torch.arange(VOCABULARY, dtype=torch.int32) + torch.tensor(1.5).view(torch.int32)).view(torch.float32)
    masked, outlier, huge = normal.clone(), normal.clone(), normal.clone()
    masked[::3] = -torch.inf
    outlier[5], outlier[7] = -1e30, -3e38
    huge[3], huge[4] = 1e30, 3e38
    return {
        "normal": normal,
        "ties": normal.round(),
        "equal": torch.full((VOCABULARY,), -2.75),
        "zeros of both signs": torch.where(normal > 0, 0.0, -0.0),
        "adjacent floats": adjacent[torch.randperm(VOCABULARY, generator=generator)],
        "denormal": torch.arange(VOCABULARY, dtype=torch.int32).view(torch.float32),
        "wide": normal * 1e4,
        "masked": masked,
        "outliers below": outlier,
        "outliers above": huge,
        "peaked": torch.where(torch.arange(VOCABULARY) == 1234, 60.0, normal),
    }


@pytest.mark.filterwarnings("ignore:overflow encountered in exp", "ignore:All-NaN")
@pytest.mark.usefixtures("passes")
@pytest.mark.parametrize("shape", shapes())
def test_thresholds(device: torch.device, shape: str) -> None:
    """At least k are kept, and fewer than k without the least value among them; what is kept reaches p of what top-k
    left, and would not without its least value, within float32's rounding."""
    row, cases = shapes()[shape], ALL if device.type == "cuda" else FEW
    params = [SamplingParams(temperature=1.0, top_k=k, top_p=p) for k, p in cases]
    slots = sampling_slots([(one, 3, (), 0) for one in params], device)
    found = thresholds(row[None].expand(len(cases), -1).contiguous().to(device), slots)

    def mass(x: torch.Tensor) -> float:
        return float((x.double() - row.max().double()).exp().sum())

    for (k, p), threshold in zip(cases, found.tolist(), strict=True):
        left = row[row >= row.sort(descending=True).values[k - 1]] if k else row
        kept = row[row >= threshold]
        fewer, where = kept[kept > kept.min()], f"top_k {k}, top_p {p}: {threshold}"
        if p == 1.0:
            assert len(fewer) < k <= len(kept), where
        else:
            assert len(kept) <= len(left), where
            assert mass(kept) >= (p - 1e-5) * mass(left), f"{where} keeps too little"
            assert mass(fewer) < (p + 1e-5) * mass(left), f"{where} keeps too much"


@pytest.mark.filterwarnings("ignore:All-NaN")
@pytest.mark.usefixtures("passes")
def test_rows_in_all_stages_side_by_side(device: torch.device) -> None:
    """Thresholds do not depend on what the neighbours look for."""
    row = shapes()["normal"]
    params = [
        SamplingParams(temperature=1.0, top_k=50, top_p=0.8),
        SamplingParams(temperature=1.0),
        SamplingParams(temperature=1.0, min_p=0.1),
        SamplingParams(temperature=1.0, top_k=3),
        SamplingParams(temperature=1.0, top_p=0.5, min_p=0.1),
    ]
    slots = sampling_slots([(p, 3, (), 0) for p in params], device)
    together = thresholds(row[None].expand(5, -1).contiguous().to(device), slots)
    for r in (0, 3, 4):
        one = sampling_slots([(params[r], 3, (), 0)], device)
        assert torch.equal(together[r : r + 1], thresholds(row[None].contiguous().to(device), one))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("count", [1, sampling._PASSES])
def test_nonsense_ends_inside_the_vocabulary(device: torch.device, monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """NaN and infinities: no endless search, no id that does not exist."""
    monkeypatch.setattr(sampling, "_PASSES", count)
    params = [SamplingParams(temperature=1.0, top_k=3), SamplingParams(temperature=0.5, top_k=9, top_p=0.5)]
    slots = sampling_slots([(p, 3, (), 0) for p in params], device)
    nan, inf = torch.nan, torch.inf
    for some, others in ((nan, nan), (nan, 0.0), (inf, 0.0), (inf, inf), (-inf, -inf), (-inf, nan), (inf, -inf)):
        logits = torch.full((2, VOCABULARY), others, device=device)
        logits[:, [3, 1050]] = some
        tokens = sample(sampling, logits, int32([0, 1], device), int32([9, 9], device), slots)[0]
        assert all(0 <= token < VOCABULARY for token in tokens.tolist()), (some, others)
