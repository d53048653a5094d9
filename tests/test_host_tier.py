"""Requests in SGLang's hierarchical radix cache: real pools and tree on the CPU, no model."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sglang_sparsespec import ALGORITHM

LAYERS, HEADS, DIM = 2, 1, 4
BYTES = 2 * LAYERS * HEADS * DIM * 4
DEVICE_TOKENS = 64


class World:
    """A device pool of 64 tokens, a host pool, and running requests whose KV is known."""

    def __init__(self, host_tokens: int) -> None:
        from sglang.srt.mem_cache.allocator import TokenToKVPoolAllocator
        from sglang.srt.mem_cache.cache_init_params import CacheInitParams
        from sglang.srt.mem_cache.hiradix_cache import HiRadixCache
        from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool, ReqToTokenPool

        from sglang_sparsespec.scheduler_patch.host_tier import HostTier

        self.kv = MHATokenToKVPool(
            DEVICE_TOKENS, 1, torch.float32, HEADS, DIM, LAYERS, "cpu", False, enable_alt_stream=False
        )
        self.allocator = TokenToKVPoolAllocator(DEVICE_TOKENS, torch.float32, "cpu", self.kv, need_sort=False)
        self.rows = ReqToTokenPool(4, 64, "cpu", False)
        settings = SimpleNamespace(
            hicache_ratio=2.0,
            # The pool has one token more than asked for.
            hicache_size=(host_tokens - 1) * BYTES / 1e9,
            hicache_mem_layout="layer_first",
            hicache_io_backend="kernel",
            hicache_write_policy="write_through_selective",
            hicache_storage_backend=None,
            hicache_storage_backend_extra_config=None,
            hicache_storage_prefetch_policy="timeout",
            extra_metric_labels=None,
            served_model_name="tiny",
            speculative_algorithm=ALGORITHM,
        )
        params = CacheInitParams(False, self.rows, self.allocator, 1)
        self.tree = HiRadixCache(params=params, server_args=settings)
        self.tier = HostTier(self.tree)

    def request(self, tokens: list[int]) -> Any:
        """A running request: ``tokens`` committed but for the last one, 3 reserved slots."""
        from sglang.srt.managers.schedule_batch import Req
        from sglang.srt.sampling.sampling_params import SamplingParams

        req = Req(str(tokens), "", array("q", tokens[:2]), SamplingParams())
        req.output_ids = array("q", tokens[2:])
        from sglang.srt.managers.schedule_batch import ReqKvInfo

        self.rows.alloc([req])
        committed = len(tokens) - 1
        slots = self.allocator.alloc(committed + 3)
        self.rows.write((req.req_pool_idx, slice(0, committed + 3)), slots.to(torch.int32))
        req.kv = ReqKvInfo(kv_allocated_len=committed + 3, swa_evicted_seqlen=0)
        req.kv_committed_len = committed
        req.cache_protected_len = 0
        req.last_node = self.tree.root_node
        for layer in range(LAYERS):
            self.kv.k_buffer[layer][slots] = self.content(tokens, layer)
            self.kv.v_buffer[layer][slots] = -self.content(tokens, layer)
        return req

    @staticmethod
    def content(tokens: list[int], layer: int) -> torch.Tensor:
        """What the KV of a token is here: a function of its position, value and layer."""
        values = torch.tensor([*tokens[:-1], 0, 0, 0], dtype=torch.float32)
        positions = torch.arange(len(values))
        return (values + 100 * positions + 10000 * layer).view(-1, 1, 1).expand(-1, HEADS, DIM)

    def assert_content(self, req: Any, tokens: list[int]) -> None:
        slots = self.rows.req_to_token[req.req_pool_idx, : len(tokens) - 1].long()
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


@pytest.fixture
def world(
    plugin: None, serving_args: Callable[[Any], None], model_path: str, monkeypatch: pytest.MonkeyPatch
) -> Callable[[int], World]:
    from sglang.srt.server_args import ServerArgs

    from sglang_sparsespec.scheduler_patch import host_tier

    serving_args(ServerArgs(model_path=model_path, device="cpu", speculative_algorithm=ALGORITHM))
    monkeypatch.setattr(host_tier, "CHUNK_TOKENS", 8)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda group=None: 1)
    return World


A = list(range(1, 31))
B = A[:12] + list(range(50, 62))


def test_a_cpu_server_has_a_host_pool_where_less_memory_is_free_than_pinning_would_leave(
    world: Callable[[int], World], monkeypatch: pytest.MonkeyPatch
) -> None:
    import psutil
    from sglang.srt.mem_cache.pool_host import base

    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1e9, total=8e9))
    assert world(200).tier.host_pool.available_size() == 200
    assert base.HICACHE_HOST_MEMORY_RESERVE_BYTES > 1e9  # unchanged for other pools


def test_a_stored_request_survives_its_slots_being_reused(world: Callable[[int], World]) -> None:
    w = world(200)
    req = w.request(A)
    row = req.req_pool_idx
    node = w.store(req)
    assert w.tier.free_tokens == DEVICE_TOKENS
    w.tier.evict_all()
    assert w.tier.tokens_to_load(node) == len(A) - 1
    w.scribble()
    w.restore(req, node)
    assert req.req_pool_idx == row
    w.assert_content(req, A)
    assert w.tier.free_tokens == DEVICE_TOKENS - (len(A) - 1)


def test_only_what_was_evicted_is_loaded(world: Callable[[int], World]) -> None:
    from sglang.srt.mem_cache.base_prefix_cache import EvictParams

    w = world(200)
    req = w.request(A)
    node = w.store(req)
    w.tree.evict(EvictParams(num_tokens=1))
    # 29 tokens in chunks of 8: the last one has 5.
    assert w.tier.tokens_to_load(node) == 5
    w.scribble()
    w.restore(req, node)
    w.assert_content(req, A)


def test_a_prefix_that_another_request_uses_stays_on_the_device(world: Callable[[int], World]) -> None:
    w = world(200)
    first, second = w.request(A), w.request(B)
    w.restore(first, w.store(first))
    assert w.tier.exclusive_tokens(first) == len(A) - 1
    node = w.store(second)
    w.tier.evict_all()
    assert w.tier.tokens_to_load(node) == len(B) - 1 - 12
    w.scribble()
    w.assert_content(first, A)
    w.restore(second, node)
    w.assert_content(second, B)
    shared = w.rows.req_to_token[:, :12]
    assert torch.equal(shared[first.req_pool_idx], shared[second.req_pool_idx])
    assert w.tier.exclusive_tokens(first) == len(A) - 1 - 12


def test_a_second_store_copies_new_tokens_only(world: Callable[[int], World]) -> None:
    w = world(200)
    req = w.request(A)
    w.restore(req, w.store(req))
    _, copied = w.tier.store(req)
    assert copied == 0


def test_a_stored_request_is_not_dropped_from_a_full_host(world: Callable[[int], World]) -> None:
    w = world(32)
    first = w.request(A)
    node = w.store(first)
    w.tier.evict_all()
    second = w.request(list(range(100, 110)))
    stored, _ = w.tier.store(second)
    assert stored is None
    w.tier.wait_for_writes()
    w.scribble()
    w.restore(first, node)
    w.assert_content(first, A)


def test_copies_of_running_requests_make_room(world: Callable[[int], World]) -> None:
    w = world(32)
    first = w.request(A)
    w.restore(first, w.store(first))
    second = w.request(list(range(100, 120)))
    node = w.store(second)
    assert node is not None
    w.tier.evict_all()
    w.scribble()
    w.assert_content(first, A)
    w.restore(second, node)
    w.assert_content(second, list(range(100, 120)))


@pytest.mark.parametrize("loading", [False, True])
def test_a_forgotten_request_leaves_nothing(world: Callable[[int], World], loading: bool) -> None:
    w = world(200)
    req = w.request(A)
    node = w.store(req)
    w.tier.evict_all()
    if loading:
        assert w.tier.start_load(node)
    w.tier.forget(req, node, locked=loading)
    w.tier.wait_for_loads()
    assert w.tier.free_tokens == DEVICE_TOKENS
    assert w.rows.available_size() == 4 and req.req_pool_idx is None
    assert w.tree.protected_size() == 0
    w.tier.evict_all()
    w.tree.evict_host(1000)
    assert w.tier.host_pool.available_size() == w.tier.host_pool.logical_size
