"""The next batch is chosen late, so that a request that arrives during a round waits for that round alone."""

from __future__ import annotations

from typing import Any

import zmq

from sglang_sparsespec.hook_registry import add_hook
from sglang_sparsespec.worker import SparseSpecWorker


def note_results(result: Any, processor: Any, *args: Any) -> None:
    """``SchedulerBatchResultProcessor._resolve_spec_v2_tokens``: SGLang has just waited for a round's results."""
    worker = processor.model_worker
    if isinstance(worker, SparseSpecWorker):
        worker.planner.launch_time.note_results()


def wait_for_arrivals(result: Any, scheduler: Any, batch_result: Any, batch: Any) -> None:
    """``Scheduler.launch_batch_sample_if_needed``, the end of an iteration of ``Scheduler.event_loop_overlap``.

    ``batch`` has been launched and the results of the one before it have been read. SGLang would choose and launch the next
    one at once, and a request that arrives after that would wait for both (:mod:`launch_time`). Where requests wait for
    memory, or a prompt for its next chunk, the next batch is known already.
    """
    worker = scheduler.draft_worker
    if not isinstance(worker, SparseSpecWorker):
        return
    launch_time = worker.planner.launch_time
    if scheduler.last_batch is not None and scheduler.last_batch.forward_mode.is_extend():
        launch_time.note_results()
    if batch is None or scheduler.waiting_queue or scheduler.chunked_req is not None:
        return
    receiver = scheduler.request_receiver
    socket = receiver.recv_from_tokenizer  # None on all tensor-parallel ranks but the first, for which the others wait
    if receiver.recv_skipper is None and isinstance(socket, zmq.Socket):
        launch_time.wait(lambda seconds: bool(socket.poll(1000 * seconds)))


def register_hooks() -> None:
    """Register the hooks of this module."""
    processor = "sglang.srt.managers.scheduler_components.batch_result_processor.SchedulerBatchResultProcessor"
    add_hook(f"{processor}._resolve_spec_v2_tokens", note_results, "after")
    add_hook("sglang.srt.managers.scheduler.Scheduler.launch_batch_sample_if_needed", wait_for_arrivals, "after")
