"""Penalties of a window's rows, in Triton: only logits of tokens that occurred are read and written.

A program has a request and a block of the vocabulary. It reads the block's counts once for all rows of the request. Nearly
all of them are 0, and the logits of those tokens are not touched. Programs of requests without penalties end at once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

#: Tokens per program.
BLOCK = 2048
#: Arguments that may be views of a round's plan; their alignment and strides must compile nothing anew.
VIEWS, STRIDES = ("rows_ptr", "candidates_ptr", "drafts_seen_ptr"), ("stride_candidates", "stride_seen")


@triton.jit(do_not_specialize=STRIDES, do_not_specialize_on_alignment=VIEWS)
def _penalise_kernel(
    logits_ptr,
    stride_request,
    stride_row,
    rows_ptr,
    candidates_ptr,
    stride_candidates,
    drafts_seen_ptr,
    stride_seen,
    counts_ptr,
    strengths_ptr,
    vocab,
    NUM_ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Penalise a block of one request's rows."""
    b = tl.program_id(0)
    row = tl.load(rows_ptr + b)
    frequency = tl.load(strengths_ptr + row * 3)
    presence = tl.load(strengths_ptr + row * 3 + 1)
    repetition = tl.load(strengths_ptr + row * 3 + 2)
    if (frequency != 0) | (presence != 0) | (repetition != 1):
        offs = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        counts = tl.load(counts_ptr + row * vocab + offs, mask=offs < vocab, other=0)
        drafts = candidates_ptr + b * stride_candidates
        seen = tl.load(drafts_seen_ptr + b * stride_seen)
        for place in range(1, WIDTH):
            counts += ((offs == tl.load(drafts + place)) & (place <= seen)).to(tl.int32)
        logits = logits_ptr + b.to(tl.int64) * stride_request + offs
        for index in range(NUM_ROWS):
            if index > 0:
                counts += (offs == tl.load(drafts + seen + index)).to(tl.int32)
            occurred = (counts > 0) & (offs < vocab)
            logit = tl.load(logits + index * stride_row, mask=occurred, other=0.0)
            logit = logit - (counts.to(tl.float32) * frequency + presence)
            # Triton's own division is an approximation.
            divisor = repetition + tl.zeros([BLOCK], tl.float32)
            logit = tl.where(logit < 0, logit * repetition, tl.math.div_rn(logit, divisor))
            tl.store(logits + index * stride_row, logit, mask=occurred)


def penalise(
    logits: torch.Tensor,
    rows: torch.Tensor,
    candidates: torch.Tensor,
    drafts_seen: torch.Tensor,
    counts: torch.Tensor,
    strengths: torch.Tensor,
    block: int = BLOCK,
) -> None:
    """Penalise the rows of requests by their output and by the drafts that each row sees, in place.

    Args:
        logits: float32 [requests, n, vocab], unit stride along the vocabulary.
        rows: int64 [requests], entries of ``counts`` and ``strengths``.
        candidates: int64 [requests, W], a committed token and drafts.
        drafts_seen: int64 [requests], drafts that the first row sees, each further row one more; at most W - n.
        counts: int32 [entries, vocab] contiguous, how often each token was committed.
        strengths: float32 [entries, 3] contiguous: frequency, presence and repetition penalty.

    Raises:
        ValueError: a row's logits are not adjacent, or are not float32.
    """
    requests, num_rows, vocab = logits.shape
    if logits.stride(2) != 1 or logits.dtype != torch.float32:
        raise ValueError("logits must be float32 with unit stride along the vocabulary")
    if candidates.stride(1) != 1:
        candidates = candidates.contiguous()
    _penalise_kernel[(requests, triton.cdiv(vocab, block))](
        logits,
        logits.stride(0),
        logits.stride(1),
        rows,
        candidates,
        candidates.stride(0),
        drafts_seen,
        drafts_seen.stride(0),
        counts,
        strengths,
        vocab,
        NUM_ROWS=num_rows,
        WIDTH=candidates.shape[1],
        BLOCK=block,
        num_warps=4,
    )
