"""PillarAttn kernels on CUDA: Triton implementation of :class:`interface.PillarKernels`.

Scratch memory is allocated in the constructor and every launch grid depends only on the batch size, so the
methods can be captured in CUDA graphs: they neither synchronise nor read lengths on the host.
"""

from __future__ import annotations

import torch

from sglang_sparsespec.attention_backend import triton_draft, triton_prefill_scores, triton_select, triton_verify
from sglang_sparsespec.attention_backend.triton_common import LN2, MAX_ROWS

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
        longest_list: most tokens that a draft step attends to (sets how far a list may be split); None: a full
            selection and the tail of two windows.
        early_start: kernels may start while the one before them runs. Not where draft attention follows a selection
            without another kernel in between.
        draft_config, verify_config, select_config, scores_config: launch parameters; the defaults were measured on an
            H100.
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
        longest_list: int | None = None,
        early_start: bool = True,
        draft_config: triton_draft.DraftConfig | None = None,
        verify_config: triton_verify.VerifyConfig | None = None,
        select_config: triton_select.SelectConfig | None = None,
        scores_config: triton_prefill_scores.ScoresConfig | None = None,
    ) -> None:
        if head_dim not in SUPPORTED_HEAD_DIMS:
            raise ValueError(f"head_dim {head_dim} is not supported; expected one of {SUPPORTED_HEAD_DIMS}")
        if num_q_heads % num_kv_heads != 0:
            raise ValueError(f"{num_q_heads} query heads are not a multiple of {num_kv_heads} KV heads")
        self.group = num_q_heads // num_kv_heads
        if window * self.group > MAX_ROWS:
            raise ValueError(
                f"window {window} x {self.group} query heads per KV head exceeds {MAX_ROWS} packed rows;"
                " use fewer draft tokens"
            )
        self.num_q_heads = num_q_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        self.window = window
        self.capacity = capacity
        self.max_context = max_context
        self.longest_list = longest_list if longest_list is not None else capacity + 2 * window
        self.device = torch.device(device)
        self._draft_config = draft_config
        self.verify_config = verify_config or triton_verify.VerifyConfig()
        self.select_config = select_config or triton_select.SelectConfig()
        self.scores_config = scores_config or triton_prefill_scores.ScoresConfig()
        self.num_sms, self.pdl = 4, False
        if self.device.type == "cuda":
            properties = torch.cuda.get_device_properties(self.device)
            self.num_sms = properties.multi_processor_count
            # Programmatic dependent launch: a kernel's programs start before the kernel before it has ended.
            self.pdl = early_start and properties.major >= 9
        self.verify_programs = triton_verify.verify_num_programs(num_kv_heads, self.num_sms, self.verify_config)
        self._outgrown: list[torch.Tensor] = []
        self._reserve(max_batch)

    def draft_config(self, batch: int) -> triton_draft.DraftConfig:
        """Launch parameters of draft attention: those given, or the default ones for the batch."""
        return self._draft_config or triton_draft.default_config(batch * self.num_kv_heads, self.num_sms)

    def draft_splits(self, batch: int) -> int:
        """Programs per (request, KV head) of draft attention."""
        pairs, config = batch * self.num_kv_heads, self.draft_config(batch)
        return triton_draft.draft_num_splits(pairs, self.longest_list, self.num_sms, config)

    def scores_splits(self, batch: int) -> int:
        """Programs per (request, KV head) of the passes over K."""
        pairs = batch * self.num_kv_heads
        return triton_prefill_scores.scores_num_splits(pairs, self.max_context, self.num_sms, self.scores_config)

    def _reserve(self, max_batch: int) -> None:
        """Scratch for every batch size up to ``max_batch``, shared by the kernels: they run one after another."""
        # Verification's parts do not depend on the batch: two for each program.
        outputs = rows = 2 * self.num_q_heads * self.window * self.verify_programs
        for batch in range(1, max_batch + 1):
            splits = self.draft_splits(batch)
            draft_rows = batch * self.num_q_heads * splits if splits > 1 else 0
            outputs = max(outputs, draft_rows)
            rows = max(rows, draft_rows, batch * self.num_q_heads * self.window * self.scores_splits(batch))
        self._part_o = torch.empty(outputs * self.head_dim, dtype=torch.float32, device=self.device)
        self._part_lse = torch.empty(rows, dtype=torch.float32, device=self.device)
        # Parts of each (request, KV head) that are done; zero between launches.
        self._arrived = torch.zeros(max_batch * self.num_kv_heads, dtype=torch.int32, device=self.device)
        self.max_batch = max_batch

    def _scratch(self) -> list[torch.Tensor]:
        return [self._part_o, self._part_lse, self._arrived]

    def _fit(self, batch: int) -> None:
        """Grow the scratch for an eager batch larger than ``max_batch``, such as a prefill.

        Raises:
            ValueError: a CUDA graph is being captured.
        """
        if batch > self.max_batch:
            if self.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
                raise ValueError(f"batch {batch} exceeds max_batch {self.max_batch} during CUDA graph capture")
            # Graphs captured before go on using the old buffers.
            self._outgrown += self._scratch()
            self._reserve(batch)

    def scratch_bytes(self) -> int:
        """Device memory held by the scratch buffers."""
        return sum(buffer.nbytes for buffer in [*self._scratch(), *self._outgrown])

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
            self._arrived,
            self.draft_splits(batch),
            self.draft_config(batch),
            self.pdl,
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
        lse: torch.Tensor | None = None,
    ) -> None:
        """See :meth:`interface.PillarKernels.verify_attention`.

        With ``lse_hint`` attention and scores take one pass over K and V, and the scores are scaled per row by
        exp(LSE - hint); without, a pass over K finds the exact log-sum-exps first.
        """
        self._check_window(window)
        self._fit(seq_lens.shape[0])
        if lse_hint is None:
            lse_hint = self._exact_lse(q, k_cache, req_to_token, req_pool_indices, seq_lens, window, scaling)
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
            self.verify_programs,
            self.max_batch,
            self.verify_config,
            self.pdl,
            lse,
        )

    def _exact_lse(
        self,
        q: torch.Tensor,
        k_cache: torch.Tensor,
        req_to_token: torch.Tensor,
        req_pool_indices: torch.Tensor,
        seq_lens: torch.Tensor,
        window: int,
        scaling: float,
    ) -> torch.Tensor:
        """float32 [B, W, Hq]: natural log-sum-exp of every row of the verify windows."""
        parts = triton_prefill_scores.window_lse(
            q,
            k_cache,
            req_to_token,
            req_pool_indices,
            seq_lens,
            None,
            window,
            scaling,
            self._part_lse,
            self.scores_splits(seq_lens.shape[0]),
            self.scores_config,
        )
        return torch.logsumexp(parts * LN2.value, dim=0)

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
        splits, extend = self.scores_splits(batch), (extend_start_loc, extend_lens)
        args = (q, k_cache, req_to_token, req_pool_indices, seq_lens, extend, window, scaling)
        parts = triton_prefill_scores.window_lse(*args, self._part_lse, splits, self.scores_config)
        triton_prefill_scores.window_scores(*args, parts, scores, splits, self.scores_config)

    def select(
        self,
        scores: torch.Tensor,
        lengths: torch.Tensor,
        req_pool_indices: torch.Tensor,
        counts: torch.Tensor,
        positions: torch.Tensor,
        lookahead: int = 0,
    ) -> None:
        """See :meth:`interface.PillarKernels.select`; ties go to the lowest positions."""
        triton_select.select(
            scores, lengths, req_pool_indices, counts, positions, self.select_config, self.pdl, lookahead
        )

    def _check_window(self, window: int) -> None:
        if window > self.window:
            raise ValueError(f"window {window} exceeds the {self.window} rows this instance was built for")
