"""Decode rounds between prefill batches (``--enable-mixed-chunk``).

SGLang prefers prefill: while a long prompt is prefilled in chunks, or prompts wait in the queue, nothing decodes. Its
remedy, requests that decode in the same forward as a chunk, is forbidden with speculation or gives them one plain token a
chunk. Here prefill batches and decode rounds take turns instead, one each, while both have something to do
(docs/design.md, section 8).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sglang_sparsespec.hook_registry import add_hook
from sglang_sparsespec.settings import settings_of
from sglang_sparsespec.sglang_compat import prefix_len


def tokens_of_chunks_to_come(scheduler: Any) -> int:
    """KV tokens that the prompt in mid-prefill has yet to be given; 0 if there is none."""
    req = scheduler.chunked_req
    return len(req.full_untruncated_fill_ids) - prefix_len(req) if req is not None else 0


def tokens_of_room(scheduler: Any) -> int:
    """KV slots that are free or that the radix cache would give up; in the pool with fewer, where windows have their own."""
    allocator, cache = scheduler.token_to_kv_pool_allocator, scheduler.tree_cache
    if not cache.supports_swa():
        return allocator.available_size() + cache.evictable_size()
    full = allocator.full_available_size() + cache.full_evictable_size()
    return min(full, allocator.swa_available_size() + cache.swa_evictable_size())


def round_is_due(scheduler: Any, running: Any) -> bool:
    """Whether a decode round comes before the next prefill batch: it is its turn, and its memory is free.

    SGLang admits a prompt if all of its chunks fit, and cannot put it back between them (the allocation would fail).
    With this hook decoding requests grow meanwhile: they must leave what the chunks to come need. Where they cannot,
    the chunks go first, as without the flag.
    """
    last = scheduler.last_batch
    if last is None or not last.forward_mode.is_extend() or running.is_prefill_only:
        return False
    decoding = [i for i, req in enumerate(running.reqs) if not req.finished()]
    if not decoding:
        return False
    to_come = tokens_of_chunks_to_come(scheduler)
    if not to_come:
        return True  # SGLang's decode step checks its memory itself, and can retract
    return tokens_of_room(scheduler) >= to_come + running.new_tokens_required_next_decode(decoding)


def decode_between_prefills(
    original: Callable[..., tuple[Any, Any]], scheduler: Any, prefill_delayer_single_pass: Any, running_batch: Any
) -> tuple[Any, Any]:
    """``Scheduler._get_new_batch_prefill_raw``: SGLang makes a prefill batch whenever it can.

    With ``--enable-mixed-chunk`` none is made right after another one while requests decode, so that SGLang goes on to
    a decode round. By then it has merged the last prefill's requests into the running batch and cached the last
    chunk, once: the request in mid-prefill stays aside in ``chunked_req`` whatever is run meanwhile. This is below
    ``get_new_batch_prefill``, so that the KV manager takes its step in each iteration.
    """
    if settings_of(scheduler.server_args).prefill_beside_decoding and round_is_due(scheduler, running_batch):
        waits = scheduler.waiting_queue and not running_batch.batch_is_full
        if waits or scheduler.chunked_req is not None:
            scheduler.draft_worker.metrics.note_interleaved_round()
        return None, running_batch
    return original(
        scheduler, prefill_delayer_single_pass=prefill_delayer_single_pass, running_batch=running_batch
    )


def register_hooks() -> None:
    """Register the hook of this module."""
    add_hook(
        "sglang.srt.managers.scheduler.Scheduler._get_new_batch_prefill_raw", decode_between_prefills, "around"
    )
