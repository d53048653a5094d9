"""Requests in SGLang's hierarchical radix cache: real pools and tree on the CPU, no model."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from kv_worlds import DEVICE_TOKENS, World, small_chunks
from sglang.srt.mem_cache.base_prefix_cache import EvictParams
from sglang.srt.mem_cache.pool_host import base

from sglang_sparsespec.scheduler_patch.kv_manager.hooks import TIER
from sglang_sparsespec.sglang_compat import HAS_UNIFIED_TREE, kv_of


@pytest.fixture
def world(
    serving_args: Callable[[Any], None], resolve: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> Callable[[int], World]:
    serving_args(resolve())
    small_chunks(monkeypatch)
    return World


A = list(range(1, 31))
B = A[:12] + list(range(50, 62))


def test_a_cpu_server_has_a_host_pool_where_less_memory_is_free_than_pinning_would_leave(
    world: Callable[[int], World], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1e9, total=8e9))
    assert world(200).tier.host_pool.available_size() == 200
    assert base.HICACHE_HOST_MEMORY_RESERVE_BYTES > 1e9  # unchanged for other pools


def test_a_radix_cache_that_the_tier_is_not_for_is_refused_with_a_remedy(world: Callable[[int], World]) -> None:
    with pytest.raises(RuntimeError, match="found SimpleNamespace; remove .*--sparsespec-host-kv-gb 0"):
        TIER(SimpleNamespace())


@pytest.mark.skipif(not HAS_UNIFIED_TREE, reason="the tier orders its copies itself")
def test_copies_that_do_not_wait_for_forwards_are_refused(world: Callable[[int], World]) -> None:
    w, forwards = world(200), object()
    w.tree.cache_controller.write_fence_stream = forwards
    with pytest.raises(RuntimeError, match="do not wait for the forward in flight"):
        TIER(w.tree, forwards)
    w.tree.cache_controller.load_fence_stream = forwards
    TIER(w.tree, forwards)


def test_a_stored_request_survives_its_slots_being_reused(world: Callable[[int], World]) -> None:
    w = world(200)
    req = w.request(A)
    row = kv_of(req).req_pool_idx
    node = w.store(req)
    assert w.tier.free_tokens == DEVICE_TOKENS
    w.tier.evict_all()
    assert w.tier.tokens_to_load(node) == len(A) - 1
    w.scribble()
    w.restore(req, node)
    assert kv_of(req).req_pool_idx == row
    w.assert_content(req, A)
    assert w.tier.free_tokens == DEVICE_TOKENS - (len(A) - 1)


def test_only_what_was_evicted_is_loaded(world: Callable[[int], World]) -> None:
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
    assert torch.equal(shared[kv_of(first).req_pool_idx], shared[kv_of(second).req_pool_idx])
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
    assert w.tier.is_loading() == loading
    w.tier.wait_for_loads()
    assert not w.tier.is_loading()
    assert w.tier.free_tokens == DEVICE_TOKENS
    assert w.rows.available_size() == 4 and kv_of(req).req_pool_idx is None
    assert w.tree.protected_size() == 0
    w.tier.evict_all()
    w.tree.evict_host(1000)
    assert w.tier.host_pool.available_size() == w.tier.host_pool.logical_size
