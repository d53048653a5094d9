"""Whole requests in SGLang's radix cache, on the device and in pinned host memory.

A request that stops decoding for a while becomes what a finished request is: nodes of the
radix tree. ``HiRadixCache`` copies them to its host pool (HiCache's write-back: own stream,
own kernels) and then evicts them from the device like any cached prefix, leaf first and only
when the memory is needed; a request that decodes on has them loaded back (HiCache's
load-back). Prefixes are shared as ever: one copy on each side, and what a running request
uses is locked on the device.

Added here: the nodes of a stored request are never dropped from the host, and slots that a
forward in flight still reads or writes are not copied before it is done.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.mem_cache.base_prefix_cache import EvictParams
from sglang.srt.mem_cache.common import release_kv_cache

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req
    from sglang.srt.mem_cache.hiradix_cache import HiRadixCache
    from sglang.srt.mem_cache.radix_cache import TreeNode

logger = logging.getLogger(__name__)

#: Tokens per node of a stored request, and so per copy: the unit that the device gives up
#: and gets back.
CHUNK_TOKENS = 2048


class HostTier:
    """Stores requests in a ``HiRadixCache`` and brings them back.

    Args:
        tree: the scheduler's radix cache.
        forward_stream: stream of the model's forwards, or None on CPU, where copies are
            synchronous.
    """

    def __init__(self, tree: HiRadixCache, forward_stream: Any = None) -> None:
        self.tree = tree
        self.controller = tree.cache_controller
        self.host_pool = tree.token_to_kv_pool_host
        self.allocator = tree.token_to_kv_pool_allocator
        self._rows = tree.req_to_token_pool
        self._forward_stream = forward_stream
        # SGLang recomputes prefixes of a few tokens instead of loading them; a stored request
        # is loaded whole.
        tree.load_back_threshold = 1

    # ------------------------------------------------------------------------ state

    @property
    def free_tokens(self) -> int:
        """Device slots that are free, or become free without a copy."""
        return self.allocator.available_size() + self.tree.evictable_size()

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one token's KV, all layers."""
        return self.host_pool.size_per_token

    @staticmethod
    def exclusive_tokens(req: Req) -> int:
        """Device slots that nobody but ``req`` (running) holds."""
        tokens = req.kv.kv_allocated_len - req.cache_protected_len
        node = req.last_node
        while node.parent is not None and node.lock_ref == 1:
            tokens += len(node.key)
            node = node.parent
        return tokens

    @staticmethod
    def tokens_to_load(node: TreeNode) -> int:
        """Tokens of the path to ``node`` that are in host memory only."""
        tokens = 0
        while node.evicted:
            tokens += len(node.key)
            node = node.parent
        return tokens

    @staticmethod
    def tokens_to_lock(node: TreeNode) -> int:
        """Tokens of the path to ``node`` that nobody keeps on the device."""
        tokens = 0
        while node.parent is not None and node.lock_ref == 0:
            tokens += len(node.key)
            node = node.parent
        return tokens

    # ------------------------------------------------------------------ device to host

    def store(self, req: Req) -> tuple[TreeNode | None, int]:
        """Make ``req``, which no forward in flight contains, nodes of the tree; copy them to the host.

        Its reserved slots are freed, its row is kept, and its device memory becomes evictable
        when the copies are done.

        Returns:
            The node of its last token, protected on the host until :meth:`forget` or
            :meth:`attach`, and the tokens that are copied; (None, tokens) if the host pool is
            full: then the request still holds its device memory.
        """
        committed = req.kv_committed_len
        # The last token's KV is not written yet; it is what the next round drafts from.
        assert committed == len(req.origin_input_ids) + len(req.output_ids) - 1
        self._free_reserve(req, committed)
        self._insert(req, committed)
        node = req.last_node
        copied, complete = self._write_out(node)
        if not complete:
            return None, copied
        self.tree.dec_lock_ref(node)
        node.protect_host()
        req.last_node = None
        return node, copied

    def _free_reserve(self, req: Req, committed: int) -> None:
        """Free the slots that the next rounds would have written."""
        allocated = req.kv.kv_allocated_len
        reserve = self._rows.req_to_token[req.req_pool_idx, committed:allocated]
        self.allocator.free_segment(reserve, start_pos=committed)
        req.kv.kv_allocated_len = committed

    def _insert(self, req: Req, committed: int) -> None:
        """Insert all committed tokens into the tree, a node per chunk.

        ``cache_unfinished_req`` also drops what the tree holds already, and moves the lock.
        """
        extend_range = req.extend_range
        req._refresh_fill_ids()
        start = req.cache_protected_len
        while start < committed:
            start = min(start + CHUNK_TOKENS, committed)
            req.set_extend_range(0, start)
            self.tree.cache_unfinished_req(req, chunked=True)
        req.extend_range = extend_range

    def _write_out(self, node: TreeNode) -> tuple[int, bool]:
        """Copy every node of the path to ``node`` that the host lacks; tokens copied, and whether all were."""
        path = []
        while node.parent is not None:
            path.append(node)
            node = node.parent
        copied = 0
        self._after_forward(self.controller.write_stream)
        for missing in [node for node in reversed(path) if not node.backuped]:
            size = len(missing.key)
            if self.tree.write_backup(missing) == 0:
                self._reclaim_host(size, keep={node.id for node in path})
                if self.tree.write_backup(missing) == 0:
                    return copied, False
            copied += size
        return copied, True

    def _reclaim_host(self, num_tokens: int, keep: set[int]) -> None:
        """Drop host copies of nodes, but of those in ``keep``, that are on the device too, deepest first.

        HiCache keeps them; running requests that were stored once would fill the host.
        """
        if self.tree.ongoing_load_back:
            return  # a load's source nodes count as being on the device already
        freed = 0
        for node in reversed(self._nodes_in_preorder()):
            if freed >= num_tokens:
                return
            redundant = node.backuped and not node.evicted and node.id not in keep
            in_use = node.host_ref_counter > 0 or node.write_through_pending_id is not None
            # Copies form paths from the root, without gaps.
            is_host_leaf = not any(child.backuped for child in node.children.values())
            if redundant and is_host_leaf and not in_use:
                freed += self.controller.evict_host(node.host_value)
                node.host_value = None

    def _nodes_in_preorder(self) -> list[TreeNode]:
        nodes, stack = [], list(self.tree.root_node.children.values())
        while stack:
            node = stack.pop()
            nodes.append(node)
            stack.extend(node.children.values())
        return nodes

    def is_writing(self) -> bool:
        """Whether copies to the host are under way."""
        return bool(self.tree.ongoing_write_through)

    def is_written(self, node: TreeNode) -> bool:
        """Whether the last copy of the path to ``node`` is done (copies are done in order)."""
        return node.write_through_pending_id is None

    def wait_for_writes(self) -> None:
        """Block until all copies to the host are done."""
        for ack in self.controller.ack_write_queue:
            ack.finish_event.synchronize()
        self.tree.writing_check()

    def evict_all(self) -> None:
        """Evict from the device whatever no running request uses."""
        self.tree.evict(EvictParams(num_tokens=self.tree.evictable_size()))

    # ------------------------------------------------------------------ host to device

    def start_load(self, node: TreeNode) -> bool:
        """Begin to load the path to ``node``; False if the device has no room.

        The path is locked on the device from here on. At most one load may be under way:
        SGLang's prefills use the same ring of three events.
        """
        if self.tree.load_back(node) is None:
            return False
        self.tree.inc_lock_ref(node)
        self._after_forward(self.controller.load_stream)
        self.controller.start_loading()
        return True

    def is_loaded(self, node: TreeNode) -> bool:
        """Whether :meth:`start_load` of ``node`` is done."""
        return node.id not in self.tree.ongoing_load_back

    def wait_for_loads(self) -> None:
        """Block until all loads are done."""
        for ack in self.controller.ack_load_queue:
            ack.finish_event.synchronize()
        self.tree.loading_check()

    def attach(self, req: Req, node: TreeNode) -> None:
        """Give ``req`` the path to ``node``, on the device and locked, as its KV; it may decode again."""
        slots = []
        ancestor = node
        while ancestor.parent is not None:
            slots.append(ancestor.value)
            ancestor = ancestor.parent
        indices = torch.cat(slots[::-1])
        self._rows.write((req.req_pool_idx, slice(0, len(indices))), indices.to(torch.int32))
        req.prefix_indices = indices
        req.cache_protected_len = len(indices)
        req.last_node = node
        node.release_host()

    def lock(self, node: TreeNode) -> None:
        """Keep the path to ``node``, which is on the device, there."""
        self.tree.inc_lock_ref(node)

    def forget(self, req: Req, node: TreeNode, locked: bool) -> None:
        """Give up the stored ``req`` and its row; its nodes become ordinary cached ones."""
        node.release_host()
        req.last_node = node if locked else None
        release_kv_cache(req, self.tree, is_insert=False)

    def _after_forward(self, stream: Any) -> None:
        """Order ``stream`` behind the forward in flight.

        HiCache orders copies behind the scheduler's stream only. The forward in flight may
        belong to a prefill that shares the nodes to copy, or to a request that has ended and
        still writes to slots that are free by now.
        """
        if self._forward_stream is not None:
            stream.wait_stream(self._forward_stream)
