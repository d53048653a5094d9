"""The host tier in a ``HiRadixCache``, whose nodes are objects.

Added to SGLang's: slots that a forward in flight still reads or writes are not copied before it is done.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from sglang_sparsespec.scheduler_patch.kv_manager.host_tier import HostTier

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req
    from sglang.srt.mem_cache.radix_cache import TreeNode


class HiRadixHostTier(HostTier):
    """See :class:`HostTier`; a node is the tree's."""

    @staticmethod
    def check(tree: Any) -> None:
        """Raise RuntimeError, with the remedy, if ``tree`` is no ``HiRadixCache``."""
        from sglang.srt.mem_cache.hiradix_cache import HiRadixCache

        if not isinstance(tree, HiRadixCache):
            raise RuntimeError(
                f"--sparsespec-host-kv-gb needs SGLang's HiRadixCache, found {type(tree).__name__}; remove "
                "--radix-cache-backend and SGLANG_ENABLE_UNIFIED_RADIX_TREE, or use --sparsespec-host-kv-gb 0."
            )

    @staticmethod
    def _host_pool(tree: Any) -> Any:
        return tree.token_to_kv_pool_host

    # ------------------------------------------------------------------------ state

    def exclusive_tokens(self, req: Req) -> int:
        """Device slots that nobody but ``req`` (running) holds."""
        tokens = req.kv.kv_allocated_len - req.cache_protected_len
        node = req.last_node
        while node.parent is not None and node.lock_ref == 1:
            tokens += len(node.key)
            node = node.parent
        return tokens

    def tokens_to_load(self, node: TreeNode) -> int:
        """Tokens of the path to ``node`` that are in host memory only."""
        tokens = 0
        while node.evicted:
            tokens += len(node.key)
            node = node.parent
        return tokens

    def tokens_to_lock(self, node: TreeNode) -> int:
        """Tokens of the path to ``node`` that nobody keeps on the device."""
        tokens = 0
        while node.parent is not None and node.lock_ref == 0:
            tokens += len(node.key)
            node = node.parent
        return tokens

    # ------------------------------------------------------------------ device to host

    def _insert(self, req: Req, up_to: int) -> None:
        """Insert the first ``up_to`` tokens of ``req`` into the tree, and move its lock there.

        ``cache_unfinished_req`` also drops what the tree holds already.
        """
        extend_range = req.extend_range
        req._refresh_fill_ids()
        req.set_extend_range(0, up_to)
        self.tree.cache_unfinished_req(req, chunked=True)
        req.extend_range = extend_range

    def _write_out(self, req: Req) -> tuple[TreeNode | None, int]:
        """Copy every node of the inserted ``req`` that the host lacks, protect all, and give up its lock."""
        path = []
        node = req.last_node
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
                    return None, copied
            copied += size
        self.tree.dec_lock_ref(req.last_node)
        req.last_node.protect_host()
        return req.last_node, copied

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

    def is_written(self, node: TreeNode) -> bool:
        """Whether the last copy of the path to ``node`` is done (copies are done in order)."""
        return node.write_through_pending_id is None

    # ------------------------------------------------------------------ host to device

    def _start_load(self, node: TreeNode) -> bool:
        if self.tree.load_back(node) is None:
            return False
        self.tree.inc_lock_ref(node)
        self._after_forward(self.controller.load_stream)
        self.controller.start_loading()
        return True

    def _load_is_done(self, node: TreeNode) -> bool:
        return node.id not in self.tree.ongoing_load_back

    def lock(self, node: TreeNode) -> None:
        """Keep the path to ``node``, which is on the device, there."""
        self.tree.inc_lock_ref(node)

    def _slots(self, node: TreeNode) -> torch.Tensor:
        slots = []
        while node.parent is not None:
            slots.append(node.value)
            node = node.parent
        return torch.cat(slots[::-1])

    def _hand_over(self, req: Req, node: TreeNode, slots: torch.Tensor) -> None:
        req.prefix_indices = slots
        req.last_node = node
        node.release_host()

    def _unprotect(self, req: Req, node: TreeNode, locked: bool) -> None:
        node.release_host()
        req.last_node = node if locked else None

    def _after_forward(self, stream: Any) -> None:
        """Order ``stream`` behind the forward in flight.

        HiCache orders copies behind the scheduler's stream only. The forward in flight may
        belong to a prefill that shares the nodes to copy, or to a request that has ended and
        still writes to slots that are free by now.
        """
        if self._forward_stream is not None:
            stream.wait_stream(self._forward_stream)
