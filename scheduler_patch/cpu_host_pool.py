"""HiCache's host pool where the "device" is the CPU: copies in torch, nothing pinned.

For tests of the KV manager without a GPU; everything around the two copies is SGLang's.
"""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.mem_cache.pool_host import base
from sglang.srt.mem_cache.pool_host.mha import MHATokenToKVPoolHost


class CpuHostPool(MHATokenToKVPoolHost):
    """``MHATokenToKVPoolHost`` of layout ``layer_first`` with synchronous copies."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # SGLang leaves 10 GB to others, since pinned memory cannot be swapped out. This is not pinned, and a
        # laptop may have less than that free.
        reserve, base.HICACHE_HOST_MEMORY_RESERVE_BYTES = base.HICACHE_HOST_MEMORY_RESERVE_BYTES, 0
        try:
            super().__init__(*args, pin_memory=False, **kwargs)
        finally:
            base.HICACHE_HOST_MEMORY_RESERVE_BYTES = reserve

    def load_to_device_per_layer(
        self,
        device_pool: Any,
        host_indices: torch.Tensor,
        device_indices: torch.Tensor,
        layer_id: int,
        io_backend: str,
    ) -> None:
        """Copy tokens ``host_indices`` of one layer to slots ``device_indices`` (int64 [tokens])."""
        device_pool.k_buffer[layer_id][device_indices] = self.k_buffer[layer_id][host_indices]
        device_pool.v_buffer[layer_id][device_indices] = self.v_buffer[layer_id][host_indices]

    def backup_from_device_all_layer(
        self, device_pool: Any, host_indices: torch.Tensor, device_indices: torch.Tensor, io_backend: str
    ) -> None:
        """Copy slots ``device_indices`` of all layers to tokens ``host_indices`` (int64 [tokens])."""
        for layer in range(self.layer_num):
            self.k_buffer[layer][host_indices] = device_pool.k_buffer[layer][device_indices]
            self.v_buffer[layer][host_indices] = device_pool.v_buffer[layer][device_indices]
