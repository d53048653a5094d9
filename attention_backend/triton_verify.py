"""Verify attention with PillarAttn scores, and score-only passes, in Triton.

One pass over K and V serves the whole verify window: the W window queries times the g query heads of a KV head are
packed into one tensor-core tile of R = W*g rows.  While a K tile is in registers the kernel also reduces the softmax
probabilities over those rows, which is the PillarAttn score of each position (paper arXiv 2512.01278: mean over the
window rows and the grouped heads of exp(q.k*scale - LSE)).  The reference re-reads K in a second kernel because the true
log-sum-exp is known only at the end; here a hint of it (the draft steps' own LSE) makes one pass enough.  Without a
hint the exact scores take a second, K-only kernel.

The launch grid depends only on the batch size and on static maxima (CUDA-graph capturable).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from sglang_sparsespec.attention_backend.triton_draft import query_stride

LOG2E = 1.4426950408889634

# exp2 of this still fits bf16/fp32 after summing a few hundred rows; larger arguments mean a hint far below the truth.
HINT_CLAMP_LOG2 = 30.0


@triton.jit
def _window(
    seq_lens_ptr, extend_start_ptr, extend_len_ptr, b, W: tl.constexpr, PREFILL: tl.constexpr
):
    """(positions before the window, first query row, window rows) of batch entry ``b``."""
    seq = tl.load(seq_lens_ptr + b).to(tl.int32)
    if PREFILL:
        ext = tl.load(extend_len_ptr + b).to(tl.int32)
        nq = tl.maximum(tl.minimum(tl.minimum(ext, W), seq), 0)
        first = tl.load(extend_start_ptr + b).to(tl.int64) + ext - nq
        length = seq - nq
    else:
        nq = W
        first = b.to(tl.int64) * W
        length = seq
    return length, first, nq


@triton.jit
def _verify_split_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    r2t_ptr,
    req_ptr,
    seq_lens_ptr,
    hint_ptr,
    out_ptr,
    part_o_ptr,
    part_lse_ptr,
    scores_ptr,
    scale_log2,
    clamp_log2,
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
    SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MIN_CHUNK: tl.constexpr,
    STAGES: tl.constexpr,
    SCORES: tl.constexpr,
    PREFETCH: tl.constexpr,
):
    h = tl.program_id(0)
    split = tl.program_id(1)
    b = tl.program_id(2)
    length = tl.load(seq_lens_ptr + b).to(tl.int32)
    R: tl.constexpr = W * G
    offs_m = tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, D)
    offs_n = tl.arange(0, BLOCK_N)
    mask_m = offs_m < R
    win = offs_m // G
    # Row r of the packed tile is query head h*G + r%G of window row r//G.
    q_rows = (b.to(tl.int64) * W + win) * (HKV * G) + h * G + offs_m % G
    part = ((b.to(tl.int64) * HKV + h) * SPLITS + split) * R + offs_m

    total = tl.maximum(length, 0) + W
    chunk = tl.maximum(tl.cdiv(tl.cdiv(total, SPLITS), BLOCK_N) * BLOCK_N, MIN_CHUNK)
    start = split * chunk
    end = tl.minimum(start + chunk, total)
    if end <= start:
        return

    q_base = q_ptr + (b.to(tl.int64) * W + win) * stride_q_tok + (h * G + offs_m % G) * D
    q = tl.load(q_base[:, None] + offs_d[None, :], mask=mask_m[:, None], other=0.0)
    r2t_base = r2t_ptr + tl.load(req_ptr + b).to(tl.int64) * stride_r2t
    k_base = k_ptr + h.to(tl.int64) * stride_k_head
    v_base = v_ptr + h.to(tl.int64) * stride_v_head
    if SCORES:
        hint2 = tl.load(hint_ptr + q_rows, mask=mask_m, other=0.0) * 1.4426950408889634
        s_base = scores_ptr + b.to(tl.int64) * stride_s_b + h.to(tl.int64) * stride_s_h
    # Exclusive causal bound per row; the split's end is folded in so that one compare masks both.
    bound = tl.minimum(length + win + 1, end)

    m_i = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l_i = tl.zeros([BLOCK_M], dtype=tl.float32)
    acc = tl.zeros([BLOCK_M, D], dtype=tl.float32)
    if PREFETCH:
        slot = tl.load(r2t_base + start + offs_n, mask=start + offs_n < end, other=0).to(tl.int64)
    for s in tl.range(start, end, BLOCK_N, num_stages=STAGES):
        offs = s + offs_n
        valid = offs < end
        if not PREFETCH:
            slot = tl.load(r2t_base + offs, mask=valid, other=0).to(tl.int64)
        k = tl.load(
            k_base + slot[:, None] * stride_k_slot + offs_d[None, :], mask=valid[:, None], other=0.0
        ).to(q_ptr.dtype.element_ty)
        v = tl.load(
            v_base + slot[:, None] * stride_v_slot + offs_d[None, :], mask=valid[:, None], other=0.0
        ).to(q_ptr.dtype.element_ty)
        if PREFETCH:
            nxt = s + BLOCK_N + offs_n
            slot = tl.load(r2t_base + nxt, mask=nxt < end, other=0).to(tl.int64)
        qk = tl.dot(q, tl.trans(k), input_precision="ieee") * scale_log2
        qk = tl.where(offs[None, :] < bound[:, None], qk, float("-inf"))
        m_new = tl.maximum(m_i, tl.max(qk, 1))
        # A split may start inside the window, where early rows see nothing yet.
        m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)
        alpha = tl.exp2(m_i - m_safe)
        p = tl.exp2(qk - m_safe[:, None])
        l_i = l_i * alpha + tl.sum(p, 1)
        if SCORES:
            # p is already exp(s - m); the hint only changes the row's factor, so no second exponential is needed.
            w = tl.exp2(tl.minimum(m_safe - hint2, clamp_log2)) * (1.0 / R)
            w = tl.where(mask_m, w, 0.0)
            sc = tl.sum(p * w[:, None], 0)
            tl.store(s_base + offs, sc.to(scores_ptr.dtype.element_ty), mask=offs < tl.minimum(length, end))
        acc = acc * alpha[:, None]
        acc = tl.dot(p.to(v.dtype), v, acc, input_precision="ieee")
        m_i = m_new

    l_safe = tl.where(l_i > 0, l_i, 1.0)
    acc = acc / l_safe[:, None]
    lse2 = m_i + tl.log2(l_safe)
    tl.store(part_lse_ptr + part, lse2, mask=mask_m)
    if SPLITS == 1:
        out = acc.to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + q_rows[:, None] * D + offs_d[None, :], out, mask=mask_m[:, None])
    else:
        tl.store(part_o_ptr + part[:, None] * D + offs_d[None, :], acc, mask=mask_m[:, None])


@triton.jit
def _verify_combine_kernel(
    out_ptr,
    part_o_ptr,
    part_lse_ptr,
    seq_lens_ptr,
    HKV: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    W: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MIN_CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
):
    h = tl.program_id(0)
    rblock = tl.program_id(1)
    b = tl.program_id(2)
    length = tl.load(seq_lens_ptr + b).to(tl.int32)
    R: tl.constexpr = W * G
    offs_m = rblock * ROWS + tl.arange(0, ROWS)
    offs_d = tl.arange(0, D)
    mask_m = offs_m < R
    q_rows = (b.to(tl.int64) * W + offs_m // G) * (HKV * G) + h * G + offs_m % G
    total = tl.maximum(length, 0) + W
    chunk = tl.maximum(tl.cdiv(tl.cdiv(total, SPLITS), BLOCK_N) * BLOCK_N, MIN_CHUNK)
    used = tl.minimum(tl.cdiv(total, chunk), SPLITS)
    base = (b.to(tl.int64) * HKV + h) * SPLITS * R + offs_m

    m_i = tl.full([ROWS], float("-inf"), tl.float32)
    l_i = tl.zeros([ROWS], dtype=tl.float32)
    acc = tl.zeros([ROWS, D], dtype=tl.float32)
    for s in range(0, used):
        part = base + s * R
        lse2 = tl.load(part_lse_ptr + part, mask=mask_m, other=float("-inf"))
        o = tl.load(part_o_ptr + part[:, None] * D + offs_d[None, :], mask=mask_m[:, None], other=0.0)
        m_new = tl.maximum(m_i, lse2)
        m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)
        alpha = tl.exp2(m_i - m_safe)
        w = tl.exp2(lse2 - m_safe)
        acc = acc * alpha[:, None] + o * w[:, None]
        l_i = l_i * alpha + w
        m_i = m_new
    res = acc / tl.where(l_i > 0, l_i, 1.0)[:, None]
    tl.store(out_ptr + q_rows[:, None] * D + offs_d[None, :], res.to(out_ptr.dtype.element_ty), mask=mask_m[:, None])


@triton.jit
def _window_lse_kernel(
    q_ptr,
    k_ptr,
    r2t_ptr,
    req_ptr,
    seq_lens_ptr,
    extend_start_ptr,
    extend_len_ptr,
    part_lse_ptr,
    scale_log2,
    stride_q_tok,
    stride_k_slot,
    stride_k_head,
    stride_r2t,
    HKV: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    W: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MIN_CHUNK: tl.constexpr,
    STAGES: tl.constexpr,
    PREFILL: tl.constexpr,
):
    """Per-split log2-sum-exp of every window row over its causal prefix (K only)."""
    h = tl.program_id(0)
    split = tl.program_id(1)
    b = tl.program_id(2)
    length, first, nq = _window(seq_lens_ptr, extend_start_ptr, extend_len_ptr, b, W, PREFILL)
    R: tl.constexpr = W * G
    offs_m = tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, D)
    offs_n = tl.arange(0, BLOCK_N)
    win = offs_m // G
    mask_m = win < nq
    q_base = q_ptr + (first + win) * stride_q_tok + (h * G + offs_m % G) * D
    part = ((b.to(tl.int64) * HKV + h) * SPLITS + split) * R + offs_m
    total = tl.maximum(length, 0) + nq
    chunk = tl.maximum(tl.cdiv(tl.cdiv(total, SPLITS), BLOCK_N) * BLOCK_N, MIN_CHUNK)
    start = split * chunk
    end = tl.minimum(start + chunk, total)

    q = tl.load(q_base[:, None] + offs_d[None, :], mask=mask_m[:, None], other=0.0)
    r2t_base = r2t_ptr + tl.load(req_ptr + b).to(tl.int64) * stride_r2t
    k_base = k_ptr + h.to(tl.int64) * stride_k_head
    bound = tl.minimum(length + win + 1, end)
    m_i = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l_i = tl.zeros([BLOCK_M], dtype=tl.float32)
    for s in tl.range(start, end, BLOCK_N, num_stages=STAGES):
        offs = s + offs_n
        valid = offs < end
        slot = tl.load(r2t_base + offs, mask=valid, other=0).to(tl.int64)
        k = tl.load(
            k_base + slot[:, None] * stride_k_slot + offs_d[None, :], mask=valid[:, None], other=0.0
        ).to(q_ptr.dtype.element_ty)
        qk = tl.dot(q, tl.trans(k), input_precision="ieee") * scale_log2
        qk = tl.where(offs[None, :] < bound[:, None], qk, float("-inf"))
        m_new = tl.maximum(m_i, tl.max(qk, 1))
        m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)
        l_i = l_i * tl.exp2(m_i - m_safe) + tl.sum(tl.exp2(qk - m_safe[:, None]), 1)
        m_i = m_new
    lse2 = m_i + tl.log2(tl.where(l_i > 0, l_i, 1.0))
    tl.store(part_lse_ptr + part, lse2, mask=offs_m < R)


@triton.jit
def _window_scores_kernel(
    q_ptr,
    k_ptr,
    r2t_ptr,
    req_ptr,
    seq_lens_ptr,
    extend_start_ptr,
    extend_len_ptr,
    part_lse_ptr,
    scores_ptr,
    scale_log2,
    stride_q_tok,
    stride_k_slot,
    stride_k_head,
    stride_r2t,
    stride_s_b,
    stride_s_h,
    HKV: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    W: tl.constexpr,
    LSE_SPLITS: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    LSE_BLOCK_N: tl.constexpr,
    MIN_CHUNK: tl.constexpr,
    STAGES: tl.constexpr,
    PREFILL: tl.constexpr,
):
    """Mean over the window rows of exp(s - LSE) for the positions before the window (K only)."""
    h = tl.program_id(0)
    split = tl.program_id(1)
    b = tl.program_id(2)
    length, first, nq = _window(seq_lens_ptr, extend_start_ptr, extend_len_ptr, b, W, PREFILL)
    chunk = tl.maximum(tl.cdiv(tl.cdiv(length, SPLITS), BLOCK_N) * BLOCK_N, MIN_CHUNK)
    start = split * chunk
    end = tl.minimum(start + chunk, length)
    if end <= start:
        return
    R: tl.constexpr = W * G
    offs_m = tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, D)
    offs_n = tl.arange(0, BLOCK_N)
    win = offs_m // G
    mask_m = win < nq
    q_base = q_ptr + (first + win) * stride_q_tok + (h * G + offs_m % G) * D
    # Merge the per-split log2-sum-exps left by the pass before; splits that got no work are not read.
    total = length + nq
    lse_chunk = tl.maximum(tl.cdiv(tl.cdiv(total, LSE_SPLITS), LSE_BLOCK_N) * LSE_BLOCK_N, MIN_CHUNK)
    used = tl.minimum(tl.cdiv(total, lse_chunk), LSE_SPLITS)
    base = (b.to(tl.int64) * HKV + h) * LSE_SPLITS * R + offs_m
    m_i = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l_i = tl.zeros([BLOCK_M], dtype=tl.float32)
    for s in range(0, used):
        lse2 = tl.load(part_lse_ptr + base + s * R, mask=mask_m, other=float("-inf"))
        m_new = tl.maximum(m_i, lse2)
        m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)
        l_i = l_i * tl.exp2(m_i - m_safe) + tl.exp2(lse2 - m_safe)
        m_i = m_new
    lse = m_i + tl.log2(tl.where(l_i > 0, l_i, 1.0))

    q = tl.load(q_base[:, None] + offs_d[None, :], mask=mask_m[:, None], other=0.0)
    r2t_base = r2t_ptr + tl.load(req_ptr + b).to(tl.int64) * stride_r2t
    k_base = k_ptr + h.to(tl.int64) * stride_k_head
    s_base = scores_ptr + b.to(tl.int64) * stride_s_b + h.to(tl.int64) * stride_s_h
    inv = 1.0 / (nq * G).to(tl.float32)
    for s in tl.range(start, end, BLOCK_N, num_stages=STAGES):
        offs = s + offs_n
        valid = offs < end
        slot = tl.load(r2t_base + offs, mask=valid, other=0).to(tl.int64)
        k = tl.load(
            k_base + slot[:, None] * stride_k_slot + offs_d[None, :], mask=valid[:, None], other=0.0
        ).to(q_ptr.dtype.element_ty)
        qk = tl.dot(q, tl.trans(k), input_precision="ieee") * scale_log2
        p = tl.where(mask_m[:, None], tl.exp2(qk - lse[:, None]), 0.0)
        tl.store(s_base + offs, (tl.sum(p, 0) * inv).to(scores_ptr.dtype.element_ty), mask=valid)


class VerifyConfig:
    """Launch parameters of the verify and score kernels.

    block_n: positions per inner iteration.  target: programs wanted per multiprocessor before a request is split;
    min_chunk: fewest positions per split.  prefetch: fetch the next block's slots one block ahead by hand.
    """

    def __init__(
        self,
        block_n: int = 64,
        num_warps: int = 4,
        stages: int = 3,
        target: float = 4.0,
        min_chunk: int = 256,
        prefetch: bool = False,
    ) -> None:
        self.block_n = block_n
        self.num_warps = num_warps
        self.stages = stages
        self.target = target
        self.min_chunk = min_chunk
        self.prefetch = prefetch

    def for_rows(self, rows: int) -> tuple[int, int, int]:
        """(BLOCK_M, BLOCK_N, num_warps) for ``rows`` packed query rows; wider tiles need more warps for registers."""
        block_m = max(16, triton.next_power_of_2(rows))
        if block_m <= 64:
            return block_m, self.block_n, self.num_warps
        return block_m, min(self.block_n, 64 if block_m == 128 else 32), 8


MAX_ROWS = 256


def verify_num_splits(pairs: int, max_len: int, num_sms: int, cfg: VerifyConfig, max_splits: int = 64) -> int:
    """Splits per (request, KV head); depends on static values only (see ``draft_num_splits``)."""
    want = max(1, int(cfg.target * num_sms) // max(pairs, 1))
    return max(1, min(want, max_splits, triton.cdiv(max_len, cfg.min_chunk)))


def verify_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    req_to_token: torch.Tensor,
    req_pool_indices: torch.Tensor,
    seq_lens: torch.Tensor,
    window: int,
    scaling: float,
    out: torch.Tensor,
    scores: torch.Tensor | None,
    lse_hint: torch.Tensor | None,
    part_o: torch.Tensor,
    part_lse: torch.Tensor,
    splits: int,
    cfg: VerifyConfig,
) -> None:
    """Causal attention of a W-row window per request, with scores; see ``PillarKernels.verify_attention``.

    q, out: [B*W, Hq, D]; scores: [B, Hkv, max_len] fp32/bf16/fp16 or None; lse_hint: [B, W, Hq] fp32 natural log or None
    (then a second pass over K gives exact scores); part_o: fp32 scratch of B*Hkv*splits*W*g*D elements (unused when
    splits is 1); part_lse: fp32 scratch of B*Hkv*splits*W*g elements.
    """
    rows_total, hq, d = q.shape
    batch = seq_lens.shape[0]
    if batch == 0:
        return
    hkv = k_cache.shape[1]
    g = hq // hkv
    rows = window * g
    block_m, block_n, num_warps = cfg.for_rows(rows)
    one_pass = scores is not None and lse_hint is not None
    scores_arg = scores if scores is not None else part_lse
    hint_arg = lse_hint if lse_hint is not None else part_lse
    stride_sb, stride_sh = (scores.stride(0), scores.stride(1)) if scores is not None else (0, 0)
    _verify_split_kernel[(hkv, splits, batch)](
        q,
        k_cache,
        v_cache,
        req_to_token,
        req_pool_indices,
        seq_lens,
        hint_arg,
        out,
        part_o,
        part_lse,
        scores_arg,
        scaling * LOG2E,
        HINT_CLAMP_LOG2,
        query_stride(q),
        k_cache.stride(0),
        k_cache.stride(1),
        v_cache.stride(0),
        v_cache.stride(1),
        req_to_token.stride(0),
        stride_sb,
        stride_sh,
        HKV=hkv,
        G=g,
        D=d,
        W=window,
        SPLITS=splits,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        MIN_CHUNK=cfg.min_chunk,
        STAGES=cfg.stages,
        SCORES=one_pass,
        PREFETCH=cfg.prefetch,
        num_warps=num_warps,
    )
    if splits > 1:
        combine_rows = 16 if rows > 8 else 8
        _verify_combine_kernel[(hkv, triton.cdiv(rows, combine_rows), batch)](
            out,
            part_o,
            part_lse,
            seq_lens,
            HKV=hkv,
            G=g,
            D=d,
            W=window,
            SPLITS=splits,
            BLOCK_N=block_n,
            MIN_CHUNK=cfg.min_chunk,
            ROWS=combine_rows,
            num_warps=4,
        )
    if scores is not None and not one_pass:
        _launch_scores(
            q, k_cache, req_to_token, req_pool_indices, seq_lens, seq_lens, seq_lens, window, scaling, scores,
            part_lse, splits, splits, cfg, prefill=False,
        )


def _launch_scores(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    req_to_token: torch.Tensor,
    req_pool_indices: torch.Tensor,
    seq_lens: torch.Tensor,
    extend_start_loc: torch.Tensor,
    extend_lens: torch.Tensor,
    window: int,
    scaling: float,
    scores: torch.Tensor,
    part_lse: torch.Tensor,
    lse_splits: int,
    splits: int,
    cfg: VerifyConfig,
    prefill: bool,
) -> None:
    hq, d = q.shape[1], q.shape[2]
    hkv = k_cache.shape[1]
    g = hq // hkv
    block_m, block_n, num_warps = cfg.for_rows(window * g)
    _window_scores_kernel[(hkv, splits, seq_lens.shape[0])](
        q,
        k_cache,
        req_to_token,
        req_pool_indices,
        seq_lens,
        extend_start_loc,
        extend_lens,
        part_lse,
        scores,
        scaling * LOG2E,
        query_stride(q),
        k_cache.stride(0),
        k_cache.stride(1),
        req_to_token.stride(0),
        scores.stride(0),
        scores.stride(1),
        HKV=hkv,
        G=g,
        D=d,
        W=window,
        LSE_SPLITS=lse_splits,
        SPLITS=splits,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        LSE_BLOCK_N=block_n,
        MIN_CHUNK=cfg.min_chunk,
        STAGES=cfg.stages,
        PREFILL=prefill,
        num_warps=num_warps,
    )


def prefill_scores(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    req_to_token: torch.Tensor,
    req_pool_indices: torch.Tensor,
    seq_lens: torch.Tensor,
    extend_start_loc: torch.Tensor,
    extend_lens: torch.Tensor,
    window: int,
    scaling: float,
    scores: torch.Tensor,
    part_lse: torch.Tensor,
    splits: int,
    cfg: VerifyConfig,
) -> None:
    """Scores of a prompt's positions from its last min(W, extend_len) query rows; two passes over K.

    See ``PillarKernels.prefill_scores``.  part_lse: fp32 scratch of B*Hkv*splits*W*g elements.
    """
    batch = seq_lens.shape[0]
    if batch == 0:
        return
    hq, d = q.shape[1], q.shape[2]
    hkv = k_cache.shape[1]
    g = hq // hkv
    block_m, block_n, num_warps = cfg.for_rows(window * g)
    _window_lse_kernel[(hkv, splits, batch)](
        q,
        k_cache,
        req_to_token,
        req_pool_indices,
        seq_lens,
        extend_start_loc,
        extend_lens,
        part_lse,
        scaling * LOG2E,
        query_stride(q),
        k_cache.stride(0),
        k_cache.stride(1),
        req_to_token.stride(0),
        HKV=hkv,
        G=g,
        D=d,
        W=window,
        SPLITS=splits,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        MIN_CHUNK=cfg.min_chunk,
        STAGES=cfg.stages,
        PREFILL=True,
        num_warps=num_warps,
    )
    _launch_scores(
        q, k_cache, req_to_token, req_pool_indices, seq_lens, extend_start_loc, extend_lens, window, scaling, scores,
        part_lse, splits, splits, cfg, prefill=True,
    )
