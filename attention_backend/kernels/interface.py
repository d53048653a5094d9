"""The kernels that PillarAttn (arXiv 2512.01278, section 4.1) is made of, as one interface with several implementations.

The interface is FlashInfer's: plan once per forward, run once per layer. A plan holds the tensors that say which tokens of
which requests a forward attends to. Making one is cheap and reads nothing on the host, so a plan that is made while a CUDA
graph is captured is part of that graph, and follows the lengths of every replay.

Notation: B requests, W queries of a verify window, L tokens before the window, Hq query heads, Hkv KV heads, D head dim.
"Rows" are rows of ``req_to_token``, one per request; row 0 is SGLang's padding row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from sglang_sparsespec.attention_backend.sliding_window import WindowView


def score_row(max_context: int) -> int:
    """Entries of a row of scores for ``max_context`` positions: rows begin at multiples of 128 bytes, for vector loads."""
    return -(-max_context // 64) * 64


@dataclass(frozen=True)
class KernelShape:
    """What an implementation is built for.

    Attributes:
        max_batch: most requests in one call that CUDA graphs record; larger eager batches allocate.
        num_q_heads, num_kv_heads, head_dim: of this tensor-parallel rank.
        window: W, the most queries of a request in one verification.
        longest_list: most tokens that a draft query attends to.
        dtype: of queries and outputs.
        kv_dtype: of the KV caches.
    """

    max_batch: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    window: int
    longest_list: int
    dtype: torch.dtype
    kv_dtype: torch.dtype

    @property
    def group(self) -> int:
        """Query heads per KV head.

        Raises:
            ValueError: the query heads are not a multiple of the KV heads.
        """
        if self.num_q_heads % self.num_kv_heads:
            raise ValueError(f"{self.num_q_heads} query heads are not a multiple of {self.num_kv_heads} KV heads")
        return self.num_q_heads // self.num_kv_heads


@dataclass(frozen=True)
class LayerKV:
    """One layer's KV cache.

    Attributes:
        k, v: [slots, Hkv, D], SGLang's pool buffers.
        scaling: softmax scale times the descale of K; V's descale is the caller's.
        index: of the layer in ``SelectionTable.positions``, if it has full attention.
        sinks: float [Hq], contiguous: logits that are in every query's softmax beside its tokens, with values of 0
            (gpt-oss); None for a layer without. Log-sum-exps and probabilities are those with the sinks.
        soft_cap: logits s become soft_cap * tanh(s / soft_cap) (Gemma 2); 0: they stay as they are.
    """

    k: torch.Tensor
    v: torch.Tensor
    scaling: float
    index: int
    sinks: torch.Tensor | None = None
    soft_cap: float = 0.0


class DraftAttention(Protocol):
    """One query per request over its selected positions and its tail."""

    def run(self, q: torch.Tensor, kv: LayerKV, out: torch.Tensor, lse: torch.Tensor | None = None) -> None:
        """Attend in one layer.

        Args:
            q: [B, Hq, D]. Tokens may lie apart, as in a fused QKV projection; the heads of a token may not.
            out: [B, Hq, D], contiguous, written (zeros for padding).
            lse: float32 [B, Hq], contiguous: natural log-sum-exp, written if given; padding gets any value.
        """
        ...


class VerifyAttention(Protocol):
    """Full causal attention of the queries at positions L .. L + W - 1, and PillarAttn's scores of the tokens before."""

    def run(
        self,
        q: torch.Tensor,
        kv: LayerKV,
        out: torch.Tensor,
        scores: torch.Tensor | None = None,
        lse_hint: torch.Tensor | None = None,
        lse: torch.Tensor | None = None,
    ) -> None:
        """Attend in one layer.

        Args:
            q: [B * W, Hq, D], request by request; strides as in :class:`DraftAttention`.
            out: [B * W, Hq, D], contiguous, written.
            scores: [B, Hkv, >= max L], written for positions < L: the mean over the W queries and the Hq / Hkv heads of a
                group of softmax probabilities.
            lse_hint: float32 [B, W, Hq], estimates of the queries' log-sum-exp. With them attention and scores take one
                pass over K, and a query's share of the scores is scaled by exp(LSE - hint); without, the scores are exact.
            lse: float32 [B, W, Hq], natural log-sum-exp, written if given; it may be ``lse_hint``.
        """
        ...


class PrefillScores(Protocol):
    """Scores of the positions before a prompt's last min(W, extend length) queries."""

    def run(self, q: torch.Tensor, kv: LayerKV, scores: torch.Tensor) -> None:
        """Score in one layer.

        Args:
            q: [tokens, Hq, D], of all prompts of the batch.
            scores: [B, Hkv, >= max length], written for positions < length - min(W, extend length).
        """
        ...


class Selection(Protocol):
    """The best-scored positions of each (request, KV head), into the table."""

    def run(self, scores: torch.Tensor, layer_index: int) -> None:
        """Select in one layer: the positions are written in ascending order, with their scores if the table has a memory.

        Args:
            scores: [B, Hkv, >= max length]; what is remembered may be added to them in place.
            layer_index: of ``SelectionTable.positions``.
        """
        ...


class PillarKernels(Protocol):
    """Draft attention, verify attention with scores, prefill scores and selection.

    Implementations are built with the :class:`page_table.SelectionTable` and the ``req_to_token`` that they read.

    Attributes:
        name: for the log.
        score_dtype: of the scores that callers reserve.
        uses_lse_hints: whether ``lse_hint`` saves time.
    """

    name: str
    score_dtype: torch.dtype
    uses_lse_hints: bool

    def plan_draft(self, rows: torch.Tensor, seq_lens: torch.Tensor) -> DraftAttention:
        """Plan a draft step; valid until the next one is planned.

        Args:
            rows: int [B].
            seq_lens: int [B], including the query's own token; 0 for padding.
        """
        ...

    def plan_verify(self, rows: torch.Tensor, lengths: torch.Tensor, window: int) -> VerifyAttention:
        """Plan a verification of ``window`` queries per request.

        Args:
            rows: int [B].
            lengths: int [B], L; 0 for padding.
        """
        ...

    def plan_sliding(self, view: WindowView, window: int) -> VerifyAttention:
        """Plan a forward of ``window`` queries per request in the layers with a sliding window.

        Query i of a request sees the ``view.reach`` tokens before its own, and its own. There are no scores.
        """
        ...

    def plan_prefill_scores(
        self,
        rows: torch.Tensor,
        seq_lens: torch.Tensor,
        starts: torch.Tensor,
        extend_lens: torch.Tensor,
        window: int,
    ) -> PrefillScores:
        """Plan the scores of a prefill batch.

        Args:
            rows: int [B].
            seq_lens: int [B], lengths including this chunk.
            starts, extend_lens: int [B], the first query of each prompt in ``q``, and their number.
            window: W.
        """
        ...

    def plan_selection(self, rows: torch.Tensor, lengths: torch.Tensor, counts: torch.Tensor) -> Selection:
        """Plan the selection of ``counts`` (int [B]) of the positions below ``lengths`` (int [B]) for ``rows`` (int [B])."""
        ...
