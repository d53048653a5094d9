"""Products of few tokens with FP8 weights, in Triton: they begin with their weights while the kernel before still runs.

A product of a small layer reads its weights in a few microseconds, and waits as long for the first of them. Here
programs ask for theirs into the L2 cache before they wait for their activations (programmatic dependent launch), and take
so few rows of the weight each that all multiprocessors have some.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from sglang_sparsespec.attention_backend.kernels.triton_common import let_next_start, pdl_options, wait_for_previous
from sglang_sparsespec.draft_weights.fp8 import Quantised

#: Tokens that one tile can hold.
MOST_TOKENS = 64
#: Bytes of each weight row that a program asks for ahead, a power of two, and bytes of a line of the cache.
AHEAD, LINE = 4096, 128


@dataclass(frozen=True)
class ProductConfig:
    """Launch parameters: output channels of a program, inputs of an iteration, tiles in the pipeline, warps."""

    block_n: int
    block_k: int
    stages: int
    num_warps: int


#: Each was the fastest for some shape and number of tokens on an H200.
CONFIGS = (ProductConfig(16, 256, 4, 2), ProductConfig(16, 512, 3, 4), ProductConfig(64, 128, 4, 4))


def configs_for(weight: Quantised, tokens: int) -> Iterator[ProductConfig]:
    """Those of :data:`CONFIGS` that can multiply ``weight`` with so many tokens."""
    channels, inputs = weight.values.shape
    for config in CONFIGS:
        if tokens <= MOST_TOKENS and channels % config.block_n == 0 and inputs % config.block_k == 0:
            yield config


# Specialised to what a number of tokens happens to divide, each captured batch could compile its own kernel.
@triton.jit(do_not_specialize=["M"])
def _product_kernel(
    x_ptr,
    x_scale_ptr,
    weight_ptr,
    weight_scale_ptr,
    bias_ptr,
    out_ptr,
    M,
    N,
    K,
    AHEAD: tl.constexpr,
    LINE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PDL: tl.constexpr,
):
    """All tokens, and BLOCK_N output channels."""
    offs_m, offs_k = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_K)
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    is_token = offs_m < M
    rows = weight_ptr + offs_n[:, None].to(tl.int64) * K
    # Nothing but the weights is read before the kernel before has ended.
    if PDL:
        ahead = tl.minimum(tl.arange(0, AHEAD // LINE) * LINE, K - LINE)
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.u32 $0, 0;",
            "=r,l",
            [(rows + ahead[None, :]).to(tl.int64)],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
    weight_scale = tl.load(weight_scale_ptr + offs_n)
    wait_for_previous(PDL)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        weight = tl.load(rows + k + offs_k[None, :])
        x = tl.load(x_ptr + offs_m[:, None] * K + k + offs_k[None, :], mask=is_token[:, None], other=0.0)
        acc = tl.dot(x, tl.trans(weight), acc)
    let_next_start(PDL)
    x_scale = tl.load(x_scale_ptr + offs_m, mask=is_token, other=0.0)
    out = acc * x_scale[:, None] * weight_scale[None, :]
    if HAS_BIAS:
        out += tl.load(bias_ptr + offs_n).to(tl.float32)[None, :]
    out_at = out_ptr + offs_m[:, None].to(tl.int64) * N + offs_n[None, :]
    tl.store(out_at, out.to(out_ptr.dtype.element_ty), mask=is_token[:, None])


def product(
    x: Quantised, weight: Quantised, dtype: torch.dtype, bias: torch.Tensor | None, config: ProductConfig, pdl: bool
) -> torch.Tensor:
    """x @ weight.T + bias in ``dtype``: [M, N] of x [M, K], M at most :data:`MOST_TOKENS`. Recordable.

    Args:
        config: one of :func:`configs_for`.
        pdl: start while the kernel before still runs.
    """
    tokens, inputs = x.values.shape
    channels = weight.values.shape[0]
    out = torch.empty((tokens, channels), dtype=dtype, device=x.values.device)
    _product_kernel[(channels // config.block_n,)](
        x.values,
        x.scales,
        weight.values,
        weight.scales,
        bias if bias is not None else weight.scales,
        out,
        tokens,
        channels,
        inputs,
        AHEAD=min(AHEAD, 1 << (inputs.bit_length() - 1)),
        LINE=LINE,
        BLOCK_M=max(16, triton.next_power_of_2(tokens)),
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        STAGES=config.stages,
        HAS_BIAS=bias is not None,
        PDL=pdl,
        num_warps=config.num_warps,
        **pdl_options(pdl),
    )
    return out
