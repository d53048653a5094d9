"""PillarAttn kernels on CUDA: Triton implementation of :class:`interface.PillarKernels`.

All scratch memory is allocated in the constructor and every launch grid depends only on the batch size, so the
methods can be captured in CUDA graphs: they neither synchronise nor read lengths on the host.
"""

from __future__ import annotations

import torch

from sglang_sparsespec.attention_backend import triton_draft, triton_select, triton_verify

SUPPORTED_HEAD_DIMS = (64, 128, 256)


class CudaPillarKernels:
    """Triton kernels for draft attention, verify attention with scores, prefill scores and selection.

    Args:
        max_batch: most requests in one call (CUDA graphs' largest batch); larger eager batches allocate on the fly.
        num_q_heads, num_kv_heads, head_dim: of this tensor-parallel rank; head_dim 64, 128 or 256.
        window: W = k + 1 rows of a verify window; W * (num_q_heads / num_kv_heads) may be at most 256.
        capacity: entries per selection list (last axis of ``SelectionTable.positions``).
        max_context: longest request in tokens (sets how far a request may be split).
        device: where the caches live.
        draft_config, verify_config, select_config: launch parameters; the defaults were measured on an H100.
    """

    def __init__(
        self,
        max_batch: int,
        num_q_heads: int,
        num_kv_heads: int,
        head_dim: int,
        window: int,
        capacity: int,
        max_context: int,
        device: torch.device | str,
        draft_config: triton_draft.DraftConfig | None = None,
        verify_config: triton_verify.VerifyConfig | None = None,
        select_config: triton_select.SelectConfig | None = None,
    ) -> None:
        if head_dim not in SUPPORTED_HEAD_DIMS:
            raise ValueError(f"head_dim {head_dim} is not supported; expected one of {SUPPORTED_HEAD_DIMS}")
        if num_q_heads % num_kv_heads != 0:
            raise ValueError(f"{num_q_heads} query heads are not a multiple of {num_kv_heads} KV heads")
        self.group = num_q_heads // num_kv_heads
        if window * self.group > triton_verify.MAX_ROWS:
            raise ValueError(
                f"window {window} x {self.group} query heads per KV head exceeds {triton_verify.MAX_ROWS} packed rows;"
                " use fewer draft tokens"
            )
        self.num_q_heads = num_q_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        self.window = window
        self.capacity = capacity
        self.max_context = max_context
        self.device = torch.device(device)
        self.draft_config = draft_config or triton_draft.DraftConfig()
        self.verify_config = verify_config or triton_verify.VerifyConfig()
        self.select_config = select_config or triton_select.SelectConfig()
        self.num_sms = 4
        if self.device.type == "cuda":
            self.num_sms = torch.cuda.get_device_properties(self.device).multi_processor_count
        self._part_o = torch.empty(0, dtype=torch.float32, device=self.device)
        self._part_lse = torch.empty(0, dtype=torch.float32, device=self.device)
        self._reserve(max_batch)

    def _draft_splits(self, batch: int) -> int:
        entries = self.capacity + 2 * self.window
        return triton_draft.draft_num_splits(
            batch * self.num_kv_heads, entries, self.num_sms, self.draft_config
        )

    def _verify_splits(self, batch: int) -> int:
        return triton_verify.verify_num_splits(
            batch * self.num_kv_heads, self.max_context, self.num_sms, self.verify_config
        )

    def _reserve(self, max_batch: int) -> None:
        """Scratch for every batch size up to ``max_batch``: partial outputs and log-sum-exps of the splits."""
        outputs, rows = 1, 1
        for batch in range(1, max_batch + 1):
            draft, verify = self._draft_splits(batch), self._verify_splits(batch)
            draft_rows = batch * self.num_q_heads * draft
            verify_rows = batch * self.num_q_heads * self.window * verify
            rows = max(rows, draft_rows, verify_rows)
            outputs = max(outputs, draft_rows if draft > 1 else 0, verify_rows if verify > 1 else 0)
        if rows > self._part_lse.numel():
            self._part_lse = torch.empty(rows, dtype=torch.float32, device=self.device)
        if outputs * self.head_dim > self._part_o.numel():
            self._part_o = torch.empty(outputs * self.head_dim, dtype=torch.float32, device=self.device)
        self.max_batch = max_batch

    def _fit(self, batch: int) -> None:
        # Growing would leave captured graphs with freed scratch, so they must have been captured with max_batch in
        # mind; a larger eager batch (a prefill) may still come.
        if batch > self.max_batch:
            if self.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
                raise ValueError(f"batch {batch} exceeds max_batch {self.max_batch} during CUDA graph capture")
            old = (self._part_o, self._part_lse)
            self._reserve(batch)
            self._kept = [*getattr(self, "_kept", []), *old]

    def scratch_bytes(self) -> int:
        """Device memory held by the scratch buffers."""
        return 4 * (self._part_o.numel() + self._part_lse.numel())

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
        """See :meth:`interface.PillarKernels.draft_attention`."""
        batch = seq_lens.shape[0]
        self._fit(batch)
        triton_draft.draft_attention(
            q,
            k_cache,
            v_cache,
            positions,
            num_selected,
            tail_start,
            req_to_token,
            req_pool_indices,
            seq_lens,
            scaling,
            out,
            lse,
            self._part_o,
            self._part_lse,
            self._draft_splits(batch),
            self.draft_config,
        )

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
    ) -> None:
        """See :meth:`interface.PillarKernels.verify_attention`.

        With ``lse_hint`` the scores come out of the one pass over K and V, scaled per row by exp(LSE - hint); without,
        a second pass over K makes them exact.
        """
        self._check_window(window)
        batch = seq_lens.shape[0]
        self._fit(batch)
        triton_verify.verify_attention(
            q,
            k_cache,
            v_cache,
            req_to_token,
            req_pool_indices,
            seq_lens,
            window,
            scaling,
            out,
            scores,
            lse_hint,
            self._part_o,
            self._part_lse,
            self._verify_splits(batch),
            self.verify_config,
        )

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
        """See :meth:`interface.PillarKernels.prefill_scores`; two passes over K."""
        self._check_window(window)
        batch = seq_lens.shape[0]
        self._fit(batch)
        triton_verify.prefill_scores(
            q,
            k_cache,
            req_to_token,
            req_pool_indices,
            seq_lens,
            extend_start_loc,
            extend_lens,
            window,
            scaling,
            scores,
            self._part_lse,
            self._verify_splits(batch),
            self.verify_config,
        )

    def select(
        self,
        scores: torch.Tensor,
        lengths: torch.Tensor,
        req_pool_indices: torch.Tensor,
        counts: torch.Tensor,
        positions: torch.Tensor,
    ) -> None:
        """See :meth:`interface.PillarKernels.select`; ties go to the lowest positions."""
        triton_select.select(scores, lengths, req_pool_indices, counts, positions, self.select_config)

    def _check_window(self, window: int) -> None:
        if window > self.window:
            raise ValueError(f"window {window} exceeds the {self.window} rows this instance was built for")
