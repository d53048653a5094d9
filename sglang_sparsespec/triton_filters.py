"""Top-k and top-p as one threshold per row of logits, in Triton.

A token stays if fewer than top-k tokens are likelier, and if these have less than top-p of the row's mass: FlashInfer's
"joint" filter, which SGLang's sampler uses on CUDA.  Both conditions hold from some logit upwards, the row's floor, so
filtered probabilities need not be written: who knows the floors reads logits below them as -inf.

One program per row collects the logits near the largest (most of the vocabulary is far below it, and blocks without such a
logit are not read), and bisects among them in registers.  Where they are too many, or too light to hold top-p, it bisects
over the whole row: slower by the number of passes, and exact as well.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from sglang_sparsespec.triton_rows import LOG2E, block_logits, block_sums, block_weights, row_stride

#: Logits near the largest that are collected.
ROOM = 2048
#: How near, in temperatures: tokens beyond have e^-12 of the likeliest token's probability each.
REACH = tl.constexpr(12.0)


@triton.jit
def _key(value):
    """int32 that orders as the float32 ``value``; its own inverse, on bits."""
    bits = value.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _from_key(key):
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _middle(low, high):
    """Between two keys, whose sum may not fit."""
    return (low & high) + ((low ^ high) >> 1)


@triton.jit
def _floors_kernel(
    logits_ptr,
    stride,
    temperatures_ptr,
    top_ks_ptr,
    top_ps_ptr,
    maxima_ptr,
    sums_ptr,
    near_ptr,
    floors_ptr,
    vocab,
    REPEATS: tl.constexpr,
    BLOCKS: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
    ROOM: tl.constexpr,
):
    """Floor of one row."""
    row = tl.program_id(0)
    request = row // REPEATS
    top_k = tl.load(top_ks_ptr + request)
    top_p = tl.load(top_ps_ptr + request)
    # A greedy row takes its largest logit as it is.
    if (top_k == 1) | ((top_k >= vocab) & (top_p >= 1)):
        tl.store(floors_ptr + row, float("-inf"))
        return
    logits_row = logits_ptr + row.to(tl.int64) * stride
    temperature = tl.load(temperatures_ptr + request)
    scale = LOG2E / temperature
    offs = tl.arange(0, PADDED)
    largest = tl.max(tl.load(maxima_ptr + row * BLOCKS + offs, mask=offs < BLOCKS, other=float("-inf")), 0)
    weights, _lse = block_sums(maxima_ptr, sums_ptr, row + tl.arange(0, 1), scale, BLOCKS, PADDED)
    wanted = tl.where(top_p >= 1, float("inf"), top_p * tl.sum(tl.sum(weights, 1), 0))

    nearest = largest - REACH * temperature
    near_row = near_ptr + row.to(tl.int64) * ROOM
    count = 0
    mass = 0.0
    for block in range(BLOCKS):
        if tl.load(maxima_ptr + row * BLOCKS + block) >= nearest:
            logits = block_logits(logits_row, block, vocab, BLOCK)
            near = logits >= nearest
            place = count + tl.cumsum(near.to(tl.int32), 0) - 1
            tl.store(near_row + place, logits, mask=near & (place < ROOM))
            count += tl.sum(near.to(tl.int32), 0)
            mass += tl.sum(tl.where(near, block_weights(logits, largest, scale), 0.0), 0)
    # All threads' stores come before the loads below.
    tl.debug_barrier()

    # The floor is above ``low``, and ``high`` or below.
    high = _key(largest)
    if (count <= ROOM) & ((count >= top_k) | (mass >= wanted)):
        index = tl.arange(0, ROOM)
        collected = tl.load(near_row + index, mask=index < count, other=float("-inf"))
        keys = _key(collected)
        heavy = block_weights(collected, largest, scale)
        low = _key(nearest) - 1
        for _ in range(32):
            middle = _middle(low, high)
            likelier = keys > middle
            kept = (tl.sum(likelier.to(tl.int32), 0) < top_k) & (tl.sum(tl.where(likelier, heavy, 0.0), 0) < wanted)
            high = tl.where(kept, middle, high)
            low = tl.where(kept, low, middle)
    else:
        low = _key(tl.full([], float("-inf"), tl.float32))
        for _ in range(32):
            middle = _middle(low, high)
            above = 0
            above_mass = 0.0
            for block in range(BLOCKS):
                logits = block_logits(logits_row, block, vocab, BLOCK)
                likelier = _key(logits) > middle
                above += tl.sum(likelier.to(tl.int32), 0)
                above_mass += tl.sum(tl.where(likelier, block_weights(logits, largest, scale), 0.0), 0)
            kept = (above < top_k) & (above_mass < wanted)
            high = tl.where(kept, middle, high)
            low = tl.where(kept, low, middle)
    tl.store(floors_ptr + row, _from_key(high))


def floors(
    logits: torch.Tensor,
    temperatures: torch.Tensor,
    top_ks: torch.Tensor,
    top_ps: torch.Tensor,
    maxima: torch.Tensor,
    sums: torch.Tensor,
    block: int,
    room: int = ROOM,
) -> torch.Tensor:
    """Smallest logit that both filters keep, float32 [rows]; -inf where there is no filter, and for greedy rows.

    Args:
        logits: [rows, vocab], unit stride along the vocabulary.
        temperatures: float32 [requests, 1]; top_ks: int [requests], 1 for greedy; top_ps: float32 [requests]. A request
            has rows / requests adjacent rows.
        maxima, sums: ``triton_rows.row_sums`` of the same logits, in blocks of ``block``.
        room: a power of 2, logits that are collected.
    """
    rows, vocab = logits.shape
    blocks = maxima.shape[1]
    near = torch.empty((rows, room), dtype=torch.float32, device=logits.device)
    found = torch.empty(rows, dtype=torch.float32, device=logits.device)
    _floors_kernel[(rows,)](
        logits,
        row_stride(logits),
        temperatures,
        top_ks,
        top_ps,
        maxima,
        sums,
        near,
        found,
        vocab,
        REPEATS=rows // top_ks.shape[0],
        BLOCKS=blocks,
        PADDED=triton.next_power_of_2(blocks),
        BLOCK=block,
        ROOM=room,
        num_warps=8,
    )
    return found
