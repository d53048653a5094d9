"""The sparse page table: which tokens each (layer, request, KV head) drafts with.

One entry is one token (page size 1). Entries are logical positions in the request, not
slots of the KV pool: slots change when the radix cache de-duplicates a prefix or when a
request is moved, positions do not. Kernels translate through SGLang's ``req_to_token``.

A draft query at position p attends to the selected positions of its (layer, KV head) and
to the tail [tail_start, p]: the tokens of the last verify window and the drafts since. So
the newest tokens are always in, and selecting needs not know what was accepted.
"""

from __future__ import annotations

import math

import torch


class SelectionTable:
    """Selected positions of all requests.

    Attributes:
        positions: int32 [layers, rows, kv_heads, capacity], ascending; the first
            ``num_selected[row]`` are valid.
        num_selected: int32 [rows].
        tail_start: int32 [rows].
        memory: share of the scores that positions were selected by before, which is added to their new scores.
        scores: float16, shape of ``positions``; of each selected position what it was selected by. Empty without a memory.
        num_remembered: int32 [rows]; so many positions and scores of the selection before count when the next is made.

    Rows are SGLang's ``req_pool_indices``; row 0 is its padding row.
    """

    def __init__(
        self,
        num_layers: int,
        num_rows: int,
        num_kv_heads: int,
        capacity: int,
        device: torch.device | str,
        memory: float = 0.0,
    ) -> None:
        shape = (num_layers, num_rows, num_kv_heads, capacity)
        self.memory = memory
        self.positions = torch.zeros(shape, dtype=torch.int32, device=device)
        self.num_selected = torch.zeros(num_rows, dtype=torch.int32, device=device)
        self.tail_start = torch.zeros(num_rows, dtype=torch.int32, device=device)
        self.scores = torch.zeros(shape if memory else (num_layers, 0), dtype=torch.float16, device=device)
        self.num_remembered = torch.zeros(num_rows, dtype=torch.int32, device=device)

    @staticmethod
    def capacity_for(max_context: int, budget_ratio: float, min_budget: int) -> int:
        """Entries per list so that no request of ``max_context`` tokens overflows."""
        return min(max_context, max(min_budget, math.ceil(budget_ratio * max_context)))

    @property
    def nbytes(self) -> int:
        """Device memory that the table takes, in bytes."""
        tensors = (self.positions, self.scores, self.num_selected, self.num_remembered, self.tail_start)
        return sum(tensor.nbytes for tensor in tensors)

    def begin_selection(
        self, rows: torch.Tensor, num_selected: torch.Tensor, tail_start: torch.Tensor, remember: bool = False
    ) -> None:
        """Start a new selection for ``rows``: its size and where its tail begins (int [batch] each).

        Args:
            remember: the selection before is the same requests', and its scores count.
        """
        self.num_remembered[rows] = self.num_selected[rows] if remember else 0
        self.num_selected[rows] = num_selected.to(torch.int32)
        self.tail_start[rows] = tail_start.to(torch.int32)

    def bound_tails(self, rows: torch.Tensor, lengths: torch.Tensor, longest_list: int) -> None:
        """Let the tails of ``rows`` begin later where a draft query would attend to more than ``longest_list`` tokens.

        Args:
            rows: int [batch], each at most once.
            lengths: int [batch], tokens that the next draft queries see.
        """
        longest_tail = longest_list - self.num_selected[rows]
        earliest = (lengths - longest_tail).to(torch.int32)
        self.tail_start[rows] = torch.maximum(self.tail_start[rows], earliest)


def num_selected(
    lengths: torch.Tensor, budget_ratio: float, min_budget: int | torch.Tensor, window: int, capacity: int
) -> torch.Tensor:
    """How many positions of [0, length) to select (int32, shape of ``lengths``).

    The budget max(min_budget, ceil(ratio * length)) includes the tail, counted as one
    verify window; a budget that covers the whole length selects all of it.
    """
    budget = torch.ceil(lengths * budget_ratio).clamp(min=min_budget)
    count = torch.where(budget >= lengths, lengths.to(budget.dtype), budget - window)
    return count.clamp(min=0, max=capacity).to(torch.int32)
