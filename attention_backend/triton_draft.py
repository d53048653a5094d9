"""Draft attention over a per-head selection: split-KV flash decoding in Triton.

A draft step attends, per (request, KV head), to the positions chosen by the last verify plus the contiguous
tail written since (DESIGN "PillarAttn as we do it"; paper arXiv 2512.01278, sparse draft phase).  Positions are logical;
the kernel translates them with ``req_to_token`` on the fly, so there is no index-building pass and no host plan.

The g = Hq/Hkv query heads of a KV head are packed into one tensor-core tile (M padded to 16).  The launch grid
depends only on the batch size and on static maxima; lengths are read on the device, so a launch can be captured
in a CUDA graph.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

LOG2E = 1.4426950408889634


@triton.jit
def _draft_lengths(
    num_selected_ptr, tail_start_ptr, req_ptr, seq_lens_ptr, b, cap, SPLITS: tl.constexpr, MIN_CHUNK: tl.constexpr
):
    """Row, selected count, tail start, attended count and chunk per split of batch entry ``b``."""
    row = tl.load(req_ptr + b).to(tl.int64)
    seq = tl.load(seq_lens_ptr + b).to(tl.int32)
    n_sel = tl.minimum(tl.load(num_selected_ptr + row).to(tl.int32), cap)
    tail = tl.load(tail_start_ptr + row).to(tl.int32)
    total = tl.where(seq > 0, n_sel + tl.maximum(seq - tail, 0), 0)
    # Multiples of 16 keep the splits even; masked lanes of a block load nothing.
    chunk = tl.maximum(tl.cdiv(tl.cdiv(total, SPLITS), 16) * 16, MIN_CHUNK)
    return row, seq, n_sel, tail, total, chunk


@triton.jit
def _draft_slots(pos_ptr, r2t_ptr, offs, end, n_sel, tail, seq):
    """KV slots of the list entries ``offs``: selected positions first, then the contiguous tail."""
    valid = offs < end
    pos = tl.load(pos_ptr + offs, mask=valid & (offs < n_sel), other=0)
    pos = tl.where(offs < n_sel, pos, tail + offs - n_sel)
    # A stale row must never fault the server: a clamp costs nothing and only touches drafts.
    pos = tl.minimum(tl.maximum(pos, 0), seq - 1)
    return tl.load(r2t_ptr + pos, mask=valid, other=0).to(tl.int64)


@triton.jit
def _draft_split_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    positions_ptr,
    num_selected_ptr,
    tail_start_ptr,
    r2t_ptr,
    req_ptr,
    seq_lens_ptr,
    out_ptr,
    lse_ptr,
    part_o_ptr,
    part_lse_ptr,
    scale_log2,
    cap,
    stride_q_tok,
    stride_k_slot,
    stride_k_head,
    stride_v_slot,
    stride_v_head,
    stride_pos_row,
    stride_pos_head,
    stride_r2t,
    HKV: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MIN_CHUNK: tl.constexpr,
    STAGES: tl.constexpr,
    HAS_LSE: tl.constexpr,
    PDL: tl.constexpr,
):
    # The KV head is the fastest grid axis: neighbouring programs then touch neighbouring DRAM rows for the tail.
    h = tl.program_id(0)
    split = tl.program_id(1)
    b = tl.program_id(2)
    row, seq, n_sel, tail, total, chunk = _draft_lengths(
        num_selected_ptr, tail_start_ptr, req_ptr, seq_lens_ptr, b, cap, SPLITS, MIN_CHUNK
    )
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    start = split * chunk
    end = tl.minimum(start + chunk, total)

    offs_m = tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, D)
    rows = (b * HKV + h).to(tl.int64) * G + offs_m
    mask_m = offs_m < G
    if end <= start:
        # Only the first split may own an empty request; other empty splits are skipped by the combine kernel.
        if (SPLITS == 1) & (total == 0):
            zero = tl.zeros([BLOCK_M, D], dtype=tl.float32).to(out_ptr.dtype.element_ty)
            tl.store(out_ptr + rows[:, None] * D + offs_d[None, :], zero, mask=mask_m[:, None])
            if HAS_LSE:
                tl.store(lse_ptr + rows, tl.full([BLOCK_M], float("-inf"), tl.float32), mask=mask_m)
        return

    q_base = q_ptr + b.to(tl.int64) * stride_q_tok + h.to(tl.int64) * G * D
    q = tl.load(q_base + offs_m[:, None] * D + offs_d[None, :], mask=mask_m[:, None], other=0.0)
    pos_base = positions_ptr + row * stride_pos_row + h.to(tl.int64) * stride_pos_head
    r2t_base = r2t_ptr + row * stride_r2t
    k_base = k_ptr + h.to(tl.int64) * stride_k_head
    v_base = v_ptr + h.to(tl.int64) * stride_v_head

    m_i = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l_i = tl.zeros([BLOCK_M], dtype=tl.float32)
    acc = tl.zeros([BLOCK_M, D], dtype=tl.float32)
    offs_n = tl.arange(0, BLOCK_N)
    # The next block's slots are fetched by hand one block ahead: the chain position -> slot -> KV row is three dependent
    # loads, which the compiler's pipeliner alone does not hide.
    slot = _draft_slots(pos_base, r2t_base, start + offs_n, end, n_sel, tail, seq)
    for s in tl.range(start, end, BLOCK_N, num_stages=STAGES):
        valid = s + offs_n < end
        k = tl.load(
            k_base + slot[:, None] * stride_k_slot + offs_d[None, :], mask=valid[:, None], other=0.0
        ).to(q_ptr.dtype.element_ty)
        v = tl.load(
            v_base + slot[:, None] * stride_v_slot + offs_d[None, :], mask=valid[:, None], other=0.0
        ).to(q_ptr.dtype.element_ty)
        slot = _draft_slots(pos_base, r2t_base, s + BLOCK_N + offs_n, end, n_sel, tail, seq)
        qk = tl.dot(q, tl.trans(k), input_precision="ieee") * scale_log2
        qk = tl.where(valid[None, :], qk, float("-inf"))
        m_new = tl.maximum(m_i, tl.max(qk, 1))
        alpha = tl.exp2(m_i - m_new)
        p = tl.exp2(qk - m_new[:, None])
        l_i = l_i * alpha + tl.sum(p, 1)
        acc = acc * alpha[:, None]
        acc = tl.dot(p.to(v.dtype), v, acc, input_precision="ieee")
        m_i = m_new

    acc = acc / l_i[:, None]
    lse2 = m_i + tl.log2(l_i)
    if SPLITS == 1:
        out = acc.to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + rows[:, None] * D + offs_d[None, :], out, mask=mask_m[:, None])
        if HAS_LSE:
            tl.store(lse_ptr + rows, lse2 * 0.6931471805599453, mask=mask_m)
    else:
        part = rows * SPLITS + split
        tl.store(part_o_ptr + part[:, None] * D + offs_d[None, :], acc, mask=mask_m[:, None])
        tl.store(part_lse_ptr + part, lse2, mask=mask_m)


@triton.jit
def _draft_combine_kernel(
    out_ptr,
    lse_ptr,
    part_o_ptr,
    part_lse_ptr,
    num_selected_ptr,
    tail_start_ptr,
    req_ptr,
    seq_lens_ptr,
    cap,
    HQ: tl.constexpr,
    D: tl.constexpr,
    SPLITS: tl.constexpr,
    SPLITS_POW2: tl.constexpr,
    MIN_CHUNK: tl.constexpr,
    HAS_LSE: tl.constexpr,
    PDL: tl.constexpr,
):
    hq = tl.program_id(0)
    b = tl.program_id(1)
    row, seq, n_sel, tail, total, chunk = _draft_lengths(
        num_selected_ptr, tail_start_ptr, req_ptr, seq_lens_ptr, b, cap, SPLITS, MIN_CHUNK
    )
    if PDL:
        tl.extra.cuda.gdc_wait()
    offs_s = tl.arange(0, SPLITS_POW2)
    offs_d = tl.arange(0, D)
    out_row = b.to(tl.int64) * HQ + hq
    used = offs_s * chunk < total
    part = out_row * SPLITS + offs_s
    lse2 = tl.load(part_lse_ptr + part, mask=used & (offs_s < SPLITS), other=float("-inf"))
    # All splits are loaded at once: one memory round trip instead of a serial chain.
    o = tl.load(
        part_o_ptr + part[:, None] * D + offs_d[None, :], mask=(used & (offs_s < SPLITS))[:, None], other=0.0
    )
    m = tl.max(lse2, 0)
    m_safe = tl.where(m == float("-inf"), 0.0, m)
    w = tl.exp2(lse2 - m_safe)
    total_w = tl.sum(w, 0)
    res = tl.sum(o * w[:, None], 0) / tl.where(total_w > 0, total_w, 1.0)
    tl.store(out_ptr + out_row * D + offs_d, res.to(out_ptr.dtype.element_ty))
    if HAS_LSE:
        tl.store(lse_ptr + out_row, (m + tl.log2(total_w)) * 0.6931471805599453)


def query_stride(q: torch.Tensor) -> int:
    """Elements from one token's queries to the next of ``q`` [tokens, Hq, D].

    Models hand over a slice of the fused QKV projection, so tokens may lie apart; heads may not.

    Raises:
        ValueError: the heads of a token are not contiguous.
    """
    if q.stride(2) != 1 or q.stride(1) != q.shape[2]:
        raise ValueError(f"the heads of a token must be contiguous in q, got strides {q.stride()}")
    return q.stride(0)


class DraftConfig:
    """Launch parameters of the draft kernel (compile-time constants of the Triton kernels).

    block_n: list entries per inner iteration.  min_chunk: fewest entries per split.  target: programs wanted per
    multiprocessor before a list is split.
    """

    def __init__(
        self,
        block_n: int = 64,
        num_warps: int = 4,
        stages: int = 2,
        target: float = 6.0,
        min_chunk: int = 64,
        pdl: bool = False,
    ) -> None:
        self.block_n = block_n
        self.num_warps = num_warps
        self.stages = stages
        self.target = target
        self.min_chunk = min_chunk
        self.pdl = pdl


def draft_num_splits(pairs: int, max_entries: int, num_sms: int, cfg: DraftConfig, max_splits: int = 32) -> int:
    """Splits per (request, KV head) so that about ``cfg.target`` programs per multiprocessor run.

    Depends on static values only (``pairs`` = B * Hkv, ``max_entries`` = capacity plus longest tail), so the launch
    grid is fixed per batch size.
    """
    want = max(1, int(cfg.target * num_sms) // max(pairs, 1))
    return max(1, min(want, max_splits, triton.cdiv(max_entries, cfg.min_chunk)))


def draft_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    positions: torch.Tensor,
    num_selected: torch.Tensor,
    tail_start: torch.Tensor,
    req_to_token: torch.Tensor,
    req_pool_indices: torch.Tensor,
    seq_lens: torch.Tensor,
    scaling: float,
    out: torch.Tensor,
    lse: torch.Tensor | None,
    part_o: torch.Tensor,
    part_lse: torch.Tensor,
    splits: int,
    cfg: DraftConfig,
) -> None:
    """Attention of one query per request over selected positions plus tail; see ``PillarKernels.draft_attention``.

    q, out: [B, Hq, D]; k_cache, v_cache: [slots, Hkv, D]; positions: [rows, Hkv, cap] int32; lse: [B, Hq] fp32 natural
    log or None; part_o: fp32 scratch of at least B*Hq*splits*D elements, part_lse: B*Hq*splits.
    """
    batch, hq, d = q.shape
    hkv = k_cache.shape[1]
    if batch == 0:
        return
    lse_arg = lse if lse is not None else part_lse
    pdl = cfg.pdl and splits > 1
    cap = positions.shape[2]
    _draft_split_kernel[(hkv, splits, batch)](
        q,
        k_cache,
        v_cache,
        positions,
        num_selected,
        tail_start,
        req_to_token,
        req_pool_indices,
        seq_lens,
        out,
        lse_arg,
        part_o,
        part_lse,
        scaling * LOG2E,
        cap,
        query_stride(q),
        k_cache.stride(0),
        k_cache.stride(1),
        v_cache.stride(0),
        v_cache.stride(1),
        positions.stride(0),
        positions.stride(1),
        req_to_token.stride(0),
        HKV=hkv,
        G=hq // hkv,
        D=d,
        SPLITS=splits,
        BLOCK_M=max(16, triton.next_power_of_2(hq // hkv)),
        BLOCK_N=cfg.block_n,
        MIN_CHUNK=cfg.min_chunk,
        STAGES=cfg.stages,
        HAS_LSE=lse is not None,
        PDL=pdl,
        num_warps=cfg.num_warps,
    )
    if splits > 1:
        extra = {"launch_pdl": True} if pdl else {}
        _draft_combine_kernel[(hq, batch)](
            out,
            lse_arg,
            part_o,
            part_lse,
            num_selected,
            tail_start,
            req_pool_indices,
            seq_lens,
            cap,
            HQ=hq,
            D=d,
            SPLITS=splits,
            SPLITS_POW2=triton.next_power_of_2(splits),
            MIN_CHUNK=cfg.min_chunk,
            HAS_LSE=lse is not None,
            PDL=pdl,
            num_warps=2 if splits <= 8 else 4,
            **extra,
        )
