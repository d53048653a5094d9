"""Who leaves the batch, who returns, and what a request that ends on the way leaves behind."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from kv_worlds import WINDOW, Batch, Req

from sglang_sparsespec.scheduler_patch.kv_manager import manager as manager_module
from sglang_sparsespec.scheduler_patch.kv_manager.manager import (
    OFFLOAD_ROUNDS,
    RESTORE_ROUNDS,
    KVManager,
    State,
    can_be_stored,
)

GROWTH = OFFLOAD_ROUNDS * WINDOW


class Tier:
    """Stands in for ``HostTier``: stored requests free their tokens when ``written``."""

    bytes_per_token = 2

    def __init__(self, free: int) -> None:
        self.free_tokens = free
        self.host_full = self.host_is_busy = False
        self.written = True
        self.loading = False
        self.loaded = True  # loads are done as soon as they are begun
        self.calls: list[tuple[str, str]] = []
        self.tree = SimpleNamespace()

    def exclusive_tokens(self, req: Req) -> int:
        return req.kv_committed_len

    def store(self, req: Req) -> tuple[Any, int]:
        self.calls.append(("store", req.rid))
        if self.host_full:
            return None, 0
        self.free_tokens += req.kv_committed_len
        return SimpleNamespace(req=req), req.kv_committed_len

    def is_writing(self) -> bool:
        return not self.written

    def is_written(self, node: Any) -> bool:
        return self.written

    def wait_for_writes(self) -> None:
        self.calls.append(("wait", "writes"))
        self.written = True

    def tokens_to_load(self, node: Any) -> int:
        return node.req.kv_committed_len

    tokens_to_lock = tokens_to_load

    def start_load(self, node: Any) -> bool:
        self.calls.append(("load", node.req.rid))
        if self.free_tokens < node.req.kv_committed_len:
            return False
        self.free_tokens -= node.req.kv_committed_len
        self.loading = True
        return True

    def is_loading(self) -> bool:
        self.loading = self.loading and not self.loaded
        return self.loading

    def wait_for_loads(self) -> None:
        self.loaded = True

    def attach(self, req: Req, node: Any) -> None:
        self.calls.append(("attach", req.rid))

    def forget(self, req: Req, node: Any, locked: bool) -> None:
        self.calls.append(("forget locked" if locked else "forget", req.rid))


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> Any:
    """``world(free)``: a manager over stand-ins; what it sends and queues is recorded."""
    def make(free: int) -> SimpleNamespace:
        sent: list[str] = []
        queued: list[str] = []
        released: list[str] = []
        undrafted: list[str] = []
        scheduler = SimpleNamespace(
            chunked_req=None,
            result_queue=[],
            max_total_num_tokens=10_000,
            ipc_channels=SimpleNamespace(
                send_to_tokenizer=SimpleNamespace(send_output=lambda output, req: sent.append(output.rid))
            ),
            _add_request_to_queue=lambda req, is_retracted: queued.append(req.rid),
            draft_worker=SimpleNamespace(lose_drafts=lambda reqs: undrafted.extend(req.rid for req in reqs)),
        )
        tier = Tier(free)
        manager = KVManager(scheduler, tier, WINDOW)  # type: ignore[arg-type]
        monkeypatch.setattr(KVManager, "_decode_batch", lambda self, reqs: Batch(reqs))
        monkeypatch.setattr(manager_module, "release", lambda req, tree: released.append(req.rid))
        return SimpleNamespace(
            manager=manager,
            tier=tier,
            scheduler=scheduler,
            sent=sent,
            queued=queued,
            released=released,
            undrafted=undrafted,
        )

    return make


def in_flight(world: SimpleNamespace, batch: Batch) -> None:
    world.scheduler.result_queue = [(Batch(batch.reqs), None)]


def requests_of(*sizes: int) -> list[Req]:
    return [Req(f"r{index}", size) for index, size in enumerate(sizes)]


def states(world: SimpleNamespace) -> list[tuple[str, State]]:
    return [(entry.req.rid, entry.state) for entry in world.manager.offloaded]


def test_nobody_leaves_while_the_next_rounds_fit(world: Any) -> None:
    w = world(free=3 * GROWTH)
    batch = Batch(requests_of(50, 50, 50))
    assert w.manager.step(batch).rids() == ["r0", "r1", "r2"]
    assert not w.manager.holds_admission


def test_the_newest_leave_until_the_others_can_grow(world: Any) -> None:
    w = world(free=0)
    batch = Batch(requests_of(100, 100, 25, 10))
    in_flight(w, batch)
    # 4 need 80 tokens; without r3 and r2, 2 need 40 of the 35 that are gained: r1 goes too.
    assert w.manager.step(batch).rids() == ["r0"]
    assert states(w) == [("r1", State.LEAVING), ("r2", State.LEAVING), ("r3", State.LEAVING)]
    assert w.manager.holds_admission


def test_the_last_request_stays(world: Any) -> None:
    w = world(free=0)
    assert w.manager.step(Batch(requests_of(100))).rids() == ["r0"]


def test_memory_that_is_being_freed_is_counted(world: Any) -> None:
    w = world(free=0)
    batch = Batch(requests_of(100, 100, 100))
    in_flight(w, batch)
    batch = w.manager.step(batch)
    assert batch.rids() == ["r0", "r1"]
    assert w.manager.step(batch).rids() == ["r0", "r1"]


def test_a_leaving_request_is_stored_when_its_last_round_is_settled(world: Any) -> None:
    w = world(free=0)
    batch = Batch(requests_of(100, 100))
    in_flight(w, batch)
    batch = w.manager.step(batch)
    w.manager.step(batch)
    assert w.tier.calls == []  # the round in flight still writes its KV
    w.scheduler.result_queue = []
    w.manager.step(batch)
    assert ("store", "r1") in w.tier.calls


def test_drafts_of_a_stored_request_are_lost_once_no_round_is_in_flight(world: Any) -> None:
    w = world(free=0)
    batch = Batch(requests_of(100, 100))
    in_flight(w, batch)
    batch = w.manager.step(batch)
    w.manager.step(batch)
    assert w.undrafted == []  # the round in flight still makes some
    w.scheduler.result_queue = []
    w.manager.step(batch)
    assert w.undrafted == ["r1"]


def test_the_oldest_returns_first_and_only_with_room_to_grow(world: Any) -> None:
    w = world(free=0)
    batch = Batch(requests_of(100, 50, 60))
    in_flight(w, batch)
    w.tier.free_tokens = -40
    batch = w.manager.step(batch)
    assert batch.rids() == ["r0"]
    w.scheduler.result_queue = []
    w.tier.free_tokens = 0
    w.manager.step(batch)  # stores both: 110 tokens are free
    assert [rid for rid, _ in states(w)] == ["r1", "r2"]
    room = 50 + 2 * RESTORE_ROUNDS * WINDOW
    w.tier.free_tokens = room - 1
    assert w.manager.step(batch).rids() == ["r0"]
    w.tier.free_tokens = room
    assert w.manager.step(batch).rids() == ["r0", "r1"]
    assert [rid for rid, _ in states(w)] == ["r2"]


def test_what_returns_stays_for_more_rounds_than_offloading_looks_ahead() -> None:
    assert RESTORE_ROUNDS > OFFLOAD_ROUNDS


def test_nothing_overtakes_a_request_that_is_being_loaded(world: Any) -> None:
    w = world(free=0)
    batch = Batch(requests_of(100, 100, 1))
    in_flight(w, batch)
    batch = w.manager.step(batch)
    w.scheduler.result_queue = []
    w.manager.step(batch)
    w.tier.free_tokens = 10_000
    w.tier.loaded = False
    assert w.manager.step(batch).rids() == ["r0"]
    assert states(w)[0] == ("r1", State.LOADING)
    assert ("attach", "r2") not in w.tier.calls
    w.tier.loaded = True
    assert w.manager.step(batch).rids()[:2] == ["r0", "r1"]


def test_loads_follow_one_another(world: Any) -> None:
    w = world(free=0)
    batch = w.manager.step(Batch(requests_of(100, 100, 100)))
    w.manager.step(batch)
    assert batch.rids() == ["r0", "r1"]
    w.tier.free_tokens, w.tier.loaded = 10_000, False
    batch = w.manager.step(batch)
    w.tier.free_tokens = 0
    batch = w.manager.step(batch)  # an older one leaves
    assert states(w) == [("r1", State.LEAVING), ("r2", State.LOADING)]
    w.tier.free_tokens = 10_000
    batch = w.manager.step(batch)
    assert states(w)[0] == ("r1", State.STORED) and ("load", "r1") not in w.tier.calls
    w.tier.loaded = True
    assert w.manager.step(batch).rids() == ["r0", "r1", "r2"]


def test_nothing_returns_into_the_memory_of_a_prompt_in_mid_prefill(world: Any) -> None:
    w = world(1000)
    reqs = requests_of(100, 100)
    batch = Batch(reqs)
    w.tier.free_tokens = 0
    batch = w.manager.step(batch)
    batch = w.manager.step(batch)  # stored
    assert states(w) == [("r1", State.STORED)]
    needed = 100 + RESTORE_ROUNDS * WINDOW * 2
    w.scheduler.chunked_req = SimpleNamespace(full_untruncated_fill_ids=range(70), prefix_indices=range(20), prefix_len=20)
    w.tier.free_tokens = needed + 49
    assert w.manager.step(batch).rids() == ["r0"]
    w.tier.free_tokens = needed + 50
    assert w.manager.step(batch).rids() == ["r0", "r1"]


def test_an_idle_server_waits_for_the_load(world: Any) -> None:
    w = world(free=0)
    batch = Batch(requests_of(100, 100))
    in_flight(w, batch)
    batch = w.manager.step(batch)
    w.scheduler.result_queue = []
    w.tier.loaded = False
    batch.reqs[0].ended = True
    assert w.manager.step(batch).rids() == ["r1"]


def test_a_round_that_does_not_fit_waits_for_the_copies(world: Any) -> None:
    w = world(free=0)
    w.tier.written = False
    w.manager.step(Batch(requests_of(100)))
    assert ("wait", "writes") in w.tier.calls
    assert w.manager.metrics.transfer_waits == 1


def test_a_request_that_finishes_in_its_last_round_is_dropped(world: Any) -> None:
    w = world(free=0)
    batch = Batch(requests_of(100, 100))
    in_flight(w, batch)
    leaving = batch.reqs[1]
    batch = w.manager.step(batch)
    w.scheduler.result_queue = []
    leaving.ended = True  # SGLang has released it
    w.tier.free_tokens = 1000
    w.manager.step(batch)
    assert not w.manager.offloaded and not w.released and not w.tier.calls


@pytest.mark.parametrize("state", list(State))
def test_aborting_an_offloaded_request_frees_it_and_tells_the_client(world: Any, state: State) -> None:
    w = world(free=0)
    batch = Batch(requests_of(100, 100))
    in_flight(w, batch)
    batch = w.manager.step(batch)
    if state is not State.LEAVING:
        w.scheduler.result_queue = []
        w.manager.step(batch)
    if state is State.LOADING:
        w.tier.free_tokens = 10_000
        w.tier.loaded = False
        w.manager.step(batch)
    assert states(w) == [("r1", state)]
    w.manager.abort("r1", abort_all=False)
    w.scheduler.result_queue = []
    w.manager.step(batch)
    assert not w.manager.offloaded and w.sent == ["r1"]
    freed = {State.LEAVING: [], State.STORED: [("forget", "r1")], State.LOADING: [("forget locked", "r1")]}
    assert [call for call in w.tier.calls if "forget" in call[0]] == freed[state]
    assert w.released == (["r1"] if state is State.LEAVING else [])


def test_nobody_is_admitted_while_the_load_of_an_aborted_request_is_under_way(world: Any) -> None:
    w = world(free=10_000)
    w.tier.loading, w.tier.loaded = True, False
    assert w.manager.holds_admission
    w.tier.loaded = True
    assert not w.manager.holds_admission


def test_aborts_of_others_leave_it(world: Any) -> None:
    w = world(free=0)
    batch = Batch(requests_of(100, 100))
    in_flight(w, batch)
    w.manager.step(batch)
    w.manager.abort("r0", abort_all=False)
    assert w.manager.offloaded[0].req.to_finish is None


def test_a_full_host_retracts_the_request(world: Any) -> None:
    w = world(free=0)
    batch = Batch(requests_of(100, 100))
    in_flight(w, batch)
    batch = w.manager.step(batch)
    w.scheduler.result_queue = []
    w.tier.host_full = True
    w.manager.step(batch)
    assert w.queued == ["r1"] and w.released == ["r1"] and not w.manager.offloaded
    assert w.manager.metrics.host_full == 1 and w.manager.metrics.requests_offloaded == 0


def test_a_host_that_is_full_only_for_now_is_tried_again(world: Any) -> None:
    w = world(free=0)
    batch = w.manager.step(Batch(requests_of(100, 100)))
    w.tier.host_full = w.tier.host_is_busy = True
    w.manager.step(batch)
    w.manager.step(batch)
    assert states(w) == [("r1", State.LEAVING)] and not w.queued and w.manager.metrics.host_full == 0
    w.tier.host_full = False
    w.manager.step(batch)
    assert w.manager.metrics.requests_offloaded == 1


def test_a_batch_whose_last_request_has_left_admits_again(world: Any) -> None:
    w = world(free=10_000)
    batch = Batch([])
    batch.batch_is_full = True
    assert not w.manager.step(batch).batch_is_full


def test_retracting_all_queues_every_offloaded_request(world: Any) -> None:
    w = world(free=0)
    batch = Batch(requests_of(100, 50, 60))
    w.tier.free_tokens = -40
    in_flight(w, batch)
    batch = w.manager.step(batch)
    w.manager.retract_all()
    assert sorted(w.queued) == ["r1", "r2"] and not w.manager.offloaded


def test_requests_whose_kv_is_not_that_of_their_tokens_are_not_stored() -> None:
    (req,) = requests_of(10)
    assert can_be_stored(req)  # type: ignore[arg-type]
    req.input_embeds = [0.0]  # type: ignore[assignment]
    assert not can_be_stored(req)  # type: ignore[arg-type]
