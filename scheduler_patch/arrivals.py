"""The next batch is chosen late, so that a request that arrives during a round waits for that round alone."""

from __future__ import annotations

from typing import Any

from sglang_sparsespec.hook_registry import add_hook
from sglang_sparsespec.scheduler_patch.kv_manager.hooks import manager_of
from sglang_sparsespec.worker import SparseSpecWorker


def wait_for_arrivals(result: Any, scheduler: Any, batch_result: Any, batch: Any) -> None:
    """``Scheduler.launch_batch_sample_if_needed``, the end of an iteration of ``Scheduler.event_loop_overlap``.

    ``batch`` has been launched and the results of the one before it have been read. SGLang would choose and launch the next
    one at once, and a request that arrives after that would wait for both (:mod:`late_choice`). With tensor parallelism the
    first rank waits, and the others wait for what it has received.
    """
    worker = scheduler.draft_worker
    if isinstance(worker, SparseSpecWorker):
        worker.planner.late_choice.end_iteration(wait=arrivals_come_next(scheduler, batch))


def arrivals_come_next(scheduler: Any, batch: Any) -> bool:
    """Whether a request that arrives now would be in the next batch."""
    if batch is None or len(batch.reqs) >= scheduler.max_running_requests:
        return False
    # Requests that wait already come first. SGLang itself sleeps while grammars are compiled.
    if scheduler.waiting_queue or scheduler.chunked_req is not None or scheduler.grammar_manager.has_waiting_grammars():
        return False
    manager = manager_of(scheduler)
    if manager is not None and manager.holds_admission:
        return False
    return scheduler.request_receiver.recv_skipper is None


def register_hooks() -> None:
    """Register the hook of this module."""
    add_hook("sglang.srt.managers.scheduler.Scheduler.launch_batch_sample_if_needed", wait_for_arrivals, "after")
