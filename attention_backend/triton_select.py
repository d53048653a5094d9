"""Ragged per-head top-k selection with ascending output, in Triton.

One program per (request, KV head).  A radix search (8 bits per pass, shared-memory histograms) finds the n-th largest
key exactly, then one ordered compaction writes the chosen positions ascending: a prefix sum gives every chosen position
its place, so no sort is needed.  Ties at the threshold go to the lowest positions.  bf16/fp16 scores need two radix
passes, fp32 four; all lengths and counts are read on the device (CUDA-graph capturable).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def _sortable(x):
    """Unsigned integer keys (as uint32) ordered like the floats ``x``; 16 significant bits for 2-byte types."""
    if x.dtype == tl.float32:
        bits = x.to(tl.uint32, bitcast=True)
        return tl.where((bits >> 31) != 0, bits ^ 0xFFFFFFFF, bits | 0x80000000)
    else:
        bits = x.to(tl.uint16, bitcast=True).to(tl.uint32)
        return tl.where((bits >> 15) != 0, bits ^ 0xFFFF, bits | 0x8000)


@triton.jit
def _select_kernel(
    scores_ptr,
    lens_ptr,
    req_ptr,
    n_sel_ptr,
    positions_ptr,
    stride_s_b,
    stride_s_h,
    stride_pos_row,
    stride_pos_head,
    cap,
    KEY_BITS: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    h = tl.program_id(0)
    b = tl.program_id(1)
    length = tl.load(lens_ptr + b).to(tl.int32)
    n = tl.minimum(tl.minimum(tl.load(n_sel_ptr + b).to(tl.int32), length), cap)
    if n <= 0:
        return
    row = tl.load(req_ptr + b).to(tl.int64)
    src = scores_ptr + b.to(tl.int64) * stride_s_b + h.to(tl.int64) * stride_s_h
    dst = positions_ptr + row * stride_pos_row + h.to(tl.int64) * stride_pos_head
    offs = tl.arange(0, BLOCK)
    if n == length:
        for s in range(0, length, BLOCK):
            tl.store(dst + s + offs, s + offs, mask=s + offs < length)
        return

    # prefix: the bits of the threshold found so far; rank: how many keys are still wanted among those that share it.
    prefix = tl.zeros([], dtype=tl.uint32)
    rank = n
    bins = tl.arange(0, 256)
    for level in tl.static_range(KEY_BITS // 8):
        hist = tl.zeros([256], dtype=tl.int32)
        for s in tl.range(0, length, BLOCK, num_stages=STAGES):
            valid = s + offs < length
            key = _sortable(tl.load(src + s + offs, mask=valid, other=0.0))
            digit = ((key >> (KEY_BITS - 8 - 8 * level)) & 0xFF).to(tl.int32)
            if level > 0:
                valid = valid & ((key >> (KEY_BITS - 8 * level)) == prefix)
            hist += tl.histogram(digit, 256, mask=valid)
        # at_least[d] = keys whose digit is >= d; the threshold digit is the largest d with at_least[d] >= rank.
        at_least = tl.sum(hist, 0) - tl.cumsum(hist, 0) + hist
        digit_t = tl.sum((at_least >= rank).to(tl.int32), 0) - 1
        above = tl.sum(tl.where(bins > digit_t, hist, 0), 0)
        rank -= above
        prefix = (prefix << 8) | digit_t.to(tl.uint32)

    # Strictly greater keys are all taken; `rank` of the equal ones are, lowest position first.
    taken = tl.zeros([], dtype=tl.int32)
    equal_seen = tl.zeros([], dtype=tl.int32)
    for s in tl.range(0, length, BLOCK, num_stages=STAGES):
        valid = s + offs < length
        key = _sortable(tl.load(src + s + offs, mask=valid, other=0.0))
        gt = (valid & (key > prefix)).to(tl.int32)
        eq = (valid & (key == prefix)).to(tl.int32)
        # Both counts in one scan: BLOCK < 2**15 keeps them in separate halves of the word.
        both = gt + (eq << 16)
        incl = tl.cumsum(both, 0)
        excl = incl - both
        gt_before = excl & 0xFFFF
        eq_before = equal_seen + (excl >> 16)
        take = (gt != 0) | ((eq != 0) & (eq_before < rank))
        # taken counts the greater keys of earlier blocks; equal ones before this element are at most `rank`.
        place = taken + gt_before + tl.minimum(eq_before, rank)
        tl.store(dst + place, s + offs, mask=take)
        sums = tl.sum(both, 0)
        taken += sums & 0xFFFF
        equal_seen += sums >> 16


class SelectConfig:
    """Launch parameters: positions per inner block, warps and pipeline depth (loads are tiny and stay in L2)."""

    def __init__(self, block: int = 4096, num_warps: int = 16, stages: int = 2) -> None:
        self.block = block
        self.num_warps = num_warps
        self.stages = stages


def select(
    scores: torch.Tensor,
    lens: torch.Tensor,
    req_pool_indices: torch.Tensor,
    n_sel: torch.Tensor,
    positions: torch.Tensor,
    cfg: SelectConfig,
) -> None:
    """Write the ``n_sel[b]`` highest-scored positions of [0, lens[b]) ascending; see ``PillarKernels.select``.

    scores: [B, Hkv, max_len] fp32/bf16/fp16, unit stride along positions; lens, n_sel: [B] ints;
    positions: int32 [rows, Hkv, cap].
    """
    batch = lens.shape[0]
    if batch == 0:
        return
    if scores.stride(2) != 1 or positions.stride(2) != 1:
        raise ValueError("select: scores and positions must have unit stride along their last axis")
    block = min(cfg.block, max(256, triton.next_power_of_2(scores.shape[2])))
    _select_kernel[(scores.shape[1], batch)](
        scores,
        lens,
        req_pool_indices,
        n_sel,
        positions,
        scores.stride(0),
        scores.stride(1),
        positions.stride(0),
        positions.stride(1),
        positions.shape[2],
        KEY_BITS=8 * scores.element_size(),
        BLOCK=block,
        STAGES=cfg.stages,
        num_warps=cfg.num_warps if block >= 2048 else 4,
    )
