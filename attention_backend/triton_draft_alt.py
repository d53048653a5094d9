"""Draft attention with a software pipeline that holds, and an optional merge in the same launch, in Triton.

Interface and results are those of :mod:`triton_draft`.  Two differences:

- **Prefetch chain.** Position -> slot -> KV row are three dependent loads.  Here every iteration loads the KV rows of its
  block, the slots of the next and the positions of the one after, each from the raw words that the iteration before
  loaded, so no load waits for another of its iteration.  The raw words must be what the loop carries: if an iteration
  converts them first, Triton takes the loads for pipelined ones and waits for each of them where it is issued.
- **Merge in place.** The last program of a (request, KV head) to finish merges the parts, which saves the second launch
  where a step is short.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from sglang_sparsespec.attention_backend.triton_draft import (
    LOG2E,
    DraftConfig,
    _draft_combine_kernel,
    _draft_lengths,
    draft_num_splits,
    query_stride,
)


@triton.jit
def _raw_positions(pos_base, index, n_sel):
    """List words at ``index``; past the list's end any word of it, which ``_slots_of`` does not use."""
    return tl.load(pos_base + tl.maximum(tl.minimum(index, n_sel - 1), 0))


@triton.jit
def _slots_of(raw, index, n_sel, tail, seq, r2t_base):
    """KV slots of the list entries ``index``: selected positions first, then the contiguous tail."""
    pos = tl.where(index < n_sel, raw, tail + index - n_sel)
    # A stale row must never fault the server, and the entries past the end repeat the last token.
    return tl.load(r2t_base + tl.minimum(tl.maximum(pos, 0), seq - 1))


@triton.jit
def _offsets(slot, stride_slot, offs_d, WIDE: tl.constexpr):
    """Element offsets [BLOCK_N, D] of the rows ``slot``; 32 bits where the cache is small enough."""
    if WIDE:
        return (slot.to(tl.int64) * stride_slot)[:, None] + offs_d[None, :]
    else:
        return (slot * stride_slot)[:, None] + offs_d[None, :]


@triton.jit
def _pipelined_draft_kernel(
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
    arrived_ptr,
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
    SPLITS_POW2: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MIN_CHUNK: tl.constexpr,
    STAGES: tl.constexpr,
    HAS_LSE: tl.constexpr,
    MERGE: tl.constexpr,
    WIDE: tl.constexpr,
):
    h = tl.program_id(0)
    split = tl.program_id(1)
    b = tl.program_id(2)
    row, seq, n_sel, tail, total, chunk = _draft_lengths(
        num_selected_ptr, tail_start_ptr, req_ptr, seq_lens_ptr, b, cap, SPLITS, MIN_CHUNK
    )
    start = split * chunk
    end = tl.minimum(start + chunk, total)

    offs_m = tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, D)
    rows = (b * HKV + h).to(tl.int64) * G + offs_m
    mask_m = offs_m < G
    if end <= start:
        if (split == 0) & (total == 0):
            if (SPLITS == 1) | MERGE:
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
    index = start + tl.arange(0, BLOCK_N)
    slot = _slots_of(_raw_positions(pos_base, index, n_sel), index, n_sel, tail, seq, r2t_base)
    raw = _raw_positions(pos_base, index + BLOCK_N, n_sel)
    for s in tl.range(start, end, BLOCK_N, num_stages=STAGES):
        index = s + tl.arange(0, BLOCK_N)
        k = tl.load(k_base + _offsets(slot, stride_k_slot, offs_d, WIDE)).to(q_ptr.dtype.element_ty)
        v = tl.load(v_base + _offsets(slot, stride_v_slot, offs_d, WIDE)).to(q_ptr.dtype.element_ty)
        slot = _slots_of(raw, index + BLOCK_N, n_sel, tail, seq, r2t_base)
        raw = _raw_positions(pos_base, index + 2 * BLOCK_N, n_sel)
        qk = tl.dot(q, tl.trans(k), input_precision="ieee")
        qk = tl.where(index[None, :] < end, qk * scale_log2, float("-inf"))
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
        if MERGE:
            # All threads' stores come before the release, and the reads below after the acquire.
            tl.debug_barrier()
            counter = arrived_ptr + b * HKV + h
            used = tl.cdiv(total, chunk)
            before = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu")
            if before == used - 1:
                tl.store(counter, 0)  # for the next launch
                offs_s = tl.arange(0, SPLITS_POW2)
                live = offs_s < used
                for g in tl.static_range(G):
                    out_row = (b * HKV + h).to(tl.int64) * G + g
                    place = out_row * SPLITS + offs_s
                    lse2_s = tl.load(part_lse_ptr + place, mask=live, other=float("-inf"))
                    o = tl.load(
                        part_o_ptr + place[:, None] * D + offs_d[None, :], mask=live[:, None], other=0.0
                    )
                    m = tl.max(lse2_s, 0)
                    w = tl.exp2(lse2_s - m)
                    total_w = tl.sum(w, 0)
                    res = tl.sum(o * w[:, None], 0) / total_w
                    tl.store(out_ptr + out_row * D + offs_d, res.to(out_ptr.dtype.element_ty))
                    if HAS_LSE:
                        tl.store(lse_ptr + out_row, (m + tl.log2(total_w)) * 0.6931471805599453)


