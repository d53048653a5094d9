"""Selection by the Triton kernel is exactly a stable sort, whatever the scores, the lengths and the block are.

Without a GPU a child process runs this file in Triton's interpreter: ``TRITON_INTERPRET`` must be set before Triton is
imported, and would break other tests of this process.
"""

from __future__ import annotations

import os

import pytest
import torch
from interpreter_child import assert_passes_in_the_interpreter

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
kernels_run_here = pytest.mark.skipif(
    DEVICE == "cpu" and not INTERPRETED, reason="no CUDA GPU: test_every_case_in_the_interpreter runs it in a child process"
)
DTYPES = [torch.float16, torch.bfloat16, torch.float32]
BLOCK = 256


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
    lookahead: int = 0,
) -> None:
    """Select from ``scores`` [B, Hkv, max_len] and compare every entry of the table with a stable sort."""
    from sglang_sparsespec.attention_backend.torch_kernels import look_ahead
    from sglang_sparsespec.attention_backend.triton_select import SelectConfig, select

    batch, heads, _ = scores.shape
    rows = torch.arange(batch).flip(0) + 1
    expected = torch.full((batch + 2, heads, cap), 1 << 30, dtype=torch.int32)
    positions = torch.full_like(expected, 1 << 30, device=DEVICE)
    for b, (length, count) in enumerate(zip(lens, counts, strict=True)):
        n = min(count, length, cap)
        ranked = scores[b, :, :length].contiguous()
        if lookahead:
            ranked = look_ahead(ranked, lookahead)
        best = sort_keys(ranked).sort(dim=-1, descending=True, stable=True).indices[:, :n]
        expected[rows[b], :, :n] = best.sort(dim=-1).values.to(torch.int32)
    select(
        scores.to(DEVICE),
        torch.tensor(lens, dtype=index, device=DEVICE),
        rows.to(DEVICE, index),
        torch.tensor(counts, dtype=torch.int32, device=DEVICE),
        positions,
        SelectConfig(block=block),
        lookahead=lookahead,
    )
    assert torch.equal(positions.cpu(), expected)


def make_scores(values: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    gen = torch.Generator().manual_seed(0)
    if values == "prob":
        return torch.softmax(2 * torch.randn(shape, generator=gen), dim=-1).to(dtype)
    if values == "peaks":
        return torch.softmax(6 * torch.randn(shape, generator=gen), dim=-1).to(dtype)
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
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("values", VALUES)
def test_selection_is_a_stable_sort(values: str, dtype: torch.dtype) -> None:
    # Rows of no, one and several blocks; none, all, few, and more than a block or than the table holds are wanted.
    lens = [0, 1, 2, 5, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK - 1, 2 * BLOCK, 2 * BLOCK + 1, 2063, 2064, 2064]
    counts = [3, 1, 1, 5, 13, 40, 13, 2 * BLOCK - 1, 26, 26, 103, 300, 2000]
    check_selection(make_scores(values, (len(lens), 2, 2064), dtype), lens, counts, cap=310)


@kernels_run_here
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("max_len", [2001, 2002, 2004])
def test_rows_need_no_alignment(max_len: int, dtype: torch.dtype) -> None:
    scores = make_scores("signed", (3, 3, max_len + 5), dtype)[:, :, 1 : max_len + 1]
    check_selection(scores, [max_len, max_len - 1, 255], [100, 99, 12], cap=128, index=torch.int32)


@kernels_run_here
@pytest.mark.parametrize("values", ["prob", "equal", "denormal"])
@pytest.mark.parametrize("block", [2048, 4096, 8192])
@pytest.mark.parametrize("context", [8192, 40960, 131072])
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
@pytest.mark.parametrize(
    "lookahead,dtype",
    [*((8, dtype) for dtype in DTYPES), (1, torch.float16), (2, torch.float16), (4, torch.float32)],
    ids=str,
)
def test_selection_with_look_ahead_is_a_stable_sort_of_the_raised_scores(lookahead: int, dtype: torch.dtype) -> None:
    # Rows of one and of several blocks, whose ends fall within, before and after a group of positions.
    lens = [1, 5, 8, 30, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK + 9]
    counts = [1, 2, 3, 13, 40, 40, 40, 60]
    scores = make_scores("peaks", (len(lens), 2, 2 * BLOCK + 16), dtype)
    for b, length in enumerate(lens):
        # The last position is raised by the one furthest before it; behind it is what other requests and layers left.
        scores[b, :, max(length - 1 - lookahead, 0)] = 1
        scores[b, :, length:] = torch.inf
    check_selection(scores, lens, counts, cap=64, lookahead=lookahead)


# The interpreter scans one value after another, so what it gets is small.
@kernels_run_here
@pytest.mark.parametrize("values", ["peaks", "prob", "equal"])
@pytest.mark.parametrize("block", [2048, 8192] if DEVICE == "cuda" else [BLOCK])
@pytest.mark.parametrize("context", [8192, 40960, 131072] if DEVICE == "cuda" else [1024])
def test_look_ahead_over_long_contexts(context: int, block: int, values: str) -> None:
    lens = [context, context - 1, min(block + 1, context), block, block - 1]
    counts = [-(-length // 20) for length in lens]
    scores = make_scores(values, (len(lens), 2, context), torch.float16)
    for lookahead in (4, 8):
        check_selection(scores, lens, counts, cap=-(-context // 20), block=block, lookahead=lookahead)


@kernels_run_here
def test_look_ahead_needs_no_alignment() -> None:
    scores = make_scores("peaks", (3, 1, 2 * BLOCK + 12), torch.float16)[:, :, 1 : 2 * BLOCK + 4]
    check_selection(scores, [2 * BLOCK + 3, BLOCK + 2, 255], [50, 40, 12], cap=64, index=torch.int32, lookahead=8)


@pytest.mark.skipif(DEVICE == "cuda" or INTERPRETED, reason="the other tests of this file run in this process")
def test_every_case_in_the_interpreter() -> None:
    assert_passes_in_the_interpreter(__file__, at_least=60)
