"""Drafting and acceptance of staggered windows: what drafts were drawn from is kept by row of ``req_to_token``.

A window's drafts are drawn in several forwards, of two rounds and beside other requests each time. How a request is
drawn therefore depends on nothing but its own parameters: those without min-p always from logits (``logit_draws``,
on CUDA), the others always through distributions, and no window has drafts of both kinds. What
decides for all requests together cannot change under a window either: seeds are the server's choice, a batch that is all
greedy has no requests that sample, and a greedy request's acceptance reads nothing that was kept.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from sglang_sparsespec import sampling
from sglang_sparsespec.logit_draws import LogitDraws, with_min_p

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req
    from sglang.srt.sampling.sampling_batch_info import SamplingBatchInfo

    from sglang_sparsespec.scheduler_patch.unified_schedule import StaggeredForward
    from sglang_sparsespec.unified_round import ForwardRows

logger = logging.getLogger(__name__)


class WindowSampler:
    """Draws drafts of staggered windows, keeps what they were drawn from, and accepts them.

    Args:
        num_rows: rows of ``req_to_token``.
        window: W.
        logits_dtype: see ``sampling.draft_logits_dtype``.
        use_triton: see ``LogitDraws``; requests with a min-p go through distributions.
    """

    def __init__(
        self, num_rows: int, window: int, logits_dtype: torch.dtype, use_triton: bool, device: torch.device
    ) -> None:
        self.logits_dtype = logits_dtype
        self.use_triton = use_triton
        self._shape = (num_rows, window - 1)
        self._window = window
        self._device = device
        self._with_min_p: frozenset[int] = frozenset()
        self._probs: torch.Tensor | None = None
        self._kept: torch.Tensor | None = None
        self._lse: torch.Tensor | None = None

    # --------------------------------------------------------------------- host

    def rows_with_min_p(self, info: SamplingBatchInfo, reqs: Sequence[Req]) -> frozenset[int]:
        """Rows of the requests that are drawn through distributions though others are not.

        They must stand last among the drafts and the verifications of each forward.
        """
        return frozenset(req.req_pool_idx for req in with_min_p(info, reqs)) if self.use_triton else frozenset()

    def begin_round(self, info: SamplingBatchInfo, reqs: Sequence[Req], with_min_p: frozenset[int]) -> None:
        """Sample with the batch's parameters from now on.

        Args:
            with_min_p: :meth:`rows_with_min_p` of the batch.
        """
        self._info = info
        self._with_min_p = with_min_p
        # Each forward draws drafts and acceptance.
        self._draws = LogitDraws.of(self.use_triton, info, reqs, 2 * self._window)

    def begin_forward(self, index: int, forward: StaggeredForward) -> None:
        """The round's ``index``-th forward comes next."""
        self._forward = index
        self._drafts_from_logits = self._without_min_p(forward.drafts)
        self._verified_from_logits = self._without_min_p(forward.verifications)

    def _without_min_p(self, entries: Sequence[tuple[int, int]]) -> int:
        """How many of the entries, which begin with them, are drawn from logits."""
        if self._draws is None:
            return 0
        return sum(row not in self._with_min_p for row, _ in entries) if self._with_min_p else len(entries)

    # ------------------------------------------------------------------- device

    def draw(
        self, rows: ForwardRows, index: torch.Tensor, positions: torch.Tensor, logits: torch.Tensor
    ) -> torch.Tensor:
        """Draft tokens of a forward, int64 [D].

        Args:
            rows: without padding.
            index: int64 [D], which of the batch's requests these are.
            positions: int64 [D], of the tokens that were fed.
            logits: [D, vocab].
        """
        count = self._drafts_from_logits
        drawn = []
        if count:
            slots = rows.draft_rows[:count] * self._shape[1] + rows.draft_offsets[:count]
            drawn.append(self._draw_from_logits(slots, index[:count], logits[:count]))
        if count < len(index):
            parameters = sampling.SamplingRows.of(self._info, index=index[count:])
            tokens, probs = sampling.sample_draft(logits[count:], parameters, positions[count:])
            if probs is not None:
                self._distributions(probs.shape[-1])[rows.draft_rows[count:], rows.draft_offsets[count:]] = probs
            drawn.append(tokens)
        return drawn[0] if len(drawn) == 1 else torch.cat(drawn)

    def accept(
        self,
        rows: ForwardRows,
        index: torch.Tensor,
        candidates: torch.Tensor,
        positions: torch.Tensor,
        logits: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Accept the drafts of a forward's windows.

        Args:
            rows: without padding.
            index: int64 [V], which of the batch's requests these are.
            candidates: int64 [V, W].
            positions: int64 [V, W].
            logits: [V * W, vocab] of the verification, after biases.

        Returns:
            tokens int64 [V, W] and accept_lens int32 [V], as ``sampling.accept``.
        """
        count, width = self._verified_from_logits, self._window
        accepted = []
        if count:
            accepted.append(self._accept_from_logits(
                rows.verify_rows[:count], rows.num_drafted[:count], index[:count], candidates[:count],
                logits[: count * width],
            ))  # fmt: skip
        if count < len(index):
            info = self._info
            by_rejection = not info.is_all_greedy and info.sampling_seed is None
            probs = self._distributions(logits.shape[-1])[rows.verify_rows[count:]] if by_rejection else None
            accepted.append(sampling.accept(
                candidates[count:], logits[count * width :], info, positions[count:].flatten(), probs, index[count:],
                rows.num_drafted[count:],
            ))  # fmt: skip
        if len(accepted) == 1:
            return accepted[0]
        tokens, accept_lens = zip(*accepted, strict=True)
        return torch.cat(tokens), torch.cat(accept_lens)

    def _draw_from_logits(self, slots: torch.Tensor, index: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        assert self._draws is not None
        kept, lse = self._logits(logits.shape[-1])
        parameters = sampling.SamplingRows.of(self._info, index=index)
        return self._draws.draft(logits, parameters, 2 * self._forward, kept, lse, slots)

    def _accept_from_logits(
        self,
        rows: torch.Tensor,
        num_drafted: torch.Tensor,
        index: torch.Tensor,
        candidates: torch.Tensor,
        logits: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        assert self._draws is not None
        kept, lse = self._logits(logits.shape[-1])
        parameters = sampling.SamplingRows.of(self._info, index=index)
        number = 2 * self._forward + 1
        return self._draws.accept(candidates, logits, parameters, number, kept, lse, rows, num_drafted)

    def _distributions(self, vocab_size: int) -> torch.Tensor:
        """What drafts were drawn from, float32 [rows, k, vocab]; made when a batch first needs them."""
        if self._probs is None:
            self._probs = torch.zeros((*self._shape, vocab_size), dtype=torch.float32, device=self._device)
            logger.info("The distributions of sampled drafts take %.2f GB.", self._probs.nbytes / 1e9)
        return self._probs

    def _logits(self, vocab_size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits [rows, k, vocab] that drafts were drawn from, and their sums [rows, k]; made when first needed."""
        if self._kept is None or self._lse is None:
            self._kept = torch.zeros((*self._shape, vocab_size), dtype=self.logits_dtype, device=self._device)
            self._lse = torch.zeros(self._shape, dtype=torch.float32, device=self._device)
            logger.info("The logits of sampled drafts take %.2f GB.", self._kept.nbytes / 1e9)
        return self._kept, self._lse
