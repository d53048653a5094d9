"""PillarAttn scores without attention, in Triton: two passes over K, none over V.

Prefill attention is run by one of SGLang's backends, which gives neither scores nor log-sum-exps.  The first pass takes
the log-sum-exps of the window's query rows, the second the mean of their softmax probabilities at every position before
the window.  Each also serves alone: the first where a verification has no hint of its log-sum-exps, the second where
another kernel has them.

As in :mod:`triton_verify` the W window queries times the g query heads of a KV head are packed into one tensor-core
tile of R = W*g rows.  The launch grid depends only on the batch size and on static maxima.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from sglang_sparsespec.attention_backend.kernels.interface import LayerKV
from sglang_sparsespec.attention_backend.kernels.triton_common import (
    LOG2E,
    capped,
    is_wide,
    kv_offsets,
    num_splits,
    query_stride,
    query_tile,
)


@triton.jit
def _window(seq_lens_ptr, extend_start_ptr, extend_len_ptr, b, W: tl.constexpr, PREFILL: tl.constexpr):
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
        length = tl.maximum(seq, 0)
    return length, first, nq


# A prefill batch has any size: specialised to it, or to the splits that follow from it, each size would compile a kernel
# of its own, while requests wait.
@triton.jit(do_not_specialize=["batch", "splits"])
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
    batch,
    splits,
    stride_q_tok,
    stride_k_slot,
    stride_k_head,
    stride_r2t,
    HKV: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    W: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MIN_CHUNK: tl.constexpr,
    STAGES: tl.constexpr,
    REACH: tl.constexpr,
    CAP2: tl.constexpr,
    PREFILL: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Per-split log2-sum-exp of every window row over its causal prefix."""
    h = tl.program_id(0)
    split = tl.program_id(1)
    b = tl.program_id(2)
    length, first, nq = _window(seq_lens_ptr, extend_start_ptr, extend_len_ptr, b, W, PREFILL)
    offs_m = tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, D)
    offs_n = tl.arange(0, BLOCK_N)
    win = offs_m // G
    head = h * G + offs_m % G
    part = part_lse_ptr + ((split * batch + b).to(tl.int64) * W + win) * (HKV * G) + head
    total = length + nq
    chunk = tl.maximum(tl.cdiv(tl.cdiv(total, splits), BLOCK_N) * BLOCK_N, MIN_CHUNK)
    start = split * chunk
    end = tl.minimum(start + chunk, total)
    if end <= start:
        tl.store(part, tl.full([BLOCK_M], float("-inf"), tl.float32), mask=win < W)
        return

    q_rows = q_ptr + (first + win) * stride_q_tok + head * D
    q = tl.load(q_rows[:, None] + offs_d[None, :], mask=(win < nq)[:, None], other=0.0)
    r2t_base = r2t_ptr + tl.load(req_ptr + b).to(tl.int64) * stride_r2t
    k_base = k_ptr + h.to(tl.int64) * stride_k_head
    # Exclusive causal bound per row; the split's end is folded in so that one compare masks both.
    bound = tl.minimum(length + win + 1, end)
    m_i = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l_i = tl.zeros([BLOCK_M], dtype=tl.float32)
    # Clamped positions instead of masks: a repeated row is read again and then masked out.
    slot = tl.load(r2t_base + tl.minimum(start + offs_n, end - 1))
    for s in tl.range(start, end, BLOCK_N, num_stages=STAGES):
        offs = s + offs_n
        k = tl.load(k_base + kv_offsets(slot, stride_k_slot, offs_d, WIDE)).to(q.dtype)
        slot = tl.load(r2t_base + tl.minimum(offs + BLOCK_N, end - 1))
        qk = capped(tl.dot(q, tl.trans(k), input_precision="ieee") * scale_log2, CAP2)
        qk = tl.where(offs[None, :] < bound[:, None], qk, float("-inf"))
        if REACH >= 0:
            qk = tl.where(offs[None, :] >= (length + win - REACH)[:, None], qk, float("-inf"))
        m_new = tl.maximum(m_i, tl.max(qk, 1))
        # A split may start inside the window, where early rows see nothing yet.
        m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)
        l_i = l_i * tl.exp2(m_i - m_safe) + tl.sum(tl.exp2(qk - m_safe[:, None]), 1)
        m_i = m_new
    tl.store(part, m_i + tl.log2(tl.where(l_i > 0, l_i, 1.0)), mask=win < W)


