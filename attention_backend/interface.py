"""The kernels PillarAttn is made of, as one interface with several implementations.

``torch_kernels.TorchPillarKernels`` is the oracle (CPU and CUDA), ``cuda_kernels.
CudaPillarKernels`` the fast one. Common notation: B requests, W rows of a verify window,
L committed tokens before the window, Hq query heads, Hkv KV heads, D head dim.
"""

from __future__ import annotations

from typing import Protocol

import torch

#: What a position's score is worth to each of the ``lookahead`` positions after it, see ``PillarKernels.select``.
LOOKAHEAD_WEIGHT = 0.25
#: Positions that selection can look ahead.
LOOKAHEADS = (0, 1, 2, 4, 8)


def score_row(max_context: int) -> int:
    """Entries of a row of scores for ``max_context`` positions: rows begin at multiples of 128 bytes, for vector loads."""
    return -(-max_context // 64) * 64


class PillarKernels(Protocol):
    """Draft attention, verify attention with scores, prefill scores, selection.

    KV caches are SGLang's pool buffers, [slots, Hkv, D]; ``req_to_token`` is int32
    [rows, context], the slot of each position. No method synchronises with the host on
    CUDA (the fast implementation is captured into CUDA graphs).
    """

    def draft_attention(
        self,
        q: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        positions: torch.Tensor,
        num_selected: torch.Tensor,
        tail_start: torch.Tensor,
        req_to_token: torch.Tensor,
        req_pool_indices: torch.Tensor,
        seq_lens: torch.Tensor,
        scaling: float,
        out: torch.Tensor,
        lse: torch.Tensor | None = None,
    ) -> None:
        """One query per request over its selected positions and its tail.

        Args:
            q: [B, Hq, D].
            positions: int32 [rows, Hkv, capacity], one layer of the table.
            num_selected, tail_start: int32 [rows].
            req_pool_indices: int [B].
            seq_lens: int [B], including the query's own token; 0 for a padding row.
            out: [B, Hq, D], written (zeros for padding rows).
            lse: float32 [B, Hq] natural log-sum-exp, written if given.
        """
        ...

    def verify_attention(
        self,
        q: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        req_to_token: torch.Tensor,
        req_pool_indices: torch.Tensor,
        seq_lens: torch.Tensor,
        window: int,
        scaling: float,
        out: torch.Tensor,
        scores: torch.Tensor | None = None,
        lse_hint: torch.Tensor | None = None,
        lse: torch.Tensor | None = None,
    ) -> None:
        """Full causal attention of W consecutive queries, with scores of the tokens before.

        Args:
            q: [B * W, Hq, D]; row i of a request is the query at position L + i.
            seq_lens: int [B], L.
            window: W.
            out: [B * W, Hq, D], written.
            scores: [B, Hkv, >= max L], written for positions < L: the mean over the W rows
                and the Hq / Hkv heads of a group of softmax probabilities (paper, PillarAttn).
            lse_hint: float32 [B, W, Hq] estimates of the rows' log-sum-exp; with it the
                probabilities are taken relative to the estimate, in one pass.
            lse: float32 [B, W, Hq] natural log-sum-exp, written if given; it may be ``lse_hint``.
        """
        ...

    def prefill_scores(
        self,
        q: torch.Tensor,
        k_cache: torch.Tensor,
        req_to_token: torch.Tensor,
        req_pool_indices: torch.Tensor,
        seq_lens: torch.Tensor,
        extend_start_loc: torch.Tensor,
        extend_lens: torch.Tensor,
        window: int,
        scaling: float,
        scores: torch.Tensor,
    ) -> None:
        """Scores of the positions before a prompt's last min(W, extend_len) queries.

        Args:
            q: [tokens, Hq, D] of all prompts of the batch.
            seq_lens: int [B], total lengths including this chunk.
            extend_start_loc, extend_lens: int [B], where each prompt's rows are in ``q``.
            scores: [B, Hkv, >= max length], written for positions < seq_len - nq.
        """
        ...

    def select(
        self,
        scores: torch.Tensor,
        lengths: torch.Tensor,
        req_pool_indices: torch.Tensor,
        counts: torch.Tensor,
        positions: torch.Tensor,
        lookahead: int = 0,
    ) -> None:
        """Write the ``counts[b]`` best-scored positions of [0, lengths[b]), ascending.

        With ``lookahead`` positions are ranked by max(score[p], LOOKAHEAD_WEIGHT * max(score[p - lookahead .. p - 1])):
        text that copies from its context attends one position further with every token, so drafts want what follows
        the tokens that the last verification attended to.

        Args:
            scores: [B, Hkv, >= max length]; with ``lookahead`` not negative, and lost: it may be worked on in place.
            lengths, counts: int [B].
            positions: int32 [rows, Hkv, capacity], rows ``req_pool_indices`` are written.
            lookahead: one of LOOKAHEADS.
        """
        ...
