"""The next batch is chosen late, so that a request that arrives during a round waits for that round alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import zmq

from sglang_sparsespec.hook_registry import add_hook
from sglang_sparsespec.scheduler_patch.kv_manager.hooks import manager_of
from sglang_sparsespec.worker import SparseSpecWorker


def wait_for_arrivals(result: Any, scheduler: Any, batch_result: Any, batch: Any) -> None:
    """``Scheduler.launch_batch_sample_if_needed``, the end of an iteration of ``Scheduler.event_loop_overlap``.

    ``batch`` has been launched and the results of the one before it have been read. SGLang would choose and launch the next
    one at once, and a request that arrives after that would wait for both (:mod:`launch_time`).
    """
    worker = scheduler.draft_worker
    if isinstance(worker, SparseSpecWorker):
        worker.planner.launch_time.end_iteration(None if batch is None else poll_for_arrivals(scheduler))


def poll_for_arrivals(scheduler: Any) -> Callable[[float], bool] | None:
    """What waits for a message to the scheduler; None where a request that arrives now would not be prefilled next."""
    # Requests that wait already come first. SGLang itself sleeps while grammars are compiled.
    if scheduler.waiting_queue or scheduler.chunked_req is not None or scheduler.grammar_manager.has_waiting_grammars():
        return None
    manager = manager_of(scheduler)
    if manager is not None and manager.holds_admission:
        return None
    receiver = scheduler.request_receiver
    socket = receiver.recv_from_tokenizer  # None on all tensor-parallel ranks but the first, for which the others wait
    if receiver.recv_skipper is not None or not isinstance(socket, zmq.Socket):
        return None
    return lambda seconds: bool(socket.poll(int(1000 * seconds)))


def register_hooks() -> None:
    """Register the hook of this module."""
    add_hook("sglang.srt.managers.scheduler.Scheduler.launch_batch_sample_if_needed", wait_for_arrivals, "after")
