"""Requests in memory: stand-ins for SGLang's requests and batches, and real pools and tree on the CPU, without a model."""

from __future__ import annotations

from array import array
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.managers import schedule_batch
from sglang.srt.mem_cache.allocator import TokenToKVPoolAllocator
from sglang.srt.mem_cache.cache_init_params import CacheInitParams
from sglang.srt.mem_cache.common import release_kv_cache
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool, ReqToTokenPool
from sglang.srt.sampling.sampling_params import SamplingParams

from sglang_sparsespec import ALGORITHM
from sglang_sparsespec.scheduler_patch.kv_manager import host_tier
from sglang_sparsespec.scheduler_patch.kv_manager.hooks import TIER
from sglang_sparsespec.sglang_compat import HAS_UNIFIED_TREE, kv_of

#: Tokens that a request may grow by in one round of the stand-ins.
WINDOW = 5

LAYERS, HEADS, DIM = 2, 1, 4
BYTES = 2 * LAYERS * HEADS * DIM * 4
DEVICE_TOKENS = 64
#: Implementations of the radix cache's tree; a newer SGLang has two.
CORES = ("rust", "python") if HAS_UNIFIED_TREE else ("",)


class Req:
    """Stands in for SGLang's request; ``tokens`` of KV."""

    def __init__(self, rid: str, tokens: int) -> None:
        self.rid = rid
        self.kv_committed_len = tokens
        self.kv = self
        self.origin_input_ids = [0] * tokens
        self.output_ids = [0]
        self.session = self.input_embeds = self.positional_embed_overrides = self.to_finish = None
        self.skip_radix_cache_insert = False
        self.ended = False
        self.resets = 0

    def finished(self) -> bool:
        return self.ended

    def reset_for_retract(self) -> None:
        self.resets += 1


class Batch:
    """Stands in for SGLang's batch."""

    batch_is_full = False

    def __init__(self, reqs: list[Req]) -> None:
        self.reqs = list(reqs)

    def is_empty(self) -> bool:
        return not self.reqs

    def filter_batch(self, keep_indices: list[int] | None = None) -> None:
        if keep_indices is None:
            keep_indices = [i for i, req in enumerate(self.reqs) if not req.finished()]
        self.reqs = [self.reqs[i] for i in keep_indices]

    def merge_batch(self, other: Batch) -> None:
        self.reqs += other.reqs

    def new_tokens_required_next_decode(self, indices: list[int]) -> int:
        return len(indices) * WINDOW

    def rids(self) -> list[str]:
        return [req.rid for req in self.reqs]


def make_tree(rows: ReqToTokenPool, allocator: TokenToKVPoolAllocator, host_gb: float, core: str) -> Any:
    """SGLang's radix cache with a host pool of ``host_gb``."""
    settings: dict[str, Any] = {
        "hicache_ratio": 2.0,
        "hicache_size": host_gb,
        "hicache_mem_layout": "layer_first",
        "hicache_io_backend": "kernel",
        "hicache_write_policy": "write_through_selective",
    }
    params = CacheInitParams(False, rows, allocator, 1)
    if not HAS_UNIFIED_TREE:
        from sglang.srt.mem_cache.hiradix_cache import HiRadixCache

        others = {
            "hicache_storage_backend": None,
            "hicache_storage_backend_extra_config": None,
            "hicache_storage_prefetch_policy": "timeout",
            "extra_metric_labels": None,
            "served_model_name": "tiny",
            "speculative_algorithm": ALGORITHM,
        }
        return HiRadixCache(params=params, server_args=SimpleNamespace(**settings, **others))
    from sglang.srt.mem_cache.unified_cache.component_type import ComponentType
    from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache
    from sglang.srt.runtime_context import get_context, get_server_args

    get_context().override("tests.make_tree", **settings)
    params.tree_components = (ComponentType.FULL,)
    params.tree_core_backend = core
    tree = UnifiedRadixCache(params)
    tree.init_hicache(get_server_args(), params)
    return tree


