"""What a draft step does between two products; the kernel quantises the next one's input (Triton).

A kernel of its own for the quantisation costs more than the bytes it moves, and a step of 36 layers would have 144 of them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from sglang_sparsespec.attention_backend.kernels.triton_common import let_next_start, pdl_options, wait_for_previous
from sglang_sparsespec.draft_weights.fp8 import LARGEST, Quantised

_LARGEST = tl.constexpr(LARGEST)


@triton.jit
def _store_quantised(y, q_ptr, scale_ptr, row, K, offs, mask):
    """Row ``row`` of a matrix [R, K] in FP8: values, and one scale."""
    # A row of zeros may have any scale.
    scale = tl.maximum(tl.max(tl.abs(y), axis=0) / _LARGEST, 1e-30)
    tl.store(scale_ptr + row, scale)
    q = tl.minimum(tl.maximum(y / scale, -_LARGEST), _LARGEST)
    tl.store(q_ptr + row * K + offs, q.to(q_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _norm_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    out_ptr,
    q_ptr,
    scale_ptr,
    K,
    eps,
    HAS_RESIDUAL: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """One row: residual += x; out = rms_norm(residual) * weight, in 16 bits and in FP8."""
    let_next_start(PDL)
    row = tl.program_id(0).to(tl.int64)
    offs = tl.arange(0, BLOCK)
    mask = offs < K
    weight = tl.load(weight_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    wait_for_previous(PDL)
    x = tl.load(x_ptr + row * K + offs, mask=mask, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        x += tl.load(residual_ptr + row * K + offs, mask=mask, other=0.0).to(tl.float32)
        tl.store(residual_ptr + row * K + offs, x.to(residual_ptr.dtype.element_ty), mask=mask)
    y = x * tl.rsqrt(tl.sum(x * x, axis=0) / K + eps) * weight
    tl.store(out_ptr + row * K + offs, y.to(out_ptr.dtype.element_ty), mask=mask)
    _store_quantised(y, q_ptr, scale_ptr, row, K, offs, mask)


@triton.jit
def _silu_kernel(x_ptr, out_ptr, q_ptr, scale_ptr, K, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """One row: out = silu(x[:K]) * x[K:], in 16 bits and in FP8."""
    let_next_start(PDL)
    row = tl.program_id(0).to(tl.int64)
    offs = tl.arange(0, BLOCK)
    mask = offs < K
    wait_for_previous(PDL)
    gate = tl.load(x_ptr + row * 2 * K + offs, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(x_ptr + row * 2 * K + K + offs, mask=mask, other=0.0).to(tl.float32)
    y = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out_ptr + row * K + offs, y.to(out_ptr.dtype.element_ty), mask=mask)
    _store_quantised(y, q_ptr, scale_ptr, row, K, offs, mask)


@triton.jit
def _quantise_kernel(x_ptr, q_ptr, scale_ptr, K, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """One row in FP8."""
    let_next_start(PDL)
    row = tl.program_id(0).to(tl.int64)
    offs = tl.arange(0, BLOCK)
    mask = offs < K
    wait_for_previous(PDL)
    x = tl.load(x_ptr + row * K + offs, mask=mask, other=0.0).to(tl.float32)
    _store_quantised(x, q_ptr, scale_ptr, row, K, offs, mask)


def _warps(block: int) -> int:
    return min(16, max(4, block // 512))


def add_norm(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float, pdl: bool
) -> tuple[torch.Tensor, Quantised]:
    """RMS norm of x + residual, as SGLang's ``RMSNorm`` has it, and the same in FP8. Recordable.

    Args:
        x: 16-bit [M, K], contiguous; with a residual it is overwritten with the result.
        residual: as x; overwritten with the sum.
        weight: [K].
        pdl: start while the kernel before still runs.
    """
    rows, width = x.shape
    out = torch.empty_like(x) if residual is None else x
    quantised = Quantised.empty(rows, width, x.device)
    block = triton.next_power_of_2(width)
    _norm_kernel[(rows,)](
        x,
        residual if residual is not None else x,
        weight,
        out,
        quantised.values,
        quantised.scales,
        width,
        eps,
        HAS_RESIDUAL=residual is not None,
        BLOCK=block,
        PDL=pdl,
        num_warps=_warps(block),
        **pdl_options(pdl),
    )
    return out, quantised


def silu_and_mul(x: torch.Tensor, pdl: bool) -> tuple[torch.Tensor, Quantised]:
    """silu(x[:, :K]) * x[:, K:], as SGLang's ``SiluAndMul`` has it, and the same in FP8: [M, K] of x [M, 2K]. Recordable.

    Args:
        x: 16-bit, contiguous.
        pdl: as for :func:`add_norm`.
    """
    rows, width = x.shape[0], x.shape[1] // 2
    out = torch.empty((rows, width), dtype=x.dtype, device=x.device)
    quantised = Quantised.empty(rows, width, x.device)
    block = triton.next_power_of_2(width)
    _silu_kernel[(rows,)](
        x,
        out,
        quantised.values,
        quantised.scales,
        width,
        BLOCK=block,
        PDL=pdl,
        num_warps=_warps(block),
        **pdl_options(pdl),
    )
    return out, quantised


def quantise(x: torch.Tensor, pdl: bool) -> Quantised:
    """x [M, K], 16-bit and contiguous, in FP8. Recordable.

    Args:
        pdl: as for :func:`add_norm`.
    """
    rows, width = x.shape
    quantised = Quantised.empty(rows, width, x.device)
    block = triton.next_power_of_2(width)
    _quantise_kernel[(rows,)](
        x, quantised.values, quantised.scales, width, BLOCK=block, PDL=pdl, num_warps=_warps(block), **pdl_options(pdl)
    )
    return quantised
