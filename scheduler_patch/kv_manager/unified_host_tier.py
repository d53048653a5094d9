"""The host tier in a ``UnifiedRadixCache``, whose nodes are numbers: what a node is, its core alone knows.

SGLang's controller orders copies behind the forward in flight by itself.

Copies on the host form paths from the root, without gaps: SGLang deletes a node that has no copy when it evicts it from
the device, whatever hangs below. It protects the last node of a path only, so here every node of a stored request's path
is protected, and copies that nobody protects are dropped all together.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from sglang_sparsespec.scheduler_patch.kv_manager.host_tier import HostTier

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req


@dataclass(eq=False)
class StoredNode:
    """Where a stored request ends in the tree.

    Attributes:
        id: the tree's number of the node.
        host_locks: a number and SGLang's receipt for every node of the path whose copy is protected.
        copies: the copies that were under way when the request was stored, of nodes of its path.
        lock: SGLang's lock of the path on the device; None while it may be evicted.
    """

    id: int
    host_locks: list[tuple[int, Any]] = field(default_factory=list)
    copies: set[int] = field(default_factory=set)
    lock: Any = None


class UnifiedHostTier(HostTier):
    """See :class:`HostTier`; a node is a :class:`StoredNode`."""

    def __init__(self, tree: Any, forward_stream: Any = None) -> None:
        super().__init__(tree, forward_stream)
        fences = (self.controller.write_fence_stream, self.controller.load_fence_stream)
        if forward_stream is not None and fences != (forward_stream, forward_stream):
            raise RuntimeError("sglang-sparsespec does not fit this sglang: copies do not wait for the forward in flight.")
        self._protected: list[StoredNode] = []

    @staticmethod
    def check(tree: Any) -> None:
        """Raise RuntimeError, with the remedy, if ``tree`` is no ``UnifiedRadixCache`` with a host pool of whole KV."""
        from sglang.srt.mem_cache.unified_cache.component_type import ComponentType
        from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache

        if (
            not isinstance(tree, UnifiedRadixCache)
            or tree.cache_controller is None
            or tree.buffer_pipeline is not None
            or tree.tree_components != (ComponentType.FULL,)
        ):
            raise RuntimeError(
                f"--sparsespec-host-kv-gb needs SGLang's UnifiedRadixCache with its host pool, found {type(tree).__name__}; "
                "remove --radix-cache-backend, --hicache-host-memory-mode and flags for other caches, or use "
                "--sparsespec-host-kv-gb 0."
            )

    @staticmethod
    def _host_pool(tree: Any) -> Any:
        return tree.host_pool_group.anchor_entry.host_pool

    # ------------------------------------------------------------------------ state

    def _path(self, node_id: int) -> Any:
        """SGLang's description of every node of the path to ``node_id``, from the root down."""
        return self.tree.tree_core.collect_path_info([node_id])[0]

    def exclusive_tokens(self, req: Req) -> int:
        """Device slots that nobody but ``req`` (running) holds."""
        held = self.tree.protected_size()
        self.tree.unlock(req.lock)
        alone = held - self.tree.protected_size()
        req.lock = self.tree.lock(req.last_node)
        return req.kv.kv_allocated_len - req.kv.cache_protected_len + alone

    def tokens_to_load(self, node: StoredNode) -> int:
        """Tokens of the path to ``node`` that are in host memory only."""
        return sum(part.path_end - part.path_start for part in self._path(node.id) if part.full_value_len is None)

    def tokens_to_lock(self, node: StoredNode) -> int:
        """Tokens of the path to ``node`` that nobody keeps on the device."""
        locked = self.tree.inc_lock_ref(node.id)
        self.tree.dec_lock_ref(node.id, locked.to_dec_params())
        return locked.delta + self.tokens_to_load(node)

    # ------------------------------------------------------------------ device to host

    def _insert(self, req: Req, up_to: int) -> None:
        """Insert the first ``up_to`` tokens of ``req`` into the tree, and move its lock there."""
        req.refresh_fill_ids()
        self.tree.checkpoint(req, up_to=up_to)

    def _write_out(self, req: Req) -> tuple[StoredNode | None, int]:
        """Copy every node of the inserted ``req`` that the host lacks, protect all, and give up its lock."""
        node = StoredNode(req.last_node)
        self._protected.append(node)
        copied = 0
        for part in self._path(node.id):
            if not self.tree.is_backuped(part.node_id):
                if not self._copy(part.node_id):
                    self._unprotect_host(node)
                    return None, copied
                copied += part.path_end - part.path_start
            node.host_locks.append((part.node_id, self.tree.inc_host_lock_ref(part.node_id).to_dec_params()))
            node.copies |= self._copies_of(part.node_id)
        self.tree.unlock(req.lock)
        req.lock = None
        return node, copied

    def _copy(self, node_id: int) -> bool:
        """Begin to copy one node, whose ancestors have copies; False if the host has no room."""
        for attempt in range(2):
            if attempt and not self._drop_unprotected_copies():
                return False
            written = self.tree._execute_and_commit_kv_backup(self.tree.tree_core.build_backup_kv_action(node_id))
            if written:
                # One copy for each node, so that the device gets its memory back in these units.
                self.tree.flush_pending_backups()
                return True
        return False

    def _copies_of(self, node_id: int) -> set[int]:
        """The copies under way that include ``node_id``."""
        writes = self.tree.ongoing_write_through
        return {copy for copy, write in writes.items() if node_id in write.publish_node_ids}

    def _drop_unprotected_copies(self) -> bool:
        """Drop all copies of nodes that no stored request needs; False if some of them are being read or written.

        SGLang keeps copies of what is on the device too; running requests that were stored once would fill the host. It
        drops them under its write-back policy only, and those of nodes that are on the host alone at all times.
        """
        tree = self.tree
        written = set().union(*(node.copies for node in self._protected))
        loaded = {node.id for node in self._protected}
        # Of a copy in use, SGLang protects the last node only: those above would be dropped.
        self.host_is_busy = bool(tree.ongoing_write_through.keys() - written or tree.ongoing_load_back.keys() - loaded)
        if self.host_is_busy:
            return False
        tree.is_write_back = True
        try:
            tree.evict_host(self.host_pool.logical_size)
        finally:
            tree.is_write_back = False
        return True

    def is_written(self, node: StoredNode) -> bool:
        """Whether all copies of the path to ``node`` are done."""
        return node.copies.isdisjoint(self.tree.ongoing_write_through)

    def wait_for_writes(self) -> None:
        """Block until all copies to the host are done."""
        self.tree.flush_pending_backups()
        super().wait_for_writes()

    # ------------------------------------------------------------------ host to device

    def _start_load(self, node: StoredNode) -> bool:
        if not self.tree.load_back(node.id):
            return False
        self.lock(node)
        self.tree.ready_to_load_host_cache()
        return True

    def _load_is_done(self, node: StoredNode) -> bool:
        return node.id not in self.tree.ongoing_load_back

    def lock(self, node: StoredNode) -> None:
        """Keep the path to ``node``, which is on the device, there."""
        node.lock = self.tree.lock(node.id)

    def _slots(self, node: StoredNode) -> torch.Tensor:
        return self.tree.path_device_indices(node.id)

    def _hand_over(self, req: Req, node: StoredNode, slots: torch.Tensor) -> None:
        self._unprotect(req, node, locked=True)
        req.last_node = node.id

    def _unprotect(self, req: Req, node: StoredNode, locked: bool) -> None:
        self._unprotect_host(node)
        req.lock = node.lock

    def _unprotect_host(self, node: StoredNode) -> None:
        for node_id, receipt in node.host_locks:
            self.tree.dec_host_lock_ref(node_id, receipt)
        self._protected.remove(node)
