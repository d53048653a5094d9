"""The KV manager decides the same on all tensor-parallel ranks, with two ranks played in one process."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from kv_worlds import Batch, World, small_chunks

from sglang_sparsespec.scheduler_patch.kv_manager import manager as manager_module
from sglang_sparsespec.scheduler_patch.kv_manager.manager import KVManager
from sglang_sparsespec.sglang_compat import kv_of

RANKS = 2


@pytest.fixture
def world(
    serving_args: Callable[[Any], None], resolve: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> Callable[[int], World]:
    serving_args(resolve())
    small_chunks(monkeypatch)
    return World


class Ranks:
    """Replaces ``_all_reduce`` of each rank's radix cache, which takes the least of all ranks' numbers."""

    def __init__(self) -> None:
        self.barrier = threading.Barrier(RANKS, timeout=60)
        self.values: list[Any] = [None] * RANKS

    def all_reduce(self, rank: int) -> Callable[..., None]:
        def reduce(tensor: torch.Tensor, op: Any) -> None:
            assert op == torch.distributed.ReduceOp.MIN
            self.values[rank] = tensor.clone()
            self.barrier.wait()
            least = torch.stack(self.values).amin(0)  # of different collectives: shapes differ, or what is decided does
            self.barrier.wait()
            tensor.copy_(least)

        return reduce


def decide(w: World, steps: int) -> list[Any]:
    """What the KV manager of one rank decides in ``steps`` scheduler iterations, requests being moved all the while."""
    worker = SimpleNamespace(lose_drafts=lambda reqs: None)
    scheduler: Any = SimpleNamespace(
        chunked_req=None, result_queue=[], max_total_num_tokens=64, draft_worker=worker, tree_cache=w.tree
    )
    manager = KVManager(scheduler, w.tier, window=2)
    running: Any = Batch([w.request(list(range(start, start + 16))) for start in (0, 20, 40)])
    decisions: list[Any] = []
    for _ in range(steps):
        running = manager.step(running)
        w.tree.check_hicache_events()  # SGLang's, in each iteration
        decisions.append(
            (
                running.rids(),
                [(entry.req.rid, entry.state) for entry in manager.offloaded],
                w.tier.free_tokens,
                [w.rows.req_to_token[kv_of(req).req_pool_idx, :15].tolist() for req in running.reqs],
            )
        )
    assert manager.metrics.requests_restored > 5 and manager.metrics.tokens_from_host > 0
    return decisions


@pytest.fixture
def moving(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(manager_module, "FORCE_INTERVAL", 4)
    monkeypatch.setattr(KVManager, "_decode_batch", lambda self, reqs: Batch(reqs))
    yield


def decisions_of_ranks(make: Callable[[int], World], synchronised: bool) -> list[Any]:
    """Decisions of two ranks; each sees its copies done after a time of its own."""
    ranks, worlds = Ranks(), [make(200) for _ in range(RANKS)]
    decisions: list[Any] = [None] * RANKS

    def run(rank: int) -> None:
        tree, slow = worlds[rank].tree, random.Random(rank)
        tree._count_ready_acks = lambda queue: len(queue) * (slow.random() < 0.7)
        tree._all_reduce = ranks.all_reduce(rank) if synchronised else lambda tensor, op: None
        decisions[rank] = decide(worlds[rank], steps=80)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(RANKS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    return decisions


def test_ranks_whose_copies_take_different_times_move_the_same_requests(
    world: Callable[[int], World],
    moving: None,
) -> None:
    """Ranks that ran different batches would hang in the next all-reduce of the model."""
    first, second = decisions_of_ranks(world, synchronised=True)
    assert first is not None and first == second
    # Here it is SGLang's exchange of finished copies that keeps them together.
    first, second = decisions_of_ranks(world, synchronised=False)
    assert first is not None and second is not None and first != second