class World:
    """A device pool of 64 tokens, a host pool, and running requests whose KV is known."""

    def __init__(self, host_tokens: int, core: str = CORES[0]) -> None:
        self.kv = MHATokenToKVPool(
            DEVICE_TOKENS, 1, torch.float32, HEADS, DIM, LAYERS, "cpu", False, enable_alt_stream=False
        )
        self.allocator = TokenToKVPoolAllocator(DEVICE_TOKENS, torch.float32, "cpu", self.kv, need_sort=False)
        self.rows = ReqToTokenPool(4, 64, "cpu", False)
        # The pool has one token more than asked for.
        self.tree = make_tree(self.rows, self.allocator, (host_tokens - 1) * BYTES / 1e9, core)
        self.tier = TIER(self.tree)

    def request(self, tokens: list[int], extra_key: str | None = None) -> Any:
        """A running request: ``tokens`` committed but for the last one, 3 reserved slots."""
        req = schedule_batch.Req(str(tokens), "", array("q", tokens[:2]), SamplingParams(), extra_key=extra_key)
        req.output_ids = array("q", tokens[2:])
        self.rows.alloc([req])
        committed = len(tokens) - 1
        slots = self.allocator.alloc(committed + 3)
        self.rows.write((kv_of(req).req_pool_idx, slice(0, committed + 3)), slots.to(torch.int32))
        if HAS_UNIFIED_TREE:
            req.last_node = self.tree.root_node_handle()
            req.lock = self.tree.lock(req.last_node)
        else:
            req.kv = schedule_batch.ReqKvInfo(kv_allocated_len=0, swa_evicted_seqlen=0)
            req.last_node = self.tree.root_node
        req.kv.kv_allocated_len = committed + 3
        kv_of(req).kv_committed_len = committed
        kv_of(req).cache_protected_len = 0
        for layer in range(LAYERS):
            self.kv.k_buffer[layer][slots] = self.content(tokens, layer)
            self.kv.v_buffer[layer][slots] = -self.content(tokens, layer)
        return req

    def grow(self, req: Any, tokens: list[int]) -> None:
        """Let a running request commit its last token and all of ``tokens`` but the last; it has no reserved slots then."""
        committed = kv_of(req).kv_committed_len
        spare = self.rows.req_to_token[kv_of(req).req_pool_idx, committed : req.kv.kv_allocated_len]
        self.allocator.free(spare.long())
        slots = self.allocator.alloc(len(tokens))
        req.output_ids.extend(tokens)
        kv_of(req).kv_committed_len = req.kv.kv_allocated_len = committed + len(tokens)
        self.rows.write((kv_of(req).req_pool_idx, slice(committed, committed + len(tokens))), slots.to(torch.int32))
        for layer in range(LAYERS):
            written = self.content([*req.origin_input_ids, *req.output_ids], layer)[committed : committed + len(tokens)]
            self.kv.k_buffer[layer][slots] = written
            self.kv.v_buffer[layer][slots] = -written

    def finish(self, req: Any) -> None:
        """End a running request as SGLang does: its KV is cached."""
        req.finished_reason = schedule_batch.FINISH_LENGTH(len(req.output_ids))
        if HAS_UNIFIED_TREE:
            release_kv_cache(req, self.tree, checkpoint=True)
        else:
            release_kv_cache(req, self.tree)

    @staticmethod
    def content(tokens: list[int], layer: int) -> torch.Tensor:
        """What the KV of a token is here: a function of its position, value and layer."""
        values = torch.tensor([*tokens[:-1], 0, 0, 0], dtype=torch.float32)
        positions = torch.arange(len(values))
        return (values + 100 * positions + 10000 * layer).view(-1, 1, 1).expand(-1, HEADS, DIM)

    def assert_content(self, req: Any, tokens: list[int]) -> None:
        slots = self.rows.req_to_token[kv_of(req).req_pool_idx, : len(tokens) - 1].long()
        assert len(set(slots.tolist())) == len(tokens) - 1
        for layer in range(LAYERS):
            expected = self.content(tokens, layer)[: len(tokens) - 1]
            assert torch.equal(self.kv.k_buffer[layer][slots], expected)
            assert torch.equal(self.kv.v_buffer[layer][slots], -expected)

    def store(self, req: Any) -> Any:
        node, _ = self.tier.store(req)
        self.tier.wait_for_writes()
        return node

    def restore(self, req: Any, node: Any) -> None:
        if self.tier.tokens_to_load(node):
            assert self.tier.start_load(node)
            self.tier.wait_for_loads()
        else:
            self.tier.lock(node)
        self.tier.attach(req, node)

    def scribble(self) -> None:
        """Take all free slots, write to them, and free them."""
        slots = self.allocator.alloc(self.allocator.available_size())
        for layer in range(LAYERS):
            self.kv.k_buffer[layer][slots] = 7.5
            self.kv.v_buffer[layer][slots] = 7.5
        self.allocator.free(slots.flip(0))


def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nodes of 8 tokens, and no other ranks."""
    monkeypatch.setattr(host_tier, "CHUNK_TOKENS", 8)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda group=None: 1)
