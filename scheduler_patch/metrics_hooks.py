"""Hooks that count verifications, and add SPARSESPEC's metrics to SGLang's log and Prometheus."""

from __future__ import annotations

from typing import Any

from sglang_sparsespec.hook_registry import add_hook
from sglang_sparsespec.scheduler_patch.kv_manager.hooks import manager_of
from sglang_sparsespec.sglang_compat import COUNTS_CORRECT_DRAFTS
from sglang_sparsespec.worker import SparseSpecWorker


def worker_of(scheduler: Any) -> SparseSpecWorker | None:
    """The scheduler's worker if it is SPARSESPEC's (SGLang calls every speculative worker its draft worker)."""
    worker = scheduler.draft_worker
    return worker if isinstance(worker, SparseSpecWorker) else None


def count_verifications(result: Any, processor: Any, round_result: Any, batch: Any, *args: Any) -> None:
    """``SchedulerBatchResultProcessor._resolve_spec_v2_tokens``: SGLang settles a round's acceptance.

    Under overlap scheduling a request that has ended takes part in one more round, whose result is
    dropped; ``BaseSpecWorker.on_verify_complete_cpu`` would count that round too.
    """
    worker = processor.model_worker
    if not isinstance(worker, SparseSpecWorker):
        return
    outcome = getattr(round_result, "outcome", None)
    if outcome is None:
        return
    if outcome.plain_steps:
        if COUNTS_CORRECT_DRAFTS:
            # SGLang is about to add them.
            processor.metrics_reporter.spec_num_correct_drafts -= sum(round_result.num_correct_drafts_per_req_cpu)
        _count_plain_steps(processor, batch, outcome.plain_steps)
        return
    drafts = zip(batch.reqs, round_result.num_correct_drafts_per_req_cpu, strict=True)
    accepted = [count for req, count in drafts if not (req.is_retracted or req.finished())]
    worker.metrics.note_verifications(accepted, outcome.drafted)
    worker.planner.note_acceptance(accepted, outcome.drafted)


def _count_plain_steps(processor: Any, batch: Any, steps: int) -> None:
    """Make SGLang's accept lengths those of ``steps`` forwards of one token each, where it saw one of ``steps`` tokens."""
    processor.metrics_reporter.spec_num_forward_ct += (steps - 1) * len(batch.reqs)
    for req in batch.reqs:
        if not (req.is_retracted or req.finished()):
            req.spec_verify_ct += steps - 1
            req.spec_num_correct_drafts -= steps - 1
            req.spec_correct_drafts_histogram[steps - 1] -= 1
            req.spec_correct_drafts_histogram[0] += steps


def report_draft_metrics(result: Any, reporter: Any, *args: Any, **kwargs: Any) -> None:
    """``SchedulerMetricsReporter.report_decode_stats``: SGLang logs a decode line at intervals.

    All tensor-parallel ranks come here. SGLang's first one logs, and it alone has metrics unless
    ``--enable-metrics-for-all-schedulers``: counters of every rank would add up to a multiple.
    """
    worker = worker_of(reporter.scheduler)
    if worker is None or reporter.forward_ct_decode % reporter.decode_log_interval != 0:
        return
    logs, exports = reporter.is_stats_logging_rank, reporter.current_scheduler_metrics_enabled
    if not (logs or exports):
        return
    worker.metrics.refresh()
    manager = manager_of(reporter.scheduler)
    if logs:
        worker.metrics.log()
        if manager is not None:
            manager.metrics.log(manager.utilisation)
    if exports:
        labels = dict(reporter.metrics_collector.labels)
        worker.metrics.export(labels)
        if manager is not None:
            manager.metrics.export(labels, manager.utilisation)


def register_hooks() -> None:
    """Register the hooks of this module."""
    components = "sglang.srt.managers.scheduler_components."
    add_hook(
        components + "batch_result_processor.SchedulerBatchResultProcessor._resolve_spec_v2_tokens",
        count_verifications,
        "after",
    )
    add_hook(
        components + "metrics_reporter.SchedulerMetricsReporter.report_decode_stats", report_draft_metrics, "after"
    )
