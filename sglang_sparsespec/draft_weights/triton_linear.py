"""A linear layer with FP8 weights and 16-bit activations, for the few rows of a draft step (Triton).

The time of such a product is that of reading the weights. The programs therefore keep W on its way: a tile of W^T, converted
in registers, is the left operand of the tensor cores' product, and the activations are the narrow right one. Activations
are not quantised, which costs neither a kernel nor acceptance.

Notation: M rows of activations, N output channels, K input channels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

#: Most rows of activations in one tile, and so in one product.
MAX_ROWS = 128


@dataclass(frozen=True)
class Tiles:
    """How a product is cut.

    Attributes:
        block_n, block_k: output and input channels of a tile of weights.
        splits: programs that share the input channels of a tile's outputs.
        num_warps, num_stages: of a program; stages are tiles of weights on their way.
    """

    block_n: int
    block_k: int
    splits: int
    num_warps: int
    num_stages: int


@triton.jit
def _linear_kernel(
    x_ptr,
    w_ptr,
    scale_ptr,
    bias_ptr,
    out_ptr,
    part_ptr,
    arrived_ptr,
    M,
    N,
    K,
    stride_x,
    stride_out,
    splits,
    HAS_BIAS: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """out [M, N] = x [M, K] @ (w [N, K] * scale [N]).T + bias [N]; see :func:`linear`.

    The last program to arrive at a tile of outputs adds up the parts in their order, so the result does not depend on
    who that is.
    """
    tile, split = tl.program_id(0), tl.program_id(1)
    offs_n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_m = tl.arange(0, BLOCK_M)
    offs_k = tl.arange(0, BLOCK_K)
    blocks = tl.cdiv(K, BLOCK_K)
    first, last = blocks * split // splits, blocks * (split + 1) // splits
    in_n = offs_n < N
    in_m = offs_m < M
    w_ptrs = w_ptr + offs_n.to(tl.int64)[:, None] * K + (first * BLOCK_K + offs_k)[None, :]
    x_ptrs = x_ptr + offs_m[None, :] * stride_x + (first * BLOCK_K + offs_k)[:, None]
    acc = tl.zeros([BLOCK_N, BLOCK_M], dtype=tl.float32)
    for block in tl.range(first, last, num_stages=NUM_STAGES):
        in_k = block * BLOCK_K + offs_k < K
        w = tl.load(w_ptrs, mask=in_n[:, None] & in_k[None, :], other=0.0)
        x = tl.load(x_ptrs, mask=in_m[None, :] & in_k[:, None], other=0.0)
        acc = tl.dot(w.to(x.dtype), x, acc)
        w_ptrs += BLOCK_K
        x_ptrs += BLOCK_K

    if SPLIT:
        num_tiles = tl.num_programs(0)
        place = tl.arange(0, BLOCK_N)[:, None] * BLOCK_M + offs_m[None, :]
        parts = part_ptr + tile * (BLOCK_N * BLOCK_M) + place
        stride_part = num_tiles * (BLOCK_N * BLOCK_M)
        tl.store(parts + split * stride_part, acc)
        tl.debug_barrier()
        before = tl.atomic_add(arrived_ptr + tile, 1, sem="acq_rel")
        if before != splits - 1:
            return
        tl.store(arrived_ptr + tile, 0)
        acc = tl.zeros([BLOCK_N, BLOCK_M], dtype=tl.float32)
        for i in range(splits):
            acc += tl.load(parts + i * stride_part)

    acc *= tl.load(scale_ptr + offs_n, mask=in_n, other=0.0)[:, None]
    if HAS_BIAS:
        acc += tl.load(bias_ptr + offs_n, mask=in_n, other=0.0).to(tl.float32)[:, None]
    out = out_ptr + offs_m.to(tl.int64)[None, :] * stride_out + offs_n[:, None]
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=in_n[:, None] & in_m[None, :])


def block_m(rows: int) -> int:
    """Rows of activations in a tile."""
    return max(16, triton.next_power_of_2(rows))


def scratch(channels: int, device: torch.device | str, splits: int, rows: int = MAX_ROWS) -> tuple[torch.Tensor, torch.Tensor]:
    """Partial sums (float32) and arrival counts (int32, zero between products) for products of up to ``channels`` outputs."""
    padded = triton.cdiv(channels, 128) * 128
    part = torch.empty(splits * padded * block_m(rows), dtype=torch.float32, device=device)
    return part, torch.zeros(triton.cdiv(channels, 16), dtype=torch.int32, device=device)


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    tiles: Tiles,
    part: torch.Tensor,
    arrived: torch.Tensor,
) -> torch.Tensor:
    """x @ (weight * scale).T + bias: [M, N], in x's type. Recordable.

    Args:
        x: 16-bit [M, K], M at most ``MAX_ROWS``, rows contiguous.
        weight: float8_e4m3fn [N, K], contiguous.
        scale: float32 [N].
        bias: [N] or None.
        part, arrived: see :func:`scratch`; products that share them run one after another.
    """
    rows, inputs = x.shape
    channels = weight.shape[0]
    out = torch.empty((rows, channels), dtype=x.dtype, device=x.device)
    grid = (triton.cdiv(channels, tiles.block_n), tiles.splits)
    _linear_kernel[grid](
        x,
        weight,
        scale,
        bias,
        out,
        part,
        arrived,
        rows,
        channels,
        inputs,
        x.stride(0),
        out.stride(0),
        tiles.splits,
        HAS_BIAS=bias is not None,
        SPLIT=tiles.splits > 1,
        BLOCK_M=block_m(rows),
        BLOCK_N=tiles.block_n,
        BLOCK_K=tiles.block_k,
        NUM_STAGES=tiles.num_stages,
        num_warps=tiles.num_warps,
    )
    return out
