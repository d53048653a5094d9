"""What layers with a sliding window attend to: the last tokens before each query, in every kind of forward.

Nothing is selected for these layers, and their tokens get no scores: what a window leaves out the model itself leaves out.
SGLang may keep their keys and values in a pool of their own (``SWAKVPool``), whose slots it frees behind the window. Its
table from slots of the full pool to slots of that pool is read anew for every forward.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class WindowView:
    """The tokens of requests that queries of one forward can see, in layers with a sliding window.

    Attributes:
        slots: int32 [B, reach + W], KV slots of those layers: of the tokens from the first visible one on.
        lengths: int64 [B], how many of them come before the first query (0 for padding).
        reach: tokens before a query's own that it sees.
    """

    slots: torch.Tensor
    lengths: torch.Tensor
    reach: int


class SlidingWindow:
    """The window that all such layers of a model share.

    Args:
        reach: tokens before a query's own that it sees: ``RadixAttention.sliding_window_size``.
        req_to_token: int32 [rows, context], the slot of each position.
        pool: SGLang's KV pool.
        most_queries: W, of one request in one forward.
    """

    def __init__(self, reach: int, req_to_token: torch.Tensor, pool: Any, most_queries: int) -> None:
        self.reach = reach
        self._req_to_token = req_to_token
        self._offsets = torch.arange(reach + most_queries, device=req_to_token.device)
        # Only if these layers have slots of their own.
        self._pool: Any = pool if hasattr(pool, "translate_loc_from_full_to_swa") else None

    @property
    def slot_table(self) -> torch.Tensor | None:
        """int64 [slots of the full pool + 1]: SGLang's table of the slots of these layers; None if they share the pool."""
        return self._pool.full_to_swa_index_mapping if self._pool is not None else None

    def slots_of(self, slots: torch.Tensor) -> torch.Tensor | None:
        """The slots of these layers (int64) for ``slots`` of the full pool; None if they share the pool."""
        return self._pool.translate_loc_from_full_to_swa(slots) if self._pool is not None else None

    def view(self, rows: torch.Tensor, lengths: torch.Tensor, num_queries: int) -> WindowView:
        """What ``num_queries`` queries of each request see. Recordable.

        Args:
            rows: int [B], of ``req_to_token``.
            lengths: int [B], tokens before the first query; at most 0 for padding.
        """
        lengths = lengths.long().clamp(min=0)
        start = (lengths - self.reach).clamp(min=0)
        positions = start.unsqueeze(1) + self._offsets[: self.reach + num_queries]
        # Short requests have no tokens at the last places, and nobody reads those.
        positions = positions.clamp(max=self._req_to_token.shape[1] - 1)
        slots = self._req_to_token[rows.long().unsqueeze(1), positions]
        if self._pool is not None:
            slots = self._pool.translate_loc_from_full_to_swa(slots.long()).to(torch.int32)
        return WindowView(slots, lengths - start, self.reach)
