"""Verify attention with PillarAttn scores in Triton: a fixed softmax reference and balanced work.

One pass over K and V serves the whole verify window: the W window queries times the g query heads of a KV head are
packed into one tensor-core tile of R = W*g rows.  While a K tile is in registers the kernel also reduces the softmax
probabilities over those rows, which is the PillarAttn score of each position (paper arXiv 2512.01278: mean over the
window rows and the grouped heads of exp(q.k*scale - LSE)).  The true log-sum-exp is known only at the end; a hint of it
(the draft steps' own LSE) makes one pass enough.

- **Fixed reference.** The log-sum-exp hint that the scores need is also a safe softmax reference: in float32 and
  bfloat16, exp(s - hint) keeps its precision from about 118 below the hint (natural log) to 34 above it.  The inner loop
  then needs no running maximum, no rescaling of the accumulator and no per-row weights, and a score is just a column sum.
  A program whose row sums leave that range discards its result and runs the usual online softmax instead, so a wrong
  hint costs time, never exactness.  float16 has too little range for this to be a gain with sharp attention.
- **Balanced work.** Every program takes the same number of blocks of the whole batch, counted over the requests one
  after another, whatever their lengths; a request that ends up with several programs is merged by a second launch.  With
  a fixed number of splits per request a ragged batch waits for its longest request.

The launch grid depends on static sizes only; lengths are read on the device (CUDA-graph capturable).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from sglang_sparsespec.attention_backend.kernels.interface import LayerKV
from sglang_sparsespec.attention_backend.kernels.triton_common import (
    LN2,
    LOG2E,
    Scratch,
    capped,
    is_wide,
    kv_offsets,
    let_next_start,
    pdl_options,
    query_stride,
    query_tile,
    wait_for_previous,
    with_sinks,
)

# exp2 of this still fits bf16/fp32 after summing a few hundred rows; larger arguments mean a hint far below the truth.
HINT_CLAMP_LOG2 = 30.0
# Added to the logits (log2).  The usual hint is a little below the truth, but parts of a request can lie far below it:
# bfloat16 and float32 probabilities get most of their range on that side.  float16 has little range at all.
SHIFT_LOG2 = {torch.float16: 8.0, torch.bfloat16: 60.0, torch.float32: 60.0}
# Row sums of exp2(s - hint + shift) outside these bounds (log2) mean that the hint was no usable reference.
SAFE_LOG2 = {torch.float16: (-4.0, 15.0), torch.bfloat16: (-110.0, 110.0), torch.float32: (-110.0, 110.0)}
SCORE_LIMIT = {torch.float16: 6e4}


@triton.jit
def _block_counts(seq_lens_ptr, batch, W: tl.constexpr, BLOCK_N: tl.constexpr, BATCH_POW2: tl.constexpr):
    """(request numbers, blocks of each request, blocks up to and with each request)."""
    offs_b = tl.arange(0, BATCH_POW2)
    lens = tl.load(seq_lens_ptr + offs_b, mask=offs_b < batch, other=0).to(tl.int32)
    blocks = tl.where(offs_b < batch, tl.cdiv(tl.maximum(lens, 0) + W, BLOCK_N), 0)
    return offs_b, blocks, tl.cumsum(blocks, 0)


@triton.jit
def _fixed_reference(
    q,
    k_base,
    v_base,
    r2t_base,
    s_base,
    ref,
    seen_from,
    bound,
    start,
    end,
    length,
    scale_log2,
    stride_k_slot,
    stride_v_slot,
    R: tl.constexpr,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
    REACH: tl.constexpr,
    CAP2: tl.constexpr,
    SCORES: tl.constexpr,
    WIDE: tl.constexpr,
    SCORE_SCALE: tl.constexpr,
    SCORE_MAX: tl.constexpr,
):
    """Sums of exp2(s - ref) and of their products with V over [start, end)."""
    offs_d = tl.arange(0, D)
    offs_n = tl.arange(0, BLOCK_N)
    l_i = tl.zeros([BLOCK_M], dtype=tl.float32)
    acc = tl.zeros([BLOCK_M, D], dtype=tl.float32)
    # Clamped positions instead of masks: a repeated row is read again and then masked out of p.
    slot = tl.load(r2t_base + tl.minimum(start + offs_n, end - 1))
    for s in tl.range(start, end, BLOCK_N, num_stages=STAGES):
        offs = s + offs_n
        k = tl.load(k_base + kv_offsets(slot, stride_k_slot, offs_d, WIDE)).to(q.dtype)
        v = tl.load(v_base + kv_offsets(slot, stride_v_slot, offs_d, WIDE)).to(q.dtype)
        slot = tl.load(r2t_base + tl.minimum(offs + BLOCK_N, end - 1))
        qk = tl.dot(q, tl.trans(k), input_precision="ieee")
        p = tl.exp2(capped(qk * scale_log2, CAP2) - ref[:, None])
        # Only the blocks that reach into the window or past the end need masks.
        if s + BLOCK_N > tl.minimum(length + 1, end):
            p = tl.where(offs[None, :] < bound[:, None], p, 0.0)
        if REACH >= 0:
            p = tl.where(offs[None, :] >= seen_from[:, None], p, 0.0)
        l_i += tl.sum(p, 1)
        if SCORES:
            sc = tl.sum(p, 0) * (SCORE_SCALE / R)
            if SCORE_MAX > 0:
                sc = tl.minimum(sc, SCORE_MAX)
            tl.store(s_base + offs, sc.to(s_base.dtype.element_ty), mask=offs < tl.minimum(length, end))
        acc = tl.dot(p.to(v.dtype), v, acc, input_precision="ieee")
    return l_i, acc


@triton.jit
def _running_maximum(
    q,
    k_base,
    v_base,
    r2t_base,
    s_base,
    hint2,
    mask_m,
    seen_from,
    bound,
    start,
    end,
    length,
    scale_log2,
    clamp_log2,
    stride_k_slot,
    stride_v_slot,
    R: tl.constexpr,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    REACH: tl.constexpr,
    CAP2: tl.constexpr,
    SCORES: tl.constexpr,
    WIDE: tl.constexpr,
    SCORE_MAX: tl.constexpr,
):
    """Online softmax over [start, end) for hints that are no reference; short on code, not fast."""
    offs_d = tl.arange(0, D)
    offs_n = tl.arange(0, BLOCK_N)
    m_i = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l_i = tl.zeros([BLOCK_M], dtype=tl.float32)
    acc = tl.zeros([BLOCK_M, D], dtype=tl.float32)
    for s in tl.range(start, end, BLOCK_N, num_stages=1):
        offs = s + offs_n
        slot = tl.load(r2t_base + tl.minimum(offs, end - 1))
        k = tl.load(k_base + kv_offsets(slot, stride_k_slot, offs_d, WIDE)).to(q.dtype)
        v = tl.load(v_base + kv_offsets(slot, stride_v_slot, offs_d, WIDE)).to(q.dtype)
        qk = capped(tl.dot(q, tl.trans(k), input_precision="ieee") * scale_log2, CAP2)
        qk = tl.where(offs[None, :] < bound[:, None], qk, float("-inf"))
        if REACH >= 0:
            qk = tl.where(offs[None, :] >= seen_from[:, None], qk, float("-inf"))
        m_new = tl.maximum(m_i, tl.max(qk, 1))
        m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)
        alpha = tl.exp2(m_i - m_safe)
        p = tl.exp2(qk - m_safe[:, None])
        l_i = l_i * alpha + tl.sum(p, 1)
        if SCORES:
            w = tl.exp2(tl.minimum(m_safe - hint2, clamp_log2)) * (1.0 / R)
            sc = tl.sum(p * tl.where(mask_m, w, 0.0)[:, None], 0)
            if SCORE_MAX > 0:
                sc = tl.minimum(sc, SCORE_MAX)
            tl.store(s_base + offs, sc.to(s_base.dtype.element_ty), mask=offs < tl.minimum(length, end))
        acc = acc * alpha[:, None]
        acc = tl.dot(p.to(v.dtype), v, acc, input_precision="ieee")
        m_i = m_new
    return m_i, l_i, acc


# Specialised to what a batch size happens to divide, each captured batch could compile its own kernel.
@triton.jit(do_not_specialize=["batch"])
def _verify_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    r2t_ptr,
    req_ptr,
    seq_lens_ptr,
    hint_ptr,
    sinks_ptr,
    out_ptr,
    part_o_ptr,
    part_lse_ptr,
    lse_ptr,
    scores_ptr,
    scale_log2,
    clamp_log2,
    shift_log2,
    low_log2,
    high_log2,
    batch,
    stride_q_tok,
    stride_k_slot,
    stride_k_head,
    stride_v_slot,
    stride_v_head,
    stride_r2t,
    stride_s_b,
    stride_s_h,
    HKV: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    W: tl.constexpr,
    BATCH_POW2: tl.constexpr,
    PROGRAMS: tl.constexpr,
    MIN_BLOCKS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
    REACH: tl.constexpr,
    CAP2: tl.constexpr,
    SCORES: tl.constexpr,
    HAS_LSE: tl.constexpr,
    SINKS: tl.constexpr,
    WIDE: tl.constexpr,
    SCORE_SCALE: tl.constexpr,
    SCORE_MAX: tl.constexpr,
    PDL: tl.constexpr,
):
    let_next_start(PDL)
    # The KV head is the fastest grid axis: the heads of a position lie side by side in memory, and the programs of
    # different heads with the same share of the batch run side by side.
    h = tl.program_id(0)
    c = tl.program_id(1)
    offs_b, blocks, ends = _block_counts(seq_lens_ptr, batch, W, BLOCK_N, BATCH_POW2)
    total_blocks = tl.sum(blocks, 0)
    per = tl.maximum(tl.cdiv(total_blocks, PROGRAMS), MIN_BLOCKS)
    lo = c * per
    hi = tl.minimum(lo + per, total_blocks)
    wait_for_previous(PDL)
    if lo >= hi:
        return
    b_first = tl.sum((ends <= lo).to(tl.int32), 0)
    b_last = tl.sum((ends < hi).to(tl.int32), 0)
    first = tl.sum(tl.where(offs_b == b_first, ends - blocks, 0), 0)

    R: tl.constexpr = W * G
    offs_m = tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, D)
    mask_m = offs_m < R
    win = offs_m // G
    k_base = k_ptr + h.to(tl.int64) * stride_k_head
    v_base = v_ptr + h.to(tl.int64) * stride_v_head

    for b in tl.range(b_first, b_last + 1, num_stages=1):
        length = tl.maximum(tl.load(seq_lens_ptr + b).to(tl.int32), 0)
        total = length + W
        n_blocks = tl.cdiv(total, BLOCK_N)
        from_block = tl.maximum(lo - first, 0)
        to_block = tl.minimum(hi - first, n_blocks)
        start = from_block * BLOCK_N
        end = tl.minimum(to_block * BLOCK_N, total)

        # Row r of the packed tile is query head h*G + r%G of window row r//G.
        q_rows = (b * W + win).to(tl.int64) * (HKV * G) + h * G + offs_m % G
        q_offsets = (b * W + win).to(tl.int64) * stride_q_tok + (h * G + offs_m % G) * D
        q = tl.load(q_ptr + q_offsets[:, None] + offs_d[None, :], mask=mask_m[:, None], other=0.0)
        hint2 = tl.load(hint_ptr + q_rows, mask=mask_m, other=float("inf")) * LOG2E
        ref = hint2 - shift_log2
        # Exclusive causal bound per row; the segment's end is folded in so that one compare masks both.
        bound = tl.minimum(length + win + 1, end)
        seen_from = length + win - REACH
        r2t_base = r2t_ptr + tl.load(req_ptr + b).to(tl.int64) * stride_r2t
        s_base = scores_ptr + (tl.zeros([], tl.int64) + b) * stride_s_b + h.to(tl.int64) * stride_s_h

        l_i, acc = _fixed_reference(
            q, k_base, v_base, r2t_base, s_base, ref, seen_from, bound, start, end, length, scale_log2, stride_k_slot,
            stride_v_slot, R, D, BLOCK_M, BLOCK_N, STAGES, REACH, CAP2, SCORES, WIDE, SCORE_SCALE, SCORE_MAX,
        )  # fmt: skip
        # NaN (a hint that is none) fails both comparisons; rows that see nothing here have l_i 0 and are redone too.
        log_l = tl.log2(l_i)
        usable = (log_l > low_log2) & (log_l < high_log2)
        if tl.sum((mask_m & (usable == 0)).to(tl.int32), 0) > 0:
            m_i, l_i, acc = _running_maximum(
                q, k_base, v_base, r2t_base, s_base, hint2, mask_m, seen_from, bound, start, end, length, scale_log2,
                clamp_log2, stride_k_slot, stride_v_slot, R, D, BLOCK_M, BLOCK_N, REACH, CAP2, SCORES, WIDE, SCORE_MAX,
            )  # fmt: skip
            ref = m_i
            l_i = tl.where(l_i > 0, l_i, 1.0)
            log_l = tl.log2(l_i)

        acc = acc / tl.where(mask_m, l_i, 1.0)[:, None]
        lse2 = ref + log_l
        if (from_block == 0) & (to_block == n_blocks):
            if SINKS:
                sinks2 = tl.load(sinks_ptr + h * G + offs_m % G).to(tl.float32) * LOG2E
                acc, lse2 = with_sinks(acc, lse2, sinks2)
            tl.store(
                out_ptr + q_rows[:, None] * D + offs_d[None, :],
                acc.to(out_ptr.dtype.element_ty),
                mask=mask_m[:, None],
            )
            if HAS_LSE:
                tl.store(lse_ptr + q_rows, lse2 * LN2, mask=mask_m)
        else:
            # A program has at most one part that does not begin its request (slot 0) and one that does (slot 1).
            place = ((h * PROGRAMS + c) * 2 + (from_block == 0).to(tl.int32)).to(tl.int64) * R + offs_m
            tl.store(part_lse_ptr + place, lse2, mask=mask_m)
            tl.store(part_o_ptr + place[:, None] * D + offs_d[None, :], acc, mask=mask_m[:, None])
        first += n_blocks


@triton.jit(do_not_specialize=["batch"])
def _verify_combine_kernel(
    out_ptr,
    part_o_ptr,
    part_lse_ptr,
    lse_ptr,
    sinks_ptr,
    seq_lens_ptr,
    batch,
    HKV: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    W: tl.constexpr,
    BATCH_POW2: tl.constexpr,
    PROGRAMS: tl.constexpr,
    MIN_BLOCKS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ROWS: tl.constexpr,
    HAS_LSE: tl.constexpr,
    SINKS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Merge the parts of the requests that several programs shared."""
    let_next_start(PDL)
    h = tl.program_id(0)
    rblock = tl.program_id(1)
    b = tl.program_id(2)
    offs_b, blocks, ends = _block_counts(seq_lens_ptr, batch, W, BLOCK_N, BATCH_POW2)
    per = tl.maximum(tl.cdiv(tl.sum(blocks, 0), PROGRAMS), MIN_BLOCKS)
    last_block = tl.sum(tl.where(offs_b == b, ends, 0), 0) - 1
    first_block = last_block + 1 - tl.sum(tl.where(offs_b == b, blocks, 0), 0)
    c_first = first_block // per
    c_last = last_block // per
    wait_for_previous(PDL)
    if c_first == c_last:
        return
    R: tl.constexpr = W * G
    offs_m = rblock * ROWS + tl.arange(0, ROWS)
    offs_d = tl.arange(0, D)
    mask_m = offs_m < R
    m_i = tl.full([ROWS], float("-inf"), tl.float32)
    l_i = tl.zeros([ROWS], dtype=tl.float32)
    acc = tl.zeros([ROWS, D], dtype=tl.float32)
    if SINKS:  # a part without values
        m_i = tl.load(sinks_ptr + h * G + offs_m % G).to(tl.float32) * LOG2E
        l_i += 1.0
    for c in range(c_first, c_last + 1):
        place = ((h * PROGRAMS + c) * 2 + (c == c_first).to(tl.int32)).to(tl.int64) * R + offs_m
        lse2 = tl.load(part_lse_ptr + place, mask=mask_m, other=float("-inf"))
        o = tl.load(part_o_ptr + place[:, None] * D + offs_d[None, :], mask=mask_m[:, None], other=0.0)
        m_new = tl.maximum(m_i, lse2)
        m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)
        alpha = tl.exp2(m_i - m_safe)
        w = tl.exp2(lse2 - m_safe)
        acc = acc * alpha[:, None] + o * w[:, None]
        l_i = l_i * alpha + w
        m_i = m_new
    res = acc / tl.where(l_i > 0, l_i, 1.0)[:, None]
    q_rows = (b * W + offs_m // G).to(tl.int64) * (HKV * G) + h * G + offs_m % G
    tl.store(out_ptr + q_rows[:, None] * D + offs_d[None, :], res.to(out_ptr.dtype.element_ty), mask=mask_m[:, None])
    if HAS_LSE:
        tl.store(lse_ptr + q_rows, (m_i + tl.log2(l_i)) * LN2, mask=mask_m)


@dataclass
class VerifyConfig:
    """Launch parameters of the verify kernel.

    Attributes:
        block_n: positions per inner iteration.
        num_warps, stages: warps of a program, KV tiles in its pipeline (``query_tile`` changes them for many rows).
        programs_per_sm: programs per multiprocessor, all resident at once.
        min_blocks: fewest blocks per program.
    """

    block_n: int = 64
    num_warps: int = 4
    stages: int = 3
    programs_per_sm: float = 2
    min_blocks: int = 4


def verify_num_programs(num_kv_heads: int, num_sms: int, config: VerifyConfig) -> int:
    """Programs per KV head, which share the batch."""
    return max(1, int(config.programs_per_sm * num_sms) // num_kv_heads)


def verify_attention(
    *,
    q: torch.Tensor,
    kv: LayerKV,
    req_to_token: torch.Tensor,
    rows: torch.Tensor,
    lengths: torch.Tensor,
    window: int,
    out: torch.Tensor,
    scores: torch.Tensor | None,
    lse_hint: torch.Tensor,
    lse: torch.Tensor | None,
    scratch: Scratch,
    programs: int,
    max_batch: int,
    config: VerifyConfig,
    pdl: bool,
    reach: int | None = None,
) -> None:
    """Causal attention of a window of W queries per request, with scores; see ``interface.VerifyAttention``.

    Args:
        scores: float32, bfloat16 or float16.
        scratch: at least 2 * Hq * W * programs * D partial outputs and 2 * Hq * W * programs sums.
        programs: per KV head.
        max_batch: what the kernels are compiled for, so that all smaller batches share them.
        pdl: start while the kernel before still runs.
        reach: tokens before a query's own that it sees; None: all.
    """
    batch = lengths.shape[0]
    if batch == 0:
        return
    num_q_heads, head_dim = q.shape[1:]
    num_kv_heads = kv.k.shape[1]
    group = num_q_heads // num_kv_heads
    block_m, block_n, num_warps = query_tile(window * group, config.block_n, config.num_warps)
    stride_s_b, stride_s_h = (scores.stride(0), scores.stride(1)) if scores is not None else (0, 0)
    low, high = SAFE_LOG2[q.dtype]
    shift = SHIFT_LOG2[q.dtype]
    common = {
        "out_ptr": out,
        "part_o_ptr": scratch.part_o,
        "part_lse_ptr": scratch.part_lse,
        "lse_ptr": lse if lse is not None else scratch.part_lse,
        "sinks_ptr": kv.sinks if kv.sinks is not None else scratch.part_lse,
        "seq_lens_ptr": lengths,
        "batch": batch,
        "HKV": num_kv_heads,
        "G": group,
        "D": head_dim,
        "W": window,
        "BATCH_POW2": max(16, triton.next_power_of_2(max_batch)),
        "PROGRAMS": programs,
        "MIN_BLOCKS": config.min_blocks,
        "BLOCK_N": block_n,
        "HAS_LSE": lse is not None,
        "SINKS": kv.sinks is not None,
        "PDL": pdl,
        **pdl_options(pdl),
    }
    _verify_kernel[(num_kv_heads, programs)](
        q_ptr=q,
        k_ptr=kv.k,
        v_ptr=kv.v,
        r2t_ptr=req_to_token,
        req_ptr=rows,
        hint_ptr=lse_hint,
        scores_ptr=scores if scores is not None else scratch.part_lse,
        scale_log2=kv.scaling * LOG2E.value,
        clamp_log2=HINT_CLAMP_LOG2,
        shift_log2=shift,
        low_log2=low,
        high_log2=high,
        stride_q_tok=query_stride(q),
        stride_k_slot=kv.k.stride(0),
        stride_k_head=kv.k.stride(1),
        stride_v_slot=kv.v.stride(0),
        stride_v_head=kv.v.stride(1),
        stride_r2t=req_to_token.stride(0),
        stride_s_b=stride_s_b,
        stride_s_h=stride_s_h,
        BLOCK_M=block_m,
        STAGES=config.stages,
        REACH=-1 if reach is None else reach,
        CAP2=kv.soft_cap * LOG2E.value,
        SCORES=scores is not None,
        WIDE=is_wide(kv.k, kv.v),
        SCORE_SCALE=2.0**-shift,
        SCORE_MAX=SCORE_LIMIT.get(scores.dtype, 0.0) if scores is not None else 0.0,
        num_warps=num_warps,
        **common,
    )
    combine_rows = 16 if window * group > 8 else 8
    _verify_combine_kernel[(num_kv_heads, triton.cdiv(window * group, combine_rows), batch)](
        ROWS=combine_rows, num_warps=4, **common
    )
