"""Draft attention by FlashInfer over the per-head page tables; everything else is :class:`triton_kernels.TritonKernels`.

FlashInfer's paged decoding has one index list per batch row. Lists of a KV head's own fit without a new kernel: a cache
[slots, Hkv, D] is a cache of slots * Hkv pages that hold one token of one head, and each (request, KV head) is a batch row
of Hq / Hkv query heads and one KV head. A draft step takes

1. once per forward, a kernel that counts the entries of every row (``indptr``; the counts are the same in all layers);
2. per layer, a kernel that writes the lists (page ids slot * Hkv + head) and gathers the queries;
3. per layer, FlashInfer's ``BatchDecodeWithPagedKVCacheWrapper``;
4. per layer, a kernel that hands over its result.

Lengths are known on the device alone. FlashInfer (0.6.15, ``PrefillPlan`` in ``attention/scheduler.cuh``, and
``BatchPrefillWithPagedKVCacheDevice`` in ``attention/prefill.cuh``) plans on the host which program takes which chunk of
which row, but reads every row's length from the device's ``indptr``. A plan for lists of the greatest length therefore
serves shorter ones: chunk bounds are clamped to the length, and a program without entries contributes zeros with the weight
exp2(-5e4). The wrappers are not in FlashInfer's CUDA graph mode: without split rows, that mode launches programs beyond the
planned ones, and they read row numbers that nobody wrote. A plain plan launches exactly the planned programs, which a graph
can record.

Wrappers are planned in the constructor, one for each power of two up to the largest batch. A batch takes the next larger
one, whose rows past the batch's end are empty.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from sglang_sparsespec.attention_backend.kernels.interface import DraftAttention, KernelShape, LayerKV
from sglang_sparsespec.attention_backend.kernels.triton_common import LN2, query_stride
from sglang_sparsespec.attention_backend.kernels.triton_draft import raw_positions, slots_of
from sglang_sparsespec.attention_backend.kernels.triton_kernels import TritonKernels
from sglang_sparsespec.attention_backend.page_table import SelectionTable

#: Entries that one program writes.
LIST_BLOCK = 512
#: FlashInfer's tile of list entries is at least as long.
MIN_SPLIT = 128
#: Programs of FlashInfer's kernel that fit a multiprocessor.
PROGRAMS_PER_SM = 2
REMEDY = "use --sparsespec-kernels triton"


@triton.jit(do_not_specialize=["batch", "longest"])
def _row_offsets_kernel(
    num_selected_ptr,
    tail_start_ptr,
    req_ptr,
    seq_lens_ptr,
    indptr_ptr,
    batch,
    longest,
    cap,
    HKV: tl.constexpr,
    BUCKET: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``indptr`` of BUCKET * HKV rows: those of a request are equally long, and those from ``batch`` on are empty."""
    b = tl.arange(0, BLOCK)
    live = b < batch
    row = tl.load(req_ptr + b, mask=live, other=0).to(tl.int64)
    seq = tl.load(seq_lens_ptr + b, mask=live, other=0).to(tl.int32)
    n_sel = tl.minimum(tl.load(num_selected_ptr + row, mask=live, other=0).to(tl.int32), cap)
    tail = tl.load(tail_start_ptr + row, mask=live, other=0).to(tl.int32)
    count = tl.where(seq > 0, n_sel + tl.maximum(seq - tail, 0), 0)
    # A stale row must never overrun the lists.
    count = tl.minimum(count, longest)
    begin = (tl.cumsum(count, 0) - count) * HKV
    for h in tl.static_range(HKV):
        tl.store(indptr_ptr + b * HKV + h, begin + h * count, mask=b < BUCKET)
    tl.store(indptr_ptr + BUCKET * HKV, tl.sum(count, 0) * HKV)


