"""Hooks that add SPARSESPEC's metrics to SGLang's log, ``/server_info`` and Prometheus."""

from __future__ import annotations

from typing import Any

from sglang_sparsespec.scheduler_patch.hooks import add_hook
from sglang_sparsespec.scheduler_patch.kv_manager_hooks import manager_of


def _metrics_of(scheduler: Any) -> Any:
    return getattr(scheduler.draft_worker, "sparsespec_metrics", None)


def count_verifications(result: Any, processor: Any, round_result: Any, batch: Any, *args: Any) -> None:
    """``SchedulerBatchResultProcessor._resolve_spec_v2_tokens``: SGLang settles a round's acceptance.

    Under overlap scheduling a request that has ended takes part in one more round, whose result is
    dropped; ``BaseSpecWorker.on_verify_complete_cpu`` would count that round too.
    """
    worker = processor.model_worker
    metrics = getattr(worker, "sparsespec_metrics", None)
    if metrics is None:
        return
    if round_result.num_plain_steps:
        _count_plain_steps(processor, batch, round_result.num_plain_steps)
        return
    drafts = zip(batch.reqs, round_result.num_correct_drafts_per_req_cpu, strict=True)
    accepted = [count for req, count in drafts if not (req.is_retracted or req.finished())]
    metrics.count(accepted, round_result.num_drafted)
    worker.attn_backend.policy.note_acceptance(accepted, round_result.num_drafted)
    if round_result.is_typical:
        worker.speculation.note_acceptance(accepted)


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
    metrics = _metrics_of(reporter.scheduler)
    if metrics is None or reporter.forward_ct_decode % reporter.decode_log_interval != 0:
        return
    logs, exports = reporter.is_stats_logging_rank, reporter.current_scheduler_metrics_enabled
    if not (logs or exports):
        return
    metrics.refresh()
    manager = manager_of(reporter.scheduler)
    if logs:
        metrics.log()
        if manager is not None:
            manager.metrics.log(manager.utilisation)
    if exports:
        labels = dict(reporter.metrics_collector.labels)
        metrics.export(labels)
        if manager is not None:
            manager.metrics.export(labels, manager.utilisation)


def add_internal_state(result: Any, scheduler: Any, *args: Any, **kwargs: Any) -> None:
    """``Scheduler.get_internal_state``: SGLang's answer to ``/server_info``."""
    metrics = _metrics_of(scheduler)
    if metrics is None:
        return
    metrics.refresh(wait=True)
    state = result.internal_state
    state.update(metrics.as_dict())
    # After a flush of the radix cache of an idle server, free must equal total again.
    state["kv_tokens_free"] = scheduler.token_to_kv_pool_allocator.available_size()
    state["kv_tokens_total"] = scheduler.max_total_num_tokens
    manager = manager_of(scheduler)
    if manager is not None:
        state.update(manager.metrics.as_dict(manager.utilisation))
        state["host_kv_tokens_free"] = manager.tier.host_pool.available_size()
        state["host_kv_tokens_total"] = manager.tier.host_pool.logical_size


def register_metrics_hooks() -> None:
    """Register the hooks of this module."""
    add_hook(
        "sglang.srt.managers.scheduler_components.batch_result_processor.SchedulerBatchResultProcessor"
        "._resolve_spec_v2_tokens",
        count_verifications,
        "after",
    )
    add_hook(
        "sglang.srt.managers.scheduler_components.metrics_reporter.SchedulerMetricsReporter.report_decode_stats",
        report_draft_metrics,
        "after",
    )
    add_hook("sglang.srt.managers.scheduler.Scheduler.get_internal_state", add_internal_state, "after")
