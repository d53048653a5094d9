"""Hooks that put the dynamic KV manager into SGLang's scheduler.

All of them leave a scheduler without ``--sparsespec-host-kv-gb`` as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sglang.srt.managers import schedule_policy
from sglang.srt.runtime_context import get_memory, get_server_args, get_spec

from sglang_sparsespec.hook_registry import add_hook
from sglang_sparsespec.scheduler_patch.kv_manager.hiradix_host_tier import HiRadixHostTier
from sglang_sparsespec.scheduler_patch.kv_manager.host_tier import HostTier
from sglang_sparsespec.scheduler_patch.kv_manager.manager import RESTORE_ROUNDS, KVManager
from sglang_sparsespec.scheduler_patch.kv_manager.unified_host_tier import UnifiedHostTier
from sglang_sparsespec.settings import is_sparsespec, settings_of
from sglang_sparsespec.sglang_compat import HAS_UNIFIED_TREE

#: The tier of this SGLang's radix cache.
TIER: type[HostTier] = UnifiedHostTier if HAS_UNIFIED_TREE else HiRadixHostTier
_ATTRIBUTE = "sparsespec_kv_manager"
#: Room for output that a request needs to be admitted, in units of the growth that is kept
#: free for each running one.
ADMISSION_FACTOR = 4


def _has_host_tier(server_args: Any) -> bool:
    return is_sparsespec(server_args) and settings_of(server_args).has_host_tier


def manager_of(scheduler: Any) -> KVManager | None:
    """The scheduler's ``KVManager``, made on first use; None without a host tier."""
    if not hasattr(scheduler, _ATTRIBUTE):
        setattr(scheduler, _ATTRIBUTE, _make_manager(scheduler))
    return getattr(scheduler, _ATTRIBUTE)


def _make_manager(scheduler: Any) -> KVManager | None:
    if not _has_host_tier(scheduler.server_args):
        return None
    forward_stream = scheduler.forward_stream if scheduler.device == "cuda" else None
    window = get_spec().speculative_num_draft_tokens
    # The longest output that SGLang expects of a request; see admit_aggressively.
    schedule_policy.CLIP_MAX_NEW_TOKENS = ADMISSION_FACTOR * RESTORE_ROUNDS * window
    return KVManager(scheduler, TIER(scheduler.tree_cache, forward_stream), window)


def manage_kv(original: Callable[..., Any], scheduler: Any, running_batch: Any) -> Any:
    """``Scheduler.get_new_batch_prefill``: SGLang admits waiting requests, once per iteration.

    The KV manager takes its step first. While requests are offloaded, none is admitted (the
    queue is out of SGLang's sight); a chunked prefill goes on.
    """
    manager = manager_of(scheduler)
    if manager is None:
        return original(scheduler, running_batch)
    running_batch = manager.step(running_batch)
    waiting = scheduler.waiting_queue if manager.holds_admission else []
    if waiting:
        scheduler.waiting_queue = []
    try:
        plan = original(scheduler, running_batch)
    finally:
        if waiting:
            scheduler.waiting_queue = waiting + scheduler.waiting_queue
    if plan.batch_to_run is not None:
        manager.metrics.tokens_recomputed += plan.batch_to_run.prefill_stats.reprocessed_log_input_tokens
    return plan


def count_retraction(result: Any, scheduler: Any, req: Any, is_retracted: bool = False) -> None:
    """``Scheduler._add_request_to_queue``: SGLang queues retracted requests like new ones."""
    manager = getattr(scheduler, _ATTRIBUTE, None)
    if manager is not None and is_retracted:
        manager.metrics.requests_retracted += 1


def busy_while_offloaded(result: bool, scheduler: Any, *args: Any, **kwargs: Any) -> bool | None:
    """``Scheduler.is_fully_idle``: SGLang checks pools, flushes and updates weights when idle.

    A server with offloaded requests is not idle.
    """
    manager = getattr(scheduler, _ATTRIBUTE, None)
    return False if manager is not None and manager.offloaded else None  # None keeps the result


def abort_offloaded(result: Any, scheduler: Any, recv_req: Any) -> None:
    """``Scheduler.abort_request``: SGLang looks for requests in its batches and queues."""
    manager = getattr(scheduler, _ATTRIBUTE, None)
    if manager is not None:
        manager.abort(recv_req.rid, recv_req.abort_all)


def retract_offloaded(result: Any, scheduler: Any, recv_req: Any) -> None:
    """``Scheduler.pause_generation``: in mode ``retract`` SGLang gives up all KV (weights will change)."""
    manager = getattr(scheduler, _ATTRIBUTE, None)
    if manager is not None and recv_req.mode == "retract":
        manager.retract_all()


def admit_aggressively(result: Any, tracker: Any, **kwargs: Any) -> None:
    """``NewTokenRatioTracker.__init__``: SGLang keeps memory free for a share of the longest outputs.

    With a host tier, ``RESTORE_ROUNDS`` rounds of growth are kept free for each running request
    instead (a share of ``CLIP_MAX_NEW_TOKENS``, set with the manager); what grows longer is
    offloaded.
    """
    if _has_host_tier(get_server_args()):
        tracker.init = tracker.min = tracker.current = 1 / ADMISSION_FACTOR
        # Only after a retraction, which sets a larger one.
        tracker.decay = (1 - tracker.min) / 600


def keep_room_for_growth_only(original: Callable[..., Any], adder: Any, req: Any) -> Any:
    """``PrefillAdder._get_running_request_total_token_offset``: SGLang keeps all of the rest free for a fixed length.

    With a host tier, requests that ignore the end of text are admitted like others; see :func:`admit_aggressively`.
    """
    room = original(adder, req)
    if req.sampling_params.ignore_eos and _has_host_tier(get_server_args()):
        room *= adder.new_token_ratio
    return room


def name_the_flag(original: Callable[..., None], tree: Any, *args: Any, **kwargs: Any) -> None:
    """What makes the radix cache's host pool: SGLang's errors of a host pool that cannot be had do not know our flag."""
    try:
        original(tree, *args, **kwargs)
    except (ValueError, RuntimeError, OSError, MemoryError) as error:
        if not _has_host_tier(get_server_args()):
            raise
        raise RuntimeError(
            f"--sparsespec-host-kv-gb: {get_memory().hicache_size:g} GB of pinned host memory for each GPU could "
            f"not be had ({error}); use a smaller value, or 0 to turn the host tier off."
        ) from error


def register_hooks() -> None:
    """Register the hooks of this module."""
    scheduler = "sglang.srt.managers.scheduler.Scheduler."
    add_hook(scheduler + "get_new_batch_prefill", manage_kv, "around")
    add_hook(scheduler + "_add_request_to_queue", count_retraction, "after")
    add_hook(scheduler + "is_fully_idle", busy_while_offloaded, "after")
    add_hook(scheduler + "abort_request", abort_offloaded, "after")
    add_hook(scheduler + "pause_generation", retract_offloaded, "after")
    tracker = "sglang.srt.managers.scheduler_components.new_token_ratio_tracker.NewTokenRatioTracker"
    add_hook(tracker + ".__init__", admit_aggressively, "after")
    add_hook(
        "sglang.srt.managers.schedule_policy.PrefillAdder._get_running_request_total_token_offset",
        keep_room_for_growth_only,
        "around",
    )
    if HAS_UNIFIED_TREE:
        add_hook("sglang.srt.mem_cache.unified_radix_cache.UnifiedRadixCache.init_hicache", name_the_flag, "around")
    else:
        add_hook("sglang.srt.mem_cache.hiradix_cache.HiRadixCache.__init__", name_the_flag, "around")
