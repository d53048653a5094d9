"""Whole requests in SGLang's radix cache, on the device and in pinned host memory.

A request that stops decoding for a while becomes what a finished request is: nodes of the
radix tree. SGLang copies them to its host pool (HiCache's write-back: own stream, own
kernels) and then evicts them from the device like any cached prefix, leaf first and only
when the memory is needed; a request that decodes on has them loaded back (HiCache's
load-back). Prefixes are shared as ever: one copy on each side, and what a running request
uses is locked on the device.

This is what the KV manager asks of a tree; :mod:`.hiradix_host_tier` and :mod:`.unified_host_tier` are for the trees of
SGLang's releases. Added there: the nodes of a stored request are never dropped from the host.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.mem_cache.base_prefix_cache import EvictParams

from sglang_sparsespec.sglang_compat import kv_of, release

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req

#: Tokens per node of a stored request, and so per copy: the unit that the device gives up
#: and gets back.
CHUNK_TOKENS = 2048


class HostTier(ABC):
    """Stores requests in a radix cache and brings them back.

    What the methods call a node is the tier's own handle of a stored request's last token.

    Args:
        tree: the scheduler's radix cache.
        forward_stream: stream of the model's forwards, or None on CPU, where copies are
            synchronous.
    """

    def __init__(self, tree: Any, forward_stream: Any = None) -> None:
        self.check(tree)
        self.tree = tree
        self.controller = tree.cache_controller
        self.host_pool = self._host_pool(tree)
        self.allocator = tree.token_to_kv_pool_allocator
        self._rows = tree.req_to_token_pool
        self._forward_stream = forward_stream
        self._loads: list[Any] = []
        #: Whether copies under way kept the last :meth:`store` from making room on the host.
        self.host_is_busy = False
        # SGLang recomputes prefixes of a few tokens instead of loading them; a stored request
        # is loaded whole.
        tree.load_back_threshold = 1

    @staticmethod
    @abstractmethod
    def check(tree: Any) -> None:
        """Raise RuntimeError, with the remedy, if ``tree`` is none that this tier is for."""

    @staticmethod
    @abstractmethod
    def _host_pool(tree: Any) -> Any:
        """The tree's pool of host memory."""

    # ------------------------------------------------------------------------ state

    @property
    def free_tokens(self) -> int:
        """Device slots that are free, or become free without a copy."""
        return self.allocator.available_size() + self.tree.evictable_size()

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one token's KV, all layers."""
        return self.host_pool.size_per_token

    @abstractmethod
    def exclusive_tokens(self, req: Req) -> int:
        """Device slots that nobody but ``req`` (running) holds."""

    @abstractmethod
    def tokens_to_load(self, node: Any) -> int:
        """Tokens of the path to ``node`` that are in host memory only."""

    @abstractmethod
    def tokens_to_lock(self, node: Any) -> int:
        """Tokens of the path to ``node`` that nobody keeps on the device."""

    # ------------------------------------------------------------------ device to host

    def store(self, req: Req) -> tuple[Any | None, int]:
        """Make ``req``, which no forward in flight contains, nodes of the tree; copy them to the host.

        Its reserved slots are freed, its row is kept, and its device memory becomes evictable
        when the copies are done.

        Returns:
            The node of its last token, protected on the host until :meth:`forget` or
            :meth:`attach`, and the tokens that are copied; (None, tokens) if the host pool is
            full: then the request still holds its device memory, and if it is full only for now (:attr:`host_is_busy`), it
            may be stored again.
        """
        self.host_is_busy = False
        committed = kv_of(req).kv_committed_len
        # The last token's KV is not written yet; it is what the next round drafts from.
        assert committed == len(req.origin_input_ids) + len(req.output_ids) - 1
        self._free_reserve(req, committed)
        start = kv_of(req).cache_protected_len
        while start < committed:
            start = min(start + CHUNK_TOKENS, committed)
            self._insert(req, start)
        node, copied = self._write_out(req)
        if node is not None:
            req.last_node = None
        return node, copied

    def _free_reserve(self, req: Req, committed: int) -> None:
        """Free the slots that the next rounds would have written."""
        reserve = self._rows.req_to_token[kv_of(req).req_pool_idx, committed : req.kv.kv_allocated_len]
        self.allocator.free_segment(reserve, start_pos=committed)
        req.kv.kv_allocated_len = committed

    @abstractmethod
    def _insert(self, req: Req, up_to: int) -> None:
        """Insert the first ``up_to`` tokens of ``req`` into the tree, and move its lock there.

        Slots of what the tree holds already are freed.
        """

    @abstractmethod
    def _write_out(self, req: Req) -> tuple[Any | None, int]:
        """Copy every node of the inserted ``req`` that the host lacks, protect all, and give up its lock.

        Returns:
            As :meth:`store`.
        """

    def is_writing(self) -> bool:
        """Whether copies to the host are under way."""
        return bool(self.tree.ongoing_write_through)

    @abstractmethod
    def is_written(self, node: Any) -> bool:
        """Whether all copies of the path to ``node`` are done."""

    def wait_for_writes(self) -> None:
        """Block until all copies to the host are done."""
        for ack in self.controller.ack_write_queue:
            ack.finish_event.synchronize()
        self.tree.writing_check()

    def evict_all(self) -> None:
        """Evict from the device whatever no running request uses."""
        self.tree.evict(EvictParams(num_tokens=self.tree.evictable_size()))

    # ------------------------------------------------------------------ host to device

    def start_load(self, node: Any) -> bool:
        """Begin to load the path to ``node``; False if the device has no room.

        The path is locked on the device from here on.
        """
        if not self._start_load(node):
            return False
        self._loads.append(node)
        return True

    @abstractmethod
    def _start_load(self, node: Any) -> bool:
        """See :meth:`start_load`."""

    def is_loading(self) -> bool:
        """Whether loads are under way, also of requests that were forgotten meanwhile.

        The tree takes the nodes for nodes on the device, which others may share.
        """
        self._loads = [node for node in self._loads if not self._load_is_done(node)]
        return bool(self._loads)

    @abstractmethod
    def _load_is_done(self, node: Any) -> bool:
        """Whether the load of ``node`` is done."""

    def wait_for_loads(self) -> None:
        """Block until all loads are done."""
        for ack in self.controller.ack_load_queue:
            ack.finish_event.synchronize()
        self.tree.loading_check()

    @abstractmethod
    def lock(self, node: Any) -> None:
        """Keep the path to ``node``, which is on the device, there."""

    def attach(self, req: Req, node: Any) -> None:
        """Give ``req`` the path to ``node``, on the device and locked, as its KV; it may decode again."""
        slots = self._slots(node)
        self._rows.write((kv_of(req).req_pool_idx, slice(0, len(slots))), slots.to(torch.int32))
        kv_of(req).cache_protected_len = len(slots)
        self._hand_over(req, node, slots)

    @abstractmethod
    def _slots(self, node: Any) -> torch.Tensor:
        """Device slots of the path to ``node``: int64 [tokens]."""

    @abstractmethod
    def _hand_over(self, req: Req, node: Any, slots: torch.Tensor) -> None:
        """Make the lock of ``node`` that of ``req``, and protect the node on the host no longer."""

    def forget(self, req: Req, node: Any, locked: bool) -> None:
        """Give up the stored ``req`` and its row; its nodes become ordinary cached ones."""
        self._unprotect(req, node, locked)
        release(req, self.tree)

    @abstractmethod
    def _unprotect(self, req: Req, node: Any, locked: bool) -> None:
        """Protect ``node`` on the host no longer, and make its lock, if there is one, that of ``req``."""
