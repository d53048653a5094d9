"""Draws straight from logits (``triton_sampling``): which requests they are for, and the calls of a round.

On CUDA, requests that sample are drafted and accepted from logits, and greedy ones beside them, but for two kinds that go
through distributions: seeded ones (SGLang's seeded sampler is a function of probabilities) and those with a min-p, which
the kernels do not know.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sglang.srt.managers.schedule_batch import Req
    from sglang.srt.sampling.sampling_batch_info import SamplingBatchInfo

    from sglang_sparsespec.sampling import SamplingRows


class LogitDraws:
    """Draws of one round, each with a seed of its own.

    Args:
        info, reqs: the batch's.
        count: draws of the round, of drafts and of acceptances.
    """

    def __init__(self, info: SamplingBatchInfo, reqs: Sequence[Req], count: int) -> None:
        from sglang_sparsespec import triton_sampling  # the CPU needs no Triton

        self._kernels = triton_sampling
        self._has_filters = has_filters(info, reqs)
        self._seeds = triton_sampling.round_seeds(count, info.temperatures.device)

    @classmethod
    def of(cls, use_triton: bool, info: SamplingBatchInfo, reqs: Sequence[Req], count: int) -> LogitDraws | None:
        """None if the batch is drawn otherwise as a whole. (A min-p is up to the caller: :func:`with_min_p`.)"""
        if not use_triton or info.is_all_greedy or info.sampling_seed is not None:
            return None
        return cls(info, reqs, count)

    def draft(
        self,
        logits: torch.Tensor,
        rows: SamplingRows,
        number: int,
        kept: torch.Tensor,
        lse: torch.Tensor,
        slots: torch.Tensor | None,
    ) -> torch.Tensor:
        """The round's draw ``number``: draft tokens. See ``triton_sampling.draft``."""
        return self._kernels.draft(
            logits, rows.temperatures, rows.top_ks, self._seeds, number, kept, lse, slots=slots, top_ps=self._top_ps(rows)
        )

    def accept(
        self,
        candidates: torch.Tensor,
        logits: torch.Tensor,
        rows: SamplingRows,
        number: int,
        kept: torch.Tensor,
        lse: torch.Tensor,
        kept_rows: torch.Tensor | None,
        num_drafted: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The round's draw ``number``: acceptance. ``rows``: one per request. See ``triton_sampling.accept``."""
        return self._kernels.accept(
            candidates, logits, rows.temperatures, rows.top_ks, kept, lse, self._seeds[number : number + 1],
            rows=kept_rows, num_drafted=num_drafted, top_ps=self._top_ps(rows),
        )  # fmt: skip

    def _top_ps(self, rows: SamplingRows) -> torch.Tensor | None:
        return rows.top_ps if self._has_filters else None


def has_filters(info: SamplingBatchInfo, reqs: Sequence[Req]) -> bool:
    """Whether a request that samples has a top-k or a top-p.

    SGLang's flags of the batch cannot tell: a greedy request is a top-k of 1 to them.
    """
    if not (info.need_top_k_sampling or info.need_top_p_sampling):
        return False
    from sglang.srt.sampling.sampling_params import TOP_K_ALL

    params = (req.sampling_params for req in reqs)
    return any(p.top_k != 1 and (p.top_k != TOP_K_ALL or p.top_p != 1.0) for p in params)


def with_min_p(info: SamplingBatchInfo, reqs: Sequence[Req]) -> list[Req]:
    """The requests that sample with a min-p; a greedy one's has no effect."""
    if not info.need_min_p_sampling:
        return []
    return [req for req in reqs if req.sampling_params.top_k != 1 and req.sampling_params.min_p > 0]
