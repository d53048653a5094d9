"""Top-k, top-p and min-p as one threshold per row of logits, in Triton.

Each filter keeps the tokens from some logit upwards, so together they keep those from the highest of these logits upwards,
the row's floor. Filtered probabilities need not be written: who knows the floors reads logits below them as -inf.

- Top-k keeps a token if fewer than k tokens are likelier.
- Top-p keeps a token if the likelier ones have less than p of the mass: the row's mass, or, in a row with a min-p, the mass
  of the tokens that top-k keeps.
- Min-p keeps a token that has min-p of the likeliest token's probability: largest + T ln(min-p) is its floor.

These are the filters of SGLang's sampler on CUDA: FlashInfer's "joint" top-k and top-p in a batch without a min-p, else
``top_k_renorm_prob``, ``top_p_renorm_prob`` and ``min_p_sampling_from_probs`` in turn (``sglang.srt.layers.sampler``). Here
the row's own min-p decides, so that what a request samples from does not depend on its batch.

One program per row collects the logits near the largest (most of the vocabulary is far below it, and blocks without such a
logit are not read), and bisects among them in registers. Where they are too many, or too light to hold top-p, it bisects
over the whole row: slower by the number of passes, and exact as well.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from sglang_sparsespec.sampling.parameters import RowParameters
from sglang_sparsespec.sampling.triton_rows import LOG2E, block_logits, block_sums, block_weights, row_stride

#: Logits near the largest that are collected.
ROOM = 2048
#: How near, in temperatures.
REACH = tl.constexpr(12.0)
#: More than e^-12, the weight of the likeliest token beyond, by what rounding the logit of that reach may add.
BEYOND = tl.constexpr(6.3e-6)


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
def _collected_floor(keys, weights, low, high, top_k, wanted):
    """Key of the floor among collected logits: above ``low``, ``high`` or below.

    A token stays if fewer than ``top_k`` tokens are likelier, whose weights are less than ``wanted``.
    """
    for _ in range(32):
        middle = _middle(low, high)
        likelier = keys > middle
        kept = (tl.sum(likelier.to(tl.int32), 0) < top_k) & (tl.sum(tl.where(likelier, weights, 0.0), 0) < wanted)
        high = tl.where(kept, middle, high)
        low = tl.where(kept, low, middle)
    return high


@triton.jit
def _row_floor(logits_row, largest, scale, high, top_k, wanted, vocab, BLOCKS: tl.constexpr, BLOCK: tl.constexpr):
    """:func:`_collected_floor` of a whole row, read once for each bit."""
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
    return high


@triton.jit
def _row_mass(logits_row, largest, scale, floor, vocab, BLOCKS: tl.constexpr, BLOCK: tl.constexpr):
    """Weight of a row's logits from the key ``floor`` upwards."""
    mass = 0.0
    for block in range(BLOCKS):
        logits = block_logits(logits_row, block, vocab, BLOCK)
        mass += tl.sum(tl.where(_key(logits) >= floor, block_weights(logits, largest, scale), 0.0), 0)
    return mass


