"""Selection by the Triton kernel is exactly a stable sort, whatever the scores, the lengths and the block are.

Without a GPU the child process of ``test_triton_kernels.py`` runs this file in Triton's interpreter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

import pytest
import torch
from kernel_problem import INTERPRETED

from sglang_sparsespec.attention_backend.kernels.triton_select import Remembered, SelectConfig, select

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
kernels_run_here = pytest.mark.skipif(
    DEVICE == "cpu" and not INTERPRETED, reason="no CUDA GPU: the child process of test_triton_kernels.py runs it"
)
DTYPES = [torch.float16, torch.bfloat16, torch.float32]
BLOCK = 256


def most_nightly(values: Sequence[Sequence[Any]], by_default: Callable[..., bool]) -> list[Any]:
    """Parameters for all combinations; those that are not ``by_default`` are repeats for other shapes or types."""
    combinations = list(product(*values))
    marks = [() if by_default(*each) else (pytest.mark.nightly,) for each in combinations]
    return [pytest.param(*each, marks=mark) for each, mark in zip(combinations, marks, strict=True)]


def sort_keys(scores: torch.Tensor) -> torch.Tensor:
    """int64 keys in the order of the floats' bits: -0 below 0, and NaNs beyond the infinities of their sign."""
    integer, low = (torch.int32, 0x7FFFFFFF) if scores.dtype == torch.float32 else (torch.int16, 0x7FFF)
    bits = scores.view(integer).long()
    return torch.where(bits < 0, bits ^ low, bits)


def check_selection(
    scores: torch.Tensor,
    lens: list[int],
    counts: list[int],
    cap: int,
    block: int = BLOCK,
    index: torch.dtype = torch.int64,
) -> None:
    """Select from ``scores`` [B, Hkv, max_len] and compare every entry of the table with a stable sort."""
    batch, heads, _ = scores.shape
    rows = torch.arange(batch).flip(0) + 1
    expected = torch.full((batch + 2, heads, cap), 1 << 30, dtype=torch.int32)
    positions = torch.full_like(expected, 1 << 30, device=DEVICE)
    for b, (length, count) in enumerate(zip(lens, counts, strict=True)):
        n = min(count, length, cap)
        best = sort_keys(scores[b, :, :length].contiguous()).sort(dim=-1, descending=True, stable=True).indices[:, :n]
        expected[rows[b], :, :n] = best.sort(dim=-1).values.to(torch.int32)
    select(
        scores=scores.to(DEVICE),
        rows=rows.to(DEVICE, index),
        lengths=torch.tensor(lens, dtype=index, device=DEVICE),
        counts=torch.tensor(counts, dtype=torch.int32, device=DEVICE),
        positions=positions,
        config=SelectConfig(block=block),
        pdl=False,
    )
    assert torch.equal(positions.cpu(), expected)