@triton.jit
def _lists_kernel(
    positions_ptr,
    num_selected_ptr,
    tail_start_ptr,
    r2t_ptr,
    req_ptr,
    seq_lens_ptr,
    indptr_ptr,
    indices_ptr,
    q_ptr,
    gathered_ptr,
    cap,
    stride_pos_row,
    stride_pos_head,
    stride_r2t,
    stride_q_tok,
    HKV: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    """Write a block of a row's page ids; the programs of the first blocks gather the row's queries too."""
    h = tl.program_id(0)
    block = tl.program_id(1)
    b = tl.program_id(2)
    place = b * HKV + h
    if block == 0:
        g = tl.arange(0, BLOCK_G)[:, None]
        d = tl.arange(0, D)[None, :]
        q = tl.load(q_ptr + b.to(tl.int64) * stride_q_tok + (h * G + g) * D + d, mask=g < G)
        tl.store(gathered_ptr + (place.to(tl.int64) * G + g) * D + d, q, mask=g < G)
    begin = tl.load(indptr_ptr + place)
    count = tl.load(indptr_ptr + place + 1) - begin
    index = block * BLOCK + tl.arange(0, BLOCK)
    if block * BLOCK < count:
        row = tl.load(req_ptr + b).to(tl.int64)
        last = tl.maximum(tl.load(seq_lens_ptr + b).to(tl.int32) - 1, 0)
        n_sel = tl.minimum(tl.load(num_selected_ptr + row).to(tl.int32), cap)
        tail = tl.load(tail_start_ptr + row).to(tl.int32)
        raw = raw_positions(positions_ptr + row * stride_pos_row + h.to(tl.int64) * stride_pos_head, index, cap)
        slot = slots_of(raw, index, n_sel, tail, last, r2t_ptr + row * stride_r2t)
        tl.store(indices_ptr + begin + index, slot * HKV + h, mask=index < count)


@triton.jit
def _hand_over_kernel(
    result_ptr,
    lse2_ptr,
    indptr_ptr,
    out_ptr,
    lse_ptr,
    LN2: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    BLOCK_G: tl.constexpr,
    HAS_LSE: tl.constexpr,
):
    """Copy a row's outputs, and its log-sum-exps to base e; an empty row gets zeros."""
    place = tl.program_id(0)
    empty = tl.load(indptr_ptr + place + 1) == tl.load(indptr_ptr + place)
    g = tl.arange(0, BLOCK_G)
    head = place.to(tl.int64) * G + g
    offs = head[:, None] * D + tl.arange(0, D)[None, :]
    result = tl.load(result_ptr + offs, mask=(g < G)[:, None])
    tl.store(out_ptr + offs, tl.where(empty, 0.0, result).to(out_ptr.dtype.element_ty), mask=(g < G)[:, None])
    if HAS_LSE:
        lse2 = tl.load(lse2_ptr + head, mask=g < G)
        tl.store(lse_ptr + head, tl.where(empty, 0.0, lse2 * LN2), mask=g < G)


@dataclass(frozen=True)
class _Bucket:
    """A planned wrapper and the device memory that it reads and writes.

    Attributes:
        size: requests.
        indptr: int32 [size * Hkv + 1].
        indices: int32, the lists of all rows.
        q, result: [size * Hkv, Hq / Hkv, D].
        lse2: float32 [size * Hkv, Hq / Hkv], to base 2.
    """

    size: int
    wrapper: Any
    indptr: torch.Tensor
    indices: torch.Tensor
    q: torch.Tensor
    result: torch.Tensor
    lse2: torch.Tensor


@dataclass(frozen=True)
class FlashInferDraft:
    """See :class:`interface.DraftAttention`."""

    kernels: FlashInferKernels
    bucket: _Bucket
    rows: torch.Tensor
    seq_lens: torch.Tensor

    def run(self, q: torch.Tensor, kv: LayerKV, out: torch.Tensor, lse: torch.Tensor | None = None) -> None:
        batch = self.rows.shape[0]
        if batch == 0:
            return
        self.kernels.write_lists(self, q, kv)
        self.kernels.attend(self.bucket, kv, with_lse=lse is not None)
        bucket, shape = self.bucket, self.kernels.shape
        _hand_over_kernel[(batch * shape.num_kv_heads,)](
            result_ptr=bucket.result,
            lse2_ptr=bucket.lse2,
            indptr_ptr=bucket.indptr,
            out_ptr=out,
            lse_ptr=lse if lse is not None else bucket.lse2,
            LN2=LN2.value,
            G=shape.group,
            D=shape.head_dim,
            BLOCK_G=triton.next_power_of_2(shape.group),
            HAS_LSE=lse is not None,
        )


class FlashInferKernels(TritonKernels):
    """See the module's docstring. Args as for :class:`TritonKernels`.

    KV caches must be contiguous. FP8 caches are read as what they hold; the descale of K is part of ``LayerKV.scaling``.

    Raises:
        ValueError: a shape, a type or a device that FlashInfer's decoding does not have.
    """

    name = "flashinfer"

    def __init__(self, shape: KernelShape, table: SelectionTable, req_to_token: torch.Tensor, **launch: Any) -> None:
        _refuse_unsupported(shape, req_to_token.device)
        super().__init__(shape, table, req_to_token, **launch)
        self._float_workspace = torch.zeros(16, dtype=torch.uint8, device=self.device)
        self._buffer_bytes = 0
        self.buckets: dict[int, _Bucket] = {}
        self._make_buckets(shape.max_batch)

    def plan_draft(self, rows: torch.Tensor, seq_lens: torch.Tensor) -> DraftAttention:
        """See :meth:`interface.PillarKernels.plan_draft`."""
        batch = rows.shape[0]
        self._fit(batch)
        size = triton.next_power_of_2(max(batch, 1))
        if size not in self.buckets:
            self._refuse_to_capture(batch)
            self._make_buckets(batch)
        bucket, table = self.buckets[size], self.table
        _row_offsets_kernel[(1,)](
            num_selected_ptr=table.num_selected,
            tail_start_ptr=table.tail_start,
            req_ptr=rows,
            seq_lens_ptr=seq_lens,
            indptr_ptr=bucket.indptr,
            batch=batch,
            longest=self.shape.longest_list,
            cap=table.positions.shape[3],
            HKV=self.shape.num_kv_heads,
            BUCKET=size,
            BLOCK=max(16, size),
        )
        return FlashInferDraft(self, bucket, rows, seq_lens)

    def write_lists(self, plan: FlashInferDraft, q: torch.Tensor, kv: LayerKV) -> None:
        """Write one layer's lists and gather its queries (q: [B, Hq, D])."""
        shape, table, bucket = self.shape, self.table, plan.bucket
        positions = table.positions[kv.index]
        blocks = triton.cdiv(shape.longest_list, LIST_BLOCK)
        _lists_kernel[(shape.num_kv_heads, blocks, plan.rows.shape[0])](
            positions_ptr=positions,
            num_selected_ptr=table.num_selected,
            tail_start_ptr=table.tail_start,
            r2t_ptr=self.req_to_token,
            req_ptr=plan.rows,
            seq_lens_ptr=plan.seq_lens,
            indptr_ptr=bucket.indptr,
            indices_ptr=bucket.indices,
            q_ptr=q,
            gathered_ptr=bucket.q,
            cap=positions.shape[2],
            stride_pos_row=positions.stride(0),
            stride_pos_head=positions.stride(1),
            stride_r2t=self.req_to_token.stride(0),
            stride_q_tok=query_stride(q),
            HKV=shape.num_kv_heads,
            G=shape.group,
            D=shape.head_dim,
            BLOCK=LIST_BLOCK,
            BLOCK_G=triton.next_power_of_2(shape.group),
        )

    def attend(self, bucket: _Bucket, kv: LayerKV, with_lse: bool) -> None:
        """Run FlashInfer over the lists of ``bucket``.

        Raises:
            ValueError: caches that are not contiguous, or too large for page ids of 32 bits; attention sinks, or a soft cap.
        """
        if kv.sinks is not None or kv.soft_cap:
            raise ValueError(f"FlashInfer draft attention has neither sinks nor soft caps here; {REMEDY}.")
        if not (kv.k.is_contiguous() and kv.v.is_contiguous()):
            raise ValueError(f"FlashInfer draft attention needs contiguous KV caches; {REMEDY}.")
        if kv.k.shape[0] * kv.k.shape[1] >= 2**31:
            raise ValueError(f"{kv.k.shape[0]} slots of {kv.k.shape[1]} KV heads exceed 32-bit page ids; {REMEDY}.")
        pages = (-1, 1, 1, self.shape.head_dim)
        # K's factor is the softmax scale: it may differ between layers, which share a plan.
        bucket.wrapper.run(
            bucket.q,
            (kv.k.view(pages), kv.v.view(pages)),
            k_scale=kv.scaling,
            out=bucket.result,
            lse=bucket.lse2 if with_lse else None,
            return_lse=with_lse,
        )

    def scratch_bytes(self) -> int:
        """Device memory held by the scratch buffers, the lists and the plans; without FlashInfer's partial results."""
        return super().scratch_bytes() + self._buffer_bytes

    def _split_size(self, bucket_size: int) -> int | None:
        """List entries per program, None for whole lists: rows are split if they are fewer than the programs that fit."""
        rows = bucket_size * self.shape.num_kv_heads
        programs = PROGRAMS_PER_SM * self.num_sms // rows
        if programs < 2:
            return None
        size = triton.cdiv(triton.cdiv(self.shape.longest_list, programs), MIN_SPLIT) * MIN_SPLIT
        return size if size < self.shape.longest_list else None

    def _make_buckets(self, max_batch: int) -> None:
        """Plan wrappers for batches up to ``max_batch``, those that are missing.

        All share one set of buffers, since they run one after another: FlashInfer's partial results, and lists of 4 bytes
        an entry. Each has a plan of its own, some 20 bytes per (request, KV head) instead of FlashInfer's usual 8 MB.

        Raises:
            ValueError: the lists would have 2**31 entries or more.
        """
        shape = self.shape
        largest = triton.next_power_of_2(max(max_batch, 1))
        num_rows = largest * shape.num_kv_heads
        if num_rows * shape.longest_list >= 2**31:
            raise ValueError(
                f"Lists of {shape.longest_list} tokens for {largest} requests and {shape.num_kv_heads} KV heads exceed "
                f"FlashInfer's 32-bit offsets; {REMEDY}."
            )
        with torch.device(self.device):
            # Planned for the longest lists; `plan` keeps the tensor, which `plan_draft` then writes.
            indptr = torch.arange(num_rows + 1, dtype=torch.int32) * shape.longest_list
            indices = torch.zeros(num_rows * shape.longest_list, dtype=torch.int32)
            one_token = torch.ones(num_rows, dtype=torch.int32)
            q = torch.zeros((num_rows, shape.group, shape.head_dim), dtype=shape.dtype)
            result = torch.zeros_like(q)
            lse2 = torch.zeros((num_rows, shape.group), dtype=torch.float32)
        self._buffer_bytes += sum(buffer.nbytes for buffer in (indptr, indices, one_token, q, result, lse2))
        plans: list[tuple[int, Any, dict[str, Any], int]] = []
        size = 1
        while size <= largest:
            if size not in self.buckets:
                wrapper = _new_wrapper(self._float_workspace)
                rows, split_size = size * shape.num_kv_heads, self._split_size(size)
                arguments = {
                    "indptr": indptr[: rows + 1],
                    "indices": indices,
                    "last_page_len": one_token[:rows],
                    "num_qo_heads": shape.group,
                    "num_kv_heads": 1,
                    "head_dim": shape.head_dim,
                    "page_size": 1,
                    "q_data_type": shape.dtype,
                    "kv_data_type": shape.kv_dtype,
                    "sm_scale": 1.0,
                    "fixed_split_size": split_size,
                    "disable_split_kv": split_size is None,
                }
                float_bytes, int_bytes = wrapper.workspace_size(**arguments)
                if float_bytes > self._float_workspace.numel():
                    self._float_workspace = torch.zeros(float_bytes, dtype=torch.uint8, device=self.device)
                plans.append((size, wrapper, arguments, int_bytes))
            size *= 2
        for size, wrapper, arguments, int_bytes in plans:
            plan_memory = torch.empty(int_bytes, dtype=torch.uint8, device=self.device)
            self._buffer_bytes += int_bytes
            wrapper.reset_workspace_buffer(self._float_workspace, plan_memory)
            wrapper.plan(**arguments)
            rows = size * shape.num_kv_heads
            self.buckets[size] = _Bucket(
                size, wrapper, arguments["indptr"], indices, q[:rows], result[:rows], lse2[:rows]
            )
        indptr.zero_()
        # What FlashInfer makes on its first run may not belong to a CUDA graph.
        cache = torch.zeros((1, shape.num_kv_heads, shape.head_dim), device=self.device).to(shape.kv_dtype)
        for with_lse in (False, True):
            self.attend(self.buckets[largest], LayerKV(cache, cache, 1.0, 0), with_lse)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # the plans were uploaded on this stream, and others will run them


def _refuse_unsupported(shape: KernelShape, device: torch.device) -> None:
    """Raise ``ValueError`` with the remedy for what FlashInfer's decoding does not have."""
    if device.type != "cuda":
        raise ValueError(
            f"--sparsespec-kernels flashinfer needs a CUDA GPU, not {device.type}; use --sparsespec-kernels auto."
        )
    if shape.dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(f"FlashInfer draft attention needs bfloat16 or float16 queries, not {shape.dtype}; {REMEDY}.")
    if shape.kv_dtype not in (shape.dtype, torch.float8_e4m3fn, torch.float8_e5m2):
        raise ValueError(f"FlashInfer draft attention cannot read KV caches of {shape.kv_dtype}; {REMEDY}.")


def _new_wrapper(float_workspace: torch.Tensor) -> Any:
    """FlashInfer's decode wrapper on its tensor-core path.

    Raises:
        ValueError: FlashInfer is not installed.
    """
    try:
        from flashinfer import BatchDecodeWithPagedKVCacheWrapper
    except ImportError as error:
        raise ValueError(f"FlashInfer cannot be imported ({error}); {REMEDY}.") from error
    return BatchDecodeWithPagedKVCacheWrapper(float_workspace, "NHD", use_tensor_cores=True, backend="fa2")
