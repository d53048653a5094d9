"""What one forward attends to, as one frozen value.

A plan is made once per forward, by the backend's ``plan_*`` methods or, for the forwards that SGLang launches, from its
``ForwardBatch``. Every layer then runs the same plan. Plans hold device tensors only, so a plan made while a CUDA graph
is captured belongs to that graph.

Notation: B requests, W tokens of a verify window, L committed tokens before it, Hq query heads, D head dim.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sglang_sparsespec.attention_backend.kernels.interface import DraftAttention, Selection, VerifyAttention
from sglang_sparsespec.draft_weights.copies import DraftWeights


@dataclass(frozen=True)
class Prefill:
    """Chunks of prompts, attended to by SGLang's own backend.

    Attributes:
        prompts: whose last queries give the first selection; None if the draft policy needs no scores.
        kept: int64 [B * W], the queries that are kept for scoring after the last layer; None for a batch that is scored
            layer by layer.
    """

    prompts: PromptChunks | None = None
    kept: torch.Tensor | None = None


@dataclass(frozen=True)
class PromptChunks:
    """The prompts of a prefill batch, and what is selected for each.

    Attributes:
        rows, seq_lens: int64 [B], rows of ``req_to_token`` and lengths with this chunk.
        starts, extend_lens: int32 [B], the first query of each prompt and their number.
        lengths: int64 [B]; the selection is made from the positions below.
        counts: int32 [B], positions to select.
    """

    rows: torch.Tensor
    seq_lens: torch.Tensor
    starts: torch.Tensor
    extend_lens: torch.Tensor
    lengths: torch.Tensor
    counts: torch.Tensor

    def __len__(self) -> int:
        return len(self.rows)


@dataclass(frozen=True)
class Draft:
    """One query per request over its sparse page table.

    Attributes:
        sliding: attention of the layers with a sliding window, here and in the other plans; None for a model without.
        num_queries: B.
        weights: what the linear layers multiply with; None: the model's own weights, as in every other plan.
    """

    attention: DraftAttention
    sliding: VerifyAttention | None
    num_queries: int
    weights: DraftWeights | None = None


@dataclass(frozen=True)
class Verify:
    """Full attention of verify windows, with the scores that choose the next selection.

    Attributes:
        selection: None if the draft policy needs no scores.
        hints: float32 [layers, B, W, Hq], estimates of the queries' log-sum-exp; None if the kernels take none. A hint
            that is far off costs time, not exactness.
    """

    attention: VerifyAttention
    sliding: VerifyAttention | None
    selection: Selection | None
    hints: torch.Tensor | None


@dataclass(frozen=True)
class Plain:
    """Full attention of one query per request: a verify window of one token, without scores.

    Attributes:
        num_queries: B.
    """

    attention: VerifyAttention
    sliding: VerifyAttention | None
    num_queries: int


@dataclass(frozen=True)
class Mixed:
    """Draft queries of some requests, then the verify windows of others; either may be missing."""

    draft: Draft | None
    verify: Verify | None


ForwardPlan = Prefill | Draft | Verify | Plain | Mixed
