"""Drafting and rejection sampling straight from logits, in Triton.

No probability is ever written to memory. A row of logits is read once, by several programs: each keeps the largest logit
of its block and the block's sum of exp((logit - largest) / T). One program per row then draws a block with probability
proportional to its sum, and a token within that block alone. So noise is made for one block of a row: a Gumbel-max over the
whole vocabulary needs a random number per logit, which takes longer than reading them.

Acceptance reads the target's logits once (sums of the blocks), and both logits of the first rejected row once more (sums
of the residual max(p - q, 0) per block). Draws are exponential races, argmax of weight / Exp(1): unlike a cumulative sum,
they give rare tokens their share, and never one of weight 0.

Top-k, top-p and min-p are floors of the rows (``triton_filters``). Finding them takes another pass over the logits and one
more kernel, for the whole batch if one of its rows has a filter.

The logits that drafts were drawn from are kept in entries of the caller's choice: a request's window has a slot of
``places`` adjacent ones.

Greedy rows (top-k 1) draw the first largest logit, as ``torch.argmax``. The oracles are ``reference.accept_by_rejection``,
and the filters' definitions in ``triton_filters``.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from sglang_sparsespec.sampling import triton_filters
from sglang_sparsespec.sampling.parameters import RowParameters
from sglang_sparsespec.sampling.triton_rows import (
    BLOCK,
    LOG2E,
    VIEWS_OF_DRAFTS,
    VIEWS_OF_WINDOWS,
    above_floor,
    block_logits,
    block_sums,
    block_weights,
    filtered_logits,
    row_stride,
    row_sums,
)

# Draws with the same seed and row.
DRAW_BLOCK = tl.constexpr(0)
DRAW_TOKEN = tl.constexpr(1)
COINS = tl.constexpr(2)


@triton.jit
def _uniform(seed, row, stream, index):
    """Random float32 in (0, 1), fine near 0, one per entry of ``index`` (int32)."""
    zero = index * 0
    bits, _, _, _ = tl.philox(seed, index, zero + row, zero + stream, zero)
    # Near 1 float32 rounds to 1, of which no draw may have the logarithm.
    return tl.minimum((bits.to(tl.float32) + 0.5) * (1.0 / 4294967296.0), 0.99999994)


@triton.jit
def _race(weights, seed, row, stream, SIZE: tl.constexpr):
    """Index of an entry of ``weights`` [SIZE] drawn with probability proportional to it."""
    u = _uniform(seed, row, stream, tl.arange(0, SIZE))
    # -log(1 - u), whose smallest values decide the race: 1 - u would round them.
    noise = tl.where(u < 0.0156, u * (1 + u * (0.5 + u * (1.0 / 3))), -tl.log(1 - u))
    return tl.argmax(weights / noise, 0)


@triton.jit
def _argmax(logits, maxima, vocab, BLOCKS: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr):
    """First largest logit of a row, whose blocks' largest are ``maxima``."""
    offs = tl.arange(0, PADDED)
    block = tl.argmax(tl.load(maxima + offs, mask=offs < BLOCKS, other=float("-inf")), 0)
    return block * BLOCK + tl.argmax(block_logits(logits, block, vocab, BLOCK), 0)


@triton.jit
def _made(num_drafted_ptr, b, K: tl.constexpr):
    """How many of the window's K drafts request ``b`` has."""
    return tl.minimum(tl.load(num_drafted_ptr + b), K)


