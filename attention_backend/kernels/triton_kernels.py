"""PillarAttn in Triton, for CUDA: :class:`interface.PillarKernels` by the launches of the ``triton_*`` modules.

Scratch memory is allocated in the constructor, and every launch grid depends only on the batch size. So runs can be captured
in CUDA graphs: they neither synchronise nor read lengths on the host.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sglang_sparsespec.attention_backend.kernels import (
    triton_draft,
    triton_prefill_scores,
    triton_select,
    triton_verify,
)
from sglang_sparsespec.attention_backend.kernels.interface import DraftAttention, KernelShape, LayerKV
from sglang_sparsespec.attention_backend.kernels.triton_common import LN2, MAX_ROWS, Scratch, has_early_start
from sglang_sparsespec.attention_backend.kernels.triton_prefill_scores import Windows
from sglang_sparsespec.attention_backend.page_table import SelectionTable
from sglang_sparsespec.attention_backend.sliding_window import WindowView

SUPPORTED_HEAD_DIMS = (64, 128, 256)


@dataclass(frozen=True)
class TritonDraft:
    """See :class:`interface.DraftAttention`."""

    kernels: TritonKernels
    rows: torch.Tensor
    seq_lens: torch.Tensor

    def run(self, q: torch.Tensor, kv: LayerKV, out: torch.Tensor, lse: torch.Tensor | None = None) -> None:
        kernels, batch = self.kernels, self.rows.shape[0]
        triton_draft.draft_attention(
            q=q,
            kv=kv,
            table=kernels.table,
            positions=kernels.table.positions[kv.index],
            req_to_token=kernels.req_to_token,
            rows=self.rows,
            seq_lens=self.seq_lens,
            out=out,
            lse=lse,
            scratch=kernels.scratch,
            splits=kernels.draft_splits(batch),
            config=kernels.draft_config(batch),
            pdl=kernels.pdl,
        )


@dataclass(frozen=True)
class TritonVerify:
    """See :class:`interface.VerifyAttention`. Without a hint a pass over K finds the exact log-sum-exps first.

    Attributes:
        view: of a layer with a sliding window, whose rows the windows name; None for full attention.
    """

    kernels: TritonKernels
    windows: Windows
    view: WindowView | None = None

    def run(
        self,
        q: torch.Tensor,
        kv: LayerKV,
        out: torch.Tensor,
        scores: torch.Tensor | None = None,
        lse_hint: torch.Tensor | None = None,
        lse: torch.Tensor | None = None,
    ) -> None:
        kernels, windows = self.kernels, self.windows
        req_to_token = kernels.req_to_token if self.view is None else self.view.slots
        reach = None if self.view is None else self.view.reach
        if lse_hint is None:
            parts = kernels.window_lse(q, kv, windows, req_to_token, reach)
            lse_hint = torch.logsumexp(parts * LN2.value, dim=0)
            if kv.sinks is not None:
                lse_hint = torch.logaddexp(lse_hint, kv.sinks.float())
        triton_verify.verify_attention(
            q=q,
            kv=kv,
            req_to_token=req_to_token,
            rows=windows.rows,
            lengths=windows.seq_lens,
            window=windows.size,
            out=out,
            scores=scores,
            lse_hint=lse_hint,
            lse=lse,
            scratch=kernels.scratch,
            programs=kernels.verify_programs,
            max_batch=kernels.max_batch,
            config=kernels.verify_config,
            pdl=kernels.pdl,
            reach=reach,
        )


@dataclass(frozen=True)
class TritonSlidingStep:
    """One query per request in a layer with a sliding window: draft attention of a tail that begins with the window."""

    kernels: TritonKernels
    rows: torch.Tensor
    seq_lens: torch.Tensor
    view: WindowView

    def run(
        self,
        q: torch.Tensor,
        kv: LayerKV,
        out: torch.Tensor,
        scores: torch.Tensor | None = None,
        lse_hint: torch.Tensor | None = None,
        lse: torch.Tensor | None = None,
    ) -> None:
        """See :class:`interface.VerifyAttention`. There are no scores, and hints are not needed."""
        assert scores is None
        kernels, batch = self.kernels, self.rows.shape[0]
        triton_draft.draft_attention(
            q=q,
            kv=kv,
            table=kernels.no_selections,
            positions=kernels.no_selections.positions[0],
            req_to_token=self.view.slots,
            rows=self.rows,
            seq_lens=self.seq_lens,
            out=out,
            lse=lse,
            scratch=kernels.scratch,
            splits=kernels.draft_splits(batch),
            config=kernels.draft_config(batch),
            pdl=kernels.pdl,
        )


@dataclass(frozen=True)
class TritonPrefillScores:
    """See :class:`interface.PrefillScores`; two passes over K."""

    kernels: TritonKernels
    windows: Windows

    def run(self, q: torch.Tensor, kv: LayerKV, scores: torch.Tensor) -> None:
        kernels = self.kernels
        triton_prefill_scores.window_scores(
            q=q,
            kv=kv,
            req_to_token=kernels.req_to_token,
            windows=self.windows,
            lse2=kernels.window_lse(q, kv, self.windows, kernels.req_to_token),
            scores=scores,
            splits=kernels.scores_splits(self.windows.rows.shape[0]),
            config=kernels.scores_config,
        )


@dataclass(frozen=True)
class TritonSelection:
    """See :class:`interface.Selection`; ties go to the lowest positions."""

    kernels: TritonKernels
    rows: torch.Tensor
    lengths: torch.Tensor
    counts: torch.Tensor

    def run(self, scores: torch.Tensor, layer_index: int) -> None:
        table = self.kernels.table
        triton_select.select(
            scores=scores,
            rows=self.rows,
            lengths=self.lengths,
            counts=self.counts,
            positions=table.positions[layer_index],
            remembered=triton_select.Remembered(table.scores[layer_index], table.num_remembered, table.memory),
            config=self.kernels.select_config,
            pdl=self.kernels.pdl,
        )


class TritonKernels:
    """Triton implementation of :class:`interface.PillarKernels`.

    Args:
        shape: head_dim 64, 128 or 256; window times query heads per KV head at most 256.
        table: selections that drafts read and selection writes.
        req_to_token: int32 [rows, context], the slot of each position.
        early_start: let kernels start while the one before them on their stream still runs. Not where events from another
            stream are what they wait for.
        draft_config, verify_config, select_config, scores_config: launch parameters, for benchmarks; the defaults were
            measured on an H100.

    Raises:
        ValueError: a shape that the kernels do not have.

    Attributes:
        max_batch: requests that the scratch is made for.
        pdl: whether kernels start while the one before them still runs (programmatic dependent launch).
    """

    name = "triton"
    #: Scores are compared, not summed: 16 bits rank 32K positions well, and halve what selection reads.
    score_dtype = torch.float16
    uses_lse_hints = True

    def __init__(
        self,
        shape: KernelShape,
        table: SelectionTable,
        req_to_token: torch.Tensor,
        *,
        early_start: bool = True,
        draft_config: triton_draft.DraftConfig | None = None,
        verify_config: triton_verify.VerifyConfig | None = None,
        select_config: triton_select.SelectConfig | None = None,
        scores_config: triton_prefill_scores.ScoresConfig | None = None,
    ) -> None:
        if shape.head_dim not in SUPPORTED_HEAD_DIMS:
            raise ValueError(f"head_dim {shape.head_dim} is not supported; expected one of {SUPPORTED_HEAD_DIMS}")
        if shape.window * shape.group > MAX_ROWS:
            raise ValueError(
                f"window {shape.window} x {shape.group} query heads per KV head exceeds {MAX_ROWS} packed rows;"
                " use fewer draft tokens"
            )
        self.shape = shape
        self.table = table
        self.req_to_token = req_to_token
        self.device = req_to_token.device
        self._draft_config = draft_config
        self.verify_config = verify_config or triton_verify.VerifyConfig()
        self.select_config = select_config or triton_select.SelectConfig()
        self.scores_config = scores_config or triton_prefill_scores.ScoresConfig()
        self.num_sms = 4
        if self.device.type == "cuda":
            self.num_sms = torch.cuda.get_device_properties(self.device).multi_processor_count
        self.pdl = early_start and has_early_start(self.device)
        self._outgrown: list[tuple[Scratch, SelectionTable, torch.Tensor]] = []
        self._reserve(shape.max_batch)

    # -------------------------------------------------------------------- plans

    def plan_draft(self, rows: torch.Tensor, seq_lens: torch.Tensor) -> DraftAttention:
        """See :meth:`interface.PillarKernels.plan_draft`."""
        self._fit(rows.shape[0])
        return TritonDraft(self, rows, seq_lens)

    def plan_verify(self, rows: torch.Tensor, lengths: torch.Tensor, window: int) -> TritonVerify:
        """See :meth:`interface.PillarKernels.plan_verify`."""
        self._check_window(window)
        self._fit(rows.shape[0])
        return TritonVerify(self, Windows(rows, lengths, window))

    def plan_sliding(self, view: WindowView, window: int) -> TritonVerify | TritonSlidingStep:
        """See :meth:`interface.PillarKernels.plan_sliding`."""
        self._check_window(window)
        batch = view.lengths.shape[0]
        self._fit(batch)
        rows = self._places[:batch]
        if window == 1:
            return TritonSlidingStep(self, rows, view.lengths + 1, view)
        return TritonVerify(self, Windows(rows, view.lengths, window), view)

    def plan_prefill_scores(
        self,
        rows: torch.Tensor,
        seq_lens: torch.Tensor,
        starts: torch.Tensor,
        extend_lens: torch.Tensor,
        window: int,
    ) -> TritonPrefillScores:
        """See :meth:`interface.PillarKernels.plan_prefill_scores`."""
        self._check_window(window)
        self._fit(rows.shape[0])
        return TritonPrefillScores(self, Windows(rows, seq_lens, window, (starts, extend_lens)))

    def plan_selection(self, rows: torch.Tensor, lengths: torch.Tensor, counts: torch.Tensor) -> TritonSelection:
        """See :meth:`interface.PillarKernels.plan_selection`."""
        return TritonSelection(self, rows, lengths, counts)

    def _check_window(self, window: int) -> None:
        if window > self.shape.window:
            raise ValueError(f"window {window} exceeds the {self.shape.window} rows this instance was built for")

    # --------------------------------------------------------- launch parameters

    def draft_config(self, batch: int) -> triton_draft.DraftConfig:
        """Launch parameters of draft attention: those given, or the default ones for the batch."""
        return self._draft_config or triton_draft.default_config(batch * self.shape.num_kv_heads, self.num_sms)

    def draft_splits(self, batch: int) -> int:
        """Programs per (request, KV head) of draft attention."""
        pairs, config = batch * self.shape.num_kv_heads, self.draft_config(batch)
        return triton_draft.draft_num_splits(pairs, self.shape.longest_list, self.num_sms, config)

    def scores_splits(self, batch: int) -> int:
        """Programs per (request, KV head) of the passes over K."""
        pairs, longest = batch * self.shape.num_kv_heads, self.req_to_token.shape[1]
        return triton_prefill_scores.scores_num_splits(pairs, longest, self.num_sms, self.scores_config)

    @property
    def verify_programs(self) -> int:
        """Programs per KV head of verification."""
        return triton_verify.verify_num_programs(self.shape.num_kv_heads, self.num_sms, self.verify_config)

    def window_lse(
        self, q: torch.Tensor, kv: LayerKV, windows: Windows, req_to_token: torch.Tensor, reach: int | None = None
    ) -> torch.Tensor:
        """See :func:`triton_prefill_scores.window_lse`."""
        return triton_prefill_scores.window_lse(
            q=q,
            kv=kv,
            req_to_token=req_to_token,
            windows=windows,
            part_lse=self.scratch.part_lse,
            splits=self.scores_splits(windows.rows.shape[0]),
            config=self.scores_config,
            reach=reach,
        )

    # ------------------------------------------------------------------ scratch

    def _reserve(self, max_batch: int) -> None:
        """Scratch for every batch size up to ``max_batch``, shared by the kernels: they run one after another."""
        shape = self.shape
        # Verification's parts do not depend on the batch: two for each program.
        outputs = sums = 2 * shape.num_q_heads * shape.window * self.verify_programs
        for batch in range(1, max_batch + 1):
            splits = self.draft_splits(batch)
            draft_parts = batch * shape.num_q_heads * splits if splits > 1 else 0
            outputs = max(outputs, draft_parts)
            sums = max(sums, draft_parts, batch * shape.num_q_heads * shape.window * self.scores_splits(batch))
        self.scratch = Scratch(
            torch.empty(outputs * shape.head_dim, dtype=torch.float32, device=self.device),
            torch.empty(sums, dtype=torch.float32, device=self.device),
            torch.zeros(max_batch * shape.num_kv_heads, dtype=torch.int32, device=self.device),
        )
        # A view's rows are its requests, and nothing is selected of it.
        self.no_selections = SelectionTable(1, max_batch, shape.num_kv_heads, 1, self.device)
        self._places = torch.arange(max_batch, device=self.device)
        self.max_batch = max_batch

    def _fit(self, batch: int) -> None:
        """Grow the scratch for an eager batch larger than ``max_batch``, such as a prefill.

        Raises:
            ValueError: a CUDA graph is being captured.
        """
        if batch <= self.max_batch:
            return
        self._refuse_to_capture(batch)
        # Graphs captured before go on using the old buffers.
        self._outgrown.append((self.scratch, self.no_selections, self._places))
        self._reserve(batch)

    def _refuse_to_capture(self, batch: int) -> None:
        """Raise ``ValueError`` if a CUDA graph is being captured: ``batch`` needs memory that would belong to it."""
        if self.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise ValueError(f"batch {batch} exceeds max_batch {self.shape.max_batch} during CUDA graph capture")

    def scratch_bytes(self) -> int:
        """Device memory held by the scratch buffers."""
        return sum(scratch.nbytes for scratch in [self.scratch, *(outgrown[0] for outgrown in self._outgrown)])
