"""Ragged per-head top-k selection with ascending output, in Triton.

One program per (request, KV head).  Scores are read as integers that sort like the floats, and the n-th largest of them
is searched among keys held in registers: each step counts the keys that reach two thresholds, which leaves a third of
the range.  A row too long for the registers is first reduced to candidates: a sample of it suggests a threshold that n
to BLOCK keys reach, one pass over the row counts them (further passes correct a bad suggestion), and another writes
their positions to a buffer.

With a memory, the positions that are selected already are first scored higher in place, by what they were selected by, and
the scores of the new ones are written beside them in the end.

Positions come out ascending without a sort: a prefix sum gives every chosen position its place.  Ties at the threshold
go to the lowest positions.  All lengths and counts are read on the device (CUDA-graph capturable).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from sglang_sparsespec.attention_backend.kernels.triton_common import let_next_start, pdl_options, wait_for_previous

# Keys of a long row that suggest its first threshold.  Some 80 of them should reach it, so that it is 10% off.
SAMPLE = 1024
# The largest block that fits a multiprocessor's registers well.
MAX_BLOCK = 16384
# Entries of a list that are read at once.
LIST = 512
SCORE_TYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}
# Adjacent scores of a thread.
COLUMNS = tl.constexpr(8)
# A word flags COLUMNS positions in its low bits and has their number above.
COUNT = tl.constexpr(1 << 8)


@triton.jit
def _block_offsets(BLOCK: tl.constexpr):
    """0 to BLOCK - 1 as [BLOCK / COLUMNS, COLUMNS]: a thread has whole rows, so scans take few steps between threads."""
    return tl.arange(0, BLOCK // COLUMNS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]


@triton.jit
def _sortable(bits):
    """Keys (int32) ordered like the floats whose ``bits`` (int16 or int32) these are; -1 gives the lowest key."""
    low: tl.constexpr = 0x7FFF if bits.dtype == tl.int16 else 0x7FFFFFFF
    # Any shift that leaves only signs will do; by 16 it is not taken for a comparison, which costs more.
    shift: tl.constexpr = 16 if bits.dtype == tl.int16 else 31
    bits = bits.to(tl.int32)
    return bits ^ ((bits >> shift) & low)


@triton.jit
def _load_block(src, start, length, BLOCK: tl.constexpr, VEC: tl.constexpr):
    """Keys [BLOCK / COLUMNS, COLUMNS] of the positions from ``start`` on, the lowest key from ``length`` on."""
    offs = start + _block_offsets(BLOCK)
    if start + BLOCK <= length:
        bits = tl.load(src + offs)
    else:
        # To the end of the last group of VEC, which lies in the row: where the mask may end inside a vector, Triton
        # loads one score at a time.
        bits = tl.load(src + offs, mask=offs < (length + VEC - 1) // VEC * VEC, other=-1)
        bits = tl.where(offs < length, bits, -1)
    return _sortable(bits)


@triton.jit
def _reached(keys, t1, t2):
    """1 for each key that is at least ``t1``, and 2**16 more if it is at least ``t2`` >= t1."""
    return tl.where(keys >= t2, 0x10001, (keys >= t1).to(tl.int32))


@triton.jit
def _thirds(lo, hi):
    """Two thresholds between lo and hi, the same if there is but one."""
    third = (hi - lo + 2) // 3
    return lo + third, hi - third


@triton.jit
def _search(
    keys,
    src,
    length,
    n,
    enough,
    t1,
    t2,
    lo,
    lo_count,
    hi,
    hi_count,
    STREAM: tl.constexpr,
    BLOCK: tl.constexpr,
    VEC: tl.constexpr,
):
    """Narrow the bracket [lo, hi) of the n-th largest key until at most ``enough`` keys reach lo; the first tries: t1, t2.

    lo_count >= n keys reach lo and hi_count < n reach hi; the result is these four.  Ends with hi = lo + 1, lo being the
    n-th largest key, at the latest.  The keys are those in registers, or with STREAM those of the row.
    """
    while (lo_count > enough) & (hi - lo > 1):
        # A step takes as long as one reduction, which two counts of 15 bits share.
        if STREAM:
            rows = tl.zeros([BLOCK // COLUMNS], dtype=tl.int32)
            for s in range(0, length, BLOCK):
                block = _load_block(src, s, length, BLOCK, VEC)
                rows += tl.sum(_reached(block, t1.to(tl.int32), t2.to(tl.int32)), 1)
            count1 = tl.sum(rows & 0xFFFF, 0)
            count2 = tl.sum(rows >> 16, 0)
        else:
            both = tl.sum(_reached(keys, t1.to(tl.int32), t2.to(tl.int32)))
            count1 = both & 0xFFFF
            count2 = both >> 16
        if count2 >= n:
            lo = t2
            lo_count = count2
        else:
            hi = t2
            hi_count = count2
            if count1 >= n:
                lo = t1
                lo_count = count1
            else:
                hi = t1
                hi_count = count1
        t1, t2 = _thirds(lo, hi)
    return lo, lo_count, hi, hi_count


@triton.jit
def _key_range(keys, valid, SPAN: tl.constexpr):
    """Bounds [lo, hi) of the ``valid`` keys, in a type that holds them; the others are the lowest key."""
    return tl.min(tl.where(valid, keys, 0x7FFFFFFF)).to(SPAN), tl.max(keys).to(SPAN) + 1


@triton.jit
def _pack(flags):
    """Words (see COUNT) of the rows of ``flags`` [rows, COLUMNS]; bit c is for column c."""
    column = tl.arange(0, COLUMNS)[None, :]
    return tl.sum(tl.where(flags, (1 << column) + COUNT, 0), 1)


@triton.jit
def _late_ties(keys, t, wanted):
    """Which keys that equal ``t`` come after the first ``wanted`` of them, as words; how many equal it."""
    equal = (keys == t).to(tl.int32)
    counts = tl.sum(equal, 1)
    up_to = (tl.cumsum(counts, 0) - counts)[:, None] + tl.cumsum(equal, 1)
    return _pack((equal != 0) & (up_to > wanted)), tl.sum(counts, 0)


@triton.jit
def _write(dst, taken, words, start, candidates, BLOCK: tl.constexpr, GATHER: tl.constexpr):
    """Write the positions that ``words`` flag from dst + taken on; ``taken`` plus their number.

    start: the block's first position, with GATHER its first entry of ``candidates``.
    """
    counts = words >> COLUMNS
    place = dst + taken + tl.cumsum(counts, 0) - counts
    first = start + tl.arange(0, BLOCK // COLUMNS) * COLUMNS
    left = words & (COUNT - 1)
    # Few are taken, so most rows are done after one or two steps.
    for step in range(tl.max(counts, 0)):
        bit = left & -left
        # The exponent of the float is the column.
        position = first + (bit.to(tl.float32).to(tl.int32, bitcast=True) >> 23) - 127
        if GATHER:
            position = tl.load(candidates + position, mask=left != 0)
        tl.store(place + step, position, mask=left != 0)
        left -= bit
    return taken + tl.sum(counts, 0)


@triton.jit
def _find_candidates(
    src,
    dst,
    candidates,
    length,
    n,
    lowest,
    BLOCK: tl.constexpr,
    SAMPLE: tl.constexpr,
    VEC: tl.constexpr,
):
    """Bracket (lo, lo_count, hi, hi_count) of a long row's n-th largest key, see :func:`_search`.

    The lo_count <= BLOCK positions whose keys reach lo are written to ``candidates``.  Where that many cannot be (ties,
    or n > BLOCK), lo_count > BLOCK and ``dst`` has the selection itself.
    """
    zero = tl.full([], 0, tl.int32)
    enough = tl.maximum(n, BLOCK)
    # The sample aims between n and enough, where it may be as wrong on either side.
    aim = tl.sqrt(n.to(tl.float32) * enough) * SAMPLE / length
    rank = tl.maximum(aim.to(tl.int32), 1)
    spread = tl.arange(0, SAMPLE) * (length // SAMPLE)
    sample = _sortable(tl.load(src + spread))
    lo, hi = _key_range(sample, spread >= 0, lowest.dtype)
    t1, t2 = _thirds(lo, hi)
    lo, _, hi, _ = _search(
        sample, src, length, rank, rank + rank // 16, t1, t2, lo, zero + SAMPLE, hi, zero, False, BLOCK, VEC
    )
    # What is beyond every key might not be one.
    t2 = tl.minimum(hi, -lowest - 1)
    lo, lo_count, hi, hi_count = _search(
        sample, src, length, n, enough, lo, t2, lowest, length, -lowest, zero, True, BLOCK, VEC
    )
    out = candidates
    if lo_count > BLOCK:
        out = dst
    wanted = n - hi_count
    taken = zero
    for s in range(0, length, BLOCK):
        words = _pack(_load_block(src, s, length, BLOCK, VEC) >= lo.to(tl.int32))
        if lo_count > enough:
            late, equal = _late_ties(_load_block(src, s, length, BLOCK, VEC), lo.to(tl.int32), wanted)
            words -= late
            wanted -= equal
        taken = _write(out, taken, words, s, candidates, BLOCK, False)
    return lo, lo_count, hi, hi_count


@triton.jit
def _load_score(src, position, mask, SCORE: tl.constexpr):
    """Scores (float32) at positions; 0 where there are none."""
    return tl.load(src + position, mask=mask, other=0).to(SCORE, bitcast=True).to(tl.float32)


@triton.jit
def _add_remembered(src, dst, remembered, known, length, MEMORY: tl.constexpr, SCORE: tl.constexpr, LIST: tl.constexpr):
    """Add to the scores of the ``known`` positions at ``dst`` a share of what they were selected by."""
    for s in range(0, known, LIST):
        index = s + tl.arange(0, LIST)
        position = tl.load(dst + index, mask=index < known, other=0)
        # Where rounds were lost, some may lie beyond.
        mask = (index < known) & (position < length)
        score = _load_score(src, position, mask, SCORE)
        score += MEMORY * tl.load(remembered + index, mask=mask, other=0).to(tl.float32)
        bits = score.to(SCORE).to(src.dtype.element_ty, bitcast=True)
        tl.store(src + position, bits, mask=mask)
    # Written by other threads of this program.
    tl.debug_barrier()


@triton.jit
def _remember(src, dst, remembered, n, SCORE: tl.constexpr, LIST: tl.constexpr):
    """Write the scores of the ``n`` positions at ``dst`` beside them."""
    tl.debug_barrier()
    for s in range(0, n, LIST):
        index = s + tl.arange(0, LIST)
        position = tl.load(dst + index, mask=index < n, other=0)
        score = _load_score(src, position, index < n, SCORE)
        tl.store(remembered + index, score.to(remembered.dtype.element_ty), mask=index < n)


@triton.jit
def _select_kernel(
    scores_ptr,
    lens_ptr,
    req_ptr,
    n_sel_ptr,
    positions_ptr,
    remembered_ptr,
    n_remembered_ptr,
    candidates_ptr,
    vecs_s_b,
    vecs_s_h,
    stride_pos_row,
    stride_pos_head,
    cap,
    LOWEST: tl.constexpr,
    BLOCK: tl.constexpr,
    SAMPLE: tl.constexpr,
    VEC: tl.constexpr,
    MEMORY: tl.constexpr,
    SCORE: tl.constexpr,
    LIST: tl.constexpr,
    PDL: tl.constexpr,
):
    let_next_start(PDL)
    h = tl.program_id(0)
    b = tl.program_id(1)
    length = tl.load(lens_ptr + b).to(tl.int32)
    n = tl.minimum(tl.minimum(tl.load(n_sel_ptr + b).to(tl.int32), length), cap)
    wait_for_previous(PDL)
    if n <= 0:
        return
    row = tl.load(req_ptr + b).to(tl.int64)
    src = scores_ptr + (b.to(tl.int64) * vecs_s_b + h.to(tl.int64) * vecs_s_h) * VEC
    dst = positions_ptr + row * stride_pos_row + h.to(tl.int64) * stride_pos_head
    candidates = candidates_ptr + (b.to(tl.int64) * tl.num_programs(0) + h) * BLOCK
    remembered = remembered_ptr + row * stride_pos_row + h.to(tl.int64) * stride_pos_head
    if MEMORY > 0:
        known = tl.minimum(tl.load(n_remembered_ptr + row).to(tl.int32), cap)
        _add_remembered(src, dst, remembered, known, length, MEMORY, SCORE, LIST)
    if n == length:
        every = tl.arange(0, BLOCK)
        for s in range(0, length, BLOCK):
            tl.store(dst + s + every, s + every, mask=s + every < length)
        if MEMORY > 0:
            _remember(src, dst, remembered, n, SCORE, LIST)
        return

    zero = tl.full([], 0, tl.int32)
    lowest = tl.full([], LOWEST, tl.int32 if LOWEST == -(2**15) else tl.int64)
    lo = lowest
    lo_count = length
    hi = -lowest
    hi_count = zero
    if length > BLOCK:
        lo, lo_count, hi, hi_count = _find_candidates(src, dst, candidates, length, n, lowest, BLOCK, SAMPLE, VEC)
    if lo_count <= BLOCK:
        offs = _block_offsets(BLOCK)
        valid = offs < lo_count
        if length > BLOCK:
            # Written by other threads of this program.
            tl.debug_barrier()
            positions = tl.load(candidates + offs, mask=valid, other=0)
            keys = _sortable(tl.load(src + positions, mask=valid, other=-1))
        else:
            keys = _load_block(src, 0, length, BLOCK, VEC)
            lo, hi = _key_range(keys, valid, lowest.dtype)
        t1, t2 = _thirds(lo, hi)
        lo, lo_count, hi, hi_count = _search(keys, src, length, n, n, t1, t2, lo, lo_count, hi, hi_count, False, BLOCK, VEC)
        words = _pack(keys >= lo.to(tl.int32))
        if lo_count > n:
            late, equal = _late_ties(keys, lo.to(tl.int32), n - hi_count)
            words -= late
        if length > BLOCK:
            _write(dst, zero, words, zero, candidates, BLOCK, True)
        else:
            _write(dst, zero, words, zero, candidates, BLOCK, False)
    if MEMORY > 0:
        _remember(src, dst, remembered, n, SCORE, LIST)


@dataclass(frozen=True)
class Remembered:
    """Scores of selections before.

    Attributes:
        scores: float [rows, Hkv, capacity], one layer of the table, strided as its positions.
        counts: int32 [rows], how many of each row count.
        share: of them that is added to new scores.
    """

    scores: torch.Tensor
    counts: torch.Tensor
    share: float


@dataclass
class SelectConfig:
    """Launch parameters.

    Attributes:
        block: scores that a program holds in registers, a power of two; selections of more than 2/3 of it raise it.
        num_warps: of a program with such a block.
        max_regs: registers of a thread.
    """

    block: int = 8192
    num_warps: int = 4
    max_regs: int = 255


def select(
    *,
    scores: torch.Tensor,
    rows: torch.Tensor,
    lengths: torch.Tensor,
    counts: torch.Tensor,
    positions: torch.Tensor,
    config: SelectConfig,
    pdl: bool,
    remembered: Remembered | None = None,
) -> None:
    """Write the ``counts[b]`` highest-scored positions of [0, lengths[b]) in ascending order.

    Args:
        scores: [B, Hkv, max_len] float32, bfloat16 or float16, unit stride along positions. It is fast if the other strides
            and max_len are multiples of 16 bytes, as vectors are loaded then.
        rows, lengths, counts: int [B].
        positions: int32 [rows, Hkv, capacity], one layer of the table.
        pdl: start while the kernel before still runs.
        remembered: scores that are added to ``scores``, in place, and then are those of the new positions.

    Raises:
        ValueError: a last axis has no unit stride.
    """
    batch = lengths.shape[0]
    if batch == 0:
        return
    if scores.stride(2) != 1 or positions.stride(2) != 1:
        raise ValueError("select: scores and positions must have unit stride along their last axis")
    if remembered is None or not remembered.share:
        remembered = Remembered(positions, counts, 0.0)  # read by none
    if remembered.scores.stride() != positions.stride():
        raise ValueError("select: remembered scores must be strided as the positions")
    heads, max_len = scores.shape[1:]
    cap = positions.shape[2]
    # Candidates are more than a selection: a block should hold 1.5 of the longest.
    block = triton.next_power_of_2(max(config.block, min(cap + cap // 2, MAX_BLOCK)))
    block = min(block, max(256, triton.next_power_of_2(max_len)), MAX_BLOCK)
    # As many scores in each thread as the configuration has.
    num_warps = min(max(config.num_warps * block // config.block, 1), 32)
    vec = math.gcd(16 // scores.element_size(), max_len, scores.stride(0), scores.stride(1))
    # Only rows longer than a block have candidates.
    candidates = positions.new_empty((batch, heads, block) if max_len > block else 0)
    _select_kernel[(heads, batch)](
        scores_ptr=scores.view(torch.int32 if scores.element_size() == 4 else torch.int16),
        lens_ptr=lengths,
        req_ptr=rows,
        n_sel_ptr=counts,
        positions_ptr=positions,
        remembered_ptr=remembered.scores,
        n_remembered_ptr=remembered.counts,
        candidates_ptr=candidates,
        vecs_s_b=scores.stride(0) // vec,
        vecs_s_h=scores.stride(1) // vec,
        stride_pos_row=positions.stride(0),
        stride_pos_head=positions.stride(1),
        cap=cap,
        LOWEST=-(1 << (8 * scores.element_size() - 1)),
        BLOCK=block,
        SAMPLE=min(SAMPLE, block),
        VEC=vec,
        MEMORY=remembered.share,
        SCORE=SCORE_TYPES[scores.dtype],
        LIST=LIST,
        PDL=pdl,
        num_warps=num_warps,
        maxnreg=min(config.max_regs, 65536 // (32 * num_warps)),
        **pdl_options(pdl),
    )
