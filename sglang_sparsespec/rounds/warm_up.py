"""Kernels of SGLang's that run outside of CUDA graphs and would be compiled while requests wait, compiled at start-up."""

from __future__ import annotations

import torch


def compile_slot_assignment(req_to_token: torch.Tensor, most_requests: int) -> None:
    """Compile the kernel that writes a round's KV slots into ``req_to_token``, on CUDA.

    SGLang launches it before every round, outside of CUDA graphs, and compiles it for each power of two that a batch
    grows to, and again for slots that do not begin at 16 bytes: a tenth of a second each, on a machine that has not
    compiled it before.

    Args:
        req_to_token: int32 [rows, context], of the pool; nothing is written.
        most_requests: of a batch.
    """
    from sglang.srt.mem_cache.allocation import assign_req_to_token_pool_func

    device, batch = req_to_token.device, 1
    free_slots = torch.zeros(2, dtype=torch.int64, device=device)
    while True:
        rows = torch.zeros(batch, dtype=torch.int64, device=device)
        nothing = rows.int()
        for slots in (free_slots, free_slots[1:]):
            assign_req_to_token_pool_func(rows, req_to_token, nothing, nothing, slots, batch)
        if batch >= most_requests:
            return
        batch *= 2