@triton.jit
def _floors_kernel(
    logits_ptr,
    stride,
    temperatures_ptr,
    top_ks_ptr,
    top_ps_ptr,
    min_ps_ptr,
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
    min_p = tl.load(min_ps_ptr + request)
    # A greedy row takes its largest logit as it is.
    if (top_k == 1) | ((top_k >= vocab) & (top_p >= 1) & (min_p <= 0)):
        tl.store(floors_ptr + row, float("-inf"))
        return
    temperature = tl.load(temperatures_ptr + request)
    offs = tl.arange(0, PADDED)
    largest = tl.max(tl.load(maxima_ptr + row * BLOCKS + offs, mask=offs < BLOCKS, other=float("-inf")), 0)
    # An approximate logarithm may not exclude the likeliest token.
    below = tl.minimum(tl.log(tl.where(min_p > 0, min_p, 1.0)), 0.0) * temperature
    lowest = tl.where(min_p > 0, largest + below, float("-inf"))
    if (top_k >= vocab) & (top_p >= 1):
        tl.store(floors_ptr + row, lowest)
        return

    logits_row = logits_ptr + row.to(tl.int64) * stride
    scale = LOG2E / temperature
    weights, _lse = block_sums(maxima_ptr, sums_ptr, row + tl.arange(0, 1), scale, BLOCKS, PADDED)
    total = tl.sum(tl.sum(weights, 1), 0)
    # Whether top-p looks at what top-k leaves. Otherwise nothing below min-p's floor matters.
    chained = (min_p > 0) & (top_k < vocab) & (top_p < 1)
    nearest = largest - REACH * temperature
    nearest = tl.where(chained, nearest, tl.maximum(nearest, lowest))
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

    has_top_k = count >= top_k
    # The most that the tokens of top-k can have, if some of them were not collected.
    most = tl.minimum(total, mass + tl.maximum(top_k - count, 0).to(tl.float32) * BEYOND)
    wanted = tl.where(top_p >= 1, float("inf"), top_p * tl.where(chained, most, total))
    high = _key(largest)
    floor = high
    found = (count <= ROOM) & (has_top_k | (mass >= wanted) | (lowest >= nearest))
    if found:
        index = tl.arange(0, ROOM)
        collected = tl.load(near_row + index, mask=index < count, other=float("-inf"))
        keys = _key(collected)
        heavy = block_weights(collected, largest, scale)
        low = _key(nearest) - 1
        # Chained, this is top-k's floor, or, if not all of its tokens were collected, top-p's for their least mass.
        least = tl.where(has_top_k, float("inf"), top_p * mass)
        floor = _collected_floor(keys, heavy, low, high, top_k, tl.where(chained, least, wanted))
        if chained:
            left = tl.sum(tl.where(keys >= floor, heavy, 0.0), 0)
            exact = _collected_floor(keys, heavy, low, high, top_k, tl.where(has_top_k, top_p * left, wanted))
            # The floor is known if it is the same for the least and for the most mass.
            found = has_top_k | (tl.maximum(_from_key(exact), lowest) == tl.maximum(_from_key(floor), lowest))
            floor = exact
    if not found:
        floor = _row_floor(
            logits_row, largest, scale, high, top_k, tl.where(chained, float("inf"), wanted), vocab, BLOCKS, BLOCK
        )
        if chained:
            left = _row_mass(logits_row, largest, scale, floor, vocab, BLOCKS, BLOCK)
            floor = _row_floor(logits_row, largest, scale, high, top_k, top_p * left, vocab, BLOCKS, BLOCK)
    tl.store(floors_ptr + row, tl.maximum(_from_key(floor), lowest))


def floors(
    logits: torch.Tensor,
    rows: RowParameters,
    maxima: torch.Tensor,
    sums: torch.Tensor,
    block: int,
    room: int = ROOM,
) -> torch.Tensor:
    """Smallest logit that all filters keep, float32 [rows]; -inf where there is no filter, and for greedy rows.

    Args:
        logits: [rows, vocab], unit stride along the vocabulary.
        rows: one entry per request, which has rows / requests adjacent rows; with filters.
        maxima, sums: ``triton_rows.row_sums`` of the same logits, in blocks of ``block``.
        room: a power of 2, logits that are collected.
    """
    count, vocab = logits.shape
    blocks = maxima.shape[1]
    near = torch.empty((count, room), dtype=torch.float32, device=logits.device)
    found = torch.empty(count, dtype=torch.float32, device=logits.device)
    _floors_kernel[(count,)](
        logits,
        row_stride(logits),
        rows.temperatures,
        rows.top_ks,
        rows.top_ps,
        rows.min_ps,
        maxima,
        sums,
        near,
        found,
        vocab,
        REPEATS=count // rows.top_ks.shape[0],
        BLOCKS=blocks,
        PADDED=triton.next_power_of_2(blocks),
        BLOCK=block,
        ROOM=room,
        num_warps=8,
    )
    return found
