"""The next batch is chosen late, so that a request that arrives during a round waits for that round alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import zmq

from sglang_sparsespec.hook_registry import add_hook
from sglang_sparsespec.scheduler_patch.kv_manager.hooks import manager_of
from sglang_sparsespec.worker import SparseSpecWorker

#: Milliseconds between two looks at the device.
TICK_MS = 1


def wait_for_arrivals(result: Any, scheduler: Any, batch_result: Any, batch: Any) -> None:
    """``Scheduler.launch_batch_sample_if_needed``, the end of an iteration of ``Scheduler.event_loop_overlap``.

    ``batch`` has been launched and the results of the one before it have been read. SGLang would choose and launch the next
    one at once, and a request that arrives after that would wait for both (:mod:`late_choice`).
    """
    worker = scheduler.draft_worker
    if isinstance(worker, SparseSpecWorker):
        worker.planner.late_choice.wait(poll_for_arrivals(scheduler, batch))


def poll_for_arrivals(scheduler: Any, batch: Any) -> Callable[[], bool] | None:
    """What waits for a message to the scheduler; None where a request that arrives now would not be prefilled next."""
    if batch is None or len(batch.reqs) >= scheduler.max_running_requests:
        return None
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
    return lambda: bool(socket.poll(TICK_MS))


def register_hooks() -> None:
    """Register the hook of this module."""
    add_hook("sglang.srt.managers.scheduler.Scheduler.launch_batch_sample_if_needed", wait_for_arrivals, "after")