@triton.jit(do_not_specialize=["batch", "splits", "lse_splits"])
def _window_scores_kernel(
    q_ptr,
    k_ptr,
    r2t_ptr,
    req_ptr,
    seq_lens_ptr,
    extend_start_ptr,
    extend_len_ptr,
    part_lse_ptr,
    sinks_ptr,
    scores_ptr,
    scale_log2,
    batch,
    splits,
    lse_splits,
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
    MAX_LSE_SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MIN_CHUNK: tl.constexpr,
    STAGES: tl.constexpr,
    SINKS: tl.constexpr,
    CAP2: tl.constexpr,
    PREFILL: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Mean over the window rows of exp(s - LSE) for the positions before the window."""
    h = tl.program_id(0)
    split = tl.program_id(1)
    b = tl.program_id(2)
    length, first, nq = _window(seq_lens_ptr, extend_start_ptr, extend_len_ptr, b, W, PREFILL)
    chunk = tl.maximum(tl.cdiv(tl.cdiv(length, splits), BLOCK_N) * BLOCK_N, MIN_CHUNK)
    start = split * chunk
    end = tl.minimum(start + chunk, length)
    if end <= start:
        return
    offs_m = tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, D)
    offs_n = tl.arange(0, BLOCK_N)
    win = offs_m // G
    head = h * G + offs_m % G
    mask_m = win < nq
    # All splits are loaded at once: one memory round trip instead of a serial chain.
    offs_s = tl.arange(0, MAX_LSE_SPLITS)
    part = ((offs_s[None, :] * batch + b).to(tl.int64) * W + win[:, None]) * (HKV * G) + head[:, None]
    given = mask_m[:, None] & (offs_s < lse_splits)[None, :]
    parts = tl.load(part_lse_ptr + part, mask=given, other=float("-inf"))
    highest = tl.max(parts, 1)
    if SINKS:
        sinks2 = tl.load(sinks_ptr + head).to(tl.float32) * LOG2E
        highest = tl.maximum(highest, sinks2)
    # Rows of padding get an infinite log-sum-exp, so they add nothing.
    highest = tl.where(highest == float("-inf"), float("inf"), highest)
    sums = tl.sum(tl.exp2(parts - highest[:, None]), 1)
    if SINKS:
        sums += tl.exp2(sinks2 - highest)
    lse2 = tl.where(mask_m, highest + tl.log2(sums), float("inf"))

    q_rows = q_ptr + (first + win) * stride_q_tok + head * D
    q = tl.load(q_rows[:, None] + offs_d[None, :], mask=mask_m[:, None], other=0.0)
    r2t_base = r2t_ptr + tl.load(req_ptr + b).to(tl.int64) * stride_r2t
    k_base = k_ptr + h.to(tl.int64) * stride_k_head
    s_base = scores_ptr + b.to(tl.int64) * stride_s_b + h.to(tl.int64) * stride_s_h
    share = 1.0 / (nq * G).to(tl.float32)
    slot = tl.load(r2t_base + tl.minimum(start + offs_n, end - 1))
    for s in tl.range(start, end, BLOCK_N, num_stages=STAGES):
        offs = s + offs_n
        k = tl.load(k_base + kv_offsets(slot, stride_k_slot, offs_d, WIDE)).to(q.dtype)
        slot = tl.load(r2t_base + tl.minimum(offs + BLOCK_N, end - 1))
        qk = tl.dot(q, tl.trans(k), input_precision="ieee")
        p = tl.exp2(capped(qk * scale_log2, CAP2) - lse2[:, None])
        tl.store(s_base + offs, (tl.sum(p, 0) * share).to(scores_ptr.dtype.element_ty), mask=offs < end)


MAX_SPLITS = 64
#: Parts of a log-sum-exp that the second pass is compiled for.
MAX_LSE_SPLITS = (8, MAX_SPLITS)


@dataclass
class ScoresConfig:
    """Launch parameters of both passes.

    Attributes:
        block_n: positions per inner iteration.
        num_warps, stages: warps of a program, K tiles in its pipeline (``query_tile`` changes them for many rows).
        target: programs wanted per multiprocessor before a request is split.
        min_chunk: fewest positions per split.
    """

    block_n: int = 64
    num_warps: int = 4
    stages: int = 3
    target: float = 4.0
    min_chunk: int = 256


def scores_num_splits(pairs: int, max_len: int, num_sms: int, config: ScoresConfig) -> int:
    """Splits per (request, KV head); ``max_len``: of the longest request."""
    return num_splits(pairs, max_len, num_sms, config.target, config.min_chunk, MAX_SPLITS)


@dataclass(frozen=True)
class Windows:
    """The query windows of a batch.

    Attributes:
        rows: int [B], of ``req_to_token``.
        seq_lens: int [B]; of windows of a prompt all its tokens, else the tokens before the window.
        size: W.
        extend: int [B] each, the first query of each prompt's chunk in ``q`` and their number, the last W of which make
            its window; None: every request has W queries, one request after another.
    """

    rows: torch.Tensor
    seq_lens: torch.Tensor
    size: int
    extend: tuple[torch.Tensor, torch.Tensor] | None = None


def _arguments(
    q: torch.Tensor,
    kv: LayerKV,
    req_to_token: torch.Tensor,
    windows: Windows,
    part_lse: torch.Tensor,
    splits: int,
    config: ScoresConfig,
) -> dict[str, Any]:
    """What both passes take."""
    group = q.shape[1] // kv.k.shape[1]
    block_m, block_n, num_warps = query_tile(windows.size * group, config.block_n, config.num_warps)
    # Unused without windows of prompts.
    starts, extend_lens = windows.extend or (windows.seq_lens, windows.seq_lens)
    return {
        "q_ptr": q,
        "k_ptr": kv.k,
        "r2t_ptr": req_to_token,
        "req_ptr": windows.rows,
        "seq_lens_ptr": windows.seq_lens,
        "extend_start_ptr": starts,
        "extend_len_ptr": extend_lens,
        "part_lse_ptr": part_lse,
        "scale_log2": kv.scaling * LOG2E.value,
        "batch": windows.seq_lens.shape[0],
        "splits": splits,
        "stride_q_tok": query_stride(q),
        "stride_k_slot": kv.k.stride(0),
        "stride_k_head": kv.k.stride(1),
        "stride_r2t": req_to_token.stride(0),
        "HKV": kv.k.shape[1],
        "G": group,
        "D": q.shape[2],
        "W": windows.size,
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
        "MIN_CHUNK": config.min_chunk,
        "STAGES": config.stages,
        "CAP2": kv.soft_cap * LOG2E.value,
        "PREFILL": windows.extend is not None,
        "WIDE": is_wide(kv.k),
        "num_warps": num_warps,
    }


def window_lse(
    *,
    q: torch.Tensor,
    kv: LayerKV,
    req_to_token: torch.Tensor,
    windows: Windows,
    part_lse: torch.Tensor,
    splits: int,
    config: ScoresConfig,
    reach: int | None = None,
) -> torch.Tensor:
    """log2-sum-exp of every window query over its causal prefix, in parts, without sinks.

    Args:
        q: [tokens, Hq, D].
        part_lse: float32 scratch of at least splits * B * W * Hq elements.
        splits: programs per (request, KV head).
        reach: tokens before a query's own that it sees; None: all.

    Returns:
        The scratch as float32 [splits, B, W, Hq]; a part without positions is -inf.
    """
    batch = windows.seq_lens.shape[0]
    if batch > 0:
        grid = (kv.k.shape[1], splits, batch)
        arguments = _arguments(q, kv, req_to_token, windows, part_lse, splits, config)
        _window_lse_kernel[grid](REACH=-1 if reach is None else reach, **arguments)
    shape = (splits, batch, windows.size, q.shape[1])
    return part_lse[: splits * batch * windows.size * q.shape[1]].view(shape)


def window_scores(
    *,
    q: torch.Tensor,
    kv: LayerKV,
    req_to_token: torch.Tensor,
    windows: Windows,
    lse2: torch.Tensor,
    scores: torch.Tensor,
    splits: int,
    config: ScoresConfig,
) -> None:
    """Exact scores of the positions before each window from the log2-sum-exps of its queries.

    Args:
        q: [tokens, Hq, D].
        lse2: float32 [parts, B, W, Hq], contiguous.
        scores: [B, Hkv, >= max length].
        splits: programs per (request, KV head).
    """
    parts, batch = lse2.shape[:2]
    if batch == 0:
        return
    # One of few, since each compiles a kernel of its own.
    most = next(count for count in MAX_LSE_SPLITS if parts <= count)
    _window_scores_kernel[(kv.k.shape[1], splits, batch)](
        sinks_ptr=kv.sinks if kv.sinks is not None else lse2,
        SINKS=kv.sinks is not None,
        scores_ptr=scores,
        lse_splits=parts,
        stride_s_b=scores.stride(0),
        stride_s_h=scores.stride(1),
        MAX_LSE_SPLITS=most,
        **_arguments(q, kv, req_to_token, windows, lse2, splits, config),
    )
