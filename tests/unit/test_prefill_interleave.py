"""When a decode round comes before the next prefill batch (``--enable-mixed-chunk``); the engines' part is in
``tests/engine/test_prefill_interleave.py``."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from sglang_sparsespec.scheduler_patch.prefill_interleave import decode_between_prefills, tokens_of_room
from sglang_sparsespec.settings import Settings

GROWTH = 18
PREFILL = object()


class Running:
    """Stands in for SGLang's running batch."""

    is_prefill_only = False
    batch_is_full = False

    def __init__(self, *finished: bool) -> None:
        self.reqs = [SimpleNamespace(finished=lambda ended=ended: ended) for ended in finished]

    def new_tokens_required_next_decode(self, indices: list[int]) -> int:
        assert not any(self.reqs[i].finished() for i in indices)  # their KV is released
        return len(indices) * GROWTH


class Metrics:
    """Stands in for the worker's metrics."""

    interleaved_rounds = 0

    def note_interleaved_round(self) -> None:
        self.interleaved_rounds += 1


def scheduler(last: str | None = "prefill", **changes: Any) -> Any:
    """A scheduler after a batch, with a prompt of 100 tokens of which 40 are prefilled, and ample memory."""
    batch = SimpleNamespace(forward_mode=SimpleNamespace(is_extend=lambda: last == "prefill"))
    args = SimpleNamespace(_sparsespec_settings=Settings(prefill_beside_decoding=True))
    values = {
        "server_args": args,
        "last_batch": batch if last else None,
        "chunked_req": SimpleNamespace(full_untruncated_fill_ids=range(100), prefix_indices=range(40), prefix_len=40),
        "waiting_queue": [],
        "free": 500,
        "evictable": 500,
        **changes,
    }
    return SimpleNamespace(
        **values,
        token_to_kv_pool_allocator=SimpleNamespace(available_size=lambda: values["free"]),
        tree_cache=SimpleNamespace(supports_swa=lambda: False, evictable_size=lambda: values["evictable"]),
        draft_worker=SimpleNamespace(metrics=Metrics()),
    )


def choose(scheduler: Any, running: Any) -> str:
    """What the iteration runs: "prefill" if SGLang is asked for a batch."""

    def original(asked: Any, prefill_delayer_single_pass: Any, running_batch: Any) -> tuple[Any, Any]:
        assert asked is scheduler
        return PREFILL, running_batch

    batch, returned = decode_between_prefills(
        original, scheduler, prefill_delayer_single_pass=None, running_batch=running
    )
    assert returned is running
    return "prefill" if batch is PREFILL else "round"


def test_a_round_comes_between_two_chunks() -> None:
    one = scheduler()
    assert choose(one, Running(False, True)) == "round"
    assert one.draft_worker.metrics.interleaved_rounds == 1
    assert choose(scheduler(last="decode"), Running(False)) == "prefill"  # one round for each chunk


def test_prefill_goes_on_where_nothing_decodes() -> None:
    assert choose(scheduler(), Running()) == "prefill"
    assert choose(scheduler(), Running(True, True)) == "prefill"
    assert choose(scheduler(last=None), Running(False)) == "prefill"


def test_prefill_goes_first_without_the_flag() -> None:
    plain = SimpleNamespace(_sparsespec_settings=Settings())
    assert choose(scheduler(server_args=plain), Running(False)) == "prefill"
    other_algorithm = SimpleNamespace()
    assert choose(scheduler(server_args=other_algorithm), Running(False)) == "prefill"


def test_only_rounds_that_a_prefill_waits_for_are_counted() -> None:
    running = Running(False)
    for changes, counted in (
        ({"waiting_queue": ["a prompt"]}, 1),
        ({"waiting_queue": []}, 0),
    ):
        one = scheduler(chunked_req=None, **changes)
        assert choose(one, running) == "round"
        assert one.draft_worker.metrics.interleaved_rounds == counted
    running.batch_is_full = True
    one = scheduler(chunked_req=None, waiting_queue=["a prompt"])
    assert choose(one, running) == "round"
    assert one.draft_worker.metrics.interleaved_rounds == 0


@pytest.mark.parametrize(("free", "evictable", "chosen"), [(40, 56, "round"), (40, 55, "prefill"), (0, 0, "prefill")])
def test_rounds_leave_the_memory_that_the_chunks_to_come_need(free: int, evictable: int, chosen: str) -> None:
    """60 tokens are to come, and two requests grow by 18 each."""
    one = scheduler(free=free, evictable=evictable)
    assert choose(one, Running(False, False)) == chosen


def test_without_a_prompt_in_mid_prefill_sglang_checks_the_memory() -> None:
    """It retracts requests if it must, which it cannot do with a prompt in mid-prefill."""
    assert choose(scheduler(chunked_req=None, waiting_queue=["a prompt"], free=0, evictable=0), Running(False)) == "round"


@pytest.mark.parametrize(("pools", "room"), [((100, 5, 30, 8), 38), ((10, 5, 30, 8), 15)])
def test_room_is_that_of_the_smaller_pool_where_windows_have_one_of_their_own(
    pools: tuple[int, int, int, int], room: int
) -> None:
    full, full_evictable, swa, swa_evictable = pools
    allocator = SimpleNamespace(full_available_size=lambda: full, swa_available_size=lambda: swa)
    cache = SimpleNamespace(
        supports_swa=lambda: True,
        full_evictable_size=lambda: full_evictable,
        swa_evictable_size=lambda: swa_evictable,
    )
    assert tokens_of_room(SimpleNamespace(token_to_kv_pool_allocator=allocator, tree_cache=cache)) == room