def make_scores(values: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    gen = torch.Generator().manual_seed(0)
    if values == "prob":
        return torch.softmax(2 * torch.randn(shape, generator=gen), dim=-1).to(dtype)
    if values == "signed":
        return torch.randn(shape, generator=gen).to(dtype)
    if values == "negative":
        return (-1 - torch.rand(shape, generator=gen)).to(dtype)
    if values == "equal":
        return torch.full(shape, 0.25).to(dtype)
    if values == "zeros of both signs":
        return (torch.randint(0, 2, shape, generator=gen) * -0.0 + 0).to(dtype)
    if values == "few values":
        return (torch.randint(0, 3, shape, generator=gen) - 1).to(dtype)
    if values == "denormal":
        return (torch.randint(0, 9, shape, generator=gen) * torch.finfo(dtype).smallest_normal / 4).to(dtype)
    integer = torch.int32 if dtype == torch.float32 else torch.int16
    info = torch.iinfo(integer)
    if values == "extreme NaNs":
        return torch.tensor([-1, 0, info.max], dtype=integer)[torch.randint(0, 3, shape, generator=gen)].view(dtype)
    assert values == "any bits"
    return torch.randint(info.min, info.max + 1, shape, generator=gen).to(integer).view(dtype)


VALUES = ["prob", "signed", "negative", "equal", "zeros of both signs", "few values", "denormal", "extreme NaNs", "any bits"]


@kernels_run_here
@pytest.mark.parametrize(
    ("values", "dtype"),
    # Scores are float16; keys of 16 bits are made alike, and others of 32.
    most_nightly((VALUES, DTYPES), lambda values, dtype: dtype == torch.float16 or values in ("prob", "any bits")),
    ids=str,
)
def test_selection_is_a_stable_sort(values: str, dtype: torch.dtype) -> None:
    # Rows of no, one and several blocks; none, all, few, and more than a block or than the table holds are wanted.
    lens = [0, 1, 2, 5, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK - 1, 2 * BLOCK, 2 * BLOCK + 1, 2063, 2064, 2064]
    counts = [3, 1, 1, 5, 13, 40, 13, 2 * BLOCK - 1, 26, 26, 103, 300, 2000]
    check_selection(make_scores(values, (len(lens), 2, 2064), dtype), lens, counts, cap=310)


@kernels_run_here
@pytest.mark.parametrize(
    ("max_len", "dtype"),
    most_nightly(((2001, 2002, 2004), DTYPES), lambda max_len, dtype: dtype == torch.float16 or max_len == 2001),
    ids=str,
)
def test_rows_need_no_alignment(max_len: int, dtype: torch.dtype) -> None:
    scores = make_scores("signed", (3, 3, max_len + 5), dtype)[:, :, 1 : max_len + 1]
    check_selection(scores, [max_len, max_len - 1, 255], [100, 99, 12], cap=128, index=torch.int32)


@kernels_run_here
@pytest.mark.parametrize(
    ("context", "block", "values"),
    most_nightly(
        ((8192, 40960, 131072), (2048, 4096, 8192), ("prob", "equal", "denormal")),
        lambda context, block, values: (context, block) in ((8192, 2048), (40960, 4096), (131072, 8192)),
    ),
)
def test_contexts_of_production(context: int, block: int, values: str) -> None:
    lens = [context, context - 1, min(block + 1, context), block, block - 1]
    counts = [-(-length // 20) for length in lens]
    scores = make_scores(values, (len(lens), 1, context), torch.float16)
    check_selection(scores, lens, counts, cap=-(-context // 20), block=block)


@kernels_run_here
def test_ascending_scores_mislead_no_sample() -> None:
    # The best lie together at the end, the worst at the front: the sample is spread over the row.
    ramp = torch.arange(6000.0).expand(2, 1, 6000) / 6000
    check_selection(ramp.contiguous().to(torch.float16), [6000, 5000], [300, 250], cap=300)
    check_selection(ramp.flip(-1).contiguous().to(torch.float16), [6000, 5000], [300, 250], cap=300)


@kernels_run_here
def test_a_wrong_sample_costs_passes_only() -> None:
    # Every position that a sample of 256 from 4096 looks at is low, or high, unlike all others.
    scores = make_scores("prob", (2, 1, 4096), torch.float16)
    scores[0, :, ::16] = 0
    scores[1, :, ::16] = 1
    check_selection(scores, [4096, 4096], [205, 205], cap=256)


@kernels_run_here
@pytest.mark.parametrize("dtype", [torch.float16, pytest.param(torch.float32, marks=pytest.mark.nightly)], ids=str)
def test_positions_that_are_selected_already_keep_a_share_of_their_scores(dtype: torch.dtype) -> None:
    """Of lists of no, few and many positions, some of them beyond the length, and rows of one block and of several."""
    share, cap, heads, max_len = 0.5, 700, 2, 2064
    lens, counts, known = [2064, 2064, 200, 1000, 150, 0], [600, 40, 50, 690, 150, 3], [700, 90, 200, 0, 150, 9]
    generator = torch.Generator().manual_seed(0)
    # Multiples of 1/64 add up exactly, and 16 bits hold the sums.
    scores = (torch.randint(0, 64, (len(lens), heads, max_len), generator=generator) / 64).to(dtype)
    rows = torch.arange(len(lens)).flip(0) + 1
    positions = torch.full((len(lens) + 2, heads, cap), 1 << 20, dtype=torch.int32)
    remembered = torch.full(positions.shape, 7.0, dtype=torch.float16)
    num_remembered = torch.zeros(len(positions), dtype=torch.int32)
    expected = []
    for b, (length, count, before) in enumerate(zip(lens, counts, known, strict=True)):
        total, num_remembered[rows[b]] = scores[b].float().clone(), before
        for head in range(heads):
            old = torch.randperm(max_len, generator=generator)[:before].sort().values
            positions[rows[b], head, :before] = old.int()
            remembered[rows[b], head, :before] = torch.randint(0, 64, (before,), generator=generator) / 32
            total[head, old] += share * remembered[rows[b], head, :before].float()
        n = min(count, length)
        best = total[:, :length].sort(dim=-1, descending=True, stable=True).indices[:, :n].sort(dim=-1).values
        expected.append((best, total.gather(1, best)))
    on_device = [tensor.to(DEVICE) for tensor in (scores, positions, remembered)]
    select(
        scores=on_device[0],
        rows=rows.to(DEVICE),
        lengths=torch.tensor(lens, device=DEVICE),
        counts=torch.tensor(counts, dtype=torch.int32, device=DEVICE),
        positions=on_device[1],
        config=SelectConfig(block=BLOCK),
        pdl=False,
        remembered=Remembered(on_device[2], num_remembered.to(DEVICE), share),
    )
    for b, (best, best_scores) in enumerate(expected):
        n = best.shape[1]
        assert torch.equal(on_device[1][rows[b], :, :n].cpu(), best.int())
        assert torch.equal(on_device[2][rows[b], :, :n].cpu(), best_scores.half())
    for untouched in (0, len(positions) - 1):
        assert torch.equal(on_device[2][untouched].cpu(), remembered[untouched])
