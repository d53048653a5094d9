"""Sampling parameters of logits rows, from SGLang's of a batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sglang.srt.managers.schedule_batch import Req
    from sglang.srt.sampling.sampling_batch_info import SamplingBatchInfo


@dataclass(frozen=True)
class RowParameters:
    """Sampling parameters, one entry per row of logits (or per request, where its rows are adjacent).

    Attributes:
        temperatures: float32 [rows, 1]; 1 for greedy rows.
        top_ks: int32 [rows]; 1 for greedy rows, at least the vocabulary's size for rows without a top-k.
        top_ps, min_ps: float32 [rows], 1 and 0 for rows without these filters; None if no row has a filter.
        seeds: int [rows] or None.
        is_all_greedy, need_min_p: of the batch that the rows belong to, as SGLang has them.
    """

    temperatures: torch.Tensor
    top_ks: torch.Tensor
    top_ps: torch.Tensor | None = None
    min_ps: torch.Tensor | None = None
    seeds: torch.Tensor | None = None
    is_all_greedy: bool = False
    need_min_p: bool = False

    @property
    def columns(self) -> tuple[torch.Tensor | None, ...]:
        """The temperatures and the filters."""
        return self.temperatures, self.top_ks, self.top_ps, self.min_ps

    @classmethod
    def of(
        cls,
        info: SamplingBatchInfo,
        repeats: int = 1,
        requests: torch.Tensor | None = None,
        has_filters: bool | None = None,
    ) -> RowParameters:
        """Expand the parameters of a batch's requests to ``repeats`` adjacent rows per request.

        Args:
            requests: int64 [requests], the batch's requests to take and their order; None: all.
            has_filters: whether a row has a filter (:func:`has_filters`); None: by SGLang's flags of the batch, to which
                a greedy request is a top-k of 1.
        """

        def expand(tensor: torch.Tensor | None) -> Any:
            if tensor is not None and requests is not None:
                tensor = tensor[requests]
            if tensor is None or repeats == 1:
                return tensor
            return torch.repeat_interleave(tensor, repeats, dim=0)

        if has_filters is None:
            has_filters = info.need_top_k_sampling or info.need_top_p_sampling or info.need_min_p_sampling
        return cls(
            temperatures=expand(info.temperatures),
            top_ks=expand(info.top_ks),
            top_ps=expand(info.top_ps) if has_filters else None,
            min_ps=expand(info.min_ps) if has_filters else None,
            seeds=expand(info.sampling_seed),
            is_all_greedy=info.is_all_greedy,
            need_min_p=info.need_min_p_sampling,
        )


def has_filters(info: SamplingBatchInfo, reqs: Sequence[Req]) -> bool:
    """Whether a request that samples has a top-k, a top-p or a min-p. A greedy request's filters have no effect.

    Args:
        reqs: the requests of the batch ``info``; not looked at if the batch's flags exclude filters.
    """
    if not (info.need_top_k_sampling or info.need_top_p_sampling or info.need_min_p_sampling):
        return False
    from sglang.srt.sampling.sampling_params import TOP_K_ALL

    params = (req.sampling_params for req in reqs)
    return any(p.top_k != 1 and (p.top_k != TOP_K_ALL or p.top_p != 1.0 or p.min_p > 0) for p in params)
