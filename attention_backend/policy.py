"""Selection policies other than scores: position patterns over the committed tokens."""

from __future__ import annotations

import torch


def write_pattern(
    lengths: torch.Tensor,
    counts: torch.Tensor,
    req_pool_indices: torch.Tensor,
    num_sinks: int,
    positions: torch.Tensor,
) -> None:
    """Select the first ``num_sinks`` and the newest positions of [0, length).

    ``num_sinks`` 0 is the sliding window; StreamingLLM and MagicDec keep 4 or more.

    Args:
        lengths, counts, req_pool_indices: int [B].
        positions: int32 [layers, rows, kv_heads, capacity]; the rows' lists are written,
            entries past ``counts`` with values that are never read.
    """
    capacity = positions.shape[-1]
    index = torch.arange(capacity, device=positions.device).unsqueeze(0)
    newest = index + (lengths - counts).unsqueeze(1)
    pattern = torch.where(index < num_sinks, index, newest).clamp(min=0).to(positions.dtype)
    positions[:, req_pool_indices.long()] = pattern[None, :, None, :]
