"""What stands between the QKV product and the attention of a draft step, in one Triton kernel.

The norms of query and key heads, rotary embedding, and the K and V rows of the cache: SGLang has a kernel for each of them,
and a draft step of 36 layers would launch 108, which take longer to start than to run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from sglang_sparsespec.attention_backend.kernels.interface import LayerKV
from sglang_sparsespec.attention_backend.kernels.triton_common import (
    let_next_start,
    pdl_options,
    wait_for_previous,
)

#: With more programs, those of the next kernel would wait where these could run: measured on an H200.
MOST_EARLY_PROGRAMS = 32


@triton.jit
def _normed(low, high, weight_ptr, offs, eps, D: tl.constexpr):
    """RMS norm of rows given as halves [R, D/2]."""
    scale = tl.rsqrt((tl.sum(low * low, 1) + tl.sum(high * high, 1)) / D + eps)[:, None]
    weight_low = tl.load(weight_ptr + offs).to(tl.float32)[None, :]
    weight_high = tl.load(weight_ptr + D // 2 + offs).to(tl.float32)[None, :]
    return low * scale * weight_low, high * scale * weight_high


@triton.jit
def _inputs_kernel(
    qkv_ptr,
    positions_ptr,
    cos_sin_ptr,
    q_weight_ptr,
    k_weight_ptr,
    slots_ptr,
    k_ptr,
    v_ptr,
    eps,
    stride_k_slot,
    stride_v_slot,
    HKV: tl.constexpr,
    G: tl.constexpr,
    G_POW2: tl.constexpr,
    D: tl.constexpr,
    HAS_NORM: tl.constexpr,
    PDL: tl.constexpr,
):
    """One token and KV head: its G query heads in place, its K and V row."""
    let_next_start(PDL)
    h = tl.program_id(0)
    token = tl.program_id(1)
    H: tl.constexpr = D // 2
    offs = tl.arange(0, H)
    heads = tl.arange(0, G_POW2)
    is_head = (heads < G)[:, None]
    # What a step reads but its product before does not write is read before that product is waited for.
    position = tl.load(positions_ptr + token)
    slot = tl.load(slots_ptr + token).to(tl.int64)
    cos = tl.load(cos_sin_ptr + position * D + offs).to(tl.float32)[None, :]
    sin = tl.load(cos_sin_ptr + position * D + H + offs).to(tl.float32)[None, :]
    wait_for_previous(PDL)
    row = qkv_ptr + token.to(tl.int64) * ((G + 2) * HKV * D)

    q_at = row + (h * G + heads)[:, None] * D + offs[None, :]
    low = tl.load(q_at, mask=is_head, other=0.0).to(tl.float32)
    high = tl.load(q_at + H, mask=is_head, other=0.0).to(tl.float32)
    k_at = row + (G * HKV + h) * D + offs[None, :]
    k_low, k_high = tl.load(k_at).to(tl.float32), tl.load(k_at + H).to(tl.float32)
    v_at = row + ((G + 1) * HKV + h) * D + offs
    v_low, v_high = tl.load(v_at), tl.load(v_at + H)
    if HAS_NORM:
        low, high = _normed(low, high, q_weight_ptr, offs, eps, D)
        k_low, k_high = _normed(k_low, k_high, k_weight_ptr, offs, eps, D)
    dtype = qkv_ptr.dtype.element_ty
    tl.store(q_at, (low * cos - high * sin).to(dtype), mask=is_head)
    tl.store(q_at + H, (high * cos + low * sin).to(dtype), mask=is_head)
    k_to = k_ptr + slot * stride_k_slot + h * D + offs[None, :]
    tl.store(k_to, (k_low * cos - k_high * sin).to(k_ptr.dtype.element_ty))
    tl.store(k_to + H, (k_high * cos + k_low * sin).to(k_ptr.dtype.element_ty))
    v_to = v_ptr + slot * stride_v_slot + h * D + offs
    tl.store(v_to, v_low.to(v_ptr.dtype.element_ty))
    tl.store(v_to + H, v_high.to(v_ptr.dtype.element_ty))


def attention_inputs(
    *,
    qkv: torch.Tensor,
    positions: torch.Tensor,
    cos_sin: torch.Tensor,
    norms: tuple[torch.Tensor, torch.Tensor] | None,
    eps: float,
    kv: LayerKV,
    slots: torch.Tensor,
    pdl: bool,
) -> torch.Tensor:
    """Finish the queries of a QKV product, and write its keys and values into the cache. Recordable.

    Args:
        qkv: 16-bit [tokens, (Hq + 2 Hkv) * D], contiguous; its queries are overwritten.
        positions: int64 [tokens].
        cos_sin: float32 [positions, D], as ``RotaryEmbedding.cos_sin_cache``: cosines, then sines, for rotated halves.
        norms: [D] each, weights of the norms of query and key heads before rotation; None for a model without them.
        slots: int64 [tokens], rows of the cache.
        pdl: whether the device has programmatic dependent launch.

    Returns:
        [tokens, Hq, D], a view of ``qkv``.
    """
    tokens = qkv.shape[0]
    num_kv_heads, head_dim = kv.k.shape[1:]
    num_q_heads = qkv.shape[1] // head_dim - 2 * num_kv_heads
    group = num_q_heads // num_kv_heads
    q_weight, k_weight = norms if norms is not None else (qkv, qkv)
    pdl = pdl and tokens * num_kv_heads <= MOST_EARLY_PROGRAMS
    _inputs_kernel[(num_kv_heads, tokens)](
        qkv,
        positions,
        cos_sin,
        q_weight,
        k_weight,
        slots,
        kv.k,
        kv.v,
        eps,
        kv.k.stride(0),
        kv.v.stride(0),
        HKV=num_kv_heads,
        G=group,
        G_POW2=triton.next_power_of_2(group),
        D=head_dim,
        HAS_NORM=norms is not None,
        PDL=pdl,
        num_warps=2,
        **pdl_options(pdl),
    )
    return qkv[:, : num_q_heads * head_dim].unflatten(1, (num_q_heads, head_dim))