class PipelinedDraftConfig(DraftConfig):
    """Launch parameters of the pipelined draft kernel; ``merge``: merge the parts in the same launch."""

    def __init__(
        self,
        block_n: int = 32,
        num_warps: int = 1,
        stages: int = 3,
        target: float = 6.0,
        min_chunk: int = 64,
        merge: bool = True,
    ) -> None:
        super().__init__(block_n, num_warps, stages, target, min_chunk)
        self.merge = merge


class PipelinedDraft:
    """Draft attention by the pipelined kernel.

    Args:
        max_batch: most requests in one call.
        num_q_heads, num_kv_heads, head_dim: of this tensor-parallel rank.
        max_entries: most entries that a query attends to (capacity of the lists plus the longest tail).
        num_sms: multiprocessors of the device.
        device: where the caches live.
        config: launch parameters.
    """

    def __init__(
        self,
        max_batch: int,
        num_q_heads: int,
        num_kv_heads: int,
        head_dim: int,
        max_entries: int,
        num_sms: int,
        device: torch.device | str,
        config: PipelinedDraftConfig | None = None,
    ) -> None:
        self.config = config or PipelinedDraftConfig()
        self.max_batch, self.max_entries, self.num_sms = max_batch, max_entries, num_sms
        self.num_kv_heads = num_kv_heads
        rows = max(b * num_q_heads * self.splits(b) for b in range(1, max_batch + 1))
        self._part_lse = torch.empty(rows, dtype=torch.float32, device=device)
        self._part_o = torch.empty(rows * head_dim, dtype=torch.float32, device=device)
        self._arrived = torch.zeros(max_batch * num_kv_heads, dtype=torch.int32, device=device)

    def splits(self, batch: int) -> int:
        """Programs per (request, KV head)."""
        return draft_num_splits(batch * self.num_kv_heads, self.max_entries, self.num_sms, self.config)

    def draft_attention(
        self,
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
        lse: torch.Tensor | None = None,
    ) -> None:
        """See ``PillarKernels.draft_attention``.

        Raises:
            ValueError: the batch exceeds ``max_batch``.
        """
        batch, hq, d = q.shape
        if batch > self.max_batch:
            raise ValueError(f"batch {batch} exceeds max_batch {self.max_batch}")
        if batch == 0:
            return
        cfg = self.config
        hkv = k_cache.shape[1]
        splits = self.splits(batch)
        lse_arg = lse if lse is not None else self._part_lse
        _pipelined_draft_kernel[(hkv, splits, batch)](
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
            self._part_o,
            self._part_lse,
            self._arrived,
            scaling * LOG2E,
            positions.shape[2],
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
            SPLITS_POW2=triton.next_power_of_2(splits),
            BLOCK_M=max(16, triton.next_power_of_2(hq // hkv)),
            BLOCK_N=cfg.block_n,
            MIN_CHUNK=cfg.min_chunk,
            STAGES=cfg.stages,
            HAS_LSE=lse is not None,
            MERGE=cfg.merge,
            WIDE=max(k_cache.numel(), v_cache.numel()) >= 2**31,
            num_warps=cfg.num_warps,
        )
        if splits > 1 and not cfg.merge:
            _draft_combine_kernel[(hq, batch)](
                out,
                lse_arg,
                self._part_o,
                self._part_lse,
                num_selected,
                tail_start,
                req_pool_indices,
                seq_lens,
                positions.shape[2],
                HQ=hq,
                D=d,
                SPLITS=splits,
                SPLITS_POW2=triton.next_power_of_2(splits),
                MIN_CHUNK=cfg.min_chunk,
                HAS_LSE=lse is not None,
                PDL=False,
                num_warps=2 if splits <= 8 else 4,
            )
