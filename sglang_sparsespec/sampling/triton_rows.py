"""Passes over rows of logits, in Triton: what sampling from logits and its filters have in common.

A row is read in blocks, by several programs. Each yields its block's largest logit, and the block's sum of
exp((logit - largest) / T).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

#: Logits per program of the pass over a row.
BLOCK = 4096
LOG2E = tl.constexpr(1.4426950408889634)
#: Arguments that may be views of a round's plan. Their alignment differs from forward to forward, and must compile nothing
#: anew.
VIEWS_OF_DRAFTS = ("entries_ptr",)
VIEWS_OF_WINDOWS = ("slots_ptr", "num_drafted_ptr")


@triton.jit
def block_logits(logits, block, vocab, BLOCK: tl.constexpr):
    """Logits [BLOCK] of a row's block as float32, -inf past the vocabulary."""
    offs = block * BLOCK + tl.arange(0, BLOCK)
    return tl.load(logits + offs, mask=offs < vocab, other=float("-inf")).to(tl.float32)


@triton.jit
def above_floor(logits, floors_ptr, row):
    """``logits`` of row or rows ``row``, -inf below the floor; as they are without floors."""
    if floors_ptr is None:
        kept = logits
    else:
        kept = tl.where(logits >= tl.load(floors_ptr + row), logits, float("-inf"))
    return kept


@triton.jit
def filtered_logits(logits, floors_ptr, row, block, vocab, BLOCK: tl.constexpr):
    """:func:`block_logits` of row ``row``, -inf below its floor."""
    return above_floor(block_logits(logits, block, vocab, BLOCK), floors_ptr, row)


@triton.jit
def block_weights(logits, largest, scale):
    """exp((logit - largest) / T); 0 in a block without a possible token."""
    return tl.exp2((logits - tl.where(largest == float("-inf"), 0.0, largest)) * scale)


@triton.jit
def block_sums(maxima, sums, rows, scale, BLOCKS: tl.constexpr, PADDED: tl.constexpr):
    """Weights [R, PADDED] of the blocks of ``rows`` [R], and log2 of the rows' sums of exp(logit / T)."""
    column = tl.arange(0, PADDED)[None, :]
    offs = rows[:, None] * BLOCKS + column
    largest = tl.load(maxima + offs, mask=column < BLOCKS, other=float("-inf"))
    of_row = tl.max(largest, 1)
    weights = tl.load(sums + offs, mask=column < BLOCKS, other=0.0) * tl.exp2((largest - of_row[:, None]) * scale)
    return weights, of_row * scale + tl.log2(tl.sum(weights, 1))


@triton.jit(do_not_specialize_on_alignment=VIEWS_OF_DRAFTS)
def _sums_kernel(
    logits_ptr,
    stride,
    temperatures_ptr,
    top_ks_ptr,
    kept_ptr,
    entries_ptr,
    floors_ptr,
    maxima_ptr,
    sums_ptr,
    vocab,
    REPEATS: tl.constexpr,
    KEEP: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Largest logit and sum of weights of one block; with KEEP its logits are kept, rounded to the kept type."""
    row = tl.program_id(0) // BLOCKS
    block = tl.program_id(0) % BLOCKS
    greedy = tl.load(top_ks_ptr + row // REPEATS) == 1
    logits = filtered_logits(logits_ptr + row.to(tl.int64) * stride, floors_ptr, row, block, vocab, BLOCK)
    if KEEP:
        offs = block * BLOCK + tl.arange(0, BLOCK)
        kept = logits.to(kept_ptr.dtype.element_ty)
        entry = tl.load(entries_ptr + row).to(tl.int64)
        tl.store(kept_ptr + entry * vocab + offs, kept, mask=offs < vocab)
        # A draft's distribution is the one of the logits that acceptance will read.
        logits = tl.where(greedy, logits, kept.to(tl.float32))
    largest = tl.max(logits, 0)
    tl.store(maxima_ptr + row * BLOCKS + block, largest)
    if not greedy:
        scale = LOG2E / tl.load(temperatures_ptr + row // REPEATS)
        tl.store(sums_ptr + row * BLOCKS + block, tl.sum(block_weights(logits, largest, scale), 0))


def row_stride(logits: torch.Tensor) -> int:
    """Elements from one row of ``logits`` to the next.

    Raises:
        ValueError: the logits of a row are not adjacent.
    """
    if logits.stride(1) != 1:
        raise ValueError("logits must have unit stride along the vocabulary")
    return logits.stride(0)


def row_sums(
    logits: torch.Tensor,
    temperatures: torch.Tensor,
    top_ks: torch.Tensor,
    kept: torch.Tensor | None = None,
    entries: torch.Tensor | None = None,
    floors: torch.Tensor | None = None,
    block: int = BLOCK,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pass over ``logits`` [rows, vocab]: largest logits and sums of weights, float32 [rows, blocks] each.

    Args:
        temperatures: float32 [requests, 1]; top_ks: int [requests]; a request has rows / requests adjacent rows.
        kept: [entries, vocab] contiguous, receives a copy, rounded to its type; None: nothing is kept.
        entries: int64 [rows], which entry of ``kept`` each row goes to; given if ``kept`` is.
        floors: float32 [rows], logits below count (and are kept) as -inf.
    """
    rows, vocab = logits.shape
    blocks = triton.cdiv(vocab, block)
    # Two allocations: the second half of one is aligned or not, and Triton would compile for either.
    maxima = torch.empty((rows, blocks), dtype=torch.float32, device=logits.device)
    sums = torch.empty_like(maxima)
    _sums_kernel[(rows * blocks,)](
        logits,
        row_stride(logits),
        temperatures,
        top_ks,
        logits if kept is None else kept,
        entries,
        floors,
        maxima,
        sums,
        vocab,
        REPEATS=rows // top_ks.shape[0],
        KEEP=kept is not None,
        BLOCKS=blocks,
        BLOCK=block,
        num_warps=4,
    )
    return maxima, sums
