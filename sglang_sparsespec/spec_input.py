"""Batch state of SPARSESPEC between and inside scheduler iterations (SGLang ``SpecInput``)."""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.model_executor.forward_batch_info import CaptureHiddenMode
from sglang.srt.speculative.spec_info import SpecInput, SpecInputType


class SparseSpecDraftInput(SpecInput):
    """What one round leaves for the next: the token to start drafting from.

    Under overlap scheduling SGLang relays ``bonus_tokens`` through its ``FutureMap``
    (indexed by request), and sets ``future_indices``; without it, the tensor itself is
    carried, and filtered and merged with the batch.

    Attributes:
        bonus_tokens: int64 [batch], last committed token whose KV is not written yet.
        new_seq_lens: int64 [batch], committed KV lengths.
        future_indices: int64 [batch] request rows, or None without overlap.
        topk_p, topk_index, hidden_states: always None; read by ``RelayPayload``.
    """

    topk_p: torch.Tensor | None = None
    topk_index: torch.Tensor | None = None
    hidden_states: torch.Tensor | None = None
    capture_hidden_mode = CaptureHiddenMode.NULL

    def __init__(self, bonus_tokens: torch.Tensor, new_seq_lens: torch.Tensor) -> None:
        # The closed enum has no member for plugins. This one is not dispatched on by the
        # attention backends in use here, and marks a draft input.
        super().__init__(SpecInputType.EAGLE_DRAFT)
        self.bonus_tokens = bonus_tokens
        self.new_seq_lens = new_seq_lens
        self.future_indices: torch.Tensor | None = None
        # Keeps SGLang from replaying the verify graph for one-token batches
        # (DecodeCudaGraphRunner.can_run_graph compares the widths).
        self.num_tokens_per_req = 1
        self.num_tokens_for_logprob_per_req = 1

    def filter_batch(self, new_indices: torch.Tensor, new_indices_cpu: Any = None) -> None:
        """Keep the rows ``new_indices`` (int64 [kept])."""
        if self.future_indices is not None:
            self.future_indices = self.future_indices[new_indices]
            return
        self.bonus_tokens = self.bonus_tokens[new_indices]
        self.new_seq_lens = self.new_seq_lens[new_indices]

    def merge_batch(self, spec_info: SparseSpecDraftInput) -> None:
        """Append the rows of ``spec_info``."""
        if self.future_indices is not None:
            assert spec_info.future_indices is not None
            self.future_indices = torch.cat([self.future_indices, spec_info.future_indices])
            return
        self.bonus_tokens = torch.cat([self.bonus_tokens, spec_info.bonus_tokens])
        self.new_seq_lens = torch.cat([self.new_seq_lens, spec_info.new_seq_lens])


class SparseSpecVerifyInput(SpecInput):
    """One verification: ``draft_token_num`` = W tokens per request, a causal chain.

    Attributes:
        draft_token_num: W, the last committed token and the k drafts.
        positions: int64 [batch * W], or None at graph capture.
    """

    capture_hidden_mode = CaptureHiddenMode.NULL
    custom_mask: torch.Tensor | None = None

    def __init__(self, draft_token_num: int, positions: torch.Tensor | None) -> None:
        super().__init__(SpecInputType.NGRAM_VERIFY)
        self.draft_token_num = draft_token_num
        self.positions = positions
        self.num_tokens_per_req = draft_token_num
        self.num_tokens_for_logprob_per_req = draft_token_num

    @classmethod
    def for_capture(cls, draft_token_num: int) -> SparseSpecVerifyInput:
        """The input of warm-up and graph capture, where positions come from the runner."""
        return cls(draft_token_num, None)