@triton.jit(do_not_specialize=["number"], do_not_specialize_on_alignment=VIEWS_OF_DRAFTS)
def _draw_kernel(
    logits_ptr,
    stride,
    temperatures_ptr,
    top_ks_ptr,
    maxima_ptr,
    sums_ptr,
    seeds_ptr,
    number,
    kept_ptr,
    entries_ptr,
    floors_ptr,
    tokens_ptr,
    lse_ptr,
    vocab,
    BLOCKS: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Draw the draft token of one row; lse is log2 of the sum of exp(logit / T)."""
    b = tl.program_id(0)
    logits_row = logits_ptr + b.to(tl.int64) * stride
    if tl.load(top_ks_ptr + b) == 1:
        token = _argmax(logits_row, maxima_ptr + b * BLOCKS, vocab, BLOCKS, PADDED, BLOCK)
    else:
        scale = LOG2E / tl.load(temperatures_ptr + b)
        weights, lse = block_sums(maxima_ptr, sums_ptr, b + tl.arange(0, 1), scale, BLOCKS, PADDED)
        tl.store(lse_ptr + tl.load(entries_ptr + b) + tl.arange(0, 1), lse)
        seed = tl.load(seeds_ptr + number)
        block = _race(tl.sum(weights, 0), seed, b, DRAW_BLOCK, PADDED)
        logits = filtered_logits(logits_row, floors_ptr, b, block, vocab, BLOCK)
        logits = logits.to(kept_ptr.dtype.element_ty).to(tl.float32)
        token = block * BLOCK + _race(block_weights(logits, tl.max(logits, 0), scale), seed, b, DRAW_TOKEN, BLOCK)
    # NaN logits must not become an index out of range.
    tl.store(tokens_ptr + b, tl.minimum(token, vocab - 1).to(tl.int64))


@triton.jit(do_not_specialize=["number"], do_not_specialize_on_alignment=VIEWS_OF_WINDOWS)
def _accept_kernel(
    candidates_ptr,
    logits_ptr,
    stride,
    floors_ptr,
    kept_ptr,
    draft_lse_ptr,
    slots_ptr,
    num_drafted_ptr,
    temperatures_ptr,
    top_ks_ptr,
    maxima_ptr,
    sums_ptr,
    seeds_ptr,
    number,
    tokens_ptr,
    lens_ptr,
    final_lse_ptr,
    vocab,
    K: tl.constexpr,
    PLACES: tl.constexpr,
    PADDED_W: tl.constexpr,
    BLOCKS: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Accept length of one request; the token after the accepted drafts is left to the final kernel."""
    b = tl.program_id(0)
    i = tl.arange(0, PADDED_W)
    drafted = i < K
    made = _made(num_drafted_ptr, b, K)
    row = b * (K + 1) + i
    tokens = tl.load(candidates_ptr + row + 1, mask=drafted, other=0)
    # Where the output is shorter the last column is no token of it, but log-probabilities are looked up for it as well.
    tl.store(tokens_ptr + row, tokens, mask=i <= K)
    if tl.load(top_ks_ptr + b) == 1:
        accepted = 0
        matches = 1
        for step in range(K):
            r = b * (K + 1) + step
            best = _argmax(logits_ptr + r.to(tl.int64) * stride, maxima_ptr + r * BLOCKS, vocab, BLOCKS, PADDED, BLOCK)
            matches = tl.where((step < made) & (tl.load(candidates_ptr + r + 1) == best), matches, 0)
            accepted += matches
    else:
        scale = LOG2E / tl.load(temperatures_ptr + b)
        # Past the window the last row is read again.
        _, lse = block_sums(maxima_ptr, sums_ptr, b * (K + 1) + tl.minimum(i, K), scale, BLOCKS, PADDED)
        target = tl.load(logits_ptr + row.to(tl.int64) * stride + tokens, mask=drafted, other=0.0).to(tl.float32)
        p = tl.exp2(above_floor(target, floors_ptr, b * (K + 1) + tl.minimum(i, K)) * scale - lse)
        at = tl.load(slots_ptr + b).to(tl.int64) * PLACES + i
        draft = tl.load(kept_ptr + at * vocab + tokens, mask=drafted, other=0.0).to(tl.float32)
        q = tl.exp2(draft * scale - tl.load(draft_lse_ptr + at, mask=drafted, other=0.0))
        rejected = (_uniform(tl.load(seeds_ptr + number), b, COINS, i) * q >= p) | (i >= made)
        accepted = tl.min(tl.where(rejected, i, K), 0)
        tl.store(final_lse_ptr + b, tl.sum(tl.where(i == accepted, lse, 0.0), 0))
    tl.store(lens_ptr + b, accepted + 1)


@triton.jit
def _residual(
    logits_ptr,
    stride,
    floors_ptr,
    kept_ptr,
    draft_lse_ptr,
    final_lse_ptr,
    slots_ptr,
    b,
    accepted,
    block,
    scale,
    vocab,
    K: tl.constexpr,
    PLACES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """max(p - q, 0) of a block of request b's first rejected row."""
    row = b * (K + 1) + accepted
    at = tl.load(slots_ptr + b).to(tl.int64) * PLACES + accepted
    target = filtered_logits(logits_ptr + row.to(tl.int64) * stride, floors_ptr, row, block, vocab, BLOCK)
    p = tl.exp2(target * scale - tl.load(final_lse_ptr + b))
    q = tl.exp2(block_logits(kept_ptr + at * vocab, block, vocab, BLOCK) * scale - tl.load(draft_lse_ptr + at))
    return tl.maximum(p - q, 0.0)


@triton.jit(do_not_specialize_on_alignment=VIEWS_OF_WINDOWS)
def _residual_kernel(
    logits_ptr,
    stride,
    floors_ptr,
    kept_ptr,
    draft_lse_ptr,
    slots_ptr,
    num_drafted_ptr,
    temperatures_ptr,
    top_ks_ptr,
    lens_ptr,
    final_lse_ptr,
    residuals_ptr,
    vocab,
    K: tl.constexpr,
    PLACES: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sum of the residual over one block, of a request with a rejected draft."""
    b = tl.program_id(0) // BLOCKS
    block = tl.program_id(0) % BLOCKS
    accepted = tl.load(lens_ptr + b) - 1
    if (accepted < _made(num_drafted_ptr, b, K)) & (tl.load(top_ks_ptr + b) != 1):
        scale = LOG2E / tl.load(temperatures_ptr + b)
        residual = _residual(
            logits_ptr, stride, floors_ptr, kept_ptr, draft_lse_ptr, final_lse_ptr, slots_ptr, b, accepted, block, scale,
            vocab, K, PLACES, BLOCK,
        )  # fmt: skip
        tl.store(residuals_ptr + b * BLOCKS + block, tl.sum(residual, 0))


@triton.jit(do_not_specialize=["number"], do_not_specialize_on_alignment=VIEWS_OF_WINDOWS)
def _final_kernel(
    logits_ptr,
    stride,
    floors_ptr,
    kept_ptr,
    draft_lse_ptr,
    slots_ptr,
    num_drafted_ptr,
    temperatures_ptr,
    top_ks_ptr,
    maxima_ptr,
    sums_ptr,
    seeds_ptr,
    number,
    lens_ptr,
    final_lse_ptr,
    residuals_ptr,
    tokens_ptr,
    vocab,
    K: tl.constexpr,
    PLACES: tl.constexpr,
    BLOCKS: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Draw the token after the accepted drafts of one request."""
    b = tl.program_id(0)
    accepted = tl.load(lens_ptr + b) - 1
    row = b * (K + 1) + accepted
    logits_row = logits_ptr + row.to(tl.int64) * stride
    if tl.load(top_ks_ptr + b) == 1:
        token = _argmax(logits_row, maxima_ptr + row * BLOCKS, vocab, BLOCKS, PADDED, BLOCK)
    else:
        scale = LOG2E / tl.load(temperatures_ptr + b)
        rows, _ = block_sums(maxima_ptr, sums_ptr, row + tl.arange(0, 1), scale, BLOCKS, PADDED)
        weights = tl.sum(rows, 0)
        offs = tl.arange(0, PADDED)
        rejected = accepted < _made(num_drafted_ptr, b, K)
        residuals = tl.load(residuals_ptr + b * BLOCKS + offs, mask=(offs < BLOCKS) & rejected, other=0.0)
        # p == q up to rounding leaves no residual; then the target itself is the residual.
        from_residual = tl.sum(residuals, 0) > 0
        seed = tl.load(seeds_ptr + number)
        block = _race(tl.where(from_residual, residuals, weights), seed, b, DRAW_BLOCK, PADDED)
        logits = filtered_logits(logits_row, floors_ptr, row, block, vocab, BLOCK)
        within = block_weights(logits, tl.max(logits, 0), scale)
        if from_residual:
            residual = _residual(
                logits_ptr, stride, floors_ptr, kept_ptr, draft_lse_ptr, final_lse_ptr, slots_ptr, b, accepted, block, scale,
                vocab, K, PLACES, BLOCK,
            )  # fmt: skip
            # Compiled apart from the sum over the block, it may round to nothing where that did not.
            within = tl.where(tl.max(residual, 0) > 0, residual, within)
        token = block * BLOCK + _race(within, seed, b, DRAW_TOKEN, BLOCK)
    tl.store(tokens_ptr + row, tl.minimum(token, vocab - 1).to(tl.int64))


def round_seeds(count: int, device: torch.device | str) -> torch.Tensor:
    """Seeds of ``count`` independent launches, int64 [count] drawn by torch's generator of ``device``: no host sync."""
    return torch.randint(-(2**63), 2**63 - 1, (count,), dtype=torch.int64, device=device)


def filtered_sums(
    logits: torch.Tensor,
    rows: RowParameters,
    kept: torch.Tensor | None = None,
    entries: torch.Tensor | None = None,
    block: int = BLOCK,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """:func:`row_sums` of what the filters leave, and the rows' floors (None if no row has a filter).

    Raises:
        ValueError: parameters are not contiguous.
    """
    if not all(column is None or column.is_contiguous() for column in (*rows.columns, entries)):
        raise ValueError("sampling parameters and entries must be contiguous")
    given, floors = (rows.temperatures, rows.top_ks), None
    if rows.top_ps is not None:
        floors = triton_filters.floors(logits, rows, *row_sums(logits, *given, block=block), block)
    return *row_sums(logits, *given, kept, entries, floors, block), floors


def draft(
    logits: torch.Tensor,
    rows: RowParameters,
    seeds: torch.Tensor,
    number: int,
    kept: torch.Tensor,
    lse: torch.Tensor,
    entries: torch.Tensor,
    block: int = BLOCK,
) -> torch.Tensor:
    """Draw one draft token per row from softmax(kept logits / T): int64 [rows].

    Args:
        logits: [rows, vocab], float32, bfloat16 or float16, unit stride along the vocabulary.
        rows: one entry per row of ``logits``.
        seeds: int64 (:func:`round_seeds`); ``seeds[number]`` is this draw's.
        kept: [entries, vocab] contiguous. ``kept[entries]`` receives the logits in its own type, and those that a filter
            removes as -inf; what that type rounds is rounded in the draw.
        lse: float32 [entries]; ``lse[entries]`` receives log2(sum(exp(kept logits / T))), not of greedy rows.
        entries: int64 [rows], all different.
    """
    count, vocab = logits.shape
    maxima, sums, floors = filtered_sums(logits, rows, kept, entries, block)
    blocks = maxima.shape[1]
    tokens = torch.empty(count, dtype=torch.int64, device=logits.device)
    _draw_kernel[(count,)](
        logits,
        row_stride(logits),
        rows.temperatures,
        rows.top_ks,
        maxima,
        sums,
        seeds,
        number,
        kept,
        entries,
        floors,
        tokens,
        lse,
        vocab,
        BLOCKS=blocks,
        PADDED=triton.next_power_of_2(blocks),
        BLOCK=block,
        num_warps=8,
    )
    return tokens


def accept(
    candidates: torch.Tensor,
    logits: torch.Tensor,
    rows: RowParameters,
    seeds: torch.Tensor,
    number: int,
    kept: torch.Tensor,
    lse: torch.Tensor,
    places: int,
    slots: torch.Tensor,
    num_drafted: torch.Tensor,
    block: int = BLOCK,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rejection sampling of the drafts that :func:`draft` drew.

    Args:
        candidates: int64 [batch, W]: the last committed token and k drafts.
        logits: [batch * W, vocab] of the verification, unit stride along the vocabulary.
        rows: one entry per request.
        seeds: int64; ``seeds[number]`` is this draw's, and no draft's.
        kept, lse: from :func:`draft`; draft i of a request is in entry slot * ``places`` + i.
        places: at least k.
        slots: int64 [batch].
        num_drafted: int64 [batch], how many drafts were made, the window's first; k if it is larger. The others may be
            anything.

    Returns:
        tokens int64 [batch, W], whose first accept_lens are the output (the others are tokens, too), and accept_lens
        int32 [batch] (1 to W).

    Raises:
        ValueError: ``kept`` and ``lse`` do not belong together.
    """
    batch, width = candidates.shape
    vocab, device = logits.shape[1], logits.device
    candidates = candidates.contiguous()
    if not kept.is_contiguous() or kept.shape != (len(lse), vocab):
        raise ValueError(f"kept logits {list(kept.shape)} and sums {list(lse.shape)} do not belong together")
    stride = row_stride(logits)
    maxima, sums, floors = filtered_sums(logits, rows, block=block)
    blocks = maxima.shape[1]
    sizes = {"K": width - 1, "PLACES": places, "BLOCKS": blocks, "BLOCK": block}
    padded = triton.next_power_of_2(blocks)
    tokens = torch.empty_like(candidates)
    accept_lens = torch.empty(batch, dtype=torch.int32, device=device)
    final_lse = torch.empty(batch, dtype=torch.float32, device=device)
    residuals = torch.empty((batch, blocks), dtype=torch.float32, device=device)
    of_draft = (floors, kept, lse, slots, num_drafted)
    given = (rows.temperatures, rows.top_ks)
    _accept_kernel[(batch,)](
        candidates, logits, stride, *of_draft, *given, maxima, sums, seeds, number, tokens, accept_lens, final_lse, vocab,
        PADDED_W=triton.next_power_of_2(width), PADDED=padded, **sizes, num_warps=4,
    )  # fmt: skip
    _residual_kernel[(batch * blocks,)](
        logits, stride, *of_draft, *given, accept_lens, final_lse, residuals, vocab, **sizes, num_warps=4
    )
    _final_kernel[(batch,)](
        logits, stride, *of_draft, *given, maxima, sums, seeds, number, accept_lens, final_lse, residuals, tokens, vocab,
        PADDED=padded, **sizes, num_warps=8,
    )  # fmt: skip
    return tokens, accept_lens
