"""Kernels that run outside of CUDA graphs and would be compiled while requests wait, compiled at start-up."""

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


def compile_sampling(vocab_size: int, window: int, kept_dtype: torch.dtype, device: torch.device | str) -> None:
    """Compile the kernels of lock-step rounds that sample, without and with top-k and top-p; some seconds if they are new.

    Args:
        window: W.
        kept_dtype: of the drafts' logits, ``sampling.draft_logits_dtype``.
        device: with CUDA.
    """
    from sglang_sparsespec import triton_sampling

    with torch.device(device):
        # Float32 is what SGLang's logits processor makes of the head's output.
        logits, lse = torch.zeros(window, vocab_size, dtype=torch.float32), torch.zeros(1, window - 1, dtype=torch.float32)
        kept = torch.zeros(1, window - 1, vocab_size, dtype=kept_dtype)
        temperatures, filters = torch.ones(1, 1, dtype=torch.float32), torch.ones(1, dtype=torch.float32)
        top_ks = torch.full((1,), vocab_size, dtype=torch.int32)
        # Not drawn: requests' seeds are to be the same with and without this.
        seeds, candidates = torch.zeros(window, dtype=torch.int64), torch.zeros(1, window, dtype=torch.int64)
    for top_ps in (None, filters):
        triton_sampling.draft(logits[:1], temperatures, top_ks, seeds, 0, kept, lse, top_ps=top_ps)
        triton_sampling.accept(
            candidates, logits, temperatures, top_ks, kept, lse, seeds[window - 1 :], top_ps=top_ps
        )
