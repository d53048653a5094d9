"""Requests that run, move, return, end and are aborted in any order, while copies take their time."""

from __future__ import annotations

import random
from array import array
from collections.abc import Callable
from typing import Any

import pytest
from kv_worlds import CORES, DEVICE_TOKENS, World, small_chunks
from sglang.srt.mem_cache.base_prefix_cache import EvictParams, MatchPrefixParams
from sglang.srt.mem_cache.radix_cache import RadixKey

from sglang_sparsespec.sglang_compat import HAS_UNIFIED_TREE, release

#: Prompts begin with one of these, so that requests share prefixes of several lengths.
PREFIXES = [list(range(1, 20)), list(range(1, 11)), list(range(30, 36)), []]


class SlowCopies:
    """Copies that are carried out only when SGLang is told that they are done."""

    def __init__(self, w: World, rng: random.Random) -> None:
        self.world, self.rng, self.all_at_once = w, rng, False
        self.writes: list[Callable[[], None]] = []
        self.loads: list[Callable[[], None]] = []
        pool = w.tier.host_pool
        pool.backup_from_device_all_layer = self.later(self.writes, pool.backup_from_device_all_layer)
        pool.load_to_device_per_layer = self.later(self.loads, pool.load_to_device_per_layer)
        w.tree._count_ready_acks = self.finish_some

    @staticmethod
    def later(copies: list[Callable[[], None]], copy: Callable[..., None]) -> Callable[..., None]:
        return lambda *args, **kwargs: copies.append(lambda: copy(*args, **kwargs))

    def finish_some(self, acks: Any) -> int:
        ready = len(acks) if self.all_at_once else self.rng.randrange(len(acks) + 1)
        loading = acks is self.world.tier.controller.ack_load_queue
        copies, each = (self.loads, self.world.kv.layer_num) if loading else (self.writes, 1)
        for copy in copies[: ready * each]:
            copy()
        del copies[: ready * each]
        return ready

    @staticmethod
    def finish_unseen(copies: list[Callable[[], None]]) -> None:
        """Carry out ``copies``; SGLang is told later."""
        for copy in copies:
            copy()
        copies[:] = [lambda: None] * len(copies)

    def drain(self) -> None:
        self.all_at_once = True
        self.world.tier.wait_for_writes()
        self.world.tier.wait_for_loads()
        self.all_at_once = False


class Story:
    """Requests in all states, and what may happen to them."""

    def __init__(self, w: World, rng: random.Random) -> None:
        self.w, self.rng, self.slow = w, rng, SlowCopies(w, rng)
        self.running: list[Any] = []
        self.stored: list[tuple[Any, Any]] = []
        self.loading: list[tuple[Any, Any]] = []
        self.ended: list[list[int]] = []
        self.leaving: list[Any] = []
        self.busy = self.full = self.returned = self.forgotten = self.loaded_for_prefills = 0

    @staticmethod
    def tokens(req: Any) -> list[int]:
        return [*req.origin_input_ids, *req.output_ids]

    def room(self, tokens: int) -> bool:
        missing = tokens - self.w.allocator.available_size()
        if missing > 0:
            self.w.tree.evict(EvictParams(num_tokens=missing))
        return self.w.allocator.available_size() >= tokens

    def begin(self) -> None:
        tokens = self.rng.choice(PREFIXES) + [self.rng.randrange(50, 54) for _ in range(self.rng.randrange(3, 9))]
        if self.w.rows.available_size() and self.room(len(tokens) + 2):
            # Requests of a LoRA adapter, say, share nothing with others.
            self.running.append(self.w.request(tokens, extra_key=self.rng.choice((None, None, "other"))))

    def grow(self) -> None:
        if self.running and self.room(8):
            req = self.rng.choice(self.running)
            self.w.grow(req, [self.rng.randrange(50, 54) for _ in range(self.rng.randrange(1, 5))])

    def store(self) -> None:
        if not self.leaving and not self.running:
            return
        req = self.leaving.pop() if self.leaving else self.running.pop(self.rng.randrange(len(self.running)))
        node, _ = self.w.tier.store(req)
        if node is None and self.w.tier.host_is_busy:
            self.busy += 1
            self.leaving.append(req)
        elif node is None:
            self.full += 1
            release(req, self.w.tree)
        else:
            self.stored.append((req, node))

    def bring_back(self) -> None:
        tier = self.w.tier
        if self.stored and len(self.loading) < 2:
            req, node = self.stored.pop(self.rng.randrange(len(self.stored)))
            if not tier.tokens_to_load(node):
                tier.lock(node)
            elif len(self.w.tree.ongoing_load_back) == 3 or not tier.start_load(node):
                self.stored.append((req, node))
                return
            self.loading.append((req, node))
        elif self.loading and not tier.is_loading():
            req, node = self.loading.pop()
            tier.attach(req, node)
            self.w.assert_content(req, self.tokens(req))
            self.returned += 1
            self.running.append(req)

    def forget(self) -> None:
        if self.loading and self.rng.random() < 0.5:
            self.w.tier.forget(*self.loading.pop(), locked=True)
        elif self.stored:
            self.w.tier.forget(*self.stored.pop(), locked=False)
        else:
            return
        self.forgotten += 1

    def end(self) -> None:
        if self.running:
            req = self.running.pop(self.rng.randrange(len(self.running)))
            self.ended.append(self.tokens(req)[:-1])
            self.w.finish(req)

    def load_for_a_prefill(self) -> None:
        """A prompt whose beginning is cached on the host; the KV manager admits none while it loads itself."""
        tree = self.w.tree
        if not self.loading and self.ended and not tree.ongoing_load_back:
            key = RadixKey(array("q", self.rng.choice(self.ended)))
            match = tree.match_prefix(MatchPrefixParams(key=key))
            node = match.best_match_node if HAS_UNIFIED_TREE else match.last_host_node
            if match.host_hit_length:
                tree.load_back(node)
            if tree.ongoing_load_back:
                self.loaded_for_prefills += 1
                tree.ready_to_load_host_cache()
                # The prefill waits for it layer by layer, and so do all rounds, which run after the prefill.
                self.slow.finish_unseen(self.slow.loads)

    def pass_time(self) -> None:
        self.w.tree.check_hicache_events()

    def evict(self) -> None:
        self.w.tree.evict(EvictParams(num_tokens=self.rng.randrange(1, 40)))

    def scribble(self) -> None:
        if self.w.allocator.available_size():
            self.w.scribble()

    def exclusive(self) -> None:
        for req in self.running:
            assert 0 <= self.w.tier.exclusive_tokens(req) <= req.kv.kv_allocated_len

    def check(self) -> None:
        for req in self.running:
            self.w.assert_content(req, self.tokens(req))
        if HAS_UNIFIED_TREE:
            for _, node in self.stored:
                copied = [self.w.tree.is_backuped(part.node_id) for part in self.w.tier._path(node.id)]
                assert all(copied), "a stored request's copy was dropped"


