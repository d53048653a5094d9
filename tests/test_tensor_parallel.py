"""What must be the same on all tensor-parallel ranks, with two ranks played in one process (no test here needs a GPU)."""

from __future__ import annotations

import argparse
import random
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_host_tier import World, world  # noqa: F401
from test_kv_manager_policy import Batch
from test_unified_round import ChainModel, RuleServer, rule_server, sampled_round  # noqa: F401

RANKS = 2

# ------------------------------------------------------------------------- metrics


@pytest.mark.parametrize(
    ("first_rank", "enabled", "expected"),
    [
        (True, False, ["log"]),
        (True, True, ["log", "export"]),
        (False, False, []),
        (False, True, ["export"]),  # --enable-metrics-for-all-schedulers
    ],
)
def test_ranks_report_where_sglang_does(
    plugin: None, first_rank: bool, enabled: bool, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every rank counts the same rounds: reported by each of them, they would add up to a multiple."""
    from sglang_sparsespec.scheduler_patch import metrics_hooks

    done: list[str] = []
    metrics = SimpleNamespace(
        refresh=lambda: None, log=lambda: done.append("log"), export=lambda labels: done.append("export")
    )
    monkeypatch.setattr(metrics_hooks, "manager_of", lambda scheduler: None)
    reporter = SimpleNamespace(
        scheduler=SimpleNamespace(draft_worker=SimpleNamespace(sparsespec_metrics=metrics)),
        forward_ct_decode=40,
        decode_log_interval=40,
        enable_metrics=True,
        is_stats_logging_rank=first_rank,
        current_scheduler_metrics_enabled=enabled,
        metrics_collector=SimpleNamespace(labels={}),
    )
    metrics_hooks.report_draft_metrics(None, reporter)
    assert done == expected


# ----------------------------------------------------------------------- KV manager


class Ranks:
    """Replaces ``HiRadixCache._all_reduce`` of each rank, which takes the least of all ranks' numbers."""

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
    from sglang_sparsespec.scheduler_patch.kv_manager import KVManager

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
                [w.rows.req_to_token[req.req_pool_idx, :15].tolist() for req in running.reqs],
            )
        )
    assert manager.metrics.requests_restored > 5 and manager.metrics.tokens_from_host > 0
    return decisions


@pytest.fixture
def moving(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    from sglang_sparsespec.scheduler_patch import kv_manager

    monkeypatch.setattr(kv_manager, "FORCE_INTERVAL", 4)
    monkeypatch.setattr(kv_manager.KVManager, "_decode_batch", lambda self, reqs: Batch(reqs))
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
    world: Callable[[int], World],  # noqa: F811
    moving: None,
) -> None:
    """Ranks that ran different batches would hang in the next all-reduce of the model."""
    first, second = decisions_of_ranks(world, synchronised=True)
    assert first is not None and first == second
    # Here it is SGLang's exchange of finished copies that keeps them together.
    first, second = decisions_of_ranks(world, synchronised=False)
    assert first is not None and second is not None and first != second


# --------------------------------------------------------------------- random tokens


class FirstRank:
    """``SparseSpecWorker._from_first_rank`` of two ranks that run one after the other."""

    def __init__(self) -> None:
        self.sent: list[tuple[torch.Tensor, ...]] = []

    def send(self, is_all_greedy: bool, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        self.sent.append(tuple(tensor.clone() for tensor in tensors))
        return tensors

    def receive(self, is_all_greedy: bool, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        sent = self.sent.pop(0)
        assert [(t.shape, t.dtype) for t in sent] == [(t.shape, t.dtype) for t in tensors]
        return sent


@pytest.mark.parametrize("graphs", [False, True])
def test_staggered_rounds_of_all_ranks_draw_what_the_first_one_drew(
    rule_server: Callable[[bool], RuleServer],  # noqa: F811
    graphs: bool,
) -> None:
    exchange = FirstRank()
    rows = [1, 4, 6, 9, 11]
    outputs = []
    for rank, exchanged in enumerate((exchange.send, exchange.receive)):
        torch.manual_seed(rank)
        server = rule_server(graphs)
        server.rounds._from_first_rank = exchanged
        server.runner.model = ChainModel(server.backend)
        for row in rows:
            server.admit(row, 3 + row)
        lengths = [sampled_round(server, rows).accept_lens.tolist() for _ in range(8)]
        outputs.append((server.sequences, lengths, server.rounds.state.candidates))
    assert not exchange.sent
    first, second = outputs
    assert first[:2] == second[:2] and torch.equal(first[2][rows], second[2][rows])


@pytest.mark.parametrize(
    ("greedy", "simulated", "exchanged"), [(True, False, False), (True, True, True), (False, False, True)]
)
def test_only_what_is_drawn_at_random_is_exchanged(
    greedy: bool, simulated: bool, exchanged: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Greedy tokens follow from logits that all ranks have alike, as in SGLang's own speculation."""
    from sglang_sparsespec.worker import SparseSpecWorker

    def broadcast(tensor: torch.Tensor, src: int) -> torch.Tensor:
        assert src == 0 and tensor.is_contiguous()
        return tensor.fill_(7)

    group = SimpleNamespace(world_size=RANKS, broadcast=broadcast)
    monkeypatch.setattr("sglang.srt.distributed.get_tp_group", lambda: group)
    worker: Any = SimpleNamespace(_simulated=object() if simulated else None)
    tokens, lens = SparseSpecWorker._from_first_rank(worker, greedy, torch.zeros(3, 2).T, torch.zeros(3))
    assert tokens.shape == (2, 3)
    assert bool((tokens == 7).all() and (lens == 7).all()) == exchanged


# ----------------------------------------------------------------------- benchmarks


def test_benchmarks_run_on_the_gpus_that_they_are_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parent.parent / "benchmarks"))
    import parity
    import sglang
    import throughput

    monkeypatch.setattr(sglang, "Engine", lambda **settings: settings)
    settings = {"model_path": "m", "device": "cuda", "dtype": "bfloat16", "k": 8, "engine_args": '{"tp_size": 2}'}
    own = {"concurrency": 4, "max_total_tokens": 0, "chunked_prefill_size": 0, "radix": "on", "overlap": "on"}
    args = argparse.Namespace(**settings, **own, schedule="unified")
    assert [parity.start_engine(args, speculative)["tp_size"] for speculative in (False, True)] == [2, 2]
    own = {"load_format": "auto", "log_level": "warning", "random_prompts": False, "prefill_backend": "triton"}
    args = argparse.Namespace(**settings, **own, new_tokens=8)
    for name in ("plain:flashinfer", "sparsespec"):
        assert throughput.engine_arguments(name, 4, args)["tp_size"] == 2
    assert throughput.describe("sparsespec", 64, 4, args)["tp_size"] == 2
