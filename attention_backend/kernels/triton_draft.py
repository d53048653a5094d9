"""Draft attention over a per-head selection: split-KV flash decoding in Triton.

A draft step attends, per (request, KV head), to the positions chosen by the last verify plus the contiguous tail
written since (paper arXiv 2512.01278, sparse draft phase).  Positions are logical; the kernel translates them with
``req_to_token`` on the fly, so there is no index-building pass and no host plan.  The g = Hq/Hkv query heads of a KV
head are packed into one tensor-core tile (M padded to 16).

- **Prefetch chain.** Position -> slot -> KV row are three dependent loads.  Every iteration loads the KV rows of its
  block, the slots of the next and the positions of the one after, each from the raw words that the iteration before
  loaded, so no load waits for another of its iteration.
- **Early start.** Programs find their first slots while the kernel before them still writes this step's K and V
  (programmatic dependent launch).
- **Merge in place.** The last program of a (request, KV head) to finish merges the parts, which saves a second launch.

The launch grid depends only on the batch size and on static maxima; lengths are read on the device, so a launch can be
captured in a CUDA graph.
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
    num_splits,
    pdl_options,
    query_stride,
    wait_for_previous,
    with_sinks,
)
from sglang_sparsespec.attention_backend.page_table import SelectionTable


@triton.jit
def draft_lengths(num_selected_ptr, tail_start_ptr, req_ptr, seq_lens_ptr, b, cap, splits, MIN_CHUNK: tl.constexpr):
    """Row, selected count, tail start, attended count and chunk per split of batch entry ``b``."""
    row = tl.load(req_ptr + b).to(tl.int64)
    seq = tl.load(seq_lens_ptr + b).to(tl.int32)
    n_sel = tl.minimum(tl.load(num_selected_ptr + row).to(tl.int32), cap)
    tail = tl.load(tail_start_ptr + row).to(tl.int32)
    total = tl.where(seq > 0, n_sel + tl.maximum(seq - tail, 0), 0)
    # Multiples of 16 keep the splits even.
    chunk = tl.maximum(tl.cdiv(tl.cdiv(total, splits), 16) * 16, MIN_CHUNK)
    return row, seq, n_sel, tail, total, chunk


@triton.jit
def raw_positions(pos_base, index, cap):
    """List words at ``index``; past the list's end any word, which ``slots_of`` does not use.

    Bounded by the list's room, not its length, so that a list's first words need not wait for its length.
    """
    return tl.load(pos_base + tl.minimum(index, cap - 1))


@triton.jit
def slots_of(raw, index, n_sel, tail, last, r2t_base):
    """KV slots of the list entries ``index``: selected positions first, then the contiguous tail."""
    pos = tl.where(index < n_sel, raw, tail + index - n_sel)
    # A stale row must never fault the server, and the entries past the end repeat the last token.
    return tl.load(r2t_base + tl.minimum(tl.maximum(pos, 0), last))


# The number of splits differs between batch sizes: compiled in, each captured batch would compile its own kernel.
@triton.jit(do_not_specialize=["splits"])
def _draft_kernel(
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
    sinks_ptr,
    part_o_ptr,
    part_lse_ptr,
    arrived_ptr,
    scale_log2,
    cap,
    splits,
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
    IS_SPLIT: tl.constexpr,
    MERGED_PARTS: tl.constexpr,
    MERGED_HEADS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MIN_CHUNK: tl.constexpr,
    STAGES: tl.constexpr,
    HAS_LSE: tl.constexpr,
    SINKS: tl.constexpr,
    CAP2: tl.constexpr,
    WIDE: tl.constexpr,
    PDL: tl.constexpr,
):
    # The KV head is the fastest grid axis: neighbouring programs then touch neighbouring DRAM rows for the tail.
    h = tl.program_id(0)
    split = tl.program_id(1)
    b = tl.program_id(2)
    row, seq, n_sel, tail, total, chunk = draft_lengths(
        num_selected_ptr, tail_start_ptr, req_ptr, seq_lens_ptr, b, cap, splits, MIN_CHUNK
    )
    # A list that is not split begins at a known place.
    start = split * chunk if IS_SPLIT else 0
    end = tl.minimum(start + chunk, total)

    offs_m = tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, D)
    rows = (b * HKV + h).to(tl.int64) * G + offs_m
    mask_m = offs_m < G
    pos_base = positions_ptr + row * stride_pos_row + h.to(tl.int64) * stride_pos_head
    r2t_base = r2t_ptr + row * stride_r2t
    last = tl.maximum(seq - 1, 0)
    index = start + tl.arange(0, BLOCK_N)
    slot = slots_of(raw_positions(pos_base, index, cap), index, n_sel, tail, last, r2t_base)
    raw = raw_positions(pos_base, index + BLOCK_N, cap)
    wait_for_previous(PDL)
    if end <= start:
        if (split == 0) & (total == 0):
            zero = tl.zeros([BLOCK_M, D], dtype=tl.float32).to(out_ptr.dtype.element_ty)
            tl.store(out_ptr + rows[:, None] * D + offs_d[None, :], zero, mask=mask_m[:, None])
            if HAS_LSE:
                tl.store(lse_ptr + rows, tl.full([BLOCK_M], float("-inf"), tl.float32), mask=mask_m)
        return

    q_base = q_ptr + b.to(tl.int64) * stride_q_tok + h.to(tl.int64) * G * D
    q = tl.load(q_base + offs_m[:, None] * D + offs_d[None, :], mask=mask_m[:, None], other=0.0)
    k_base = k_ptr + h.to(tl.int64) * stride_k_head
    v_base = v_ptr + h.to(tl.int64) * stride_v_head

    m_i = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l_i = tl.zeros([BLOCK_M], dtype=tl.float32)
    acc = tl.zeros([BLOCK_M, D], dtype=tl.float32)
    for s in tl.range(start, end, BLOCK_N, num_stages=STAGES):
        index = s + tl.arange(0, BLOCK_N)
        k = tl.load(k_base + kv_offsets(slot, stride_k_slot, offs_d, WIDE)).to(q_ptr.dtype.element_ty)
        v = tl.load(v_base + kv_offsets(slot, stride_v_slot, offs_d, WIDE)).to(q_ptr.dtype.element_ty)
        slot = slots_of(raw, index + BLOCK_N, n_sel, tail, last, r2t_base)
        raw = raw_positions(pos_base, index + 2 * BLOCK_N, cap)
        qk = tl.dot(q, tl.trans(k), input_precision="ieee")
        qk = tl.where(index[None, :] < end, capped(qk * scale_log2, CAP2), float("-inf"))
        m_new = tl.maximum(m_i, tl.max(qk, 1))
        alpha = tl.exp2(m_i - m_new)
        p = tl.exp2(qk - m_new[:, None])
        l_i = l_i * alpha + tl.sum(p, 1)
        acc = acc * alpha[:, None]
        acc = tl.dot(p.to(v.dtype), v, acc, input_precision="ieee")
        m_i = m_new

    acc = acc / l_i[:, None]
    lse2 = m_i + tl.log2(l_i)
    if not IS_SPLIT:
        if SINKS:
            sinks2 = tl.load(sinks_ptr + h * G + offs_m, mask=mask_m, other=0.0).to(tl.float32) * LOG2E
            acc, lse2 = with_sinks(acc, lse2, sinks2)
        out = acc.to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + rows[:, None] * D + offs_d[None, :], out, mask=mask_m[:, None])
        if HAS_LSE:
            tl.store(lse_ptr + rows, lse2 * LN2, mask=mask_m)
    else:
        part = rows * splits + split
        tl.store(part_o_ptr + part[:, None] * D + offs_d[None, :], acc, mask=mask_m[:, None])
        tl.store(part_lse_ptr + part, lse2, mask=mask_m)
        # All threads' stores come before the release, and the reads below after the acquire.
        tl.debug_barrier()
        counter = arrived_ptr + b * HKV + h
        used = tl.cdiv(total, chunk)
        before = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu")
        if before == used - 1:
            tl.store(counter, 0)  # for the next launch
            # Several heads and parts at once, because each load of a loop waits for the one before.
            for first in tl.static_range(0, G, MERGED_HEADS):
                g = first + tl.arange(0, MERGED_HEADS)
                mask_g = g < G
                out_rows = (b * HKV + h).to(tl.int64) * G + g
                m = tl.full([MERGED_HEADS], -1e30, tl.float32)
                total_w = tl.zeros([MERGED_HEADS], tl.float32)
                if SINKS:  # a part without values
                    m = tl.load(sinks_ptr + h * G + g, mask=mask_g, other=0.0).to(tl.float32) * LOG2E
                    total_w += 1.0
                res = tl.zeros([MERGED_HEADS, D], tl.float32)
                for s in tl.range(0, used, MERGED_PARTS, num_stages=1):
                    offs_s = s + tl.arange(0, MERGED_PARTS)
                    place = out_rows[:, None] * splits + offs_s[None, :]
                    mask = mask_g[:, None] & (offs_s < used)[None, :]
                    lse2_s = tl.load(part_lse_ptr + place, mask=mask, other=float("-inf"))
                    o_at = part_o_ptr + place[:, :, None] * D + offs_d[None, None, :]
                    o = tl.load(o_at, mask=mask[:, :, None], other=0.0)
                    m_new = tl.maximum(m, tl.max(lse2_s, 1))
                    alpha = tl.exp2(m - m_new)
                    w = tl.exp2(lse2_s - m_new[:, None])
                    total_w = total_w * alpha + tl.sum(w, 1)
                    res = res * alpha[:, None] + tl.sum(o * w[:, :, None], 1)
                    m = m_new
                total_w = tl.where(mask_g, total_w, 1.0)
                tl.store(
                    out_ptr + out_rows[:, None] * D + offs_d[None, :],
                    (res / total_w[:, None]).to(out_ptr.dtype.element_ty),
                    mask=mask_g[:, None],
                )
                if HAS_LSE:
                    tl.store(lse_ptr + out_rows, (m + tl.log2(total_w)) * LN2, mask=mask_g)


#: Parts of a list that are merged at a time, and partial outputs that a thread does: they must fit its registers.
MERGED_PARTS, MERGED_OF_THREAD = 8, 64


@dataclass
class DraftConfig:
    """Launch parameters of the draft kernel.

    Attributes:
        block_n: list entries per inner iteration.
        num_warps, stages: warps of a program, KV tiles in its pipeline.
        target: programs wanted per multiprocessor before a list is split.
        min_chunk: fewest entries per split.
    """

    block_n: int = 32
    num_warps: int = 1
    stages: int = 3
    target: float = 4.0
    min_chunk: int = 64


def default_config(pairs: int, num_sms: int) -> DraftConfig:
    """Launch parameters for ``pairs`` = B * Hkv lists, by measurement on an H100."""
    if pairs <= 0.75 * num_sms:
        # Too few lists for all multiprocessors, so they are split; programs of this size fit one twice.
        return DraftConfig(block_n=64, num_warps=2, target=2.0)
    if pairs <= num_sms:
        # A program of this size reads as much as a multiprocessor can, and a whole list has no parts to merge.
        return DraftConfig(block_n=64, num_warps=4, target=1.0)
    if pairs <= 2 * num_sms:
        # Two programs of this size fit a multiprocessor, so all lists are read at once, whole.
        return DraftConfig(block_n=64, num_warps=2, target=1.0)
    return DraftConfig()


def draft_num_splits(pairs: int, max_entries: int, num_sms: int, config: DraftConfig) -> int:
    """Splits per (request, KV head); ``max_entries``: of the longest list."""
    return num_splits(pairs, max_entries, num_sms, config.target, config.min_chunk, max_splits=32)


def draft_attention(
    *,
    q: torch.Tensor,
    kv: LayerKV,
    table: SelectionTable,
    positions: torch.Tensor,
    req_to_token: torch.Tensor,
    rows: torch.Tensor,
    seq_lens: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor | None,
    scratch: Scratch,
    splits: int,
    config: DraftConfig,
    pdl: bool,
) -> None:
    """Attention of one query per request over selected positions plus tail; see ``interface.DraftAttention``.

    Args:
        table: sizes of the selections, and where the tails begin.
        positions: int32 [rows, Hkv, capacity], the selections of the layer.
        scratch: at least B * Hq * splits * D partial outputs and B * Hq * splits sums, both unused when ``splits`` is 1,
            and B * Hkv counters.
        splits: programs per (request, KV head).
        pdl: start while the kernel before still runs (compute capability 9 and later).
    """
    batch, num_q_heads, head_dim = q.shape
    num_kv_heads = kv.k.shape[1]
    if batch == 0:
        return
    group, parts = num_q_heads // num_kv_heads, min(MERGED_PARTS, triton.next_power_of_2(splits))
    merged_heads = max(1, MERGED_OF_THREAD * 32 * config.num_warps // (parts * head_dim))
    _draft_kernel[(num_kv_heads, splits, batch)](
        q_ptr=q,
        k_ptr=kv.k,
        v_ptr=kv.v,
        positions_ptr=positions,
        num_selected_ptr=table.num_selected,
        tail_start_ptr=table.tail_start,
        r2t_ptr=req_to_token,
        req_ptr=rows,
        seq_lens_ptr=seq_lens,
        out_ptr=out,
        lse_ptr=lse if lse is not None else scratch.part_lse,
        sinks_ptr=kv.sinks if kv.sinks is not None else scratch.part_lse,
        part_o_ptr=scratch.part_o,
        part_lse_ptr=scratch.part_lse,
        arrived_ptr=scratch.arrived,
        scale_log2=kv.scaling * LOG2E.value,
        cap=positions.shape[2],
        splits=splits,
        stride_q_tok=query_stride(q),
        stride_k_slot=kv.k.stride(0),
        stride_k_head=kv.k.stride(1),
        stride_v_slot=kv.v.stride(0),
        stride_v_head=kv.v.stride(1),
        stride_pos_row=positions.stride(0),
        stride_pos_head=positions.stride(1),
        stride_r2t=req_to_token.stride(0),
        HKV=num_kv_heads,
        G=group,
        D=head_dim,
        IS_SPLIT=splits > 1,
        MERGED_PARTS=parts,
        MERGED_HEADS=min(triton.next_power_of_2(group), merged_heads),
        BLOCK_M=max(16, triton.next_power_of_2(group)),
        BLOCK_N=config.block_n,
        MIN_CHUNK=config.min_chunk,
        STAGES=config.stages,
        HAS_LSE=lse is not None,
        SINKS=kv.sinks is not None,
        CAP2=kv.soft_cap * LOG2E.value,
        WIDE=is_wide(kv.k, kv.v),
        PDL=pdl,
        num_warps=config.num_warps,
        **pdl_options(pdl),
    )