@pytest.mark.parametrize("core", CORES)
@pytest.mark.parametrize("seed", [0, 1, 2, 32])
def test_whatever_happens_to_requests_their_kv_stays_theirs_and_pools_end_empty(
    seed: int,
    core: str,
    serving_args: Callable[[Any], None],
    resolve: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    serving_args(resolve())
    small_chunks(monkeypatch)
    rng = random.Random(seed)
    # Host memory for two requests or so, or for all.
    w = World(host_tokens=(28, 40, 400)[seed % 3], core=core)
    story = Story(w, rng)
    steps = [story.begin, story.grow, story.grow, story.store, story.store, *[story.bring_back] * 4]
    steps += [story.forget, story.end, story.pass_time, story.pass_time, story.evict, story.scribble, story.exclusive]
    steps += [story.load_for_a_prefill] * 2
    for _ in range(1200):
        rng.choice(steps)()
        story.check()
    assert min(story.returned, story.forgotten, story.loaded_for_prefills) > 0
    assert story.full > 0 or seed % 3 > 0
    assert story.busy > 0 or seed % 3 == 2 or not HAS_UNIFIED_TREE
    for loading in story.loading:
        w.tier.forget(*loading, locked=True)
    for stored in story.stored:
        w.tier.forget(*stored, locked=False)
    for req in story.running + story.leaving:
        w.finish(req)
    story.slow.drain()
    assert w.tree.protected_size() == 0 and w.rows.available_size() == 4
    w.tier.evict_all()
    w.tree.evict_host(1000)
    assert w.allocator.available_size() == DEVICE_TOKENS
    assert w.tier.host_pool.available_size() == w.tier.host_pool.logical_size


@pytest.mark.parametrize("aborted", [False, True], ids=["loaded for another", "loaded for one that was aborted"])
def test_a_request_that_shares_what_is_being_loaded_does_not_return_before_it_is_there(
    aborted: bool, serving_args: Callable[[Any], None], resolve: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    serving_args(resolve())
    small_chunks(monkeypatch)
    w, tokens = World(400), list(range(1, 21))
    first, second = w.request(tokens), w.request(tokens)
    node = w.store(first)
    w.tier.evict_all()
    w.scribble()
    slow = SlowCopies(w, random.Random(0))
    assert w.tier.start_load(node)
    if aborted:
        w.tier.forget(first, node, locked=True)
    # Its own slots are freed: the tree has these tokens, it seems.
    other, copied = w.tier.store(second)
    assert copied == w.tier.tokens_to_load(other) == 0
    w.tier.lock(other)
    assert w.tier.is_loading()
    with pytest.raises(AssertionError):
        w.tier.attach(second, other)
        w.assert_content(second, tokens)
    slow.drain()
    assert not w.tier.is_loading()
    w.assert_content(second, tokens)
