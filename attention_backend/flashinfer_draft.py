"""Draft attention through FlashInfer, for comparison and as an option.

FlashInfer's paged decode binds one index list per batch row, shared by all heads.  Per-head lists fit without a new
kernel: an NHD cache [slots, Hkv, D] of page size 1 is viewed as [slots * Hkv] pages of one KV head, and each
(request, KV head) becomes a batch row with g query heads (the folding ``VariableBlockSparseAttentionWrapper`` does; see
the design digest, section 5).  The price is an index list per layer and step and a host-side plan per step.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl


@triton.jit
def _page_indices_kernel(
    positions_ptr,
    num_selected_ptr,
    tail_start_ptr,
    r2t_ptr,
    req_ptr,
    seq_lens_ptr,
    indptr_ptr,
    indices_ptr,
    stride_pos_row,
    stride_pos_head,
    stride_r2t,
    HKV: tl.constexpr,
    BLOCK: tl.constexpr,
):
    h = tl.program_id(0)
    b = tl.program_id(1)
    row = tl.load(req_ptr + b).to(tl.int64)
    seq = tl.load(seq_lens_ptr + b).to(tl.int32)
    n_sel = tl.load(num_selected_ptr + row).to(tl.int32)
    tail = tl.load(tail_start_ptr + row).to(tl.int32)
    total = tl.where(seq > 0, n_sel + tl.maximum(seq - tail, 0), 0)
    dst = indices_ptr + tl.load(indptr_ptr + b * HKV + h).to(tl.int64)
    src = positions_ptr + row * stride_pos_row + h.to(tl.int64) * stride_pos_head
    for s in range(0, total, BLOCK):
        offs = s + tl.arange(0, BLOCK)
        valid = offs < total
        pos = tl.load(src + offs, mask=valid & (offs < n_sel), other=0)
        pos = tl.where(offs < n_sel, pos, tail + offs - n_sel)
        slot = tl.load(r2t_ptr + row * stride_r2t + pos, mask=valid, other=0)
        tl.store(dst + offs, slot * HKV + h, mask=valid)


class FlashInferDraft:
    """Draft attention with FlashInfer's decode wrapper (tensor-core path), one batch row per (request, KV head).

    Usage per draft step: ``plan`` once with host lengths, then per layer ``set_layer`` (index build) and ``run``.

    Args:
        max_entries: most index entries over all rows of a step.
        num_q_heads, num_kv_heads, head_dim, dtype: of this rank.
        workspace: uint8 device buffer (128 MiB) shared between instances that do not run concurrently.
    """

    def __init__(
        self,
        max_entries: int,
        num_q_heads: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device | str,
        workspace: torch.Tensor | None = None,
    ) -> None:
        from flashinfer import BatchDecodeWithPagedKVCacheWrapper

        if workspace is None:
            workspace = torch.zeros(128 << 20, dtype=torch.uint8, device=device)
        self.num_kv_heads = num_kv_heads
        self.group = num_q_heads // num_kv_heads
        self.head_dim = head_dim
        self.dtype = dtype
        self.indices = torch.zeros(max_entries, dtype=torch.int32, device=device)
        self.wrapper: Any = BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD", use_tensor_cores=True)
        self.indptr: torch.Tensor | None = None

    def plan(self, entries: list[int], scaling: float) -> None:
        """Bind the number of attended entries of each request (host integers); synchronises with the device."""
        counts = torch.tensor(entries, dtype=torch.int32).repeat_interleave(self.num_kv_heads)
        indptr = torch.zeros(counts.numel() + 1, dtype=torch.int32)
        indptr[1:] = counts.cumsum(0)
        total = int(indptr[-1])
        if total > self.indices.numel():
            raise ValueError(f"{total} index entries exceed the {self.indices.numel()} reserved")
        self.indptr = indptr.to(self.indices.device)
        self.wrapper.plan(
            indptr,
            self.indices[:total],
            torch.ones(counts.numel(), dtype=torch.int32),
            self.group,
            1,
            self.head_dim,
            1,
            q_data_type=self.dtype,
            kv_data_type=self.dtype,
            sm_scale=scaling,
        )

    def set_layer(
        self,
        positions: torch.Tensor,
        num_selected: torch.Tensor,
        tail_start: torch.Tensor,
        req_to_token: torch.Tensor,
        req_pool_indices: torch.Tensor,
        seq_lens: torch.Tensor,
    ) -> None:
        """Build one layer's page indices (slot * Hkv + head) on the device; arguments as in ``PillarKernels``."""
        _page_indices_kernel[(self.num_kv_heads, seq_lens.shape[0])](
            positions,
            num_selected,
            tail_start,
            req_to_token,
            req_pool_indices,
            seq_lens,
            self.indptr,
            self.indices,
            positions.stride(0),
            positions.stride(1),
            req_to_token.stride(0),
            HKV=self.num_kv_heads,
            BLOCK=512,
        )

    def run(self, q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, out: torch.Tensor) -> None:
        """q, out: [B, Hq, D]; k_cache, v_cache: contiguous [slots, Hkv, D]."""
        rows = q.shape[0] * self.num_kv_heads
        k = k_cache.view(-1, 1, 1, self.head_dim)
        v = v_cache.view(-1, 1, 1, self.head_dim)
        shape = (rows, self.group, self.head_dim)
        self.wrapper.run(q.view(shape), (k, v), out=out.view(shape))
