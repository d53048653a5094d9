"""SGLang plugin of ``kv_manager.py``: ends requests at lengths that the scheduler cannot foresee, counts recomputed tokens.

It stands in for an end-of-text token. A request with ``custom_params={"end_at": n}`` ends with its n-th token, while all
that SGLang plans with (admission, the ratio after a retraction) sees the ``max_new_tokens`` that it declares.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

END_AT = "end_at"
#: Keys of the counts in /server_info's internal state.
RECOMPUTED = "benchmark_recomputed_tokens"
RETRACTIONS = "benchmark_retractions"

#: Of this scheduler process.
_counts: Counter[str] = Counter()


def install(folder: Path) -> None:
    """Let the engines that this process starts load the plugin.

    SGLang finds plugins by the entry points of distributions on ``sys.path``, which its processes inherit (multiprocessing
    hands it to spawned children). Call before the first engine.

    Args:
        folder: an empty folder that outlives the engines.
    """
    info = folder / "sparsespec_benchmark_end-0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: sparsespec-benchmark-end\nVersion: 0\n")
    (info / "entry_points.txt").write_text(f"[sglang.srt.plugins]\nzz_benchmark_end = {__name__}:register\n")
    sys.path.append(str(folder))


def end_at_length(original: Callable[..., None], req: Any, *args: Any, **kwargs: Any) -> None:
    """``Req.update_finish_state``: SGLang looks whether a request is done, and trims what a round wrote past its end.

    During this call alone, its longest length is ``end_at``; so SGLang's own code ends and trims it.
    """
    sampling = req.sampling_params
    end_at = (sampling.custom_params or {}).get(END_AT)
    if end_at is None:
        return original(req, *args, **kwargs)
    declared = sampling.max_new_tokens
    sampling.max_new_tokens = min(declared, end_at)
    try:
        return original(req, *args, **kwargs)
    finally:
        sampling.max_new_tokens = declared


def count_recomputed(result: Any, batch: Any) -> None:
    """``ScheduleBatch.prepare_for_extend``: SGLang prefills requests, those that it retracted again."""
    _counts[RECOMPUTED] += sum(req.extend_range.length for req in batch.reqs if req.retracted_stain)


def count_retraction(result: Any, req: Any) -> None:
    """``Req.reset_for_retract``: SGLang (or the KV manager) gives up a request's KV."""
    _counts[RETRACTIONS] += 1


def add_counts(result: Any, scheduler: Any, *args: Any, **kwargs: Any) -> None:
    """``Scheduler.get_internal_state``: SGLang's answer to /server_info."""
    result.internal_state.update({name: _counts[name] for name in (RECOMPUTED, RETRACTIONS)})


def register() -> None:
    """Register the hooks; SGLang calls it in each of its processes."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    managers = "sglang.srt.managers."
    HookRegistry.register(managers + "schedule_batch.Req.update_finish_state", end_at_length, HookType.AROUND)
    HookRegistry.register(managers + "schedule_batch.Req.reset_for_retract", count_retraction, HookType.AFTER)
    HookRegistry.register(managers + "schedule_batch.ScheduleBatch.prepare_for_extend", count_recomputed, HookType.AFTER)
    HookRegistry.register(managers + "scheduler.Scheduler.get_internal_state", add_counts, HookType.AFTER)
